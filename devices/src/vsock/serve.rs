//! What serves the queues.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::Shared;
use super::packet::{HEADER_BYTES, Header};
use crate::virtio::{Chain, QueueError, QueueHandler, Virtqueue};

/// Most data in a packet of the guest.
const MOST_PAYLOAD: u64 = 64 << 10;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Receive,
    Transmit,
    Event,
}

/// Serves one queue.
pub(super) struct Handler {
    pub(super) shared: Arc<Shared>,
    pub(super) role: Role,
}

impl Handler {
    /// Serves a request. False if it stays in the ring, since there is nothing to put into it.
    fn serve(&self, queue: &mut Virtqueue, chain: &Chain) -> Result<bool, QueueError> {
        let written = match self.role {
            Role::Receive => {
                if chain.writable.len() < HEADER_BYTES as u64 {
                    return Err(QueueError::Request(
                        "a buffer too small for a packet's header",
                    ));
                }
                let room = chain.writable.len() - HEADER_BYTES as u64;
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                let Some((header, payload)) = self.shared.switch().next(room) else {
                    return Ok(false);
                };
                queue.write(&chain.writable, 0, &header.encode())?;
                queue.write(&chain.writable, HEADER_BYTES as u64, &payload)?;
                (HEADER_BYTES + payload.len()) as u32
            }
            Role::Transmit => {
                let mut bytes = [0; HEADER_BYTES];
                if chain.readable.read(queue.memory(), 0, &mut bytes)? < HEADER_BYTES {
                    return Err(QueueError::Request("a packet shorter than its header"));
                }
                let header = Header::decode(&bytes);
                let len = u64::from(header.len);
                if len > MOST_PAYLOAD || len > chain.readable.len() - HEADER_BYTES as u64 {
                    return Err(QueueError::Request(
                        "a packet with less data than it says, or too much",
                    ));
                }
                let mut payload = vec![0; len as usize];
                chain
                    .readable
                    .read(queue.memory(), HEADER_BYTES as u64, &mut payload)?;
                self.shared
                    .switch()
                    .packet(&self.shared.events, &header, &payload);
                0
            }
            Role::Event => {
                if !self.shared.reset_pending.load(Ordering::SeqCst) {
                    return Ok(false);
                }
                let event = TRANSPORT_RESET.to_le_bytes();
                let written = queue.write(&chain.writable, 0, &event)?;
                if written == event.len() {
                    self.shared.reset_pending.store(false, Ordering::SeqCst);
                }
                written as u32
            }
        };
        queue.complete(chain.head, written)?;
        Ok(true)
    }

    /// Takes what has happened to the host's sockets. It does not wait.
    fn harvest(&self) -> Result<(), QueueError> {
        let events = &self.shared.events;
        let mut ready = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 64];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let count = match epoll::wait(events, &mut ready[..], Some(&now)) {
            Ok(count) => count,
            // The epoll instance stays readable.
            Err(Errno::INTR) => 0,
            Err(error) => return Err(QueueError::BackEnd(error.into())),
        };
        let mut switch = self.shared.switch();
        for event in &ready[..count.min(64)] {
            switch.host_ready(events, event.data.u64(), event.flags);
        }
        Ok(())
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        if self.role == Role::Receive {
            // Empty if it was something else that woke this thread.
            let _ = self.shared.work.read();
            self.harvest()?;
        }
        // A driver that never stops must not keep the worker from stopping.
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop()? {
                if !self.serve(queue, &chain)? {
                    queue.unpop();
                    return queue.signal();
                }
            } else {
                self.after_transmit();
                queue.signal()?;
                if !queue.enable_notification()? {
                    return Ok(());
                }
            }
        }
        self.after_transmit();
        queue.signal()?;
        queue.kick().write(1)?;
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        if self.role != Role::Receive {
            return Vec::new();
        }
        // SAFETY: the event is open for as long as `self.shared`, which `self` borrows.
        let work = unsafe { BorrowedFd::borrow_raw(self.shared.work.as_raw_fd()) };
        vec![self.shared.events.as_fd(), work]
    }
}

impl Handler {
    /// What the guest has sent may be answered now.
    fn after_transmit(&self) {
        if self.role == Role::Transmit {
            // It fails only when the event is signalled already.
            let _ = self.shared.work.write(1);
        }
    }
}
