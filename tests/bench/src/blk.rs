//! Random 4 KiB reads of a virtio disk, without a guest kernel: the block guest polls its queues in ring 3.
//!
//! ```text
//!   an image, random content, in the page cache ─┬─ ours:  block.elf, one vCPU ── virtio-blk ── io_uring
//!                                                ├─ QEMU:  the same, aio=io_uring
//!                                                └─ limit: the same reads by one loop around io_uring on the host
//! ```
//!
//! All sides read the same file through the page cache, which is filled before the first run; so it is the path that is measured, not the
//! host's disk. With several queues one vCPU polls all of them, and one loop has as many rings.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use guests::Report;
use native::console::Console;
use native::process::Folder;
use serde_json::{Value, json};

use crate::stats::{cell, median_of, ratio, rounded};
use crate::{Common, ours, qemu, ring};

/// Bytes of a read.
pub(crate) const BLOCK: usize = 4096;
/// Descriptors of a queue, of either side.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Guest RAM.
pub(crate) const MEMORY_MIB: u64 = 128;
/// Longest a guest may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Options of this benchmark.
#[derive(Args, Clone)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// How long each side of a case is measured in a run, in seconds.
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Size of the image in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65536))]
    image_mib: u64,
    /// Where the image is made, and removed at the end; a temporary folder by default.
    #[arg(long)]
    directory: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number from 0.01 to 600".to_owned()),
    }
}

/// How many requests are under way.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    name: &'static str,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
}

const CASES: [Case; 3] = [
    Case {
        name: "qd1",
        queues: 1,
        depth: 1,
    },
    Case {
        name: "qd32",
        queues: 1,
        depth: 32,
    },
    Case {
        name: "4q-qd32",
        queues: 4,
        depth: 32,
    },
];

/// What a side is to do.
pub(crate) struct Load<'a> {
    pub(crate) case: Case,
    pub(crate) kernel: &'a Path,
    pub(crate) image: &'a Path,
    /// The part that is counted.
    pub(crate) time: Duration,
    pub(crate) seed: u64,
}

impl Load<'_> {
    /// The block guest's command line.
    pub(crate) fn cmdline(&self) -> String {
        format!(
            "queues={} depth={} run_ms={} seed={}",
            self.case.queues,
            self.case.depth,
            self.time.as_millis(),
            self.seed
        )
    }

    /// Asks the block guest at this console for a measurement.
    pub(crate) fn measured(&self, console: &mut Console) -> Result<Value> {
        console.line("block: ready", START_LIMIT)?;
        console.send(&[guests::ASK_MEASUREMENT])?;
        let line = console.line("block: result", START_LIMIT + self.time * 2)?;
        match Report::parse(&line)? {
            Report::BlockResult {
                requests,
                errors,
                elapsed_ns,
                latency_ns,
                notified,
            } => {
                ensure!(errors == 0, "{errors} reads failed in the guest: {line}");
                let mut figures = figures(requests, Duration::from_nanos(elapsed_ns), latency_ns);
                figures["notified"] = json!(notified);
                Ok(figures)
            }
            _ => bail!("the guest reports something else: {line}"),
        }
    }
}

/// The figures of a side.
pub(crate) fn figures(requests: u64, elapsed: Duration, latency_ns: u64) -> Value {
    let iops = requests as f64 / elapsed.as_secs_f64();
    json!({
        "iops": iops,
        "bytes_per_s": iops * BLOCK as f64,
        "latency_us": latency_ns as f64 / 1000.0,
    })
}

/// The image, removed when dropped.
struct Image(PathBuf);

impl Image {
    /// Makes it, with contents that nothing compresses, and leaves it in the page cache.
    fn new(directory: &Path, mib: u64) -> Result<Self> {
        let path = directory.join(format!("vmm-bench-blk-{}.raw", std::process::id()));
        let image = Self(path);
        let describe = || format!("cannot write {}", image.0.display());
        let mut file = File::create(&image.0).with_context(describe)?;
        let mut random = File::open("/dev/urandom")?;
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..mib {
            random.read_exact(&mut chunk)?;
            file.write_all(&chunk).with_context(describe)?;
        }
        file.sync_all().with_context(describe)?;
        image.warm()?;
        Ok(image)
    }

