//! The thread that serves one queue.
//!
//! ```text
//!   start ─► process ─► poll { stop, kick, the handler's sources } ─► process ─► …
//!                          │ stop                                        │ error
//!                          └─► drain ─► (handler, queue) back            └─► NEEDS_RESET, wait for stop
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{QueueError, Virtqueue};

/// What serves a queue, on the queue's own thread.
pub trait QueueHandler: Send + 'static {
    /// Takes requests and finishes them, until there is nothing to do without waiting.
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError>;
    /// Finishes all requests that were taken. Nothing writes guest memory after it has returned.
    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let _ = queue;
        Ok(())
    }
    /// What is work when it becomes readable, besides the driver's notification.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// After how long there is work in any case.
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

/// A queue that is being served.
#[derive(Debug)]
pub struct Worker<H> {
    stop: Arc<EventFd>,
    thread: JoinHandle<(H, Virtqueue)>,
}

impl<H: QueueHandler> Worker<H> {
    /// Starts the thread; `name` is cut to the 15 bytes that the system keeps.
    pub fn start(name: &str, handler: H, queue: Virtqueue) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || serve(handler, queue, &stopped))?;
        Ok(Self { stop, thread })
    }

    /// Stops it; on return nothing of the queue is under way. None if the thread has ended by a panic.
    pub fn stop(self) -> Option<(H, Virtqueue)> {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "a device's thread cannot be told to stop");
        }
        self.thread.join().ok()
    }
}

fn serve<H: QueueHandler>(mut handler: H, mut queue: Virtqueue, stop: &EventFd) -> (H, Virtqueue) {
    let mut result = handler.process(&mut queue);
    loop {
        if is_broken(&result, &queue) {
            wait_for(stop);
            break;
        }
        match wait(&handler, &queue, stop) {
            Ok(true) => break,
            Ok(false) => result = handler.process(&mut queue),
            Err(error) => result = Err(QueueError::BackEnd(error)),
        }
    }
    is_broken(&handler.drain(&mut queue), &queue);
    (handler, queue)
}

/// Whether it has failed; then the driver is told.
pub(super) fn is_broken(result: &Result<(), QueueError>, queue: &Virtqueue) -> bool {
    if let Err(error) = result {
        tracing::error!(queue = queue.index(), %error, "the device needs a reset");
        queue.needs_reset();
    }
    result.is_err()
}

/// Waits for work; true if it is to stop.
fn wait<H: QueueHandler>(handler: &H, queue: &Virtqueue, stop: &EventFd) -> io::Result<bool> {
    // SAFETY: both are open for as long as the borrows live.
    let (stop_fd, kick_fd) = unsafe { (borrowed(stop), borrowed(queue.kick())) };
    let mut all = vec![
        PollFd::from_borrowed_fd(stop_fd, PollFlags::IN),
        PollFd::from_borrowed_fd(kick_fd, PollFlags::IN),
    ];
    all.extend(
        handler
            .sources()
            .into_iter()
            .map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)),
    );
    let timeout = handler.timeout().map(|timeout| Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    match poll(&mut all, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if all[1].revents().contains(PollFlags::IN) {
        // It may be empty by now; the count says nothing.
        let _ = queue.kick().read();
    }
    Ok(!all[0].revents().is_empty())
}

fn wait_for(stop: &EventFd) {
    // SAFETY: it is open for as long as the borrow lives.
    let stop = unsafe { borrowed(stop) };
    loop {
        let mut fds = [PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            _ => return,
        }
    }
}

/// # Safety
///
/// `event` must be open for as long as the result is used, which its borrow says.
unsafe fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: an EventFd is an open file descriptor until it is dropped.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
