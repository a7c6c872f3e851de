//! Following a move: its progress on standard error, and its end.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::{Client, ClientError, Job};
use crate::job::JobId;

/// How often the figures are asked for.
const POLL: Duration = Duration::from_millis(100);

/// Waits for the end of a job and shows how it goes. Once `cancel` is set, asks for the job to be cancelled.
///
/// The outer error is this process's, the inner one the other vmm's or the way to it.
pub(super) fn follow(
    client: &Client,
    id: JobId,
    cancel: &AtomicBool,
) -> anyhow::Result<Result<Job, ClientError>> {
    // The end is waited for by a request that is under way when it comes: a `vmm run` whose machine has
    // moved away ends as soon as it has answered, and a later question would find nobody.
    let waiting = Client::new(client.path()).context("cannot start a client")?;
    let (sender, end) = mpsc::channel();
    std::thread::Builder::new()
        .name("job end".into())
        .spawn(move || {
            // The receiver goes when this process does.
            let _ = sender.send(waiting.job_end(id));
        })
        .context("cannot start the thread that waits for the job")?;

    let mut display = Display::new();
    let mut asked = false;
    loop {
        match end.recv_timeout(POLL) {
            Ok(end) => {
                if let Ok(job) = &end {
                    display.show(job);
                }
                display.clear();
                return Ok(end);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                anyhow::bail!("the thread that waits for the job ended");
            }
        }
        if cancel.load(Ordering::Relaxed) && !asked {
            asked = true;
            match client.cancel_job(id) {
                Ok(()) => display.say("cancelling the move; the guest stays here"),
                Err(e) => display.say(&format!("the move cannot be cancelled: {e}")),
            }
        }
        // If this fails, the request for the end fails too and says why.
        if let Ok(job) = client.job(id) {
            display.show(&job);
        }
    }
}

/// A progress bar on a terminal, a line for each phase and round elsewhere.
struct Display {
    bar: Option<ProgressBar>,
    shown: (String, usize),
}

impl Display {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{prefix:10} [{bar:30}] {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self {
            bar,
            shown: Default::default(),
        }
    }

    fn show(&mut self, job: &Job) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(job.bytes_total);
                bar.set_position(job.bytes_total.saturating_sub(job.bytes_remaining));
                bar.set_prefix(job.phase.clone());
                bar.set_message(figures(job));
            }
            None => {
                let now = (job.phase.clone(), job.rounds.len());
                if now != self.shown {
                    eprintln!("{}: {}", job.phase, figures(job));
                    self.shown = now;
                }
            }
        }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn figures(job: &Job) -> String {
    format!(
        "round {}, {}/s, {} remaining",
        job.rounds.len(),
        bytes(job.rate_bytes_per_s),
        bytes(job.bytes_remaining as f64),
    )
}

/// How a move that succeeded went, a line.
pub(super) fn summary(job: &Job) -> String {
    let downtime = job
        .downtime_ms
        .map_or("unknown".into(), |ms| format!("{ms:.1} ms"));
    format!(
        "moved in {:.0} ms: {} round{}, downtime {downtime}, {} sent, {}/s",
        job.elapsed_ms,
        job.rounds.len(),
        if job.rounds.len() == 1 { "" } else { "s" },
        bytes(job.bytes_sent as f64),
        bytes(throughput(job)),
    )
}

/// Bytes per second over the whole move.
pub(super) fn throughput(job: &Job) -> f64 {
    if job.elapsed_ms > 0.0 {
        job.bytes_sent as f64 * 1000.0 / job.elapsed_ms
    } else {
        0.0
    }
}

/// A number of bytes for people.
pub(super) fn bytes(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return format!("{value:.*} {unit}", usize::from(unit != "B"));
        }
        value /= 1024.0;
    }
    format!("{value:.2} GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        let cases = [
            (0.0, "0 B"),
            (1023.0, "1023 B"),
            (1024.0, "1.0 KiB"),
            (1.5 * 1048576.0, "1.5 MiB"),
            (2147483648.0, "2.00 GiB"),
        ];
        for (number, text) in cases {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn summary_names_every_figure() {
        let job = Job {
            bytes_sent: 1 << 30,
            elapsed_ms: 500.0,
            downtime_ms: Some(2.25),
            rounds: vec![serde_json::json!({}), serde_json::json!({})],
            ..Job::default()
        };
        assert_eq!(
            summary(&job),
            "moved in 500 ms: 2 rounds, downtime 2.2 ms, 1.00 GiB sent, 2.00 GiB/s"
        );
        assert_eq!(throughput(&Job::default()), 0.0);
    }
}
