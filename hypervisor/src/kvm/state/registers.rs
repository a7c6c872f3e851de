//! General, special, debug and extended control registers.

use arch::x86_64::state::{
    DebugRegisters, DescriptorTable, GeneralRegisters, Segment, SpecialRegisters, StateElement,
    VcpuState, Xcr,
};
use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2, kvm_xcr, kvm_xcrs,
};

use super::refused;
use crate::Result;
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{call, ioctl};

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
const PDPTRS_VALID: u64 = 1;
/// CR0.PG.
const CR0_PG: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LMA.
const EFER_LMA: u64 = 1 << 10;
/// DR7's four local and four global enable bits.
const DR7_ENABLES: u64 = 0xff;

/// Reads the general registers.
pub(crate) fn read_general(vcpu: &KvmVcpu) -> Result<GeneralRegisters> {
    let regs = vcpu.fd.get_regs().map_err(call("KVM_GET_REGS"))?;
    Ok(general_from_kvm(&regs))
}

/// Writes the general registers.
pub(crate) fn write_general(vcpu: &KvmVcpu, registers: &GeneralRegisters) -> Result<()> {
    vcpu.fd
        .set_regs(&general_to_kvm(registers))
        .map_err(call("KVM_SET_REGS"))
}

pub(super) fn save_general(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    state.general = read_general(vcpu)?;
    Ok(())
}

pub(super) fn restore_general(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    write_general(vcpu, &state.general)
}

/// Reads the special registers.
pub(crate) fn read_special(vcpu: &KvmVcpu) -> Result<SpecialRegisters> {
    Ok(if vcpu.vm.host.sregs2 {
        special_from_kvm2(&ioctl::get_sregs2(&vcpu.fd).map_err(call("KVM_GET_SREGS2"))?)
    } else {
        special_from_kvm(&vcpu.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?)
    })
}

pub(super) fn save_special(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    state.special = read_special(vcpu)?;
    Ok(())
}

pub(super) fn restore_special(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    write_special(vcpu, &state.special)
}

/// Writes the special registers.
pub(crate) fn write_special(vcpu: &KvmVcpu, special: &SpecialRegisters) -> Result<()> {
    if vcpu.vm.host.sregs2 && special.pdptrs.is_some() {
        return ioctl::set_sregs2(&vcpu.fd, &special_to_kvm2(special))
            .map_err(call("KVM_SET_SREGS2"));
    }
    // Without SREGS2 KVM loads the page-directory pointers from guest memory, as a MOV to CR3 does.
    vcpu.fd
        .set_sregs(&special_to_kvm(special))
        .map_err(call("KVM_SET_SREGS"))
}

pub(super) fn save_debug(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    if vcpu.vm.host.debug_registers {
        let debug = vcpu
            .fd
            .get_debug_regs()
            .map_err(call("KVM_GET_DEBUGREGS"))?;
        state.debug = Some(DebugRegisters {
            db: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
        });
    }
    Ok(())
}

pub(super) fn restore_debug(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(debug) = &state.debug else {
        return Ok(());
    };
    if vcpu.vm.host.debug_registers {
        let debug = kvm_debugregs {
            db: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
            ..Default::default()
        };
        return vcpu
            .fd
            .set_debug_regs(&debug)
            .map_err(call("KVM_SET_DEBUGREGS"));
    }
    if debug.dr7 & DR7_ENABLES == 0 {
        return Ok(());
    }
    Err(refused(
        vcpu,
        StateElement::Debug,
        "a breakpoint is set and this KVM has no KVM_CAP_DEBUGREGS",
    ))
}

pub(super) fn save_xcrs(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    if vcpu.vm.host.xcrs {
        let xcrs = vcpu.fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        state.xcrs = Some(xcrs_from_kvm(&xcrs));
    }
    Ok(())
}

pub(super) fn restore_xcrs(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(xcrs) = &state.xcrs else {
        return Ok(());
    };
    if vcpu.vm.host.xcrs {
        let xcrs = xcrs_to_kvm(xcrs).ok_or_else(|| {
            refused(
                vcpu,
                StateElement::Xcrs,
                format!("{} registers are more than KVM takes", xcrs.len()),
            )
        })?;
        return vcpu.fd.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"));
    }
    // The reset value of XCR0 has only the x87 bit (SDM vol. 3, section 2.6).
    if xcrs.iter().all(|xcr| xcr.value == 1) {
        return Ok(());
    }
    Err(refused(
        vcpu,
        StateElement::Xcrs,
        "the guest has enabled XSAVE features and this host has no XSAVE",
    ))
}

