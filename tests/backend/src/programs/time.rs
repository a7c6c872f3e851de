//! The time-stamp counter, the deadline timer and the paravirtual clock.

use std::time::Duration;

use arch::x86_64::state::Activity;
use hypervisor::{Hypervisor, Vcpu, VcpuExit};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::is_offered;
use crate::guest::{APIC, CODE, DATA, Guest, Idioms as _};
use crate::outcome::{Outcome, ensure, same, skip};
use crate::watchdog;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
const DEADLINE: u32 = 0x6e0;
/// The bit of CPUID that offers it.
const DEADLINE_TIMER: (u32, u32) = (1, 1 << 24);

fn saved_tsc(vcpu: &dyn Vcpu) -> Outcome<u64> {
    let state = vcpu.save_state()?;
    let tsc = state.msrs.iter().find(|msr| msr.index == TSC);
    tsc.map(|msr| msr.value)
        .ok_or_else(|| crate::outcome::Stop::Fail("no TSC was saved".into()))
}

/// RDTSC, to memory; then stop; again and again.
fn reader(to: u64) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(qword_ptr(to), rax)?;
        a.stop()?;
        a.jmp(again)
    }
}

pub(super) fn the_counter_never_goes_back(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        // RBX counts readings that were not later than the one before.
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let (mut again, mut later) = (a.create_label(), a.create_label());
            a.xor(ebx, ebx)?;
            a.xor(esi, esi)?;
            a.mov(ecx, 1000)?;
            a.set_label(&mut again)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.cmp(rax, rsi)?;
            a.ja(later)?;
            a.inc(ebx)?;
            a.set_label(&mut later)?;
            a.mov(rsi, rax)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(qword_ptr(DATA), rbx)?;
            a.stop_for_good()
        })?;
        guest.run()?;
        same!(
            guest.ram.read_u64(DATA),
            0,
            "readings that were not later in ring {ring}"
        );
    }
    Ok(())
}

/// What a guest reads after a restore elsewhere is later than what it has read before.
pub(super) fn the_counter_goes_on_after_a_restore(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut first = Guest::in_ring(hypervisor, ring, &reader(DATA))?;
        // Longer than the second machine lives: its own count since it was created would be a step back.
        std::thread::sleep(Duration::from_millis(100));
        first.run()?;
        let before = first.ram.read_u64(DATA);
        let state = first.vcpu.save_state()?;
        drop(first);
        // A fresh machine, whose vCPU has never had another state.
        let mut second = Guest::new(hypervisor)?;
        second.place(64, CODE, &reader(DATA))?;
        second.vcpu.restore_state(&state)?;
        second.run()?;
        let after = second.ram.read_u64(DATA);
        ensure!(
            after > before,
            "in ring {ring} the TSC was {before} and then {after}"
        );
        // An hour at 4 GHz: a counter that was set anew from something else would be off by more.
        ensure!(
            after - before < 3600 * 4_000_000_000,
            "the TSC leapt from {before} to {after}"
        );
    }
    Ok(())
}

pub(super) fn two_counters_are_in_step(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &reader(DATA))?;
    let (mut second, bus) = guest.add_vcpu(hypervisor, 1)?;
    start_like(&mut *second, &*guest.vcpu)?;
    let mut last = 0;
    for round in 0..50 {
        guest.run()?;
        let now = guest.ram.read_u64(DATA);
        ensure!(
            now > last,
            "round {round}: vCPU 0 reads {now}, vCPU 1 has read {last}"
        );
        last = now;
        let exit = watchdog::run(&mut *second, &bus)?;
        ensure!(matches!(exit, VcpuExit::Interrupted), "vCPU 1: {exit:?}");
        let now = guest.ram.read_u64(DATA);
        ensure!(
            now > last,
            "round {round}: vCPU 1 reads {now}, vCPU 0 has read {last}"
        );
        last = now;
    }
    Ok(())
}

