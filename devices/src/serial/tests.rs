//! The serial port with real files, terminals and sockets.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use super::*;
use crate::state::Persist;
use crate::state::saved::SerialState;
use crate::testing::LineLog;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

fn serial(backend: SerialBackend) -> (Serial, Arc<LineLog>) {
    let line = Arc::new(LineLog::default());
    (
        Serial::new(backend, line.clone()).expect("the back end is there"),
        line,
    )
}

fn inb(serial: &Serial, offset: u64) -> u8 {
    let mut data = [0];
    serial.read(offset, &mut data);
    data[0]
}

fn print(serial: &Serial, text: &[u8]) {
    for byte in text {
        assert_eq!(inb(serial, LSR) & 0x60, 0x60);
        serial.write(DATA, &[*byte]);
    }
}

/// Far more than anything here takes; it only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(30);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads like a guest's driver: while there is data.
fn take_input(serial: &Serial, count: usize) -> Vec<u8> {
    let mut input = Vec::new();
    wait_until("input", || {
        while input.len() < count && inb(serial, LSR) & 1 != 0 {
            input.push(inb(serial, DATA));
        }
        input.len() == count
    });
    input
}

fn saved(serial: &Serial) -> SerialState {
    crate::state::decode(serial, &serial.save()).expect("own state")
}

fn read_exactly(from: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).expect("so much comes");
    bytes
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream
        .set_read_timeout(Some(LIMIT))
        .expect("a valid timeout");
    stream
}

fn socket() -> (tempfile::TempDir, PathBuf, Serial, Arc<LineLog>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("serial.sock");
    let (serial, line) = serial(SerialBackend::Socket { path: path.clone() });
    (dir, path, serial, line)
}

/// For what is too long to be shown.
fn assert_same(got: &[u8], sent: &[u8]) {
    let at = got.iter().zip(sent).position(|(got, sent)| got != sent);
    assert!(
        got == sent,
        "{} of {} bytes, first wrong: {at:?}",
        got.len(),
        sent.len()
    );
}

fn numbers(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n % 251) as u8).collect()
}

#[test]
fn a_file_is_emptied_or_appended_to_and_written_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("out");
    for (append, content) in [(false, "one"), (true, "oneone"), (false, "one")] {
        let (serial, _) = serial(SerialBackend::File {
            path: path.clone(),
            append,
        });
        print(&serial, b"one");
        assert_eq!(fs::read_to_string(&path).expect("it is there"), content);
        assert!(serial.pump.is_none());
        assert_eq!(serial.lost_output(), 0);
    }
}

#[test]
fn files_that_cannot_be_written_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from(0o600),
        0,
    )
    .expect("a FIFO");
    for path in [
        dir.path().to_owned(),
        dir.path().join("no/such/directory"),
        fifo,
    ] {
        let backend = SerialBackend::File {
            path: path.clone(),
            append: false,
        };
        let error = Serial::new(backend.clone(), Arc::new(LineLog::default()))
            .err()
            .expect("refused");
        assert!(
            error.to_string().contains(&path.display().to_string()),
            "{error}"
        );
    }
}

#[test]
fn what_a_file_refuses_is_lost_and_counted() {
    let (serial, _) = serial(SerialBackend::File {
        path: "/dev/full".into(),
        append: true,
    });
    print(&serial, b"hello");
    assert_eq!(serial.lost_output(), 5);
}

#[test]
fn transmitting_raises_the_interrupt_once_until_it_is_read() {
    let (serial, line) = serial(SerialBackend::Null);
    print(&serial, b"x");
    assert_eq!(line.pulses(), 0);
    serial.write(IER, &[2]);
    assert_eq!(line.pulses(), 1);
    print(&serial, b"xy");
    assert_eq!(line.pulses(), 1);
    assert_eq!((inb(&serial, IIR), inb(&serial, IIR)), (0xc2, 0xc1));
    print(&serial, b"x");
    assert_eq!(line.pulses(), 2);
}

#[test]
fn reset_forgets_the_registers() {
    let (serial, _) = serial(SerialBackend::Null);
    let fresh = serial.save();
    serial.write(LCR, &[0x80]);
    serial.write(DATA, &[1]);
    serial.write(IER, &[1]);
    assert_ne!(serial.save(), fresh);
    serial.reset();
    assert_eq!(serial.save(), fresh);
    assert_eq!(inb(&serial, 8), 0xff);
}

