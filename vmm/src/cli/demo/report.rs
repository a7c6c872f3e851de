//! What the demo says at its end.

use std::fmt;

use serde::Serialize;

use super::guest::Verdict;
use crate::cli::progress;
use crate::client::Job;

/// The outcome. What was not reached is `null` in JSON.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The guest moved and found its memory whole.
    pub(super) ok: bool,
    /// Writes of the guest that did not survive: lost, torn and stale pages.
    lost_writes: Option<u64>,
    /// Pre-copy rounds.
    rounds: Option<u64>,
    /// From the request to the end of the move, in milliseconds.
    total_ms: Option<f64>,
    /// How long the guest stood still, in milliseconds.
    downtime_ms: Option<f64>,
    /// The guest's RAM in bytes.
    ram_bytes: Option<u64>,
    /// Bytes that crossed the connection.
    bytes_sent: Option<u64>,
    /// Those over the total time.
    bytes_per_s: Option<f64>,
    /// The guest's word.
    verdict: Option<Verdict>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The figures in a sentence.
    #[serde(skip)]
    summary: String,
}

impl Report {
    /// The guest has moved and given its verdict.
    pub(super) fn moved(job: &Job, ram_bytes: u64, verdict: Verdict) -> Self {
        let lost = verdict.lost + verdict.torn + verdict.stale;
        Self {
            ok: verdict.ok && lost == 0,
            lost_writes: Some(lost),
            rounds: Some(job.rounds.len() as u64),
            total_ms: Some(job.elapsed_ms),
            downtime_ms: job.downtime_ms,
            ram_bytes: Some(ram_bytes),
            bytes_sent: Some(job.bytes_sent),
            bytes_per_s: Some(progress::throughput(job)),
            verdict: Some(verdict),
            error: None,
            summary: progress::summary(job),
        }
    }

    /// It did not come to that.
    pub(super) fn failed(error: String) -> Self {
        Self {
            ok: false,
            lost_writes: None,
            rounds: None,
            total_ms: None,
            downtime_ms: None,
            ram_bytes: None,
            bytes_sent: None,
            bytes_per_s: None,
            verdict: None,
            error: Some(error),
            summary: String::new(),
        }
    }

    /// One JSON object in one line.
    pub(super) fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary)?;
        if let Some(v) = &self.verdict {
            writeln!(
                f,
                "the guest's verdict: {} pages checked after {} writes, {} lost, {} torn, {} stale: {}",
                v.pages,
                v.writes,
                v.lost,
                v.torn,
                v.stale,
                if self.ok { "ok" } else { "damaged" },
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            rounds: vec![serde_json::json!({}); 3],
            bytes_sent: 1 << 20,
            elapsed_ms: 100.0,
            downtime_ms: Some(1.5),
            ..Job::default()
        }
    }

    #[test]
    fn report_has_the_promised_keys() {
        let verdict = Verdict {
            ok: true,
            ..Verdict::default()
        };
        let json: serde_json::Value =
            serde_json::from_str(&Report::moved(&job(), 1 << 30, verdict).to_json()).expect("JSON");
        assert_eq!(json["ok"], true);
        assert_eq!(json["lost_writes"], 0);
        assert_eq!(json["rounds"], 3);
        assert_eq!(json["total_ms"], 100.0);
        assert_eq!(json["downtime_ms"], 1.5);
        assert_eq!(json["ram_bytes"], 1 << 30);
        assert_eq!(json["bytes_sent"], 1 << 20);
        assert_eq!(json["bytes_per_s"], 10485760.0);
        assert_eq!(json["verdict"]["ok"], true);
    }

    #[test]
    fn any_damage_is_a_lost_write_and_not_ok() {
        for (lost, torn, stale) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let verdict = Verdict {
                lost,
                torn,
                stale,
                ok: true,
                ..Verdict::default()
            };
            let report = Report::moved(&job(), 0, verdict);
            assert!(!report.ok);
            assert_eq!(report.lost_writes, Some(1));
            assert!(report.to_string().contains("damaged"));
        }
    }

    #[test]
    fn a_failure_is_an_object_too() {
        let json: serde_json::Value =
            serde_json::from_str(&Report::failed("no luck".into()).to_json()).expect("JSON");
        assert_eq!(json["ok"], false);
        assert_eq!(json["error"], "no luck");
        assert!(json["lost_writes"].is_null());
    }
}
