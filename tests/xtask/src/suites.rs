//! The suites by name, and how each is run and counted.

use std::time::Instant;

use anyhow::Result;

use crate::tally::Tally;
use crate::{checks, debian, fuzz, run};

/// A group of tests that can be asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suite {
    /// Formatting, lints, house.
    Static,
    /// Unit tests of the crates.
    Unit,
    /// CPU models against dumps of real processors, and between unlike hosts of the lab.
    Cpu,
    /// The instruction emulator against the processor.
    Emulator,
    /// The conformance suite of the hypervisor back ends, and what is about one of them.
    Backend,
    /// Real guests on this machine, on every back end.
    Native,
    /// The fuzz targets, for a short time.
    Fuzz,
    /// Tests inside QEMU's emulator.
    Lab,
    /// Of the two before, those of devices.
    Devices,
}

impl Suite {
    /// Every suite, in the order of a full run, which leaves out the last: its tests are parts of others.
    const ALL: [Suite; 9] = [
        Suite::Static,
        Suite::Unit,
        Suite::Cpu,
        Suite::Emulator,
        Suite::Backend,
        Suite::Native,
        Suite::Fuzz,
        Suite::Lab,
        Suite::Devices,
    ];

    fn is_part_of_others(self) -> bool {
        self == Suite::Devices
    }

    fn name(self) -> &'static str {
        match self {
            Suite::Static => "static",
            Suite::Unit => "unit",
            Suite::Cpu => "cpu",
            Suite::Emulator => "emulator",
            Suite::Backend => "backend",
            Suite::Native => "native",
            Suite::Fuzz => "fuzz",
            Suite::Lab => "lab",
            Suite::Devices => "devices",
        }
    }
}

/// The suites of these names in the order of a full run, all of them for no name.
pub(crate) fn select(names: &[String]) -> Result<Vec<Suite>, String> {
    if let Some(unknown) = names
        .iter()
        .find(|name| Suite::ALL.iter().all(|suite| suite.name() != name.as_str()))
    {
        let known: Vec<_> = Suite::ALL.iter().map(|suite| suite.name()).collect();
        return Err(format!(
            "there is no suite `{unknown}`; the suites are: {}",
            known.join(", ")
        ));
    }
    Ok(Suite::ALL
        .into_iter()
        .filter(|suite| match names {
            [] => !suite.is_part_of_others(),
            names => names.iter().any(|name| name == suite.name()),
        })
        .collect())
}

/// Runs the suites one after another and prints the summary; true if something ran and nothing failed.
pub(crate) fn run(suites: &[Suite]) -> Result<bool> {
    let mut total = Tally::default();
    let mut times = Vec::new();
    let mut built = false;
    for &suite in suites {
        println!("\n== {} ==", suite.name());
        let start = Instant::now();
        let mut tally = Tally::default();
        // Asked for alone, a suite shows all of its subject; in a run with the lab, its lab tests are part of that.
        let with_lab = !suites.contains(&Suite::Lab);
        let starts_programs = match suite {
            Suite::Backend | Suite::Native | Suite::Lab | Suite::Devices => true,
            Suite::Cpu => with_lab,
            Suite::Static | Suite::Unit | Suite::Emulator | Suite::Fuzz => false,
        };
        if starts_programs && !built {
            build_programs(&mut tally)?;
            built = true;
        }
        let before = tally.total();
        match suite {
            Suite::Static => checks::run(&mut tally)?,
            Suite::Unit => unit(&mut tally)?,
            Suite::Cpu => {
                cargo_test(&mut tally, "cpu", &["--test", "corpus"], &[])?;
                if with_lab {
                    lab(&mut tally, Some("cpu::"))?;
                }
            }
            Suite::Emulator => cargo_test(&mut tally, "emulator", &["--test", "emulator"], &[])?,
            Suite::Backend => {
                let tests = ["--test", "backend", "--test", "kvm", "--test", "preloaded"];
                cargo_test(&mut tally, "backend", &tests, &[])?;
            }
            Suite::Native => {
                debian::prepare_native();
                cargo_test(&mut tally, "native", &["--test", "native"], &[])?;
            }
            Suite::Fuzz => fuzz::run(&mut tally)?,
            Suite::Lab => lab(&mut tally, None)?,
            Suite::Devices => {
                debian::prepare_native();
                cargo_test(&mut tally, "native", &["--test", "native"], &["devices::"])?;
                lab(&mut tally, Some("devices::"))?;
            }
        }
        if tally.total() == before {
            tally.fail(suite.name(), "the suite ran no test at all");
        }
        times.push(format!(
            "{:<8} {:>7.1} s  {tally}",
            suite.name(),
            start.elapsed().as_secs_f64()
        ));
        total.add(tally);
    }
    println!();
    total.notes.iter().for_each(|note| println!("{note}"));
    times.iter().for_each(|time| println!("{time}"));
    println!("{total}");
    Ok(total.failed == 0 && total.passed > 0)
}

