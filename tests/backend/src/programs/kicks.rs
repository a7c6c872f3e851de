//! No kick is lost, and none outlives its vCPU.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypervisor::{Hypervisor, VcpuExit};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::{DATA, Guest, Idioms as _};
use crate::outcome::{Outcome, ensure, fail, same};
use crate::watchdog;

fn count(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.inc(qword_ptr(DATA))?;
    a.jmp(again)
}

fn halt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.hlt()?;
    a.jmp(again)
}

pub(super) fn before_the_run(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &count)?;
        guest.bus.kick.kick();
        guest.bus.kick.kick();
        guest.run()?;
        same!(
            guest.ram.read_u64(DATA),
            0,
            "instructions that were executed in ring {ring}"
        );
    }
    Ok(())
}

/// Kicks a running guest again and again, at whatever moment; each kick must be answered.
fn every_kick_is_answered(mut guest: Guest, kicks: u64) -> Outcome {
    let answered = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let kick = guest.vcpu.kick_handle();
    let (ran, lost) = std::thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            for n in 0..kicks {
                let before = answered.load(Ordering::SeqCst);
                if n == kicks - 1 {
                    done.store(true, Ordering::SeqCst);
                }
                kick.kick();
                // Shorter than the watchdog's; a lost kick would wait for ever.
                let patience = Instant::now() + Duration::from_secs(8);
                while answered.load(Ordering::SeqCst) == before {
                    if Instant::now() > patience {
                        done.store(true, Ordering::SeqCst);
                        kick.kick();
                        return true;
                    }
                    std::thread::yield_now();
                }
            }
            false
        });
        let mut run = || -> Outcome {
            loop {
                let exit = watchdog::run(&mut *guest.vcpu, &guest.bus)?;
                ensure!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
                answered.fetch_add(1, Ordering::SeqCst);
                if done.load(Ordering::SeqCst) {
                    return Ok(());
                }
            }
        };
        let ran = run();
        done.store(true, Ordering::SeqCst);
        // The kicker may still wait for an answer to a kick after the one that ended the loop.
        while !kicker.is_finished() {
            answered.fetch_add(1, Ordering::SeqCst);
            std::thread::yield_now();
        }
        (ran, kicker.join())
    });
    ran?;
    ensure!(matches!(lost, Ok(false)), "a kick was lost");
    Ok(())
}

pub(super) fn a_spinning_guest(hypervisor: &dyn Hypervisor) -> Outcome {
    every_kick_is_answered(Guest::long(hypervisor, &count)?, 1_000)
}

pub(super) fn a_guest_spinning_in_ring_3(hypervisor: &dyn Hypervisor) -> Outcome {
    every_kick_is_answered(Guest::user(hypervisor, &count)?, 1_000)
}

pub(super) fn a_halted_guest(hypervisor: &dyn Hypervisor) -> Outcome {
    every_kick_is_answered(Guest::real(hypervisor, &halt)?, 1_000)
}

pub(super) fn a_vcpu_that_waits_for_its_start(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::new(hypervisor)?;
    guest.vcpu = guest.vm.create_vcpu(1)?;
    every_kick_is_answered(guest, 500)
}

pub(super) fn after_the_vcpu_has_gone(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::real(hypervisor, &|a| a.spin())?;
    let kick = guest.vcpu.kick_handle();
    drop(guest);
    kick.kick();
    Ok(())
}

pub(super) fn from_thread_to_thread(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &count)?;
    for round in 0..3 {
        let kick = guest.vcpu.kick_handle();
        let before = guest.ram.read_u64(DATA);
        let exit = std::thread::scope(|scope| {
            let (vcpu, bus, ram) = (&mut guest.vcpu, &guest.bus, &guest.ram);
            let runner = scope.spawn(move || watchdog::run(&mut **vcpu, bus));
            while ram.read_u64(DATA) == before && !runner.is_finished() {
                std::thread::yield_now();
            }
            kick.kick();
            runner
                .join()
                .unwrap_or_else(|_| fail("the vCPU's thread panicked"))
        })?;
        ensure!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
        ensure!(
            guest.ram.read_u64(DATA) > before,
            "nothing was executed in round {round}"
        );
    }
    Ok(())
}
