//! The data channels at work: one thread each puts pages into guest memory, and tells the driver what matters to it.
//!
//! ```text
//!   data channel 0 ──► thread 0 ──► guest memory
//!   data channel 1 ──► thread 1 ──► guest memory
//!                         └─ Report: the round has ended here, or this has failed ──► bell ──► driver
//! ```
//!
//! The threads wait without a limit of their own: one channel may be silent for long while another works. The driver looks
//! at [`Inflow::beat`], and ends them by shutting their channels.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memory::{GuestRam, PAGE_SIZE};
use rustix::event::EventfdFlags;

use super::pages::{Arrived, PageReceiver, Trouble};
use crate::channel::{Channel, Limit, Patience};
use crate::control::Wake;

/// What a data channel has come to.
pub(super) enum Report {
    /// All of this round has arrived on it.
    RoundEnd(u32),
    /// It cannot go on.
    Failed(Trouble),
}

/// What has arrived over all channels, in all and since it was last taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrivals {
    /// Contents of pages, in bytes.
    pub(super) bytes: u64,
    /// Pages that are zero.
    pub(super) zero_pages: u64,
}

impl Arrivals {
    /// Pages of both kinds.
    pub(super) fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE + self.zero_pages
    }
}

/// What the threads and the driver share.
pub(super) struct Inflow<'a> {
    ram: &'a GuestRam,
    wake: &'a Wake,
    /// Counts up while anything arrives.
    pub(super) beat: AtomicU64,
    bell: OwnedFd,
    reports: Mutex<VecDeque<Report>>,
    arrivals: Mutex<Arrivals>,
    on_arrival: &'a (dyn Fn(Arrivals) + Sync),
}

impl<'a> Inflow<'a> {
    /// `on_arrival` is told of each batch.
    pub(super) fn new(
        ram: &'a GuestRam,
        wake: &'a Wake,
        on_arrival: &'a (dyn Fn(Arrivals) + Sync),
    ) -> io::Result<Self> {
        Ok(Self {
            ram,
            wake,
            beat: AtomicU64::new(0),
            bell: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            reports: Mutex::default(),
            arrivals: Mutex::default(),
            on_arrival,
        })
    }

    /// Readable when there are reports.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The next report. Silences the bell when there is none.
    pub(super) fn next_report(&self) -> Option<Report> {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let report = reports.pop_front();
        if report.is_none() {
            // Empty already, if this fails.
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        report
    }

    /// Takes what has arrived since the last call.
    pub(super) fn take_arrivals(&self) -> Arrivals {
        std::mem::take(&mut *self.arrivals())
    }

    fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, report: Report) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.push_back(report);
        // A full counter is readable already, which is all that is needed.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// A thread: receives from `channel` until it fails or is shut.
    pub(super) fn run(&self, channel: &Channel) {
        let patience = Patience {
            wake: Some(self.wake),
            alarm: None,
            beat: Some(&self.beat),
            limit: Limit::Forever,
            doing: "receiving memory",
        };
        let mut receiver = PageReceiver::new(self.ram);
        let mut round = 1u32;
        loop {
            match receiver.receive(channel, round, &patience) {
                Ok(Arrived::Pages { bytes, zero_pages }) => {
                    self.beat.fetch_add(1, Ordering::Relaxed);
                    let mut arrivals = self.arrivals();
                    arrivals.bytes += bytes;
                    arrivals.zero_pages += zero_pages;
                    drop(arrivals);
                    (self.on_arrival)(Arrivals { bytes, zero_pages });
                }
                Ok(Arrived::RoundEnd) => {
                    self.report(Report::RoundEnd(round));
                    round = round.saturating_add(1);
                }
                Err(trouble) => {
                    self.report(Report::Failed(trouble));
                    return;
                }
            }
        }
    }
}
