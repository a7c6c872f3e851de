//! A `vmm` process of the demo, which never outlives it.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal,
};

/// How long a process may take to end when asked to.
const GRACE: Duration = Duration::from_secs(2);

/// Lines of its standard error that are kept to explain a failure.
const KEPT: usize = 8;

/// Longest such line in bytes.
const LONGEST_LINE: u64 = 4096;

/// A running child; dropping it ends it.
pub(super) struct Vmm {
    name: &'static str,
    process: Child,
    lines: Receiver<String>,
    last: VecDeque<String>,
}

impl Vmm {
    /// Starts this very program again.
    pub(super) fn start<'a>(
        name: &'static str,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C is for the demo, which then ends its children in order.
            .process_group(0);
        die_with_parent(&mut command);
        let mut process = command
            .spawn()
            .with_context(|| format!("cannot start the {name} process"))?;
        let (sender, lines) = mpsc::channel();
        let errors = process.stderr.take();
        let vmm = Self {
            name,
            process,
            lines,
            last: VecDeque::new(),
        };
        if let Some(errors) = errors {
            std::thread::Builder::new()
                .name(format!("{name} stderr"))
                .spawn(move || forward(errors, &sender))
                .context("cannot start a thread")?;
        }
        Ok(vmm)
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The next line of its standard error, if one comes within `limit`.
    pub(super) fn line(&mut self, limit: Duration) -> Option<String> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => {
                if self.last.len() == KEPT {
                    self.last.pop_front();
                }
                self.last.push_back(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                // It has closed its standard error: it is ending, and `check` will say so soon.
                std::thread::sleep(limit);
                None
            }
        }
    }

    /// Fails if it has ended, with what it said last.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self
            .process
            .try_wait()
            .context("cannot look after a child")?
        {
            // The thread that reads its last words may be a moment behind.
            while self.line(Duration::from_millis(50)).is_some() {}
            let said = Vec::from(std::mem::take(&mut self.last)).join("; ");
            bail!("the {} process ended ({status}): {said}", self.name);
        }
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(Some(_))) {
            return;
        }
        let asked = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let limit = Instant::now() + GRACE;
        while asked.is_ok() && Instant::now() < limit {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        tracing::warn!(
            process = self.name,
            "does not end when asked to; killing it"
        );
        // Both can only fail if it is gone.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The kernel kills the child when this process ends, however that happens.
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let arrange = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            return Err(io::Error::other("the parent has gone"));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing unless the
    // parent has gone, in which case the child is about to fail anyway.
    unsafe {
        command.pre_exec(arrange);
    }
}

/// Passes lines on until the child closes its end or nobody listens.
fn forward(errors: ChildStderr, to: &mpsc::Sender<String>) {
    let mut errors = BufReader::new(errors);
    let mut line = Vec::new();
    loop {
        line.clear();
        match errors
            .by_ref()
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(line.trim_ascii()).into_owned();
                if to.send(text).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_ends_says_why() {
        // The test binary is `/proc/self/exe` here: an unknown option makes it end with a message.
        let mut child = Vmm::start("source", ["--no-such-option"]).expect("starts");
        let error = loop {
            if let Err(error) = child.check() {
                break error.to_string();
            }
            child.line(Duration::from_millis(20));
        };
        assert!(error.contains("the source process ended"), "{error}");
        assert!(error.contains("no-such-option"), "{error}");
    }

    #[test]
    fn a_child_ends_with_its_owner() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        die_with_parent(&mut command);
        let process = command.spawn().expect("starts");
        let pid = process.id();
        let (_, lines) = mpsc::channel();
        drop(Vmm {
            name: "sleeper",
            process,
            lines,
            last: VecDeque::new(),
        });
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
