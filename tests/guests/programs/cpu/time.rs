//! Time must not step back: on each vCPU, and from one vCPU to the next.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::rt::clock;

/// The latest reading by any vCPU.
struct Latest {
    busy: AtomicBool,
    readings: UnsafeCell<Readings>,
}

// SAFETY: `readings` is used by who holds `busy` only.
unsafe impl Sync for Latest {}

/// One reading of both clocks.
#[derive(Clone, Copy)]
pub struct Readings {
    /// RDTSC.
    pub tsc: u64,
    /// The guest's clock (KVM clock where there is one).
    pub ns: u64,
}

impl Readings {
    /// Before all time.
    pub const ZERO: Readings = Readings { tsc: 0, ns: 0 };

    /// Reads both clocks on vCPU `cpu`.
    pub fn now(cpu: usize) -> Readings {
        Readings {
            tsc: clock::tsc(),
            ns: clock::now_ns(cpu),
        }
    }

    /// Takes `now` as the latest; (TSC, clock) stepped back against what was.
    pub fn advance(&mut self, now: Readings) -> (bool, bool) {
        let back = (now.tsc < self.tsc, now.ns < self.ns);
        *self = now;
        back
    }
}

static LATEST: Latest = Latest {
    busy: AtomicBool::new(false),
    readings: UnsafeCell::new(Readings::ZERO),
};

/// Reads both clocks one after the other with all vCPUs; says what stepped back between vCPUs.
pub fn advance_together(cpu: usize) -> (bool, bool) {
    while LATEST.busy.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let now = Readings::now(cpu);
    // SAFETY: `busy` is held.
    let back = unsafe { (*LATEST.readings.get()).advance(now) };
    LATEST.busy.store(false, Ordering::Release);
    back
}
