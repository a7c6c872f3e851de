//! Exceptions that reach the guest's own handlers.

use arch::x86_64::state::PendingException;
use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use crate::guest::{
    CODE, CODE64, DATA, Fault, Guest, IOPL_3, Idioms as _, MMIO, STACK, STOP_PORT, USER_CODE64,
};
use crate::outcome::{Outcome, same};

/// What a handler must find, apart from CR2, DR6 and the flags.
fn check(found: &Fault, ring: u16, vector: u64, error: u64, rip: u64) -> Outcome {
    let selector = if ring == 0 { CODE64 } else { USER_CODE64 };
    same!(
        (found.vector, found.error, found.rip, found.cs, found.rsp),
        (vector, error, rip, u64::from(selector), STACK),
        "vector, error code, RIP, CS, RSP in ring {ring}"
    );
    Ok(())
}

pub(super) fn divide_error(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.xor(ecx, ecx)?;
            a.div(ecx)?;
            a.mov(dword_ptr(DATA), 1)?;
            a.stop_for_good()
        })?;
        let fault = guest.run_to_fault()?;
        check(&fault, ring, 0, 0, CODE + 2)?;
        // The handler returns behind the division.
        guest.resume_at(CODE + 4);
        guest.run()?;
        same!(guest.ram.read_u32(DATA), 1, "what follows the division");
    }
    Ok(())
}

pub(super) fn undefined_opcode(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.nop()?;
            a.ud2()
        })?;
        check(&guest.run_to_fault()?, ring, 6, 0, CODE + 1)?;
    }
    Ok(())
}

pub(super) fn general_protection(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        // A selector beyond the GDT: the error code is the selector.
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(eax, 0xff8)?;
            a.mov(ds, eax)
        })?;
        check(&guest.run_to_fault()?, ring, 13, 0xff8, CODE + 5)?;
        // A non-canonical address: the error code is 0.
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(rax, 0x8000_0000_0000_0000u64)?;
            a.mov(cl, byte_ptr(rax))
        })?;
        check(&guest.run_to_fault()?, ring, 13, 0, CODE + 10)?;
    }
    // Privileged instructions in ring 3.
    let mut guest = Guest::user(hypervisor, &|a| a.hlt())?;
    check(&guest.run_to_fault()?, 3, 13, 0, CODE)?;
    let mut guest = Guest::user(hypervisor, &|a| a.mov(cr3, rax))?;
    check(&guest.run_to_fault()?, 3, 13, 0, CODE)
}

pub(super) fn page_faults(hypervisor: &dyn Hypervisor) -> Outcome {
    const NOWHERE: u64 = 0x4000_1234;
    for ring in [0, 3] {
        let user = if ring == 3 { 4 } else { 0 };
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, NOWHERE as u32)?;
            a.mov(eax, dword_ptr(rdi))?;
            a.mov(dword_ptr(rdi), eax)?;
            a.mov(dword_ptr(DATA), 1)?;
            a.stop_for_good()
        })?;
        let fault = guest.run_to_fault()?;
        check(&fault, ring, 14, user, CODE + 5)?;
        same!(fault.cr2, NOWHERE, "CR2 of a read");
        guest.resume_at(CODE + 7);
        let fault = guest.run_to_fault()?;
        check(&fault, ring, 14, 2 | user, CODE + 7)?;
        same!(fault.cr2, NOWHERE, "CR2 of a write");
        guest.resume_at(CODE + 9);
        guest.run()?;
        same!(guest.ram.read_u32(DATA), 1, "what follows in ring {ring}");
        // Code that is not there.
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, NOWHERE as u32)?;
            a.jmp(rdi)
        })?;
        let fault = guest.run_to_fault()?;
        // Bit 4, an instruction fetch, is only told with no-execute pages or SMEP on.
        check(&fault, ring, 14, user, NOWHERE)?;
        same!(fault.cr2, NOWHERE, "CR2 of a fetch");
    }
    Ok(())
}

/// A page fault of an access that the hypervisor may have to do on its own, since the other operand is a device.
pub(super) fn page_fault_beside_a_device(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edi, MMIO as u32)?;
        a.mov(esp, 0x4000_1000)?;
        a.push(qword_ptr(rdi))
    })?;
    let fault = guest.run_to_fault()?;
    same!(
        (fault.vector, fault.error, fault.cr2),
        (14, 6, 0x4000_0ff8),
        "the fault of a push"
    );
    same!(
        (fault.rip, fault.rsp),
        (CODE + 10, 0x4000_1000),
        "RIP and RSP are as before the instruction"
    );
    Ok(())
}

/// In ring 3: a hypervisor that interprets ring 0 need not know INT3 there.
pub(super) fn breakpoint_instruction(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.nop()?;
        a.int3()?;
        a.mov(dword_ptr(DATA), 1)?;
        a.stop_for_good()
    })?;
    // A trap: RIP is behind the instruction, and the handler returns there.
    check(&guest.run_to_fault()?, 3, 3, 0, CODE + 2)?;
    guest.run()?;
    same!(guest.ram.read_u32(DATA), 1, "what follows");
    Ok(())
}

pub(super) fn in_real_mode(hypervisor: &dyn Hypervisor) -> Outcome {
    let handler = 0x1_3000u64;
    let mut guest = Guest::real(hypervisor, &|a| {
        a.xor(cx, cx)?;
        a.div(cx)?;
        a.stop_for_good()
    })?;
    guest.ram.write(0, &[0x00, 0x30, 0x00, 0x10]);
    guest.place(16, handler, &|a| {
        a.pop(ax)?;
        a.mov(word_ptr(DATA), ax)?;
        a.add(ax, 2)?;
        a.push(ax)?;
        a.iret()
    })?;
    guest.run()?;
    same!(
        u64::from(guest.ram.read_u32(DATA)),
        CODE + 2,
        "the saved IP"
    );
    Ok(())
}

/// An exception that was on its way when the state was saved is delivered after the restore.
pub(super) fn pending_in_a_restored_state(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| a.stop_for_good())?;
        guest.change(|state| {
            state.special.cr2 = 0x4321_0000;
            state.events.exception = Some(PendingException {
                vector: 14,
                error_code: Some(2),
                payload: None,
                injected: true,
            });
        })?;
        let fault = guest.run_to_fault()?;
        check(&fault, ring, 14, 2, CODE)?;
        same!(fault.cr2, 0x4321_0000, "CR2");
    }
    Ok(())
}

/// A port that the TSS's bitmap denies.
pub(super) fn denied_ports(hypervisor: &dyn Hypervisor) -> Outcome {
    const PORT: u16 = 0x610;
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edx, u32::from(PORT))?;
        a.in_(al, dx)?;
        a.stop_for_good()
    })?;
    guest.deny_port(PORT);
    guest.change(|state| state.general.rflags &= !IOPL_3)?;
    check(&guest.run_to_fault()?, 3, 13, 0, CODE + 5)?;
    same!(
        guest.bus.take(),
        [],
        "accesses to port {PORT:#x} (the stop port is {STOP_PORT:#x})"
    );
    Ok(())
}
