//! One round: what to look at is re-armed, looked at, and sent, by one sender a data channel.
//!
//! ```text
//!   chunks of memory ─► Round::take ─┬─► sender 0 ══ data channel 0
//!   (each goes to whoever is free)   └─► sender 1 ══ data channel 1 …
//!
//!   first round   every page:    re-arm ─► populated? ─► zero? ──no──► raw run
//!                                            └ no ─────────┴─yes──► nothing: it is zero at the destination too
//!   later rounds  dirty pages:   re-arm ─► zero? ──────────────no──► raw run
//!                                            └──────────────yes──► zero run
//!   last round    the same without re-arming: the guest stands still
//! ```
//!
//! A page is re-armed before it is read, so that a write after the read shows in the next round. Memory goes in chunks:
//! the shorter the time between the two, the fewer pages are written in it and sent twice. Within a round each page goes
//! over one channel, and the next round begins when all of this one has arrived, so the newest contents always come last.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memory::{GuestPages, GuestRam, PAGE_SIZE, PageBitmap, Piece};
use zerocopy::IntoBytes;

use super::link::Trouble;
use crate::channel::{Channel, Patience};
use crate::protocol::batch::{BatchHeader, ENCODING_RAW, ENCODING_ZERO, MAX_RUNS, RunDescriptor};
use crate::{Cause, SourceMachine};

/// Pages that are re-armed at once: 16 MiB. A multiple of 64.
const CHUNK_PAGES: u64 = 4096;
/// Contents of one batch in bytes: some of the socket buffers, so that both sides are at work.
const BATCH_BYTES: u64 = 4 << 20;
/// So few dirty pages are sent over one channel by the calling thread: starting others takes longer.
const FEW_PAGES: u64 = 2048;
/// A sender that only sees zeros says something at least this often, so that the destination knows that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

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
    /// Time spent in sending, on average over the senders.
    pub(super) sending: Duration,
}

/// Which pages a round looks at.
#[derive(Clone, Copy)]
pub(super) enum Pages<'a> {
    /// All that hold anything.
    All,
    /// These, by region.
    Dirty(&'a [PageBitmap]),
}

/// Told of the totals after every batch and chunk; an error ends the round.
pub(super) type OnProgress<'a> = &'a (dyn Fn(&Totals) -> Result<(), Trouble> + Sync);

/// A round under way: what its senders share.
pub(super) struct Round<'a, 'm> {
    number: u32,
    ram: &'a GuestRam,
    pages: Pages<'a>,
    /// Re-arms the pages; `None` when the guest stands still.
    machine: Option<Mutex<&'a mut (dyn SourceMachine + 'm)>>,
    /// Region and first page of the next chunk.
    next: Mutex<(usize, u64)>,
    totals: Mutex<Totals>,
    progress: OnProgress<'a>,
    /// A sender has failed.
    stop: AtomicBool,
}

