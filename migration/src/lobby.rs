//! Where a destination finds, among whoever connects, the connection it waits for.
//!
//! ```text
//!   listener ──accept──► waiting connections ──first bytes complete──► known? ─yes─► the one
//!                          │ broke, too slow, or one too many             └─no──► dropped
//!                          └──► dropped
//! ```
//!
//! All connections are read side by side, so one that says nothing does not keep the right one out.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::channel::{Channel, Limit, Patience, Stop, poll};
use crate::listener::Listener;

/// Most connections that are listened to at once; the oldest goes when one more comes.
const MOST: usize = 32;

struct Waiting {
    channel: Channel,
    bytes: Vec<u8>,
    until: Instant,
}

/// Waits for a connection whose first `size` bytes `known` accepts, and returns it with them. `slowest` is how long a
/// connection may take to send them.
pub(crate) fn wait_for(
    listener: &Listener,
    size: usize,
    slowest: Duration,
    patience: &Patience<'_>,
    known: &dyn Fn(&[u8]) -> Result<(), String>,
) -> Result<(Channel, Vec<u8>), Stop> {
    let mut lobby: Vec<Waiting> = Vec::new();
    loop {
        wait(listener, &lobby, patience)?;
        match listener.accept() {
            Ok(channel) => {
                if lobby.len() == MOST {
                    drop_one(&lobby.remove(0).channel, "too many connections are waiting");
                }
                lobby.push(Waiting {
                    channel,
                    bytes: Vec::with_capacity(size),
                    until: Instant::now() + slowest,
                });
            }
            // Nobody new, or somebody who has gone already.
            Err(error) => tracing::trace!(%error, "accept"),
        }
        let mut at = 0;
        while at < lobby.len() {
            let waiting = &mut lobby[at];
            let verdict = match read(waiting, size) {
                Ok(true) => known(&waiting.bytes).map(|()| true),
                Ok(false) if Instant::now() >= waiting.until => {
                    Err("it took too long to say what it is".to_owned())
                }
                other => other,
            };
            match verdict {
                Ok(true) => {
                    let found = lobby.swap_remove(at);
                    return Ok((found.channel, found.bytes));
                }
                Ok(false) => at += 1,
                Err(reason) => drop_one(&lobby.remove(at).channel, &reason),
            }
        }
    }
}

/// Waits until something may have changed.
fn wait(listener: &Listener, lobby: &[Waiting], patience: &Patience<'_>) -> Result<(), Stop> {
    let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
    fds.extend(
        lobby
            .iter()
            .map(|waiting| PollFd::new(&waiting.channel, PollFlags::IN)),
    );
    let wake_at = fds.len();
    fds.extend(patience.wake.map(|wake| PollFd::new(wake, PollFlags::IN)));
    let alarm_at = fds.len();
    fds.extend(
        patience
            .alarm
            .map(|alarm| PollFd::from_borrowed_fd(alarm, PollFlags::IN)),
    );
    let end = match patience.limit {
        Limit::Until(end, _) => Some(end),
        Limit::Idle(length) => Some(Instant::now() + length),
        Limit::Forever => None,
    };
    let first = lobby.iter().map(|waiting| waiting.until).chain(end).min();
    let limit = first.map_or(Limit::Forever, |first| Limit::Until(first, Duration::ZERO));
    let woken = poll(&mut fds, limit)?;
    let ready = |at: std::ops::Range<usize>| fds[at].iter().any(|fd| !fd.revents().is_empty());
    if ready(wake_at..alarm_at) {
        return Err(Stop::Cancelled);
    }
    if ready(alarm_at..fds.len()) {
        return Err(Stop::Alarm);
    }
    match (woken, end, patience.limit) {
        (false, Some(end), Limit::Until(_, length) | Limit::Idle(length))
            if Instant::now() >= end =>
        {
            Err(Stop::Timeout(length))
        }
        _ => Ok(()),
    }
}

/// Reads what is there; `true` once all of the first bytes are.
fn read(waiting: &mut Waiting, size: usize) -> Result<bool, String> {
    let have = waiting.bytes.len();
    waiting.bytes.resize(size, 0);
    let result = waiting.channel.read_some(&mut waiting.bytes[have..]);
    let more = match result {
        Ok(Some(0)) => Err("it closed before it said what it is".to_owned()),
        Ok(more) => Ok(more.unwrap_or(0)),
        Err(error) => Err(error.to_string()),
    };
    waiting.bytes.truncate(have + *more.as_ref().unwrap_or(&0));
    more.map(|_| waiting.bytes.len() == size)
}

fn drop_one(channel: &Channel, reason: &str) {
    tracing::warn!(peer = channel.peer(), reason, "a connection is dropped");
}
