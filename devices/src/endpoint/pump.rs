//! The thread between a guest's port and a back end.
//!
//! ```text
//!   running ⇄ paused (only the wake event is watched)
//!      └──────────┴──► stopping: not paused? output gets GRACE to leave ──► joined
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::EndpointError;
use super::output::{OutputQueue, signal};
use super::{Endpoint, GuestPort, Received};

/// How long waiting output may take to leave when the pump stops.
const GRACE: Duration = Duration::from_millis(250);
/// How long input is left alone after [`Received::Later`].
const LATER: Duration = Duration::from_secs(1);
/// Most bytes read from a back end, or written to it, in one call.
const CHUNK: usize = 4096;

#[derive(Default)]
struct Control {
    paused: bool,
    stop: bool,
    /// The worker has seen `paused`, or has ended.
    still: bool,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on the thread.
pub(crate) struct Pump {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
}

impl Pump {
    /// Starts the thread; `name` is one of at most 15 bytes.
    pub(crate) fn start(
        name: &str,
        endpoint: Box<dyn Endpoint>,
        port: Arc<dyn GuestPort>,
        queue: Arc<OutputQueue>,
        wake: Arc<OwnedFd>,
    ) -> Result<Pump, EndpointError> {
        let shared = Arc::new(Shared::default());
        let thread = {
            let (shared, wake) = (shared.clone(), wake.clone());
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                block_signals();
                let finished = Finished {
                    shared: &shared,
                    queue: &queue,
                    port: &*port,
                };
                Loop {
                    endpoint,
                    port: port.clone(),
                    queue: queue.clone(),
                    wake,
                    shared: shared.clone(),
                    input_from: None,
                }
                .run();
                drop(finished);
            })
        };
        shared.lock().thread = Some(thread.map_err(EndpointError::Worker)?);
        Ok(Pump { shared, wake })
    }

    pub(crate) fn wake(&self) {
        signal(&self.wake);
    }

    pub(crate) fn pause(&self) {
        let mut control = self.shared.lock();
        control.paused = true;
        signal(&self.wake);
        while !control.still {
            control = self
                .shared
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn resume(&self) {
        self.shared.lock().paused = false;
        signal(&self.wake);
    }

    pub(crate) fn stop(&self) {
        let mut control = self.shared.lock();
        control.stop = true;
        let thread = control.thread.take();
        drop(control);
        signal(&self.wake);
        if let Some(thread) = thread {
            // A panic of the worker has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Says that the thread has ended, however it did.
struct Finished<'a> {
    shared: &'a Shared,
    queue: &'a OutputQueue,
    port: &'a dyn GuestPort,
}

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        drop(queue);
        self.port.output_left();
        let mut control = self.shared.lock();
        control.stop = true;
        control.still = true;
        self.shared.changed.notify_all();
    }
}

/// The thread's own state.
struct Loop {
    endpoint: Box<dyn Endpoint>,
    port: Arc<dyn GuestPort>,
    queue: Arc<OutputQueue>,
    wake: Arc<OwnedFd>,
    shared: Arc<Shared>,
    /// No input is read before.
    input_from: Option<Instant>,
}

/// What is ready.
#[derive(Default)]
struct Ready {
    input: bool,
    output: bool,
    listener: bool,
}

impl Loop {
    fn run(mut self) {
        loop {
            let mut control = self.shared.lock();
            let (stop, paused) = (control.stop, control.paused);
            if stop || control.still != paused {
                control.still = paused && !stop;
                self.shared.changed.notify_all();
            }
            drop(control);
            if stop {
                if !paused {
                    self.drain();
                }
                return;
            }
            let ready = self.wait(paused);
            if ready.listener {
                self.endpoint.accept();
            }
            if ready.input {
                self.receive();
            }
            if ready.output {
                self.send();
            }
        }
    }

    /// Waits until something is to be done.
    fn wait(&self, paused: bool) -> Ready {
        let now = Instant::now();
        let rest = self
            .input_from
            .map(|from| from.saturating_duration_since(now))
            .filter(|rest| !rest.is_zero());
        let wants_input = !paused && rest.is_none() && self.port.input_room() > 0;
        let wants_output = !paused && !self.queue.lock().bytes.is_empty();

        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        let listener = watch(&mut fds, !paused, self.endpoint.listener(), PollFlags::IN);
        let input = watch(&mut fds, wants_input, self.endpoint.input(), PollFlags::IN);
        let output = watch(
            &mut fds,
            wants_output,
            self.endpoint.output(),
            PollFlags::OUT,
        );

        let timeout = rest
            .filter(|_| !paused)
            .and_then(|rest| Timespec::try_from(rest).ok());
        if poll(&mut fds, timeout.as_ref()).is_err() {
            // Interrupted, or out of memory: look again.
            return Ready::default();
        }
        let is_ready = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
        let ready = Ready {
            listener: is_ready(listener),
            input: is_ready(input),
            output: is_ready(output),
        };
        if is_ready(Some(0)) {
            let _ = rustix::io::read(&*self.wake, &mut [0u8; 8]);
        }
        ready
    }

    fn receive(&mut self) {
        let mut buffer = [0; CHUNK];
        self.input_from = None;
        let room = self.port.input_room().min(CHUNK);
        if room == 0 {
            return;
        }
        match self.endpoint.read(&mut buffer[..room]) {
            Received::Bytes(count) => self.port.input(&buffer[..count.min(room)]),
            Received::Nothing => {}
            Received::Later => self.input_from = Some(Instant::now() + LATER),
        }
    }

    fn send(&mut self) {
        let mut queue = self.queue.lock();
        let (front, _) = queue.bytes.as_slices();
        let taken = self.endpoint.write(&front[..front.len().min(CHUNK)]);
        let taken = taken.min(queue.bytes.len());
        queue.bytes.drain(..taken);
        if self.endpoint.output_closed() {
            queue.closed = true;
            queue.bytes.clear();
        }
        drop(queue);
        self.port.output_left();
    }

    /// Gives waiting output some time to leave.
    fn drain(&mut self) {
        if self.endpoint.listener().is_some() {
            // A peer may have come whom nobody has looked after yet.
            self.endpoint.accept();
        }
        let end = Instant::now() + GRACE;
        while !self.queue.lock().bytes.is_empty() {
            let rest = end.saturating_duration_since(Instant::now());
            let Some(output) = self.endpoint.output().filter(|_| !rest.is_zero()) else {
                return;
            };
            let timeout = Timespec::try_from(rest).ok();
            match poll(
                &mut [PollFd::from_borrowed_fd(output, PollFlags::OUT)],
                timeout.as_ref(),
            ) {
                Ok(0) => return,
                Ok(_) => self.send(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// Adds a descriptor to what is polled, if it is wanted and there; where it is.
fn watch<'a>(
    fds: &mut Vec<PollFd<'a>>,
    wanted: bool,
    fd: Option<BorrowedFd<'a>>,
    flags: PollFlags,
) -> Option<usize> {
    let fd = fd.filter(|_| wanted)?;
    fds.push(PollFd::from_borrowed_fd(fd, flags));
    Some(fds.len() - 1)
}

/// Signals are for the process's other threads; and reading a terminal from the background must fail, not stop the
/// process (SIGTTIN).
fn block_signals() {
    // SAFETY: an all-zero sigset_t is a valid value that sigfillset overwrites, and pthread_sigmask reads it and changes
    // the calling thread's mask only.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
}
