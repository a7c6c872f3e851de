//! From process start to the guest's first instruction (it sends a byte to its serial port), and what the VMM itself
//! needs in memory.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use native::process::Folder;
use serde_json::{Value, json};

use crate::qemu::Qemu;
use crate::stats::{cell, median_of, ratio, rounded};
use crate::{Common, limit, qemu};

/// Guest RAM: a size that no other mapping of a VMM has.
const MEMORY_MIB: u64 = 250;
const CMDLINE: &str = "working_set_mib=16 rate=0 verify=off report_ms=0";

/// Memory that is touched before each start, so that the start does not wait for this machine's own host to provide it
/// (see [`limit::warm`]): more than either side needs until the guest's first instruction.
const WARM_MIB: u64 = 256;

/// Kills the process when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Proportional memory of a process in bytes without the mappings of guest RAM.
fn own_memory(pid: u32) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut total, mut guest) = (0, false);
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Size:") {
            guest = kib(rest) >= MEMORY_MIB << 10;
        } else if let Some(rest) = line.strip_prefix("Pss:")
            && !guest
        {
            total += kib(rest) << 10;
        }
    }
    Ok(total)
}

fn kib(field: &str) -> u64 {
    field
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or_default()
}

fn figures(elapsed: Duration, pid: u32) -> Result<Value> {
    // The guest has only begun: let it come to rest.
    std::thread::sleep(Duration::from_millis(200));
    Ok(json!({
        "start_ms": elapsed.as_secs_f64() * 1000.0,
        "pss_mib": own_memory(pid)? as f64 / f64::from(1 << 20),
    }))
}

/// Runs all cases and prints them.
pub(crate) fn run(options: Common) -> Result<()> {
    let folder = Folder::new()?;
    let kernel = folder.write("memory.elf", guests::MEMORY)?;
    let config = json!({
        "payload": {"kernel": kernel, "cmdline": CMDLINE},
        "memory": {"size": MEMORY_MIB << 20},
        "serial": {"mode": "Tty"},
    });
    let config = folder.write("vm.json", &serde_json::to_vec(&config)?)?;
    let binary = native::process::binary()?;
    let peer = qemu::version();
    let mut runs = Vec::new();
    for _ in 0..options.runs {
        limit::warm(WARM_MIB)?;
        let begin = Instant::now();
        let mut child = Guard(
            Command::new(&binary)
                .arg("run")
                .arg("--config")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?,
        );
        child
            .0
            .stdout
            .as_mut()
            .context("no output to read")?
            .read_exact(&mut [0])
            .context("vmm ended without output")?;
        let ours = figures(begin.elapsed(), child.0.id())?;
        drop(child);
        let qemu = match &peer {
            None => Value::Null,
            Some(_) => {
                limit::warm(WARM_MIB)?;
                let begin = Instant::now();
                let mut qemu = Qemu::start(&kernel, MEMORY_MIB, CMDLINE, "stdio", &[])?;
                qemu.first_byte()?;
                figures(begin.elapsed(), qemu.pid())?
            }
        };
        runs.push(json!({"ours": ours, "qemu": qemu}));
    }
    let side = |side: &str| {
        json!({
            "start_ms": rounded(median_of(&runs, side, "start_ms")),
            "pss_mib": rounded(median_of(&runs, side, "pss_mib")),
        })
    };
    let compared = |field: &str| {
        rounded(ratio(
            median_of(&runs, "ours", field),
            median_of(&runs, "qemu", field),
        ))
    };
    let result = json!({
        "case": "start",
        "peer": peer,
        "ours": side("ours"),
        "qemu": if peer.is_some() { side("qemu") } else { Value::Null },
        "ratio": {"start": compared("start_ms"), "pss": compared("pss_mib")},
        "runs": runs,
    });
    if options.json {
        println!("{result}");
    } else {
        println!("{:<10} {:>10} {:>10} {:>8}", "", "ours", "QEMU", "ratio");
        for (name, field, ratio) in [
            ("start ms", "start_ms", "start"),
            ("PSS MiB", "pss_mib", "pss"),
        ] {
            println!(
                "{:<10} {:>10} {:>10} {:>8}",
                name,
                cell(&result["ours"][field]),
                cell(&result["qemu"][field]),
                cell(&result["ratio"][ratio]),
            );
        }
    }
    Ok(())
}