    /// Reads it once.
    fn warm(&self) -> Result<()> {
        std::io::copy(&mut File::open(&self.0)?, &mut std::io::sink())?;
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs all cases and prints them.
pub(crate) fn run(options: Options) -> Result<()> {
    let folder = Folder::new()?;
    let kernel = folder.write("block.elf", guests::BLOCK)?;
    let directory = options.directory.clone().unwrap_or_else(|| folder.join(""));
    let image = Image::new(&directory, options.image_mib)?;
    let peer = qemu::version();
    let mut runs: Vec<Vec<Value>> = vec![Vec::new(); CASES.len()];
    for run in 0..options.common.runs {
        for (case, runs) in CASES.into_iter().zip(&mut runs) {
            eprintln!("run {} of {}: {}", run + 1, options.common.runs, case.name);
            let load = Load {
                case,
                kernel: &kernel,
                image: &image.0,
                time: Duration::from_secs_f64(options.seconds),
                seed: u64::from(run) + 1,
            };
            image.warm()?;
            let ours = ours::reads(&folder, &load).context("our disk")?;
            let qemu = match &peer {
                Some(_) => qemu::reads(&folder, &load).context("QEMU's disk")?,
                None => Value::Null,
            };
            let limit = ring::reads(&load).context("the loop around io_uring")?;
            runs.push(json!({"ours": ours, "qemu": qemu, "limit": limit}));
        }
    }
    if !options.common.json {
        println!(
            "{} MiB image in the page cache, random reads of {BLOCK} bytes; iops, and microseconds a request:",
            options.image_mib
        );
        println!(
            "{:<8} {:>12} {:>12} {:>12} {:>8} {:>8} {:>9} {:>9} {:>9} {:>8}",
            "case",
            "ours",
            "QEMU",
            "limit",
            "of QEMU",
            "of limit",
            "ours us",
            "QEMU us",
            "limit us",
            "of QEMU"
        );
    }
    for (case, runs) in CASES.into_iter().zip(runs) {
        let result = summary(case, peer.as_deref(), runs);
        if options.common.json {
            println!("{result}");
        } else {
            let row = |side: &str, field: &str| cell(&result[side][field]);
            println!(
                "{:<8} {:>12} {:>12} {:>12} {:>8} {:>8} {:>9} {:>9} {:>9} {:>8}",
                case.name,
                row("ours", "iops"),
                row("qemu", "iops"),
                row("limit", "iops"),
                row("ratio", "iops"),
                row("ratio", "limit"),
                row("ours", "latency_us"),
                row("qemu", "latency_us"),
                row("limit", "latency_us"),
                row("ratio", "latency"),
            );
        }
    }
    Ok(())
}

/// Medians of a case, and ratios of them.
fn summary(case: Case, peer: Option<&str>, runs: Vec<Value>) -> Value {
    let side = |side: &str| {
        json!({
            "iops": rounded(median_of(&runs, side, "iops")),
            "bytes_per_s": rounded(median_of(&runs, side, "bytes_per_s")),
            "latency_us": rounded(median_of(&runs, side, "latency_us")),
        })
    };
    let compared = |other: &str, field: &str| {
        rounded(ratio(
            median_of(&runs, "ours", field),
            median_of(&runs, other, field),
        ))
    };
    json!({
        "case": case.name,
        "queues": case.queues,
        "depth": case.depth,
        "peer": peer,
        "ours": side("ours"),
        "qemu": if peer.is_some() { side("qemu") } else { Value::Null },
        "limit": side("limit"),
        "ratio": {
            "iops": compared("qemu", "iops"),
            "latency": compared("qemu", "latency_us"),
            "limit": compared("limit", "iops"),
        },
        "runs": runs,
    })
}
