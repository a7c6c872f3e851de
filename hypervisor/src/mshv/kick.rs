//! Making a VP leave the guest, without losing a kick.
//!
//! ```text
//!   kicker                                   vCPU thread
//!   wanted = 1                               wanted? ── yes ──► wanted = 0, return Interrupted
//!   a signal now, and one each millisecond     │ no
//!   until it is answered                       ├─ signal here: lost … the next one is not
//!                                            MSHV_RUN_VP
//!                                              └─ signal here: EINTR ──► wanted = 0, return Interrupted
//! ```
//!
//! Unlike KVM, the driver has no flag that it looks at when the guest is entered, so a signal that comes between our look and the
//! call is lost. A timer of the process (`timer_create`, SIGEV_THREAD_ID) repeats it until the kick has been answered, then it
//! is switched off: the guest pays nothing for it, and a kick that falls into the gap is late by a millisecond.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::call;
use crate::signal::kick_signal;
use crate::{Result, VcpuKick};

/// Between two signals.
const AGAIN_NS: libc::c_long = 1_000_000;

/// A timer that sends the kick signal to one thread.
struct Timer {
    id: libc::timer_t,
    thread: libc::pid_t,
}

// SAFETY: a timer id may be used from any thread of the process.
unsafe impl Send for Timer {}

impl Timer {
    /// A timer for the calling thread, switched off.
    fn for_this_thread() -> io::Result<Self> {
        // SAFETY: always succeeds and touches nothing.
        let thread = unsafe { libc::gettid() };
        // SAFETY: all zero is a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        event.sigev_notify_thread_id = thread;
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both structures are initialised and ours; the handler of the signal does nothing.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { id, thread })
    }

    /// Signals in `first_ns`, then again and again; 0 switches it off.
    fn set(&self, first_ns: libc::c_long) {
        let interval = if first_ns == 0 { 0 } else { AGAIN_NS };
        let time = |tv_nsec| libc::timespec { tv_sec: 0, tv_nsec };
        let spec = libc::itimerspec {
            it_interval: time(interval),
            it_value: time(first_ns),
        };
        // SAFETY: the timer exists until `drop`; it cannot fail with valid numbers, and these are.
        unsafe { libc::timer_settime(self.id, 0, &raw const spec, std::ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: created by us, deleted once.
        unsafe { libc::timer_delete(self.id) };
    }
}

/// What [`crate::Vcpu::kick_handle`] gives out.
#[derive(Default)]
pub(crate) struct KickHandle {
    wanted: AtomicBool,
    /// The timer of the thread that has run the VP last, and whether it is in `run` now.
    runner: Mutex<(Option<Timer>, bool)>,
}

impl KickHandle {
    fn runner(&self) -> MutexGuard<'_, (Option<Timer>, bool)> {
        self.runner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread begins to run the VP; it has ended when the answer is dropped.
    pub(crate) fn running(&self) -> Result<Running<'_>> {
        let mut runner = self.runner();
        // SAFETY: always succeeds and touches nothing.
        let thread = unsafe { libc::gettid() };
        if runner.0.as_ref().is_none_or(|timer| timer.thread != thread) {
            runner.0 = Some(Timer::for_this_thread().map_err(call("timer_create"))?);
        }
        runner.1 = true;
        Ok(Running { handle: self })
    }
}

impl VcpuKick for KickHandle {
    fn kick(&self) {
        let runner = self.runner();
        self.wanted.store(true, Ordering::SeqCst);
        if let (Some(timer), true) = &*runner {
            timer.set(1);
        }
    }
}

/// A thread is inside `run`.
pub(crate) struct Running<'a> {
    handle: &'a KickHandle,
}

impl Running<'_> {
    /// Whether somebody has kicked; if so, that is answered herewith.
    pub(crate) fn take_kick(&self) -> bool {
        if !self.handle.wanted.load(Ordering::SeqCst) {
            return false;
        }
        let runner = self.handle.runner();
        self.handle.wanted.store(false, Ordering::SeqCst);
        if let Some(timer) = &runner.0 {
            timer.set(0);
        }
        true
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut runner = self.handle.runner();
        runner.1 = false;
        if let Some(timer) = &runner.0 {
            timer.set(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_kick_before_a_run_counts_for_it_once() {
        let handle = KickHandle::default();
        handle.kick();
        handle.kick();
        let running = handle.running().expect("a timer");
        assert!(running.take_kick());
        assert!(!running.take_kick());
    }

    #[test]
    fn a_kick_reaches_a_thread_that_missed_the_first_signal() {
        crate::signal::install_handler().expect("handler");
        let handle = Arc::new(KickHandle::default());
        let kicked = Arc::clone(&handle);
        let thread = std::thread::spawn(move || {
            crate::signal::unblock_on_this_thread().expect("unblock");
            let running = kicked.running().expect("a timer");
            // The first signal falls into this busy time; a sleep that nothing interrupted would last for a minute.
            while !kicked.wanted.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            let spun = std::time::Instant::now();
            while spun.elapsed() < Duration::from_micros(500) {}
            // SAFETY: both times are ours and valid; EINTR is what the test waits for.
            let answer = unsafe {
                let minute = libc::timespec {
                    tv_sec: 60,
                    tv_nsec: 0,
                };
                libc::clock_nanosleep(
                    libc::CLOCK_MONOTONIC,
                    0,
                    &raw const minute,
                    std::ptr::null_mut(),
                )
            };
            (answer, running.take_kick())
        });
        std::thread::sleep(Duration::from_millis(20));
        handle.kick();
        assert_eq!(thread.join().expect("no panic"), (libc::EINTR, true));
    }
}
