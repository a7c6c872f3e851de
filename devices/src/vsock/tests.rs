//! vsock with a driver's rings and real sockets.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::connection::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::switch::MOST_CONNECTIONS;
use super::*;
use crate::virtio::testing::Driver;

/// Far more than anything here takes; it only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(30);
const CID: u64 = 7;
/// Data that a buffer of the guest takes.
const ROOM: u32 = 4096;

struct Setup {
    dir: tempfile::TempDir,
    device: Vsock,
    rx: Driver,
    tx: Driver,
    event: Driver,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().expect("a directory");
    Setup {
        device: Vsock::new(CID, dir.path().join("v")).expect("a socket"),
        dir,
        rx: Driver::new(0),
        tx: Driver::new(1),
        event: Driver::new(2),
    }
}

impl Setup {
    fn start(self) -> Self {
        for queue in [self.rx.queue(), self.tx.queue(), self.event.queue()] {
            self.device.start_queue(queue).expect("a thread");
        }
        self
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).expect("a socket")
    }

    /// Sends a packet as the guest.
    fn send(&mut self, ports: Ports, op: u16, flags: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: data.len() as u32,
            kind: 1,
            op,
            flags,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        self.send_raw(&header, data);
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let head = self.tx.offer(&[&header.encode(), data], &[]);
        assert_eq!(self.tx.wait_used(), (head, 0));
    }

    /// Takes a packet as the guest.
    fn take(&mut self) -> (Header, Vec<u8>) {
        let head = self.rx.offer(&[], &[HEADER_BYTES as u32, ROOM]);
        let (used, len) = self.rx.wait_used();
        assert_eq!(used, head);
        let bytes = self.rx.written(head);
        let header = Header::decode(bytes[..HEADER_BYTES].try_into().expect("a header"));
        assert_eq!(len, HEADER_BYTES as u32 + header.len);
        assert_eq!((header.dst_cid, header.kind), (CID, 1));
        (header, bytes[HEADER_BYTES..len as usize].to_vec())
    }

    fn take_op(&mut self, ports: Ports, op: u16) -> Header {
        let (header, data) = self.take();
        assert_eq!(
            (header.src_cid, header.src_port, header.dst_port, header.op),
            (HOST_CID, ports.host, ports.guest, op)
        );
        assert_eq!(data, b"");
        header
    }

    /// A connection from the guest.
    fn connect_out(&mut self, ports: Ports) -> UnixStream {
        let listener = self.listen(ports.host);
        self.send(ports, op::REQUEST, 0, b"");
        let header = self.take_op(ports, op::RESPONSE);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 0));
        patient(listener.accept().expect("a client").0)
    }
}

#[derive(Clone, Copy)]
struct Ports {
    host: u32,
    guest: u32,
}

const PORTS: Ports = Ports {
    host: 52,
    guest: 1000,
};

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(LIMIT)).expect("a valid time");
    stream
}

fn connect(path: &Path) -> UnixStream {
    patient(UnixStream::connect(path).expect("it listens"))
}

fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("so much comes");
    bytes
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < until, "waited too long");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn the_guest_connects_and_data_flows_both_ways() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    s.send(PORTS, op::RW, 0, b"from the guest");
    assert_eq!(read(&mut peer, 14), b"from the guest");
    peer.write_all(b"from the host").expect("room");
    let (header, data) = s.take();
    assert_eq!((header.op, &data[..]), (op::RW, &b"from the host"[..]));
    assert_eq!(header.fwd_cnt, 14);
    // The guest ends: the host sees the end, the guest a reset.
    s.send(PORTS, op::SHUTDOWN, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, b"");
    s.take_op(PORTS, op::RST);
    assert_eq!(peer.read(&mut [0]).expect("an end"), 0);
    assert_eq!(s.device.shared.switch().len(), 0);
}

#[test]
fn the_host_connects_by_a_greeting() {
    let mut s = setup().start();
    let mut peer = connect(&s.path());
    // What follows the line is data already.
    peer.write_all(b"CONNECT 1024\nearly").expect("room");
    let (request, _) = s.take();
    let ports = Ports {
        host: request.src_port,
        guest: 1024,
    };
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 1024));
    s.send(ports, op::RESPONSE, 0, b"");
    let answer = format!("OK {}\n", ports.host);
    assert_eq!(read(&mut peer, answer.len()), answer.as_bytes());
    let (header, data) = s.take();
    assert_eq!((header.op, &data[..]), (op::RW, &b"early"[..]));
    // The host ends: the guest is told so, and resets.
    drop(peer);
    let end = s.take_op(ports, op::SHUTDOWN);
    assert_ne!(end.flags & SHUTDOWN_SEND, 0);
    s.send(ports, op::RST, 0, b"");
    assert_eq!(s.device.shared.switch().len(), 0);
}

