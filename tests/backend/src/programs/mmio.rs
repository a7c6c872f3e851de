//! Moves to and from device memory.

use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use super::is_offered;
use crate::guest::{
    Access, BASED, CODE, CODE16, DATA, DATA_BASED, DATA16, Guest, Idioms as _, MMIO, MORE_DATA,
    loaded,
};
use crate::outcome::{Outcome, same, skip};

pub(super) const MOVBE: (u32, u32) = (1, 1 << 22);

/// Which bytes were read and written, in order and without regard to how accesses were cut.
pub(super) fn bytes(accesses: &[Access]) -> Vec<(u64, Option<u8>)> {
    accesses
        .iter()
        .flat_map(|access| match access {
            Access::Read(gpa, size) => (0..*size as u64).map(|i| (gpa + i, None)).collect(),
            Access::Write(gpa, data) => (*gpa..)
                .zip(data.iter().map(|b| Some(*b)))
                .collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect()
}

pub(super) fn moves_of_all_widths(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.mov(byte_ptr(rdi), al)?;
            a.mov(word_ptr(rdi + 8), ax)?;
            a.mov(dword_ptr(rdi + 16), eax)?;
            a.mov(qword_ptr(rdi + 24), rax)?;
            for (n, offset) in (0..).zip([32, 40, 48, 56, 64]) {
                a.mov(rcx, u64::MAX)?;
                match n {
                    0 => a.mov(cl, byte_ptr(rdi + offset))?,
                    1 => a.mov(cx, word_ptr(rdi + offset))?,
                    2 => a.mov(ecx, dword_ptr(rdi + offset))?,
                    _ => a.mov(rcx, qword_ptr(rdi + offset))?,
                }
                a.mov(qword_ptr(DATA + n * 8), rcx)?;
            }
            a.stop_for_good()
        })?;
        for offset in [32, 40, 48, 56] {
            guest
                .bus
                .set_memory(MMIO + offset, &0x1112_1314_1516_1718u64.to_le_bytes());
        }
        guest.run()?;
        let value = [8, 7, 6, 5, 4, 3, 2, 1];
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO, value[..1].to_vec()),
                Access::Write(MMIO + 8, value[..2].to_vec()),
                Access::Write(MMIO + 16, value[..4].to_vec()),
                Access::Write(MMIO + 24, value.to_vec()),
                Access::Read(MMIO + 32, 1),
                Access::Read(MMIO + 40, 2),
                Access::Read(MMIO + 48, 4),
                Access::Read(MMIO + 56, 8),
                Access::Read(MMIO + 64, 8),
            ],
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [
                0xffff_ffff_ffff_ff18,
                0xffff_ffff_ffff_1718,
                0x1516_1718,
                0x1112_1314_1516_1718,
                u64::MAX
            ],
            "values read in ring {ring}"
        );
    }
    Ok(())
}

pub(super) fn moves_of_immediates(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(byte_ptr(rdi), 0x12)?;
            a.mov(word_ptr(rdi + 2), 0x1234)?;
            a.mov(dword_ptr(rdi + 4), 0x1234_5678)?;
            a.mov(qword_ptr(rdi + 8), -2)?;
            // An absolute address of 32 bits, and scaled index with displacement.
            a.mov(dword_ptr(MMIO + 0x20), 0x55)?;
            a.mov(ecx, 4)?;
            a.mov(dword_ptr(rdi + rcx * 8 + 0x10), 0x66)?;
            a.stop_for_good()
        })?;
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO, vec![0x12]),
                Access::Write(MMIO + 2, vec![0x34, 0x12]),
                Access::Write(MMIO + 4, vec![0x78, 0x56, 0x34, 0x12]),
                Access::Write(MMIO + 8, (-2i64).to_le_bytes().to_vec()),
                Access::Write(MMIO + 0x20, vec![0x55, 0, 0, 0]),
                Access::Write(MMIO + 0x30, vec![0x66, 0, 0, 0]),
            ],
            "accesses in ring {ring}"
        );
    }
    Ok(())
}

