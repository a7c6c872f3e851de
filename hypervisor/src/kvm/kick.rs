//! Making a vCPU leave the guest, without losing a kick.
//!
//! ```text
//!   kicker                              vCPU thread
//!   immediate_exit = 1                  KVM_RUN
//!   signal the thread, if it is in run    ├─ entered before the store: the signal ends it     ─┐
//!                                         ├─ entered after the store: KVM sees immediate_exit ─┼─► EINTR
//!                                         └─ serving an exit: the next KVM_RUN sees it        ─┘
//!                                       immediate_exit = 0, return Interrupted
//! ```
//!
//! `immediate_exit` is a byte of the run page that KVM shares with us. It stays 1 until a run has returned
//! `Interrupted` for it, so a kick before a run counts for that run. The page lives as long as its [`KickHandle`] is connected:
//! the vCPU disconnects before it goes, and a kick after that does nothing.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::VcpuKick;
use crate::signal::kick_signal;

/// The byte in the run page.
struct ImmediateExit(*mut u8);

// SAFETY: the byte is only ever accessed atomically by us, from whatever thread.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn store(&self, value: u8) {
        // SAFETY: the pointer is valid while it is in `Inner` (`KickHandle::disconnect` takes it out before the page goes), a
        // byte is always aligned, and nothing else in this process accesses it other than atomically.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

struct Inner {
    /// `None` once the vCPU is gone.
    immediate_exit: Option<ImmediateExit>,
    /// The thread inside `run`, if one is. It cannot end while it is here.
    runner: Option<libc::pthread_t>,
}

/// What [`crate::Vcpu::kick_handle`] gives out.
pub(crate) struct KickHandle {
    inner: Mutex<Inner>,
}

impl KickHandle {
    /// Connects to a vCPU.
    ///
    /// # Safety
    ///
    /// `immediate_exit` must point to that byte of the vCPU's run page, which must stay mapped until
    /// [`KickHandle::disconnect`] has returned.
    pub(crate) unsafe fn new(immediate_exit: *mut u8) -> Self {
        Self {
            inner: Mutex::new(Inner {
                immediate_exit: Some(ImmediateExit(immediate_exit)),
                runner: None,
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread begins to run the vCPU; it has ended when the answer is dropped.
    pub(crate) fn running(&self) -> Running<'_> {
        // SAFETY: always succeeds and touches nothing.
        self.inner().runner = Some(unsafe { libc::pthread_self() });
        Running { handle: self }
    }

    /// The vCPU goes: no kick touches the run page from now on.
    pub(crate) fn disconnect(&self) {
        self.inner().immediate_exit = None;
    }
}

impl VcpuKick for KickHandle {
    fn kick(&self) {
        let inner = self.inner();
        let Some(immediate_exit) = &inner.immediate_exit else {
            return;
        };
        immediate_exit.store(1);
        if let Some(thread) = inner.runner {
            // SAFETY: the thread is inside `run`: it must take the lock, which is held here, to leave it. A failure could
            // only mean that it is gone, and then there is nobody to kick.
            unsafe { libc::pthread_kill(thread, kick_signal()) };
        }
    }
}

/// A thread is inside `run`.
pub(crate) struct Running<'a> {
    handle: &'a KickHandle,
}

impl Running<'_> {
    /// Takes the request back, since it is about to be answered.
    pub(crate) fn acknowledge(&self) {
        if let Some(immediate_exit) = &self.handle.inner().immediate_exit {
            immediate_exit.store(0);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.handle.inner().runner = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kick_without_a_runner_stays_until_acknowledged_and_dies_with_the_vcpu() {
        let mut byte = 0u8;
        // SAFETY: `byte` outlives `disconnect` below.
        let handle = unsafe { KickHandle::new(&raw mut byte) };
        let read = |handle: &KickHandle| {
            let inner = handle.inner();
            let exit = inner.immediate_exit.as_ref().map(|e| e.0);
            // SAFETY: as in `ImmediateExit::store`.
            exit.map(|p| unsafe { AtomicU8::from_ptr(p) }.load(Ordering::SeqCst))
        };
        handle.kick();
        assert_eq!(read(&handle), Some(1));
        let running = handle.running();
        running.acknowledge();
        assert_eq!(read(&handle), Some(0));
        drop(running);
        handle.disconnect();
        handle.kick();
        assert_eq!(byte, 0);
    }
}
