//! The connections of a move as the source uses them, and what it means when they fail.

use std::time::Duration;

use super::engine::Failure;
use super::round::Totals;
use crate::channel::{Channel, Limit, Patience, Stop};
use crate::connect::Target;
use crate::protocol::ProtocolError;
use crate::protocol::message::Message;
use crate::{Cause, MachineError};

/// How long a broken connection is searched for the other side's reason.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// An action that failed: why, and what that means for who owns the guest.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) cause: Cause,
    pub(super) failure: Failure,
}

impl Trouble {
    /// Something on this side; the destination can still be told.
    pub(super) fn local(cause: impl Into<Cause>) -> Self {
        Self {
            cause: cause.into(),
            failure: Failure::Local,
        }
    }

    /// A wait that ended, an alarm excepted.
    pub(super) fn from_stop(stop: Stop, doing: &'static str) -> Self {
        let failure = match stop {
            Stop::Lost(_) | Stop::Alarm => Failure::PeerLost,
            Stop::Cancelled | Stop::Timeout(_) | Stop::Protocol(_) => Failure::Local,
        };
        Self {
            cause: stop.into_cause(doing),
            failure,
        }
    }

    pub(super) fn peer_says_no(cause: Cause) -> Self {
        Self {
            cause,
            failure: Failure::PeerSaysNo,
        }
    }

    pub(super) fn machine(doing: &'static str) -> impl FnOnce(MachineError) -> Self {
        move |error| Self::local(Cause::Machine { doing, error })
    }
}

/// The connections of a move.
pub(super) struct Link {
    pub(super) control: Channel,
    /// Where the data channels go.
    pub(super) target: Target,
    pub(super) data: Vec<Channel>,
}

impl Link {
    /// A connection that breaks often does so because the other side has given up: then it has said why on the control
    /// channel, which is both a better message and a proof.
    pub(super) fn last_words(&self, trouble: Trouble) -> Trouble {
        if trouble.failure != Failure::PeerLost {
            return trouble;
        }
        let patience = Patience::uninterrupted(Limit::within(LAST_WORDS), "looking for the reason");
        match receive(&self.control, &patience) {
            Err(said) if said.failure == Failure::PeerSaysNo => said,
            _ => trouble,
        }
    }
}

pub(super) fn not_open() -> std::io::Error {
    std::io::ErrorKind::NotConnected.into()
}

pub(super) fn send_message(
    channel: &Channel,
    message: &Message,
    patience: &Patience<'_>,
) -> Result<(), Trouble> {
    channel
        .send(message, patience)
        .map_err(|error| Trouble::from_stop(error.stop, patience.doing))
}

/// The next message, unless the destination says no.
pub(super) fn receive(channel: &Channel, patience: &Patience<'_>) -> Result<Message, Trouble> {
    channel
        .receive(patience)
        .map_err(|stop| Trouble::from_stop(stop, patience.doing))
        .and_then(unless_no)
}

/// The same, or `None` if it is a message to be skipped.
pub(super) fn receive_one(
    channel: &Channel,
    patience: &Patience<'_>,
) -> Result<Option<Message>, Trouble> {
    channel
        .receive_one(patience)
        .map_err(|stop| Trouble::from_stop(stop, patience.doing))
        .and_then(|message| message.map(unless_no).transpose())
}

fn unless_no(message: Message) -> Result<Message, Trouble> {
    match message {
        Message::Abort(abort) => Err(Trouble::peer_says_no(Cause::PeerGaveUp {
            reason: abort.reason,
        })),
        Message::Refuse(refuse) => Err(Trouble::peer_says_no(Cause::Refused(refuse.reasons))),
        message => Ok(message),
    }
}

pub(super) fn unexpected(found: &Message, expected: &'static str) -> Trouble {
    Trouble::local(ProtocolError::Unexpected {
        found: found.name(),
        expected,
    })
}

pub(super) fn check_round_done(
    message: &Message,
    round: u32,
    totals: &Totals,
) -> Result<(), Trouble> {
    let Message::RoundDone(done) = message else {
        return Err(unexpected(message, "round_done"));
    };
    for (field, found, expected) in [
        ("round", u64::from(done.round), u64::from(round)),
        ("number of bytes in the round", done.bytes, totals.payload),
    ] {
        if found != expected {
            return Err(Trouble::local(ProtocolError::Mismatch {
                field,
                found,
                expected,
            }));
        }
    }
    Ok(())
}
