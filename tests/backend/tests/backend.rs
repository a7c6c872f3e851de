//! The suite on every back end of this machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    backend::trials::main()
}
