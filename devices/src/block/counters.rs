//! What a disk has done since it was made.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts over all queues. Operations count when they have succeeded, or as errors.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) write_zeroes: AtomicU64,
    pub(super) errors: AtomicU64,
    /// Requests that had to wait for the rate limiter; one that waits twice counts twice.
    pub(super) throttled: AtomicU64,
}

/// Adds to a counter; returns what it was.
pub(super) fn add(counter: &AtomicU64, more: u64) -> u64 {
    counter.fetch_add(more, Ordering::Relaxed)
}

impl Counters {
    pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
        [
            ("read_ops", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("write_ops", &self.writes),
            ("write_bytes", &self.write_bytes),
            ("flush_ops", &self.flushes),
            ("discard_ops", &self.discards),
            ("write_zeroes_ops", &self.write_zeroes),
            ("errors", &self.errors),
            ("throttled", &self.throttled),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}
