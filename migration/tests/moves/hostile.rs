//! Peers that are broken or hostile, played by hand over a socket.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use memory::PAGE_SIZE;
use migration::protocol::batch::{
    Attach, BatchHeader, ENCODING_RAW, ENCODING_ZERO, MAX_PAYLOAD, MAX_RUNS, RunDescriptor,
};
use migration::protocol::hello::{self, HelloBody, HelloHeader, MAGIC};
use migration::protocol::message::{
    Abort, Accept, FrameHeader, Message, OPTIONAL, RoundDone, State,
};
use migration::protocol::{VERSIONS, VersionRange};
use migration::{
    Cause, Listener, MoveControl, Phase, ReceiveError, ReceiveOptions, SendOptions, SourceOutcome,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::machines::{Destination, Source, manifest, state};

fn hello(versions: VersionRange) -> Vec<u8> {
    hello::encode(versions, &HelloBody::default()).expect("short")
}

fn encoded(message: &Message) -> Vec<u8> {
    message.encode().expect("short enough")
}

fn read_hello(stream: &mut TcpStream) {
    let mut header = [0; HelloHeader::SIZE];
    stream.read_exact(&mut header).expect("a hello");
    let header = HelloHeader::read_from_bytes(&header).expect("its size");
    let mut body = vec![0; header.body_len.get() as usize];
    stream.read_exact(&mut body).expect("its body");
}

/// The next message, or the end.
fn read_message(stream: &mut TcpStream) -> Option<Message> {
    let mut header = [0; FrameHeader::SIZE];
    stream.read_exact(&mut header).ok()?;
    let header = FrameHeader::read_from_bytes(&header).expect("its size");
    let mut body = vec![0; header.length.get() as usize];
    stream.read_exact(&mut body).expect("its body");
    match header.check().expect("valid") {
        migration::protocol::message::Announced::Message(kind, _) => {
            Some(Message::decode(kind, &body).expect("valid"))
        }
        migration::protocol::message::Announced::Skip(_) => panic!("nothing to skip"),
    }
}

/// Plays a source against a destination; returns how the destination fared, and what it said last.
fn play_source(play: impl FnOnce(&str, &mut TcpStream) + Send) -> (ReceiveError, Option<Message>) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("valid")).expect("loopback");
    let url = listener.local_url().to_string();
    let address = url.strip_prefix("tcp:").expect("tcp").to_owned();
    let mut destination = Destination::default();
    let options = ReceiveOptions {
        connect_timeout: Duration::from_secs(3),
        peer_timeout: Duration::from_secs(3),
        ..ReceiveOptions::default()
    };
    let (result, last) = std::thread::scope(|scope| {
        let player = scope.spawn(|| {
            let mut stream = TcpStream::connect(&address).expect("connects");
            play(&address, &mut stream);
            let mut last = None;
            while let Some(message) = read_message(&mut stream) {
                last = Some(message);
            }
            last
        });
        let result = migration::receive(&listener, &mut destination, &options, &MoveControl::new());
        (result, player.join().expect("no panic"))
    });
    let error = result.expect_err("hostile");
    assert!(!destination.runs && destination.ram.is_none(), "{error}");
    assert!(destination.discarded, "{error}");
    (error, last)
}

/// As far as the data channel; returns it.
fn reach_memory(address: &str, stream: &mut TcpStream) -> TcpStream {
    stream.write_all(&hello(VERSIONS)).expect("sent");
    read_hello(stream);
    stream
        .write_all(&encoded(&Message::Manifest(Box::new(manifest()))))
        .expect("sent");
    let Some(Message::Accept(accept)) = read_message(stream) else {
        panic!("not accepted")
    };
    let mut data = TcpStream::connect(address).expect("connects");
    let attach = Attach::new(accept.session, 0, 1);
    data.write_all(attach.as_bytes()).expect("sent");
    data
}

