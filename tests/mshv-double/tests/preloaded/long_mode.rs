//! Random stores, loads and port writes in 64-bit code with paging: whatever the operands, the state shown is the one
//! before the instruction.

use libtest_mimic::Trial;
use mshv_bindings::*;

use crate::guest::{CODE, Guest};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("random_accesses_in_long_mode", random_accesses),
        trial("long_mode_strings_and_stack", strings_and_stack),
    ]
}

const ROUNDS: u32 = 400;
/// Guest virtual and, one GiB below, guest physical addresses of devices.
const DEVICE_GVA: u64 = 0x8000_0000;
const DEVICE_GPA: u64 = 0x4000_0000;

const GENERAL: [u32; 16] = [
    hv_register_name_HV_X64_REGISTER_RAX,
    hv_register_name_HV_X64_REGISTER_RCX,
    hv_register_name_HV_X64_REGISTER_RDX,
    hv_register_name_HV_X64_REGISTER_RBX,
    hv_register_name_HV_X64_REGISTER_RSP,
    hv_register_name_HV_X64_REGISTER_RBP,
    hv_register_name_HV_X64_REGISTER_RSI,
    hv_register_name_HV_X64_REGISTER_RDI,
    hv_register_name_HV_X64_REGISTER_R8,
    hv_register_name_HV_X64_REGISTER_R9,
    hv_register_name_HV_X64_REGISTER_R10,
    hv_register_name_HV_X64_REGISTER_R11,
    hv_register_name_HV_X64_REGISTER_R12,
    hv_register_name_HV_X64_REGISTER_R13,
    hv_register_name_HV_X64_REGISTER_R14,
    hv_register_name_HV_X64_REGISTER_R15,
];
const RIP: u32 = hv_register_name_HV_X64_REGISTER_RIP;

/// A generator with a fixed seed (xorshift64), so that a failure comes again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A guest in 64-bit mode, ring 0: 0 to 1 GiB of virtual addresses at themselves, 2 to 3 GiB at 1 to 2 GiB.
fn guest() -> Guest {
    let guest = Guest::new(&[0xf4]);
    let entry = |at: usize, value: u64| guest.ram.write(at, &value.to_le_bytes());
    entry(0x9000, 0xa000 | 7);
    entry(0xa000, 0xb000 | 7);
    entry(0xa010, 0xc000 | 7);
    for page in 0..512 {
        entry(0xb000 + 8 * page, (page as u64) << 21 | 0x87);
        entry(
            0xc000 + 8 * page,
            (DEVICE_GPA + ((page as u64) << 21)) | 0x87,
        );
    }
    let segment = |name, attributes| hv_register_assoc {
        name,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                base: 0,
                limit: u32::MAX,
                selector: 8,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
            },
        },
        ..Default::default()
    };
    let number = |name, value| hv_register_assoc {
        name,
        value: hv_register_value { reg64: value },
        ..Default::default()
    };
    guest
        .vcpu
        .set_reg(&[
            segment(hv_register_name_HV_X64_REGISTER_CS, 0xa09b),
            segment(hv_register_name_HV_X64_REGISTER_SS, 0xc093),
            segment(hv_register_name_HV_X64_REGISTER_DS, 0xc093),
            segment(hv_register_name_HV_X64_REGISTER_ES, 0xc093),
            number(hv_register_name_HV_X64_REGISTER_CR3, 0x9000),
            number(hv_register_name_HV_X64_REGISTER_CR4, 0x620),
            number(hv_register_name_HV_X64_REGISTER_EFER, 0x500),
            number(hv_register_name_HV_X64_REGISTER_CR0, 0x8001_0033),
        ])
        .expect("long mode");
    guest
}

/// An operand `[base + index * scale + displacement]`: the bits of REX, and ModRM with what follows.
struct Operand {
    rex: u8,
    bytes: Vec<u8>,
    base: usize,
    index: Option<(usize, u32)>,
    displacement: i32,
}

fn operand(random: &mut Random, register: usize) -> Operand {
    let base = random.below(16) as usize;
    // RSP cannot be an index; the base itself is none either, to keep sums simple.
    let index = (random.below(2) == 0)
        .then(|| (random.below(16) as usize, random.below(4) as u32))
        .filter(|(index, _)| *index != 4 && *index != base && *index != register);
    let wide = random.below(2) == 0;
    let displacement = if wide {
        random.next() as i32 >> 4
    } else {
        i32::from(random.next() as i8)
    };
    let mode = if wide { 0x80 } else { 0x40 };
    let middle = (register as u8 & 7) << 3;
    let mut bytes = Vec::new();
    let mut rex = (register as u8 >> 3) << 2 | base as u8 >> 3;
    if index.is_some() || base & 7 == 4 {
        bytes.push(mode | middle | 4);
        let (index, scale) = index.unwrap_or((4, 0));
        rex |= (index as u8 >> 3) << 1;
        bytes.push((scale as u8) << 6 | (index as u8 & 7) << 3 | base as u8 & 7);
    } else {
        bytes.push(mode | middle | base as u8 & 7);
    }
    if wide {
        bytes.extend(displacement.to_le_bytes());
    } else {
        bytes.push(displacement as u8);
    }
    Operand {
        rex,
        bytes,
        base,
        index,
        displacement,
    }
}

