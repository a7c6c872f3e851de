//! More than one vCPU.

use std::sync::atomic::{AtomicBool, Ordering};

use arch::x86_64::fresh::FreshState;
use arch::x86_64::state::Activity;
use hypervisor::{Hypervisor, Vcpu, VcpuExit};
use iced_x86::code_asm::*;

use crate::guest::{APIC, Bus, DATA, Guest, Idioms as _};
use crate::outcome::{Outcome, ensure, fail, same};
use crate::watchdog;

/// Where the second vCPU starts: the page number that a start-up IPI carries.
const START_UP: u64 = 0x13_000;

/// Runs `work` while another thread runs the second vCPU, which is kicked at the end.
pub(super) fn beside<T>(
    vcpu: &mut dyn Vcpu,
    bus: &Bus,
    work: impl FnOnce() -> Outcome<T>,
) -> Outcome<T> {
    let done = AtomicBool::new(false);
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let exit = watchdog::run(vcpu, bus)?;
                ensure!(
                    matches!(exit, VcpuExit::Interrupted | VcpuExit::Halt),
                    "the second vCPU: {exit:?}"
                );
            }
            Ok(())
        });
        let worked = work();
        done.store(true, Ordering::SeqCst);
        kick.kick();
        let ran = runner
            .join()
            .unwrap_or_else(|_| fail("the second vCPU's thread panicked"));
        // What went wrong there is why nothing came of it here.
        ran.and(worked)
    })
}

pub(super) fn after_reset_one_waits_and_one_runs(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::new(hypervisor)?;
    let boot = guest.vcpu.save_state()?;
    same!((boot.id, boot.activity), (0, Activity::Running), "vCPU 0");
    same!(
        (boot.general.rip, boot.special.cs.base),
        (0xfff0, 0xffff_0000),
        "the reset vector"
    );
    let (second, _bus) = guest.add_vcpu(hypervisor, 1)?;
    let state = second.save_state()?;
    same!(state.id, 1, "the id");
    ensure!(
        matches!(
            state.activity,
            Activity::Uninitialized | Activity::WaitForSipi
        ),
        "vCPU 1 is {:?}",
        state.activity
    );
    ensure!(state.nested.is_none(), "it has nested state");
    Ok(())
}

/// INIT and start-up IPI, as firmware brings up a second processor (SDM vol. 3, section 9.4.4).
pub(super) fn start_up_by_ipi(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        let mut wait = a.create_label();
        a.mov(edi, APIC as u32)?;
        // Firmware switches its own local APIC on first. (KVM learns of a new vCPU's only with the next change of any.)
        a.mov(dword_ptr(rdi + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rdi + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rdi + 0x300), 0x4500)?;
        a.mov(dword_ptr(rdi + 0x300), (0x4600 | START_UP >> 12) as i32)?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA), 0)?;
        a.je(wait)?;
        a.stop_for_good()
    })?;
    // In real mode, at an offset of 0 in its segment.
    guest.place(16, START_UP, &|a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(word_ptr(DATA + 4), cs)?;
        a.mov(dword_ptr(DATA), 1)?;
        a.spin()
    })?;
    let (mut second, bus) = guest.add_vcpu(hypervisor, 1)?;
    beside(&mut *second, &bus, || guest.run())?;
    same!(
        guest.ram.read(DATA + 4),
        [0x00, 0x13],
        "CS of the second vCPU"
    );
    let state = second.save_state()?;
    same!(state.activity, Activity::Running, "its activity");
    same!(state.special.cs.base, START_UP, "its code segment's base");
    same!(state.special.cr0 & 1, 0, "protected mode");
    Ok(())
}

