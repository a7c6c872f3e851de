//! The source's decisions: what comes next, and who owns the guest. No I/O, no clock.
//!
//! ```text
//!  Connect → Negotiate → Reserve → Track → Round(n) ─┬─► Pause → LastRound → SendState → AwaitReady → Commit → AwaitResumed → Moved
//!     │          │          │        │      ▲  │     │     │         │           │           │          │          │
//!     │          │          │        │      └──┘     │     │         │           │           │          │          │ no answer, or
//!     └──────────┴──────────┴────────┴───────────────┴─────┴─────────┴───────────┴───────────┘          │          │ none that says no
//!                               any failure                                             not a byte left │          ▼
//!                                    ▼                  ◄───────────────────────────────────────────────┘       InDoubt
//!                    TellPeer → TakeBack → Kept         ◄────── the destination says that it does not run the guest
//! ```
//!
//! The driver carries out [`Engine::action`] and answers with [`Engine::handle`], until the action is
//! [`Action::Finish`].

use std::time::Duration;

use super::convergence::{Convergence, Decision, Limits, RoundStats};
use crate::{Phase, SourceOutcome};

/// What the driver has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open the control channel.
    Connect,
    /// Exchange hellos.
    Negotiate,
    /// Send the manifest, get the answer, open the data channels.
    Reserve,
    /// Start dirty tracking.
    Track,
    /// Send a round while the guest runs, wait for its arrival, and find what is dirty afterwards.
    SendRound(u32),
    /// Pause the guest and find what it has written last.
    Pause,
    /// Send that.
    SendLastRound(u32),
    /// Save and send everything else.
    SendState(u32),
    /// Wait for [`Ready`](crate::protocol::Message::Ready).
    AwaitReady,
    /// Close the door for cancels, then send [`Commit`](crate::protocol::Message::Commit).
    Commit,
    /// Wait for [`Resumed`](crate::protocol::Message::Resumed).
    AwaitResumed,
    /// Tell the destination that the move is off, if it can still be told.
    TellPeer,
    /// End dirty tracking and resume the guest.
    TakeBack,
    /// Nothing: the move has ended.
    Finish(End),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest runs at the destination.
    Moved,
    /// It does not.
    Failed {
        /// Where the guest is.
        outcome: SourceOutcome,
        /// In which phase the move failed.
        phase: Phase,
    },
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is done.
    Done,
    /// [`Action::SendRound`] is done.
    RoundDone {
        /// How the round went.
        stats: RoundStats,
        /// Time since pre-copy began.
        since_start: Duration,
    },
    /// It failed.
    Failed(Failure),
}

/// Why an action failed, as far as it matters for who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The destination has said that it does not run the guest and never will.
    PeerSaysNo,
    /// The connection is lost, or of no use any more.
    PeerLost,
    /// Anything on this side, a cancel included. In [`Action::Commit`] it means that not a byte has left.
    Local,
}

/// The source's state machine.
#[derive(Clone, Debug)]
pub struct Engine {
    action: Action,
    convergence: Convergence,
    /// The first failure: its phase, and whether the destination should be told.
    failed: Option<(Phase, Failure)>,
}

impl Engine {
    /// A move that has not begun.
    pub fn new(limits: Limits) -> Self {
        Self {
            action: Action::Connect,
            convergence: Convergence::new(limits),
            failed: None,
        }
    }

    /// What to do now.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The phase the move is in, or failed in.
    pub fn phase(&self) -> Phase {
        if let Some((phase, _)) = self.failed {
            return phase;
        }
        match self.action {
            Action::Connect => Phase::Connect,
            Action::Negotiate => Phase::Negotiate,
            Action::Reserve => Phase::Reserve,
            Action::Track | Action::SendRound(_) => Phase::Precopy,
            Action::Pause => Phase::Pause,
            Action::SendLastRound(_)
            | Action::SendState(_)
            | Action::AwaitReady
            | Action::Commit => Phase::Handover,
            // Only after a failure, which is handled above.
            Action::TellPeer | Action::TakeBack => Phase::Handover,
            Action::AwaitResumed | Action::Finish(_) => Phase::Complete,
        }
    }

