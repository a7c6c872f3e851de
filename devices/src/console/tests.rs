//! The console with drivers' rings and real sockets and files.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::virtio::testing::{Counted, Driver};

/// Far more than anything here takes; it only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(30);

struct Setup {
    device: Console,
    receive: Driver,
    transmit: Driver,
}

fn setup(config: EndpointConfig) -> Setup {
    Setup {
        device: Console::new(config, None).expect("the back end is there"),
        receive: Driver::new(RECEIVE),
        transmit: Driver::new(TRANSMIT),
    }
}

impl Setup {
    fn start(self) -> Self {
        let queues = [self.receive.queue(), self.transmit.queue()];
        for queue in queues {
            self.device.start_queue(queue).expect("a thread");
        }
        self
    }

    fn stop(&self) -> Vec<Virtqueue> {
        [RECEIVE, TRANSMIT]
            .into_iter()
            .filter_map(|index| self.device.stop_queue(index))
            .collect()
    }
}

fn socket(dir: &tempfile::TempDir, name: &str) -> (EndpointConfig, PathBuf) {
    let path = dir.path().join(name);
    (EndpointConfig::Socket { path: path.clone() }, path)
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("a valid time");
    stream
}

fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("so much comes");
    bytes
}

fn numbers(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n % 251) as u8).collect()
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + LIMIT;
    while !done() {
        assert!(std::time::Instant::now() < until, "waited too long");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn state(device: &Console) -> State {
    rmp_serde::from_slice(&device.save()).expect("own state")
}

#[test]
fn output_and_input_pass() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, path) = socket(&dir, "s");
    let mut s = setup(config).start();
    let mut peer = connect(&path);
    let head = s.transmit.offer(&[b"hello ", b"guest"], &[]);
    assert_eq!(s.transmit.wait_used(), (head, 0));
    assert_eq!(read(&mut peer, 11), b"hello guest");
    // Input goes over the buffers of a request, and what is left into the next.
    peer.write_all(b"abcdefgh").expect("room");
    let first = s.receive.offer(&[], &[2, 3]);
    let second = s.receive.offer(&[], &[100]);
    assert_eq!(s.receive.wait_used(), (first, 5));
    assert_eq!(s.receive.written(first), b"abcde");
    assert_eq!(s.receive.wait_used(), (second, 3));
    assert_eq!(s.receive.written(second)[..3], *b"fgh");
    // A request of neither kind comes back.
    let head = s.receive.offer(&[b"x"], &[]);
    assert_eq!(s.receive.wait_used(), (head, 0));
    assert_eq!(s.stop().len(), 2);
    assert!(s.stop().is_empty());
}

#[test]
fn input_is_left_alone_until_there_is_a_buffer() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, path) = socket(&dir, "s");
    let mut s = setup(config).start();
    let mut peer = connect(&path);
    let sent = numbers(10_000);
    peer.write_all(&sent).expect("a socket has room for it");
    // The peer is served: its output arrives.
    s.transmit.offer(&[b"x"], &[]);
    read(&mut peer, 1);
    assert_eq!(s.device.port.pending(), b"");
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let head = s.receive.offer(&[], &[1000]);
        let (used, len) = s.receive.wait_used();
        assert_eq!(used, head);
        got.extend_from_slice(&s.receive.written(head)[..len as usize]);
    }
    assert!(got == sent);
}

#[test]
fn a_driver_does_not_wait_for_ever_for_a_reader() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, path) = socket(&dir, "s");
    let mut s = setup(config).start();
    let sent = numbers(200_000);
    // Nobody is there, and Linux waits for each request before it makes the next, with its interrupts off.
    for part in sent.chunks(20_000) {
        s.transmit.offer(&[part], &[]);
        s.transmit.wait_used();
    }
    let lost = sent.len() - OUTPUT_CAPACITY;
    assert_eq!(s.device.lost_output(), lost as u64);
    // Who comes late gets the latest.
    let mut peer = connect(&path);
    assert!(read(&mut peer, OUTPUT_CAPACITY) == sent[lost..]);
}

#[test]
fn output_waits_in_the_ring_for_a_reader_who_comes_soon() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, path) = socket(&dir, "s");
    let mut s = setup(config).start();
    let sent = numbers(200_000);
    let requests = sent.chunks(20_000);
    for part in requests {
        s.transmit.offer(&[part], &[]);
    }
    // Three fit, the fourth waits.
    for _ in 0..3 {
        s.transmit.wait_used();
    }
    let queues = s.stop();
    assert_eq!(s.transmit.used(), None);
    assert_eq!(state(&s.device).unsent_output, sent[..60_000]);
    for queue in queues {
        s.device.start_queue(queue).expect("a thread");
    }
    let mut peer = connect(&path);
    assert!(read(&mut peer, sent.len()) == sent);
    for _ in 3..10 {
        s.transmit.wait_used();
    }
    assert_eq!(s.device.lost_output(), 0);
}

#[test]
fn a_request_larger_than_the_output_is_cut() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("out");
    let mut s = setup(EndpointConfig::File {
        path: path.clone(),
        append: false,
    })
    .start();
    let sent = numbers(100_000);
    let head = s.transmit.offer(&[&sent], &[]);
    assert_eq!(s.transmit.wait_used(), (head, 0));
    assert!(std::fs::read(path).expect("a file") == sent[..OUTPUT_CAPACITY]);
    assert_eq!(s.device.lost_output(), (100_000 - OUTPUT_CAPACITY) as u64);
}

