//! The local APIC: the hypervisor's list of registers to and from the register page of the neutral state.

use arch::x86_64::state::{Bytes, Lapic, StateElement, VcpuState};
use mshv_bindings::{
    HV_PAGE_SIZE, MSHV_VP_STATE_LAPIC, hv_local_interrupt_controller_state as HvLapic,
    mshv_get_set_vp_state,
};
use mshv_ioctls::VcpuFd;

use super::refused;
use crate::Result;
use crate::mshv::call;
use crate::mshv::vcpu::MshvVcpu;

/// Bytes of the neutral register page.
const PAGE_LEN: usize = 1024;
/// Bit 10 of IA32_APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;
/// The request bit that stands for a waiting NMI in the hypervisor's state.
pub(super) const NMI_REQUEST: u32 = 1 << 2;

// Offsets of registers in the page (SDM vol. 3, table 11-1).
const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const PPR: usize = 0xa0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;

/// A page that the driver pins.
#[repr(C, align(4096))]
struct Page([u8; HV_PAGE_SIZE]);

/// Reads the hypervisor's state of the local APIC.
pub(super) fn read(vp: &VcpuFd) -> Result<HvLapic> {
    let mut page = Box::new(Page([0; HV_PAGE_SIZE]));
    let mut request = request(&page);
    request.buf_ptr = page.0.as_mut_ptr() as u64;
    vp.get_vp_state_ioctl(&mut request)
        .map_err(call("MSHV_GET_VP_STATE"))?;
    const { assert!(size_of::<HvLapic>() <= HV_PAGE_SIZE) };
    // SAFETY: the page is longer and better aligned than the structure, which is made of 32-bit integers.
    Ok(unsafe { page.0.as_ptr().cast::<HvLapic>().read() })
}

/// Writes the hypervisor's state of the local APIC.
pub(super) fn write(vp: &VcpuFd, lapic: &HvLapic) -> Result<()> {
    let mut page = Box::new(Page([0; HV_PAGE_SIZE]));
    // SAFETY: as in `read`.
    unsafe { page.0.as_mut_ptr().cast::<HvLapic>().write(*lapic) };
    vp.set_vp_state_ioctl(&request(&page))
        .map_err(call("MSHV_SET_VP_STATE"))
}

fn request(page: &Page) -> mshv_get_set_vp_state {
    mshv_get_set_vp_state {
        type_: MSHV_VP_STATE_LAPIC as u8,
        buf_sz: HV_PAGE_SIZE as u32,
        buf_ptr: page.0.as_ptr() as u64,
        ..Default::default()
    }
}

pub(super) fn save(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    let lapic = read(&vcpu.fd)?;
    // Saving walks backwards: the special registers, which say in which mode the local APIC is, are not there yet.
    let special = crate::mshv::registers::special(&vcpu.fd)?;
    state.lapic = Some(Lapic {
        registers: Bytes(to_page(
            &lapic,
            vcpu.id,
            special.apic_base & X2APIC != 0,
            special.cr8,
        )),
    });
    Ok(())
}

pub(super) fn restore(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let Some(lapic) = &state.lapic else {
        return Ok(());
    };
    let page = &lapic.registers.0;
    if page.len() != PAGE_LEN {
        return Err(refused(
            vcpu,
            StateElement::Lapic,
            format!(
                "its register page has {} bytes instead of {PAGE_LEN}",
                page.len()
            ),
        ));
    }
    let here = read(&vcpu.fd)?;
    let mut lapic = from_page(page, &here);
    lapic.apic_irr[0] &= !NMI_REQUEST;
    if state.events.nmi_pending {
        lapic.apic_irr[0] |= NMI_REQUEST;
    }
    write(&vcpu.fd, &lapic)
}

/// The registers that both have, with their offset in the page.
macro_rules! for_each_register {
    ($do:ident) => {
        $do!(apic_ldr, 0xd0);
        $do!(apic_dfr, 0xe0);
        $do!(apic_spurious, 0xf0);
        $do!(apic_esr, 0x280);
        $do!(apic_lvt_cmci, 0x2f0);
        $do!(apic_icr_low, 0x300);
        $do!(apic_icr_high, 0x310);
        $do!(apic_lvt_timer, 0x320);
        $do!(apic_lvt_thermal, 0x330);
        $do!(apic_lvt_perfmon, 0x340);
        $do!(apic_lvt_lint0, 0x350);
        $do!(apic_lvt_lint1, 0x360);
        $do!(apic_lvt_error, 0x370);
        $do!(apic_initial_count, 0x380);
        $do!(apic_counter_value, 0x390);
        $do!(apic_divide_configuration, 0x3e0);
    };
}