pub(super) fn extending_moves(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            for n in 0..7 {
                a.mov(rcx, u64::MAX)?;
                match n {
                    0 => a.movzx(ecx, byte_ptr(rdi))?,
                    1 => a.movzx(rcx, word_ptr(rdi))?,
                    2 => a.movzx(cx, byte_ptr(rdi))?,
                    3 => a.movsx(ecx, byte_ptr(rdi))?,
                    4 => a.movsx(rcx, byte_ptr(rdi))?,
                    5 => a.movsx(rcx, word_ptr(rdi))?,
                    _ => a.movsxd(rcx, dword_ptr(rdi))?,
                }
                a.mov(qword_ptr(DATA + n * 8), rcx)?;
            }
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[0x81, 0x92, 0xa3, 0xb4]);
        guest.run()?;
        let sizes = [1, 2, 1, 1, 1, 2, 4].map(|size| Access::Read(MMIO, size));
        same!(guest.bus.take(), sizes, "accesses in ring {ring}");
        same!(
            guest.ram.quads(DATA),
            [
                0x81,
                0x9281,
                0xffff_ffff_ffff_0081,
                0xffff_ff81,
                0xffff_ffff_ffff_ff81,
                0xffff_ffff_ffff_9281,
                0xffff_ffff_b4a3_9281
            ],
            "values in ring {ring}"
        );
    }
    Ok(())
}

/// The 16-bit form is left out: KVM takes its operand-size prefix for another instruction's.
pub(super) fn byte_swapping_moves(hypervisor: &dyn Hypervisor) -> Outcome {
    if !is_offered(hypervisor, MOVBE)? {
        return skip("this host offers no MOVBE");
    }
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.movbe(dword_ptr(rdi + 8), eax)?;
            a.movbe(qword_ptr(rdi + 16), rax)?;
            a.mov(rcx, u64::MAX)?;
            a.movbe(ecx, dword_ptr(rdi + 24))?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.movbe(rcx, qword_ptr(rdi + 24))?;
            a.mov(qword_ptr(DATA + 8), rcx)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO + 24, &[1, 2, 3, 4, 5, 6, 7, 8]);
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO + 8, vec![5, 6, 7, 8]),
                Access::Write(MMIO + 16, vec![1, 2, 3, 4, 5, 6, 7, 8]),
                Access::Read(MMIO + 24, 4),
                Access::Read(MMIO + 24, 8),
            ],
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [0x0102_0304, 0x0102_0304_0506_0708],
            "values"
        );
    }
    Ok(())
}

/// In ring 3 only: a hypervisor that interprets ring 0 need not know SSE there.
pub(super) fn sixteen_byte_moves(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edi, MMIO as u32)?;
        a.movups(xmm0, xmmword_ptr(rdi))?;
        a.movups(xmmword_ptr(DATA), xmm0)?;
        a.movdqa(xmm9, xmmword_ptr(rdi + 0x10))?;
        a.movdqu(xmmword_ptr(DATA + 0x10), xmm9)?;
        a.movups(xmmword_ptr(rdi + 0x20), xmm0)?;
        a.movdqu(xmmword_ptr(rdi + 0x30), xmm9)?;
        a.movaps(xmmword_ptr(rdi + 0x40), xmm0)?;
        a.stop_for_good()
    })?;
    let value: [u8; 32] = std::array::from_fn(|i| i as u8 + 1);
    guest.bus.set_memory(MMIO, &value);
    guest.run()?;
    let accesses = guest.bus.take();
    let reads = (0..32).map(|i| (MMIO + i, None));
    let writes = (0x20u64..).zip(value.iter().chain(&value[..16]));
    let expected: Vec<_> = reads
        .chain(writes.map(|(at, byte)| (MMIO + at, Some(*byte))))
        .collect();
    same!(bytes(&accesses), expected, "bytes");
    same!(guest.ram.read(DATA), value, "values read");
    Ok(())
}

pub(super) fn unaligned(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32 + 1)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.mov(word_ptr(rdi), ax)?;
            a.mov(dword_ptr(rdi + 0x10), eax)?;
            a.mov(qword_ptr(rdi + 0x20), rax)?;
            a.mov(rcx, qword_ptr(rdi + 0x30))?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO + 0x31, &[1, 2, 3, 4, 5, 6, 7, 8]);
        guest.run()?;
        let mut expected = vec![(MMIO + 1, Some(8)), (MMIO + 2, Some(7))];
        expected.extend((0..4).map(|i| (MMIO + 0x11 + i, Some(8 - i as u8))));
        expected.extend((0..8).map(|i| (MMIO + 0x21 + i, Some(8 - i as u8))));
        expected.extend((0..8).map(|i| (MMIO + 0x31 + i, None)));
        same!(bytes(&guest.bus.take()), expected, "bytes in ring {ring}");
        same!(
            guest.ram.read_u64(DATA),
            0x0807_0605_0403_0201,
            "value in ring {ring}"
        );
    }
    Ok(())
}