    /// How long the guest would be paused if it were paused after the last round.
    pub fn estimated_downtime(&self) -> Duration {
        self.convergence.estimate()
    }

    /// Takes in what came of the action. An event that does not fit it counts as a failure on this side.
    pub fn handle(&mut self, event: Event) {
        self.action = match (self.action, event) {
            (Action::Connect, Event::Done) => Action::Negotiate,
            (Action::Negotiate, Event::Done) => Action::Reserve,
            (Action::Reserve, Event::Done) => Action::Track,
            (Action::Track, Event::Done) => Action::SendRound(1),
            (Action::SendRound(round), Event::RoundDone { stats, since_start }) => {
                match self.convergence.after_round(&stats, since_start) {
                    Decision::AnotherRound => Action::SendRound(round.saturating_add(1)),
                    Decision::Pause => Action::Pause,
                    Decision::GiveUp => self.fail(Failure::Local),
                }
            }
            (Action::Pause, Event::Done) => Action::SendLastRound(self.convergence.rounds() + 1),
            (Action::SendLastRound(round), Event::Done) => Action::SendState(round),
            (Action::SendState(_), Event::Done) => Action::AwaitReady,
            (Action::AwaitReady, Event::Done) => Action::Commit,
            (Action::Commit, Event::Done) => Action::AwaitResumed,
            (Action::AwaitResumed, Event::Done) => Action::Finish(End::Moved),

            // The guest may have been given away. Only the destination's word brings it back.
            (Action::Commit, Event::Failed(Failure::PeerLost)) => self.in_doubt(),
            (Action::AwaitResumed, Event::Failed(Failure::PeerSaysNo)) => {
                self.fail(Failure::PeerSaysNo)
            }
            (Action::AwaitResumed, _) => self.in_doubt(),

            // What is done to end a failed move. Telling the destination is a courtesy.
            (Action::TellPeer, _) => Action::TakeBack,
            (Action::TakeBack, Event::Done) => self.kept(SourceOutcome::RunningHere),
            (Action::TakeBack, _) => self.kept(SourceOutcome::PausedHere),

            (Action::Finish(end), _) => Action::Finish(end),
            (_, Event::Failed(failure)) => self.fail(failure),
            (_, Event::Done | Event::RoundDone { .. }) => self.fail(Failure::Local),
        };
    }

    fn fail(&mut self, failure: Failure) -> Action {
        self.failed = Some((self.phase(), failure));
        match failure {
            Failure::Local => Action::TellPeer,
            Failure::PeerSaysNo | Failure::PeerLost => Action::TakeBack,
        }
    }

    fn in_doubt(&mut self) -> Action {
        let phase = self.phase();
        self.failed = Some((phase, Failure::PeerLost));
        Action::Finish(End::Failed {
            outcome: SourceOutcome::InDoubt,
            phase,
        })
    }

