//! One running QEMU: started, listened to, and killed when dropped.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A console that prints more than this is cut; no test needs as much.
const LOG_LIMIT: usize = 16 << 20;

/// How long a host may take to its user space, before patience stretches it.
const UP_LIMIT: Duration = Duration::from_secs(60);

/// How a boot ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The script ended with this status.
    Exit(i32),
    /// There was no result; why, in a few words.
    NoResult(String),
    /// The emulator refused to start: nothing that another try would change.
    Refused,
}

/// A lab host that is running, with what its console has said so far.
pub(crate) struct Machine {
    child: Child,
    output: Receiver<Vec<u8>>,
    reader: Option<JoinHandle<()>>,
    errors: Option<JoinHandle<String>>,
    nonce: String,
    log: String,
    /// How much of the log, in whole lines, was searched for markers.
    searched: usize,
    started: Instant,
    up: bool,
    up_limit: Duration,
    limit: Duration,
    end: Option<End>,
}

impl Machine {
    /// Starts QEMU with a serial console on its standard output. `limit` is for the whole boot.
    pub(crate) fn start(
        qemu_args: &[String],
        nonce: &str,
        limit: Duration,
        patience: u32,
    ) -> Result<Self> {
        // The emulator dies with the thread that started it, so not even a killed test leaves one behind.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(qemu_args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start qemu-system-x86_64: apt-get install qemu-system-x86")?;
        let mut stdout = child
            .stdout
            .take()
            .context("the child has a pipe for its output")?;
        let mut stderr = child
            .stderr
            .take()
            .context("the child has a pipe for its errors")?;
        let (sender, output) = channel();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What could not be read is only missing from a message.
            let _ = stderr.by_ref().take(64 << 10).read_to_end(&mut text);
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self {
            child,
            output,
            reader: Some(reader),
            errors: Some(errors),
            nonce: nonce.to_owned(),
            log: String::new(),
            searched: 0,
            started: Instant::now(),
            up: false,
            up_limit: UP_LIMIT * patience,
            limit: limit * patience,
            end: None,
        })
    }

    /// Listens for at most `time`; returns how the boot ended once it has.
    pub(crate) fn listen(&mut self, time: Duration) -> Option<&End> {
        if self.end.is_none() {
            match self.output.recv_timeout(time) {
                Ok(bytes) => self.take_in(&bytes),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.end = Some(self.emulator_ended());
                }
            }
            self.look_at_the_clock();
            if self.end.is_some() {
                self.stop();
            }
        }
        self.end.as_ref()
    }

    /// What the console said, with QEMU's own complaints at its end.
    pub(crate) fn into_log(mut self) -> String {
        self.stop();
        if let Some(errors) = self.errors.take().and_then(|errors| errors.join().ok())
            && !errors.trim().is_empty()
        {
            self.log.push_str("\n--- qemu\n");
            // A named CPU model has features that no emulator has; QEMU says so one by one, for pages.
            for line in errors
                .lines()
                .filter(|line| !line.contains("TCG doesn't support requested feature"))
            {
                self.log.push_str(line);
                self.log.push('\n');
            }
        }
        std::mem::take(&mut self.log)
    }

    fn take_in(&mut self, bytes: &[u8]) {
        if self.log.len() < LOG_LIMIT {
            self.log
                .push_str(&String::from_utf8_lossy(bytes).replace('\r', ""));
        }
        let Some(end) = self
            .log
            .rfind('\n')
            .map(|end| end + 1)
            .filter(|end| *end > self.searched)
        else {
            return;
        };
        let whole = &self.log[self.searched..end];
        self.searched = end;
        self.up = self.up || whole.contains(&format!("LAB-UP-{}", self.nonce));
        if let Some(rest) = after(whole, &format!("LAB-RESULT-{} ", self.nonce)) {
            self.end = Some(rest.trim().parse().map_or_else(
                |_| End::NoResult(format!("the result `{rest}` cannot be read")),
                End::Exit,
            ));
        } else if let Some(why) = after(whole, &format!("LAB-HANG-{} ", self.nonce)) {
            self.end = Some(End::NoResult(why.to_owned()));
        }
    }

    fn emulator_ended(&mut self) -> End {
        match self.child.wait() {
            Ok(status) if !status.success() && self.log.is_empty() => End::Refused,
            _ => End::NoResult("the emulator ended without a result".to_owned()),
        }
    }

    fn look_at_the_clock(&mut self) {
        let time = self.started.elapsed();
        if self.end.is_none() && !self.up && time > self.up_limit {
            self.end = Some(End::NoResult(format!(
                "the host was not up after {} s",
                time.as_secs()
            )));
        } else if self.end.is_none() && time > self.limit {
            self.end = Some(End::NoResult(format!(
                "there was no result after {} s",
                time.as_secs()
            )));
        }
    }

    fn stop(&mut self) {
        // Both fail only for a child that has ended and was waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The rest of the line behind `marker`.
fn after<'a>(text: &'a str, marker: &str) -> Option<&'a str> {
    let start = text.find(marker)? + marker.len();
    text[start..].lines().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_gives_the_rest_of_its_line() {
        assert_eq!(after("x\nLAB-RESULT-7 3\nmore", "LAB-RESULT-7 "), Some("3"));
        assert_eq!(after("LAB-RESULT-8 3\n", "LAB-RESULT-7 "), None);
    }
}
