//! The suite as one program that needs no file but the hypervisor's device node.

use std::process::ExitCode;

fn main() -> ExitCode {
    backend::cli::main()
}