    fn kept(&self, outcome: SourceOutcome) -> Action {
        Action::Finish(End::Failed {
            outcome,
            phase: self.phase(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TimeoutStrategy;

    pub(crate) fn limits() -> Limits {
        Limits {
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(10),
            max_rounds: 4,
            strategy: TimeoutStrategy::Cancel,
        }
    }

    fn round(dirty_after: u64) -> Event {
        let stats = RoundStats {
            pages: 100_000,
            bytes: 100_000 << 12,
            elapsed: Duration::from_millis(400),
            sending: Duration::from_millis(400),
            dirty_after,
        };
        Event::RoundDone {
            stats,
            since_start: Duration::ZERO,
        }
    }

    /// The engine after the events of a good move up to (not including) the one for `stop`.
    fn before(stop: Action) -> Engine {
        let mut engine = Engine::new(limits());
        while engine.action() != stop {
            assert!(
                !matches!(engine.action(), Action::Finish(_)),
                "{stop:?} was never reached"
            );
            let event = match engine.action() {
                Action::SendRound(1) => round(50_000),
                Action::SendRound(_) => round(0),
                _ => Event::Done,
            };
            engine.handle(event);
        }
        engine
    }

    const STEPS: [Action; 12] = [
        Action::Connect,
        Action::Negotiate,
        Action::Reserve,
        Action::Track,
        Action::SendRound(1),
        Action::SendRound(2),
        Action::Pause,
        Action::SendLastRound(3),
        Action::SendState(3),
        Action::AwaitReady,
        Action::Commit,
        Action::AwaitResumed,
    ];

    #[test]
    fn a_good_move_takes_every_step_in_order() {
        let mut engine = before(Action::AwaitResumed);
        engine.handle(Event::Done);
        assert_eq!(engine.action(), Action::Finish(End::Moved));
        let mut phases: Vec<_> = STEPS.iter().map(|step| before(*step).phase()).collect();
        phases.dedup();
        assert_eq!(phases, Phase::ALL);
    }

    /// Runs a failed move to its end; tells whether the guest was taken back, and how it ended.
    fn finish(mut engine: Engine, resume: Event) -> (bool, End) {
        let mut taken_back = false;
        loop {
            match engine.action() {
                Action::Finish(end) => return (taken_back, end),
                Action::TakeBack => {
                    taken_back = true;
                    engine.handle(resume);
                }
                Action::TellPeer => engine.handle(Event::Failed(Failure::PeerLost)),
                other => panic!("{other:?} after a failure"),
            }
        }
    }

    #[test]
    fn every_failure_of_every_step_leaves_the_guest_where_the_table_says() {
        use SourceOutcome::{InDoubt, PausedHere, RunningHere};
        for step in STEPS {
            for failure in [Failure::Local, Failure::PeerLost, Failure::PeerSaysNo] {
                let expected = match (step, failure) {
                    (Action::Commit, Failure::PeerLost) => InDoubt,
                    (Action::AwaitResumed, Failure::PeerLost | Failure::Local) => InDoubt,
                    _ => RunningHere,
                };
                let mut engine = before(step);
                let phase = engine.phase();
                engine.handle(Event::Failed(failure));
                let (taken_back, end) = finish(engine.clone(), Event::Done);
                assert_eq!(
                    end,
                    End::Failed {
                        outcome: expected,
                        phase
                    },
                    "{step:?} {failure:?}"
                );
                assert_eq!(taken_back, expected == RunningHere, "{step:?} {failure:?}");
                let (_, end) = finish(engine, Event::Failed(Failure::Local));
                let stuck = if expected == RunningHere {
                    PausedHere
                } else {
                    expected
                };
                assert_eq!(
                    end,
                    End::Failed {
                        outcome: stuck,
                        phase
                    },
                    "{step:?} {failure:?}"
                );
            }
        }
    }

    #[test]
    fn a_move_that_does_not_converge_is_given_up() {
        let mut engine = before(Action::SendRound(1));
        for _ in 0..4 {
            engine.handle(round(100_000));
        }
        let (taken_back, end) = finish(engine, Event::Done);
        assert!(taken_back);
        assert_eq!(
            end,
            End::Failed {
                outcome: SourceOutcome::RunningHere,
                phase: Phase::Precopy
            }
        );
    }

    #[test]
    fn the_end_is_final() {
        let mut engine = before(Action::AwaitResumed);
        engine.handle(Event::Failed(Failure::PeerLost));
        let end = engine.action();
        for event in [Event::Done, Event::Failed(Failure::PeerSaysNo), round(3)] {
            engine.handle(event);
            assert_eq!(engine.action(), end);
        }
    }
}