impl<'a, 'm> Round<'a, 'm> {
    pub(super) fn new(
        number: u32,
        ram: &'a GuestRam,
        pages: Pages<'a>,
        machine: Option<&'a mut (dyn SourceMachine + 'm)>,
        progress: OnProgress<'a>,
    ) -> Self {
        Self {
            number,
            ram,
            pages,
            machine: machine.map(Mutex::new),
            next: Mutex::new((0, 0)),
            totals: Mutex::default(),
            progress,
            stop: AtomicBool::new(false),
        }
    }

    /// Sends the round and the mark of its end over all `channels`.
    pub(super) fn send(
        self,
        channels: &[Channel],
        patience: Patience<'_>,
    ) -> Result<Totals, Trouble> {
        let senders = match self.pages {
            Pages::Dirty(dirty)
                if dirty.iter().map(PageBitmap::count).sum::<u64>() <= FEW_PAGES =>
            {
                1
            }
            _ => channels.len(),
        };
        let (busy, idle) = channels.split_at(senders.min(channels.len()));
        let one = |channel| {
            let result = Sender::new(&self, channel, patience).run();
            if result.is_err() && !self.stop.swap(true, Ordering::Relaxed) {
                // The others may be waiting for a socket that nobody reads any more.
                channels.iter().for_each(Channel::shut);
                return result;
            }
            result
        };
        std::thread::scope(|scope| {
            let mut others = Vec::new();
            for channel in busy.iter().skip(1) {
                let one = &one;
                let builder = std::thread::Builder::new().name("move-send".into());
                // Without its thread a channel only says that the round is over.
                match builder.spawn_scoped(scope, move || one(channel)) {
                    Ok(thread) => others.push(thread),
                    Err(error) => {
                        tracing::warn!(%error, "a data channel stays idle");
                        end_round(self.number, channel, &patience)?;
                    }
                }
            }
            let mut result = match busy.first() {
                Some(channel) => one(channel),
                None => Ok(()),
            };
            for thread in others {
                let ended = thread.join().unwrap_or_else(|_| Err(panicked()));
                result = match (result, ended) {
                    // The first failure is the reason, the others follow from it.
                    (
                        Err(Trouble {
                            cause: Cause::ConnectionLost { .. },
                            ..
                        }),
                        Err(other),
                    ) => Err(other),
                    (Err(first), _) => Err(first),
                    (Ok(()), ended) => ended,
                };
            }
            result?;
            idle.iter()
                .try_for_each(|channel| end_round(self.number, channel, &patience))
        })?;
        let mut totals = *self.totals();
        totals.bytes += (channels.len() * size_of::<BatchHeader>()) as u64;
        totals.sending /= u32::try_from(busy.len()).unwrap_or(u32::MAX).max(1);
        Ok(totals)
    }

    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chunk: region, first page, end.
    fn take(&self) -> Option<(usize, u64, u64)> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (region, first) = *next;
            let pages = self.ram.regions().get(region)?.pages();
            if first >= pages {
                *next = (region + 1, 0);
                continue;
            }
            let end = pages.min(first + CHUNK_PAGES);
            *next = (region, end);
            if !words(self.pages, region, first, end)
                .is_some_and(|words| words.iter().all(|word| *word == 0))
            {
                return Some((region, first, end));
            }
        }
    }

    fn rearm(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), Trouble> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.rearm(region, first_page, words).map_err(|error| {
            Trouble::local(Cause::Machine {
                doing: "re-arming the dirty log",
                error,
            })
        })
    }
}

/// The words of a chunk's dirty pages; `None` if all pages are looked at.
fn words(pages: Pages<'_>, region: usize, first: u64, end: u64) -> Option<&[u64]> {
    match pages {
        Pages::All => None,
        Pages::Dirty(dirty) => dirty
            .get(region)?
            .words()
            .get((first / 64) as usize..end.div_ceil(64) as usize),
    }
}

fn panicked() -> Trouble {
    Trouble::local(Cause::Host {
        doing: "sending memory",
        error: std::io::Error::other("a thread panicked: a bug in vmm"),
    })
}

fn end_round(number: u32, channel: &Channel, patience: &Patience<'_>) -> Result<(), Trouble> {
    channel
        .write_all(BatchHeader::round_end(number).as_bytes(), patience)
        .map_err(|error| Trouble::from_stop(error.stop, patience.doing))
}

/// What sends over one channel.
struct Sender<'s, 'a, 'm> {
    round: &'s Round<'a, 'm>,
    channel: &'s Channel,
    patience: Patience<'s>,
    table: Vec<RunDescriptor>,
    contents: Vec<GuestPages<'a>>,
    payload: u64,
    /// Not yet added to the round's.
    totals: Totals,
    /// By region, empty between two chunks; made when needed.
    populated: Vec<Option<PageBitmap>>,
    last_sent: Instant,
    /// Guest-physical address of a zero page of this chunk.
    zero_page: Option<u64>,
}

impl<'s, 'a, 'm> Sender<'s, 'a, 'm> {
    fn new(round: &'s Round<'a, 'm>, channel: &'s Channel, patience: Patience<'s>) -> Self {
        Self {
            round,
            channel,
            patience,
            table: Vec::with_capacity(MAX_RUNS as usize),
            contents: Vec::with_capacity(MAX_RUNS as usize),
            payload: 0,
            totals: Totals::default(),
            populated: round.ram.regions().iter().map(|_| None).collect(),
            last_sent: Instant::now(),
            zero_page: None,
        }
    }

