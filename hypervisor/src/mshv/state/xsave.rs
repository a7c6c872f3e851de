//! The XSAVE area, which the hypervisor hands out in its own format (compacted, by its header), and the vector registers in it for
//! the instruction emulator.

use arch::x86_64::state::{Bytes, StateElement, VcpuState};
use mshv_bindings::{HV_PAGE_SIZE, MSHV_VP_STATE_XSAVE, mshv_get_set_vp_state};
use mshv_ioctls::{MshvError, VcpuFd};

use super::refused;
use crate::Result;
use crate::mshv::call;
use crate::mshv::vcpu::MshvVcpu;
use crate::xsave::Layout;

/// Most pages of an area: AMX's tiles are 8 KiB of it.
const MOST_PAGES: usize = 8;

/// Page-aligned bytes that the driver pins.
#[derive(Clone)]
struct Page(
    #[expect(dead_code, reason = "only its size matters: it is read as bytes")] [u8; HV_PAGE_SIZE],
);

/// Pages, aligned as the driver demands.
struct Pages {
    memory: Vec<Page>,
    skip: usize,
    pages: usize,
}

impl Pages {
    fn new(pages: usize) -> Self {
        // One more than needed: somewhere in it begins a page.
        let memory = vec![Page([0; HV_PAGE_SIZE]); pages + 1];
        let skip =
            (memory.as_ptr() as usize).next_multiple_of(HV_PAGE_SIZE) - memory.as_ptr() as usize;
        Self {
            memory,
            skip,
            pages,
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `Page` is an array of bytes, so pages in a row are bytes in a row; inside, since one page more was allocated.
        unsafe {
            std::slice::from_raw_parts(
                self.memory.as_ptr().cast::<u8>().add(self.skip),
                self.pages * HV_PAGE_SIZE,
            )
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.memory.as_mut_ptr().cast::<u8>().add(self.skip),
                self.pages * HV_PAGE_SIZE,
            )
        }
    }

    fn request(&mut self) -> mshv_get_set_vp_state {
        let bytes = self.bytes_mut();
        mshv_get_set_vp_state {
            type_: MSHV_VP_STATE_XSAVE as u8,
            buf_sz: bytes.len() as u32,
            buf_ptr: bytes.as_mut_ptr() as u64,
            ..Default::default()
        }
    }
}

/// Reads the area as the hypervisor has it.
pub(crate) fn read(vp: &VcpuFd) -> Result<Vec<u8>> {
    let mut pages = 1;
    loop {
        let mut buffer = Pages::new(pages);
        let mut request = buffer.request();
        match vp.get_vp_state_ioctl(&mut request) {
            Ok(()) => return Ok(buffer.bytes().to_vec()),
            // Too short: the driver has put in how long it must be.
            Err(MshvError::Errno(errno))
                if errno.errno() == libc::EINVAL
                    && request.buf_sz as usize > pages * HV_PAGE_SIZE
                    && (request.buf_sz as usize) <= MOST_PAGES * HV_PAGE_SIZE =>
            {
                pages = (request.buf_sz as usize).div_ceil(HV_PAGE_SIZE);
            }
            Err(error) => return Err(call("MSHV_GET_VP_STATE")(error)),
        }
    }
}

/// Writes the area in the hypervisor's format.
pub(crate) fn write(vp: &VcpuFd, area: &[u8]) -> Result<()> {
    let mut buffer = Pages::new(area.len().div_ceil(HV_PAGE_SIZE).max(1));
    buffer.bytes_mut()[..area.len()].copy_from_slice(area);
    let request = buffer.request();
    vp.set_vp_state_ioctl(&request)
        .map_err(call("MSHV_SET_VP_STATE"))
}

/// Reads the area in the standard format.
pub(crate) fn read_standard(vcpu: &MshvVcpu) -> Result<Vec<u8>> {
    let layout = Layout::of(vcpu.vm.host.supported_cpuid()?);
    layout
        .standard(&read(&vcpu.fd)?)
        .map_err(|reason| refused(vcpu, StateElement::Xsave, reason))
}

/// Writes an area in the standard format.
pub(crate) fn write_standard(vcpu: &MshvVcpu, area: &[u8]) -> Result<()> {
    let layout = Layout::of(vcpu.vm.host.supported_cpuid()?);
    let like = read(&vcpu.fd)?;
    let area = layout
        .in_format_of(area, &like)
        .map_err(|reason| refused(vcpu, StateElement::Xsave, reason))?;
    write(&vcpu.fd, &area)
}

pub(super) fn save(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.xsave = Some(Bytes(read_standard(vcpu)?));
    Ok(())
}

pub(super) fn restore(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    match &state.xsave {
        Some(area) => write_standard(vcpu, &area.0),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_as_many_as_asked_for() {
        for count in 1..4 {
            let mut pages = Pages::new(count);
            assert_eq!(pages.bytes().len(), count * HV_PAGE_SIZE);
            assert!((pages.bytes().as_ptr() as usize).is_multiple_of(HV_PAGE_SIZE));
            pages.bytes_mut().fill(7);
            assert!(pages.bytes().iter().all(|&byte| byte == 7));
        }
    }
}
