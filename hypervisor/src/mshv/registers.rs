//! VP registers: names, values, and the neutral types they become.
//!
//! A register value is 128 bits (TLFS, section "HV_REGISTER_VALUE"), here two words, low one first:
//!
//! ```text
//!   64-bit register   word 0: value
//!   segment           word 0: base       word 1: limit 31:0, selector 47:32, attributes 63:48
//!   table             word 0: limit 63:48  word 1: base
//! ```

use arch::x86_64::state::{
    DebugRegisters, DescriptorTable, GeneralRegisters, Segment, SpecialRegisters,
};
use mshv_bindings::{
    hv_register_assoc, hv_register_name_HV_X64_REGISTER_APIC_BASE as APIC_BASE,
    hv_register_name_HV_X64_REGISTER_CR0 as CR0, hv_register_name_HV_X64_REGISTER_CR2 as CR2,
    hv_register_name_HV_X64_REGISTER_CR3 as CR3, hv_register_name_HV_X64_REGISTER_CR4 as CR4,
    hv_register_name_HV_X64_REGISTER_CR8 as CR8, hv_register_name_HV_X64_REGISTER_CS as CS,
    hv_register_name_HV_X64_REGISTER_DR0 as DR0, hv_register_name_HV_X64_REGISTER_DR1 as DR1,
    hv_register_name_HV_X64_REGISTER_DR2 as DR2, hv_register_name_HV_X64_REGISTER_DR3 as DR3,
    hv_register_name_HV_X64_REGISTER_DR6 as DR6, hv_register_name_HV_X64_REGISTER_DR7 as DR7,
    hv_register_name_HV_X64_REGISTER_DS as DS, hv_register_name_HV_X64_REGISTER_EFER as EFER,
    hv_register_name_HV_X64_REGISTER_ES as ES, hv_register_name_HV_X64_REGISTER_FS as FS,
    hv_register_name_HV_X64_REGISTER_GDTR as GDTR, hv_register_name_HV_X64_REGISTER_GS as GS,
    hv_register_name_HV_X64_REGISTER_IDTR as IDTR, hv_register_name_HV_X64_REGISTER_LDTR as LDTR,
    hv_register_name_HV_X64_REGISTER_R8 as R8, hv_register_name_HV_X64_REGISTER_R9 as R9,
    hv_register_name_HV_X64_REGISTER_R10 as R10, hv_register_name_HV_X64_REGISTER_R11 as R11,
    hv_register_name_HV_X64_REGISTER_R12 as R12, hv_register_name_HV_X64_REGISTER_R13 as R13,
    hv_register_name_HV_X64_REGISTER_R14 as R14, hv_register_name_HV_X64_REGISTER_R15 as R15,
    hv_register_name_HV_X64_REGISTER_RAX as RAX, hv_register_name_HV_X64_REGISTER_RBP as RBP,
    hv_register_name_HV_X64_REGISTER_RBX as RBX, hv_register_name_HV_X64_REGISTER_RCX as RCX,
    hv_register_name_HV_X64_REGISTER_RDI as RDI, hv_register_name_HV_X64_REGISTER_RDX as RDX,
    hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS, hv_register_name_HV_X64_REGISTER_RIP as RIP,
    hv_register_name_HV_X64_REGISTER_RSI as RSI, hv_register_name_HV_X64_REGISTER_RSP as RSP,
    hv_register_name_HV_X64_REGISTER_SS as SS, hv_register_name_HV_X64_REGISTER_TR as TR,
    hv_register_value,
};
use mshv_ioctls::VcpuFd;

use super::call;
use crate::Result;

/// The value of one register.
pub(crate) type Words = [u64; 2];

/// A register with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register {
    /// HV_REGISTER_NAME.
    pub name: u32,
    /// HV_REGISTER_VALUE.
    pub value: Words,
}

impl Register {
    /// A 64-bit register.
    pub(crate) const fn new(name: u32, value: u64) -> Self {
        Self {
            name,
            value: [value, 0],
        }
    }
}

/// Most registers that one hypercall carries: its input and output each fit into a page.
const BATCH: usize = 64;

/// Reads registers, in the order of their names.
pub(crate) fn read(vp: &VcpuFd, names: &[u32]) -> Result<Vec<Words>> {
    let mut values = Vec::with_capacity(names.len());
    for batch in names.chunks(BATCH) {
        let mut table: Vec<_> = batch
            .iter()
            .map(|&name| hv_register_assoc {
                name,
                ..Default::default()
            })
            .collect();
        vp.get_reg(&mut table)
            .map_err(call("HVCALL_GET_VP_REGISTERS"))?;
        values.extend(table.iter().map(|assoc| from_value(assoc.value)));
    }
    Ok(values)
}

/// Reads as many registers as there are names.
pub(crate) fn read_array<const N: usize>(vp: &VcpuFd, names: &[u32; N]) -> Result<[Words; N]> {
    let values = read(vp, names)?;
    Ok(std::array::from_fn(|i| {
        values.get(i).copied().unwrap_or_default()
    }))
}

