//! Whole moves between machines without a hypervisor: good ones, failed and cancelled ones in every call that a move
//! makes, and peers that are broken or hostile.

mod hostile;
mod machines;

use std::sync::Arc;

use machines::{Call, Destination, Source, Trap, contents, state};
use migration::{
    Cause, Listener, MoveControl, MoveUrl, Phase, ReceiveError, ReceiveOptions, ReceiveReport,
    SendError, SendOptions, SendReport, SourceOutcome,
};

struct Ended {
    source: Source,
    sent: Result<SendReport, SendError>,
    sending: Arc<MoveControl>,
    destination: Destination,
    received: Result<ReceiveReport, ReceiveError>,
    receiving: Arc<MoveControl>,
}

/// Moves `source` to `destination` over `url`.
fn run(
    url: &str,
    mut source: Source,
    mut destination: Destination,
    controls: [Arc<MoveControl>; 2],
) -> Ended {
    let url: MoveUrl = url.parse().expect("valid");
    let listener = Listener::bind(&url).expect("free");
    let url = listener.local_url();
    let [sending, receiving] = controls;
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let result = migration::receive(
                &listener,
                &mut destination,
                &ReceiveOptions::default(),
                &receiving,
            );
            (result, destination)
        });
        let sent = migration::send(&url, &mut source, &SendOptions::default(), &sending);
        if sent.is_err() {
            // A destination that the source never reached would wait on.
            receiving.cancel();
        }
        (sent, receiver.join().expect("no panic"))
    });
    let (received, destination) = received;
    Ended {
        source,
        sent,
        sending,
        destination,
        received,
        receiving,
    }
}

fn controls() -> [Arc<MoveControl>; 2] {
    [Arc::default(), Arc::default()]
}

#[test]
fn a_busy_guest_arrives_whole() {
    let folder = tempfile::tempdir().expect("folder");
    let unix = format!("unix:{}", folder.path().join("s").display());
    for url in ["tcp:127.0.0.1:0", "tcp:[::1]:0", &unix] {
        if url.contains("::1") && std::net::TcpListener::bind("[::1]:0").is_err() {
            println!("no IPv6 here");
            continue;
        }
        let ended = run(url, Source::new(true), Destination::default(), controls());
        let (report, received) = match (ended.sent, ended.received) {
            (Ok(sent), Ok(received)) => (sent, received),
            other => panic!("{url}: {other:?}"),
        };
        assert!(!ended.source.runs() && ended.destination.runs && !ended.destination.discarded);
        assert_eq!((ended.source.pauses, ended.source.resumes), (1, 0));
        let there = ended.destination.ram.as_ref().expect("reserved");
        assert!(contents(there) == ended.source.contents(), "memory differs");
        assert_eq!(ended.destination.restored, Some(state()));
        assert!(report.rounds.len() >= 2 && received.rounds as usize == report.rounds.len());
        assert!(received.source_informed);
        let (progress, other) = (ended.sending.progress(), ended.receiving.progress());
        assert_eq!(
            (progress.phase, other.phase),
            (Phase::Complete, Phase::Complete)
        );
        assert_eq!(progress.bytes_sent, report.bytes_sent);
        assert_eq!(progress.rounds, report.rounds);
        assert_eq!(progress.downtime_ms, Some(report.downtime_ms));
        assert!(!ended.sending.cancel() && !ended.receiving.cancel());
    }
}

#[test]
fn zero_pages_are_not_sent_and_stay_out_of_memory() {
    let ended = run(
        "tcp:127.0.0.1:0",
        Source::new(false),
        Destination::default(),
        controls(),
    );
    let report = ended.sent.expect("moved");
    let there = ended.destination.ram.expect("reserved");
    let populated: u64 = (0..2)
        .map(|region| there.populated(region).expect("known").count())
        .sum();
    // Of the 3000 writes some hit the same page, and some wrote zeros. The junk page of the builder is zeroed.
    assert!(populated <= 3000, "{populated} pages are resident");
    assert!(report.zero_pages > 5000, "{} zero pages", report.zero_pages);
    assert!(
        report.bytes_sent < 3000 * 4096 + 100_000,
        "{} bytes",
        report.bytes_sent
    );
}

/// Calls of the source in the order of a move, with the phase that each belongs to.
const SOURCE_CALLS: [(Call, Phase); 6] = [
    (Call::Manifest, Phase::Reserve),
    (Call::Track, Phase::Precopy),
    (Call::Rearm, Phase::Precopy),
    (Call::Fetch, Phase::Precopy),
    (Call::Pause, Phase::Pause),
    (Call::Save, Phase::Handover),
];

/// The guest runs at the source, not tracked, as if nothing had been; nothing is at the destination.
fn expect_at_home(ended: &Ended, what: &str) {
    let error = ended.sent.as_ref().expect_err(what);
    assert_eq!(
        error.outcome(),
        SourceOutcome::RunningHere,
        "{what}: {error}"
    );
    assert!(ended.source.runs() && !ended.source.tracks(), "{what}");
    assert!(
        ended.destination.ram.is_none() && !ended.destination.runs,
        "{what}"
    );
    assert!(ended.received.is_err(), "{what}");
}

