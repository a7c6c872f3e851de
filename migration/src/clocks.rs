//! The real time of two hosts that need not agree on it.
//!
//! ```text
//!   source:       manifest sent at S₁ ─────────── saved at T ── state sent at S₂
//!   destination:                      heard at D₁                             heard at D₂
//!   this host is ahead by at most D − S, whichever message; the least of them is off by one message's way only
//!   the machine was saved at T + ahead, by this host's clock
//! ```
//!
//! So a guest's clocks go on by the time it really stood still, less at most the fastest message's way, and never by more, however
//! wrong one of the hosts' clocks is.

use std::time::{SystemTime, UNIX_EPOCH};

/// CLOCK_REALTIME in nanoseconds since 1970.
pub(crate) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// What is known of the peer's clock.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PeerClock {
    /// This host's clock is ahead by this many nanoseconds, at most.
    ahead_ns: Option<i128>,
}

impl PeerClock {
    /// A message has come, sent at that time by the peer's clock. An older peer does not say it.
    pub(crate) fn heard(&mut self, sent_ns: Option<u64>, now_ns: u64) {
        let Some(sent_ns) = sent_ns else {
            return;
        };
        let ahead = i128::from(now_ns) - i128::from(sent_ns);
        self.ahead_ns = Some(self.ahead_ns.map_or(ahead, |known| known.min(ahead)));
    }

    /// A time of the peer's by this host's clock; as it is if nothing is known.
    pub(crate) fn here(&self, peers_ns: u64) -> u64 {
        let here = i128::from(peers_ns) + self.ahead_ns.unwrap_or(0);
        u64::try_from(here.max(0)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_message_counts() {
        let mut clock = PeerClock::default();
        assert_eq!(clock.here(77), 77);
        clock.heard(None, 5);
        assert_eq!(clock.here(77), 77);
        // This host is ahead by 1000; the messages took 30 and 500.
        clock.heard(Some(100), 1130);
        clock.heard(Some(200), 1700);
        assert_eq!(clock.here(150), 1180);
    }

    #[test]
    fn a_host_that_is_behind_and_a_peer_that_lies() {
        let mut clock = PeerClock::default();
        clock.heard(Some(5000), 1010);
        assert_eq!(clock.here(6000), 2010);
        assert_eq!(clock.here(10), 0);
        clock.heard(Some(u64::MAX), 0);
        assert_eq!(clock.here(0), 0);
        let mut clock = PeerClock::default();
        clock.heard(Some(0), u64::MAX);
        assert_eq!(clock.here(u64::MAX), u64::MAX);
    }
}
