//! One connection: waits that can be woken, messages, pages.
//!
//! No call here blocks by itself: each waits in `poll` for its socket, for the descriptor that a cancel makes readable, and,
//! if asked to, for another channel (while pages are sent, that is the control channel, where the other side may say
//! that it gives up). Messages that may be skipped never end such a wait.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use memory::{GuestPages, Piece};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use zerocopy::FromBytes;

use crate::Cause;
use crate::control::Wake;
use crate::protocol::ProtocolError;
use crate::protocol::hello::{self, HelloBody, HelloHeader};
use crate::protocol::message::{Announced, FrameHeader, Message};

/// A message's memory grows by at most this many bytes at a time, as they arrive.
const READ_STEP: usize = 1 << 20;
/// How long a side that gives up waits for the other to have read why.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long the body of a message that is skipped may take to follow its header.
const OPTIONAL_BODY: Duration = Duration::from_secs(5);

/// How long to wait, and for what else.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    /// Readable: the move is cancelled on this side.
    pub(crate) wake: Option<&'a Wake>,
    /// A message comes on it: something more urgent.
    pub(crate) alarm: Option<&'a Channel>,
    /// Counts up whenever a wait ends because something moves.
    pub(crate) beat: Option<&'a AtomicU64>,
    /// How long.
    pub(crate) limit: Limit,
    /// What is going on, for messages: "sending memory".
    pub(crate) doing: &'static str,
}

impl Patience<'_> {
    /// Patience for something that a cancel does not interrupt.
    pub(crate) fn uninterrupted(limit: Limit, doing: &'static str) -> Self {
        Self {
            wake: None,
            alarm: None,
            beat: None,
            limit,
            doing,
        }
    }

    /// Whether the time is over or the move cancelled: for loops that may always find something to do.
    fn check(&self) -> Result<(), Stop> {
        if let Limit::Until(end, length) = self.limit
            && Instant::now() >= end
        {
            return Err(Stop::Timeout(length));
        }
        match self.wake.is_some_and(is_readable) {
            true => Err(Stop::Cancelled),
            false => Ok(()),
        }
    }
}

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// As long as something moves at least this often.
    Idle(Duration),
    /// Until then, from then on, this long in all: the point in time, and the length for messages.
    Until(Instant, Duration),
    /// As long as it takes.
    Forever,
}

impl Limit {
    /// Until `length` from now.
    pub(crate) fn within(length: Duration) -> Self {
        Self::Until(Instant::now() + length, length)
    }
}

/// Why a wait ended without its socket being ready.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Cancelled on this side.
    Cancelled,
    /// The alarm is readable.
    Alarm,
    /// Nothing came in time.
    Timeout(Duration),
    /// The connection ended or broke.
    Lost(io::Error),
    /// What came makes no sense.
    Protocol(ProtocolError),
}

impl Stop {
    /// As a cause of failure. An alarm is for the caller to look into first.
    pub(crate) fn into_cause(self, doing: &'static str) -> Cause {
        match self {
            Self::Cancelled => Cause::Cancelled,
            Self::Timeout(after) => Cause::Timeout { doing, after },
            Self::Lost(error) => Cause::ConnectionLost { doing, error },
            Self::Protocol(error) => Cause::Protocol(error),
            Self::Alarm => Cause::ConnectionLost {
                doing,
                error: io::Error::other("interrupted"),
            },
        }
    }
}

impl From<ProtocolError> for Stop {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    peer: String,
    /// Held while a message is skipped: several threads may have this channel as their alarm.
    skipping: Mutex<()>,
}

