//! What the console's queues and its pump share.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::endpoint::{GuestPort, Output, Wake};

/// How many bytes of input wait for the guest's buffers at most.
pub(super) const INPUT_CAPACITY: usize = 4096;

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    /// The guest has a buffer, and there is nothing to put into it.
    wanted: bool,
}

/// What the queues and the pump share.
pub(super) struct Port {
    pub(super) output: Output,
    input: Mutex<Input>,
    /// Wakes the pump, where there is one.
    wake: Option<Wake>,
    /// Input has come.
    pub(super) arrived: EventFd,
    /// Output has left that somebody waits for.
    pub(super) left: EventFd,
    /// The first request in the transmit queue waits for room.
    waiting: AtomicBool,
}

impl Port {
    pub(super) fn new(output: Output, wake: Option<Wake>) -> io::Result<Self> {
        Ok(Self {
            output,
            input: Mutex::default(),
            wake,
            arrived: EventFd::new(EFD_NONBLOCK)?,
            left: EventFd::new(EFD_NONBLOCK)?,
            waiting: AtomicBool::new(false),
        })
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Input that waits, without taking it.
    pub(super) fn pending(&self) -> Vec<u8> {
        self.input().bytes.iter().copied().collect()
    }

    pub(super) fn restore(&self, pending: Vec<u8>) {
        let mut input = self.input();
        input.bytes = pending.into();
        input.wanted = false;
    }

    /// Takes at most `most` bytes of the input that waits.
    pub(super) fn take(&self, most: u64) -> Vec<u8> {
        let mut input = self.input();
        let count =
            usize::try_from(most).map_or(input.bytes.len(), |most| most.min(input.bytes.len()));
        input.bytes.drain(..count).collect()
    }

    /// Asks for input, which [`Port::arrived`] will tell of; false if there is some.
    pub(super) fn want(&self) -> bool {
        let mut input = self.input();
        if !input.bytes.is_empty() {
            return false;
        }
        if !std::mem::replace(&mut input.wanted, true)
            && let Some(wake) = &self.wake
        {
            wake.signal();
        }
        true
    }

    /// The guest has no buffer any more.
    pub(super) fn want_none(&self) {
        self.input().wanted = false;
    }

    /// Whether there is room for so much output. If not, [`Port::left`] will tell when to look again.
    pub(super) fn has_room(&self, len: usize) -> bool {
        if self.output.room() >= len {
            return true;
        }
        // Said before looking again, so that room made in between is not missed.
        self.waiting.store(true, Ordering::SeqCst);
        self.output.room() >= len
    }
}

impl GuestPort for Port {
    fn input_room(&self) -> usize {
        let input = self.input();
        if input.wanted {
            INPUT_CAPACITY.saturating_sub(input.bytes.len())
        } else {
            0
        }
    }

    fn input(&self, bytes: &[u8]) {
        let mut input = self.input();
        input.bytes.extend(bytes);
        input.wanted = false;
        // It fails only when the event is signalled already.
        let _ = self.arrived.write(1);
    }

    fn output_left(&self) {
        if self.waiting.swap(false, Ordering::SeqCst) {
            let _ = self.left.write(1);
        }
    }
}