fn to_page(lapic: &HvLapic, id: u32, x2apic: bool, cr8: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    let mut put = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(ID, if x2apic { id } else { id << 24 });
    put(VERSION, lapic.apic_version);
    let tpr = (cr8 as u32 & 0xf) << 4;
    put(TPR, tpr);
    macro_rules! copy {
        ($field:ident, $at:literal) => {
            put($at, lapic.$field);
        };
    }
    for_each_register!(copy);
    let (isr, tmr, mut irr) = (lapic.apic_isr, lapic.apic_tmr, lapic.apic_irr);
    irr[0] &= !NMI_REQUEST;
    for word in 0..8 {
        put(ISR + word * 16, isr[word]);
        put(TMR + word * 16, tmr[word]);
        put(IRR + word * 16, irr[word]);
    }
    // The processor priority is the higher of the task's and of the highest vector in service (SDM vol. 3, 11.8.3.1).
    let in_service = highest(&isr).map_or(0, |vector| vector & 0xf0);
    put(PPR, tpr.max(in_service));
    page
}

/// The highest vector whose bit is set.
fn highest(words: &[u32; 8]) -> Option<u32> {
    (0..8u32)
        .rev()
        .find(|&i| words[i as usize] != 0)
        .map(|i| i * 32 + 31 - words[i as usize].leading_zeros())
}

/// The hypervisor's state of a page of [`PAGE_LEN`] bytes. What the page does not say, id and version and a waiting NMI, stays as
/// it is `here`.
fn from_page(page: &[u8], here: &HvLapic) -> HvLapic {
    let get = |at: usize| {
        page.get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let mut lapic = *here;
    macro_rules! copy {
        ($field:ident, $at:literal) => {
            lapic.$field = get($at);
        };
    }
    for_each_register!(copy);
    let nmi = here.apic_irr[0] & NMI_REQUEST;
    lapic.apic_isr = std::array::from_fn(|word| get(ISR + word * 16));
    lapic.apic_tmr = std::array::from_fn(|word| get(TMR + word * 16));
    lapic.apic_irr = std::array::from_fn(|word| get(IRR + word * 16));
    lapic.apic_irr[0] = lapic.apic_irr[0] & !NMI_REQUEST | nmi;
    lapic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_keeps_every_register() {
        let mut page: Vec<u8> = (0..PAGE_LEN).map(|i| (i / 16) as u8 + 1).collect();
        page[IRR] &= !(NMI_REQUEST as u8);
        let here = HvLapic {
            apic_id: 7,
            apic_version: 0x5_0014,
            ..HvLapic::default()
        };
        let lapic = from_page(&page, &here);
        assert_eq!(({ lapic.apic_id }, { lapic.apic_version }), (7, 0x5_0014));
        let back = to_page(&lapic, 3, false, 0);
        for at in [0xd0, 0xe0, 0xf0, 0x280, 0x320, 0x350, 0x380, 0x390, 0x3e0] {
            assert_eq!(back[at..at + 4], page[at..at + 4], "{at:#x}");
        }
        for base in [ISR, TMR, IRR] {
            for word in 0..8 {
                let at = base + word * 16;
                assert_eq!(back[at..at + 4], page[at..at + 4], "{at:#x}");
            }
        }
        assert_eq!(back[ID..ID + 4], (3u32 << 24).to_le_bytes());
        assert_eq!(to_page(&lapic, 3, true, 0)[ID..ID + 4], 3u32.to_le_bytes());
    }

    #[test]
    fn a_waiting_nmi_is_no_interrupt_request_and_stays() {
        let mut here = HvLapic::default();
        here.apic_irr[0] = NMI_REQUEST;
        let page = to_page(&here, 0, true, 0xf);
        assert_eq!(page[IRR], 0);
        assert_eq!(page[TPR..TPR + 4], 0xf0u32.to_le_bytes());
        let kept = from_page(&page, &here).apic_irr;
        assert_eq!(kept[0], NMI_REQUEST);
    }

    #[test]
    fn the_processor_priority_follows_what_is_in_service() {
        let mut lapic = HvLapic::default();
        lapic.apic_isr[2] = 1 << 5;
        assert_eq!(to_page(&lapic, 0, true, 3)[PPR], 0x40);
        assert_eq!(to_page(&lapic, 0, true, 9)[PPR], 0x90);
    }
}
