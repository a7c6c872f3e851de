//! When to stop pre-copy and pause the guest.
//!
//! The downtime that the caller allows is a ceiling, not a goal: a further round costs little while the guest runs, so
//! rounds go on as long as they still shrink what is left markedly, down to where the handover's fixed costs outweigh the
//! transfer.
//!
//! ```text
//!   after each round:   estimate ≤ floor and ≤ ceiling ─────────────────► pause
//!                       dirty ≤ 0.7 × the round before ─────────────────► another round
//!                       estimate ≤ ceiling ─────────────────────────────► pause (also when time or rounds are used up)
//!                       time or rounds used up ── strategy: ignore ─────► pause
//!                             │                   strategy: cancel ─────► give up
//!                             └ not yet ────────────────────────────────► another round
//! ```
//!
//! Time and rounds end a shrinking series as well.

use std::time::Duration;

use memory::PAGE_SIZE;

use crate::TimeoutStrategy;

/// Below this much transfer, another round is not worth its own costs.
const FLOOR: Duration = Duration::from_millis(2);
/// A round helps markedly if it leaves at most this part of what the one before left.
const MARKED: f64 = 0.7;
/// A round says something about the bandwidth only if it sent at least this many bytes: less fits socket buffers.
const MEASURABLE_BYTES: u64 = 8 << 20;
/// A round says something about the cost of looking at pages only if it looked at this many.
const MEASURABLE_PAGES: u64 = 1024;

/// What the caller allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest acceptable downtime.
    pub downtime: Duration,
    /// Longest acceptable pre-copy.
    pub timeout: Duration,
    /// Most rounds before the guest is paused.
    pub max_rounds: u32,
    /// What to do when either is used up.
    pub strategy: TimeoutStrategy,
}

/// How a round went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Pages looked at.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// How long the round took until the destination had all of it.
    pub elapsed: Duration,
    /// How much of that was spent sending and waiting for the destination.
    pub sending: Duration,
    /// Pages that were dirty right after it.
    pub dirty_after: u64,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round while the guest runs.
    AnotherRound,
    /// Pause the guest and send what is left.
    Pause,
    /// It will not converge.
    GiveUp,
}

/// The running judgement over the rounds of one move.
#[derive(Clone, Debug)]
pub struct Convergence {
    limits: Limits,
    rounds: u32,
    /// Seconds a byte, from the last round that could tell.
    per_byte: Option<f64>,
    /// Bytes of that round.
    learnt_from: u64,
    /// Seconds a page for finding, re-arming and looking at it, from the last round that could tell.
    per_page: f64,
    previous_dirty: Option<u64>,
    estimate: Duration,
}

