//! Limits how many bytes and operations a device may take in a time, by token buckets.
//!
//! ```text
//!   time ── size / refill_time ──► bucket (at most size) ─┐
//!                                  one-time burst ────────┴─► an operation takes one, its bytes take theirs
//! ```
//!
//! Promises: an operation passes when both buckets allow it, and takes from both or from none. One that is larger than a bucket passes
//! when the bucket is full and leaves a debt, which those after it wait for. An operation whose bytes are known only once it is done passes
//! when nothing is owed, and leaves a debt as well. Nothing here reads a clock or waits.

use std::time::{Duration, Instant};

/// A bucket's measures. A size or a refill time of zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenBucketConfig {
    /// Tokens that it holds: bytes or operations.
    pub size: u64,
    /// Tokens that may be taken at first, once, besides those of the bucket.
    pub one_time_burst: u64,
    /// Time in milliseconds in which an empty bucket fills.
    pub refill_time_ms: u64,
}

/// What is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimiterConfig {
    /// Bytes read and written.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    pub ops: Option<TokenBucketConfig>,
}

/// The longest refill time that is told apart, some 30 years: products with any count of tokens stay within 128 bits.
const MAX_REFILL_MS: u64 = 1_000_000_000_000;

/// Two buckets. See the module's text.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl RateLimiter {
    /// A limiter whose buckets are full at `now`.
    pub fn new(config: &RateLimiterConfig, now: Instant) -> Self {
        let bucket = |config: Option<TokenBucketConfig>| config.and_then(|it| Bucket::new(it, now));
        Self {
            bandwidth: bucket(config.bandwidth),
            ops: bucket(config.ops),
        }
    }

    /// Takes one operation of so many bytes, or says after how long to ask again. That is the earliest time at which it can pass, if
    /// nobody takes anything in between.
    pub fn try_take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait_for(tokens));
            }
        }
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(bytes);
        Ok(())
    }

    /// Takes nothing, but says after how long to ask again if an operation cannot be taken now, or bytes are owed. Otherwise an operation
    /// may begin whose bytes nobody knows yet; [`RateLimiter::charge`] takes it once they are known.
    pub fn may_begin(&mut self, now: Instant) -> Result<(), Duration> {
        let mut wait = Duration::ZERO;
        for bucket in [&mut self.bandwidth, &mut self.ops].into_iter().flatten() {
            bucket.refill(now);
            wait = wait.max(bucket.wait_for(1));
        }
        match wait {
            Duration::ZERO => Ok(()),
            wait => Err(wait),
        }
    }

    /// Takes one operation of so many bytes that has been done already; what is not there is owed.
    pub fn charge(&mut self, bytes: u64) {
        let all = [(self.bandwidth.as_mut(), bytes), (self.ops.as_mut(), 1)];
        for (bucket, tokens) in all {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }
}

/// Credit is counted in tokens times nanoseconds of the refill time, so that refilling is exact however often it is done.
#[derive(Clone, Debug)]
struct Bucket {
    size: i128,
    refill_ns: i128,
    credit: i128,
    burst: u64,
    last: Instant,
}

impl Bucket {
    fn new(config: TokenBucketConfig, now: Instant) -> Option<Self> {
        if config.size == 0 || config.refill_time_ms == 0 {
            return None;
        }
        let refill_ns = i128::from(config.refill_time_ms.min(MAX_REFILL_MS)) * 1_000_000;
        let size = i128::from(config.size);
        Some(Self {
            size,
            refill_ns,
            credit: size * refill_ns,
            burst: config.one_time_burst,
            last: now,
        })
    }

