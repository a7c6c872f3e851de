//! A watchdog that a guest drives by ACPI's WDAT, for which stock kernels have a driver: whoever does not pet it is reset.
//!
//! ```text
//!                    control: 1 (start) ┌──── pet, control: 1 ────┐
//!   stopped ──────────────────────────► running ◄─────────────────┘
//!      ▲  ▲ ────── control: 0 (stop) ─────┘ │  ▲
//!      │                                    │  └─ resume, restored ─ stands still, with the time that is left ◄─ pause, saved
//!      └── WatchdogSink::bites ◄── time is over
//! ```
//!
//! Registers, 32 bits each: 0 control (bit 0: it runs), 4 countdown in periods, 8 what is left of it (a write pets), 12 status (bit 0: the
//! machine was reset by it; writing the bit clears it). All other accesses read as zeros and do nothing.
//!
//! Promises: it bites once, and stands then; after [`Watchdog::pause`] has returned it does not bite; whatever is written, no countdown is
//! shorter than the shortest or longer than the longest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bus::BusDevice;
use crate::state::saved::WatchdogState;
use crate::state::{self, Persist, SavedState, StateError};

/// Number of ports.
pub const WATCHDOG_PORTS: u64 = 16;

const CONTROL: u64 = 0;
const COUNTDOWN: u64 = 4;
const CURRENT: u64 = 8;
const STATUS: u64 = 12;
/// Control: it runs.
const RUNNING: u32 = 1;
/// Status: it has reset the machine.
const BITTEN: u32 = 1;

/// Resets the machine. Called on the watchdog's thread; must not wait for the watchdog.
pub trait WatchdogSink: Send + Sync {
    /// The guest has not petted it in time.
    fn bites(&self);
}

/// Its measures, as the WDAT has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchdogConfig {
    /// Length of a count.
    pub period: Duration,
    /// Fewest counts of a countdown; at least 1.
    pub shortest: u32,
    /// Most.
    pub longest: u32,
}

#[derive(Debug)]
struct Inner {
    running: bool,
    /// Counts that a countdown begins with.
    countdown: u32,
    /// Time that was left at `since`.
    left: Duration,
    /// When the clock was set going; none while it stands.
    since: Option<Instant>,
    paused: bool,
    bitten: bool,
    resets: u64,
    ended: bool,
}

impl Inner {
    fn left(&self, now: Instant) -> Duration {
        let gone = self
            .since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.left.saturating_sub(gone)
    }

    /// Gives it so much time from now on.
    fn set(&mut self, left: Duration, now: Instant) {
        self.left = left;
        self.since = (self.running && !self.paused).then_some(now);
    }

    /// Takes account of a change of `running` or `paused`.
    fn settle(&mut self, now: Instant) {
        self.set(self.left(now), now);
    }
}

struct Shared {
    config: WatchdogConfig,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self, inner: &Inner) -> Duration {
        self.config.period.saturating_mul(inner.countdown)
    }

    /// Bites when the time is over, until the end.
    fn watch(&self, sink: &dyn WatchdogSink) {
        let mut inner = self.lock();
        while !inner.ended {
            let now = Instant::now();
            if inner.since.is_none() {
                inner = self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = inner.left(now);
            if left.is_zero() {
                inner.running = false;
                inner.settle(now);
                // With the lock: who has paused it knows whether it has bitten.
                sink.bites();
                continue;
            }
            (inner, _) = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The device. It covers [`WATCHDOG_PORTS`] ports. It is paused until [`Watchdog::resume`].
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// One that stands, with the longest countdown.
    pub fn new(config: WatchdogConfig, sink: Arc<dyn WatchdogSink>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            config,
            inner: Mutex::new(Inner {
                running: false,
                countdown: config.longest,
                left: Duration::ZERO,
                since: None,
                paused: true,
                bitten: false,
                resets: 0,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || watched.watch(&*sink))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Its clock stands; on return it does not bite.
    pub fn pause(&self) {
        self.set_paused(true);
    }

    /// Its clock goes on.
    pub fn resume(&self) {
        self.set_paused(false);
    }

    fn set_paused(&self, paused: bool) {
        let mut inner = self.shared.lock();
        let now = Instant::now();
        let left = inner.left(now);
        inner.paused = paused;
        inner.set(left, now);
        self.shared.changed.notify_all();
    }

    /// What was before this machine's reset: how often its watchdog has reset it, and whether it did so just now, which the guest can read.
    pub fn was_reset(&self, resets: u64, by_watchdog: bool) {
        let mut inner = self.shared.lock();
        inner.resets = resets;
        inner.bitten = by_watchdog;
    }

    /// How often it has reset the machine.
    pub fn resets(&self) -> u64 {
        self.shared.lock().resets
    }

    /// Counters, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let inner = self.shared.lock();
        let left = inner.left(Instant::now()).as_millis();
        vec![
            ("resets", inner.resets),
            ("running", u64::from(inner.running)),
            ("left_ms", u64::try_from(left).unwrap_or(u64::MAX)),
        ]
    }

    fn read_register(&self, at: u64) -> u32 {
        let inner = self.shared.lock();
        match at {
            CONTROL => u32::from(inner.running) * RUNNING,
            COUNTDOWN => inner.countdown,
            CURRENT => {
                let period = self.shared.config.period.as_nanos().max(1);
                let counts = inner.left(Instant::now()).as_nanos().div_ceil(period);
                u32::try_from(counts).unwrap_or(u32::MAX)
            }
            STATUS => u32::from(inner.bitten) * BITTEN,
            _ => 0,
        }
    }

    fn write_register(&self, at: u64, value: u32) {
        let config = &self.shared.config;
        let mut inner = self.shared.lock();
        let now = Instant::now();
        match at {
            CONTROL => {
                inner.running = value & RUNNING != 0;
                let full = self.shared.full(&inner);
                inner.set(full, now);
            }
            COUNTDOWN => inner.countdown = value.clamp(config.shortest, config.longest),
            CURRENT => {
                let full = self.shared.full(&inner);
                inner.set(full, now);
            }
            STATUS if value & BITTEN != 0 => inner.bitten = false,
            _ => {}
        }
        self.shared.changed.notify_all();
    }
}

impl BusDevice for Watchdog {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

impl Persist for Watchdog {
    fn kind(&self) -> &'static str {
        "watchdog"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        let inner = self.shared.lock();
        let left = inner.left(Instant::now()).as_nanos();
        state::encode(
            self,
            &WatchdogState {
                running: inner.running,
                countdown: inner.countdown,
                left_ns: u64::try_from(left).unwrap_or(u64::MAX),
                bitten: inner.bitten,
                resets: inner.resets,
            },
        )
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: WatchdogState = state::decode(self, state)?;
        let config = &self.shared.config;
        let wrong = |field, reason| StateError::OutOfRange {
            kind: self.kind(),
            field,
            reason,
        };
        if !(config.shortest..=config.longest).contains(&saved.countdown) {
            return Err(wrong("countdown", format!("{} counts", saved.countdown)));
        }
        let left = Duration::from_nanos(saved.left_ns);
        if left > config.period.saturating_mul(config.longest) {
            return Err(wrong("left_ns", format!("{left:?} is too long")));
        }
        let mut inner = self.shared.lock();
        inner.running = saved.running;
        inner.countdown = saved.countdown;
        inner.bitten = saved.bitten;
        inner.resets = saved.resets;
        inner.set(left, Instant::now());
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog's thread panicked: a bug in vmm");
        }
    }
}

#[cfg(test)]
mod tests;
