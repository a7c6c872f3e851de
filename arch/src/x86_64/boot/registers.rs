//! The boot processor's registers at the kernel's entry, and the GDT they refer to.

use super::{BootPlan, Protocol};
use crate::x86_64::layout::{BOOT_GDT, BOOT_PAGE_TABLES};
use crate::x86_64::msr::{EFER_LMA, EFER_LME};
use crate::x86_64::state::{
    Activity, DescriptorTable, GeneralRegisters, PendingEvents, Segment, VcpuState,
};

/// Code segment selector (`__BOOT_CS`, Linux `Documentation/arch/x86/boot.rst`, 64-bit boot protocol).
const CODE_SELECTOR: u16 = 0x10;
/// Data segment selector (`__BOOT_DS`).
const DATA_SELECTOR: u16 = 0x18;
/// Task register. Its descriptor takes two entries in long mode.
const TSS_SELECTOR: u16 = 0x20;
/// Entries of the boot GDT.
const GDT_ENTRIES: usize = 6;

// Access rights, as in `Segment::access`.
const CODE_32: u32 = 0xc09b;
const CODE_64: u32 = 0xa09b;
const DATA: u32 = 0xc093;
const TSS_BUSY: u32 = 0x008b;

// SDM vol. 3, section 2.5.
const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// RFLAGS bit 1 is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

fn flat(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    }
}

fn code(protocol: Protocol) -> Segment {
    match protocol {
        Protocol::Pvh => flat(CODE_SELECTOR, CODE_32),
        Protocol::Linux64 => flat(CODE_SELECTOR, CODE_64),
    }
}

/// PVH demands a 32-bit TSS with base 0 and limit 0x67 (Xen `docs/misc/pvh.pandoc`); the same limit is that of a
/// 64-bit TSS.
fn tss() -> Segment {
    Segment {
        selector: TSS_SELECTOR,
        base: 0,
        limit: 0x67,
        access: TSS_BUSY,
    }
}

/// A segment descriptor (SDM vol. 3, figure 3-8) of a segment whose base is below 4 GiB.
fn descriptor(segment: &Segment) -> u64 {
    let granular = segment.access & (1 << 15) != 0;
    let limit = u64::from(if granular {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.access);
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | (access & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (access >> 12 & 0xf) << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// The boot GDT, as it lies in guest memory.
pub(super) fn boot_gdt(protocol: Protocol) -> [u8; GDT_ENTRIES * 8] {
    let data = flat(DATA_SELECTOR, DATA);
    let entries = [
        0,
        0,
        descriptor(&code(protocol)),
        descriptor(&data),
        descriptor(&tss()),
        0u64,
    ];
    let mut bytes = [0; GDT_ENTRIES * 8];
    for (to, entry) in bytes.chunks_exact_mut(8).zip(entries) {
        to.copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

/// Sets everything the protocols prescribe. What they leave open keeps its value after reset.
pub(super) fn apply(plan: &BootPlan, state: &mut VcpuState) {
    state.general = GeneralRegisters {
        rip: plan.entry,
        rflags: RFLAGS_FIXED,
        ..GeneralRegisters::default()
    };
    let data = flat(DATA_SELECTOR, DATA);
    let special = &mut state.special;
    special.cs = code(plan.protocol);
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.tr = tss();
    special.gdt = DescriptorTable {
        base: BOOT_GDT,
        limit: (GDT_ENTRIES * 8 - 1) as u16,
    };
    special.idt = DescriptorTable::default();
    special.cr2 = 0;
    special.cr8 = 0;
    special.pdptrs = None;
    match plan.protocol {
        Protocol::Pvh => {
            state.general.rbx = plan.boot_info;
            special.cr0 = CR0_PE | CR0_ET;
            special.cr3 = 0;
            special.cr4 = 0;
            special.efer = 0;
        }
        Protocol::Linux64 => {
            state.general.rsi = plan.boot_info;
            special.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
            special.cr3 = BOOT_PAGE_TABLES;
            special.cr4 = CR4_PAE;
            special.efer = EFER_LME | EFER_LMA;
        }
    }
    state.events = PendingEvents::default();
    state.activity = Activity::Running;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(protocol: Protocol) -> BootPlan {
        BootPlan {
            protocol,
            entry: 0x100_0200,
            boot_info: 0x7000,
            kernel: (0, 0),
            initramfs: None,
        }
    }

    #[test]
    fn descriptors_match_the_architecture() {
        // The well-known flat descriptors of every boot loader.
        assert_eq!(descriptor(&flat(0x10, CODE_64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x10, CODE_32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x18, DATA)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&tss()), 0x0000_8b00_0000_0067);
        let odd = Segment {
            base: 0x1234_5678,
            limit: 0xf_1234,
            ..tss()
        };
        assert_eq!(descriptor(&odd), 0x120f_8b34_5678_1234);
    }

    #[test]
    fn pvh_enters_flat_protected_mode() {
        let mut state = VcpuState::default();
        state.special.cr0 = 0x6000_0010;
        state.special.apic_base = 0xfee0_0900;
        state.general.rdx = 0xa0671;
        plan(Protocol::Pvh).apply(&mut state);
        assert_eq!(state.special.cr0, 0x11);
        assert_eq!(
            (state.special.cr3, state.special.cr4, state.special.efer),
            (0, 0, 0)
        );
        assert_eq!((state.general.rbx, state.general.rsi), (0x7000, 0));
        assert_eq!((state.general.rip, state.general.rflags), (0x100_0200, 2));
        assert_eq!(state.special.cs.access, CODE_32);
        assert_eq!(state.special.apic_base, 0xfee0_0900, "kept from reset");
    }

    #[test]
    fn linux64_enters_long_mode() {
        let mut state = VcpuState::default();
        plan(Protocol::Linux64).apply(&mut state);
        assert_eq!((state.general.rbx, state.general.rsi), (0, 0x7000));
        assert_eq!(state.special.efer, 0x500);
        assert_eq!(state.special.cr4, 0x20);
        assert_eq!(state.special.cr0, 0x8005_0033);
        assert_eq!(state.special.cr3, BOOT_PAGE_TABLES);
        assert_eq!(
            state.special.cs,
            Segment {
                selector: 0x10,
                base: 0,
                limit: u32::MAX,
                access: CODE_64
            }
        );
        assert_eq!(state.special.ss.selector, 0x18);
        assert_eq!(state.special.gdt.limit, 47);
    }
}