#[test]
fn a_socket_carries_both_ways_and_interrupts() {
    let (_dir, path, serial, line) = socket();
    let mut client = connect(&path);
    print(&serial, b"login: ");
    assert_eq!(read_exactly(&mut client, 7), b"login: ");
    serial.write(IER, &[1]);
    client.write_all(b"root\n").expect("it is read");
    assert_eq!(take_input(&serial, 5), b"root\n");
    assert!(line.pulses() >= 1);
}

#[test]
fn input_waits_for_the_guest_and_none_is_lost() {
    let (_dir, path, serial, line) = socket();
    serial.write(IER, &[1]);
    let sent = numbers(20_000);
    let mut client = connect(&path);
    let to_send = sent.clone();
    let sender = std::thread::spawn(move || {
        client.write_all(&to_send).expect("it is read");
        client
    });
    // The guest does nothing: the FIFO and what waits for it fill up, and no more is taken.
    wait_until("a full FIFO", || {
        let state = saved(&serial);
        state.receive_fifo.len() == 64 && !state.pending_input.is_empty()
    });
    assert!(saved(&serial).pending_input.len() <= 64);
    assert_eq!(line.pulses(), 1);
    assert_same(&take_input(&serial, sent.len()), &sent);
    drop(sender.join().expect("no panic"));
}

#[test]
fn loopback_holds_input_back() {
    let (_dir, path, serial, _) = socket();
    serial.write(MCR, &[0x10]);
    let mut client = connect(&path);
    client.write_all(b"abc").expect("it is read");
    wait_until("input", || saved(&serial).pending_input == b"abc");
    serial.write(DATA, b"!");
    assert_eq!(take_input(&serial, 1), b"!");
    assert_eq!(inb(&serial, LSR) & 1, 0);
    serial.write(MCR, &[0x08]);
    assert_eq!(take_input(&serial, 3), b"abc");
}

#[test]
fn a_client_goes_and_another_comes() {
    let (_dir, path, serial, _) = socket();
    for round in 0..5u8 {
        // Output of the time without a client is there for the next.
        print(&serial, &[b'a', round]);
        let mut client = connect(&path);
        assert_eq!(read_exactly(&mut client, 2), [b'a', round]);
        client.write_all(&[round]).expect("it is read");
        assert_eq!(take_input(&serial, 1), [round]);
        // Two clients at once: the second waits for its turn.
        let mut next = connect(&path);
        drop(client);
        next.write_all(b"n").expect("it waits");
        assert_eq!(take_input(&serial, 1), b"n");
        print(&serial, b"!");
        assert_eq!(read_exactly(&mut next, 1), b"!");
        drop(next);
        // The guest notices nothing; the port notices at the latest when it writes, or when it reads the end.
        wait_until("the client's end", || UnixStream::connect(&path).is_ok());
    }
    assert_eq!(serial.lost_output(), 0);
}

#[test]
fn a_client_that_does_not_read_blocks_nobody_and_gets_the_latest() {
    let (_dir, path, serial, _) = socket();
    let sent = numbers(OUTPUT_CAPACITY * 3);
    // Nobody at all.
    print(&serial, &sent);
    assert_eq!(serial.lost_output(), (OUTPUT_CAPACITY * 2) as u64);
    let mut client = connect(&path);
    assert_same(
        &read_exactly(&mut client, OUTPUT_CAPACITY),
        &sent[OUTPUT_CAPACITY * 2..],
    );
    // Somebody who does not read: more than a socket's buffer takes.
    for _ in 0..10 {
        print(&serial, &sent);
    }
    assert!(serial.lost_output() > (OUTPUT_CAPACITY * 2) as u64);
    drop(client);
    print(&serial, b"end");
    assert!(saved(&serial).unsent_output.ends_with(b"end"));
}

