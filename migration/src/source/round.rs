//! One round: what to look at is re-armed, looked at, and sent.
//!
//! ```text
//!   first round   every page:    re-arm ─► populated? ─► zero? ──no──► raw run
//!                                            └ no ─────────┴─yes──► nothing: it is zero at the destination too
//!   later rounds  dirty pages:   re-arm ─► zero? ──────────────no──► raw run
//!                                            └──────────────yes──► zero run
//!   last round    the same without re-arming: the guest stands still
//! ```
//!
//! A page is re-armed before it is read, so that a write after the read shows in the next round. Memory goes in chunks:
//! the shorter the time between the two, the fewer pages are written in it and sent twice.

use std::time::{Duration, Instant};

use memory::{GuestPages, GuestRam, PAGE_SIZE, PageBitmap, Piece};
use zerocopy::IntoBytes;

use super::link::Trouble;
use crate::channel::{Channel, Patience};
use crate::protocol::batch::{BatchHeader, ENCODING_RAW, ENCODING_ZERO, MAX_RUNS, RunDescriptor};
use crate::{Cause, SourceMachine};

/// Pages that are re-armed at once: 32 MiB. A multiple of 64.
const CHUNK_PAGES: u64 = 8192;
/// Contents of one batch in bytes: some of the socket buffers, so that both sides are at work.
const BATCH_BYTES: u64 = 4 << 20;

/// What one round sends, and how much of it so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    /// Pages looked at.
    pub(super) pages: u64,
    /// Bytes sent, with headers.
    pub(super) bytes: u64,
    /// Of these, contents of pages.
    pub(super) payload: u64,
    /// Pages found to be zero.
    pub(super) zero_pages: u64,
    /// Time spent in sending.
    pub(super) sending: Duration,
}

/// A round under way.
pub(super) struct Round<'a> {
    number: u32,
    ram: &'a GuestRam,
    channel: &'a Channel,
    patience: Patience<'a>,
    /// Called after each batch; an error ends the round.
    progress: &'a mut dyn FnMut(&Totals) -> Result<(), Trouble>,
    table: Vec<RunDescriptor>,
    contents: Vec<GuestPages<'a>>,
    payload: u64,
    totals: Totals,
}

impl<'a> Round<'a> {
    pub(super) fn new(
        number: u32,
        ram: &'a GuestRam,
        channel: &'a Channel,
        patience: Patience<'a>,
        progress: &'a mut dyn FnMut(&Totals) -> Result<(), Trouble>,
    ) -> Self {
        Self {
            number,
            ram,
            channel,
            patience,
            progress,
            table: Vec::with_capacity(MAX_RUNS as usize),
            contents: Vec::with_capacity(MAX_RUNS as usize),
            payload: 0,
            totals: Totals::default(),
        }
    }

    /// Sends all memory that holds anything.
    pub(super) fn send_all(mut self, machine: &mut dyn SourceMachine) -> Result<Totals, Trouble> {
        for region in 0..self.ram.regions().len() {
            let pages = self.ram.regions()[region].pages();
            let mut populated = PageBitmap::new(pages);
            let all = PageBitmap::full(pages.min(CHUNK_PAGES));
            for first in (0..pages).step_by(CHUNK_PAGES as usize) {
                let end = pages.min(first + CHUNK_PAGES);
                match end - first {
                    CHUNK_PAGES => rearm(machine, region, first, all.words())?,
                    rest => rearm(machine, region, first, PageBitmap::full(rest).words())?,
                }
                self.ram
                    .populated_in(region, first..end, &mut populated)
                    .map_err(Trouble::local)?;
                self.totals.pages += end - first;
                self.totals.zero_pages += end - first;
                for (run, pages) in populated.runs_in(first..end) {
                    self.totals.zero_pages -= pages;
                    self.add_run(region, run, pages, false)?;
                }
            }
        }
        self.finish()
    }

