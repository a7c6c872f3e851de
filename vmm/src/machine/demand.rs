//! What a guest asks of its machine: power off, reset, or attention because it cannot go on.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard};

use super::Event;

/// A guest's demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
    /// Its watchdog resets it: it has hung.
    WatchdogReset,
    /// It cannot go on, for this reason.
    Fault(String),
}

impl fmt::Display for Demand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest powers off"),
            Self::Reset => f.write_str("the guest resets"),
            Self::WatchdogReset => f.write_str("the guest's watchdog was not petted and resets it"),
            Self::Fault(reason) => write!(f, "the guest cannot go on: {reason}"),
        }
    }
}

/// A guest that says so over and over does not fill the log.
const LOGGED_PANICS: u64 = 10;

/// A demand stands in the way of a move.
#[derive(Debug, thiserror::Error)]
#[error("{0}; that is done here first")]
pub(crate) struct Pending(pub(crate) Demand);

/// Where one machine's demands arrive: the first is kept, visible at once to whoever pauses the machine, and sent to
/// the machine's thread.
pub(crate) struct Demands {
    machine: u64,
    events: Sender<Event>,
    first: Mutex<Option<Demand>>,
    panics: AtomicU64,
}

impl Demands {
    pub(super) fn new(machine: u64, events: Sender<Event>) -> Self {
        Self {
            machine,
            events,
            first: Mutex::new(None),
            panics: AtomicU64::new(0),
        }
    }

    /// How often the guest's kernel has said that it panics.
    pub(super) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    fn first(&self) -> MutexGuard<'_, Option<Demand>> {
        self.first
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Raises a demand. Called on a vCPU's thread; does not block.
    pub(crate) fn raise(&self, demand: Demand) {
        let mut first = self.first();
        if first.is_none() {
            *first = Some(demand.clone());
            drop(first);
            // Without a machine thread there is nobody left to decide; the process is ending.
            let _ = self.events.send(Event::Demand(self.machine, demand));
        }
    }

    /// The guest has let a device go. Called on a vCPU's thread; does not block.
    pub(super) fn ejected(&self, id: String) {
        let _ = self.events.send(Event::Ejected(self.machine, id));
    }

    /// The demand that has not been served yet.
    pub(crate) fn pending(&self) -> Option<Demand> {
        self.first().clone()
    }
}

impl devices::PanicSink for Demands {
    fn guest_panicked(&self, crash_loaded: bool) {
        if self.panics.fetch_add(1, Ordering::Relaxed) >= LOGGED_PANICS {
            return;
        }
        let more = if crash_loaded {
            "; it has a crash kernel"
        } else {
            ""
        };
        tracing::error!("the guest's kernel has panicked{more}");
    }
}

impl devices::WatchdogSink for Demands {
    fn bites(&self) {
        tracing::warn!("the guest's watchdog was not petted and resets it");
        self.raise(Demand::WatchdogReset);
    }
}

impl devices::PowerSink for Demands {
    fn request(&self, request: devices::PowerRequest) {
        self.raise(match request {
            devices::PowerRequest::Shutdown => Demand::Shutdown,
            devices::PowerRequest::Reset => Demand::Reset,
        });
    }
}
