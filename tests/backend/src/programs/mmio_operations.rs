//! Instructions that read, change and write device memory in one.

use hypervisor::Hypervisor;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::{Access, CODE, DATA, Guest, Idioms as _, MMIO, STACK};
use crate::outcome::{Outcome, ensure, same};

/// CF, ZF, SF.
const FLAGS: u64 = 0xc1;
const CF: u64 = 1;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;

type Operation = fn(&mut CodeAssembler, AsmMemoryOperand) -> Result<(), IcedError>;

/// With CF set, 0x11 in EAX, 1 in CL and 0xffff_fff0 in memory: name, what it does, what is in memory then, CF, ZF and SF.
const OPERATIONS: &[(&str, Operation, u32, u64)] = &[
    ("or", |a, m| a.or(m, eax), 0xffff_fff1, SF),
    ("and", |a, m| a.and(m, eax), 0x10, 0),
    ("xor", |a, m| a.xor(m, eax), 0xffff_ffe1, SF),
    ("add", |a, m| a.add(m, eax), 1, CF),
    ("adc", |a, m| a.adc(m, eax), 2, CF),
    ("sub", |a, m| a.sub(m, eax), 0xffff_ffdf, SF),
    ("sbb", |a, m| a.sbb(m, eax), 0xffff_ffde, SF),
    ("add imm", |a, m| a.add(m, 0x10), 0, CF | ZF),
    ("or imm", |a, m| a.or(m, 1), 0xffff_fff1, SF),
    ("inc", |a, m| a.inc(m), 0xffff_fff1, CF | SF),
    ("dec", |a, m| a.dec(m), 0xffff_ffef, CF | SF),
    ("not", |a, m| a.not(m), 0xf, CF),
    ("neg", |a, m| a.neg(m), 0x10, CF),
    ("shl", |a, m| a.shl(m, 1), 0xffff_ffe0, CF | SF),
    ("shr cl", |a, m| a.shr(m, cl), 0x7fff_fff8, 0),
    ("sar", |a, m| a.sar(m, 4), 0xffff_ffff, SF),
    ("rol", |a, m| a.rol(m, 4), 0xffff_ff0f, CF),
    ("lock or", |a, m| a.lock().or(m, eax), 0xffff_fff1, SF),
    ("lock add", |a, m| a.lock().add(m, eax), 1, CF),
    ("lock inc", |a, m| a.lock().inc(m), 0xffff_fff1, CF | SF),
];

pub(super) fn arithmetic(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        for (name, operation, result, flags) in OPERATIONS {
            let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
                a.mov(edi, MMIO as u32)?;
                a.mov(eax, 0x11)?;
                a.mov(ecx, 1)?;
                // ZF and SF clear, CF set.
                a.test(ecx, ecx)?;
                a.stc()?;
                operation(a, dword_ptr(rdi))?;
                a.pushfq()?;
                a.pop(rax)?;
                a.mov(qword_ptr(DATA), rax)?;
                a.stop_for_good()
            })?;
            guest.bus.set_memory(MMIO, &0xffff_fff0u32.to_le_bytes());
            guest.run()?;
            same!(
                guest.bus.take(),
                [
                    Access::Read(MMIO, 4),
                    Access::Write(MMIO, result.to_le_bytes().to_vec())
                ],
                "{name} in ring {ring}"
            );
            same!(
                guest.ram.read_u64(DATA) & FLAGS,
                *flags,
                "flags of {name} in ring {ring}"
            );
        }
    }
    Ok(())
}

/// Operations of a byte, a word and a quadword touch no more than that.
pub(super) fn arithmetic_of_other_widths(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edi, MMIO as u32)?;
        a.mov(eax, 1)?;
        a.add(byte_ptr(rdi), al)?;
        a.setc(byte_ptr(DATA))?;
        a.add(word_ptr(rdi + 8), ax)?;
        a.setc(byte_ptr(DATA + 1))?;
        a.add(qword_ptr(rdi + 16), rax)?;
        a.setc(byte_ptr(DATA + 2))?;
        // Memory as the source.
        a.mov(ecx, 5)?;
        a.add(ecx, dword_ptr(rdi + 24))?;
        a.mov(dword_ptr(DATA + 8), ecx)?;
        a.and(rcx, qword_ptr(rdi + 24))?;
        a.mov(qword_ptr(DATA + 16), rcx)?;
        a.stop_for_good()
    })?;
    guest.bus.set_memory(MMIO, &[0xff; 24]);
    guest.bus.set_memory(MMIO + 24, &[3, 0, 0, 0, 1, 0, 0, 0]);
    guest.run()?;
    same!(
        guest.bus.take(),
        [
            Access::Read(MMIO, 1),
            Access::Write(MMIO, vec![0]),
            Access::Read(MMIO + 8, 2),
            Access::Write(MMIO + 8, vec![0; 2]),
            Access::Read(MMIO + 16, 8),
            Access::Write(MMIO + 16, vec![0; 8]),
            Access::Read(MMIO + 24, 4),
            Access::Read(MMIO + 24, 8),
        ],
        "accesses"
    );
    same!(guest.ram.read(DATA), [1, 1, 1], "carries");
    same!(guest.ram.quads(DATA + 8), [8, 0], "sums");
    Ok(())
}