/// The product, the conformance suite's binary and the double of `/dev/mshv`: suites start or preload them. This program itself is left
/// out, since it runs.
fn build_programs(tally: &mut Tally) -> Result<()> {
    const BUILD: [&str; 5] = ["build", "--release", "--workspace", "--exclude", "xtask"];
    if !run::shown(run::cargo(&BUILD), &format!("cargo {}", BUILD.join(" ")))?.success() {
        tally.fail(
            "build",
            "the programs do not build; tests that start them cannot pass",
        );
    }
    Ok(())
}

fn unit(tally: &mut Tally) -> Result<()> {
    cargo_test(tally, "unit", &["--lib", "--bins"], &[])?;
    // The other targets of these are suites of their own.
    let others = [
        "--exclude",
        "cpu",
        "--exclude",
        "hypervisor",
        "--exclude",
        "mshv-double",
        "--exclude",
        "backend",
        "--exclude",
        "native",
        "--exclude",
        "lab",
        "--test",
        "*",
    ];
    cargo_test(tally, "unit::integration", &others, &[])
}

/// The tests of the lab whose names contain `filter`, all without one.
fn lab(tally: &mut Tally, filter: Option<&str>) -> Result<()> {
    // What is missing afterwards is said by each test that needs it, as the reason of a skip.
    debian::prepare_lab();
    let harness: Vec<_> = ["--test-threads=2"].into_iter().chain(filter).collect();
    cargo_test(tally, "lab", &["--test", "lab"], &harness)
}

/// One `cargo test`: every binary runs even after a failure, and what does not build is a failure.
///
/// Always of the whole workspace: with fewer packages cargo picks fewer features of what they share, and builds that anew.
fn cargo_test(tally: &mut Tally, name: &str, select: &[&str], harness: &[&str]) -> Result<()> {
    let mut args = vec!["test", "--release", "--workspace", "--no-fail-fast"];
    args.extend(select);
    if !harness.is_empty() {
        args.push("--");
        args.extend(harness);
    }
    let mut command = run::cargo(&args);
    command.env("LAB_CACHE", debian::cache());
    let mut suite = Tally::default();
    let status = run::streamed(command, &format!("cargo {}", args.join(" ")), |line| {
        suite.read_line(line);
    })?;
    if !status.success() && suite.failed == 0 {
        suite.fail(
            name,
            &format!("it did not build, or a test binary ended early ({status})"),
        );
    }
    tally.add(suite);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_selects_every_suite_in_order() {
        assert_eq!(select(&[]).unwrap(), Suite::ALL[..8]);
        assert_eq!(select(&["devices".into()]).unwrap(), [Suite::Devices]);
    }

    #[test]
    fn names_select_in_the_order_of_a_full_run() {
        assert_eq!(
            select(&["lab".into(), "unit".into()]).unwrap(),
            [Suite::Unit, Suite::Lab]
        );
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_list() {
        let message = select(&["units".into()]).unwrap_err();
        assert!(
            message.contains("`units`")
                && message.contains("static, unit, cpu, emulator, backend, native, fuzz, lab"),
            "{message}"
        );
    }
}