#[test]
fn a_guest_that_does_not_listen_ends_the_hosts_connection() {
    let mut s = setup().start();
    let mut peer = connect(&s.path());
    peer.write_all(b"CONNECT 9\n").expect("room");
    let (request, _) = s.take();
    let ports = Ports {
        host: request.src_port,
        guest: 9,
    };
    s.send(ports, op::RST, 0, b"");
    assert_eq!(peer.read(&mut [0]).expect("an end"), 0);
}

#[test]
fn greetings_that_make_no_sense_end_the_connection() {
    let s = setup().start();
    let long = [b'1'; 100];
    for greeting in [
        &b"HELLO\n"[..],
        b"CONNECT\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"\n",
        b"CONNECT \xff\n",
        &long,
    ] {
        let mut peer = connect(&s.path());
        peer.write_all(greeting).expect("room");
        // Closed with unread data it is a reset, otherwise an end.
        assert!(!matches!(peer.read(&mut [0]), Ok(1)), "{greeting:?}");
    }
    wait_until(|| s.device.shared.switch().len() == 0);
}

#[test]
fn what_is_unknown_is_reset() {
    let mut s = setup().start();
    let ops = [
        op::REQUEST,
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        99,
    ];
    for op in ops {
        s.send(PORTS, op, 0, b"");
        s.take_op(PORTS, op::RST);
    }
    // Not from this guest, not for the host, not a stream: though somebody listens. A reset is not answered.
    let _listener = s.listen(PORTS.host);
    s.send(PORTS, op::RST, 0, b"");
    let request = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: 52,
        kind: 1,
        op: op::REQUEST,
        ..Header::default()
    };
    for bad in [
        Header {
            src_cid: 8,
            ..request
        },
        Header {
            dst_cid: 9,
            ..request
        },
        Header { kind: 2, ..request },
    ] {
        s.send_raw(&bad, b"");
        let head = s.rx.offer(&[], &[HEADER_BYTES as u32]);
        assert_eq!(s.rx.wait_used(), (head, HEADER_BYTES as u32));
        let bytes = s.rx.written(head);
        let header = Header::decode(bytes[..].try_into().expect("a header"));
        assert_eq!(header, bad.reset());
    }
    assert_eq!(s.device.shared.switch().len(), 0);
}

#[test]
fn a_second_request_or_too_much_data_breaks_the_connection() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    s.send(PORTS, op::REQUEST, 0, b"");
    s.take_op(PORTS, op::RST);
    assert_eq!(peer.read(&mut [0]).expect("an end"), 0);

    let ports = Ports {
        host: 53,
        guest: 1000,
    };
    let _peer = s.connect_out(ports);
    // The peer does not read: its socket takes some, then 64 KiB wait, and what is beyond was never offered.
    let chunk = [7; 16 << 10];
    for _ in 0..200 {
        s.send(ports, op::RW, 0, &chunk);
        if s.device.shared.switch().len() == 0 {
            break;
        }
    }
    assert_eq!(s.device.shared.switch().len(), 0);
    wait_until(|| s.take().0.op == op::RST);
}

#[test]
fn the_guest_hears_of_room_when_the_host_has_taken_data() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    let data = [1; 16 << 10];
    s.send(PORTS, op::RW, 0, &data);
    read(&mut peer, data.len());
    let update = s.take_op(PORTS, op::CREDIT_UPDATE);
    assert_eq!(update.fwd_cnt, 16 << 10);
    s.send(PORTS, op::CREDIT_REQUEST, 0, b"");
    s.take_op(PORTS, op::CREDIT_UPDATE);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    let room = |buf_alloc, fwd_cnt| Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        kind: 1,
        op: op::CREDIT_UPDATE,
        buf_alloc,
        fwd_cnt,
        ..Header::default()
    };
    s.send_raw(&room(10, 0), b"");
    peer.write_all(b"0123456789abcdef").expect("room");
    assert_eq!(s.take().1, b"0123456789");
    // It is asked for room, once.
    s.take_op(PORTS, op::CREDIT_REQUEST);
    s.send_raw(&room(10, 4), b"");
    assert_eq!(s.take().1, b"abcd");
    s.take_op(PORTS, op::CREDIT_REQUEST);
    // Less than nothing is nothing.
    s.send_raw(&room(1, 0), b"");
    s.take_op(PORTS, op::CREDIT_REQUEST);
    s.send_raw(&room(10, 14), b"");
    assert_eq!(s.take().1, b"ef");
}

