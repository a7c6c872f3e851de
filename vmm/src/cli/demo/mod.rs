//! `vmm demo`: a guest that checks its own memory is moved live from one process to another.
//!
//! ```text
//!   this process ──API──► vmm serve ─────────── tcp:127.0.0.1 ──────────► vmm receive
//!        │                    └── guest: fills and dirties memory ─moves─►  └── guest goes on
//!        └──────────────────────────── serial: "v" ──────────────────────────► "memory: verdict …"
//! ```
//!
//! Promises: both processes and the temporary directory are gone when it ends, however it ends; with
//! `--json` there is exactly one object on standard output.

mod child;
mod guest;
mod play;
mod report;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use hypervisor::HypervisorKind;

use super::{FAILED, HypervisorName, UNUSABLE, signals};
use play::Stage;
use report::Report;

/// Longest path of the temporary directory, so that the sockets in it fit into a socket address.
const LONGEST_DIRECTORY: usize = 64;

/// Boot a built-in guest and move it live to a second process.
///
/// The guest fills memory, goes on writing to it while it moves, and afterwards checks every page: it
/// would notice a single lost write. Needs /dev/kvm or /dev/mshv, and nothing else.
///
/// Exit status: 0 the guest moved and found its memory whole, 1 something failed, 2 this host cannot run
/// guests.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm demo
  vmm demo --memory-mib 4096
  vmm demo --hypervisor kvm
  vmm demo --json | jq .downtime_ms")]
pub(super) struct DemoArgs {
    /// Print one JSON object on standard output instead of sentences.
    #[arg(long)]
    json: bool,
    /// The guest's RAM, in MiB.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..1 << 24))]
    memory_mib: u64,
    /// Which hypervisor runs the guest [default: mshv where /dev/mshv exists, else kvm]
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<HypervisorName>,
}

/// `vmm demo`.
pub(super) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let kind = args.hypervisor.map(HypervisorKind::from);
    if let Err(error) = open(kind) {
        let missing = format!("{error}. The demo needs it to run a guest.");
        if args.json {
            println!("{}", Report::failed(missing.clone()).to_json());
        }
        eprintln!("vmm: {missing}");
        return Ok(ExitCode::from(UNUSABLE));
    }
    let report = match perform(args) {
        Ok(report) => report,
        Err(error) if args.json => {
            println!("{}", Report::failed(format!("{error:#}")).to_json());
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{report}");
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    })
}

fn perform(args: &DemoArgs) -> anyhow::Result<Report> {
    let directory = directory().context("cannot make a temporary directory")?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let path = directory.path().to_owned();
    signals::on_stop(
        move || flag.store(true, Ordering::Relaxed),
        // The kernel ends the children when this process goes.
        move || drop(std::fs::remove_dir_all(path)),
    )?;
    // The stage is dropped, and with it the children, before the directory that they use.
    let result = Stage::new(directory.path(), &interrupted, args.hypervisor).play(args.memory_mib);
    directory
        .close()
        .context("cannot remove the temporary directory")?;
    result
}

fn directory() -> io::Result<tempfile::TempDir> {
    let mut parent = std::env::temp_dir();
    if parent.as_os_str().len() > LONGEST_DIRECTORY {
        parent = "/tmp".into();
    }
    tempfile::Builder::new()
        .prefix("vmm-demo-")
        .tempdir_in(parent)
}

/// Opens the hypervisor, to learn before anything starts whether there is one.
fn open(kind: Option<HypervisorKind>) -> hypervisor::Result<()> {
    match kind {
        Some(kind) => hypervisor::open(kind),
        None => hypervisor::open_default(),
    }
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_short_enough_for_sockets() {
        let directory = directory().expect("made");
        let socket = directory.path().join("destination-serial.sock");
        assert!(socket.as_os_str().len() < 107);
    }
}
