//! The machine and the thread that owns it.
//!
//! ```text
//!   HTTP, CLI, signals ──Request──┐
//!   vCPUs, power devices ─Demand──┼──► machine thread ──► Instance (vCPU threads, RAM, devices)
//!   move workers ──────────Ended──┘          │
//!                                            └──► move worker: migration::send / receive
//!
//!   (nothing) ─create─► Created ─boot─► Running ⇄ Paused ──shutdown──► Shutdown ─boot─► …
//!        └──receive──► (moving in) ───► Running | Paused
//!        └──restore──► (reading a snapshot) ► Paused ──snapshot──► (writing one) ──► Paused
//!                       Running | Paused ──send──► (moving out) ──► MovedAway
//!                                 ▲                     │ ├──failure before commit──► as it was
//!                                 └──settle: resume_here┘ └──no answer to the commit──► InDoubt
//! ```
//!
//! Promises:
//!
//! - Only this thread decides. A request never waits for a long operation: those are jobs.
//! - While a move goes on, or a snapshot is written or read, nothing else may change the machine; cancel the job first.
//! - A machine in doubt is never run, deleted or forgotten until an operator settles it.

mod bus;
mod consent;
mod demand;
mod destination;
mod devices;
mod ends;
mod gate;
mod hotplug;
mod instance;
mod memory;
mod moves;
mod owner;
mod pci;
mod snapshots;
mod source;
mod vcpus;

pub(crate) use self::instance::open_hypervisor;

use std::sync::mpsc;
use std::thread::JoinHandle;

use hypervisor::HypervisorKind;

use crate::job::{JobId, Jobs};
use crate::service::{ReplyTo, Request, Service};

/// What the machine's thread hears.
pub(crate) enum Event {
    /// Somebody wants something.
    Request(Request, ReplyTo),
    /// The guest of this machine number wants something.
    Demand(u64, demand::Demand),
    /// The guest of this machine number has let this device go.
    Ejected(u64, String),
    /// A move out has ended.
    SendEnded(
        JobId,
        Box<source::MovingOut>,
        Result<migration::SendReport, migration::SendError>,
    ),
    /// A move in has ended.
    ReceiveEnded(
        JobId,
        Result<(migration::ReceiveReport, destination::Arrived), ReceiveFailure>,
    ),
    /// A snapshot has been written, or not.
    SnapshotEnded(JobId, Result<(), SnapshotFailure>),
    /// A snapshot has been restored, or not; the flag says whether the guest is to run.
    RestoreEnded(JobId, Result<destination::Arrived, RestoreFailure>, bool),
}

/// Why no snapshot was written.
pub(crate) enum SnapshotFailure {
    /// The machine's state cannot be had.
    State(migration::MachineError),
    /// The files cannot be written.
    Files(migration::snapshot::SnapshotError),
}

/// Why nothing was restored.
pub(crate) enum RestoreFailure {
    /// The restore failed.
    Restore(migration::snapshot::RestoreError),
    /// It reported success without a machine: our own fault.
    Nothing,
}

/// Why nothing arrived.
pub(crate) enum ReceiveFailure {
    /// The move failed.
    Move(migration::ReceiveError),
    /// The engine reported success without a machine: our own fault.
    Nothing,
}

/// What happens to the process when its guest has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// The process ends too (`vmm run`, `vmm receive`).
    EndsProcess,
    /// The process stays and can boot it again (`vmm serve`).
    Stays,
}

/// Why a process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Somebody asked for it.
    Requested,
    /// The guest has powered off.
    PowerOff,
    /// The guest has moved to another process.
    MovedAway,
    /// The guest could not go on.
    Fault(String),
}

/// The thread that owns the machine.
pub struct MachineThread {
    service: Service,
    exit: mpsc::Receiver<ExitReason>,
    thread: JoinHandle<()>,
}

impl MachineThread {
    /// Starts the thread, without a machine. One that does not say which hypervisor it wants gets `hypervisor`, or this
    /// host's default.
    pub fn start(guest_end: GuestEnd, hypervisor: Option<HypervisorKind>) -> std::io::Result<Self> {
        let (events, inbox) = mpsc::channel();
        let (exit_sender, exit) = mpsc::channel();
        let jobs = Jobs::default();
        let service = Service::new(events.clone(), jobs.clone());
        let thread = std::thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                let reason = owner::Owner::new(guest_end, hypervisor, events, jobs).run(&inbox);
                // Whoever waited has gone; the process is ending anyway.
                let _ = exit_sender.send(reason);
            })?;
        Ok(Self {
            service,
            exit,
            thread,
        })
    }

    /// The way to this thread.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// Waits until the process should end: the guest is stopped and everything it held is freed.
    pub fn wait(self) -> ExitReason {
        let reason = self.exit.recv();
        let panicked = self.thread.join().is_err();
        match reason {
            Ok(reason) if !panicked => reason,
            _ => ExitReason::Fault("the machine's thread panicked: a bug in vmm".into()),
        }
    }
}

/// An error and all its causes in one line.
pub(crate) fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        // Many errors already contain their source's text.
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}
