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

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;

use super::{FAILED, UNUSABLE, signals};
use play::Stage;
use report::Report;

/// Where Linux offers KVM.
const KVM: &str = "/dev/kvm";

/// Longest path of the temporary directory, so that the sockets in it fit into a socket address.
const LONGEST_DIRECTORY: usize = 64;

/// Boot a built-in guest and move it live to a second process.
///
/// The guest fills memory, goes on writing to it while it moves, and afterwards checks every page: it
/// would notice a single lost write. Needs /dev/kvm, and nothing else.
///
/// Exit status: 0 the guest moved and found its memory whole, 1 something failed, 2 this host cannot run
/// guests.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm demo
  vmm demo --memory-mib 4096
  vmm demo --json | jq .downtime_ms")]
pub(super) struct DemoArgs {
    /// Print one JSON object on standard output instead of sentences.
    #[arg(long)]
    json: bool,
    /// The guest's RAM, in MiB.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..1 << 24))]
    memory_mib: u64,
}

/// `vmm demo`.
pub(super) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open(KVM) {
        let missing = what_is_missing(KVM, &error);
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
    let result = Stage::new(directory.path(), &interrupted).play(args.memory_mib);
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

/// What keeps this host from running guests, and how to get it.
fn what_is_missing(device: impl AsRef<Path>, error: &io::Error) -> String {
    let device = device.as_ref().display();
    match error.kind() {
        io::ErrorKind::NotFound => format!(
            "{device} does not exist: this host offers no KVM, which the demo needs to run a guest. \
             On a machine of your own, enable virtualisation (VT-x or AMD-V) in its firmware and run \
             `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`. In a virtual machine, its host must allow \
             nested virtualisation. In a container, start it with `--device {device}`."
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{device}: permission denied. Add yourself to its group with `sudo usermod -aG kvm $USER` and log in \
             again, or run the demo as root. In a container, start it with `--device {device}`."
        ),
        _ => format!(
            "{device} cannot be opened: {error}. The demo needs a working KVM: `sudo modprobe kvm_intel` or \
             `sudo modprobe kvm_amd` says more, and so does `sudo dmesg`."
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let error = std::fs::File::open("/dev/no-such-kvm").expect_err("missing");
        let text = what_is_missing("/dev/no-such-kvm", &error);
        for part in [
            "/dev/no-such-kvm does not exist",
            "modprobe kvm_intel",
            "--device",
            "nested",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let text = what_is_missing(KVM, &io::ErrorKind::PermissionDenied.into());
        assert!(text.contains("usermod -aG kvm"), "{text}");
        let text = what_is_missing(KVM, &io::Error::from_raw_os_error(19));
        assert!(text.contains("No such device"), "{text}");
    }

    #[test]
    fn directory_is_short_enough_for_sockets() {
        let directory = directory().expect("made");
        let socket = directory.path().join("destination-serial.sock");
        assert!(socket.as_os_str().len() < 107);
    }
}
