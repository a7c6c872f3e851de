//! Debug registers, breakpoints and single steps.

use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use super::no_breakpoints_here;
use crate::guest::{Access, CODE, DATA, Guest, Idioms as _, MMIO, MORE_DATA};
use crate::outcome::{Outcome, ensure, same};

/// DR6 with no condition set (SDM vol. 3, section 18.2.3).
const DR6_NONE: u64 = 0xffff_0ff0;
/// DR7 with nothing enabled: bit 10 is always set.
const DR7_NONE: u64 = 0x400;
/// Trap flag.
const TF: u64 = 0x100;
/// Resume flag.
const RF: u64 = 0x1_0000;

pub(super) fn registers_keep_their_values(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(rax, 0x1111_2222u64)?;
        a.mov(dr0, rax)?;
        a.mov(rax, 0x7fff_ffff_f000u64)?;
        a.mov(dr1, rax)?;
        a.mov(rax, 0xffff_8000_0000_0000u64)?;
        a.mov(dr2, rax)?;
        a.mov(rax, 0x4444u64)?;
        a.mov(dr3, rax)?;
        a.stop()?;
        for n in 0..6 {
            match n {
                0 => a.mov(rax, dr0)?,
                1 => a.mov(rax, dr1)?,
                2 => a.mov(rax, dr2)?,
                3 => a.mov(rax, dr3)?,
                4 => a.mov(rax, dr6)?,
                _ => a.mov(rax, dr7)?,
            }
            a.mov(qword_ptr(DATA + n * 8), rax)?;
        }
        a.stop_for_good()
    })?;
    guest.run()?;
    let addresses = [0x1111_2222, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, 0x4444];
    let saved = guest.vcpu.save_state()?.debug;
    same!(
        saved.map(|debug| debug.db),
        Some(addresses),
        "DR0 to DR3 as saved"
    );
    // Set from outside, on top of what the guest has set.
    guest.change(|state| {
        if let Some(debug) = &mut state.debug {
            (debug.db[3], debug.dr6) = (0x5555, DR6_NONE | 1);
        }
    })?;
    guest.run()?;
    let [one, two, three, _] = addresses;
    same!(
        guest.ram.quads(DATA),
        [one, two, three, 0x5555, DR6_NONE | 1, DR7_NONE],
        "registers as read"
    );
    Ok(())
}

/// In ring 3: a hypervisor that interprets ring 0 need not look at DR7 there.
pub(super) fn breakpoints(hypervisor: &dyn Hypervisor) -> Outcome {
    no_breakpoints_here()?;
    on_an_instruction(hypervisor)?;
    on_data(hypervisor)
}

fn on_an_instruction(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.nop()?;
        a.nop()?;
        a.mov(dword_ptr(DATA), 1)?;
        a.stop_for_good()
    })?;
    set_breakpoint(&mut guest, CODE + 2, 0b0000)?;
    let fault = guest.run_to_fault()?;
    same!(
        (fault.vector, fault.rip),
        (1, CODE + 2),
        "vector and RIP: the instruction is not done"
    );
    same!(fault.dr6 & 0xf, 1, "DR6: the first breakpoint");
    same!(guest.ram.read_u32(DATA), 0, "the instruction's result");
    guest.resume_with_flags(fault.rflags | RF);
    guest.run()?;
    same!(
        guest.ram.read_u32(DATA),
        1,
        "the instruction's result after RF"
    );
    Ok(())
}

fn on_data(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(eax, dword_ptr(MORE_DATA))?;
        a.mov(dword_ptr(DATA), 2)?;
        a.mov(dword_ptr(MORE_DATA), 1)?;
        a.stop_for_good()
    })?;
    // Writes of 4 bytes.
    set_breakpoint(&mut guest, MORE_DATA, 0b1101)?;
    let fault = guest.run_to_fault()?;
    same!(
        (fault.vector, fault.rip),
        (1, CODE + 7 + 11 + 11),
        "vector and RIP: behind the write"
    );
    same!(fault.dr6 & 0xf, 1, "DR6: the first breakpoint");
    same!(guest.ram.read_u32(MORE_DATA), 1, "the write is done");
    guest.run()?;
    Ok(())
}

/// Enables breakpoint 0; `kind` is LEN0 and R/W0 (SDM vol. 3, section 18.2.4).
fn set_breakpoint(guest: &mut Guest, address: u64, kind: u64) -> Outcome {
    let mut state = guest.vcpu.save_state()?;
    ensure!(state.debug.is_some(), "no debug registers were saved");
    if let Some(debug) = &mut state.debug {
        debug.db[0] = address;
        debug.dr7 = DR7_NONE | 1 | kind << 16;
    }
    Ok(guest.vcpu.restore_state(&state)?)
}

pub(super) fn single_steps(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.nop()?;
        a.inc(ebx)?;
        a.nop()?;
        a.stop_for_good()
    })?;
    steps(&mut guest, &[1, 3, 4])
}

/// Instructions that leave the guest are steps too.
pub(super) fn single_steps_over_reads(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(eax, dword_ptr(rdi))?;
        a.in_(al, 0x51)?;
        a.nop()?;
        a.stop_for_good()
    })?;
    steps(&mut guest, &[2, 4, 5])?;
    let expected = [Access::Read(MMIO, 4), Access::In(0x51, 1)];
    same!(guest.bus.take(), expected, "accesses, each made once");
    Ok(())
}

pub(super) fn single_steps_over_writes(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(byte_ptr(rdi), al)?;
        a.out(0x51, al)?;
        a.nop()?;
        a.stop_for_good()
    })?;
    guest.change(|state| state.general.rax = 7)?;
    steps(&mut guest, &[2, 4, 5])?;
    let expected = [Access::Write(MMIO, vec![7]), Access::Out(0x51, vec![7])];
    same!(guest.bus.take(), expected, "accesses, each made once");
    Ok(())
}

/// Steps to each of these offsets and then lets the guest run. RDI is [`MMIO`].
fn steps(guest: &mut Guest, behind: &[u64]) -> Outcome {
    guest.change(|state| {
        state.general.rflags |= TF;
        state.general.rdi = MMIO;
    })?;
    for offset in behind {
        let fault = guest.run_to_fault()?;
        same!(
            (fault.vector, fault.rip),
            (1, CODE + offset),
            "vector and RIP of a step"
        );
        same!(fault.dr6 & 0x4000, 0x4000, "DR6.BS of the step to {offset}");
        if Some(offset) == behind.last() {
            guest.resume_with_flags(fault.rflags & !TF);
        }
    }
    guest.run()
}
