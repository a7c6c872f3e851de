//! The `vmm` binary; everything is in the library, where it can be tested.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
