//! The other end of a guest's serial port.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A connection to a guest's serial socket that reads lines.
pub struct Console {
    stream: UnixStream,
    seen: String,
    unread: usize,
}

impl Console {
    /// Connects, waiting a while for the socket to appear.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    return Ok(Self {
                        stream,
                        seen: String::new(),
                        unread: 0,
                    });
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(error)
                        .with_context(|| format!("no serial port at {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Types.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .context("the guest's serial port takes no input")
    }

    /// All that has been read.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    /// Waits for a line that begins with `prefix`, passing over others, and returns it.
    pub fn line(&mut self, prefix: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(end) = self.seen[self.unread..].find('\n') {
                let line = self.seen[self.unread..self.unread + end]
                    .trim_end()
                    .to_owned();
                self.unread += end + 1;
                if line.contains("exception") {
                    bail!("the guest reports: {line}");
                }
                // Bytes may have been lost before a connection was made, so a line may begin anywhere.
                if let Some(at) = line.find(prefix) {
                    return Ok(line[at..].to_owned());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "no line {prefix:?} within {limit:?}; the guest said: {:?}",
                    self.tail()
                );
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!(
                    "the serial port closed before {prefix:?}; the guest said: {:?}",
                    self.tail()
                ),
                Ok(n) => self.seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock
                            | std::io::ErrorKind::TimedOut
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn tail(&self) -> &str {
        let mut from = self.seen.len().saturating_sub(600);
        while !self.seen.is_char_boundary(from) {
            from += 1;
        }
        &self.seen[from..]
    }

    /// Asks the guest to look at all its memory (or registers, or its disk) now and returns its verdict line.
    pub fn verdict(&mut self) -> Result<String> {
        self.send(b"v")?;
        self.line_of_verdict()
    }

    fn line_of_verdict(&mut self) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.line("", left)?;
            if let Some(at) = line
                .find("memory: verdict")
                .or_else(|| line.find("cpu: verdict"))
                .or_else(|| line.find("block: verdict"))
            {
                return Ok(line[at..].to_owned());
            }
        }
    }
}