pub(super) fn comparisons_only_read(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(eax, 0x80)?;
            for n in 0..6 {
                match n {
                    0 => a.test(byte_ptr(rdi), al)?,
                    1 => a.test(dword_ptr(rdi), 0x7f)?,
                    2 => a.cmp(byte_ptr(rdi), al)?,
                    3 => a.cmp(word_ptr(rdi), 0x81)?,
                    4 => a.cmp(eax, dword_ptr(rdi))?,
                    _ => a.cmp(qword_ptr(rdi), 0x7f)?,
                }
                a.pushfq()?;
                a.pop(rcx)?;
                a.mov(qword_ptr(DATA + n * 8), rcx)?;
            }
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[0x80, 0, 0, 0, 0, 0, 0, 0]);
        guest.run()?;
        let sizes = [1, 4, 1, 2, 4, 8].map(|size| Access::Read(MMIO, size));
        same!(guest.bus.take(), sizes, "accesses in ring {ring}");
        let flags = guest.ram.quads::<6>(DATA).map(|flags| flags & FLAGS);
        same!(flags, [SF, ZF, ZF, CF | SF, ZF, 0], "flags in ring {ring}");
    }
    Ok(())
}

pub(super) fn exchanges(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            for n in 0..4 {
                a.mov(rax, 0x0102_0304_0506_0708u64)?;
                match n {
                    0 => a.xchg(byte_ptr(rdi), al)?,
                    1 => a.xchg(word_ptr(rdi + 8), ax)?,
                    2 => a.xchg(dword_ptr(rdi + 16), eax)?,
                    _ => a.xchg(qword_ptr(rdi + 24), rax)?,
                }
                a.mov(qword_ptr(DATA + n * 8), rax)?;
            }
            a.stop_for_good()
        })?;
        let value = [8, 7, 6, 5, 4, 3, 2, 1];
        let mut expected = Vec::new();
        for (n, width) in (0u64..).zip([1, 2, 4, 8]) {
            guest.bus.set_memory(MMIO + n * 8, &[0xee; 8]);
            expected.push(Access::Read(MMIO + n * 8, width));
            expected.push(Access::Write(MMIO + n * 8, value[..width].to_vec()));
        }
        guest.run()?;
        same!(guest.bus.take(), expected, "accesses in ring {ring}");
        same!(
            guest.ram.quads(DATA),
            [
                0x0102_0304_0506_07ee,
                0x0102_0304_0506_eeee,
                0xeeee_eeee,
                0xeeee_eeee_eeee_eeee
            ],
            "values in ring {ring}"
        );
    }
    Ok(())
}

pub(super) fn compare_and_exchange(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(ecx, 0x2222_2222)?;
            a.mov(eax, 0x1111_1111)?;
            a.lock().cmpxchg(dword_ptr(rdi), ecx)?;
            a.sete(byte_ptr(DATA))?;
            a.mov(eax, 0x3333_3333)?;
            a.lock().cmpxchg(dword_ptr(rdi), ecx)?;
            a.sete(byte_ptr(DATA + 1))?;
            a.mov(dword_ptr(DATA + 4), eax)?;
            a.stop()?;
            a.mov(ebx, 5)?;
            a.mov(ecx, 6)?;
            a.mov(eax, 7)?;
            a.mov(edx, 8)?;
            a.lock().cmpxchg8b(qword_ptr(rdi + 8))?;
            a.sete(byte_ptr(DATA + 2))?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[0x11; 4]);
        guest.bus.set_memory(MMIO + 8, &[7, 0, 0, 0, 8, 0, 0, 0]);
        guest.run()?;
        let accesses = guest.bus.take();
        let written = Access::Write(MMIO, vec![0x22; 4]);
        let mut expected = vec![
            Access::Read(MMIO, 4),
            written.clone(),
            Access::Read(MMIO, 4),
        ];
        if accesses.len() == 4 {
            // The processor writes in any case: when the comparison fails, what it has read.
            expected.push(written);
        }
        same!(accesses, expected, "accesses in ring {ring}");
        same!(guest.ram.read(DATA), [1, 0], "ZF in ring {ring}");
        same!(
            guest.ram.read_u32(DATA + 4),
            0x2222_2222,
            "EAX after a failed comparison"
        );
        guest.run()?;
        same!(
            guest.bus.memory(MMIO + 8),
            [5, 0, 0, 0, 6, 0, 0, 0],
            "CMPXCHG8B in ring {ring}"
        );
        same!(guest.ram.read(DATA + 2), [1], "ZF of CMPXCHG8B");
    }
    Ok(())
}