/// Makes a vCPU run from where another one is, with its own APIC.
fn start_like(vcpu: &mut dyn Vcpu, model: &dyn Vcpu) -> Outcome {
    let (model, mut state) = (model.save_state()?, vcpu.save_state()?);
    let apic_base = state.special.apic_base;
    (state.general, state.special, state.activity) =
        (model.general, model.special, Activity::Running);
    state.special.apic_base = apic_base;
    Ok(vcpu.restore_state(&state)?)
}

/// Both vCPUs of a machine, restored one after the other after a while, still read one time.
pub(super) fn two_counters_are_in_step_after_a_restore(hypervisor: &dyn Hypervisor) -> Outcome {
    let pair = || -> Outcome<_> {
        let first = Guest::long(hypervisor, &|a| a.hlt())?;
        let (second, _bus) = first.add_vcpu(hypervisor, 1)?;
        Ok((first, second))
    };
    let (a0, a1) = pair()?;
    let saved = [a0.vcpu.save_state()?, a1.save_state()?];
    // As a move would: some time passes.
    std::thread::sleep(Duration::from_millis(20));
    let (mut b0, mut b1) = pair()?;
    b0.vcpu.restore_state(&saved[0])?;
    b1.restore_state(&saved[1])?;
    for _ in 0..20 {
        let (first, second, third) = (
            saved_tsc(&*b0.vcpu)?,
            saved_tsc(&*b1)?,
            saved_tsc(&*b0.vcpu)?,
        );
        ensure!(
            first <= second && second <= third,
            "{first} {second} {third}"
        );
    }
    let before = saved[0]
        .msrs
        .iter()
        .find(|msr| msr.index == TSC)
        .map(|msr| msr.value);
    ensure!(
        Some(saved_tsc(&*b0.vcpu)?) > before,
        "the TSC went back from {before:?}"
    );
    Ok(())
}

/// The local APIC's timer in TSC-deadline mode (SDM vol. 3, section 11.5.4.1).
pub(super) fn the_deadline_timer_wakes(hypervisor: &dyn Hypervisor) -> Outcome {
    if !is_offered(hypervisor, DEADLINE_TIMER)? {
        return skip("this host offers no TSC deadline timer");
    }
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(edi, APIC as u32)?;
        a.mov(dword_ptr(rdi + 0x320), 2 << 17 | 0x46)?;
        a.rdtsc()?;
        a.add(eax, 2_000_000)?;
        a.adc(edx, 0)?;
        a.mov(dword_ptr(DATA), eax)?;
        a.mov(dword_ptr(DATA + 4), edx)?;
        a.mov(ecx, DEADLINE)?;
        a.wrmsr()?;
        a.sti()?;
        a.hlt()?;
        a.rdtsc()?;
        a.mov(dword_ptr(DATA + 8), eax)?;
        a.mov(dword_ptr(DATA + 12), edx)?;
        a.stop_for_good()
    })?;
    guest.enable_apic()?;
    guest.run()?;
    same!(guest.interrupts(0x46), 1, "timer interrupts");
    let [deadline, woken] = guest.ram.quads(DATA);
    ensure!(woken >= deadline, "it woke at {woken}, before {deadline}");
    Ok(())
}

pub(super) fn the_clock_goes_on_from_where_it_was_read(hypervisor: &dyn Hypervisor) -> Outcome {
    let (a, b) = (Guest::new(hypervisor)?, Guest::new(hypervisor)?);
    let mut clock = a.vm.clock()?;
    clock.guest_ns += 1_000_000_000_000;
    b.vm.set_clock(&clock)?;
    let there = b.vm.clock()?;
    ensure!(
        there.guest_ns >= clock.guest_ns,
        "{there:?} after {clock:?}"
    );
    if let Some(realtime) = &mut clock.host_realtime_ns {
        *realtime -= 500_000_000_000;
        b.vm.set_clock(&clock)?;
        let later = b.vm.clock()?;
        ensure!(
            later.guest_ns >= clock.guest_ns + 500_000_000_000,
            "the time in between does not count: {later:?} after {clock:?}"
        );
    }
    a.vcpu.notify_paused()?;
    Ok(())
}