#[test]
fn whatever_fails_at_the_source_leaves_the_guest_there() {
    for (call, phase) in SOURCE_CALLS {
        let mut source = Source::new(true);
        source.trap = Some(Trap::Fail(call));
        let ended = run(
            "tcp:127.0.0.1:0",
            source,
            Destination::default(),
            controls(),
        );
        expect_at_home(&ended, &format!("{call:?}"));
        let error = ended.sent.expect_err("failed");
        assert_eq!(error.phase, phase, "{call:?}");
        let words = format!("{call:?} was told to fail");
        assert!(error.to_string().contains(&words), "{error}");
        // The destination was told why.
        let there = ended.received.expect_err("failed").to_string();
        assert!(there.contains(&words), "{call:?}: {there}");
    }
}

#[test]
fn whatever_fails_at_the_destination_leaves_the_guest_at_the_source() {
    for (call, phase) in [
        (Call::Reserve, Phase::Reserve),
        (Call::Restore, Phase::Handover),
        // Past the commit point: the destination says that it has not started the guest, which is a proof.
        (Call::Resume, Phase::Complete),
    ] {
        let destination = Destination::with(Trap::Fail(call));
        let ended = run(
            "tcp:127.0.0.1:0",
            Source::new(true),
            destination,
            controls(),
        );
        expect_at_home(&ended, &format!("{call:?}"));
        assert!(ended.destination.discarded, "{call:?}");
        assert_eq!(ended.received.expect_err("failed").phase, phase, "{call:?}");
        let error = ended.sent.expect_err("failed");
        assert_eq!(error.phase, phase, "{call:?}");
        assert!(error.to_string().contains("was told to fail"), "{error}");
        match (call, error.cause) {
            (Call::Reserve, Cause::Refused(reasons)) => {
                assert_eq!(reasons.len(), 2, "all reasons are told");
            }
            (Call::Reserve, other) => panic!("{other}"),
            (_, cause) => assert_eq!(cause.kind(), "peer_gave_up"),
        }
    }
}

#[test]
fn a_cancel_at_the_source_leaves_the_guest_there() {
    for (call, phase) in SOURCE_CALLS {
        let [sending, receiving] = controls();
        let mut source = Source::new(true);
        source.trap = Some(Trap::Cancel(call, Arc::clone(&sending)));
        let ended = run(
            "tcp:127.0.0.1:0",
            source,
            Destination::default(),
            [sending, receiving],
        );
        expect_at_home(&ended, &format!("{call:?}"));
        let error = ended.sent.expect_err("cancelled");
        assert!(error.is_cancelled(), "{call:?}: {error}");
        assert!(error.phase >= phase, "{call:?}: {error}");
    }
    let [sending, receiving] = controls();
    assert!(sending.cancel());
    let ended = run(
        "tcp:127.0.0.1:0",
        Source::new(true),
        Destination::default(),
        [sending, receiving],
    );
    expect_at_home(&ended, "before it began");
    assert!(ended.sent.expect_err("cancelled").is_cancelled());
}

#[test]
fn a_cancel_at_the_destination_leaves_the_guest_at_the_source() {
    for call in [Call::Reserve, Call::Restore] {
        let [sending, receiving] = controls();
        let destination = Destination::with(Trap::Cancel(call, Arc::clone(&receiving)));
        let ended = run(
            "tcp:127.0.0.1:0",
            Source::new(true),
            destination,
            [sending, receiving],
        );
        expect_at_home(&ended, &format!("{call:?}"));
        assert!(ended.destination.discarded, "{call:?}");
        assert!(
            ended.received.expect_err("cancelled").is_cancelled(),
            "{call:?}"
        );
    }
}

#[test]
fn a_guest_that_cannot_be_resumed_is_said_to_be_paused() {
    let mut source = Source::new(true);
    source.trap = Some(Trap::Fail(Call::Resume));
    let destination = Destination::with(Trap::Fail(Call::Restore));
    let ended = run("tcp:127.0.0.1:0", source, destination, controls());
    let error = ended.sent.expect_err("failed");
    assert_eq!(error.outcome(), SourceOutcome::PausedHere);
    assert!(
        !ended.source.runs() && ended.destination.discarded,
        "{error}"
    );
    assert!(
        error.to_string().contains("Restore was told to fail"),
        "{error}"
    );
}

#[test]
fn nobody_there_is_an_error_that_names_the_address() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = free.local_addr().expect("bound").to_string();
    drop(free);
    for url in [format!("tcp:{address}"), "unix:/nowhere/at/all".to_owned()] {
        let mut source = Source::new(false);
        let parsed = url.parse().expect("valid");
        let error = migration::send(
            &parsed,
            &mut source,
            &SendOptions::default(),
            &MoveControl::new(),
        )
        .expect_err("nobody is there");
        assert_eq!(
            (error.phase, error.outcome()),
            (Phase::Connect, SourceOutcome::RunningHere)
        );
        assert!(error.to_string().contains(&url), "{error}");
        assert!(source.runs());
    }
}