impl Channel {
    /// A TCP connection. Small messages leave at once, and a peer that vanishes is noticed.
    pub(crate) fn tcp(socket: OwnedFd, peer: String) -> Self {
        // None of these is needed for correctness: a host that refuses one is only slower, or slower to notice.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        let _ = sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10));
        let _ = sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5));
        let _ = sockopt::set_tcp_keepcnt(&socket, 4);
        let _ = sockopt::set_tcp_user_timeout(&socket, 30_000);
        Self::unix(socket, peer)
    }

    /// A unix connection.
    pub(crate) fn unix(socket: OwnedFd, peer: String) -> Self {
        Self {
            socket,
            peer,
            skipping: Mutex::new(()),
        }
    }

    /// Who is at the other end, for messages.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Waits until the socket is ready, or may have failed.
    fn wait(&self, events: PollFlags, patience: &Patience<'_>) -> Result<(), Stop> {
        let (end, length) = match patience.limit {
            Limit::Idle(length) => (Instant::now().checked_add(length), length),
            Limit::Until(end, length) => (Some(end), length),
            Limit::Forever => (None, Duration::MAX),
        };
        let limit = end.map_or(Limit::Forever, |end| Limit::Until(end, length));
        loop {
            let mut fds = Vec::with_capacity(3);
            fds.push(PollFd::new(&self.socket, events));
            let wake_at = fds.len();
            fds.extend(patience.wake.map(|wake| PollFd::new(wake, PollFlags::IN)));
            let alarm_at = fds.len();
            fds.extend(
                patience
                    .alarm
                    .map(|alarm| PollFd::new(alarm, PollFlags::IN)),
            );
            if !poll(&mut fds, limit)? {
                return Err(Stop::Timeout(length));
            }
            let ready = |at: Range<usize>| fds[at].iter().any(|fd| !fd.revents().is_empty());
            if ready(wake_at..alarm_at) {
                return Err(Stop::Cancelled);
            }
            if let Some(alarm) = patience.alarm.filter(|_| ready(alarm_at..fds.len())) {
                alarm.skip_optional()?;
            }
            if ready(0..wake_at) {
                if let Some(beat) = patience.beat {
                    beat.fetch_add(1, Ordering::Relaxed);
                }
                return Ok(());
            }
        }
    }

    /// Takes a message that may be skipped off a channel that is readable. Whatever else there is stays, and is
    /// [`Stop::Alarm`].
    pub(crate) fn skip_optional(&self) -> Result<(), Stop> {
        let _turn = self.skipping.lock().unwrap_or_else(PoisonError::into_inner);
        let mut header = [0; FrameHeader::SIZE];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.socket, &mut header, flags) {
            Ok((_, FrameHeader::SIZE)) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            _ => return Err(Stop::Alarm),
        }
        let header = FrameHeader::read_from_bytes(&header).expect("exactly its size");
        match header.check() {
            Ok(Announced::Skip(_)) => {
                let limit = Limit::within(OPTIONAL_BODY);
                self.receive_one(&Patience::uninterrupted(limit, "skipping a message"))
                    .map(drop)
            }
            _ => Err(Stop::Alarm),
        }
    }

    /// Whether there is something to read at this moment, be it the end.
    pub(crate) fn is_readable(&self) -> bool {
        is_readable(&self.socket)
    }

    /// Reads what is there, without waiting; `None` if nothing is, 0 at the end.
    pub(crate) fn read_some(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, count)) => Ok(Some(count)),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Fills `buffer`.
    pub(crate) fn read_exact(
        &self,
        buffer: &mut [u8],
        patience: &Patience<'_>,
    ) -> Result<(), Stop> {
        let mut rest = buffer;
        while !rest.is_empty() {
            match self.read_some(rest).map_err(Stop::Lost)? {
                Some(0) => return Err(Stop::Lost(closed())),
                Some(count) => rest = &mut rest[count..],
                None => self.wait(PollFlags::IN, patience)?,
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`. An error tells whether anything at all has left.
    pub(crate) fn write_all(
        &self,
        bytes: &[u8],
        patience: &Patience<'_>,
    ) -> Result<(), WriteError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let failed = |stop| WriteError {
                nothing_left: rest.len() == bytes.len(),
                stop,
            };
            match rustix::net::send(
                &self.socket,
                rest,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => rest = &rest[count..],
                Err(rustix::io::Errno::AGAIN) => {
                    self.wait(PollFlags::OUT, patience).map_err(failed)?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(Stop::Lost(error.into()))),
            }
        }
        Ok(())
    }

    /// Sends bytes and guest pages.
    pub(crate) fn send_pieces(
        &self,
        pieces: &[Piece<'_>],
        patience: &Patience<'_>,
    ) -> Result<(), Stop> {
        self.vectored(PollFlags::OUT, patience, |wait| {
            memory::send_vectored(self.socket.as_fd(), pieces, wait)
        })
    }

    /// Fills guest pages.
    pub(crate) fn receive_pages(
        &self,
        pages: &[GuestPages<'_>],
        patience: &Patience<'_>,
    ) -> Result<(), Stop> {
        self.vectored(PollFlags::IN, patience, |wait| {
            memory::recv_vectored(self.socket.as_fd(), pages, wait)
        })
    }

    fn vectored(
        &self,
        events: PollFlags,
        patience: &Patience<'_>,
        transfer: impl FnOnce(&mut dyn FnMut() -> io::Result<()>) -> io::Result<()>,
    ) -> Result<(), Stop> {
        let mut stopped = None;
        let result = transfer(&mut || {
            self.wait(events, patience).map_err(|stop| {
                stopped = Some(stop);
                io::Error::other("stopped")
            })
        });
        match (result, stopped) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(stop)) => Err(stop),
            (Err(error), None) => Err(Stop::Lost(error)),
        }
    }

    /// Sends a message.
    pub(crate) fn send(
        &self,
        message: &Message,
        patience: &Patience<'_>,
    ) -> Result<(), WriteError> {
        let bytes = message.encode().map_err(|error| WriteError {
            nothing_left: true,
            stop: Stop::Protocol(error),
        })?;
        self.write_all(&bytes, patience)
    }

    /// Receives the next message; skips those that may be.
    pub(crate) fn receive(&self, patience: &Patience<'_>) -> Result<Message, Stop> {
        loop {
            if let Some(message) = self.receive_one(patience)? {
                return Ok(message);
            }
            patience.check()?;
        }
    }

    /// Receives the next message, or `None` if it is one to be skipped.
    pub(crate) fn receive_one(&self, patience: &Patience<'_>) -> Result<Option<Message>, Stop> {
        let mut header = [0; FrameHeader::SIZE];
        self.read_exact(&mut header, patience)?;
        let header = FrameHeader::read_from_bytes(&header).expect("exactly its size");
        match header.check()? {
            Announced::Message(kind, length) => {
                let body = self.read_body(length, patience)?;
                Ok(Some(Message::decode(kind, &body)?))
            }
            Announced::Skip(length) => {
                self.read_body(length, patience)?;
                Ok(None)
            }
        }
    }

    /// Sends a hello.
    pub(crate) fn send_hello(&self, body: &HelloBody, patience: &Patience<'_>) -> Result<(), Stop> {
        let bytes = hello::encode(crate::protocol::VERSIONS, body)?;
        self.write_all(&bytes, patience).map_err(|error| error.stop)
    }

    /// Receives a hello's fixed part.
    pub(crate) fn receive_hello_header(
        &self,
        patience: &Patience<'_>,
    ) -> Result<HelloHeader, Stop> {
        let mut bytes = [0; HelloHeader::SIZE];
        self.read_exact(&mut bytes, patience)?;
        let header = HelloHeader::read_from_bytes(&bytes).expect("exactly its size");
        header.check()?;
        Ok(header)
    }

    /// Receives a hello's body.
    pub(crate) fn receive_hello_body(
        &self,
        header: &HelloHeader,
        patience: &Patience<'_>,
    ) -> Result<HelloBody, Stop> {
        let body = self.read_body(header.body_len.get(), patience)?;
        Ok(hello::decode_body(&body)?)
    }

    /// Reads `length` bytes, which have been checked against a cap, into memory that grows as they arrive.
    fn read_body(&self, length: u32, patience: &Patience<'_>) -> Result<Vec<u8>, Stop> {
        let length = length as usize;
        let mut body = Vec::new();
        while body.len() < length {
            let have = body.len();
            body.resize(length.min(have + READ_STEP), 0);
            self.read_exact(&mut body[have..], patience)?;
        }
        Ok(body)
    }

    /// Sends a last message. [`Channel::linger`] should follow.
    pub(crate) fn say_goodbye(&self, last: &Message) {
        let patience = Patience::uninterrupted(Limit::within(FAREWELL), "saying goodbye");
        if self.send(last, &patience).is_ok() {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// Gives the other side a moment to read the last message: closing at once, with something unread here, would make
    /// its kernel throw the message away.
    pub(crate) fn linger(self) {
        let patience = Patience::uninterrupted(Limit::within(FAREWELL), "saying goodbye");
        let mut sink = [0; 4096];
        while patience.check().is_ok() {
            match self.read_some(&mut sink) {
                Ok(Some(1..)) => {}
                Ok(None) if self.wait(PollFlags::IN, &patience).is_ok() => {}
                _ => return,
            }
        }
    }

    /// Ends all waits on the connection, on both sides.
    pub(crate) fn shut(&self) {
        // Fails only if it is closed already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A write that failed.
#[derive(Debug)]
pub(crate) struct WriteError {
    /// Not a byte was taken: the other side cannot have seen anything.
    pub(crate) nothing_left: bool,
    /// Why.
    pub(crate) stop: Stop,
}

/// Polls until something is ready (`true`) or the limit is reached.
pub(crate) fn poll(fds: &mut [PollFd<'_>], limit: Limit) -> Result<bool, Stop> {
    let end = match limit {
        Limit::Idle(length) => Instant::now().checked_add(length),
        Limit::Until(end, _) => Some(end),
        Limit::Forever => None,
    };
    loop {
        let timeout = end
            .map(|end| end.saturating_duration_since(Instant::now()))
            .and_then(|rest| Timespec::try_from(rest).ok());
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Stop::Lost(error.into())),
        }
    }
}

fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(ready) if ready > 0)
}

fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the other side closed the connection",
    )
}
