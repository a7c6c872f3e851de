//! Guests that cannot go on.

use hypervisor::{Hypervisor, VcpuExit};
use iced_x86::code_asm::*;

use crate::guest::{Guest, MMIO};
use crate::outcome::{Outcome, ensure, fail, same};

pub(super) fn triple_fault(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| a.ud2())?;
        // No handler for the exception, nor for the failure to deliver it.
        guest.change(|state| state.special.idt.limit = 0)?;
        let exit = guest.exit()?;
        ensure!(
            matches!(exit, VcpuExit::Reset { triple_fault: true }),
            "in ring {ring}: {exit:?}"
        );
    }
    Ok(())
}

/// A device is no place to execute from: a fault with all that is known, an exception in the guest, or a triple fault.
pub(super) fn code_that_is_not_there(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(eax, MMIO as u32)?;
            a.jmp(rax)
        })?;
        match guest.exit()? {
            VcpuExit::Fault(details) => {
                ensure!(!details.reason.is_empty(), "no reason is given: {details}");
                same!(
                    details.registers.map(|registers| registers.rip),
                    Some(MMIO),
                    "RIP in ring {ring}"
                );
                ensure!(
                    details.special.is_some(),
                    "no special registers are given: {details}"
                );
                ensure!(
                    details.to_string().contains("rip="),
                    "the text lacks RIP: {details}"
                );
            }
            VcpuExit::Reset { triple_fault: true } => {}
            VcpuExit::Interrupted => {
                // KVM lets ring 3 have it as an undefined opcode.
                let fault = guest.fault()?;
                same!(fault.rip, MMIO, "RIP of {fault:x?} in ring {ring}");
            }
            other => return fail(format!("in ring {ring}: {other:?}")),
        }
    }
    Ok(())
}
