//! Time in nanoseconds: the KVM clock where there is one, else the TSC.
//!
//! Without a KVM clock the TSC's frequency is measured once against the local APIC timer, which
//! counts at 1 GHz under KVM and under QEMU's emulator.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering, fence};

use super::percpu::{PerCpu, PvClock};
use super::service::{self, lapic};

/// TSC ticks per second, when the TSC is the clock.
static TSC_HZ: AtomicU64 = AtomicU64::new(0);

/// The time stamp counter, not read ahead of what stands before.
pub fn tsc() -> u64 {
    // SAFETY: both instructions are in every x86_64 CPU and touch no memory.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

fn pv_now(clock: &PvClock) -> u64 {
    loop {
        let version = clock.version.load(Ordering::Acquire);
        let base_tsc = clock.tsc_timestamp.load(Ordering::Relaxed);
        let base_ns = clock.system_time.load(Ordering::Relaxed);
        let scale = clock.tsc_to_system_mul.load(Ordering::Relaxed);
        let shift = clock.shift_and_flags.load(Ordering::Relaxed) as i8;
        let now = tsc();
        fence(Ordering::Acquire);
        if version & 1 == 0 && version == clock.version.load(Ordering::Relaxed) {
            // A TSC behind its base would be a step back that must show, not wrap to centuries.
            let (delta, back) = match now.checked_sub(base_tsc) {
                Some(delta) => (delta, false),
                None => (base_tsc - now, true),
            };
            let delta = if shift >= 0 {
                delta << shift
            } else {
                delta >> -shift
            };
            let ns = ((u128::from(delta) * u128::from(scale)) >> 32) as u64;
            return if back {
                base_ns.saturating_sub(ns)
            } else {
                base_ns.wrapping_add(ns)
            };
        }
        core::hint::spin_loop();
    }
}

/// Measures the TSC when CPU 0 has no KVM clock; called once, before the timer is used otherwise.
pub fn calibrate() {
    if PerCpu::of(0).has_clock != 0 {
        return;
    }
    const SAMPLE_NS: u64 = 20_000_000;
    lapic_one_shot(u32::MAX);
    let (tsc_before, count_before) = (tsc(), service::lapic_read(lapic::CURRENT_COUNT));
    let count_after = loop {
        let count = service::lapic_read(lapic::CURRENT_COUNT);
        if count_before.wrapping_sub(count) >= SAMPLE_NS {
            break count;
        }
    };
    let tsc_after = tsc();
    lapic_one_shot(0);
    let ns = (count_before - count_after).max(1);
    let hz = u128::from(tsc_after - tsc_before) * 1_000_000_000 / u128::from(ns);
    TSC_HZ.store((hz as u64).max(1), Ordering::Relaxed);
}

fn lapic_one_shot(count: u32) {
    service::lapic_write(lapic::DIVIDE, 0b1011);
    // Masked: only its count matters.
    service::lapic_write(lapic::LVT_TIMER, lapic::TIMER_VECTOR | (1 << 16));
    service::lapic_write(lapic::INITIAL_COUNT, count);
}

/// Whether CPU `index` has a KVM clock.
pub fn is_paravirtual(index: usize) -> bool {
    PerCpu::of(index).has_clock != 0
}

/// Whether the KVM clock says that it is monotonic across CPUs (PVCLOCK_TSC_STABLE_BIT).
pub fn is_stable() -> bool {
    is_paravirtual(0) && PerCpu::of(0).clock.shift_and_flags.load(Ordering::Relaxed) & 0x100 != 0
}

/// Nanoseconds since some fixed moment before the program's start, as seen by CPU `index` (the
/// caller's own).
pub fn now_ns(index: usize) -> u64 {
    let cpu = PerCpu::of(index);
    if cpu.has_clock != 0 {
        return pv_now(&cpu.clock);
    }
    let hz = TSC_HZ.load(Ordering::Relaxed).max(1);
    (u128::from(tsc()) * 1_000_000_000 / u128::from(hz)) as u64
}
