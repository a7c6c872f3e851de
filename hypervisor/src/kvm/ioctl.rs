//! The few KVM calls that `kvm-ioctls` has not wrapped, or wraps with more work than a hot path wants.
//!
//! Numbers and structures: Linux `include/uapi/linux/kvm.h` and `Documentation/virt/kvm/api.rst`.

use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_cpuid2, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_nested_state, kvm_sregs2,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

/// The numbers; private, since a number without its argument type is a hazard.
mod number {
    use super::*;
    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
    ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
    ioctl_iowr_nr!(KVM_GET_NESTED_STATE, KVMIO, 0xbe, kvm_nested_state);
    ioctl_iow_nr!(KVM_SET_NESTED_STATE, KVMIO, 0xbf, kvm_nested_state);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);
    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
}

/// Smallest XSAVE buffer KVM reads or writes: `sizeof(struct kvm_xsave)` without its flexible tail.
pub(crate) const XSAVE_MIN: usize = size_of::<kvm_xsave>();
/// Size of the header of `struct kvm_nested_state`.
pub(crate) const NESTED_HEADER: usize = size_of::<kvm_nested_state>();

/// Turns an ioctl's answer into a result.
fn check(answer: i32) -> io::Result<i32> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// KVM_GET_SUPPORTED_HV_CPUID: Hyper-V's leaves that KVM can back.
pub(crate) fn supported_hyperv_cpuid(kvm: &Kvm) -> io::Result<CpuId> {
    let mut table = CpuId::new(KVM_MAX_CPUID_ENTRIES)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the table has as many entries as its header says, which is as many as KVM writes at most; it writes back how many.
    check(unsafe {
        ioctl_with_mut_ptr(
            kvm,
            number::KVM_GET_SUPPORTED_HV_CPUID(),
            table.as_mut_fam_struct_ptr(),
        )
    })?;
    Ok(table)
}

/// KVM_RUN. The reason of the exit is in the vCPU's run page.
pub(crate) fn run(vcpu: &VcpuFd) -> io::Result<()> {
    // SAFETY: KVM_RUN takes no argument; guest memory that it touches is vouched for by `Vm::map_memory`.
    check(unsafe { ioctl(vcpu, number::KVM_RUN()) }).map(drop)
}

/// KVM_GET_DIRTY_LOG into `words`, which must cover the slot's `pages`.
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> io::Result<()> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM writes one bit a page of the slot, rounded up to 64; the caller's `pages` is the length under
    // which the slot was registered, and `words` was just checked against it.
    check(unsafe { ioctl_with_ref(vm, number::KVM_GET_DIRTY_LOG(), &log) }).map(drop)
}

/// KVM_CLEAR_DIRTY_LOG of `pages` from `first_page` on, those whose bit is set in `words`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    if (words.len() as u64) < u64::from(pages).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM only reads the bitmap, `pages` bits rounded up to 64, and `words` was just checked to hold them.
    check(unsafe { ioctl_with_mut_ref(vm, number::KVM_CLEAR_DIRTY_LOG(), &mut log) }).map(drop)
}

/// KVM_GET_SREGS2: the special registers with the PAE page-directory pointers.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes exactly one `kvm_sregs2`.
    check(unsafe { ioctl_with_mut_ref(vcpu, number::KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: KVM reads exactly one `kvm_sregs2`.
    check(unsafe { ioctl_with_ref(vcpu, number::KVM_SET_SREGS2(), sregs) }).map(drop)
}

/// Reads the XSAVE area, standard format, `host_size` bytes long.
///
/// `host_size` is what KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says after all dynamic permissions were asked for, or
/// [`XSAVE_MIN`] on a kernel without KVM_GET_XSAVE2 (before 5.17).
pub(crate) fn get_xsave(vcpu: &VcpuFd, host_size: usize) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; host_size.max(XSAVE_MIN)];
    let request = if host_size > XSAVE_MIN {
        number::KVM_GET_XSAVE2()
    } else {
        number::KVM_GET_XSAVE()
    };
    // SAFETY: KVM writes at most what KVM_CAP_XSAVE2 reports (and exactly 4,096 bytes for the older call), which
    // is how long `area` is; a byte buffer has no invalid content.
    check(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) })?;
    Ok(area)
}

/// Writes the XSAVE area. `area` must be `host_size` bytes long (see [`get_xsave`]).
pub(crate) fn set_xsave(vcpu: &VcpuFd, host_size: usize, area: &[u8]) -> io::Result<()> {
    if area.len() < host_size.max(XSAVE_MIN) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: KVM reads at most what KVM_CAP_XSAVE2 reports, at least 4,096 bytes; `area` was just checked.
    check(unsafe { ioctl_with_ptr(vcpu, number::KVM_SET_XSAVE(), area.as_ptr()) }).map(drop)
}

/// Offset of `size` in `struct kvm_nested_state`.
const NESTED_SIZE: std::ops::Range<usize> = 4..8;

/// The `format` field of a `struct kvm_nested_state`, if `data` is one of the length its `size` field says.
pub(crate) fn nested_format(data: &[u8]) -> Option<u16> {
    let size = u32::from_ne_bytes(data.get(NESTED_SIZE)?.try_into().ok()?) as usize;
    let format = u16::from_ne_bytes(data.get(2..4)?.try_into().ok()?);
    (size == data.len() && size >= NESTED_HEADER).then_some(format)
}

/// Reads the nested state: a `struct kvm_nested_state` with its contents, cut to its own size.
///
/// `max` is what KVM_CHECK_EXTENSION(KVM_CAP_NESTED_STATE) says.
pub(crate) fn get_nested_state(vcpu: &VcpuFd, max: usize) -> io::Result<Vec<u8>> {
    let max = max.max(NESTED_HEADER);
    let mut words = vec![0u64; max.div_ceil(8)];
    words[0] = (u64::from(u32::try_from(max).map_err(|_| io::ErrorKind::InvalidInput)?)) << 32;
    // SAFETY: the header's size field (bytes 4 to 8) tells KVM how much room there is, and there is that much.
    check(unsafe { ioctl_with_mut_ptr(vcpu, number::KVM_GET_NESTED_STATE(), words.as_mut_ptr()) })?;
    let mut data: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let size = (words[0] >> 32) as usize;
    data.truncate(size.min(max));
    Ok(data)
}

/// Writes the nested state that [`get_nested_state`] has read; its size field must match its length.
pub(crate) fn set_nested_state(vcpu: &VcpuFd, data: &[u8]) -> io::Result<()> {
    if nested_format(data).is_none() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let words: Vec<u64> = data
        .chunks(8)
        .map(|chunk| {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(bytes)
        })
        .collect();
    // SAFETY: KVM reads the header and then as many bytes as its size field says; that many are there.
    check(unsafe { ioctl_with_ptr(vcpu, number::KVM_SET_NESTED_STATE(), words.as_ptr()) }).map(drop)
}

/// Asks the kernel to let guests of this process use the dynamically enabled XSTATE component `component`
/// (`ARCH_REQ_XCOMP_GUEST_PERM`, Linux `Documentation/arch/x86/xstate.rst`). Must precede the first vCPU.
pub(crate) fn request_guest_xstate(component: u32) -> io::Result<()> {
    const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
    // SAFETY: this arch_prctl takes a number and touches no memory of ours.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_GUEST_PERM,
            libc::c_ulong::from(component),
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
