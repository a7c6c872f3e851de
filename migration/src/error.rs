//! Why a move failed, and where the guest is then.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::protocol::ProtocolError;
use crate::{MachineError, Phase, Refusal};

/// Where the guest is after a failed move, as the source knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceOutcome {
    /// Here, as it was before the move: running, or paused if it was paused. The destination does not run it and
    /// never will.
    RunningHere,
    /// Here, but it could not be resumed: paused. The destination does not run it and never will, so it is safe to
    /// try to resume it again.
    PausedHere,
    /// The commit may have left and no answer came. The guest is paused here, and may run at the destination. Resume
    /// it here only when it certainly does not run there.
    InDoubt,
}

impl fmt::Display for SourceOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunningHere => "the guest stays here as it was",
            Self::PausedHere => "the guest is here but could not be resumed; resume it again or shut it down",
            Self::InDoubt => {
                "the guest is paused here and may run at the destination; find out, then resume it on one side only"
            }
        })
    }
}

/// A move away that failed.
#[derive(Debug, thiserror::Error)]
#[error("the move failed in phase {phase}: {cause}; {outcome}")]
pub struct SendError {
    /// The phase it failed in.
    pub phase: Phase,
    /// Why.
    pub cause: Cause,
    /// Where the guest is.
    pub outcome: SourceOutcome,
}

impl SendError {
    /// Where the guest is.
    pub fn outcome(&self) -> SourceOutcome {
        self.outcome
    }

    /// Somebody asked for it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.cause, Cause::Cancelled)
    }
}

/// A move in that failed. Nothing of it is left here.
#[derive(Debug, thiserror::Error)]
#[error("the incoming move failed in phase {phase}: {cause}")]
pub struct ReceiveError {
    /// The phase it failed in.
    pub phase: Phase,
    /// Why.
    pub cause: Cause,
}

impl ReceiveError {
    /// Somebody asked for it, here.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.cause, Cause::Cancelled)
    }
}

/// Why a move failed. The messages are complete: the sources' texts are part of them.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// It was cancelled on this side.
    #[error("it was cancelled")]
    Cancelled,
    /// The destination cannot take the machine.
    #[error("the destination refuses the machine: {}", list(.0))]
    Refused(Vec<Refusal>),
    /// The other side gave up, and said so.
    #[error("the other side gave up: {reason}")]
    PeerGaveUp {
        /// What it says.
        reason: String,
    },
    /// What the other side sent makes no sense.
    #[error("the other side broke the protocol: {0}")]
    Protocol(ProtocolError),
    /// The connection broke.
    #[error("the connection was lost while {doing}: {error}")]
    ConnectionLost {
        /// What was going on.
        doing: &'static str,
        /// The system's reason.
        error: io::Error,
    },
    /// The destination cannot be reached.
    #[error("cannot connect to {url}: {error}")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// The system's reason.
        error: io::Error,
    },
    /// The other side was silent for too long.
    #[error("no progress for {} s while {doing}", after.as_secs_f64())]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
    /// The guest writes memory faster than it can be sent.
    #[error(
        "pre-copy did not converge in {rounds} rounds and {seconds} s: the downtime would be {estimated_ms} ms; \
         allow a longer downtime, or make the guest write less"
    )]
    NotConverging {
        /// Rounds done.
        rounds: u32,
        /// Time spent, in seconds.
        seconds: u64,
        /// Expected downtime in milliseconds.
        estimated_ms: u64,
    },
    /// This side's machine failed.
    #[error("{doing} failed: {error}")]
    Machine {
        /// What it was asked to do.
        doing: &'static str,
        /// What it says.
        error: MachineError,
    },
    /// Guest memory cannot be reached.
    #[error("guest memory: {0}")]
    Memory(memory::Error),
    /// This host failed.
    #[error("{doing} failed: {error}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// The system's reason.
        error: io::Error,
    },
}

impl Cause {
    /// A short name for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Refused(_) => "refused",
            Self::PeerGaveUp { .. } => "peer_gave_up",
            Self::Protocol(_) => "protocol",
            Self::ConnectionLost { .. } => "connection_lost",
            Self::Unreachable { .. } => "unreachable",
            Self::Timeout { .. } => "timeout",
            Self::NotConverging { .. } => "not_converging",
            Self::Machine { .. } => "machine",
            Self::Memory(_) => "memory",
            Self::Host { .. } => "host",
        }
    }
}

impl From<ProtocolError> for Cause {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

impl From<memory::Error> for Cause {
    fn from(error: memory::Error) -> Self {
        Self::Memory(error)
    }
}

pub(crate) fn list(refusals: &[Refusal]) -> String {
    if refusals.is_empty() {
        return "it gives no reason".to_owned();
    }
    let texts: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    texts.join("; ")
}