#[test]
fn nowhere_takes_everything_and_gives_nothing() {
    let mut s = setup(EndpointConfig::Null).start();
    s.receive.offer(&[], &[16]);
    for _ in 0..10 {
        s.transmit.offer(&[&[0; 50_000]], &[]);
        s.transmit.wait_used();
    }
    s.stop();
    assert_eq!(s.receive.used(), None);
    assert_eq!(s.device.lost_output(), 0);
}

#[test]
fn every_byte_moves_exactly_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, from_path) = socket(&dir, "from");
    let mut from = setup(config).start();
    let mut from_peer = connect(&from_path);
    from.receive.offer(&[], &[3]);
    from_peer.write_all(b"abcdef").expect("room");
    from.receive.wait_used();
    drop(from_peer);
    // The peer has gone, so output waits.
    wait_until(|| {
        from.transmit.offer(&[b"."], &[]);
        from.transmit.wait_used();
        !from.device.port.output.unsent().is_empty()
    });
    from.transmit.offer(&[b"output"], &[]);
    from.transmit.wait_used();
    from.stop();
    let saved = from.device.save();
    let before = state(&from.device);
    assert_eq!(before.pending_input, b"def");
    assert!(before.unsent_output.ends_with(b"output"));

    let (config, path) = socket(&dir, "to");
    let to = setup(config);
    to.device.restore(&saved).expect("own state");
    // Nothing leaves before the guest runs: the other machine may still be the one that goes on.
    let mut peer = connect(&path);
    assert_eq!(to.device.save(), saved);
    let mut to = to.start();
    let waited = read(&mut peer, before.unsent_output.len());
    assert!(waited.ends_with(b"output"));
    let head = to.receive.offer(&[], &[16]);
    assert_eq!(to.receive.wait_used(), (head, 3));
    assert_eq!(to.receive.written(head)[..3], *b"def");

    // The source, which stands still, sends nothing when it goes.
    let mut late = connect(&from_path);
    drop(from);
    let mut rest = Vec::new();
    let _ = late.read_to_end(&mut rest);
    assert_eq!(rest, b"");
}

#[test]
fn output_leaves_when_the_console_goes() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, path) = socket(&dir, "s");
    let mut s = setup(config).start();
    let mut peer = connect(&path);
    s.transmit.offer(&[b"last words"], &[]);
    s.transmit.wait_used();
    s.stop();
    drop(s);
    let mut words = String::new();
    peer.read_to_string(&mut words).expect("an end");
    assert_eq!(words, "last words");
    assert!(!path.exists());
}

#[test]
fn states_that_cannot_be_are_refused() {
    let s = setup(EndpointConfig::Null);
    let good = s.device.save();
    let large = |pending_input, unsent_output| {
        let state = State {
            pending_input,
            unsent_output,
            ..State::default()
        };
        rmp_serde::to_vec_named(&state).expect("encodes")
    };
    for bad in [
        large(vec![0; INPUT_CAPACITY + 1], Vec::new()),
        large(Vec::new(), vec![0; OUTPUT_CAPACITY + 1]),
        vec![0xdf, 0xff, 0xff, 0xff, 0xff],
        Vec::new(),
    ] {
        s.device.restore(&bad).expect_err("refused");
        assert_eq!(s.device.save(), good);
    }
}

#[test]
fn the_size_is_told_if_there_is_one() {
    let without = Console::new(EndpointConfig::Null, None).expect("needs nothing");
    without.set_size(80, 25);
    let mut config = [0xff; 16];
    without.read_config(0, &mut config);
    assert_eq!((without.features(), config), (0, [0; 16]));

    let console = Console::new(EndpointConfig::Null, Some((80, 25))).expect("needs nothing");
    let interrupt = Arc::new(Counted::default());
    console.connect(interrupt.clone());
    assert_eq!(console.features(), SIZE);
    for (columns, rows) in [(80, 25), (132, 50), (132, 50)] {
        console.set_size(columns, rows);
        let mut config = [0; 4];
        console.read_config(0, &mut config);
        assert_eq!(config, [columns as u8, 0, rows as u8, 0]);
    }
    assert_eq!(interrupt.config.load(Ordering::SeqCst), 1);
    let other = Console::new(EndpointConfig::Null, Some((80, 25))).expect("needs nothing");
    other.restore(&console.save()).expect("own state");
    assert_eq!(other.size(), (132, 50));
}

#[test]
fn nonsense_needs_a_reset_and_queues_that_are_not_there_do_not_start() {
    let mut s = setup(EndpointConfig::Null).start();
    s.transmit.offer_parts(&[(1 << 40, 16, false)]);
    wait_until(|| s.transmit.interrupt.reset.load(Ordering::SeqCst) > 0);
    assert_eq!(s.receive.interrupt.reset.load(Ordering::SeqCst), 0);
    assert_eq!(s.stop().len(), 2);
    assert!(s.device.start_queue(Driver::new(2).queue()).is_err());
}
