//! The conversation with a back end: one request after the other, each with a limit of time.
//!
//! ```text
//!   tell ── request, need_reply if REPLY_ACK ──►        ask ── request ──►
//!        ◄── 0, or why not ────────────────────             ◄── reply ────
//! ```
//!
//! The messages are the `vhost` crate's. Its front end is not used: it tries again for ever when a socket's time is up, so a silent back
//! end would stop the machine, and it takes only one of the three answers to SET_LOG_BASE that are in use (none, the address, the log).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use super::error::VhostError;

/// Request, flags and length, 32 bits each.
const HEADER: usize = 12;
/// Bits 0 and 1 of the flags: the protocol's version.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Most file descriptors of a message.
const MAX_FDS: usize = 8;

/// How long one answer may take, if nothing else is said: a busy host may let a back end wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// What came back.
#[derive(Debug)]
pub(super) struct Reply {
    request: FrontendReq,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    pub(super) fn nonsense(&self, what: &'static str) -> VhostError {
        VhostError::Nonsense {
            request: self.request,
            what,
        }
    }

    pub(super) fn u64(&self) -> Result<u64, VhostError> {
        match self.body.as_slice().try_into() {
            Ok(bytes) => Ok(u64::from_ne_bytes(bytes)),
            Err(_) => Err(self.nonsense("it is not 8 bytes long")),
        }
    }
}

/// A connection to a back end.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    /// REPLY_ACK was agreed on.
    pub(super) acknowledges: bool,
    pub(super) patience: Duration,
}

impl Connection {
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Self, VhostError> {
        let failed = |error: Errno| VhostError::Connect {
            path: path.to_owned(),
            source: error.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let until = Instant::now() + patience;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Ok(Self::new(socket.into(), patience)),
                // Others wait there too.
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// On a socket that does not block.
    pub(super) fn new(socket: UnixStream, patience: Duration) -> Self {
        Self {
            socket,
            acknowledges: false,
            patience,
        }
    }

    /// The socket, to see its end.
    pub(super) fn socket(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// A request that has no answer of its own. The back end has carried it out on return if it acknowledges; else it will before the next
    /// request.
    pub(super) fn tell(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), VhostError> {
        let until = Instant::now() + self.patience;
        if !self.acknowledges {
            return self.send(request, VERSION, body, fds, until);
        }
        self.send(request, VERSION | NEED_REPLY, body, fds, until)?;
        match self.receive(request, until)?.u64()? {
            0 => Ok(()),
            code => Err(VhostError::Refused {
                request,
                code: code as i64,
            }),
        }
    }

    /// A request with an answer.
    pub(super) fn ask(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, VhostError> {
        self.ask_within(self.patience, request, body, fds)
    }

    pub(super) fn ask_within(
        &mut self,
        patience: Duration,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, VhostError> {
        let until = Instant::now() + patience;
        self.send(request, VERSION, body, fds, until)?;
        self.receive(request, until)
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), VhostError> {
        let mut message = Vec::with_capacity(HEADER + body.len());
        for word in [request as u32, flags, body.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(body);
        let mut sent = 0;
        while sent < message.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(VhostError::Host(io::Error::from(
                    io::ErrorKind::InvalidInput,
                )));
            }
            let part = [IoSlice::new(&message[sent..])];
            match rustix::net::sendmsg(&self.socket, &part, &mut control, SendFlags::NOSIGNAL) {
                Ok(len) => sent += len,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, request, until)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(VhostError::Gone),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn receive(&self, request: FrontendReq, until: Instant) -> Result<Reply, VhostError> {
        let mut reply = Reply {
            request,
            body: Vec::new(),
            fds: Vec::new(),
        };
        let mut header = [0; HEADER];
        self.fill(&mut header, &mut reply.fds, request, until)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        let (code, flags, len) = (word(0), word(4), word(8) as usize);
        if code != request as u32 {
            return Err(reply.nonsense("it answers something else"));
        }
        if flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
            return Err(reply.nonsense("it is not marked as an answer"));
        }
        if len > MAX_MSG_SIZE {
            return Err(reply.nonsense("it is too long"));
        }
        let mut body = vec![0; len];
        self.fill(&mut body, &mut reply.fds, request, until)?;
        reply.body = body;
        Ok(reply)
    }

    fn fill(
        &self,
        into: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        request: FrontendReq,
        until: Instant,
    ) -> Result<(), VhostError> {
        let mut done = 0;
        while done < into.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(&mut into[done..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.socket, &mut part, &mut control, flags) {
                Ok(received) if received.bytes == 0 => return Err(VhostError::Gone),
                Ok(received) => {
                    done += received.bytes;
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(came) = message {
                            let room = MAX_FDS - fds.len().min(MAX_FDS);
                            fds.extend(came.take(room));
                        }
                    }
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, request, until)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(VhostError::Gone),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait(
        &self,
        what: PollFlags,
        request: FrontendReq,
        until: Instant,
    ) -> Result<(), VhostError> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(VhostError::Silent(request));
        }
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), what)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
