//! MSHV_GET_VP_STATE and MSHV_SET_VP_STATE: local APIC, XSAVE image, synthetic interrupt pages and timers.

use kvm_bindings::kvm_lapic_state;
use mshv_bindings::*;

use crate::memory::PAGE;
use crate::partition::Partition;
use crate::status;
use crate::sys::{self, Answer, note};
use crate::vp::Vp;

/// Registers of the local APIC's page (Intel SDM vol. 3, table 11-1) in the order of HV_X64_INTERRUPT_CONTROLLER_STATE.
/// Each is 32 bits; ISR, TMR and IRR are eight in a row. None: not in KVM's page.
const LAPIC: [Option<usize>; 44] = {
    let mut map = [None; 44];
    let head = [0x20, 0x30, 0xd0, 0xe0, 0xf0];
    let mut index = 0;
    while index < 5 {
        map[index] = Some(head[index]);
        index += 1;
    }
    while index < 29 {
        let row = index - 5;
        map[index] = Some(0x100 + row / 8 * 0x80 + row % 8 * 0x10);
        index += 1;
    }
    // ESR, ICR high and low, LVT: timer, thermal, performance, LINT0, LINT1, error, CMCI.
    let tail = [
        0x280, 0x310, 0x300, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x2f0,
    ];
    while index < 39 {
        map[index] = Some(tail[index - 29]);
        index += 1;
    }
    // The shadow of the error status has no place of its own; then initial count, current count, divider.
    map[40] = Some(0x380);
    map[41] = Some(0x390);
    map[42] = Some(0x3e0);
    map
};

const ID: usize = 0;
const LDR: usize = 2;
/// Bit 10 of APIC_BASE: x2APIC mode, in which identifiers have 32 bits.
const X2APIC: u64 = 1 << 10;

fn lapic_words(page: &kvm_lapic_state) -> [u32; 44] {
    LAPIC.map(|offset| {
        offset.map_or(0, |at| {
            u32::from_le_bytes([0, 1, 2, 3].map(|byte| page.regs[at + byte] as u8))
        })
    })
}

/// Reads or writes a state of a VP, with the checks of `mshv_vp_ioctl_get_set_state`.
///
/// # Safety
///
/// `argument` points to a `mshv_get_set_vp_state`, whose buffer has the size that it tells.
pub(crate) unsafe fn transfer(
    partition: &Partition,
    vp: &Vp,
    argument: u64,
    set: bool,
) -> Answer<()> {
    // SAFETY: vouched for by the caller.
    let asked: mshv_get_set_vp_state = unsafe { sys::copy_from(argument)? };
    let kind = asked.type_;
    if u32::from(kind) >= MSHV_VP_STATE_COUNT
        || asked.rsvd != [0; 3]
        || asked.buf_sz == 0
        || !u64::from(asked.buf_sz).is_multiple_of(PAGE)
        || !{ asked.buf_ptr }.is_multiple_of(PAGE)
    {
        note!(
            "VP state: type, reserved bytes, or alignment of the buffer or of its size: {asked:x?}"
        );
        return Err(libc::EINVAL);
    }
    if asked.buf_ptr == 0 {
        return Err(libc::EFAULT);
    }
    let size = match u32::from(kind) {
        MSHV_VP_STATE_XSAVE => partition.xsave_layout().size,
        MSHV_VP_STATE_SYNTHETIC_TIMERS => size_of::<hv_synthetic_timers_state>(),
        _ => PAGE as usize,
    };
    let size_field = argument + std::mem::offset_of!(mshv_get_set_vp_state, buf_sz) as u64;
    // SAFETY: the field lies in the caller's structure.
    unsafe { sys::copy_to(size_field, &(size as u32))? };
    if size > asked.buf_sz as usize {
        note!("VP state {kind}: {size} bytes do not fit into {}", {
            asked.buf_sz
        });
        return Err(libc::EINVAL);
    }
    // SAFETY: vouched for by the caller; the size was checked against it.
    let buffer = unsafe { std::slice::from_raw_parts_mut(asked.buf_ptr as *mut u8, size) };
    let result = match (u32::from(kind), set) {
        (MSHV_VP_STATE_LAPIC, false) => vp.visit(|_| get_lapic(vp, buffer)),
        (MSHV_VP_STATE_LAPIC, true) => vp.visit(|_| set_lapic(vp, buffer)),
        (MSHV_VP_STATE_XSAVE, false) => vp.visit(|_| get_xsave(partition, vp, buffer)),
        (MSHV_VP_STATE_XSAVE, true) => vp.visit(|_| set_xsave(partition, vp, buffer)),
        (_, false) => {
            vp.visit(|state| match state.pages.get(&kind) {
                Some(page) => buffer.copy_from_slice(page),
                None => buffer.fill(0),
            });
            Ok(())
        }
        (_, true) => {
            vp.visit(|state| state.pages.insert(kind, buffer.to_vec()));
            Ok(())
        }
    };
    result.inspect_err(|error| note!("VP state {kind}: errno {error}"))
}

