//! Where a guest's output goes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::error::EndpointError;

/// How many bytes of output wait for the other end; the oldest are lost beyond.
pub const OUTPUT_CAPACITY: usize = 64 << 10;

/// A handle on the output. It takes every byte at once and never fails.
#[derive(Clone)]
pub(crate) struct Output {
    target: Target,
    lost: Arc<AtomicU64>,
}

#[derive(Clone)]
enum Target {
    Nowhere,
    File(Arc<File>),
    Queue(Arc<OutputQueue>),
}

impl Output {
    pub(crate) fn nowhere() -> Self {
        Self::to(Target::Nowhere)
    }

    pub(crate) fn file(file: File) -> Self {
        Self::to(Target::File(Arc::new(file)))
    }

    pub(crate) fn queue(queue: Arc<OutputQueue>) -> Self {
        Self::to(Target::Queue(queue))
    }

    fn to(target: Target) -> Self {
        Output {
            target,
            lost: Arc::new(AtomicU64::new(0)),
        }
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Output that the other end has not taken.
    pub(crate) fn unsent(&self) -> Vec<u8> {
        match &self.target {
            Target::Queue(queue) => queue.lock().bytes.iter().copied().collect(),
            Target::Nowhere | Target::File(_) => Vec::new(),
        }
    }

    /// Takes over what another machine's output had not sent, instead of what waits here.
    pub(crate) fn restore(&self, unsent: &[u8]) {
        if let Target::Queue(queue) = &self.target {
            queue.lock().bytes.clear();
        }
        self.send(unsent);
    }

    /// How many bytes it takes without losing any that wait.
    pub(crate) fn room(&self) -> usize {
        match &self.target {
            Target::Queue(queue) => queue.room(),
            Target::Nowhere | Target::File(_) => usize::MAX,
        }
    }

    pub(crate) fn send(&self, bytes: &[u8]) {
        let lost = match &self.target {
            Target::Nowhere => 0,
            Target::File(file) => send_to_file(file, bytes),
            Target::Queue(queue) => queue.push(bytes),
        };
        self.lose(lost as u64);
    }

    /// Counts output that nobody will see.
    pub(crate) fn lose(&self, lost: u64) {
        if lost != 0 && self.lost.fetch_add(lost, Ordering::Relaxed) == 0 {
            tracing::warn!("output is being lost: the other end does not take it");
        }
    }
}

/// Writes what the file takes; the number of bytes that it did not.
fn send_to_file(mut file: &File, mut bytes: &[u8]) -> usize {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => break,
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    bytes.len()
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Output that the pump passes on.
pub(crate) struct OutputQueue {
    queue: Mutex<Queue>,
    wake: Arc<OwnedFd>,
}

/// The queue itself.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) bytes: VecDeque<u8>,
    /// Nobody will ever take any more.
    pub(crate) closed: bool,
}

impl OutputQueue {
    /// An empty queue, and the event that says there is something to do.
    pub(crate) fn new() -> Result<(Self, Arc<OwnedFd>), EndpointError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| EndpointError::Worker(error.into()))?;
        let wake = Arc::new(wake);
        Ok((
            OutputQueue {
                queue: Mutex::default(),
                wake: wake.clone(),
            },
            wake,
        ))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is closed takes everything, and loses it.
    fn room(&self) -> usize {
        let queue = self.lock();
        if queue.closed {
            usize::MAX
        } else {
            OUTPUT_CAPACITY.saturating_sub(queue.bytes.len())
        }
    }

    /// The number of bytes that were lost: of the oldest, or all of them when the queue is closed.
    fn push(&self, bytes: &[u8]) -> usize {
        let mut queue = self.lock();
        if queue.closed {
            return bytes.len();
        }
        let was_empty = queue.bytes.is_empty();
        queue.bytes.extend(bytes);
        let surplus = queue.bytes.len().saturating_sub(OUTPUT_CAPACITY);
        queue.bytes.drain(..surplus);
        drop(queue);
        // Otherwise the pump knows, or has nobody to give it to.
        if was_empty && !bytes.is_empty() {
            signal(&self.wake);
        }
        surplus
    }
}

/// Signals an event.
pub(crate) fn signal(event: &OwnedFd) {
    // Fails only when the counter is full, and the event is signalled then.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