pub(super) fn exchange_and_add(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(eax, 3)?;
            a.lock().xadd(dword_ptr(rdi), eax)?;
            a.mov(dword_ptr(DATA), eax)?;
            a.mov(al, 0xff)?;
            a.xadd(byte_ptr(rdi + 4), al)?;
            a.setc(byte_ptr(DATA + 4))?;
            a.mov(byte_ptr(DATA + 5), al)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[5, 0, 0, 0, 2]);
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Read(MMIO, 4),
                Access::Write(MMIO, vec![8, 0, 0, 0]),
                Access::Read(MMIO + 4, 1),
                Access::Write(MMIO + 4, vec![1]),
            ],
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.read(DATA),
            [5, 0, 0, 0, 1, 2],
            "what was there, and CF"
        );
    }
    Ok(())
}

/// A bit number in a register reaches beyond the operand; an immediate one does not.
pub(super) fn bit_operations(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32 + 0x40)?;
            a.mov(eax, 37)?;
            a.bts(dword_ptr(rdi), eax)?;
            a.setc(byte_ptr(DATA))?;
            a.bt(dword_ptr(rdi), eax)?;
            a.setc(byte_ptr(DATA + 1))?;
            a.lock().btr(dword_ptr(rdi), eax)?;
            a.setc(byte_ptr(DATA + 2))?;
            a.mov(eax, -1)?;
            a.btc(dword_ptr(rdi), eax)?;
            a.setc(byte_ptr(DATA + 3))?;
            a.bts(dword_ptr(rdi), 33)?;
            a.setc(byte_ptr(DATA + 4))?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[0; 0x80]);
        guest.run()?;
        let at = MMIO + 0x40;
        same!(
            guest.bus.take(),
            [
                Access::Read(at + 4, 4),
                Access::Write(at + 4, vec![0x20, 0, 0, 0]),
                Access::Read(at + 4, 4),
                Access::Read(at + 4, 4),
                Access::Write(at + 4, vec![0; 4]),
                Access::Read(at - 4, 4),
                Access::Write(at - 4, vec![0, 0, 0, 0x80]),
                Access::Read(at, 4),
                Access::Write(at, vec![2, 0, 0, 0]),
            ],
            "accesses in ring {ring}"
        );
        same!(guest.ram.read(DATA), [0, 1, 1, 0, 0], "CF in ring {ring}");
    }
    Ok(())
}

pub(super) fn stack_operations(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.push(qword_ptr(rdi))?;
            a.mov(qword_ptr(DATA), rsp)?;
            a.pop(rcx)?;
            a.mov(qword_ptr(DATA + 8), rcx)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.push(rax)?;
            a.pop(qword_ptr(rdi + 8))?;
            a.mov(qword_ptr(DATA + 16), rsp)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[1, 2, 3, 4, 5, 6, 7, 8]);
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Read(MMIO, 8),
                Access::Write(MMIO + 8, vec![8, 7, 6, 5, 4, 3, 2, 1]),
            ],
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [STACK - 8, 0x0807_0605_0403_0201, STACK],
            "RSP, the value, RSP"
        );
    }
    Ok(())
}

/// A jump whose target a device holds.
pub(super) fn jumps_through_device_memory(hypervisor: &dyn Hypervisor) -> Outcome {
    let target = CODE + 0x800;
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.jmp(qword_ptr(rdi))
        })?;
        guest.place(64, target, &|a| {
            a.mov(dword_ptr(DATA), 0x1234)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &target.to_le_bytes());
        guest.run()?;
        same!(
            guest.bus.take(),
            [Access::Read(MMIO, 8)],
            "accesses in ring {ring}"
        );
        ensure!(
            guest.ram.read_u32(DATA) == 0x1234,
            "the target was not reached in ring {ring}"
        );
    }
    Ok(())
}
