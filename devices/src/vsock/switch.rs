//! All connections, and what is to be said to the guest.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{Broken, Connection};
use super::packet::{HOST_CID, Header, STREAM, op};
use crate::endpoint::Listener;

/// Most connections at once, those that have not said what they want among them.
pub(super) const MOST_CONNECTIONS: usize = 256;
/// Most resets that wait for the guest's buffers; beyond, the guest has to wait until its requests time out.
const MOST_RESETS: usize = 256;
/// The first of the host's ports that are given to connections from the host.
const FIRST_PORT: u32 = 1 << 30;
/// The listener's mark in the epoll instance; connections have higher ones.
const LISTENER: u64 = 0;

/// The host's ports and the guest's.
type Ports = (u32, u32);

pub(super) struct Switch {
    guest_cid: u64,
    path: PathBuf,
    listener: Listener,
    connections: BTreeMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    resets: VecDeque<Header>,
    next_mark: u64,
    next_port: u32,
    /// Whose turn was last.
    turn: u64,
}

/// Edges, so that what nobody wants to read now does not keep a thread awake.
const EDGES: epoll::EventFlags = epoll::EventFlags::IN
    .union(epoll::EventFlags::OUT)
    .union(epoll::EventFlags::RDHUP)
    .union(epoll::EventFlags::ET);

impl Switch {
    pub(super) fn new(
        guest_cid: u64,
        path: PathBuf,
        listener: Listener,
        events: &OwnedFd,
    ) -> Result<Self, Errno> {
        let data = epoll::EventData::new_u64(LISTENER);
        epoll::add(events, &listener.fd, data, EDGES)?;
        Ok(Self {
            guest_cid,
            path,
            listener,
            connections: BTreeMap::new(),
            by_ports: HashMap::new(),
            resets: VecDeque::new(),
            next_mark: LISTENER + 1,
            next_port: FIRST_PORT,
            turn: 0,
        })
    }

