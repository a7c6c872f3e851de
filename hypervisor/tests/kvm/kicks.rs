//! No kick is lost, and none outlives its vCPU.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypervisor::VcpuExit;

use crate::guest::{DATA, Guest, SPIN, kvm};

/// inc qword [0x2000]; jmp back
const COUNT64: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0x00, 0x20, 0, 0, 0xeb, 0xf6];

#[test]
fn a_kick_before_the_run_counts_for_it() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&*kvm, &COUNT64);
    guest.bus.kick.kick();
    guest.bus.kick.kick();
    guest.run();
    assert_eq!(guest.ram.read_u64(DATA), 0, "no instruction was executed");
}

/// Kicks a running guest again and again, at whatever moment; each kick must be answered.
fn every_kick_is_answered(mut guest: Guest, kicks: u64) {
    let answered = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let kick = guest.vcpu.kick_handle();
    let lost = std::thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            let mut lost = 0;
            for n in 0..kicks {
                let before = answered.load(Ordering::SeqCst);
                if n == kicks - 1 {
                    done.store(true, Ordering::SeqCst);
                }
                kick.kick();
                // Long enough for the busiest machine; a lost kick would wait for ever.
                let patience = Instant::now() + Duration::from_secs(20);
                while answered.load(Ordering::SeqCst) == before {
                    if Instant::now() > patience {
                        lost += 1;
                        done.store(true, Ordering::SeqCst);
                        kick.kick();
                        return lost;
                    }
                    std::thread::yield_now();
                }
            }
            lost
        });
        loop {
            let exit = guest.vcpu.run(&guest.bus).expect("run");
            assert!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
            answered.fetch_add(1, Ordering::SeqCst);
            if done.load(Ordering::SeqCst) {
                break;
            }
        }
        // The kicker may still wait for an answer to a kick after the one that ended the loop.
        answered.fetch_add(1, Ordering::SeqCst);
        kicker.join().expect("kicker")
    });
    assert_eq!(lost, 0);
}

#[test]
fn a_spinning_guest_answers_every_kick() {
    let Some(kvm) = kvm() else { return };
    every_kick_is_answered(Guest::long_mode(&*kvm, &COUNT64), 2_000);
}

#[test]
fn a_guest_spinning_in_ring_3_answers_every_kick() {
    let Some(kvm) = kvm() else { return };
    every_kick_is_answered(Guest::user_mode(&*kvm, &COUNT64), 2_000);
}

#[test]
fn a_halted_guest_answers_every_kick() {
    let Some(kvm) = kvm() else { return };
    every_kick_is_answered(Guest::real_mode(&*kvm, &[0xf4, 0xeb, 0xfd]), 1_000);
}

#[test]
fn a_vcpu_that_waits_for_its_start_up_answers_every_kick() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&*kvm);
    guest.vcpu = guest.vm.create_vcpu(1).expect("create vCPU 1");
    every_kick_is_answered(guest, 500);
}

#[test]
fn a_kick_after_the_vcpu_has_gone_is_harmless() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::real_mode(&*kvm, &SPIN);
    let kick = guest.vcpu.kick_handle();
    drop(guest);
    kick.kick();
}

#[test]
fn a_vcpu_may_move_between_threads() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::user_mode(&*kvm, &COUNT64);
    for _ in 0..3 {
        let kick = guest.vcpu.kick_handle();
        let before = guest.ram.read_u64(DATA);
        std::thread::scope(|scope| {
            let (vcpu, bus, ram) = (&mut guest.vcpu, &guest.bus, &guest.ram);
            let runner = scope.spawn(move || vcpu.run(bus).expect("run"));
            while ram.read_u64(DATA) == before && !runner.is_finished() {
                std::thread::yield_now();
            }
            kick.kick();
            assert!(matches!(
                runner.join().expect("runner"),
                VcpuExit::Interrupted
            ));
        });
        assert!(guest.ram.read_u64(DATA) > before);
    }
}