#[test]
fn sources_that_make_no_sense_before_memory() {
    type Play = Box<dyn Fn(&mut TcpStream) + Send + Sync>;
    let after_hello = |stream: &mut TcpStream, bytes: &[u8]| {
        stream.write_all(&hello(VERSIONS)).expect("sent");
        read_hello(stream);
        stream.write_all(bytes).expect("sent");
    };
    let header = |kind: u16, length: u32| FrameHeader {
        kind: kind.into(),
        flags: 0.into(),
        length: length.into(),
    };
    let cases: Vec<(&str, Phase, Play)> = vec![
        (
            "no common protocol version",
            Phase::Negotiate,
            Box::new(|stream| {
                let versions = VersionRange { min: 7, max: 9 };
                stream.write_all(&hello(versions)).expect("sent");
                read_hello(stream);
            }),
        ),
        (
            "hello cannot be understood",
            Phase::Negotiate,
            Box::new(|stream| {
                let mut bytes = hello(VERSIONS);
                bytes[HelloHeader::SIZE..].fill(0xc1);
                stream.write_all(&bytes).expect("sent");
                read_hello(stream);
            }),
        ),
        (
            "manifest of",
            Phase::Reserve,
            Box::new(move |stream| after_hello(stream, header(1, u32::MAX).as_bytes())),
        ),
        (
            "message kind 99",
            Phase::Reserve,
            Box::new(move |stream| after_hello(stream, header(99, 3).as_bytes())),
        ),
        (
            "manifest cannot be understood",
            Phase::Reserve,
            Box::new(move |stream| {
                after_hello(stream, header(1, 4).as_bytes());
                stream.write_all(&[0xc1; 4]).expect("sent");
            }),
        ),
        (
            "it sent commit while manifest was expected",
            Phase::Reserve,
            Box::new(move |stream| after_hello(stream, &encoded(&Message::Commit))),
        ),
        (
            "memory",
            Phase::Reserve,
            Box::new(move |stream| {
                let mut huge = manifest();
                huge.memory[1].len = 1 << 60;
                after_hello(stream, &encoded(&Message::Manifest(Box::new(huge))));
            }),
        ),
        (
            "the connection was lost",
            Phase::Reserve,
            Box::new(move |stream| {
                after_hello(stream, header(1, 1000).as_bytes());
                stream.shutdown(std::net::Shutdown::Both).expect("closed");
            }),
        ),
    ];
    for (words, phase, play) in cases {
        let (error, last) = play_source(|_, stream| play(stream));
        assert_eq!(error.phase, phase, "{words}: {error}");
        assert!(
            error.to_string().contains(words),
            "{error} does not say {words:?}"
        );
        match last {
            Some(Message::Abort(abort)) => {
                assert!(abort.reason.contains(words), "{}", abort.reason);
            }
            Some(Message::Refuse(refuse)) => assert!(!refuse.reasons.is_empty()),
            Some(other) => panic!("{words}: {other:?}"),
            None => assert!(words.contains("connection"), "{words}: nothing was said"),
        }
    }
}

#[test]
fn memory_that_makes_no_sense() {
    let end = ranges_end();
    let run = RunDescriptor::new;
    let batch = |payload: u64, runs: &[RunDescriptor]| {
        [
            BatchHeader::pages(1, runs.len() as u32, payload).as_bytes(),
            runs.as_bytes(),
        ]
        .concat()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (
            "not in the guest's RAM",
            batch(PAGE_SIZE, &[run(end, 1, ENCODING_RAW)]),
        ),
        (
            "not in the guest's RAM",
            batch(2 * PAGE_SIZE, &[run(end - PAGE_SIZE, 2, ENCODING_RAW)]),
        ),
        (
            "not in the guest's RAM",
            batch(0, &[run(u64::MAX - 4095, 1, ENCODING_ZERO)]),
        ),
        (
            "not page aligned",
            batch(PAGE_SIZE, &[run(17, 1, ENCODING_RAW)]),
        ),
        ("payload length", batch(1, &[run(0, 1, ENCODING_RAW)])),
        ("encoding", batch(0, &[run(0, 1, 77)])),
        ("it is empty", batch(0, &[])),
        (
            "a table of runs",
            BatchHeader::pages(1, MAX_RUNS + 1, 0).as_bytes().to_vec(),
        ),
        (
            "a batch of pages",
            BatchHeader::pages(1, 1, MAX_PAYLOAD + 1)
                .as_bytes()
                .to_vec(),
        ),
        ("round is 7", BatchHeader::round_end(7).as_bytes().to_vec()),
        ("magic", vec![0xab; BatchHeader::SIZE]),
    ];
    for (words, bytes) in cases {
        let (error, last) = play_source(|address, stream| {
            let mut data = reach_memory(address, stream);
            data.write_all(&bytes).expect("sent");
            // Kept open: it is what was sent that ends the move.
            while let Some(message) = read_message(stream) {
                if let Message::Abort(abort) = message {
                    assert!(abort.reason.contains(words), "{}", abort.reason);
                    return;
                }
            }
            panic!("the destination did not say why");
        });
        assert_eq!((error.phase, last), (Phase::Precopy, None), "{error}");
        assert!(
            error.to_string().contains(words),
            "{error} does not say {words:?}"
        );
    }
}

