//! `cargo xtask`: the project's chores.
//!
//! ```text
//!   cargo xtask test [NAME…]
//!     │
//!     ├─ static   cargo fmt --check, clippy with warnings denied, ../shared/house    checks.rs
//!     ├─ unit     the unit tests of every crate                                      suites.rs
//!     ├─ cpu      CPU models against dumps of real processors                        suites.rs
//!     ├─ emulator the instruction emulator against this machine's processor          suites.rs
//!     ├─ backend  small guest programs, the same on every hypervisor back end        suites.rs
//!     ├─ native   real guests on this machine, on every back end                     suites.rs
//!     ├─ fuzz     the fuzz targets, some seconds each                                fuzz.rs
//!     ├─ lab      stock kernels in QEMU's emulator; installs what it needs           debian.rs
//!     └─ devices  of native and lab, what shows devices; only when it is named       suites.rs
//!                       │
//!                 every line of output is passed on and read                         tally.rs
//!                       │
//!                 "N passed, N failed, N skipped", the last line of all
//! ```
//!
//! Promises: a check that did not run is a skip with a printed reason, a suite that ran nothing or that
//! did not even build is a failure, and the exit status is 0 only when something ran and nothing failed.

mod checks;
mod debian;
mod fuzz;
mod run;
mod suites;
mod tally;

use std::process::ExitCode;

const HELP: &str = "\
Project chores.

usage: cargo xtask test [NAME…]

Runs test suites, all of them in this order when none is named:

  static   formatting, clippy with warnings denied, the house check where it is there
  unit     the unit tests of every crate
  cpu      CPU models against dumps of real processors; asked for without the lab, also what the lab
           shows of them: moves between unlike hosts, clocks
  emulator the instruction emulator against this machine's processor, instruction by instruction
  backend  the conformance suite: small guest programs, the same on /dev/kvm and on /dev/mshv or its double
  native   real guests, booted and moved, on /dev/kvm and on /dev/mshv or its double, and between the two
  fuzz     the fuzz targets (fuzz/): the inputs that are kept, then some seconds of search each; needs g++
  lab      stock Debian kernels as hosts and guests inside QEMU's emulator; installs what it needs with
           apt-get, and keeps kernels in target/lab-cache (or $LAB_CACHE)
  devices  of native and lab, the tests of disks, networks and the other devices; only when it is named

The last line is `N passed, N failed, N skipped`. Exit status: 0 all passed, 1 something failed or
nothing ran, 2 wrong usage.
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--help" || arg == "-h")
        || args.first().is_some_and(|arg| arg == "help")
    {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    match args.split_first() {
        Some((chore, names)) if chore == "test" => test(names),
        Some((chore, _)) => usage(&format!(
            "there is no chore `{chore}`; the only one is `test`"
        )),
        None => usage("a chore is missing; try `cargo xtask test` or `cargo xtask --help`"),
    }
}

fn test(names: &[String]) -> ExitCode {
    let selected = match suites::select(names) {
        Ok(selected) => selected,
        Err(message) => return usage(&message),
    };
    match suites::run(&selected) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(message: &str) -> ExitCode {
    eprintln!("xtask: {message}");
    ExitCode::from(2)
}
