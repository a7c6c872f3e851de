//! Watching and cancelling a move from another thread.
//!
//! ```text
//!              cancel()                       close()  (the driver, right before the commit)
//!   Cancelled ◄──────── Open ─────────────────────────► Closed: cancel() answers "too late"
//! ```
//!
//! The two arrows exclude each other: a move that was cancelled in time never commits, and one that commits was never
//! cancelled.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::EventfdFlags;
use serde::{Deserialize, Serialize};

use crate::Phase;

/// How far a move is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The phase it is in, or ended in.
    pub phase: Phase,
    /// The rounds that are done.
    pub rounds: Vec<RoundProgress>,
    /// Size of the guest's RAM in bytes.
    pub bytes_total: u64,
    /// Bytes sent (source) or page data received (destination) so far.
    pub bytes_sent: u64,
    /// Pages found to be zero and not sent as data.
    pub zero_pages: u64,
    /// Memory still to be looked at in this round, in bytes. Known at the source only.
    pub bytes_remaining: u64,
    /// Bytes per second over the last round, or over the current one while it is the first.
    pub rate_bytes_per_s: f64,
    /// What the downtime would be if the guest were paused after the last round, in milliseconds.
    pub estimated_downtime_ms: Option<f64>,
    /// What it was, in milliseconds.
    pub downtime_ms: Option<f64>,
    /// Time since the move began, in milliseconds; stands still when it has ended.
    pub elapsed_ms: f64,
}

/// One round of pre-copy that is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundProgress {
    /// Its number, from 1.
    pub number: u32,
    /// Pages looked at.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Pages that were dirty after it. Zero after the last one.
    pub dirty_after: u64,
}

/// One move, seen from outside. Share it in an `Arc`; use a new one for each move.
#[derive(Debug, Default)]
pub struct MoveControl {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    gate: Gate,
    /// Readable once the move is cancelled. Made when the move begins.
    wake: Option<std::sync::Arc<OwnedFd>>,
    began: Option<Instant>,
    ended: bool,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Gate {
    #[default]
    Open,
    Cancelled,
    Closed,
}

/// The descriptor that becomes readable when the move is cancelled.
#[derive(Clone, Debug)]
pub(crate) struct Wake(std::sync::Arc<OwnedFd>);

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl MoveControl {
    /// The control of a move that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// How far the move is.
    pub fn progress(&self) -> Progress {
        let state = self.lock();
        let mut progress = state.progress.clone();
        if let (Some(began), false) = (state.began, state.ended) {
            progress.elapsed_ms = milliseconds(began);
        }
        progress
    }

    /// Asks for the move to be given up. Returns whether the request is in time: then the move fails with
    /// [`crate::Cause::Cancelled`], or with whatever else came first, and the guest stays at the source. Past the
    /// commit point it is too late, nothing happens, and the answer is `false`.
    pub fn cancel(&self) -> bool {
        let mut state = self.lock();
        if state.gate == Gate::Closed || state.ended {
            return false;
        }
        state.gate = Gate::Cancelled;
        if let Some(wake) = &state.wake {
            // A full counter is readable already, which is all that is needed.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
        true
    }

    /// The move begins. What it waits on has to include the descriptor.
    pub(crate) fn begin(&self) -> io::Result<Wake> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let wake = std::sync::Arc::new(wake);
        let mut state = self.lock();
        if state.gate == Gate::Cancelled {
            rustix::io::write(&wake, &1u64.to_ne_bytes())?;
        }
        state.wake = Some(std::sync::Arc::clone(&wake));
        state.began = Some(Instant::now());
        Ok(Wake(wake))
    }

    /// Restarts the clock: a destination's move begins when the source is there.
    pub(crate) fn restart_clock(&self) {
        self.lock().began = Some(Instant::now());
    }

    /// Whether the move has been cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.lock().gate == Gate::Cancelled
    }

    /// The commit point: from here on it is too late to cancel. `false`: it has been cancelled, do not commit.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.lock();
        if state.gate == Gate::Cancelled {
            return false;
        }
        state.gate = Gate::Closed;
        true
    }

    /// The move has ended, one way or another.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        if let Some(began) = state.began {
            state.progress.elapsed_ms = milliseconds(began);
        }
        state.ended = true;
        state.wake = None;
    }

    /// Changes the figures.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock().progress);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete in itself, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time since `from` in milliseconds.
pub(crate) fn milliseconds(from: Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let control = MoveControl::new();
        assert!(control.cancel());
        assert!(control.cancel(), "asking twice is fine");
        assert!(!control.close());
        assert!(control.is_cancelled());

        let control = MoveControl::new();
        assert!(control.close());
        assert!(!control.cancel());
        assert!(!control.is_cancelled());
    }

    #[test]
    fn a_cancel_wakes_whether_it_comes_before_or_after_the_begin() {
        for before in [true, false] {
            let control = MoveControl::new();
            if before {
                assert!(control.cancel());
            }
            let wake = control.begin().expect("a descriptor");
            if !before {
                assert!(control.cancel());
            }
            let mut buffer = [0; 8];
            assert_eq!(rustix::io::read(&wake, &mut buffer).expect("readable"), 8);
        }
    }

    #[test]
    fn after_the_end_nothing_changes() {
        let control = MoveControl::new();
        control.begin().expect("a descriptor");
        control.end();
        assert!(!control.cancel());
        assert_eq!(control.progress().elapsed_ms, control.progress().elapsed_ms);
    }
}