fn ranges_end() -> u64 {
    let first = crate::machines::ranges()[0];
    first.gpa + first.len
}

#[test]
fn a_source_that_breaks_the_order_or_vanishes() {
    type Play = Box<dyn Fn(&mut TcpStream, &mut TcpStream) + Send + Sync>;
    let state_of = |last_round| {
        encoded(&Message::State(Box::new(State {
            last_round,
            machine: state(),
            sent_ns: None,
        })))
    };
    let (first, zeroth) = (state_of(1), state_of(0));
    let cases: Vec<(&str, Phase, Play)> = vec![
        (
            "it sent commit while",
            Phase::Precopy,
            Box::new(|stream, _| stream.write_all(&encoded(&Message::Commit)).expect("sent")),
        ),
        (
            "last round is 0",
            Phase::Precopy,
            Box::new(move |stream, _| stream.write_all(&zeroth).expect("sent")),
        ),
        (
            "the other side gave up: no more",
            Phase::Precopy,
            Box::new(|stream, _| {
                let reason = "no more".into();
                stream
                    .write_all(&encoded(&Message::Abort(Abort { reason })))
                    .expect("sent");
            }),
        ),
        (
            "the connection was lost",
            Phase::Precopy,
            Box::new(|stream, data| {
                let header = BatchHeader::pages(1, 1, PAGE_SIZE);
                data.write_all(header.as_bytes()).expect("sent");
                data.shutdown(std::net::Shutdown::Both).expect("closed");
                stream.shutdown(std::net::Shutdown::Both).expect("closed");
            }),
        ),
        (
            "no progress",
            Phase::Precopy,
            Box::new(|_, data| {
                let header = BatchHeader::pages(1, 1, PAGE_SIZE);
                data.write_all(header.as_bytes()).expect("sent");
            }),
        ),
        (
            "it sent ready while commit was expected",
            Phase::Handover,
            Box::new(move |stream, data| {
                data.write_all(BatchHeader::round_end(1).as_bytes())
                    .expect("sent");
                stream.write_all(&first).expect("sent");
                assert!(matches!(
                    read_message(stream),
                    Some(Message::RoundDone(RoundDone { round: 1, bytes: 0 }))
                ));
                assert_eq!(read_message(stream), Some(Message::Ready));
                stream.write_all(&encoded(&Message::Ready)).expect("sent");
            }),
        ),
    ];
    for (words, phase, play) in cases {
        let (error, _) = play_source(|address, stream| {
            let mut data = reach_memory(address, stream);
            // What comes on the control channel before the destination has seen the data channel is refused earlier.
            std::thread::sleep(Duration::from_millis(300));
            play(stream, &mut data);
            // The data channel stays open as long as the control channel does.
            while read_message(stream).is_some() {}
        });
        assert_eq!(error.phase, phase, "{words}: {error}");
        assert!(
            error.to_string().contains(words),
            "{error} does not say {words:?}"
        );
    }
}

#[test]
fn strangers_do_not_keep_the_source_out() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("valid")).expect("loopback");
    let url = listener.local_url();
    let address = url
        .to_string()
        .strip_prefix("tcp:")
        .expect("tcp")
        .to_owned();
    // One of each kind, and more silent ones than the lobby holds; all stay connected.
    let mut strangers = Vec::new();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"VMM", &[0; 64]] {
        let mut stream = TcpStream::connect(&address).expect("connects");
        stream.write_all(bytes).expect("sent");
        strangers.push(stream);
    }
    strangers.extend((0..40).map(|_| TcpStream::connect(&address).expect("connects")));
    let mut destination = Destination::default();
    let options = ReceiveOptions::default();
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            migration::receive(&listener, &mut destination, &options, &MoveControl::new())
        });
        let mut source = Source::new(false);
        let sent = migration::send(
            &url,
            &mut source,
            &SendOptions::default(),
            &MoveControl::new(),
        );
        (sent, receiver.join().expect("no panic"))
    });
    sent.expect("moved");
    received.expect("arrived");
    assert!(destination.runs);
}

/// Plays a destination against a source, as far as `play` goes.
fn play_destination(
    play: impl FnOnce(&TcpListener, &mut TcpStream) + Send,
) -> (Source, migration::SendError) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let url = format!("tcp:{}", listener.local_addr().expect("bound"))
        .parse()
        .expect("valid");
    let mut source = Source::new(true);
    let options = SendOptions {
        handover_timeout: Duration::from_secs(2),
        reserve_timeout: Duration::from_secs(2),
        ..SendOptions::default()
    };
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("a source");
            play(&listener, &mut stream);
        });
        migration::send(&url, &mut source, &options, &MoveControl::new())
    });
    let error = result.expect_err("hostile");
    (source, error)
}