/// A processor that has run, with its local APIC in x2APIC mode, is put back into its state after reset and started again.
pub(super) fn one_that_is_reset_starts_again(hypervisor: &dyn Hypervisor) -> Outcome {
    const APIC_BASE: u32 = 0x1b;
    let mut guest = Guest::long(hypervisor, &|a| {
        let mut wait = a.create_label();
        a.mov(edi, APIC as u32)?;
        a.mov(dword_ptr(rdi + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rdi + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rdi + 0x300), 0x4500)?;
        a.mov(dword_ptr(rdi + 0x300), (0x4600 | START_UP >> 12) as i32)?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA), 0)?;
        a.je(wait)?;
        a.stop_for_good()
    })?;
    guest.place(16, START_UP, &|a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(ecx, APIC_BASE)?;
        a.rdmsr()?;
        a.or(eax, 0xc00)?;
        a.wrmsr()?;
        a.mov(dword_ptr(DATA), 1)?;
        a.spin()
    })?;
    let first = guest.vcpu.save_state()?;
    let (mut second, bus) = guest.add_vcpu(hypervisor, 1)?;
    let fresh = FreshState::new(second.save_state()?).of(1);
    for round in 0..3 {
        guest.ram.write_u64(DATA, 0);
        beside(&mut *second, &bus, || guest.run())?;
        let state = second.save_state()?;
        same!(state.special.apic_base & 0xc00, 0xc00, "x2APIC mode");
        second.restore_state(&fresh)?;
        let after = second.save_state()?;
        ensure!(
            matches!(
                after.activity,
                Activity::Uninitialized | Activity::WaitForSipi
            ),
            "in round {round} it is {:?} after a reset",
            after.activity
        );
        guest.vcpu.restore_state(&first)?;
    }
    Ok(())
}

/// The two answer each other's interrupts.
pub(super) fn interrupts_between_two(hypervisor: &dyn Hypervisor) -> Outcome {
    const ROUNDS: i32 = 100;
    // Both do the same: wait for an interrupt, whose handler counts, then send one to the other.
    let code = |other: i32, first: bool| {
        move |a: &mut CodeAssembler| {
            let (mut again, mut wait) = (a.create_label(), a.create_label());
            a.mov(edi, APIC as u32)?;
            a.xor(ebx, ebx)?;
            a.sti()?;
            a.set_label(&mut again)?;
            if first {
                a.mov(dword_ptr(rdi + 0x310), other << 24)?;
                a.mov(dword_ptr(rdi + 0x300), 0x4000 | 0x48)?;
            }
            a.inc(ebx)?;
            let mine = DATA + if first { 0 } else { 8 };
            a.set_label(&mut wait)?;
            a.cmp(dword_ptr(mine), ebx)?;
            a.jb(wait)?;
            if !first {
                a.mov(dword_ptr(rdi + 0x310), other << 24)?;
                a.mov(dword_ptr(rdi + 0x300), 0x4000 | 0x49)?;
            }
            a.cmp(ebx, ROUNDS)?;
            a.jb(again)?;
            if first { a.stop_for_good() } else { a.spin() }
        }
    };
    let mut guest = Guest::long(hypervisor, &code(1, true))?;
    guest.place(64, START_UP, &code(0, false))?;
    // Vector 0x48 arrives at vCPU 1, 0x49 at vCPU 0.
    for (vector, counter, at) in [(0x48, DATA + 8, 0x1_4000u64), (0x49, DATA, 0x1_4100)] {
        guest.place(64, at, &|a| {
            a.inc(qword_ptr(counter))?;
            a.push(rax)?;
            a.mov(eax, APIC as u32 + 0xb0)?;
            a.mov(dword_ptr(rax), 0)?;
            a.pop(rax)?;
            a.iretq()
        })?;
        guest.handle(vector, at);
    }
    guest.enable_apic()?;
    let (mut second, bus) = guest.add_vcpu(hypervisor, 1)?;
    // It begins where vCPU 0 is, but for what tells them apart.
    let (model, mut state) = (guest.vcpu.save_state()?, second.save_state()?);
    (state.special, state.general) = (
        arch::x86_64::state::SpecialRegisters {
            apic_base: state.special.apic_base,
            ..model.special
        },
        model.general,
    );
    (state.general.rip, state.general.rsp) = (START_UP, 0x1_6000);
    state.activity = Activity::Running;
    if let Some(lapic) = &mut state.lapic {
        lapic.registers.0[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
    }
    second.restore_state(&state)?;
    beside(&mut *second, &bus, || guest.run())?;
    same!(
        guest.ram.quads(DATA),
        [ROUNDS as u64; 2],
        "interrupts at each"
    );
    Ok(())
}