/// An access that begins in memory and ends in a device, and the other way round.
pub(super) fn across_the_edge_of_memory(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.mov(qword_ptr(rdi - 3), rax)?;
            a.mov(rcx, qword_ptr(rdi - 4))?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.mov(dword_ptr(rdi + 0x1000 - 2), eax)?;
            a.stop_for_good()
        })?;
        let (below, above) = (
            crate::guest::Ram::new(0x1000),
            crate::guest::Ram::new(0x1000),
        );
        let slots = [below.slot(1, MMIO - 0x1000), above.slot(2, MMIO + 0x1000)];
        for slot in slots {
            // SAFETY: both stay mapped until their slots are taken away below.
            unsafe { guest.vm.map_memory(slot)? };
        }
        let ran = guest.run();
        for slot in slots {
            guest.vm.unmap_memory(slot)?;
        }
        ran?;
        let mut expected: Vec<_> = (0..5).map(|i| (MMIO + i, Some(5 - i as u8))).collect();
        expected.extend((0..4).map(|i| (MMIO + i, None)));
        expected.extend([(MMIO + 0xffe, Some(8)), (MMIO + 0xfff, Some(7))]);
        same!(
            bytes(&guest.bus.take()),
            expected,
            "bytes in the device in ring {ring}"
        );
        same!(below.read(0xffc), [0, 8, 7, 6], "memory below");
        same!(above.read(0), [6, 5, 0], "memory above");
        same!(
            guest.ram.read_u64(DATA),
            0x0203_0405_0607_0800,
            "the value read back"
        );
    }
    Ok(())
}

/// An access whose two halves lie in two pages of device memory that are not neighbours.
pub(super) fn across_pages_of_devices(hypervisor: &dyn Hypervisor) -> Outcome {
    // The second 2 MiB page from MMIO on is mapped to another place.
    let (edge, elsewhere) = (MMIO + 0x20_0000, 0x3000_0000u64);
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, edge as u32)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.mov(qword_ptr(rdi - 3), rax)?;
            a.mov(rcx, qword_ptr(rdi - 3))?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.stop_for_good()
        })?;
        guest.map_2m(edge, elsewhere);
        guest.run()?;
        let places: Vec<u64> = (edge - 3..edge).chain(elsewhere..elsewhere + 5).collect();
        let mut expected: Vec<_> = places
            .iter()
            .zip((1..=8u8).rev())
            .map(|(at, byte)| (*at, Some(byte)))
            .collect();
        expected.extend(places.iter().map(|at| (*at, None)));
        same!(bytes(&guest.bus.take()), expected, "bytes in ring {ring}");
        same!(
            guest.ram.read_u64(DATA),
            0x0102_0304_0506_0708,
            "the value read back"
        );
    }
    Ok(())
}

pub(super) fn in_real_mode(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::real(hypervisor, &|a| {
        a.mov(bx, 0x100)?;
        a.mov(si, 0x20)?;
        a.mov(eax, 0x0102_0304)?;
        a.mov(byte_ptr(bx + si + 1).fs(), al)?;
        a.mov(word_ptr(bx + si + 2).fs(), ax)?;
        a.mov(dword_ptr(bx + 4).fs(), eax)?;
        a.mov(ecx, dword_ptr(0x10).fs())?;
        a.mov(dword_ptr(DATA), ecx)?;
        a.stop_for_good()
    })?;
    guest.change(|state| state.special.fs.base = MMIO)?;
    guest.bus.set_memory(MMIO + 0x10, &[1, 2, 3, 4]);
    guest.run()?;
    same!(
        guest.bus.take(),
        [
            Access::Write(MMIO + 0x121, vec![4]),
            Access::Write(MMIO + 0x122, vec![4, 3]),
            Access::Write(MMIO + 0x104, vec![4, 3, 2, 1]),
            Access::Read(MMIO + 0x10, 4),
        ],
        "accesses"
    );
    same!(guest.ram.read_u32(DATA), 0x0403_0201, "value read");
    Ok(())
}

