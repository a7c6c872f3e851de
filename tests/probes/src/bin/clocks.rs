//! Watches the clocks of a guest that moves: one thread on each processor looks at CLOCK_MONOTONIC and at the TSC, over and over.
//!
//! ```text
//!   thread, pinned to CPU 0 ─┐      ┌─► the latest that any thread has seen: nothing later may be less   ─► CLOCKS-BACK …, end
//!   thread, pinned to CPU 1 ─┼─ read┤
//!   …                        ┘      └─► what this thread saw before: the largest step in between          ─► FILE, once a second
//! ```
//!
//! `clocks FILE`. A step is what a process sees: the guest's scheduler and what stood still are in it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Readings in a row between two short sleeps, which leave the processor to others.
const BURST: u32 = 64;

/// The latest reading of all threads, and the largest step between two of one thread.
struct Clock {
    latest: AtomicU64,
    largest_step: AtomicU64,
}

impl Clock {
    /// Takes a reading; what any thread had seen before it began, if that is later.
    fn check(&self, previous: &mut u64, read: fn() -> u64) -> Result<(), (u64, u64)> {
        let seen = self.latest.load(Ordering::SeqCst);
        let now = read();
        if now < seen {
            return Err((seen, now));
        }
        self.latest.fetch_max(now, Ordering::SeqCst);
        if *previous != 0 {
            self.largest_step
                .fetch_max(now - *previous, Ordering::SeqCst);
        }
        *previous = now;
        Ok(())
    }
}

static MONOTONIC: Clock = Clock {
    latest: AtomicU64::new(0),
    largest_step: AtomicU64::new(0),
};
static TSC: Clock = Clock {
    latest: AtomicU64::new(0),
    largest_step: AtomicU64::new(0),
};
static READINGS: AtomicU64 = AtomicU64::new(0);

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec that the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

fn tsc() -> u64 {
    // SAFETY: fences have no operands. They keep the reading between the loads and stores around it, as the comparison between
    // processors needs.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        let now = std::arch::x86_64::_rdtsc();
        std::arch::x86_64::_mm_lfence();
        now
    }
}

fn watch(cpu: usize) {
    // SAFETY: an all-zero cpu_set_t is the empty set, and `cpu` is one of those that the kernel has.
    let pinned = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set) == 0
    };
    if !pinned {
        end(&format!("CLOCKS-BAD: no thread on CPU {cpu}"));
    }
    let (mut monotonic_before, mut tsc_before) = (0, 0);
    loop {
        for _ in 0..BURST {
            for (name, clock, before, read) in [
                (
                    "monotonic",
                    &MONOTONIC,
                    &mut monotonic_before,
                    monotonic_ns as fn() -> u64,
                ),
                ("tsc", &TSC, &mut tsc_before, tsc as fn() -> u64),
            ] {
                if let Err((seen, now)) = clock.check(before, read) {
                    end(&format!(
                        "CLOCKS-BACK: {name} on CPU {cpu} reads {now} after {seen}"
                    ));
                }
            }
            READINGS.fetch_add(1, Ordering::Relaxed);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn end(why: &str) -> ! {
    println!("{why}");
    std::process::exit(1)
}

fn main() -> ExitCode {
    let Some(file) = std::env::args().nth(1) else {
        eprintln!("usage: clocks FILE");
        return ExitCode::from(2);
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!("clocks: {cpus} CPUs");
    let (monotonic, ticks) = (monotonic_ns(), tsc());
    for cpu in 0..cpus {
        std::thread::spawn(move || watch(cpu));
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let khz = (tsc() - ticks) as f64 * 1e6 / (monotonic_ns() - monotonic) as f64;
        let step = MONOTONIC.largest_step.load(Ordering::SeqCst);
        let tsc_step = TSC.largest_step.load(Ordering::SeqCst) as f64 / khz;
        let line = format!(
            "clocks-ok {} readings on {cpus} CPUs, largest step {} ms, of the TSC {} ms, TSC {khz:.0} kHz\n",
            READINGS.load(Ordering::Relaxed),
            step / 1_000_000,
            tsc_step.round(),
        );
        if let Err(error) = probes::replace(file.as_ref(), &line) {
            eprintln!("clocks: {file}: {error}");
            return ExitCode::FAILURE;
        }
    }
}
