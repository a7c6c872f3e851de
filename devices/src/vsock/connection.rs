//! One connection between a port of the guest and a unix socket of the host.
//!
//! ```text
//!   host connects:  Greeting ─ "CONNECT port" ─► Requested ─ RESPONSE, "OK port" ─► Open
//!   guest connects: REQUEST ────────────────────────────────────────── RESPONSE ──► Open
//!   Open ── both directions over and all data with the host ──► RST, gone
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Bytes from the guest that wait for the host at most: what the guest is told as `buf_alloc`.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// Most bytes in a packet to the guest.
const MOST_PAYLOAD: usize = 64 << 10;
/// The longest greeting: `CONNECT 4294967295` and an end of line.
const GREETING_BYTES: usize = 32;

/// The connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// The host says what it wants, so far this.
    Greeting(Vec<u8>),
    /// The guest is asked; whether it has been told so.
    Requested { sent: bool },
    /// Data flows; whether the guest's request has been answered.
    Open { answered: bool },
}

/// A packet to the guest without what every one of a connection has.
pub(super) struct Outgoing {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) payload: Vec<u8>,
}

impl Outgoing {
    fn control(op: u16) -> Option<Self> {
        Some(Self {
            op,
            flags: 0,
            payload: Vec::new(),
        })
    }
}

pub(super) struct Connection {
    pub(super) stream: OwnedFd,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    state: State,
    /// From the guest, not yet with the host; at most [`BUFFER_BYTES`].
    buffer: VecDeque<u8>,
    /// Bytes that the host has taken, and what the guest knows of it. They wrap, like all that follow.
    forwarded: u32,
    announced: u32,
    /// Bytes that were sent to the guest, and what it has said of its room.
    sent: u32,
    peer_room: u32,
    peer_forwarded: u32,
    /// The guest was asked for room, and has not answered.
    asked: bool,
    /// The guest is to be told of room.
    tell_room: bool,
    /// Reading may bring something.
    readable: bool,
    /// The host has closed its side for sending, or both.
    host_ended: bool,
    host_gone: bool,
    tell_end: bool,
    /// The guest sends, or takes, no more.
    guest_ended: bool,
    guest_deaf: bool,
}

impl Connection {
    /// The host has connected.
    pub(super) fn from_host(stream: OwnedFd) -> Self {
        Self::new(stream, State::Greeting(Vec::new()), 0, 0)
    }

    /// The guest has connected by this request.
    pub(super) fn from_guest(stream: OwnedFd, request: &Header) -> Self {
        let state = State::Open { answered: false };
        let mut new = Self::new(stream, state, request.dst_port, request.src_port);
        new.credit(request);
        new
    }

