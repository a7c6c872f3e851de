//! The static checks: formatting, lints, and the house check of the project's design.

use anyhow::Result;

use crate::run;
use crate::tally::Tally;

/// The house check lives beside the checkout, and only on machines that have it.
const HOUSE: &str = "../shared/house";

/// Runs every static check; each counts as one test.
pub(crate) fn run(tally: &mut Tally) -> Result<()> {
    if has_component("fmt", "rustfmt") {
        cargo(
            tally,
            "fmt",
            &["fmt", "--all", "--check"],
            "run `cargo fmt --all`",
        )?;
        // A workspace of its own.
        let args = ["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"];
        cargo(
            tally,
            "fmt-fuzz",
            &args,
            "run `cargo fmt --manifest-path fuzz/Cargo.toml`",
        )?;
    } else {
        tally.skip(
            "static::fmt",
            "rustfmt is not installed: rustup component add rustfmt",
        );
    }
    if has_component("clippy", "clippy") {
        let args = [
            "clippy",
            "--release",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ];
        cargo(tally, "clippy", &args, "see the warnings above")?;
    } else {
        tally.skip(
            "static::clippy",
            "clippy is not installed: rustup component add clippy",
        );
    }
    house(tally)
}

fn cargo(tally: &mut Tally, name: &str, args: &[&str], advice: &str) -> Result<()> {
    let name = format!("static::{name}");
    if run::shown(run::cargo(args), &format!("cargo {}", args.join(" ")))?.success() {
        tally.pass(&name);
    } else {
        tally.fail(&name, advice);
    }
    Ok(())
}

fn house(tally: &mut Tally) -> Result<()> {
    const NAME: &str = "static::house";
    if !run::root().join(HOUSE).is_file() {
        tally.skip(NAME, "there is no ../shared/house beside this checkout");
    } else if run::find("python3").is_none() {
        tally.skip(NAME, "it needs python3: apt-get install python3");
    } else if run::shown(run::command("python3", &[HOUSE]), HOUSE)?.success() {
        tally.pass(NAME);
    } else {
        tally.fail(NAME, "see the `broken` lines above");
    }
    Ok(())
}

/// Whether a toolchain component works; installs it with rustup, and says so, where it does not.
fn has_component(subcommand: &str, component: &str) -> bool {
    let works = || run::output(&cargo_path(), &[subcommand, "--version"]).is_ok();
    if works() {
        return true;
    }
    if run::find("rustup").is_none() {
        return false;
    }
    let args = ["component", "add", component];
    println!("installing {component}: the static checks need it");
    run::shown(
        run::command("rustup", &args),
        &format!("rustup {}", args.join(" ")),
    )
    .is_ok_and(|status| status.success())
        && works()
}

fn cargo_path() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
