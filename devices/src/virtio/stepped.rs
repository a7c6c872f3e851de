//! What serves a queue without a thread, for the fuzz targets: whoever drives the device says when there is time for it.
//!
//! ```text
//!   start ─► process        step() ─► is there work? ─► process ─► error: NEEDS_RESET, and nothing more until it is stopped
//!                           stop ───► drain ─► (handler, queue) back
//! ```
//!
//! It does what [`super::worker`]'s thread does, at the same occasions, and nothing in between: the same calls give the same result.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::queue::Virtqueue;
use super::worker::{QueueHandler, is_broken};

thread_local! {
    /// What this thread has started, in that order.
    static SERVED: RefCell<Vec<Weak<dyn Serve>>> = const { RefCell::new(Vec::new()) };
}

/// A queue that is being served, whatever serves it.
trait Serve: Send + Sync {
    /// Serves it if there is work, or in any case; false if there was none.
    fn step(&self, in_any_case: bool) -> bool;
}

struct Served<H> {
    handler: H,
    queue: Virtqueue,
    broken: bool,
}

struct Cell<H>(Mutex<Option<Served<H>>>);

impl<H> Cell<H> {
    fn lock(&self) -> MutexGuard<'_, Option<Served<H>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: QueueHandler> Serve for Cell<H> {
    fn step(&self, in_any_case: bool) -> bool {
        let mut cell = self.lock();
        let Some(served) = cell.as_mut().filter(|served| !served.broken) else {
            return false;
        };
        let ready = is_ready(&served.handler, &served.queue);
        if ready || in_any_case {
            // It may be empty; the count says nothing.
            let _ = served.queue.kick().read();
            served.process();
        }
        ready || in_any_case
    }
}

impl<H: QueueHandler> Served<H> {
    fn process(&mut self) {
        let result = self.handler.process(&mut self.queue);
        self.broken = is_broken(&result, &self.queue);
    }
}

/// A queue that is being served.
pub struct Worker<H>(Arc<Cell<H>>);

impl<H: QueueHandler> Worker<H> {
    /// Serves it for the first time; from now on whenever [`step`] is called on this thread.
    pub fn start(_name: &str, handler: H, queue: Virtqueue) -> io::Result<Self> {
        let mut served = Served {
            handler,
            queue,
            broken: false,
        };
        served.process();
        let cell = Arc::new(Cell(Mutex::new(Some(served))));
        let shared: Arc<dyn Serve> = cell.clone();
        SERVED.with_borrow_mut(|all| all.push(Arc::downgrade(&shared)));
        Ok(Self(cell))
    }

    /// Stops it; on return nothing of the queue is under way.
    pub fn stop(self) -> Option<(H, Virtqueue)> {
        let mut served = self.0.lock().take()?;
        is_broken(&served.handler.drain(&mut served.queue), &served.queue);
        Some((served.handler, served.queue))
    }
}

impl<H> std::fmt::Debug for Worker<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Worker")
    }
}

/// Serves all queues for which there is work, each once; with `in_any_case` all, as if their time were over. Returns how many it has served.
pub fn step(in_any_case: bool) -> usize {
    let all: Vec<_> = SERVED.with_borrow_mut(|all| {
        all.retain(|served| served.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    });
    all.iter().filter(|served| served.step(in_any_case)).count()
}

/// Whether a thread that waits for work would go on.
fn is_ready<H: QueueHandler>(handler: &H, queue: &Virtqueue) -> bool {
    if handler.timeout().is_some_and(|timeout| timeout.is_zero()) {
        return true;
    }
    // SAFETY: the queue keeps it open for as long as the borrow lives.
    let kick = unsafe { BorrowedFd::borrow_raw(queue.kick().as_raw_fd()) };
    let mut all = vec![PollFd::from_borrowed_fd(kick, PollFlags::IN)];
    let sources = handler.sources().into_iter();
    all.extend(sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)));
    poll(&mut all, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
