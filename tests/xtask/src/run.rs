//! Starting other programs so that none of them outlives this one.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

/// The root of the repository: two folders above this crate.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .and_then(Path::parent)
        .unwrap_or(here)
        .to_path_buf()
}

/// A command in the repository's root, without standard input, that the kernel ends when `xtask` goes.
///
/// A Ctrl-C reaches the whole foreground process group by itself. `setpriv` (util-linux, on every Debian)
/// covers the rest: an `xtask` that is killed alone takes its children along.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = if find("setpriv").is_some() {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--", program]);
        command
    } else {
        Command::new(program)
    };
    command.args(args).current_dir(root()).stdin(Stdio::null());
    command
}

/// `cargo` as it was called for this run, so that nested calls use the same toolchain.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    command(&program, args)
}

/// Says what is run, and runs it with its output left on the terminal.
pub(crate) fn shown(mut command: Command, what: &str) -> Result<ExitStatus> {
    println!("$ {what}");
    command
        .status()
        .with_context(|| format!("cannot start `{what}`"))
}

/// Runs a command, passes its standard output on line by line as it comes, and shows each line to `read`.
pub(crate) fn streamed(
    mut command: Command,
    what: &str,
    mut read: impl FnMut(&str),
) -> Result<ExitStatus> {
    println!("$ {what}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{what}`"))?;
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        while lines
            .read_until(b'\n', &mut line)
            .with_context(|| format!("cannot read the output of `{what}`"))?
            > 0
        {
            let mut out = std::io::stdout().lock();
            // A closed terminal is no reason to stop counting.
            let _ = out.write_all(&line).and_then(|()| out.flush());
            read(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    child
        .wait()
        .with_context(|| format!("cannot wait for `{what}`"))
}

/// The standard output of a command that succeeds, or an error with its standard error in it.
pub(crate) fn output(program: &str, args: &[&str]) -> Result<String> {
    let output = command(program, args)
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot start `{program}`"))?;
    if !output.status.success() {
        anyhow::bail!(
            "`{program} {}` failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a program is, looked up in `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
