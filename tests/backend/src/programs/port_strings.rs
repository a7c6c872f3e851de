//! INS and OUTS, with and without REP.

use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use crate::guest::{Access, DATA, Guest, Idioms as _, MORE_DATA};
use crate::outcome::{Outcome, same};

const PORT: u16 = 0x520;

/// What was written to the port, element by element.
fn written(accesses: Vec<Access>) -> Vec<Vec<u8>> {
    accesses
        .into_iter()
        .filter_map(|access| match access {
            Access::Out(PORT, data) => Some(data),
            _ => None,
        })
        .collect()
}

pub(super) fn outs_makes_one_access_an_element(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::real(hypervisor, &|a| {
        a.cld()?;
        a.mov(dx, u32::from(PORT))?;
        a.mov(si, MORE_DATA as u32)?;
        a.mov(cx, 5)?;
        a.rep().outsb()?;
        a.mov(cx, 3)?;
        a.rep().outsw()?;
        a.mov(cx, 2)?;
        a.rep().outsd()?;
        a.outsb()?;
        a.mov(word_ptr(DATA), si)?;
        a.mov(word_ptr(DATA + 2), cx)?;
        a.stop_for_good()
    })?;
    let bytes: Vec<u8> = (1..=20).collect();
    guest.ram.write(MORE_DATA, &bytes);
    guest.run()?;
    let written = written(guest.bus.take());
    let widths: Vec<_> = written.iter().map(Vec::len).collect();
    same!(widths, [1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 1], "widths");
    same!(written.concat(), bytes, "bytes");
    same!(
        guest.ram.read_u32(DATA),
        MORE_DATA as u32 + 20,
        "SI, and CX above it"
    );
    Ok(())
}

pub(super) fn ins_makes_one_access_an_element(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(edx, u32::from(PORT))?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 3)?;
            a.rep().insb()?;
            a.mov(ecx, 2)?;
            a.rep().insw()?;
            a.mov(ecx, 2)?;
            a.rep().insd()?;
            a.insb()?;
            a.mov(qword_ptr(MORE_DATA), rdi)?;
            a.mov(qword_ptr(MORE_DATA + 8), rcx)?;
            a.stop_for_good()
        })?;
        guest.bus.set_port(PORT, 0x4433_2211);
        guest.run()?;
        let sizes: Vec<_> = guest
            .bus
            .take()
            .into_iter()
            .map(|access| match access {
                Access::In(PORT, size) => size,
                _ => 0,
            })
            .collect();
        same!(sizes, [1, 1, 1, 2, 2, 4, 4, 1], "sizes in ring {ring}");
        let expected = [
            0x11, 0x11, 0x11, 0x11, 0x22, 0x11, 0x22, 0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x33,
            0x44, 0x11, 0,
        ];
        same!(guest.ram.read::<17>(DATA), expected, "bytes in ring {ring}");
        same!(guest.ram.quads(MORE_DATA), [DATA + 16, 0], "RDI and RCX");
    }
    Ok(())
}

pub(super) fn downwards(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.std()?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, MORE_DATA as u32 + 8)?;
        a.mov(ecx, 4)?;
        a.rep().outsw()?;
        a.mov(edi, DATA as u32 + 12)?;
        a.mov(ecx, 3)?;
        a.rep().insd()?;
        a.mov(qword_ptr(MORE_DATA + 64), rsi)?;
        a.mov(qword_ptr(MORE_DATA + 72), rdi)?;
        a.stop_for_good()
    })?;
    guest.ram.write(MORE_DATA, &[0, 0, 7, 8, 5, 6, 3, 4, 1, 2]);
    guest.bus.set_port(PORT, 0x4433_2211);
    guest.run()?;
    same!(
        written(guest.bus.take()),
        [[1, 2], [3, 4], [5, 6], [7, 8]],
        "words, from the highest address down"
    );
    let low = 0x4433_2211_0000_0000u64;
    same!(
        guest.ram.quads(DATA),
        [low, 0x4433_2211_4433_2211],
        "doublewords read"
    );
    same!(
        guest.ram.quads(MORE_DATA + 64),
        [MORE_DATA, DATA],
        "RSI and RDI"
    );
    Ok(())
}

/// A count of 0 makes no access and changes no register. In 64-bit mode the count is RCX unless the address size says ECX.
pub(super) fn counts_of_zero(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.cld()?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, MORE_DATA as u32)?;
        a.mov(edi, DATA as u32)?;
        a.xor(ecx, ecx)?;
        a.rep().outsb()?;
        a.rep().insd()?;
        // rep outsb with a 32-bit address size: the count is ECX, which is 0 too.
        a.mov(rcx, 0x1_0000_0000u64)?;
        a.db(&[0x67, 0xf3, 0x6e])?;
        a.mov(qword_ptr(DATA + 8), rsi)?;
        a.mov(qword_ptr(DATA + 16), rdi)?;
        a.stop_for_good()
    })?;
    guest.run()?;
    same!(guest.bus.take(), [], "accesses");
    same!(
        guest.ram.quads(DATA),
        [0, MORE_DATA, DATA],
        "memory, RSI and RDI"
    );
    Ok(())
}

pub(super) fn buffers_across_pages(hypervisor: &dyn Hypervisor) -> Outcome {
    // Elements of 4 bytes, the middle one half in one page and half in the next.
    let (from, to) = (0x2_0ffau64, 0x3_0ffau64);
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(edx, u32::from(PORT))?;
            a.mov(esi, from as u32)?;
            a.mov(edi, to as u32)?;
            a.mov(ecx, 3)?;
            a.rep().outsd()?;
            a.mov(ecx, 3)?;
            a.rep().insd()?;
            a.stop_for_good()
        })?;
        let bytes: Vec<u8> = (1..=12).collect();
        guest.ram.write(from, &bytes);
        guest.bus.set_port(PORT, 0x4433_2211);
        guest.run()?;
        let words = written(guest.bus.take());
        same!(words.concat(), bytes, "bytes written in ring {ring}");
        same!(words.len(), 3, "writes in ring {ring}");
        same!(
            guest.ram.read::<14>(to - 1),
            [
                0, 0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x33, 0x44, 0
            ],
            "bytes read in ring {ring}"
        );
    }
    Ok(())
}

/// Longer than any buffer a back end may keep for one exit.
pub(super) fn long_transfers(hypervisor: &dyn Hypervisor) -> Outcome {
    const COUNT: u32 = 3000;
    let (from, to) = (0x2_0000u64, 0x4_0000u64);
    let mut guest = Guest::long(hypervisor, &|a| {
        a.cld()?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, from as u32)?;
        a.mov(ecx, COUNT)?;
        a.rep().outsw()?;
        a.mov(edi, to as u32)?;
        a.mov(ecx, COUNT)?;
        a.rep().insw()?;
        a.mov(qword_ptr(DATA), rsi)?;
        a.mov(qword_ptr(DATA + 8), rdi)?;
        a.stop_for_good()
    })?;
    let bytes: Vec<u8> = (0..COUNT * 2).map(|n| (n % 251) as u8).collect();
    guest.ram.write(from, &bytes);
    guest.bus.set_port(PORT, 0x2211);
    guest.run()?;
    let words = written(guest.bus.take());
    same!(words.len(), COUNT as usize, "writes");
    same!(words.concat() == bytes, true, "every word in order");
    let end = 2 * u64::from(COUNT);
    same!(guest.ram.quads(DATA), [from + end, to + end], "RSI and RDI");
    same!(
        guest.ram.read::<4>(to + end - 2),
        [0x11, 0x22, 0, 0],
        "the last word read"
    );
    Ok(())
}
