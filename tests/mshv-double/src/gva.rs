//! Guest virtual to guest physical: the page walk of HvCallTranslateVirtualAddress and of intercept messages.

use kvm_bindings::kvm_sregs;
use mshv_bindings::*;

use crate::memory::Memory;

/// What a translation is for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) execute: bool,
    /// Check the rights of user mode; otherwise those of supervisor mode.
    pub(crate) user: bool,
    /// Check present bits only.
    pub(crate) exempt: bool,
}

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const CR0_PG: u64 = 1 << 31;
const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const EFER_LMA: u64 = 1 << 10;
const EFER_NX: u64 = 1 << 11;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Walks the guest's page tables as the registers name them.
///
/// The error is a `HV_TRANSLATE_GVA_*` result code (TLFS, HvCallTranslateVirtualAddress).
pub(crate) fn translate(
    memory: &Memory,
    sregs: &kvm_sregs,
    gva: u64,
    access: Access,
) -> Result<u64, u32> {
    if sregs.cr0 & CR0_PG == 0 {
        return Ok(gva & 0xffff_ffff);
    }
    let pae = sregs.cr4 & CR4_PAE != 0;
    let long = sregs.efer & EFER_LMA != 0;
    let (levels, width, entry_bytes) = match (long, pae) {
        (true, _) if sregs.cr4 & CR4_LA57 != 0 => (5, 9, 8),
        (true, _) => (4, 9, 8),
        (false, true) => (3, 9, 8),
        (false, false) => (2, 10, 4),
    };
    let gva = if long { gva } else { gva & 0xffff_ffff };
    let mut table = if long {
        sregs.cr3 & ADDRESS
    } else if pae {
        sregs.cr3 & 0xffff_ffe0
    } else {
        sregs.cr3 & 0xffff_f000
    };
    let (mut writable, mut user, mut executable) = (true, true, true);
    for level in (1..=levels).rev() {
        let shift = 12 + width * (level - 1);
        let index = gva >> shift & ((1 << width) - 1);
        let mut raw = [0u8; 8];
        if !memory.read(
            table + index * entry_bytes,
            &mut raw[..entry_bytes as usize],
        ) {
            return Err(hv_translate_gva_result_code_HV_TRANSLATE_GVA_GPA_UNMAPPED);
        }
        let entry = u64::from_le_bytes(raw);
        if entry & PRESENT == 0 {
            return Err(hv_translate_gva_result_code_HV_TRANSLATE_GVA_PAGE_NOT_PRESENT);
        }
        let directory_pointer_of_pae = !long && pae && level == 3;
        if !directory_pointer_of_pae {
            writable &= entry & WRITABLE != 0;
            user &= entry & USER != 0;
            executable &= entry_bytes == 4 || sregs.efer & EFER_NX == 0 || entry & NO_EXECUTE == 0;
        }
        let leaf = match level {
            1 => true,
            2 if entry_bytes == 4 => entry & LARGE != 0 && sregs.cr4 & CR4_PSE != 0,
            2 => entry & LARGE != 0,
            3 if long => entry & LARGE != 0,
            _ => false,
        };
        if leaf {
            let allowed = access.exempt
                || ((!access.write || writable || (!access.user && sregs.cr0 & CR0_WP == 0))
                    && (!access.user || user)
                    && (!access.execute
                        || (executable && !(user && !access.user && sregs.cr4 & CR4_SMEP != 0))));
            if !allowed {
                return Err(hv_translate_gva_result_code_HV_TRANSLATE_GVA_PRIVILEGE_VIOLATION);
            }
            let offset_mask = (1u64 << shift) - 1;
            let mut base = entry
                & if entry_bytes == 4 {
                    0xffff_f000
                } else {
                    ADDRESS
                }
                & !offset_mask;
            if entry_bytes == 4 && level == 2 {
                // PSE-36: bits 13 to 20 of a 4 MiB entry are bits 32 to 39 of the address.
                base |= (entry >> 13 & 0xff) << 32;
            }
            return Ok(base | gva & offset_mask);
        }
        table = entry
            & if entry_bytes == 4 {
                0xffff_f000
            } else {
                ADDRESS
            };
    }
    Err(hv_translate_gva_result_code_HV_TRANSLATE_GVA_INVALIDE_PAGE_TABLE_FLAGS)
}

/// Reads up to `buffer.len()` bytes at a linear address; returns how many could be read.
pub(crate) fn read_linear(
    memory: &Memory,
    sregs: &kvm_sregs,
    address: u64,
    buffer: &mut [u8],
) -> usize {
    let anything = Access {
        exempt: true,
        ..Default::default()
    };
    let mut done = 0;
    while done < buffer.len() {
        let mut at = address.wrapping_add(done as u64);
        if sregs.efer & EFER_LMA == 0 {
            at &= 0xffff_ffff;
        }
        let length = (buffer.len() - done).min(4096 - (at & 4095) as usize);
        let Ok(gpa) = translate(memory, sregs, at, anything) else {
            break;
        };
        if !memory.read(gpa, &mut buffer[done..done + length]) {
            break;
        }
        done += length;
    }
    done
}