/// Writes registers, in this order.
pub(crate) fn write(vp: &VcpuFd, registers: &[Register]) -> Result<()> {
    for batch in registers.chunks(BATCH) {
        let table: Vec<_> = batch
            .iter()
            .map(|register| hv_register_assoc {
                name: register.name,
                value: to_value(register.value),
                ..Default::default()
            })
            .collect();
        vp.set_reg(&table)
            .map_err(call("HVCALL_SET_VP_REGISTERS"))?;
    }
    Ok(())
}

fn from_value(value: hv_register_value) -> Words {
    // SAFETY: every member of the union is plain integers without padding that a reader could mistake, it is 16 bytes long, and the
    // hypervisor has written all of them.
    unsafe { std::mem::transmute::<hv_register_value, Words>(value) }
}

fn to_value(words: Words) -> hv_register_value {
    // SAFETY: as above; any bit pattern is a valid member.
    unsafe { std::mem::transmute::<Words, hv_register_value>(words) }
}

const GENERAL: [u32; 18] = [
    RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8, R9, R10, R11, R12, R13, R14, R15, RIP, RFLAGS,
];

fn general_from(v: &[Words]) -> GeneralRegisters {
    let at = |i: usize| v.get(i).map_or(0, |words| words[0]);
    GeneralRegisters {
        rax: at(0),
        rbx: at(1),
        rcx: at(2),
        rdx: at(3),
        rsi: at(4),
        rdi: at(5),
        rsp: at(6),
        rbp: at(7),
        r8: at(8),
        r9: at(9),
        r10: at(10),
        r11: at(11),
        r12: at(12),
        r13: at(13),
        r14: at(14),
        r15: at(15),
        rip: at(16),
        rflags: at(17),
    }
}

/// Every general register with its value.
fn general_to(r: &GeneralRegisters) -> [Register; 18] {
    let values = [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ];
    std::array::from_fn(|i| Register::new(GENERAL[i], values[i]))
}

/// Reads the general registers.
pub(crate) fn general(vp: &VcpuFd) -> Result<GeneralRegisters> {
    Ok(general_from(&read(vp, &GENERAL)?))
}

/// Writes the general registers.
pub(crate) fn set_general(vp: &VcpuFd, registers: &GeneralRegisters) -> Result<()> {
    write(vp, &general_to(registers))
}

/// Writes those general registers in which `after` differs from `before`.
pub(crate) fn set_general_changes(
    vp: &VcpuFd,
    before: &GeneralRegisters,
    after: &GeneralRegisters,
) -> Result<()> {
    let (before, mut after) = (general_to(before), general_to(after).to_vec());
    after.retain(|register| !before.contains(register));
    write(vp, &after)
}

/// CS, SS, DS, ES, FS, GS, TR, LDTR, GDTR, IDTR, CR0, CR2, CR3, CR4, CR8, EFER, APIC base: the order in which they are written.
const SPECIAL: [u32; 17] = [
    CS, SS, DS, ES, FS, GS, TR, LDTR, GDTR, IDTR, CR0, CR2, CR3, CR4, CR8, EFER, APIC_BASE,
];

/// Bit 7 of a segment's attributes: present.
const PRESENT: u32 = 1 << 7;
/// Bit 16 of a neutral segment's access rights: unusable.
const UNUSABLE: u32 = 1 << 16;

/// A segment of its value. Its attributes are the neutral access rights, bit by bit, without "unusable", which is said by
/// "not present".
pub(crate) fn segment_from([base, rest]: Words) -> Segment {
    let attributes = (rest >> 48) as u32;
    Segment {
        selector: (rest >> 32) as u16,
        base,
        limit: rest as u32,
        access: if attributes & PRESENT == 0 {
            attributes | UNUSABLE
        } else {
            attributes
        },
    }
}

fn segment_to(segment: &Segment) -> Words {
    let attributes = if segment.access & UNUSABLE == 0 {
        u64::from(segment.access & 0xffff)
    } else {
        u64::from(segment.access & 0xffff & !PRESENT)
    };
    let rest = u64::from(segment.limit) | u64::from(segment.selector) << 32 | attributes << 48;
    [segment.base, rest]
}

fn table_from([limit, base]: Words) -> DescriptorTable {
    DescriptorTable {
        base,
        limit: (limit >> 48) as u16,
    }
}

fn table_to(table: &DescriptorTable) -> Words {
    [u64::from(table.limit) << 48, table.base]
}

/// Reads the special registers.
pub(crate) fn special(vp: &VcpuFd) -> Result<SpecialRegisters> {
    Ok(special_from(&read_array(vp, &SPECIAL)?))
}