fn random_accesses() {
    let guest = guest();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..ROUNDS {
        let register = random.below(16) as usize;
        let operand = operand(&mut random, register);
        if operand.base == register {
            continue;
        }
        let width = [1u32, 2, 4, 8][random.below(4) as usize];
        // MOV to memory, MOV immediate to memory, MOV from memory, ADD to memory, XCHG.
        let kind = random.below(5);
        let opcode = [0x88, 0xc6, 0x8a, 0x00, 0x86][kind as usize] | u8::from(width > 1);
        let mut code = Vec::new();
        if width == 2 {
            code.push(0x66);
        }
        let mut tail = operand.bytes.clone();
        let mut rex = 0x40 | operand.rex | if width == 8 { 8 } else { 0 };
        if kind == 1 {
            // The register field is part of the opcode.
            tail[0] &= 0xc7;
            rex &= !4;
            tail.extend(&random.next().to_le_bytes()[..width.min(4) as usize]);
        }
        code.push(rex);
        code.push(opcode);
        code.extend(tail);
        guest.ram.write(CODE as usize, &code);

        let gva = DEVICE_GVA + 0x10_0000 + (random.below(0x100_0000) & !0xf);
        let mut values: Vec<u64> = (0..16).map(|_| random.next()).collect();
        let scaled = operand
            .index
            .map_or(0, |(index, scale)| values[index] << scale);
        values[operand.base] = gva
            .wrapping_sub(scaled)
            .wrapping_sub(i64::from(operand.displacement) as u64);
        let mut registers: Vec<(u32, u64)> = GENERAL.into_iter().zip(values).collect();
        registers.push((RIP, CODE));
        guest.set(&registers);

        let context = format!("round {round}, code {code:02x?}, {registers:x?}");
        let message = guest.run();
        let seen = message.header.message_type;
        assert_eq!(
            seen, hv_message_type_HVMSG_UNMAPPED_GPA,
            "{seen:#x}, {context}"
        );
        let message = message.to_memory_info().expect("a memory message");
        assert_eq!(
            { message.guest_physical_address },
            gva - DEVICE_GVA + DEVICE_GPA,
            "{context}"
        );
        assert_eq!({ message.guest_virtual_address }, gva, "{context}");
        assert_eq!(
            message.header.intercept_access_type,
            u8::from(kind < 2),
            "{context}"
        );
        assert_eq!({ message.header.rip }, CODE, "{context}");
        assert!(
            message
                .instruction_bytes
                .starts_with(&code[..code.len().min(16)]),
            "{context}"
        );
        let now: Vec<(u32, u64)> = registers
            .iter()
            .map(|(name, _)| (*name, guest.get(*name)))
            .collect();
        assert_eq!(now, registers, "{context}");
    }
}

fn strings_and_stack() {
    let guest = guest();
    let device = DEVICE_GVA + 0x1000;
    let (rax, rcx, rsp, rsi, rdi) = (GENERAL[0], GENERAL[1], GENERAL[4], GENERAL[6], GENERAL[7]);
    for (code, registers, gva) in [
        // rep movsq from RAM; rep stosb; stosq backwards is left to the 16-bit trials.
        (
            &[0xf3, 0x48, 0xa5][..],
            [
                (rsi, 0x3000),
                (rdi, device),
                (rcx, 5),
                (rax, 1),
                (rsp, 0x8000),
            ],
            device,
        ),
        (
            &[0xf3, 0xaa],
            [(rsi, 0), (rdi, device), (rcx, 7), (rax, 1), (rsp, 0x8000)],
            device,
        ),
        // push rax; push 5; call +0x10; pop [rdi]
        (
            &[0x50],
            [(rsi, 0), (rdi, 0), (rcx, 0), (rax, 1), (rsp, device + 8)],
            device,
        ),
        (
            &[0x6a, 0x05],
            [(rsi, 0), (rdi, 0), (rcx, 0), (rax, 1), (rsp, device + 8)],
            device,
        ),
        (
            &[0xe8, 0x10, 0, 0, 0],
            [(rsi, 0), (rdi, 0), (rcx, 0), (rax, 1), (rsp, device + 8)],
            device,
        ),
        (
            &[0x8f, 0x07],
            [(rsi, 0), (rdi, device), (rcx, 0), (rax, 1), (rsp, 0x7000)],
            device,
        ),
    ] {
        guest.ram.write(CODE as usize, code);
        guest.ram.write(0x3000, &[0x11; 64]);
        guest.set(&registers);
        guest.set(&[(RIP, CODE)]);
        let message = guest.memory();
        assert_eq!(
            ({ message.guest_virtual_address }, { message.header.rip }),
            (gva, CODE),
            "{code:x?}"
        );
        for (name, value) in registers {
            assert_eq!(guest.get(name), value, "register {name:#x}, {code:x?}");
        }
        assert_eq!(guest.get(RIP), CODE, "{code:x?}");
    }
}
