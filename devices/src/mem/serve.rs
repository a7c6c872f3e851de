//! What serves the queue, and the guest memory behind the blocks.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use memory::{BLOCK_SIZE, GuestRam, PAGE_SIZE, PageBitmap};

use super::Shared;
use super::request::{ANSWER_LEN, Answer, Host, REQUEST_LEN, Request};
use crate::virtio::{Chain, QueueError, QueueHandler, Virtqueue};

/// Blocks as a region of guest memory.
pub(super) struct Place {
    pub(super) ram: Arc<GuestRam>,
    /// Its index.
    pub(super) region: usize,
    /// Empty between two requests.
    found: Mutex<PageBitmap>,
}

impl Place {
    pub(super) fn new(ram: Arc<GuestRam>, region: usize) -> Self {
        let pages = ram.regions().get(region).map_or(0, |region| region.pages());
        Self {
            ram,
            region,
            found: Mutex::new(PageBitmap::new(pages)),
        }
    }

    fn pages(blocks: &Range<u64>) -> Range<u64> {
        let pages = BLOCK_SIZE / PAGE_SIZE;
        blocks.start * pages..blocks.end * pages
    }

    /// Makes them read as zeros, and touches only pages that hold anything.
    fn clear(&self, pages: Range<u64>) -> Result<(), memory::Error> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        self.ram
            .populated_in(self.region, pages.clone(), &mut found)?;
        let cleared = found
            .runs_in(pages.clone())
            .try_for_each(|(first, count)| self.ram.discard(self.region, first, count));
        found.clear_range(pages);
        cleared
    }

    /// Says that blocks are there, or are not.
    pub(super) fn set_present(&self, blocks: Range<u64>, present: bool) {
        self.ram
            .set_present(self.region, Self::pages(&blocks), present);
    }
}

impl Host for Place {
    fn plug(&self, blocks: Range<u64>) -> io::Result<()> {
        self.set_present(blocks.clone(), true);
        // Somebody may have written there though it was not plugged: the guest against the rules, or a device that it told to.
        let cleared = self.clear(Self::pages(&blocks)).map_err(io::Error::other);
        if cleared.is_err() {
            self.set_present(blocks, false);
        }
        cleared
    }

    fn unplug(&self, blocks: Range<u64>) -> io::Result<()> {
        let pages = Self::pages(&blocks);
        self.ram
            .discard(self.region, pages.start, pages.end - pages.start)
            .map_err(io::Error::other)?;
        self.set_present(blocks, false);
        Ok(())
    }
}

/// Serves the queue.
pub(super) struct Handler(pub(super) Arc<Shared>);

impl Handler {
    fn serve(&self, queue: &Virtqueue, chain: &Chain) -> Result<u32, QueueError> {
        let mut bytes = [0; REQUEST_LEN];
        if chain.readable.read(queue.memory(), 0, &mut bytes)? < REQUEST_LEN
            || chain.writable.len() < ANSWER_LEN as u64
        {
            return Err(QueueError::Request(
                "too short for a request to the memory device, or no room for its answer",
            ));
        }
        let answer = self.0.serve(Request::parse(&bytes));
        let written = chain
            .writable
            .write(queue.memory(), 0, &answer.to_bytes())?;
        Ok(written as u32)
    }
}

impl Shared {
    pub(super) fn serve(&self, request: Request) -> Answer {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let most = self.requested.load(Ordering::SeqCst) / BLOCK_SIZE;
        let mut region = self.region();
        let answer = region.serve(request, most, *held, &self.place);
        let plugged = region.blocks.plugged() * BLOCK_SIZE;
        self.plugged.store(plugged, Ordering::SeqCst);
        drop(region);
        let count = match answer {
            Answer::Ack | Answer::State(_) => &self.counters.served,
            Answer::Nack | Answer::Error => &self.counters.refused,
            Answer::Busy => {
                self.owes_word.store(true, Ordering::SeqCst);
                &self.counters.busy
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        answer
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        // A driver that never stops must not keep the worker from stopping.
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop()? {
                let written = self.serve(queue, &chain)?;
                queue.complete(chain.head, written)?;
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
}
