//! The command line of the `backend` program.

use std::process::ExitCode;

use hypervisor::HypervisorKind;
use serde_json::json;

use crate::back_ends::{BACK_ENDS, BackEnd};
use crate::harness::{Program, Verdict, run};
use crate::programs::PROGRAMS;

const HELP: &str = "\
The back-end conformance suite: runs small guest programs on one hypervisor.

usage: backend [--hypervisor NAME] [FILTER…] [--list] [--json]

  --hypervisor NAME   kvm (default) or mshv
  FILTER              only programs whose name contains one of these words
  --list              print the names and run nothing
  --json              one JSON object a line instead of text

Prints a line for each program (`ok`, `FAILED: reason` or `SKIP: reason`) and at last
`backend: N passed, N failed, N skipped`. Exit status: 0 nothing failed and something passed, 1 otherwise, 2 wrong usage.
";

struct Arguments {
    back_end: &'static BackEnd,
    filters: Vec<String>,
    list: bool,
    json: bool,
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments {
        back_end: &BACK_ENDS[0],
        filters: Vec::new(),
        list: false,
        json: false,
    };
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        let value = match argument.split_once('=') {
            Some(("--hypervisor", value)) => Some(value.to_owned()),
            _ if argument == "--hypervisor" => {
                Some(arguments.next().ok_or("`--hypervisor` needs a name")?)
            }
            _ => None,
        };
        if let Some(name) = value {
            let kind: HypervisorKind = name.parse().map_err(|error| format!("{error}"))?;
            parsed.back_end = BackEnd::of(kind).ok_or("this suite does not know it")?;
            continue;
        }
        match argument.as_str() {
            "--list" => parsed.list = true,
            "--json" => parsed.json = true,
            option if option.starts_with('-') => {
                return Err(format!("there is no option `{option}`"));
            }
            _ => parsed.filters.push(argument),
        }
    }
    Ok(parsed)
}

fn selected(arguments: &Arguments) -> Vec<&'static Program> {
    PROGRAMS
        .iter()
        .filter(|program| {
            arguments.filters.is_empty()
                || arguments
                    .filters
                    .iter()
                    .any(|filter| program.name.contains(filter))
        })
        .collect()
}

/// Runs the programs that the command line asks for.
pub fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--help" || argument == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("backend: {message}; try `backend --help`");
            return ExitCode::from(2);
        }
    };
    let programs = selected(&arguments);
    if arguments.list {
        programs
            .iter()
            .for_each(|program| println!("{}", program.name));
        return ExitCode::SUCCESS;
    }
    if let Err(error) = hypervisor::open(arguments.back_end.kind) {
        eprintln!("backend: {error}");
        return ExitCode::FAILURE;
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for program in programs {
        let verdict = run(arguments.back_end, program);
        let (word, reason) = match &verdict {
            Verdict::Ok => ("ok", None),
            Verdict::Skip(reason) => ("SKIP", Some(reason)),
            Verdict::Failed(reason) => ("FAILED", Some(reason)),
        };
        match verdict {
            Verdict::Ok => passed += 1,
            Verdict::Skip(_) => skipped += 1,
            Verdict::Failed(_) => failed += 1,
        }
        match (arguments.json, reason) {
            (true, _) => println!(
                "{}",
                json!({"program": program.name, "verdict": word, "reason": reason})
            ),
            (false, Some(reason)) => println!("{}: {word}: {reason}", program.name),
            (false, None) => println!("{}: {word}", program.name),
        }
    }
    if arguments.json {
        println!(
            "{}",
            json!({"hypervisor": arguments.back_end.kind.name(), "passed": passed, "failed": failed, "skipped": skipped})
        );
    } else {
        println!("backend: {passed} passed, {failed} failed, {skipped} skipped");
    }
    if failed == 0 && passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Arguments, String> {
        parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn options_and_filters_come_in_any_order() {
        let arguments = parsed(&["--list", "--hypervisor", "kvm", "mmio", "--json"]).unwrap();
        assert_eq!(arguments.back_end.kind, HypervisorKind::Kvm);
        assert!(arguments.list && arguments.json);
        assert_eq!(arguments.filters, ["mmio"]);
        assert!(
            selected(&arguments)
                .iter()
                .all(|program| program.name.contains("mmio"))
        );
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for words in [&["--hypervisor"][..], &["--hypervisor=xen"], &["--fast"]] {
            assert!(parsed(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn names_are_unique_and_exceptions_name_programs_that_are_there() {
        let mut names: Vec<_> = PROGRAMS.iter().map(|program| program.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        for known in crate::back_ends::EXCEPTIONS {
            assert!(
                names.binary_search(&known.program).is_ok(),
                "{}",
                known.program
            );
        }
    }
}