    fn run(mut self) -> Result<(), Trouble> {
        while let Some((region, first, end)) = self.round.take() {
            match words(self.round.pages, region, first, end) {
                None => self.send_all(region, first, end)?,
                Some(words) => self.send_dirty(region, first, end, words)?,
            }
            self.sign_of_life()?;
            self.report()?;
        }
        self.flush()?;
        self.report()?;
        end_round(self.round.number, self.channel, &self.patience)
    }

    /// Sends what a chunk holds.
    fn send_all(&mut self, region: usize, first: u64, end: u64) -> Result<(), Trouble> {
        let ram = self.round.ram;
        self.round
            .rearm(region, first, PageBitmap::full(end - first).words())?;
        let pages = ram.regions()[region].pages();
        let mut populated = self.populated[region]
            .take()
            .unwrap_or_else(|| PageBitmap::new(pages));
        ram.populated_in(region, first..end, &mut populated)
            .map_err(Trouble::local)?;
        self.totals.pages += end - first;
        self.totals.zero_pages += end - first;
        for (run, pages) in populated.runs_in(first..end) {
            self.totals.zero_pages -= pages;
            self.add_run(region, run, pages)?;
        }
        populated.clear_range(first..end);
        self.populated[region] = Some(populated);
        Ok(())
    }

    /// Sends the dirty pages of a chunk.
    fn send_dirty(
        &mut self,
        region: usize,
        first: u64,
        end: u64,
        words: &[u64],
    ) -> Result<(), Trouble> {
        let Pages::Dirty(dirty) = self.round.pages else {
            return Ok(());
        };
        self.round.rearm(region, first, words)?;
        for (run, pages) in dirty[region].runs_in(first..end) {
            self.totals.pages += pages;
            self.add_run(region, run, pages)?;
        }
        Ok(())
    }

    /// Adds a run of pages, split into zero and other pages.
    fn add_run(&mut self, region: usize, first: u64, pages: u64) -> Result<(), Trouble> {
        // In the first round the destination holds nothing but zeros.
        let tell_zeros = matches!(self.round.pages, Pages::Dirty(_));
        let view = self
            .round
            .ram
            .pages(region, first, pages)
            .map_err(Trouble::local)?;
        let gpa = self.round.ram.regions()[region].gpa() + first * PAGE_SIZE;
        for run in view.zero_runs() {
            let (mut at, end) = (run.first, run.first + run.pages);
            if run.zero {
                self.totals.zero_pages += run.pages;
                self.zero_page = Some(gpa + at * PAGE_SIZE);
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
                    self.report()?;
                }
            }
        }
        Ok(())
    }

    fn sign_of_life(&mut self) -> Result<(), Trouble> {
        let zero_page = self.zero_page.take();
        if self.last_sent.elapsed() < SIGN_OF_LIFE {
            return Ok(());
        }
        if let (true, Some(gpa)) = (self.table.is_empty(), zero_page) {
            self.table.push(RunDescriptor::new(gpa, 1, ENCODING_ZERO));
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Trouble> {
        if self.table.is_empty() {
            return Ok(());
        }
        let header = BatchHeader::pages(self.round.number, self.table.len() as u32, self.payload);
        let mut pieces = Vec::with_capacity(2 + self.contents.len());
        pieces.push(Piece::Bytes(header.as_bytes()));
        pieces.push(Piece::Bytes(self.table.as_bytes()));
        pieces.extend(self.contents.drain(..).map(Piece::Guest));
        let began = Instant::now();
        self.channel
            .send_pieces(&pieces, &self.patience)
            .map_err(|stop| Trouble::from_stop(stop, self.patience.doing))?;
        self.last_sent = Instant::now();
        self.totals.sending += self.last_sent - began;
        let table = (size_of_val(&header) + size_of_val(self.table.as_slice())) as u64;
        self.totals.bytes += table + self.payload;
        self.totals.payload += std::mem::take(&mut self.payload);
        self.table.clear();
        Ok(())
    }

    /// Adds what this sender has done to the round's totals, and shows them.
    fn report(&mut self) -> Result<(), Trouble> {
        let done = std::mem::take(&mut self.totals);
        let mut totals = self.round.totals();
        totals.pages += done.pages;
        totals.bytes += done.bytes;
        totals.payload += done.payload;
        totals.zero_pages += done.zero_pages;
        totals.sending += done.sending;
        let shown = *totals;
        drop(totals);
        (self.round.progress)(&shown)
    }
}