impl Convergence {
    /// A move that has not begun.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            rounds: 0,
            per_byte: None,
            learnt_from: 0,
            per_page: 0.0,
            previous_dirty: None,
            estimate: Duration::ZERO,
        }
    }

    /// How long it would take to send what is dirty now, as of the last round.
    pub fn estimate(&self) -> Duration {
        self.estimate
    }

    /// Rounds so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Takes a round into account. `since_start` is the time since pre-copy began.
    pub fn after_round(&mut self, stats: &RoundStats, since_start: Duration) -> Decision {
        self.rounds += 1;
        self.learn(stats);
        let shrinking = match self.previous_dirty.replace(stats.dirty_after) {
            Some(previous) => stats.dirty_after as f64 <= previous as f64 * MARKED,
            // The first round leaves less than it sent, or it does not help.
            None => stats.dirty_after as f64 <= stats.pages as f64 * MARKED,
        };
        let acceptable = self.estimate <= self.limits.downtime;
        let used_up = since_start >= self.limits.timeout || self.rounds >= self.limits.max_rounds;
        match self.limits.strategy {
            _ if acceptable && (self.estimate <= FLOOR || !shrinking || used_up) => Decision::Pause,
            TimeoutStrategy::Ignore if used_up => Decision::Pause,
            TimeoutStrategy::Cancel if used_up => Decision::GiveUp,
            _ => Decision::AnotherRound,
        }
    }

    fn learn(&mut self, stats: &RoundStats) {
        // A small round is a poor measure, but better than one that was smaller still.
        if stats.bytes >= MEASURABLE_BYTES.min(self.learnt_from) && stats.bytes > 0 {
            self.per_byte = Some(stats.sending.as_secs_f64() / stats.bytes as f64);
            self.learnt_from = stats.bytes;
        }
        if stats.pages >= MEASURABLE_PAGES {
            let looking = stats.elapsed.saturating_sub(stats.sending).as_secs_f64();
            self.per_page = looking / stats.pages as f64;
        }
        // All that is dirty may have to be sent.
        let dirty = stats.dirty_after as f64;
        let seconds = dirty * (PAGE_SIZE as f64 * self.per_byte.unwrap_or(0.0) + self.per_page);
        self.estimate = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn limits(downtime_ms: u64) -> Limits {
        Limits {
            downtime: Duration::from_millis(downtime_ms),
            timeout: Duration::from_secs(100),
            max_rounds: 50,
            strategy: TimeoutStrategy::Cancel,
        }
    }

    /// A round at 1 GiB/s (3.8 µs a page) in which nothing but sending takes time.
    fn round(pages: u64, dirty_after: u64) -> RoundStats {
        let bytes = pages * PAGE_SIZE;
        let sending = Duration::from_secs_f64(bytes as f64 / GIB as f64);
        RoundStats {
            pages,
            bytes,
            elapsed: sending,
            sending,
            dirty_after,
        }
    }

    fn decide(limits: Limits, rounds: &[RoundStats]) -> Vec<Decision> {
        let mut convergence = Convergence::new(limits);
        let mut time = Duration::ZERO;
        rounds
            .iter()
            .map(|stats| {
                time += stats.elapsed;
                convergence.after_round(stats, time)
            })
            .collect()
    }

    #[test]
    fn an_idle_guest_is_paused_after_one_round() {
        assert_eq!(
            decide(limits(300), &[round(500_000, 20)]),
            [Decision::Pause]
        );
        assert_eq!(decide(limits(300), &[round(500_000, 0)]), [Decision::Pause]);
    }

    #[test]
    fn rounds_go_on_below_the_ceiling_while_they_help() {
        use Decision::{AnotherRound, Pause};
        // 20,000 pages take 76 ms, which would be allowed; 400 take 1.5 ms, below the floor.
        let rounds = [
            round(500_000, 20_000),
            round(20_000, 4_000),
            round(4_000, 400),
        ];
        assert_eq!(
            decide(limits(300), &rounds),
            [AnotherRound, AnotherRound, Pause]
        );
        // No marked progress, and the ceiling allows it.
        let rounds = [round(500_000, 20_000), round(20_000, 16_000)];
        assert_eq!(decide(limits(300), &rounds), [AnotherRound, Pause]);
        // No marked progress, and the ceiling does not allow it.
        let rounds = [
            round(500_000, 20_000),
            round(20_000, 16_000),
            round(16_000, 15_000),
        ];
        assert_eq!(decide(limits(10), &rounds), [AnotherRound; 3]);
    }

    #[test]
    fn a_downtime_below_the_floor_is_still_a_ceiling() {
        let rounds = [round(500_000, 400), round(400, 100)];
        assert_eq!(
            decide(limits(1), &rounds),
            [Decision::AnotherRound, Decision::Pause]
        );
    }

    #[test]
    fn what_does_not_converge_ends_by_the_strategy() {
        let endless = vec![round(50_000, 50_000); 60];
        let cancel = decide(limits(10), &endless);
        assert_eq!(
            cancel.iter().position(|d| *d != Decision::AnotherRound),
            Some(49)
        );
        assert_eq!(cancel[49], Decision::GiveUp);
        let ignore = Limits {
            strategy: TimeoutStrategy::Ignore,
            ..limits(10)
        };
        assert_eq!(decide(ignore, &endless)[49], Decision::Pause);
        let short = Limits {
            timeout: Duration::from_millis(500),
            ..limits(10)
        };
        assert_eq!(decide(short, &endless)[2], Decision::GiveUp);
    }

    #[test]
    fn a_slow_look_at_zero_pages_does_not_pass_for_a_slow_network() {
        // 100 GiB of zeros, looked at in 10 s, with hardly anything to send.
        let first = RoundStats {
            pages: 25 << 20,
            bytes: 100 << 10,
            elapsed: Duration::from_secs(10),
            sending: Duration::from_micros(100),
            dirty_after: 50,
        };
        assert_eq!(decide(limits(300), &[first]), [Decision::Pause]);
    }

    proptest! {
        #[test]
        fn it_always_ends_and_never_pauses_above_the_ceiling_unless_told(dirty in proptest::collection::vec(0..1_000_000u64, 50), ignore in any::<bool>(), ceiling in 0..1000u64) {
            let strategy = if ignore { TimeoutStrategy::Ignore } else { TimeoutStrategy::Cancel };
            let mut convergence = Convergence::new(Limits { strategy, ..limits(ceiling) });
            let (mut pages, mut time) = (1_000_000, Duration::ZERO);
            let mut end = None;
            for dirty in dirty {
                let stats = round(pages, dirty);
                time += stats.elapsed;
                pages = dirty;
                let decision = convergence.after_round(&stats, time);
                if decision != Decision::AnotherRound {
                    end = Some(decision);
                    break;
                }
            }
            match end {
                Some(Decision::Pause) => prop_assert!(ignore || convergence.estimate() <= Duration::from_millis(ceiling)),
                Some(Decision::GiveUp) => prop_assert!(!ignore),
                _ => prop_assert!(false, "50 rounds are the most"),
            }
        }
    }
}