/// 32-bit protected mode with a data segment that does not begin at 0.
pub(super) fn in_segments_with_a_base(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::protected(hypervisor, &|a| {
        a.mov(ebx, (MMIO - BASED) as u32)?;
        a.mov(eax, 0x0102_0304)?;
        a.mov(dword_ptr(ebx + 8), eax)?;
        a.mov(cx, word_ptr(ebx + 0x10))?;
        a.mov(word_ptr(DATA as u32).es(), cx)?;
        // Wraps around 4 GiB: an offset just below the base's negative.
        a.mov(ebx, 0u32.wrapping_sub(BASED as u32))?;
        a.mov(al, byte_ptr(ebx + MORE_DATA as u32))?;
        a.mov(byte_ptr(DATA as u32 + 2).es(), al)?;
        // EBP addresses the stack's segment, which is flat.
        a.mov(ebp, MMIO as u32)?;
        a.mov(byte_ptr(ebp + 0x20), al)?;
        a.stop_for_good()
    })?;
    guest.change(|state| state.special.ds = loaded(DATA_BASED))?;
    guest.bus.set_memory(MMIO + 0x10, &[0x11, 0x22]);
    guest.ram.write(MORE_DATA, &[0x77]);
    guest.run()?;
    same!(
        guest.bus.take(),
        [
            Access::Write(MMIO + 8, vec![4, 3, 2, 1]),
            Access::Read(MMIO + 0x10, 2),
            Access::Write(MMIO + 0x20, vec![0x77]),
        ],
        "accesses"
    );
    same!(guest.ram.read(DATA), [0x11, 0x22, 0x77], "values read");
    Ok(())
}

/// 16-bit code in protected mode, with addresses and operands of both sizes.
pub(super) fn in_sixteen_bit_protected_mode(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::new(hypervisor)?;
    guest.place(16, CODE, &|a| {
        a.mov(edi, MMIO as u32)?;
        a.mov(eax, 0x0102_0304)?;
        a.mov(word_ptr(edi), ax)?;
        a.mov(dword_ptr(edi + 4), eax)?;
        a.mov(ecx, dword_ptr(edi + 8))?;
        // Through a segment of 64 KiB, with a 16-bit address.
        a.mov(bx, DATA as u32)?;
        a.mov(dword_ptr(bx).es(), ecx)?;
        a.stop_for_good()
    })?;
    guest.enter_protected_mode(CODE16)?;
    guest.change(|state| state.special.es = loaded(DATA16))?;
    guest.bus.set_memory(MMIO + 8, &[1, 2, 3, 4]);
    guest.run()?;
    same!(
        guest.bus.take(),
        [
            Access::Write(MMIO, vec![4, 3]),
            Access::Write(MMIO + 4, vec![4, 3, 2, 1]),
            Access::Read(MMIO + 8, 4),
        ],
        "accesses"
    );
    same!(guest.ram.read_u32(DATA), 0x0403_0201, "value read");
    Ok(())
}

/// In 64-bit mode only FS and GS have bases.
pub(super) fn through_fs_and_gs(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, 0x40)?;
            a.mov(eax, 0x0102_0304)?;
            a.mov(dword_ptr(rdi).fs(), eax)?;
            a.mov(word_ptr(rdi).gs(), ax)?;
            a.stop_for_good()
        })?;
        guest.change(|state| {
            state.special.fs.base = MMIO;
            state.special.gs.base = MMIO + 0x1000;
        })?;
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO + 0x40, vec![4, 3, 2, 1]),
                Access::Write(MMIO + 0x1040, vec![4, 3]),
            ],
            "accesses in ring {ring}"
        );
    }
    Ok(())
}

/// The upper registers, and the four byte registers that need a REX prefix or must not have one.
pub(super) fn every_register(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(r8d, MMIO as u32)?;
        a.mov(edi, MMIO as u32)?;
        a.mov(eax, 0x1_0201)?;
        a.mov(byte_ptr(rdi), ah)?;
        a.mov(esi, 0x33)?;
        a.mov(byte_ptr(r8 + 1), sil)?;
        a.mov(r15d, 0x44)?;
        a.mov(byte_ptr(r8 + 2), r15b)?;
        a.mov(ebx, 0x1155)?;
        a.mov(bh, byte_ptr(rdi + 3))?;
        a.mov(qword_ptr(DATA), rbx)?;
        a.mov(r13, qword_ptr(r8 + 8))?;
        a.mov(qword_ptr(DATA + 8), r13)?;
        a.stop_for_good()
    })?;
    guest.bus.set_memory(MMIO + 3, &[0x66]);
    guest.bus.set_memory(MMIO + 8, &[1, 2, 3, 4, 5, 6, 7, 8]);
    guest.run()?;
    same!(guest.bus.memory(MMIO), [2, 0x33, 0x44], "bytes written");
    same!(
        guest.ram.quads(DATA),
        [0x6655, 0x0807_0605_0403_0201],
        "values read"
    );
    Ok(())
}
