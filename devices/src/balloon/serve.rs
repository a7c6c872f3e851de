//! What serves each of the balloon's queues.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use memory::PAGE_SIZE;

use super::give_back::runs;
use super::{Shared, statistics};
use crate::virtio::{Chain, QueueError, QueueHandler, Virtqueue};

/// Most page numbers in a request: 256 MiB of pages. Linux sends 256 at a time.
const MOST_PAGES: u64 = 1 << 16;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Report,
    /// Nothing, with the features that the driver has accepted.
    Idle,
}

/// Serves one queue.
pub(super) struct Handler {
    shared: Arc<Shared>,
    role: Role,
    /// The statistics buffer, which goes back when new statistics are wanted. It is always the request that was popped last.
    held: Option<u16>,
}

impl Handler {
    pub(super) fn new(shared: Arc<Shared>, role: Role) -> Self {
        Self {
            shared,
            role,
            held: None,
        }
    }

    fn serve(&mut self, queue: &Virtqueue, chain: &Chain) -> Result<(), QueueError> {
        match self.role {
            Role::Inflate => {
                let pages = page_numbers(queue, chain)?;
                let count = pages.len() as u64;
                for run in runs(pages) {
                    self.shared.give_back(run);
                }
                self.shared
                    .count(|counters| counters.inflated_pages += count);
            }
            Role::Deflate => {
                let count = page_numbers(queue, chain)?.len() as u64;
                self.shared
                    .count(|counters| counters.deflated_pages += count);
            }
            Role::Report => {
                for &(gpa, len) in chain.writable.parts() {
                    let first = gpa.div_ceil(PAGE_SIZE);
                    let end = (gpa + u64::from(len)) / PAGE_SIZE;
                    if first < end {
                        self.shared.give_back(first..end);
                        self.shared
                            .count(|counters| counters.reported_pages += end - first);
                    }
                }
            }
            Role::Statistics | Role::Idle => {}
        }
        Ok(())
    }

    /// Takes the driver's buffer, if there is none yet.
    fn hold(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.held.is_none()
            && let Some(chain) = queue.pop()?
        {
            self.held = Some(chain.head);
            let mut bytes = [0; statistics::MOST_BYTES];
            let len = chain.readable.read(queue.memory(), 0, &mut bytes)?;
            *self.shared.statistics() = statistics::parse(&bytes[..len]);
        }
        Ok(())
    }

    fn process_statistics(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        self.hold(queue)?;
        if self.shared.want_statistics.read().is_ok()
            && let Some(head) = self.held.take()
        {
            queue.complete(head, 0)?;
            queue.signal()?;
        }
        self.hold(queue)?;
        if queue.enable_notification()? {
            // A second buffer, which makes no sense, stays where it is.
            self.hold(queue)?;
        }
        Ok(())
    }
}

/// The page numbers in a request.
fn page_numbers(queue: &Virtqueue, chain: &Chain) -> Result<Vec<u32>, QueueError> {
    if chain.readable.len() > MOST_PAGES * 4 {
        return Err(QueueError::Request(
            "too many pages for the balloon at once",
        ));
    }
    let mut bytes = vec![0; chain.readable.len() as usize];
    chain.readable.read(queue.memory(), 0, &mut bytes)?;
    let (numbers, _) = bytes.as_chunks::<4>();
    Ok(numbers
        .iter()
        .map(|number| u32::from_le_bytes(*number))
        .collect())
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        match self.role {
            Role::Idle => return Ok(()),
            Role::Statistics => return self.process_statistics(queue),
            Role::Inflate | Role::Deflate | Role::Report => {}
        }
        // A driver that never stops must not keep the worker from stopping.
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop()? {
                self.serve(queue, &chain)?;
                queue.complete(chain.head, 0)?;
            } else {
                queue.signal()?;
                if !queue.enable_notification()? {
                    return Ok(());
                }
            }
        }
        queue.signal()?;
        queue.kick().write(1)?;
        Ok(())
    }

    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.held.take().is_some() {
            queue.unpop();
        }
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        if self.role != Role::Statistics {
            return Vec::new();
        }
        let event = self.shared.want_statistics.as_raw_fd();
        // SAFETY: the event is open for as long as `self.shared`, which `self` borrows.
        vec![unsafe { BorrowedFd::borrow_raw(event) }]
    }
}
