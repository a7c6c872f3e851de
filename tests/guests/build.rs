//! Compiles the guest programs: each `programs/NAME.rs` becomes `$OUT_DIR/NAME.elf`, a freestanding
//! ELF with a PVH note, by one call of `rustc` with the linker that the Rust toolchain brings.
//!
//! Cargo cannot do this itself (a static, note-carrying binary with a linker script of its own beside
//! ordinary crates on one stable target), and needs no other tool than the `rustc` that it runs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROGRAMS: [&str; 3] = ["memory", "cpu", "block"];

fn main() {
    if let Err(why) = build() {
        eprintln!("error: the guest programs could not be built: {why}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=programs");
    let out = PathBuf::from(variable("OUT_DIR")?);
    let sources = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("programs");
    let rustc = variable("RUSTC")?;
    let linker = linker_options(&rustc)?;
    for program in PROGRAMS {
        let source = sources.join(program).with_extension("rs");
        let image = out.join(program).with_extension("elf");
        compile(&rustc, &linker, &source, &sources.join("guest.ld"), &image)?;
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name} is not set as cargo sets it: {error}"))
}

/// The toolchain's own LLD; a toolchain packaged without it falls back to gcc as the linker driver.
fn linker_options(rustc: &str) -> Result<Vec<String>, String> {
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .map_err(|error| format!("cannot run {rustc}: {error}"))?;
    let libdir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if !output.status.success() || !libdir.is_dir() {
        return Err(format!(
            "{rustc} has no libraries for {TARGET}; add them with `rustup target add {TARGET}`"
        ));
    }
    let lld = libdir
        .parent()
        .map(|dir| dir.join("bin/rust-lld"))
        .filter(|lld| lld.exists());
    let options: &[&str] = match lld {
        Some(_) => &[
            "linker=rust-lld",
            "linker-flavor=ld.lld",
            "link-arg=--no-eh-frame-hdr",
        ],
        None => &[
            "linker=gcc",
            "link-arg=-nostdlib",
            "link-arg=-static",
            "link-arg=-no-pie",
        ],
    };
    Ok(options.iter().map(|option| option.to_string()).collect())
}

fn compile(
    rustc: &str,
    linker: &[String],
    source: &Path,
    script: &Path,
    image: &Path,
) -> Result<(), String> {
    let mut command = Command::new(rustc);
    command.args([
        "--edition",
        "2024",
        "--crate-type",
        "bin",
        "--target",
        TARGET,
    ]);
    for option in [
        "panic=abort",
        "opt-level=3",
        "codegen-units=1",
        "relocation-model=static",
        "code-model=small",
        "target-cpu=x86-64",
        "strip=symbols",
        "link-self-contained=no",
    ] {
        command.args(["-C", option]);
    }
    for option in linker {
        command.args(["-C", option]);
    }
    command
        .arg("-C")
        .arg(format!("link-arg=-T{}", script.display()));
    command.arg("-o").arg(image).arg(source);
    // Flags meant for the host's crates (coverage, another CPU) would break a freestanding program.
    command
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    let output = command
        .output()
        .map_err(|error| format!("cannot run {rustc}: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}:\n{messages}", source.display()));
    }
    for line in messages.lines() {
        println!("cargo::warning={line}");
    }
    Ok(())
}
