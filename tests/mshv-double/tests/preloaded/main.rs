//! The double as a client sees it: this executable starts itself again with the library preloaded, and then drives
//! `/dev/mshv` through `mshv-ioctls`.
//!
//! The library is next to this executable (`target/<profile>/deps`): cargo builds the package's cdylib before its tests.

mod events;
mod guest;
mod interception;
mod interrupts;
mod long_mode;
mod memory;
mod refusals;
mod registers;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Trial};

/// Set in the process that has the library preloaded.
const INSIDE: &str = "MSHV_DOUBLE_INSIDE";

fn library() -> PathBuf {
    let executable = std::env::current_exe().expect("the path of this executable");
    let folder = executable.parent().expect("an executable lies in a folder");
    folder.join("libmshv_double.so")
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if std::env::var_os(INSIDE).is_none() {
        let library = library();
        assert!(
            library.exists(),
            "{} is missing; build the package first",
            library.display()
        );
        let status = Command::new(std::env::current_exe().expect("the path of this executable"))
            .args(std::env::args_os().skip(1))
            .env("LD_PRELOAD", library)
            .env(INSIDE, "1")
            .status()
            .expect("this executable starts");
        return if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let suites = [
        events::trials(),
        interception::trials(),
        interrupts::trials(),
        long_mode::trials(),
        memory::trials(),
        refusals::trials(),
        registers::trials(),
    ];
    libtest_mimic::run(&arguments, suites.into_iter().flatten().collect()).exit_code()
}

/// A trial that fails by panicking.
fn trial(name: &str, body: fn()) -> Trial {
    Trial::test(name, move || {
        body();
        Ok(())
    })
}