/// Neutral form of KVM's general registers.
pub(crate) fn general_from_kvm(r: &kvm_regs) -> GeneralRegisters {
    GeneralRegisters {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn general_to_kvm(r: &GeneralRegisters) -> kvm_regs {
    kvm_regs {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

/// Where each bit field of a segment's access rights lies (SDM vol. 3, table 25-2).
mod access {
    pub(super) const TYPE: u32 = 0xf;
    pub(super) const S: u32 = 4;
    pub(super) const DPL: u32 = 5;
    pub(super) const P: u32 = 7;
    pub(super) const AVL: u32 = 12;
    pub(super) const L: u32 = 13;
    pub(super) const DB: u32 = 14;
    pub(super) const G: u32 = 15;
    pub(super) const UNUSABLE: u32 = 16;
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bits = [
        (s.type_ & 0xf, 0),
        (s.s & 1, access::S),
        (s.dpl & 3, access::DPL),
        (s.present & 1, access::P),
        (s.avl & 1, access::AVL),
        (s.l & 1, access::L),
        (s.db & 1, access::DB),
        (s.g & 1, access::G),
        (s.unusable & 1, access::UNUSABLE),
    ];
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        access: bits
            .iter()
            .fold(0, |all, &(value, shift)| all | u32::from(value) << shift),
    }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let bit = |shift: u32| (s.access >> shift & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.access & access::TYPE) as u8,
        present: bit(access::P),
        dpl: (s.access >> access::DPL & 3) as u8,
        db: bit(access::DB),
        s: bit(access::S),
        l: bit(access::L),
        g: bit(access::G),
        avl: bit(access::AVL),
        unusable: bit(access::UNUSABLE),
        padding: 0,
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

/// Neutral form of KVM's older special registers. The pending interrupt of their bitmap is part of the events.
pub(crate) fn special_from_kvm(s: &kvm_sregs) -> SpecialRegisters {
    SpecialRegisters {
        cs: segment_from_kvm(&s.cs),
        ds: segment_from_kvm(&s.ds),
        es: segment_from_kvm(&s.es),
        fs: segment_from_kvm(&s.fs),
        gs: segment_from_kvm(&s.gs),
        ss: segment_from_kvm(&s.ss),
        tr: segment_from_kvm(&s.tr),
        ldt: segment_from_kvm(&s.ldt),
        gdt: table_from_kvm(&s.gdt),
        idt: table_from_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        pdptrs: None,
    }
}

fn special_to_kvm(s: &SpecialRegisters) -> kvm_sregs {
    kvm_sregs {
        cs: segment_to_kvm(&s.cs),
        ds: segment_to_kvm(&s.ds),
        es: segment_to_kvm(&s.es),
        fs: segment_to_kvm(&s.fs),
        gs: segment_to_kvm(&s.gs),
        ss: segment_to_kvm(&s.ss),
        tr: segment_to_kvm(&s.tr),
        ldt: segment_to_kvm(&s.ldt),
        gdt: table_to_kvm(&s.gdt),
        idt: table_to_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn special_from_kvm2(s: &kvm_sregs2) -> SpecialRegisters {
    let older = kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    };
    SpecialRegisters {
        pdptrs: (s.flags & PDPTRS_VALID != 0).then_some(s.pdptrs),
        ..special_from_kvm(&older)
    }
}

fn special_to_kvm2(s: &SpecialRegisters) -> kvm_sregs2 {
    let older = special_to_kvm(s);
    // KVM refuses the pointers of a vCPU that is not in PAE paging, where they mean nothing.
    let pae = s.cr0 & CR0_PG != 0 && s.cr4 & CR4_PAE != 0 && s.efer & EFER_LMA == 0;
    let pdptrs = s.pdptrs.filter(|_| pae);
    kvm_sregs2 {
        cs: older.cs,
        ds: older.ds,
        es: older.es,
        fs: older.fs,
        gs: older.gs,
        ss: older.ss,
        tr: older.tr,
        ldt: older.ldt,
        gdt: older.gdt,
        idt: older.idt,
        cr0: older.cr0,
        cr2: older.cr2,
        cr3: older.cr3,
        cr4: older.cr4,
        cr8: older.cr8,
        efer: older.efer,
        apic_base: older.apic_base,
        flags: if pdptrs.is_some() { PDPTRS_VALID } else { 0 },
        pdptrs: pdptrs.unwrap_or_default(),
    }
}

fn xcrs_from_kvm(xcrs: &kvm_xcrs) -> Vec<Xcr> {
    let used = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..used]
        .iter()
        .map(|x| Xcr {
            index: x.xcr,
            value: x.value,
        })
        .collect()
}

/// `None` when there are more than KVM's structure holds.
fn xcrs_to_kvm(xcrs: &[Xcr]) -> Option<kvm_xcrs> {
    let mut kvm = kvm_xcrs::default();
    for (to, from) in kvm.xcrs.get_mut(..xcrs.len())?.iter_mut().zip(xcrs) {
        *to = kvm_xcr {
            xcr: from.index,
            reserved: 0,
            value: from.value,
        };
    }
    kvm.nr_xcrs = xcrs.len() as u32;
    Some(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = Segment> {
        // Bits 8 to 11 are reserved.
        (any::<u16>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
            |(selector, base, limit, access)| Segment {
                selector,
                base,
                limit,
                access: access & 0x1_f0ff,
            },
        )
    }

    fn special() -> impl Strategy<Value = SpecialRegisters> {
        let segments = proptest::collection::vec(segment(), 8);
        let words = proptest::collection::vec(any::<u64>(), 9);
        (segments, words, any::<[u16; 2]>()).prop_map(|(s, w, limits)| SpecialRegisters {
            cs: s[0],
            ds: s[1],
            es: s[2],
            fs: s[3],
            gs: s[4],
            ss: s[5],
            tr: s[6],
            ldt: s[7],
            gdt: DescriptorTable {
                base: w[0],
                limit: limits[0],
            },
            idt: DescriptorTable {
                base: w[1],
                limit: limits[1],
            },
            cr0: w[2],
            cr2: w[3],
            cr3: w[4],
            cr4: w[5],
            cr8: w[6],
            efer: w[7],
            apic_base: w[8],
            pdptrs: None,
        })
    }

    proptest! {
        #[test]
        fn special_roundtrip(registers in special()) {
            prop_assert_eq!(special_from_kvm(&special_to_kvm(&registers)), registers);
            prop_assert_eq!(special_from_kvm2(&special_to_kvm2(&registers)), registers);
        }

        #[test]
        fn pdptrs_travel_in_pae_paging_only(mut registers in special(), pdptrs in any::<[u64; 4]>()) {
            registers.pdptrs = Some(pdptrs);
            (registers.cr0, registers.cr4, registers.efer) = (CR0_PG | 1, CR4_PAE, 0);
            prop_assert_eq!(special_from_kvm2(&special_to_kvm2(&registers)), registers);
            registers.efer = EFER_LMA;
            prop_assert_eq!(special_to_kvm2(&registers).flags, 0);
        }

        #[test]
        fn general_roundtrip(w in any::<[u64; 18]>()) {
            let registers = GeneralRegisters {
                rax: w[0], rbx: w[1], rcx: w[2], rdx: w[3], rsi: w[4], rdi: w[5], rsp: w[6], rbp: w[7],
                r8: w[8], r9: w[9], r10: w[10], r11: w[11], r12: w[12], r13: w[13], r14: w[14], r15: w[15],
                rip: w[16], rflags: w[17],
            };
            prop_assert_eq!(general_from_kvm(&general_to_kvm(&registers)), registers);
        }

        #[test]
        fn xcrs_roundtrip(list in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..=16)) {
            let list: Vec<_> = list.into_iter().map(|(index, value)| Xcr { index, value }).collect();
            let kvm = xcrs_to_kvm(&list).expect("16 fit");
            prop_assert_eq!(xcrs_from_kvm(&kvm), list);
        }
    }

    #[test]
    fn too_many_xcrs_are_no_panic() {
        assert!(xcrs_to_kvm(&[Xcr::default(); 17]).is_none());
    }

    #[test]
    fn access_rights_have_the_bits_of_the_manual() {
        // A flat 64-bit code segment: type 11, S, DPL 0, P, L, G.
        let code = kvm_segment {
            type_: 11,
            s: 1,
            present: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        assert_eq!(segment_from_kvm(&code).access, 0xa09b);
        let user = kvm_segment {
            type_: 3,
            s: 1,
            present: 1,
            dpl: 3,
            db: 1,
            g: 1,
            avl: 1,
            unusable: 1,
            ..Default::default()
        };
        assert_eq!(segment_from_kvm(&user).access, 0x1_d0f3);
    }
}