fn get_lapic(vp: &Vp, buffer: &mut [u8]) -> Answer<()> {
    let words = lapic_words(&vp.vcpu.lapic()?);
    buffer.fill(0);
    for (index, word) in words.iter().enumerate() {
        buffer[4 * index..4 * index + 4].copy_from_slice(&word.to_le_bytes());
    }
    Ok(())
}

fn set_lapic(vp: &Vp, buffer: &[u8]) -> Answer<()> {
    let mut page = vp.vcpu.lapic()?;
    let now = lapic_words(&page);
    let x2apic = vp.vcpu.sregs()?.apic_base & X2APIC != 0;
    for (index, offset) in LAPIC.iter().enumerate() {
        let Some(at) = *offset else { continue };
        let Some(raw) = buffer.get(4 * index..4 * index + 4) else {
            return Err(libc::EINVAL);
        };
        // The identifier belongs to the VP, and in x2APIC mode the logical one follows from it.
        if index == ID || (x2apic && index == LDR) {
            let value = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            // In xAPIC mode the register holds it in its top byte; a client may set the mode later, or have set it before.
            if index == ID && ![now[ID], vp.index, vp.index << 24].contains(&value) {
                note!(
                    "local APIC: identifier {value:#x} is not the VP's {:#x}",
                    now[ID]
                );
                return Err(status::InvalidParameter.errno());
            }
            continue;
        }
        for (byte, value) in raw.iter().enumerate() {
            page.regs[at + byte] = *value as _;
        }
    }
    // KVM leaves the identifier in the form of the mode before, when a client has set another.
    let id = if x2apic { vp.index } else { vp.index << 24 };
    if let Some(at) = LAPIC[ID] {
        for (byte, value) in id.to_le_bytes().into_iter().enumerate() {
            page.regs[at + byte] = value as _;
        }
    }
    vp.vcpu.set_lapic(&page)
}

/// The XSAVE area as bytes; both have 4 KiB.
fn get_xsave(partition: &Partition, vp: &Vp, buffer: &mut [u8]) -> Answer<()> {
    let standard: Vec<u8> = vp
        .vcpu
        .xsave()?
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    buffer.copy_from_slice(&partition.xsave_layout().compact(&standard));
    Ok(())
}

fn set_xsave(partition: &Partition, vp: &Vp, buffer: &[u8]) -> Answer<()> {
    let mut standard = vec![0; PAGE as usize];
    if partition
        .xsave_layout()
        .expand(buffer, &mut standard)
        .is_none()
    {
        note!("XSAVE image: not compacted, or with states that the partition does not have");
        return Err(status::InvalidParameter.errno());
    }
    let mut area = [0u32; 1024];
    for (word, raw) in area.iter_mut().zip(standard.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*raw);
    }
    vp.vcpu
        .set_xsave(&area)
        .map_err(|_| status::InvalidRegisterValue.errno())
}
