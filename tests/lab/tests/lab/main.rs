//! The suite `lab`: the product on lab hosts, and the lab itself.
//!
//! `--test-threads=2` suits two cores: one lab host a core.

mod cpu;
mod devices;
mod hangs;
mod memory;
mod selftest;
mod stock;
mod vcpus;
mod vhost;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

fn main() -> ExitCode {
    // Should cargo be killed, this process goes too, and its emulators with it.
    if let Err(error) =
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
    {
        eprintln!("lab: killing cargo will not end this suite: {error}");
    }
    let args = Arguments::from_args();
    let trials = selftest::trials()
        .into_iter()
        .chain(stock::trials())
        .chain(cpu::trials())
        .chain(devices::trials())
        .chain(vhost::trials())
        .chain(vcpus::trials())
        .chain(memory::trials())
        .collect();
    let conclusion = libtest_mimic::run(&args, trials);
    let retries = lab::retries();
    println!(
        "lab: {} boots without a result were tried again",
        retries.len()
    );
    retries
        .iter()
        .for_each(|retry| println!("lab: retried {retry}"));
    conclusion.exit_code()
}

/// A test that is skipped, with the reason, where the lab cannot run.
fn trial(
    name: impl Into<String>,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match lab::missing() {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => body()
            .map(|()| Completion::Completed)
            .map_err(|error| Failed::from(format!("{error:#}"))),
    })
}
