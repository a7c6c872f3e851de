//! The destination's decisions: what comes next, and whether it may run the guest. No I/O, no clock.
//!
//! ```text
//!  Listen → Negotiate → Reserve → Attach → ReceiveMemory → Restore → SayReady → AwaitCommit → Resume → SayResumed → Arrived
//!     │         │          │         │           │            │          │           │           │         │ (also if that
//!     └─────────┴──────────┴─────────┴───────────┴────────────┴──────────┴───────────┴───────────┘         │  cannot be said)
//!                               any failure: TellPeer → Discard → Failed                                   ▼
//! ```
//!
//! What it tells the source in [`Action::TellPeer`] is a proof that the guest does not run here: no way leads from there to
//! [`Action::Resume`]. It is told before the memory is given back, which can take seconds, because the guest at the source
//! may be standing still. Once the guest runs here nothing makes it stop.

use crate::Phase;

/// What the driver has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Wait for a source.
    Listen,
    /// Exchange hellos.
    Negotiate,
    /// Receive the manifest, build the machine, accept.
    Reserve,
    /// Wait for the data channels.
    Attach,
    /// Receive rounds of memory and the state, until the state's last round is there.
    ReceiveMemory,
    /// Restore the machine.
    Restore,
    /// Send [`Ready`](crate::protocol::Message::Ready).
    SayReady,
    /// Wait for [`Commit`](crate::protocol::Message::Commit), then close the door for cancels.
    AwaitCommit,
    /// Start the guest.
    Resume,
    /// Send [`Resumed`](crate::protocol::Message::Resumed).
    SayResumed,
    /// Throw the machine away.
    Discard,
    /// Tell the source why, if it can still be told.
    TellPeer,
    /// Nothing: the move has ended.
    Finish(End),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest is here.
    Arrived {
        /// The source has been told.
        source_informed: bool,
    },
    /// Nothing is here.
    Failed {
        /// In which phase.
        phase: Phase,
    },
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is done.
    Done,
    /// It failed.
    Failed(Failure),
}

/// Why an action failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The source has gone, or has said that it gives up: there is nobody to tell.
    PeerGone,
    /// Anything else, a cancel included.
    Local,
}

/// The destination's state machine.
#[derive(Clone, Debug)]
pub struct Engine {
    action: Action,
    failed: Option<Phase>,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// A move that has not begun.
    pub fn new() -> Self {
        Self {
            action: Action::Listen,
            failed: None,
        }
    }

    /// What to do now.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The phase the move is in, or failed in. When a source pauses its guest cannot be seen from here.
    pub fn phase(&self) -> Phase {
        if let Some(phase) = self.failed {
            return phase;
        }
        match self.action {
            Action::Listen => Phase::Connect,
            Action::Negotiate => Phase::Negotiate,
            Action::Reserve | Action::Attach => Phase::Reserve,
            Action::ReceiveMemory => Phase::Precopy,
            Action::Restore | Action::SayReady | Action::AwaitCommit => Phase::Handover,
            Action::Resume | Action::SayResumed | Action::Finish(_) => Phase::Complete,
            // Only after a failure, which is handled above.
            Action::Discard | Action::TellPeer => Phase::Handover,
        }
    }

    /// Takes in what came of the action.
    pub fn handle(&mut self, event: Event) {
        self.action = match (self.action, event) {
            (Action::Listen, Event::Done) => Action::Negotiate,
            (Action::Negotiate, Event::Done) => Action::Reserve,
            (Action::Reserve, Event::Done) => Action::Attach,
            (Action::Attach, Event::Done) => Action::ReceiveMemory,
            (Action::ReceiveMemory, Event::Done) => Action::Restore,
            (Action::Restore, Event::Done) => Action::SayReady,
            (Action::SayReady, Event::Done) => Action::AwaitCommit,
            (Action::AwaitCommit, Event::Done) => Action::Resume,
            (Action::Resume, Event::Done) => Action::SayResumed,

            // The guest runs here, whatever becomes of the source.
            (Action::SayResumed, event) => Action::Finish(End::Arrived {
                source_informed: event == Event::Done,
            }),

            (Action::TellPeer, _) => Action::Discard,
            (Action::Discard, _) => Action::Finish(End::Failed {
                phase: self.phase(),
            }),
            (Action::Finish(end), _) => Action::Finish(end),
            (_, Event::Failed(failure)) => {
                self.failed = Some(self.phase());
                match failure {
                    Failure::Local => Action::TellPeer,
                    Failure::PeerGone => Action::Discard,
                }
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Action; 10] = [
        Action::Listen,
        Action::Negotiate,
        Action::Reserve,
        Action::Attach,
        Action::ReceiveMemory,
        Action::Restore,
        Action::SayReady,
        Action::AwaitCommit,
        Action::Resume,
        Action::SayResumed,
    ];

    fn before(stop: Action) -> Engine {
        let mut engine = Engine::new();
        for step in STEPS {
            if engine.action() == stop {
                break;
            }
            assert_eq!(engine.action(), step);
            engine.handle(Event::Done);
        }
        assert_eq!(engine.action(), stop);
        engine
    }

    #[test]
    fn a_good_move_takes_every_step_in_order() {
        let mut engine = before(Action::SayResumed);
        engine.handle(Event::Done);
        assert_eq!(
            engine.action(),
            Action::Finish(End::Arrived {
                source_informed: true
            })
        );
        let mut phases: Vec<_> = STEPS.iter().map(|step| before(*step).phase()).collect();
        phases.dedup();
        let seen_here: Vec<_> = Phase::ALL
            .into_iter()
            .filter(|phase| *phase != Phase::Pause)
            .collect();
        assert_eq!(phases, seen_here);
    }

    #[test]
    fn every_failure_before_the_guest_runs_is_told_to_whoever_is_there_and_discards_it() {
        for step in &STEPS[..9] {
            for failure in [Failure::Local, Failure::PeerGone] {
                let mut engine = before(*step);
                let phase = engine.phase();
                let mut done = Vec::new();
                engine.handle(Event::Failed(failure));
                while !matches!(engine.action(), Action::Finish(_)) {
                    done.push(engine.action());
                    engine.handle(Event::Failed(Failure::PeerGone));
                }
                assert_eq!(
                    engine.action(),
                    Action::Finish(End::Failed { phase }),
                    "{step:?}"
                );
                match failure {
                    Failure::Local => {
                        assert_eq!(done, [Action::TellPeer, Action::Discard], "{step:?}");
                    }
                    Failure::PeerGone => assert_eq!(done, [Action::Discard], "{step:?}"),
                }
            }
        }
    }

    #[test]
    fn a_guest_that_runs_is_never_discarded() {
        let mut engine = before(Action::SayResumed);
        engine.handle(Event::Failed(Failure::PeerGone));
        let end = Action::Finish(End::Arrived {
            source_informed: false,
        });
        assert_eq!(engine.action(), end);
        engine.handle(Event::Failed(Failure::Local));
        assert_eq!(engine.action(), end);
    }
}