fn greet(stream: &mut TcpStream) {
    read_hello(stream);
    stream.write_all(&hello(VERSIONS)).expect("sent");
    assert!(matches!(read_message(stream), Some(Message::Manifest(_))));
}

#[test]
fn destinations_that_make_no_sense_leave_the_guest_where_it_is() {
    type Play = Box<dyn Fn(&TcpListener, &mut TcpStream) + Send + Sync>;
    let accept = |channels| {
        encoded(&Message::Accept(Accept {
            session: [3; 16],
            data_channels: channels,
        }))
    };
    let (good, none) = (accept(1), accept(0));
    let other = good.clone();
    let cases: Vec<(&str, Phase, Play)> = vec![
        (
            "does not speak this protocol",
            Phase::Negotiate,
            Box::new(|_, stream| {
                stream
                    .write_all(b"HTTP/1.1 400 Bad Request\r\n")
                    .expect("sent");
            }),
        ),
        (
            "no common protocol version",
            Phase::Negotiate,
            Box::new(|_, stream| {
                stream
                    .write_all(&hello(VersionRange { min: 5, max: 6 }))
                    .expect("sent");
            }),
        ),
        (
            "a hello of",
            Phase::Negotiate,
            Box::new(|_, stream| {
                let header = HelloHeader {
                    magic: MAGIC,
                    min_version: 1.into(),
                    max_version: 1.into(),
                    body_len: u32::MAX.into(),
                };
                stream.write_all(header.as_bytes()).expect("sent");
            }),
        ),
        (
            "the connection was lost",
            Phase::Reserve,
            Box::new(|_, stream| greet(stream)),
        ),
        (
            "number of data channels",
            Phase::Reserve,
            Box::new(move |_, stream| {
                greet(stream);
                stream.write_all(&none).expect("sent");
                while read_message(stream).is_some() {}
            }),
        ),
        (
            "it sent ready while",
            Phase::Reserve,
            Box::new(|_, stream| {
                greet(stream);
                stream.write_all(&encoded(&Message::Ready)).expect("sent");
                while read_message(stream).is_some() {}
            }),
        ),
        (
            "no progress",
            Phase::Reserve,
            Box::new(|_, stream| {
                greet(stream);
                while read_message(stream).is_some() {}
            }),
        ),
        (
            "number of bytes in the round",
            Phase::Precopy,
            Box::new(move |listener, stream| {
                greet(stream);
                stream.write_all(&good).expect("sent");
                let (mut data, _) = listener.accept().expect("a data channel");
                std::thread::spawn(move || std::io::copy(&mut data, &mut std::io::sink()));
                let done = Message::RoundDone(RoundDone { round: 1, bytes: 1 });
                std::thread::sleep(Duration::from_millis(300));
                stream.write_all(&encoded(&done)).expect("sent");
                while read_message(stream).is_some() {}
            }),
        ),
        (
            "the other side gave up: enough of this",
            Phase::Precopy,
            Box::new(move |listener, stream| {
                greet(stream);
                stream.write_all(&other).expect("sent");
                let (data, _) = listener.accept().expect("a data channel");
                let reason = "enough of this".into();
                stream
                    .write_all(&encoded(&Message::Abort(Abort { reason })))
                    .expect("sent");
                drop(data);
                while read_message(stream).is_some() {}
            }),
        ),
    ];
    for (words, phase, play) in cases {
        let (source, error) = play_destination(|listener, stream| play(listener, stream));
        assert_eq!(
            error.outcome(),
            SourceOutcome::RunningHere,
            "{words}: {error}"
        );
        assert!(
            error.to_string().contains(words),
            "{error} does not say {words:?}"
        );
        assert_eq!(error.phase, phase, "{words}: {error}");
        assert!(source.runs() && !source.tracks(), "{words}");
    }
}

