//! The suite as a test target: every program on every back end that this machine has, or has a double of.
//!
//! ```text
//!   main ─┬─ back ends whose device node is there (or that are to be skipped with a reason): in this process
//!         └─ others with a double: this program again, LD_PRELOAD=double, ONLY=name ──► in that process
//! ```
//!
//! Each process prints a summary of its own; a run fails when one of them does.

use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::back_ends::{BACK_ENDS, BackEnd};
use crate::harness::{Program, Verdict, run};
use crate::programs::PROGRAMS;

/// Names the back end that a process started by this one is for.
const ONLY: &str = "BACKEND_ONLY";

/// Runs all trials.
pub fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Ok(only) = std::env::var(ONLY) {
        let trials = BACK_ENDS
            .iter()
            .filter(|back_end| back_end.kind.name() == only)
            .flat_map(here);
        return libtest_mimic::run(&arguments, trials.collect()).exit_code();
    }
    let (preloaded, direct): (Vec<_>, Vec<_>) = BACK_ENDS
        .iter()
        .partition(|back_end| back_end.double.is_some() && !back_end.is_here());
    let trials = direct.into_iter().flat_map(here).collect();
    let mut passed = !libtest_mimic::run(&arguments, trials).has_failed();
    for back_end in preloaded {
        passed &= with_double(back_end);
    }
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The trials of a back end, to be run in this process.
fn here(back_end: &'static BackEnd) -> impl Iterator<Item = Trial> {
    PROGRAMS.iter().map(move |program| {
        Trial::ignorable_test(format!("{}::{}", back_end.kind, program.name), move || {
            trial(back_end, program)
        })
    })
}

fn trial(back_end: &'static BackEnd, program: &'static Program) -> Result<Completion, Failed> {
    if let Err(error) = hypervisor::open(back_end.kind) {
        // A machine without the device is no fault of the back end; a double that does not work is.
        return if back_end.double.is_none() || std::env::var_os(ONLY).is_none() {
            Ok(Completion::ignored_with(error))
        } else {
            Err(error.into())
        };
    }
    match run(back_end, program) {
        Verdict::Ok => Ok(Completion::Completed),
        Verdict::Skip(reason) => Ok(Completion::ignored_with(reason)),
        Verdict::Failed(reason) => Err(reason.into()),
    }
}

/// Starts this program again with the double of a back end; answers whether all passed there.
fn with_double(back_end: &BackEnd) -> bool {
    let again = |double: &crate::back_ends::Double| -> Result<bool, String> {
        let library = double.find()?;
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let status = Command::new(exe)
            .args(std::env::args_os().skip(1))
            .env("LD_PRELOAD", library)
            .env(ONLY, back_end.kind.name())
            .status()
            .map_err(|error| error.to_string())?;
        Ok(status.success())
    };
    back_end.double.as_ref().is_none_or(|double| {
        again(double).unwrap_or_else(|reason| {
            println!(
                "FAILED: the programs on {}: there is no {}, and its double cannot be used: {reason}",
                back_end.kind, back_end.device
            );
            false
        })
    })
}