    fn full(&self) -> i128 {
        self.size * self.refill_ns
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.last).as_nanos();
        self.last = self.last.max(now);
        let gain = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.size);
        self.credit = self.credit.saturating_add(gain).min(self.full());
    }

    /// Tokens that the burst does not pay, as credit.
    fn cost(&self, tokens: u64) -> i128 {
        i128::from(tokens.saturating_sub(self.burst)) * self.refill_ns
    }

    fn wait_for(&self, tokens: u64) -> Duration {
        let cost = self.cost(tokens);
        let missing = cost.min(self.full()) - self.credit;
        if cost == 0 || missing <= 0 {
            return Duration::ZERO;
        }
        let ns = (missing + self.size - 1) / self.size;
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.credit -= self.cost(tokens);
        self.burst = self.burst.saturating_sub(tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limiter(size: u64, one_time_burst: u64, refill_time_ms: u64, now: Instant) -> RateLimiter {
        let bucket = TokenBucketConfig {
            size,
            one_time_burst,
            refill_time_ms,
        };
        let config = RateLimiterConfig {
            bandwidth: Some(bucket),
            ops: None,
        };
        RateLimiter::new(&config, now)
    }

    #[test]
    fn a_bucket_empties_and_fills() {
        let start = Instant::now();
        let mut limiter = limiter(1000, 500, 100, start);
        assert_eq!(limiter.try_take(1200, start), Ok(()));
        assert_eq!(
            limiter.try_take(400, start),
            Err(Duration::from_millis(10)),
            "300 are left, the burst is gone"
        );
        let later = start + Duration::from_millis(10);
        assert_eq!(limiter.try_take(400, later), Ok(()));
        assert_eq!(limiter.try_take(0, later), Ok(()), "nothing costs nothing");
        let much_later = start + Duration::from_secs(3600);
        assert_eq!(limiter.try_take(1000, much_later), Ok(()));
        assert_eq!(limiter.try_take(1, later), Err(Duration::from_micros(100)));
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_by_debt() {
        let start = Instant::now();
        let mut limiter = limiter(1000, 0, 1000, start);
        assert_eq!(limiter.try_take(3000, start), Ok(()));
        let wait = limiter
            .try_take(1000, start)
            .expect_err("two seconds of debt");
        assert_eq!(wait, Duration::from_secs(3));
        assert_eq!(limiter.try_take(1000, start + wait), Ok(()));
    }

    #[test]
    fn what_is_charged_afterwards_is_owed() {
        let start = Instant::now();
        let mut limiter = limiter(1000, 100, 1000, start);
        assert_eq!(limiter.may_begin(start), Ok(()));
        limiter.charge(3100);
        assert_eq!(
            limiter.may_begin(start),
            Err(Duration::from_millis(2001)),
            "two seconds of debt, and a token to begin with"
        );
        let later = start + Duration::from_millis(2001);
        assert_eq!(limiter.may_begin(later), Ok(()));
        assert_eq!(limiter.may_begin(later), Ok(()), "to ask costs nothing");
        assert_eq!(limiter.try_take(2, later), Err(Duration::from_millis(1)));
    }

    #[test]
    fn both_or_none() {
        let start = Instant::now();
        let bucket = |size| {
            Some(TokenBucketConfig {
                size,
                one_time_burst: 0,
                refill_time_ms: 1000,
            })
        };
        let config = RateLimiterConfig {
            bandwidth: bucket(100),
            ops: bucket(2),
        };
        let mut limiter = RateLimiter::new(&config, start);
        assert_eq!(limiter.try_take(90, start), Ok(()));
        assert_eq!(
            limiter.try_take(20, start),
            Err(Duration::from_millis(100)),
            "bytes are short"
        );
        assert_eq!(
            limiter.try_take(10, start),
            Ok(()),
            "the refusal took nothing"
        );
        assert_eq!(limiter.try_take(0, start), Err(Duration::from_millis(500)));
        let unlimited = RateLimiterConfig {
            bandwidth: bucket(0),
            ops: None,
        };
        assert_eq!(
            RateLimiter::new(&unlimited, start).try_take(u64::MAX, start),
            Ok(())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any measures: who waits as told passes, and over time no more passes than the bucket, its refills, the burst and one debt.
        #[test]
        fn waiting_as_told_is_enough_and_the_rate_holds(
            size in any::<u64>().prop_map(|bits| bits >> (bits % 64)),
            one_time_burst in 0u64..5000,
            refill_time_ms in any::<u64>().prop_map(|bits| bits >> (bits % 64)),
            takes in prop::collection::vec((any::<u64>().prop_map(|bits| bits >> (bits % 64)), 0u64..50_000_000), 1..50),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(size, one_time_burst, refill_time_ms, start);
            let mut at = start;
            let (mut taken, mut largest) = (0u128, 0u64);
            for (bytes, pause_ns) in takes {
                at += Duration::from_nanos(pause_ns);
                if let Err(wait) = limiter.try_take(bytes, at) {
                    prop_assert!(wait > Duration::ZERO);
                    let Some(later) = at.checked_add(wait) else { return Ok(()) };
                    if wait.as_nanos() >= u128::from(u64::MAX) { return Ok(()) }
                    at = later;
                    prop_assert_eq!(limiter.try_take(bytes, at), Ok(()));
                }
                taken += u128::from(bytes);
                largest = largest.max(bytes);
                if size > 0 && refill_time_ms > 0 {
                    let refill_ns = u128::from(refill_time_ms.min(MAX_REFILL_MS)) * 1_000_000;
                    let refilled = at.duration_since(start).as_nanos().saturating_mul(u128::from(size)) / refill_ns + 1;
                    let allowed = u128::from(size) + u128::from(one_time_burst) + u128::from(largest) + refilled;
                    prop_assert!(taken <= allowed, "{} of {}", taken, allowed);
                }
            }
        }
    }
}
