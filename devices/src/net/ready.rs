//! Buffers that were taken from a receive queue and wait for packets.

use std::collections::VecDeque;

use super::{HEADER_LEN, MAX_IOVECS, NUM_BUFFERS};
use crate::virtio::{Chain, QueueError, Virtqueue};

struct Buffers {
    chain: Chain,
    /// Where its writable buffers are in this process.
    host: Vec<libc::iovec>,
}

/// In the order in which the driver offered them.
#[derive(Default)]
pub(super) struct Ready {
    all: VecDeque<Buffers>,
    bytes: u64,
}

// SAFETY: the addresses are of guest memory, which any thread may access; they are used only together with the queue whose memory it is.
unsafe impl Send for Ready {}

impl Ready {
    /// Room in all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Takes requests until there are `wanted` bytes of room, or no more requests.
    pub(super) fn fill(&mut self, queue: &mut Virtqueue, wanted: u64) -> Result<(), QueueError> {
        while self.bytes < wanted {
            let Some(chain) = queue.pop()? else {
                break;
            };
            if chain.writable.len() < HEADER_LEN as u64 {
                return Err(QueueError::Request(
                    "a receive buffer is shorter than a packet's header",
                ));
            }
            let mut host = Vec::with_capacity(chain.writable.parts().len());
            chain.writable.iovecs(queue.memory(), &mut host)?;
            self.bytes += chain.writable.len();
            self.all.push_back(Buffers { chain, host });
        }
        Ok(())
    }

    /// Adds the buffers of the first `chains` requests to `list`, as many as go into one call together with one more; returns their bytes.
    pub(super) fn list(&self, chains: usize, list: &mut Vec<libc::iovec>) -> usize {
        let buffers = self.all.iter().take(chains).flat_map(|each| &each.host);
        let before = list.len();
        list.extend(buffers.take(MAX_IOVECS - 1 - before).copied());
        list[before..].iter().map(|buffer| buffer.iov_len).sum()
    }

    /// Says that the system has written the first `len` bytes.
    pub(super) fn written(&self, queue: &mut Virtqueue, len: u64) {
        let mut left = len;
        for buffers in &self.all {
            if left == 0 {
                break;
            }
            let part = left.min(buffers.chain.writable.len());
            queue.written(&buffers.chain.writable, part);
            left -= part;
        }
    }

    /// Copies bytes to where byte `offset` of all the room is.
    pub(super) fn write(
        &self,
        queue: &mut Virtqueue,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), QueueError> {
        let (mut skip, mut left) = (offset, bytes);
        for buffers in &self.all {
            if left.is_empty() {
                break;
            }
            let room = buffers.chain.writable.len();
            if skip >= room {
                skip -= room;
                continue;
            }
            let done = queue.write(&buffers.chain.writable, skip, left)?;
            left = &left[done..];
            skip = 0;
        }
        Ok(())
    }

    /// Shows the driver a packet that fills the first `len` bytes.
    pub(super) fn complete(&mut self, queue: &mut Virtqueue, len: u64) -> Result<(), QueueError> {
        let (mut count, mut room) = (0_usize, 0);
        while room < len
            && let Some(buffers) = self.all.get(count)
        {
            room += buffers.chain.writable.len();
            count += 1;
        }
        // Not more than the queue has descriptors.
        let num_buffers = (count as u16).to_le_bytes();
        self.write(queue, NUM_BUFFERS, &num_buffers)?;
        let mut left = len;
        for buffers in self.all.drain(..count) {
            let part = left.min(buffers.chain.writable.len());
            left -= part;
            self.bytes -= buffers.chain.writable.len();
            // At most MAX_PACKET.
            queue.complete(buffers.chain.head, part as u32)?;
        }
        queue.publish();
        Ok(())
    }

    /// Puts all back into the queue.
    pub(super) fn give_back(&mut self, queue: &mut Virtqueue) {
        for _ in self.all.drain(..) {
            queue.unpop();
        }
        self.bytes = 0;
    }
}