#[test]
fn a_megabyte_each_way_arrives_whole() {
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    let mut reader = peer.try_clone().expect("a socket");
    let thread = std::thread::spawn(move || read(&mut reader, 1 << 20));
    let mut room = BUFFER_BYTES as usize;
    let mut rest = &sent[..];
    while !rest.is_empty() {
        while room < 5000.min(rest.len()) {
            let done = (1 << 20) - rest.len();
            let update = s.take_op(PORTS, op::CREDIT_UPDATE);
            room = BUFFER_BYTES as usize - (done - update.fwd_cnt as usize);
        }
        let part = rest.len().min(5000);
        s.send(PORTS, op::RW, 0, &rest[..part]);
        room -= part;
        rest = &rest[part..];
    }
    assert!(thread.join().expect("no panic") == sent);

    let bytes = sent.clone();
    let thread = std::thread::spawn(move || peer.write_all(&bytes).map(|()| peer));
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let (header, data) = s.take();
        got.extend(data);
        match header.op {
            op::RW | op::CREDIT_UPDATE => {}
            other => panic!("packet of kind {other}"),
        }
    }
    assert!(got == sent);
    thread.join().expect("no panic").expect("all was taken");
}

#[test]
fn each_side_may_end_alone() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    peer.shutdown(std::net::Shutdown::Write).expect("open");
    assert_eq!(s.take_op(PORTS, op::SHUTDOWN).flags, SHUTDOWN_SEND);
    s.send(PORTS, op::RW, 0, b"still here");
    assert_eq!(read(&mut peer, 10), b"still here");
    s.send(PORTS, op::SHUTDOWN, SHUTDOWN_SEND, b"");
    s.take_op(PORTS, op::RST);
    assert_eq!(peer.read(&mut [0]).expect("an end"), 0);
}

#[test]
fn connections_are_bounded() {
    let mut s = setup().start();
    let peers: Vec<_> = (0..MOST_CONNECTIONS).map(|_| connect(&s.path())).collect();
    wait_until(|| s.device.shared.switch().len() == MOST_CONNECTIONS);
    let mut one_more = connect(&s.path());
    assert_eq!(one_more.read(&mut [0]).expect("an end"), 0);
    let _listener = s.listen(PORTS.host);
    s.send(PORTS, op::REQUEST, 0, b"");
    s.take_op(PORTS, op::RST);
    drop(peers);
    wait_until(|| s.device.shared.switch().len() == 0);
}

#[test]
fn a_pause_keeps_connections_and_a_restore_resets_them() {
    let mut s = setup().start();
    let mut peer = s.connect_out(PORTS);
    let events = s.event.offer(&[], &[8]);
    let queues: Vec<_> = (0..3)
        .filter_map(|index| s.device.stop_queue(index))
        .collect();
    assert_eq!(queues.len(), 3);
    let saved = s.device.save();
    peer.write_all(b"later").expect("room");
    for queue in queues {
        s.device.start_queue(queue).expect("a thread");
    }
    assert_eq!(s.take().1, b"later");
    assert_eq!(s.event.used(), None);

    let queues: Vec<_> = (0..3)
        .filter_map(|index| s.device.stop_queue(index))
        .collect();
    s.device.restore(&saved).expect("own state");
    assert_eq!(peer.read(&mut [0]).expect("an end"), 0);
    for queue in queues {
        s.device.start_queue(queue).expect("a thread");
    }
    assert_eq!(s.event.wait_used(), (events, 4));
    assert_eq!(s.event.written(events)[..4], [0; 4]);
    // What the guest still sends on the old connection is reset. No second event comes.
    s.event.offer(&[], &[8]);
    s.send(PORTS, op::RW, 0, b"old");
    s.take_op(PORTS, op::RST);
    s.device.stop_queue(2).expect("it ran");
    assert_eq!(s.event.used(), None);
    for bad in [&[][..], &[0xc1], &[0xdf, 0xff, 0xff, 0xff, 0xff]] {
        s.device.restore(bad).expect_err("refused");
    }
}

#[test]
fn packets_that_cannot_be_need_a_reset() {
    let too_long = Header {
        len: 100,
        ..Header::default()
    };
    for bytes in [&[0; 43][..], &too_long.encode()] {
        let mut s = setup().start();
        s.tx.offer(&[bytes], &[]);
        wait_until(|| s.tx.interrupt.reset.load(Ordering::SeqCst) > 0);
        assert_eq!(s.tx.used(), None);
        assert!(s.device.stop_queue(1).is_some());
    }
    let mut s = setup().start();
    s.rx.offer(&[], &[43]);
    wait_until(|| s.rx.interrupt.reset.load(Ordering::SeqCst) > 0);
    assert!(s.device.start_queue(Driver::new(3).queue()).is_err());
}

#[test]
fn impossible_identifiers_and_taken_paths_are_refused() {
    let s = setup();
    for cid in [0, 2, u64::from(u32::MAX), 1 << 32] {
        let made = Vsock::new(cid, s.dir.path().join("other"));
        assert!(matches!(made, Err(VsockError::Cid(found)) if found == cid));
    }
    assert!(matches!(
        Vsock::new(CID, s.path()),
        Err(VsockError::Socket(EndpointError::SocketExists { .. }))
    ));
    let mut config = [0xff; 10];
    s.device.read_config(0, &mut config);
    assert_eq!(config, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}