    /// Ends all connections without a word to the guest.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.resets.clear();
    }

    /// Takes a packet from the guest.
    pub(super) fn packet(&mut self, events: &OwnedFd, header: &Header, payload: &[u8]) {
        let ports = (header.dst_port, header.src_port);
        let ours =
            header.src_cid == self.guest_cid && header.dst_cid == HOST_CID && header.kind == STREAM;
        let known = self.by_ports.get(&ports).copied().filter(|_| ours);
        match (header.op, known) {
            (op::RST, Some(mark)) => self.forget(mark),
            (op::RST, None) => {}
            (op::REQUEST, None) if ours => {
                if self.open(events, header).is_err() {
                    self.reset(header.reset());
                }
            }
            (_, None) => self.reset(header.reset()),
            (op::REQUEST, Some(mark)) => self.break_off(mark),
            (_, Some(mark)) => {
                let Some(connection) = self.connections.get_mut(&mark) else {
                    return;
                };
                let result = connection.packet(header, payload);
                self.settle(mark, result);
            }
        }
    }

    /// Takes an event of the epoll instance.
    pub(super) fn host_ready(&mut self, events: &OwnedFd, mark: u64, flags: epoll::EventFlags) {
        if mark == LISTENER {
            // Until there is none any more, or none can be taken.
            while let Ok(stream) = self.listener.accept() {
                // A connection too many is closed.
                let _ = self.add(events, Connection::from_host(stream));
            }
            return;
        }
        let readable = flags
            .intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP);
        let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        let Some(connection) = self.connections.get_mut(&mark) else {
            return;
        };
        let result = if connection.is_greeting() {
            connection.greet().map(|port| {
                if let Some(guest_port) = port {
                    self.request(mark, guest_port);
                }
            })
        } else {
            connection.host_ready(readable, gone)
        };
        self.settle(mark, result);
    }

    /// The next packet for the guest, with room for so much data.
    pub(super) fn next(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some(header) = self.resets.pop_front() {
            return Some((header, Vec::new()));
        }
        let after = (Bound::Excluded(self.turn), Bound::Unbounded);
        let marks: Vec<u64> = self
            .connections
            .range(after)
            .map(|(mark, _)| *mark)
            .collect();
        let before = self.connections.range(..=self.turn).map(|(mark, _)| *mark);
        for mark in marks.into_iter().chain(before.collect::<Vec<_>>()) {
            let Some(connection) = self.connections.get_mut(&mark) else {
                continue;
            };
            match connection.next(room) {
                Ok(Some(outgoing)) => {
                    self.turn = mark;
                    let (buf_alloc, fwd_cnt) = connection.announce();
                    let header = Header {
                        src_cid: HOST_CID,
                        dst_cid: self.guest_cid,
                        src_port: connection.host_port,
                        dst_port: connection.guest_port,
                        len: outgoing.payload.len() as u32,
                        kind: STREAM,
                        op: outgoing.op,
                        flags: outgoing.flags,
                        buf_alloc,
                        fwd_cnt,
                    };
                    self.settle(mark, Ok(()));
                    return Some((header, outgoing.payload));
                }
                Ok(None) => self.settle(mark, Ok(())),
                Err(broken) => self.settle(mark, Err(broken)),
            }
        }
        self.resets.pop_front().map(|header| (header, Vec::new()))
    }

    /// Connects the guest to the host's socket for a port.
    fn open(&mut self, events: &OwnedFd, request: &Header) -> Result<(), Errno> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", request.dst_port));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // It does not wait: a listener with too many clients refuses.
        connect(&stream, &SocketAddrUnix::new(path)?)?;
        let ports = (request.dst_port, request.src_port);
        let mark = self.add(events, Connection::from_guest(stream, request))?;
        self.by_ports.insert(ports, mark);
        Ok(())
    }

    fn add(&mut self, events: &OwnedFd, connection: Connection) -> Result<u64, Errno> {
        if self.connections.len() >= MOST_CONNECTIONS {
            return Err(Errno::MFILE);
        }
        let mark = self.next_mark;
        let data = epoll::EventData::new_u64(mark);
        epoll::add(events, connection.stream.as_fd(), data, EDGES)?;
        self.next_mark += 1;
        self.connections.insert(mark, connection);
        Ok(mark)
    }

    /// Gives a connection from the host a port of its own, and has the guest asked.
    fn request(&mut self, mark: u64, guest_port: u32) {
        let mut port = self.next_port;
        // There are far more ports than connections.
        while self.by_ports.contains_key(&(port, guest_port)) {
            port = following(port);
        }
        self.next_port = following(port);
        if let Some(connection) = self.connections.get_mut(&mark) {
            connection.request(port, guest_port);
            self.by_ports.insert((port, guest_port), mark);
        }
    }

    /// Ends a connection that is broken or over.
    fn settle(&mut self, mark: u64, result: Result<(), Broken>) {
        let over = self.connections.get(&mark).is_some_and(Connection::is_over);
        if over || result.is_err() {
            self.break_off(mark);
        }
    }

    /// Ends a connection, and tells the guest if it knows of it.
    fn break_off(&mut self, mark: u64) {
        if let Some(connection) = self
            .connections
            .get(&mark)
            .filter(|connection| connection.is_known())
        {
            self.reset(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: connection.host_port,
                dst_port: connection.guest_port,
                kind: STREAM,
                op: op::RST,
                ..Header::default()
            });
        }
        self.forget(mark);
    }

    fn forget(&mut self, mark: u64) {
        if let Some(connection) = self.connections.remove(&mark) {
            let ports = (connection.host_port, connection.guest_port);
            if self.by_ports.get(&ports) == Some(&mark) {
                self.by_ports.remove(&ports);
            }
        }
    }

    fn reset(&mut self, header: Header) {
        if self.resets.len() < MOST_RESETS {
            self.resets.push_back(header);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }
}

fn following(port: u32) -> u32 {
    port.checked_add(1)
        .filter(|port| *port != u32::MAX)
        .unwrap_or(FIRST_PORT)
}