#[test]
fn a_socket_path_must_be_free_and_is_free_again_afterwards() {
    let (dir, path, serial, _) = socket();
    assert_eq!(
        fs::metadata(&path)
            .expect("it is there")
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    let backend = SerialBackend::Socket { path: path.clone() };
    let error = Serial::new(backend.clone(), Arc::new(LineLog::default()))
        .err()
        .expect("refused");
    assert!(
        matches!(&error, SerialError::SocketExists { path: named } if *named == path),
        "{error}"
    );
    assert!(path.exists(), "a refusal removes nothing");
    serial.stop();
    assert!(!path.exists());
    drop(serial);

    // A plain file is in the way just as well, and so is a name that is too long.
    fs::write(&path, "mine").expect("a file");
    let error = Serial::new(backend.clone(), Arc::new(LineLog::default()))
        .err()
        .expect("refused");
    assert!(matches!(error, SerialError::SocketExists { .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("it is there"), "mine");
    let backend = SerialBackend::Socket {
        path: dir.path().join("x".repeat(200)),
    };
    let error = Serial::new(backend.clone(), Arc::new(LineLog::default()))
        .err()
        .expect("refused");
    assert!(matches!(error, SerialError::Socket { .. }), "{error}");
}

#[test]
fn somebody_elses_file_is_not_removed() {
    let (_dir, path, serial, _) = socket();
    fs::remove_file(&path).expect("it is there");
    fs::write(&path, "mine").expect("a file");
    drop(serial);
    assert_eq!(fs::read_to_string(&path).expect("it is there"), "mine");
}

#[test]
fn stopping_lets_the_output_leave_and_ends_the_thread() {
    let (_dir, path, serial, _) = socket();
    let mut client = connect(&path);
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        client.read_to_end(&mut got).expect("it ends");
        got
    });
    let sent = numbers(30_000);
    print(&serial, &sent);
    serial.stop();
    assert_same(&reader.join().expect("no panic"), &sent);
    assert!(UnixStream::connect(&path).is_err());
    // Afterwards everything still works, and nothing is kept.
    print(&serial, b"late");
    serial.pause();
    serial.resume();
    serial.stop();
    assert_eq!(saved(&serial).unsent_output, b"");
    assert_eq!(serial.lost_output(), 4);
}

#[test]
fn a_paused_port_stands_still_until_it_is_resumed() {
    let (_dir, path, serial, line) = socket();
    serial.write(IER, &[1]);
    let mut client = connect(&path);
    client.write_all(b"a").expect("it is read");
    wait_until("input", || saved(&serial).receive_fifo == b"a");
    let pulses = line.pulses();
    for _ in 0..50 {
        serial.pause();
        serial.pause();
        let before = serial.save();
        client.write_all(b"b").expect("it waits");
        std::thread::yield_now();
        assert_eq!(serial.save(), before);
        serial.resume();
    }
    assert_eq!(
        take_input(&serial, 51),
        [b"a".as_slice(), &[b'b'; 50]].concat()
    );
    assert!(line.pulses() >= pulses);
}

#[test]
fn every_byte_moves_exactly_once() {
    let (_dir, path, from, _) = socket();
    let (_dir2, path2, to, line) = socket();
    let input = numbers(100);
    from.write(IER, &[1]);
    from.write(LCR, &[0x1b]);
    {
        let mut client = connect(&path);
        client.write_all(&input).expect("it is read");
        wait_until("input", || {
            let state = saved(&from);
            state.receive_fifo.len() + state.pending_input.len() == input.len()
        });
        from.pause();
    }
    print(&from, b"unsent");
    let state = from.save();
    // The old machine gives its output to nobody.
    let mut late = connect(&path);
    drop(from);
    let mut rest = Vec::new();
    let _ = late.read_to_end(&mut rest);
    assert_eq!(rest, b"");

    to.pause();
    to.restore(&state).expect("own state");
    assert_eq!(to.save(), state);
    assert_eq!(line.pulses(), 1);
    to.resume();
    let mut client = connect(&path2);
    assert_eq!(read_exactly(&mut client, 6), b"unsent");
    assert_eq!(take_input(&to, input.len()), input);
    assert_eq!(inb(&to, LCR), 0x1b);
    assert_eq!(inb(&to, LSR) & 1, 0);
}

#[test]
fn unsent_output_reaches_a_file_too() {
    let (_dir, _path, from, _) = socket();
    print(&from, b"unsent");
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("out");
    let (to, _) = serial(SerialBackend::File {
        path: file.clone(),
        append: false,
    });
    to.restore(&from.save()).expect("own state");
    assert_eq!(fs::read(&file).expect("it is there"), b"unsent");
}

#[test]
fn a_pseudo_terminal_is_raw_and_carries_both_ways() {
    let (serial, line) = serial(SerialBackend::Pty);
    serial.write(IER, &[1]);
    for round in 0..3 {
        // Opened and closed like a terminal program does.
        let path = serial.pty_path().expect("a terminal");
        let mut terminal = fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("it is there");
        let mode = tcgetattr(&terminal).expect("a terminal");
        assert!(
            !mode
                .local_modes
                .intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
        );
        print(&serial, b"a\r\nb");
        assert_eq!(read_exactly(&mut terminal, 4), b"a\r\nb");
        terminal.write_all(b"\x03x\r").expect("room");
        assert_eq!(take_input(&serial, 3), b"\x03x\r", "round {round}");
    }
    assert!(line.pulses() >= 1);
}

#[test]
fn a_pseudo_terminal_without_reader_blocks_nobody() {
    let (serial, _) = serial(SerialBackend::Pty);
    let line = numbers(1 << 10);
    for _ in 0..1 << 10 {
        print(&serial, &line);
    }
    assert!(serial.lost_output() > 0);
    assert!(saved(&serial).unsent_output.len() <= OUTPUT_CAPACITY);
    // And the last of it is still there for who comes late.
    assert!(saved(&serial).unsent_output.ends_with(&line));
}

/// Says to a copy of this test program what it is to do, and how it ends.
const CHILD: &str = "SERIAL_STDIO_CHILD";

/// The copy: a guest that answers each byte with the next, until `q`.
fn stdio_child(ending: &str) {
    let (serial, _) = serial(SerialBackend::Stdio);
    let second = Serial::new(SerialBackend::Stdio, Arc::new(LineLog::default()));
    assert!(matches!(second.err(), Some(SerialError::StdioBusy)));
    print(&serial, b"<ready>");
    loop {
        match take_input(&serial, 1)[0] {
            b'q' => break,
            byte => print(&serial, &[byte + 1]),
        }
    }
    print(&serial, b"<bye>");
    match ending {
        "drop" => drop(serial),
        "exit" => {
            // Not `drop`: this ends the process under the device's feet, once the output is out.
            wait_until("the output to leave", || {
                saved(&serial).unsent_output.is_empty()
            });
            std::process::exit(0);
        }
        _ => panic!("on purpose"),
    }
}

#[test]
fn a_terminal_is_raw_while_it_is_used_and_gets_its_mode_back_however_the_process_ends() {
    if let Ok(ending) = std::env::var(CHILD) {
        return stdio_child(&ending);
    }
    for ending in ["drop", "exit", "panic"] {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a terminal");
        grantpt(&master)
            .and_then(|()| unlockpt(&master))
            .expect("ours");
        let terminal = ioctl_tiocgptpeer(&master, flags).expect("its other side");
        let before = tcgetattr(&terminal).expect("a terminal");
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "--nocapture", "--test-threads=1"])
            .arg("serial::tests::a_terminal_is_raw_while_it_is_used_and_gets_its_mode_back_however_the_process_ends")
            .env(CHILD, ending)
            .stdin(terminal.try_clone().expect("a descriptor"))
            .stdout(terminal.try_clone().expect("a descriptor"))
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");

        let mut master = fs::File::from(master);
        let mut seen = Vec::new();
        let mut expect = |master: &mut fs::File, marker: &[u8]| {
            while !seen.windows(marker.len()).any(|window| window == marker) {
                seen.push(read_exactly(master, 1)[0]);
            }
            seen.clear();
        };
        expect(&mut master, b"<ready>");
        let raw = tcgetattr(&terminal).expect("a terminal").local_modes;
        assert!(
            !raw.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG),
            "{ending}"
        );
        // Ctrl-C is the guest's, unechoed.
        master.write_all(b"\x03").expect("room");
        expect(&mut master, b"\x04");
        master.write_all(b"q").expect("room");
        expect(&mut master, b"<bye>");
        let status = child.wait().expect("it ends");
        assert_eq!(status.success(), ending != "panic", "{ending}");
        let after = tcgetattr(&terminal).expect("a terminal");
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (before.local_modes, before.input_modes, before.output_modes),
            "{ending}"
        );
    }
}
