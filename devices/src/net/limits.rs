//! How much goes each way, all queue pairs together. What may not go yet waits in the queue or in the host; nothing is dropped for it here.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::rate_limiter::{RateLimiter, RateLimiterConfig};

/// A clock that cannot hold a time: look again in a while.
const A_WHILE: Duration = Duration::from_secs(60);

/// A limit of one direction, if there is one.
#[derive(Debug, Default)]
pub(super) struct Limit(Option<Mutex<RateLimiter>>);

impl Limit {
    /// Takes a packet of so many bytes, or says when to ask again.
    pub(super) fn take(&self, bytes: u64) -> Result<(), Instant> {
        self.ask(|limiter, now| limiter.try_take(bytes, now))
    }

    /// Whether a packet of unknown length may be taken, or when to ask again.
    pub(super) fn may_begin(&self) -> Result<(), Instant> {
        self.ask(RateLimiter::may_begin)
    }

    /// Takes a packet that has gone already.
    pub(super) fn charge(&self, bytes: u64) {
        if let Some(limiter) = &self.0 {
            let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
            limiter.charge(bytes);
        }
    }

    fn ask(
        &self,
        ask: impl FnOnce(&mut RateLimiter, Instant) -> Result<(), Duration>,
    ) -> Result<(), Instant> {
        let Some(limiter) = &self.0 else {
            return Ok(());
        };
        let now = Instant::now();
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&mut limiter, now).map_err(|wait| now.checked_add(wait).unwrap_or(now + A_WHILE))
    }
}

/// Both directions, as the guest sees them.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) rx: Limit,
    pub(super) tx: Limit,
}

impl Limits {
    /// The same limits for each direction, of its own.
    pub(super) fn new(config: &RateLimiterConfig) -> Self {
        let limit = || Limit(Some(Mutex::new(RateLimiter::new(config, Instant::now()))));
        Self {
            rx: limit(),
            tx: limit(),
        }
    }
}

/// How long a thread sleeps until then. Never nothing, which would be a poll that does not wait, over and over, until the time has come.
pub(super) fn left(until: Instant) -> Duration {
    let left = until.saturating_duration_since(Instant::now());
    left.max(Duration::from_millis(1))
}