    fn new(stream: OwnedFd, state: State, host_port: u32, guest_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            state,
            buffer: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_room: 0,
            peer_forwarded: 0,
            asked: false,
            tell_room: false,
            readable: true,
            host_ended: false,
            host_gone: false,
            tell_end: false,
            guest_ended: false,
            guest_deaf: false,
        }
    }

    pub(super) fn is_greeting(&self) -> bool {
        matches!(self.state, State::Greeting(_))
    }

    /// Whether the guest knows of it.
    pub(super) fn is_known(&self) -> bool {
        !matches!(
            self.state,
            State::Greeting(_) | State::Requested { sent: false }
        )
    }

    /// The host's socket has something to read, or has hung up.
    pub(super) fn host_ready(&mut self, readable: bool, gone: bool) -> Result<(), Broken> {
        self.readable |= readable;
        self.host_gone |= gone;
        match self.state {
            State::Greeting(_) | State::Requested { .. } if gone => Err(Broken),
            State::Greeting(_) | State::Requested { .. } => Ok(()),
            State::Open { .. } => self.flush(),
        }
    }

    /// Reads the greeting as far as it has come; the port that it asks for.
    pub(super) fn greet(&mut self) -> Result<Option<u32>, Broken> {
        let State::Greeting(line) = &mut self.state else {
            return Ok(None);
        };
        loop {
            // Byte by byte: what follows the line is data.
            let mut byte = [0];
            match recv(&self.stream, &mut byte, RecvFlags::empty()) {
                Ok((0, _)) => return Err(Broken),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) if line.len() < GREETING_BYTES => line.push(byte[0]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return Err(Broken),
            }
        }
        let port = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT ")?.trim().parse().ok());
        port.map(Some).ok_or(Broken)
    }

    /// The guest is to be asked whether it listens at `guest_port`.
    pub(super) fn request(&mut self, host_port: u32, guest_port: u32) {
        (self.host_port, self.guest_port) = (host_port, guest_port);
        self.state = State::Requested { sent: false };
    }

    /// A packet of the guest that neither requests nor resets.
    pub(super) fn packet(&mut self, header: &Header, payload: &[u8]) -> Result<(), Broken> {
        self.credit(header);
        match (header.op, &self.state) {
            (op::RESPONSE, State::Requested { sent: true }) => {
                self.state = State::Open { answered: true };
                let answer = format!("OK {}\n", self.host_port);
                // Nothing was sent on this socket yet, so there is room.
                match send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL) {
                    Ok(count) if count == answer.len() => Ok(()),
                    _ => Err(Broken),
                }
            }
            (op::RW, State::Open { .. }) if !self.guest_ended => {
                if self.buffer.len() + payload.len() > BUFFER_BYTES as usize {
                    return Err(Broken);
                }
                self.buffer.extend(payload);
                self.flush()
            }
            (op::SHUTDOWN, State::Open { .. }) => {
                self.guest_deaf |= header.flags & SHUTDOWN_RECEIVE != 0;
                self.guest_ended |= header.flags & SHUTDOWN_SEND != 0;
                self.flush()
            }
            (op::CREDIT_UPDATE, State::Open { .. }) => Ok(()),
            (op::CREDIT_REQUEST, State::Open { .. }) => {
                self.tell_room = true;
                Ok(())
            }
            _ => Err(Broken),
        }
    }

    /// Both directions are over, and the host has all data.
    pub(super) fn is_over(&self) -> bool {
        self.buffer.is_empty()
            && self.guest_ended
            && (self.guest_deaf || self.host_ended && !self.tell_end)
            && self.state == State::Open { answered: true }
    }

    /// The next packet for the guest, with at most `room` bytes of data; none if there is nothing to say now.
    pub(super) fn next(&mut self, room: usize) -> Result<Option<Outgoing>, Broken> {
        match &mut self.state {
            State::Greeting(_) | State::Requested { sent: true } => return Ok(None),
            State::Requested { sent } => {
                *sent = true;
                return Ok(Outgoing::control(op::REQUEST));
            }
            State::Open { answered: true } => {}
            State::Open { answered } => {
                *answered = true;
                return Ok(Outgoing::control(op::RESPONSE));
            }
        }
        if let Some(outgoing) = self.data(room)? {
            return Ok(Some(outgoing));
        }
        if std::mem::take(&mut self.tell_end) {
            let flags = match self.host_gone {
                true => SHUTDOWN_RECEIVE | SHUTDOWN_SEND,
                false => SHUTDOWN_SEND,
            };
            return Ok(Some(Outgoing {
                op: op::SHUTDOWN,
                flags,
                payload: Vec::new(),
            }));
        }
        Ok(match self.tell_room {
            true => Outgoing::control(op::CREDIT_UPDATE),
            false => None,
        })
    }

    /// What every packet of this connection says of this side's room.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.tell_room = false;
        self.announced = self.forwarded;
        (BUFFER_BYTES, self.forwarded)
    }

    /// Data from the host, as far as the guest has room.
    fn data(&mut self, room: usize) -> Result<Option<Outgoing>, Broken> {
        if !self.readable || self.host_ended || self.guest_deaf {
            return Ok(None);
        }
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        let credit = self.peer_room.saturating_sub(under_way) as usize;
        if credit == 0 {
            return Ok(match std::mem::replace(&mut self.asked, true) {
                true => None,
                false => Outgoing::control(op::CREDIT_REQUEST),
            });
        }
        let mut payload = vec![0; credit.min(room).min(MOST_PAYLOAD)];
        if payload.is_empty() {
            return Ok(None);
        }
        match recv(&self.stream, &mut payload[..], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.host_ended = true;
                self.tell_end = true;
                Ok(None)
            }
            Ok((count, _)) => {
                payload.truncate(count);
                self.sent = self.sent.wrapping_add(count as u32);
                Ok(Some(Outgoing {
                    op: op::RW,
                    flags: 0,
                    payload,
                }))
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(None)
            }
            Err(Errno::INTR) => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// What a packet says of the guest's room.
    fn credit(&mut self, header: &Header) {
        self.peer_room = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        self.asked = false;
    }

    /// Gives the host what it takes.
    fn flush(&mut self) -> Result<(), Broken> {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match send(&self.stream, front, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken),
            }
        }
        if self.forwarded.wrapping_sub(self.announced) >= BUFFER_BYTES / 4 {
            self.tell_room = true;
        }
        if self.guest_ended && self.buffer.is_empty() {
            // It may have gone already.
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
        Ok(())
    }
}