fn special_from(v: &[Words; 17]) -> SpecialRegisters {
    SpecialRegisters {
        cs: segment_from(v[0]),
        ss: segment_from(v[1]),
        ds: segment_from(v[2]),
        es: segment_from(v[3]),
        fs: segment_from(v[4]),
        gs: segment_from(v[5]),
        tr: segment_from(v[6]),
        ldt: segment_from(v[7]),
        gdt: table_from(v[8]),
        idt: table_from(v[9]),
        cr0: v[10][0],
        cr2: v[11][0],
        cr3: v[12][0],
        cr4: v[13][0],
        cr8: v[14][0],
        efer: v[15][0],
        apic_base: v[16][0],
        // The hypervisor loads them from memory by itself.
        pdptrs: None,
    }
}

fn special_to(s: &SpecialRegisters) -> [Register; 17] {
    let values = [
        segment_to(&s.cs),
        segment_to(&s.ss),
        segment_to(&s.ds),
        segment_to(&s.es),
        segment_to(&s.fs),
        segment_to(&s.gs),
        segment_to(&s.tr),
        segment_to(&s.ldt),
        table_to(&s.gdt),
        table_to(&s.idt),
        [s.cr0, 0],
        [s.cr2, 0],
        [s.cr3, 0],
        [s.cr4, 0],
        [s.cr8, 0],
        [s.efer, 0],
        [s.apic_base, 0],
    ];
    std::array::from_fn(|i| Register {
        name: SPECIAL[i],
        value: values[i],
    })
}

/// Writes the special registers.
pub(crate) fn set_special(vp: &VcpuFd, registers: &SpecialRegisters) -> Result<()> {
    write(vp, &special_to(registers))
}

/// Writes those special registers in which `after` differs from `before`.
pub(crate) fn set_special_changes(
    vp: &VcpuFd,
    before: &SpecialRegisters,
    after: &SpecialRegisters,
) -> Result<()> {
    let (before, mut after) = (special_to(before), special_to(after).to_vec());
    after.retain(|register| !before.contains(register));
    write(vp, &after)
}

const DEBUG: [u32; 6] = [DR0, DR1, DR2, DR3, DR6, DR7];

/// Reads the debug registers.
pub(crate) fn debug(vp: &VcpuFd) -> Result<DebugRegisters> {
    let [a, b, c, d, dr6, dr7] = read_array(vp, &DEBUG)?.map(|words| words[0]);
    Ok(DebugRegisters {
        db: [a, b, c, d],
        dr6,
        dr7,
    })
}

/// Writes the debug registers.
pub(crate) fn set_debug(vp: &VcpuFd, registers: &DebugRegisters) -> Result<()> {
    let [a, b, c, d] = registers.db;
    let values = [a, b, c, d, registers.dr6, registers.dr7];
    let table: [Register; 6] = std::array::from_fn(|i| Register::new(DEBUG[i], values[i]));
    write(vp, &table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mshv_bindings::{hv_x64_segment_register, hv_x64_table_register};
    use proptest::prelude::*;

    #[test]
    fn words_are_laid_out_as_the_hypervisor_lays_them_out() {
        let segment = Segment {
            selector: 0x1234,
            base: 0xffff_8000_0000_1000,
            limit: 0xfedc_ba98,
            access: 0xa09b,
        };
        // SAFETY: both views are plain integers of the same 16 bytes.
        let raw: hv_x64_segment_register = unsafe { to_value(segment_to(&segment)).segment };
        assert_eq!(
            ({ raw.base }, { raw.limit }, { raw.selector }),
            (segment.base, segment.limit, segment.selector)
        );
        // SAFETY: as above.
        let (present, long, kind) = unsafe {
            let bits = raw.__bindgen_anon_1.__bindgen_anon_1;
            (bits.present(), bits._long(), bits.segment_type())
        };
        assert_eq!((present, long, kind), (1, 1, 0xb));
        let table = DescriptorTable {
            base: 0x1_0000_0000,
            limit: 0xfff,
        };
        // SAFETY: as above.
        let raw: hv_x64_table_register = unsafe { to_value(table_to(&table)).table };
        assert_eq!(({ raw.base }, { raw.limit }), (table.base, table.limit));
    }

    #[test]
    fn an_unusable_segment_is_one_that_is_not_present() {
        let unusable = Segment {
            access: UNUSABLE | 0x93,
            ..Segment::default()
        };
        let back = segment_from(segment_to(&unusable));
        assert_eq!(back.access, UNUSABLE | 0x13);
    }

    #[test]
    fn each_register_is_named_once() {
        for names in [&GENERAL[..], &SPECIAL, &DEBUG] {
            let unique: std::collections::HashSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len());
        }
    }

    proptest! {
        #[test]
        fn there_and_back(values in any::<[u64; 18]>(), base in any::<u64>(), limit in any::<u32>(), selector in any::<u16>()) {
            let words: Vec<Words> = values.iter().map(|&value| [value, 0]).collect();
            let general = general_from(&words);
            let back: Vec<Words> = general_to(&general).iter().map(|register| register.value).collect();
            prop_assert_eq!(back, words);
            let segment = Segment { selector, base, limit, access: 0xc093 };
            prop_assert_eq!(segment_from(segment_to(&segment)), segment);
        }
    }
}
