//! One connection: waits that can be woken, messages, pages.
//!
//! No call here blocks by itself: each waits in `poll` for its socket, for the descriptor that a cancel makes readable, and,
//! if asked to, for one more descriptor (while pages are sent, that is the control channel, where the other side may say
//! that it gives up).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

/// How long to wait, and for what else.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    /// Readable: the move is cancelled on this side.
    pub(crate) wake: Option<&'a Wake>,
    /// Readable: something more urgent has come.
    pub(crate) alarm: Option<BorrowedFd<'a>>,
    /// How long.
    pub(crate) limit: Limit,
    /// What is going on, for messages: "sending memory".
    pub(crate) doing: &'static str,
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
        Self { socket, peer }
    }

    /// A unix connection.
    pub(crate) fn unix(socket: OwnedFd, peer: String) -> Self {
        Self { socket, peer }
    }

    /// Who is at the other end, for messages.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Waits until the socket is ready, or may have failed.
    fn wait(&self, events: PollFlags, patience: &Patience<'_>) -> Result<(), Stop> {
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(&self.socket, events));
        let wake_at = patience.wake.map(|wake| {
            fds.push(PollFd::new(wake, PollFlags::IN));
            fds.len() - 1
        });
        let alarm_at = patience.alarm.map(|alarm| {
            fds.push(PollFd::from_borrowed_fd(alarm, PollFlags::IN));
            fds.len() - 1
        });
        let length = match patience.limit {
            Limit::Idle(length) | Limit::Until(_, length) => length,
            Limit::Forever => Duration::MAX,
        };
        if !poll(&mut fds, patience.limit)? {
            return Err(Stop::Timeout(length));
        }
        let ready = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
        if ready(wake_at) {
            Err(Stop::Cancelled)
        } else if ready(alarm_at) {
            Err(Stop::Alarm)
        } else {
            Ok(())
        }
    }

    /// Waits until there is something to read, be it the end.
    pub(crate) fn wait_readable(&self, patience: &Patience<'_>) -> Result<(), Stop> {
        self.wait(PollFlags::IN, patience)
    }

    /// Whether there is something to read at this moment, be it the end.
    pub(crate) fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(ready) if ready > 0)
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
            let mut header = [0; FrameHeader::SIZE];
            self.read_exact(&mut header, patience)?;
            let header = FrameHeader::read_from_bytes(&header).expect("exactly its size");
            match header.check()? {
                Announced::Message(kind, length) => {
                    let body = self.read_body(length, patience)?;
                    return Ok(Message::decode(kind, &body)?);
                }
                Announced::Skip(length) => drop(self.read_body(length, patience)?),
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

    /// Ends the connection after a last message, giving the other side a moment to read it: closing at once, with
    /// something unread here, would make its kernel throw the message away.
    pub(crate) fn farewell(self, last: &Message) {
        let patience = Patience {
            wake: None,
            alarm: None,
            limit: Limit::within(FAREWELL),
            doing: "saying goodbye",
        };
        if self.send(last, &patience).is_err() {
            return;
        }
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        let mut sink = [0; 4096];
        loop {
            match self.read_some(&mut sink) {
                Ok(Some(1..)) => {}
                Ok(None) if self.wait(PollFlags::IN, &patience).is_ok() => {}
                _ => return,
            }
        }
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

fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the other side closed the connection",
    )
}