    /// Sends the pages of `dirty`. With a machine, its guest runs and they are re-armed first.
    pub(super) fn send_dirty(
        mut self,
        dirty: &[PageBitmap],
        mut machine: Option<&mut dyn SourceMachine>,
    ) -> Result<Totals, Trouble> {
        for (region, dirty) in dirty.iter().enumerate() {
            for first in (0..dirty.pages()).step_by(CHUNK_PAGES as usize) {
                let end = dirty.pages().min(first + CHUNK_PAGES);
                let words = &dirty.words()[(first / 64) as usize..end.div_ceil(64) as usize];
                if words.iter().all(|word| *word == 0) {
                    continue;
                }
                if let Some(machine) = &mut machine {
                    rearm(*machine, region, first, words)?;
                }
                for (run, pages) in dirty.runs_in(first..end) {
                    self.totals.pages += pages;
                    self.add_run(region, run, pages, true)?;
                }
            }
        }
        self.finish()
    }

    /// Adds a run of pages, split into zero and other pages; `tell_zeros` if the destination may hold something else.
    fn add_run(
        &mut self,
        region: usize,
        first: u64,
        pages: u64,
        tell_zeros: bool,
    ) -> Result<(), Trouble> {
        let view = self
            .ram
            .pages(region, first, pages)
            .map_err(Trouble::local)?;
        let gpa = self.ram.regions()[region].gpa() + first * PAGE_SIZE;
        for run in view.zero_runs() {
            let (mut at, end) = (run.first, run.first + run.pages);
            if run.zero {
                self.totals.zero_pages += run.pages;
            }
            if run.zero && !tell_zeros {
                continue;
            }
            while at < end {
                let room = match run.zero {
                    true => u64::from(u32::MAX),
                    false => (BATCH_BYTES - self.payload) / PAGE_SIZE,
                };
                let count = room.min(end - at);
                let encoding = if run.zero {
                    ENCODING_ZERO
                } else {
                    ENCODING_RAW
                };
                // `count` is at most `u32::MAX`, or the few pages that a batch holds.
                self.table.push(RunDescriptor::new(
                    gpa + at * PAGE_SIZE,
                    count as u32,
                    encoding,
                ));
                if !run.zero {
                    self.contents.push(view.part(at, count));
                    self.payload += count * PAGE_SIZE;
                }
                at += count;
                if self.payload >= BATCH_BYTES || self.table.len() >= MAX_RUNS as usize {
                    self.flush()?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Trouble> {
        if self.table.is_empty() {
            return Ok(());
        }
        let header = BatchHeader::pages(self.number, self.table.len() as u32, self.payload);
        let mut pieces = Vec::with_capacity(2 + self.contents.len());
        pieces.push(Piece::Bytes(header.as_bytes()));
        pieces.push(Piece::Bytes(self.table.as_bytes()));
        pieces.extend(self.contents.drain(..).map(Piece::Guest));
        let began = Instant::now();
        self.channel
            .send_pieces(&pieces, &self.patience)
            .map_err(|stop| Trouble::from_stop(stop, self.patience.doing))?;
        self.totals.sending += began.elapsed();
        self.totals.bytes +=
            (size_of_val(&header) + size_of_val(self.table.as_slice())) as u64 + self.payload;
        self.totals.payload += std::mem::take(&mut self.payload);
        self.table.clear();
        (self.progress)(&self.totals)
    }

    /// Sends what is left, and the mark that the round is over.
    fn finish(mut self) -> Result<Totals, Trouble> {
        self.flush()?;
        let end = BatchHeader::round_end(self.number);
        self.channel
            .write_all(end.as_bytes(), &self.patience)
            .map_err(|error| Trouble::from_stop(error.stop, self.patience.doing))?;
        self.totals.bytes += size_of_val(&end) as u64;
        Ok(self.totals)
    }
}

fn rearm(
    machine: &mut dyn SourceMachine,
    region: usize,
    first_page: u64,
    words: &[u64],
) -> Result<(), Trouble> {
    machine.rearm(region, first_page, words).map_err(|error| {
        Trouble::local(Cause::Machine {
            doing: "re-arming the dirty log",
            error,
        })
    })
}
