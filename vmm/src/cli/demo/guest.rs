//! What the memory guest says on its serial port.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// Longest line that is kept, in bytes.
const LONGEST_LINE: usize = 4096;

/// The guest's serial port, by the socket that its vmm offers.
pub(super) struct Serial {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Serial {
    /// Connects to the socket at `path`; [`Serial::line`] then waits for `patience` at most.
    pub(super) fn connect(path: &Path, patience: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(Self {
            stream,
            pending: Vec::new(),
        })
    }

    /// Types a byte.
    pub(super) fn send(&mut self, byte: u8) -> io::Result<()> {
        self.stream.write_all(&[byte])
    }

    /// The next whole line, if there is one yet.
    pub(super) fn line(&mut self) -> io::Result<Option<String>> {
        if let Some(line) = self.take_line() {
            return Ok(Some(line));
        }
        let mut bytes = [0; 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the serial port was closed",
            )),
            Ok(length) => {
                self.pending.extend_from_slice(&bytes[..length]);
                if self.pending.len() > LONGEST_LINE {
                    self.pending.clear();
                }
                Ok(self.take_line())
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.pending.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.pending.drain(..=end).collect();
        Some(String::from_utf8_lossy(line.trim_ascii()).into_owned())
    }
}

/// A line of the guest that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// It has filled its working set.
    Ready {
        /// Pages of the set.
        pages: u64,
    },
    /// It is at work.
    Report {
        /// Page writes so far.
        writes: u64,
    },
    /// It has checked everything.
    Verdict(Verdict),
    /// It cannot go on, or found damage.
    Trouble(String),
}

/// The guest's word on its memory. Counts are pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    /// Pages it has checked.
    pub(super) pages: u64,
    /// Page writes it has made.
    pub(super) writes: u64,
    /// Pages that hold no write of its own, or writes that are missing altogether.
    pub(super) lost: u64,
    /// Pages that mix versions.
    pub(super) torn: u64,
    /// Pages in an older version.
    pub(super) stale: u64,
    /// Its conclusion.
    pub(super) ok: bool,
}

impl Said {
    /// Understands a line, if it is one of those.
    pub(super) fn parse(line: &str) -> Option<Self> {
        if line.starts_with("guest: panic") || line.starts_with("memory: damage") {
            return Some(Self::Trouble(line.to_owned()));
        }
        let (kind, rest) = line.strip_prefix("memory: ")?.split_once(' ')?;
        let number = |key: &str| {
            rest.split_whitespace()
                .filter_map(|word| word.split_once('='))
                .find(|(name, _)| *name == key)
                .and_then(|(_, value)| value.parse().ok())
        };
        match kind {
            "ready" => Some(Self::Ready {
                pages: number("pages")?,
            }),
            "report" => Some(Self::Report {
                writes: number("writes")?,
            }),
            "verdict" => Some(Self::Verdict(Verdict {
                pages: number("pages")?,
                writes: number("writes")?,
                lost: number("lost")?,
                torn: number("torn")?,
                stale: number("stale")?,
                ok: rest.ends_with(" ok"),
            })),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn lines_of_the_guest_are_understood() {
        assert_eq!(
            Said::parse("memory: ready pages=65536 cpus=2 hot=4096 fill_ms=80"),
            Some(Said::Ready { pages: 65536 })
        );
        assert_eq!(
            Said::parse(
                "memory: report t_ms=1000 writes=67536 verified=16384 lost=0 torn=0 stale=0 passes=0"
            ),
            Some(Said::Report { writes: 67536 })
        );
        let verdict = |line| match Said::parse(line) {
            Some(Said::Verdict(verdict)) => verdict,
            other => panic!("{line}: {other:?}"),
        };
        let good = verdict("memory: verdict pages=65536 writes=70000 lost=0 torn=0 stale=0 ok");
        assert_eq!((good.pages, good.writes, good.ok), (65536, 70000, true));
        let bad = verdict("memory: verdict pages=65536 writes=70000 lost=1 torn=2 stale=3 damaged");
        assert_eq!((bad.lost, bad.torn, bad.stale, bad.ok), (1, 2, 3, false));
        assert!(matches!(
            Said::parse("memory: damage kind=lost page=1 gpa=0x1000 expected=1 found=0"),
            Some(Said::Trouble(_))
        ));
        for other in [
            "",
            "memory:",
            "memory: verdict pages=1",
            "booting",
            "memory: report t_ms=x",
        ] {
            assert_eq!(Said::parse(other), None, "{other}");
        }
    }

    #[test]
    fn lines_come_whole_and_long_ones_are_dropped() {
        let directory = tempfile::tempdir().expect("made");
        let path = directory.path().join("serial.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let mut serial = Serial::connect(&path, Duration::from_millis(10)).expect("connect");
        let (mut port, _) = listener.accept().expect("accept");

        port.write_all(b"memory: re").expect("write");
        assert_eq!(serial.line().expect("reads"), None);
        assert_eq!(serial.line().expect("reads"), None);
        port.write_all(b"ady\r\nnext").expect("write");
        assert_eq!(
            serial.line().expect("reads").as_deref(),
            Some("memory: ready")
        );

        port.write_all(&[b'x'; 3 * LONGEST_LINE]).expect("write");
        port.write_all(b"\nlast\n").expect("write");
        let last = std::iter::from_fn(|| Some(serial.line().expect("reads"))).flatten();
        let lines: Vec<String> = last.take_while(|line| line != "last").collect();
        assert!(lines.iter().all(|line| line.len() <= LONGEST_LINE));

        serial.send(b'v').expect("sends");
        let mut typed = [0];
        port.read_exact(&mut typed).expect("reads");
        assert_eq!(typed, *b"v");
        drop(port);
        assert!(serial.line().is_err());
    }
}
