//! The fuzz targets, for a few seconds each: all inputs that are kept, then a short search from them.
//!
//! ```text
//!   cargo build of fuzz/, with the flags that cargo-fuzz uses ─► a libFuzzer program a target
//!     each: fuzz/corpus/NAME ─► replayed, and searched from for SECONDS ─┬─► nothing: passed
//!                                                                      └─► target/fuzz/found/NAME/…: failed, and how to look at it
//! ```
//!
//! cargo-fuzz itself is not needed. Its flags make the compiler's stable coverage instrumentation, without a sanitizer, which a stable
//! compiler does not have. The programs are built into `target/fuzz`, apart from all else, so that nothing is built anew by either side.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

use crate::tally::Tally;
use crate::{debian, run};

/// How long each target is searched. A longer search is for people: `cargo fuzz run --sanitizer none NAME`.
const SECONDS: u32 = 5;
/// Targets at once. Each has a thread that works.
const AT_ONCE: usize = 2;

/// What cargo-fuzz 0.13 passes for `--sanitizer none`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cllvm-args=-simplifycfg-branch-fold-threshold=0 \
    -Cllvm-args=-sanitizer-coverage-stack-depth -Cdebug-assertions -Ccodegen-units=1";

/// What libFuzzer allows an input: seconds, megabytes, bytes.
const LIMITS: [&str; 3] = ["-timeout=20", "-rss_limit_mb=1024", "-max_len=4096"];

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Builds and runs every target; each counts as one test.
pub(crate) fn run(tally: &mut Tally) -> Result<()> {
    debian::prepare_fuzz();
    if run::find("c++").is_none() {
        tally.skip(
            "fuzz",
            "libFuzzer needs a C++ compiler: apt-get install g++",
        );
        return Ok(());
    }
    let targets = targets()?;
    let folder = run::root().join("target/fuzz");
    if !build(&folder)? {
        tally.fail("fuzz", "the fuzz targets do not build");
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(tally);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = search(&folder, target);
                    let mut tally = tally
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                    let name = format!("fuzz::{target}");
                    match result {
                        Ok(Ok(summary)) => {
                            println!("{summary}");
                            tally.pass(&name);
                        }
                        Ok(Err(found)) => tally.fail(&name, &found),
                        Err(error) => tally.fail(&name, &format!("{error:#}")),
                    }
                }
            });
        }
    });
    Ok(())
}

/// The names of the targets: those that have a program.
fn targets() -> Result<Vec<String>> {
    let folder = run::root().join("fuzz/fuzz_targets");
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names: Vec<_> = entries
        .filter_map(|entry| {
            Some(
                entry
                    .ok()?
                    .path()
                    .file_stem()?
                    .to_string_lossy()
                    .into_owned(),
            )
        })
        .collect();
    names.sort();
    Ok(names)
}

fn build(folder: &Path) -> Result<bool> {
    let folder = folder.to_string_lossy();
    let args = [
        "build",
        "--release",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--bins",
        "--target",
        TRIPLE,
        "--target-dir",
        &folder,
    ];
    let mut command = run::cargo(&args);
    command
        .env("RUSTFLAGS", FLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(run::shown(command, &format!("cargo {}", args.join(" ")))?.success())
}

/// Replays and searches; what it did, or what it has found and how to look at it.
fn search(folder: &Path, target: &str) -> Result<Result<String, String>> {
    let program = folder.join(TRIPLE).join("release").join(target);
    let found = emptied(folder, "found", target)?;
    // What a search comes across on its way goes here, and not among what is kept.
    let scratch = emptied(folder, "scratch", target)?;
    let corpus = run::root().join("fuzz/corpus").join(target);
    let mut args = vec![
        scratch.to_string_lossy().into_owned(),
        corpus.to_string_lossy().into_owned(),
        format!("-artifact_prefix={}/", found.display()),
        format!("-max_total_time={SECONDS}"),
    ];
    args.extend(LIMITS.map(str::to_owned));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = run::command(&program.to_string_lossy(), &args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    fs::remove_dir_all(&scratch).ok();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let last = said.lines().rfind(|line| line.contains("cov: "));
        return Ok(Ok(format!("{target}: {}", last.unwrap_or_default().trim())));
    }
    println!("{said}");
    let inputs: Vec<PathBuf> = fs::read_dir(&found)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    Ok(Err(match inputs.first() {
        Some(input) => format!(
            "an input that breaks it was kept; look at it with `cargo fuzz run --sanitizer none {target} {0}`, or without cargo-fuzz: \
             `{1} {0}`",
            input.display(),
            program.display()
        ),
        None => format!("it ended with {}", output.status),
    }))
}

/// A folder in which nothing is.
fn emptied(folder: &Path, kind: &str, target: &str) -> Result<PathBuf> {
    let path = folder.join(kind).join(target);
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("cannot empty {}", path.display()))?;
    }
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}
