//! Benchmarks: this project and a peer in one run, alternating, same guest program, same memory.
//!
//! ```text
//!   for each run: for each case: ours, then QEMU, then the limit (a plain copy)  ──► medians, ratio ours / QEMU's
//! ```
//!
//! With `--json` one object a case on a line of its own; without it a table. A peer that is not installed is named, with
//! the package to install, and left out: its figures are then `null`.

mod blk;
mod limit;
mod ours;
mod precopy;
mod qemu;
mod restore;
mod ring;
mod start;
mod stats;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

/// Measures this project side by side with QEMU.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Moves a filled 2 GiB guest over TCP loopback: idle, and with a 64 MiB hot set.
    Precopy(precopy::Options),
    /// Random 4 KiB reads of a virtio disk by a guest that polls: one request at a time, 32, and 32 in each of 4 queues.
    Blk(blk::Options),
    /// From a snapshot of a 4 GiB guest to its first output: with its files in the page cache, and without.
    Restore(restore::Options),
    /// Process start to the guest's first instruction, and the VMM's own memory.
    Start(Common),
    /// A plain loopback copy into fresh huge-page memory: what no move can beat.
    Limit(Common),
}

/// Options of every benchmark.
#[derive(Args, Clone, Copy)]
struct Common {
    /// Runs of each case.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// One JSON object a case on a line of its own, instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the product, unless `VMM_BIN` names one or cargo did not start this program.
fn build_product() -> Result<()> {
    if std::env::var_os("VMM_BIN").is_some() {
        return Ok(());
    }
    let Some(cargo) = std::env::var_os("CARGO") else {
        return Ok(());
    };
    // Standard output is for results.
    let status = std::process::Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "vmm"])
        .stdout(std::process::Stdio::null())
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the product does not build");
    Ok(())
}

fn run() -> Result<()> {
    let cli = Cli::parse();
    if !matches!(cli.what, What::Limit(_)) {
        build_product()?;
    }
    match cli.what {
        What::Precopy(options) => precopy::run(options),
        What::Blk(options) => blk::run(options),
        What::Restore(options) => restore::run(options),
        What::Start(common) => start::run(common),
        What::Limit(common) => limit::run(common),
    }
}
