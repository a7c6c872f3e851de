//! Runs one program so that nothing it does reaches the next one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use hypervisor::Hypervisor;

use crate::back_ends::{BackEnd, exception};
use crate::outcome::{Outcome, Stop};

/// A guest program and what must come of it.
#[derive(Clone, Copy)]
pub struct Program {
    /// `group::what_it_shows`.
    pub name: &'static str,
    /// Its body.
    pub body: fn(&dyn Hypervisor) -> Outcome,
}

/// What came of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All as it must be.
    Ok,
    /// Left out, and why.
    Skip(String),
    /// Something was not as it must be.
    Failed(String),
}

/// Longest life of a program. Its guests are ended long before by the watchdog; this one is for a back end that does not
/// even answer a kick.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a program on a back end.
pub fn run(back_end: &BackEnd, program: &Program) -> Verdict {
    if let Some(reason) = exception(program.name, back_end.kind) {
        return Verdict::Skip(reason.into());
    }
    let (kind, body) = (back_end.kind, program.body);
    let (send, receive) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name(program.name.into())
        .spawn(move || {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let hypervisor = hypervisor::open(kind)?;
                body(&*hypervisor)
            }));
            // Nobody listens any more when it took too long.
            let _ = send.send(match outcome {
                Ok(Ok(())) => Verdict::Ok,
                Ok(Err(Stop::Skip(reason))) => Verdict::Skip(reason),
                Ok(Err(Stop::Fail(reason))) => Verdict::Failed(reason),
                Err(panic) => Verdict::Failed(format!("it panicked: {}", message(&*panic))),
            });
        });
    match spawned {
        Ok(_left_alone) => receive.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            Verdict::Failed(format!(
                "it did not end within {} s: a vCPU does not answer its kick",
                PATIENCE.as_secs()
            ))
        }),
        Err(error) => Verdict::Failed(format!("no thread could be started: {error}")),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
