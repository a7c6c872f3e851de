//! Live moves of a filled guest over TCP loopback.

use anyhow::Result;
use clap::Args;
use native::process::Folder;
use serde_json::{Value, json};

use crate::stats::{cell, median_of, ratio, rounded};
use crate::{Common, limit, ours, qemu};

/// Options of this benchmark.
#[derive(Args, Clone, Copy)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Guest RAM in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=16384))]
    memory_mib: u64,
    /// Size of the hot set in MiB.
    #[arg(long, default_value_t = 64)]
    hot_mib: u64,
}

/// Runs all cases and prints them.
pub(crate) fn run(options: Options) -> Result<()> {
    let folder = Folder::new()?;
    let kernel = folder.write("memory.elf", guests::MEMORY)?;
    let peer = qemu::version();
    let cases = [
        (
            "idle",
            "working_set_mib=max rate=0 verify=off report_ms=0".to_owned(),
        ),
        (
            "hot",
            format!(
                "working_set_mib=max hot_mib={} rate=max verify=off report_ms=0",
                options.hot_mib
            ),
        ),
    ];
    let mut runs: Vec<Vec<Value>> = vec![Vec::new(); cases.len()];
    for run in 0..options.common.runs {
        for ((name, cmdline), runs) in cases.iter().zip(&mut runs) {
            eprintln!("run {} of {}: {name}", run + 1, options.common.runs);
            let ours = ours::moved(&folder, &kernel, options.memory_mib, cmdline)?;
            let qemu = match &peer {
                Some(_) => qemu::moved(&folder, &kernel, options.memory_mib, cmdline)?,
                None => Value::Null,
            };
            let limit = limit::copied(options.memory_mib)?;
            runs.push(json!({"ours": ours, "qemu": qemu, "limit": limit}));
        }
    }
    if !options.common.json {
        println!(
            "{:<6} {:>12} {:>12} {:>8} {:>14} {:>14} {:>8} {:>12}",
            "case",
            "ours ms",
            "QEMU ms",
            "ratio",
            "ours down ms",
            "QEMU down ms",
            "ratio",
            "limit ms"
        );
    }
    for ((name, _), runs) in cases.iter().zip(runs) {
        let side = |side: &str| {
            json!({
                "total_ms": rounded(median_of(&runs, side, "total_ms")),
                "downtime_ms": rounded(median_of(&runs, side, "downtime_ms")),
                "bytes_per_s": rounded(median_of(&runs, side, "bytes_per_s")),
            })
        };
        let compared = |field: &str| {
            rounded(ratio(
                median_of(&runs, "ours", field),
                median_of(&runs, "qemu", field),
            ))
        };
        let result = json!({
            "case": name,
            "peer": peer,
            "ours": side("ours"),
            "qemu": if peer.is_some() { side("qemu") } else { Value::Null },
            "limit": {
                "total_ms": rounded(median_of(&runs, "limit", "total_ms")),
                "bytes_per_s": rounded(median_of(&runs, "limit", "bytes_per_s")),
            },
            "ratio": {"total": compared("total_ms"), "downtime": compared("downtime_ms")},
            "runs": runs,
        });
        if options.common.json {
            println!("{result}");
        } else {
            println!(
                "{:<6} {:>12} {:>12} {:>8} {:>14} {:>14} {:>8} {:>12}",
                name,
                cell(&result["ours"]["total_ms"]),
                cell(&result["qemu"]["total_ms"]),
                cell(&result["ratio"]["total"]),
                cell(&result["ours"]["downtime_ms"]),
                cell(&result["qemu"]["downtime_ms"]),
                cell(&result["ratio"]["downtime"]),
                cell(&result["limit"]["total_ms"]),
            );
        }
    }
    Ok(())
}
