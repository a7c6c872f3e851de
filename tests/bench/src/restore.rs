//! From a snapshot in files to a guest that runs.
//!
//! ```text
//!   a guest of 4 GiB, of which it has filled a part ── pause, snapshot ──► files
//!      ours:  a fresh `vmm serve` ── vm.restore ── vm.resume ──► first output
//!      QEMU:  migrated to a file; a fresh process ── migrate-incoming ──► first output
//! ```
//!
//! Both processes are there before the clock starts. The guest prints a report every millisecond, so its first output is at most
//! that much later than its first instruction. `cold` drops the files from the page cache before each run, `warm` reads them.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use native::process::{Folder, Vmm};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};

use crate::stats::{cell, median_of, ratio, rounded};
use crate::{Common, limit, qemu};

/// Longest a guest may take to fill its memory or to be restored.
const LIMIT: Duration = Duration::from_secs(120);
/// Memory touched before each run, as [`limit::warm`] says: more than a guest touches until its first output.
const WARM_MIB: u64 = 64;

/// Options of this benchmark.
#[derive(Args, Clone, Copy)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Guest RAM in MiB.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(64..=16384))]
    memory_mib: u64,
    /// How much of it the guest has filled, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=8192))]
    filled_mib: u64,
}

/// What is restored.
struct Saved<'a> {
    folder: &'a Folder,
    kernel: &'a Path,
    options: Options,
    cmdline: String,
}

/// Runs all cases and prints them.
pub(crate) fn run(options: Options) -> Result<()> {
    let folder = Folder::new()?;
    let kernel = folder.write("memory.elf", guests::MEMORY)?;
    let saved = Saved {
        folder: &folder,
        kernel: &kernel,
        options,
        cmdline: format!(
            "working_set_mib={} rate=2000 report_ms=1",
            options.filled_mib
        ),
    };
    let peer = qemu::version();
    saved.by_us()?;
    let file = folder.join("qemu.state");
    if peer.is_some() {
        qemu::saved(&saved.machine(), &file).context("QEMU does not save")?;
    }
    if !options.common.json {
        println!(
            "{:<6} {:>12} {:>12} {:>14} {:>12} {:>12} {:>8}",
            "case", "restore ms", "resume ms", "first byte ms", "resident", "QEMU ms", "ratio"
        );
    }
    for cold in [false, true] {
        let mut runs = Vec::new();
        for run in 0..options.common.runs {
            let name = if cold { "cold" } else { "warm" };
            eprintln!("run {} of {}: {name}", run + 1, options.common.runs);
            cache(&saved.directory().join("memory"), cold)?;
            let ours = saved.restored_by_us(run, cold)?;
            let qemu = if peer.is_some() {
                cache(&file, cold)?;
                limit::warm(WARM_MIB)?;
                let ms =
                    qemu::restored(&saved.machine(), &file).context("QEMU does not restore")?;
                json!({"first_output_ms": ms})
            } else {
                Value::Null
            };
            runs.push(json!({"ours": ours, "qemu": qemu}));
        }
        print(options.common.json, cold, peer.as_deref(), &runs);
    }
    Ok(())
}

fn print(as_json: bool, cold: bool, peer: Option<&str>, runs: &[Value]) {
    let ours = |field: &str| rounded(median_of(runs, "ours", field));
    let first = |side: &str| median_of(runs, side, "first_output_ms");
    let result = json!({
        "case": if cold { "cold" } else { "warm" },
        "peer": peer,
        "ours": {
            "restore_ms": ours("restore_ms"),
            "resume_ms": ours("resume_ms"),
            "first_output_ms": ours("first_output_ms"),
            "resident_mib": ours("resident_mib"),
        },
        "qemu": if peer.is_some() { json!({"first_output_ms": rounded(first("qemu"))}) } else { Value::Null },
        "ratio": {"first_output": rounded(ratio(first("ours"), first("qemu")))},
        "runs": runs,
    });
    if as_json {
        println!("{result}");
        return;
    }
    println!(
        "{:<6} {:>12} {:>12} {:>14} {:>8} MiB {:>12} {:>8}",
        result["case"].as_str().unwrap_or_default(),
        cell(&result["ours"]["restore_ms"]),
        cell(&result["ours"]["resume_ms"]),
        cell(&result["ours"]["first_output_ms"]),
        cell(&result["ours"]["resident_mib"]),
        cell(&result["qemu"]["first_output_ms"]),
        cell(&result["ratio"]["first_output"]),
    );
}

impl Saved<'_> {
    fn directory(&self) -> std::path::PathBuf {
        self.folder.join("snapshot")
    }

    fn url(&self) -> String {
        format!("file://{}", self.directory().display())
    }

    fn machine(&self) -> qemu::Machine<'_> {
        qemu::Machine {
            folder: self.folder,
            kernel: self.kernel,
            mib: self.options.memory_mib,
            cmdline: &self.cmdline,
        }
    }

    /// Fills a guest and writes it to files.
    fn by_us(&self) -> Result<()> {
        let source = Vmm::serve(self.folder, "source")?;
        source.boot(json!({
            "payload": {"kernel": self.kernel, "cmdline": self.cmdline},
            "memory": {"size": self.options.memory_mib << 20},
        }))?;
        source.console()?.line("memory: ready", LIMIT)?;
        source.api().put("vm.pause", &Value::Null)?;
        source
            .api()
            .put("vm.snapshot", &json!({"destination_url": self.url()}))?;
        Ok(())
    }

    fn restored_by_us(&self, run: u32, cold: bool) -> Result<Value> {
        let vmm = Vmm::serve(self.folder, &format!("restored-{cold}-{run}"))?;
        limit::warm(WARM_MIB)?;
        let begin = Instant::now();
        vmm.api().put(
            "vm.restore",
            &json!({
                "source_url": self.url(),
                "serial": {"mode": "Socket", "socket": vmm.serial()},
            }),
        )?;
        let restore = begin.elapsed();
        let mut serial = UnixStream::connect(vmm.serial())?;
        let begin = Instant::now();
        vmm.api().put("vm.resume", &Value::Null)?;
        let resume = begin.elapsed();
        serial.read_exact(&mut [0])?;
        let first = begin.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Ok(json!({
            "restore_ms": ms(restore),
            "resume_ms": ms(resume),
            "first_output_ms": ms(restore + first),
            "resident_mib": vmm.resident_bytes()? as f64 / f64::from(1 << 20),
        }))
    }
}

/// Reads a file into the page cache, or drops it from there.
fn cache(path: &Path, cold: bool) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("no {}", path.display()))?;
    if cold {
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    } else {
        std::io::copy(&mut file, &mut std::io::sink())?;
    }
    Ok(())
}