/// As far as the commit, which is read.
fn reach_commit(listener: &TcpListener, stream: &mut TcpStream) {
    greet(stream);
    let accept = Message::Accept(Accept {
        session: [3; 16],
        data_channels: 1,
    });
    stream.write_all(&encoded(&accept)).expect("sent");
    let (mut data, _) = listener.accept().expect("a data channel");
    let mut attach = [0; Attach::SIZE];
    data.read_exact(&mut attach).expect("attached");
    let mut out = stream.try_clone().expect("cloned");
    let rounds = std::thread::spawn(move || {
        let mut bytes = 0;
        loop {
            let mut header = [0; BatchHeader::SIZE];
            if data.read_exact(&mut header).is_err() {
                return;
            }
            let header = BatchHeader::read_from_bytes(&header).expect("its size");
            let skip = u64::from(header.runs.get()) * RunDescriptor::SIZE as u64
                + header.payload_bytes.get();
            std::io::copy(&mut (&mut data).take(skip), &mut std::io::sink()).expect("contents");
            bytes += header.payload_bytes.get();
            if header.runs.get() == 0 {
                let round = header.round.get();
                let done = Message::RoundDone(RoundDone { round, bytes });
                out.write_all(&encoded(&done)).expect("sent");
                bytes = 0;
            }
        }
    });
    assert!(matches!(read_message(stream), Some(Message::State(_))));
    // The last round may still be on its way.
    std::thread::sleep(Duration::from_millis(300));
    // With something that may be skipped behind it, which must not stand in the commit's way.
    let optional = FrameHeader {
        kind: 99.into(),
        flags: OPTIONAL.into(),
        length: 3.into(),
    };
    let ready = [
        encoded(&Message::Ready).as_slice(),
        optional.as_bytes(),
        b"new",
    ]
    .concat();
    stream.write_all(&ready).expect("sent");
    assert_eq!(read_message(stream), Some(Message::Commit));
    drop(rounds);
}

#[test]
fn after_the_commit_only_a_no_brings_the_guest_back() {
    type Play = fn(&mut TcpStream);
    let cases: [(&str, SourceOutcome, Play); 4] = [
        (
            "the connection was lost",
            SourceOutcome::InDoubt,
            |stream| {
                stream.shutdown(std::net::Shutdown::Both).expect("closed");
            },
        ),
        ("no progress", SourceOutcome::InDoubt, |stream| {
            while read_message(stream).is_some() {}
        }),
        (
            "it sent ready while resumed",
            SourceOutcome::InDoubt,
            |stream| {
                stream.write_all(&encoded(&Message::Ready)).expect("sent");
            },
        ),
        (
            "the other side gave up: no",
            SourceOutcome::RunningHere,
            |stream| {
                let reason = "no".into();
                stream
                    .write_all(&encoded(&Message::Abort(Abort { reason })))
                    .expect("sent");
            },
        ),
    ];
    for (words, outcome, play) in cases {
        let (source, error) = play_destination(|listener, stream| {
            reach_commit(listener, stream);
            play(stream);
        });
        assert_eq!(
            (error.outcome(), error.phase),
            (outcome, Phase::Complete),
            "{error}"
        );
        assert!(
            error.to_string().contains(words),
            "{error} does not say {words:?}"
        );
        assert_eq!(
            source.runs(),
            outcome == SourceOutcome::RunningHere,
            "{words}"
        );
        if outcome == SourceOutcome::InDoubt {
            assert!(
                error.to_string().contains("may run at the destination"),
                "{error}"
            );
            assert!(!matches!(error.cause, Cause::Cancelled));
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_noise_does_harm(
        noise in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..2000),
        runs in proptest::collection::vec((0..50_000u64, 0..40u32, 0..3u16), 0..20),
        payload in 0..200_000u64,
        stage in 0..4u8,
    ) {
        let (error, _) = play_source(|address, stream| {
            // The destination may end the connection at any point of this.
            let half_closed = |stream: &TcpStream| {
                let _ = stream.shutdown(std::net::Shutdown::Write);
            };
            if stage == 0 {
                stream.write_all(&hello(VERSIONS)).expect("sent");
                let _ = stream.write_all(&noise);
                read_hello(stream);
            } else {
                let mut data = reach_memory(address, stream);
                if stage == 1 {
                    let _ = stream.write_all(&noise);
                } else {
                    // A table that is well formed but for its values, or not at all.
                    let table: Vec<_> = runs
                        .iter()
                        .map(|&(page, pages, encoding)| RunDescriptor::new(page * PAGE_SIZE, pages, encoding))
                        .collect();
                    let header = BatchHeader::pages(1, table.len() as u32, payload);
                    let _ = data.write_all(header.as_bytes());
                    if stage == 2 {
                        let _ = data.write_all(table.as_bytes());
                    }
                    let _ = data.write_all(&noise);
                }
                half_closed(&data);
            }
            half_closed(stream);
        });
        proptest::prop_assert!(!error.is_cancelled(), "{}", error);
    }
}
