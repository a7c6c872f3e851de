//! Where a destination finds, among whoever connects, the connection it waits for.
//!
//! ```text
//!   listener ──accept──► waiting connections ──first bytes complete──► known? ─yes─► the one
//!                          │ broke, too slow, or one too many             └─no──► dropped
//!                          └──► dropped
//! ```
//!
//! All connections are read side by side, so one that says nothing does not keep the right one out.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::channel::{Channel, Limit, Patience, Stop, poll};
use crate::listener::Listener;

/// Most connections that are listened to at once; the oldest goes when one more comes.
const MOST: usize = 32;

/// How long to wait after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(10);

struct Waiting {
    channel: Channel,
    bytes: Vec<u8>,
    until: Instant,
}

/// The connections that have not said yet what they are. They stay from one search to the next.
#[derive(Default)]
pub(crate) struct Lobby {
    waiting: Vec<Waiting>,
}

/// What is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// How many first bytes tell.
    pub(crate) size: usize,
    /// Whether they are the right ones, or why not.
    pub(crate) known: &'a dyn Fn(&[u8]) -> Result<(), String>,
    /// How long a connection may take to send them.
    pub(crate) slowest: Duration,
}

impl Lobby {
    /// Waits for a connection that is wanted, and returns it with its first bytes.
    pub(crate) fn find(
        &mut self,
        listener: &Listener,
        wanted: Wanted<'_>,
        patience: &Patience<'_>,
    ) -> Result<(Channel, Vec<u8>), Stop> {
        loop {
            if let Some(found) = self.look(wanted) {
                return Ok(found);
            }
            wait(listener, &self.waiting, patience)?;
            self.let_in(listener, wanted);
        }
    }

    /// Takes a connection in, if there is a new one.
    fn let_in(&mut self, listener: &Listener, wanted: Wanted<'_>) {
        match listener.accept() {
            Ok(channel) => {
                if self.waiting.len() == MOST {
                    drop_one(
                        &self.waiting.remove(0).channel,
                        "too many connections are waiting",
                    );
                }
                self.waiting.push(Waiting {
                    channel,
                    bytes: Vec::with_capacity(wanted.size),
                    until: Instant::now() + wanted.slowest,
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                // Somebody who has gone already, or no descriptor is left. The listener may stay readable.
                tracing::debug!(%error, "accept");
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Reads what is there; the first connection that is wanted, if there is one. Those that are not are dropped.
    fn look(&mut self, wanted: Wanted<'_>) -> Option<(Channel, Vec<u8>)> {
        let mut at = 0;
        while let Some(waiting) = self.waiting.get_mut(at) {
            let verdict = match read(waiting, wanted.size) {
                Ok(true) => (wanted.known)(&waiting.bytes).map(|()| true),
                Ok(false) if Instant::now() >= waiting.until => {
                    Err("it took too long to say what it is".to_owned())
                }
                other => other,
            };
            match verdict {
                Ok(true) => {
                    let found = self.waiting.remove(at);
                    return Some((found.channel, found.bytes));
                }
                Ok(false) => at += 1,
                Err(reason) => drop_one(&self.waiting.remove(at).channel, &reason),
            }
        }
        None
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
            .map(|alarm| PollFd::new(alarm, PollFlags::IN)),
    );
    let end = match patience.limit {
        Limit::Until(end, _) => Some(end),
        Limit::Idle(length) => Some(Instant::now() + length),
        Limit::Forever => None,
    };
    let first = lobby.iter().map(|waiting| waiting.until).chain(end).min();
    let limit = first.map_or(Limit::Forever, |first| Limit::Until(first, Duration::ZERO));
    poll(&mut fds, limit)?;
    let ready = |at: std::ops::Range<usize>| fds[at].iter().any(|fd| !fd.revents().is_empty());
    if ready(wake_at..alarm_at) {
        return Err(Stop::Cancelled);
    }
    if let Some(alarm) = patience.alarm.filter(|_| ready(alarm_at..fds.len())) {
        alarm.skip_optional()?;
    }
    match (end, patience.limit) {
        (Some(end), Limit::Until(_, length) | Limit::Idle(length)) if Instant::now() >= end => {
            Err(Stop::Timeout(length))
        }
        _ => Ok(()),
    }
}

/// Reads what is there; `true` once all of the first bytes are.
fn read(waiting: &mut Waiting, size: usize) -> Result<bool, String> {
    let have = waiting.bytes.len();
    if have >= size {
        return Ok(true);
    }
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
