//! Batches of runs of pages, checked and put into guest memory.

use memory::{GuestRam, PAGE_SIZE, PageBitmap, RamRange};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::channel::{Channel, Patience, Stop};
use crate::protocol::batch::{Announced, BatchHeader, PlacedRun, RunDescriptor, place};

/// Puts the pages of one data channel into guest memory.
pub(super) struct PageReceiver<'a> {
    ram: &'a GuestRam,
    ranges: Vec<RamRange>,
    table: Vec<RunDescriptor>,
    runs: Vec<PlacedRun>,
    /// Which pages of a zero run hold anything; empty between runs.
    populated: Vec<PageBitmap>,
}

/// What has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    /// Some pages.
    Pages {
        /// Contents, in bytes.
        bytes: u64,
        /// Pages that are zero.
        zero_pages: u64,
    },
    /// The end of the round.
    RoundEnd,
}

/// Why a batch could not be received.
pub(super) enum Trouble {
    /// The connection, or what came over it.
    Channel(Stop),
    /// Guest memory.
    Memory(memory::Error),
}

impl From<Stop> for Trouble {
    fn from(stop: Stop) -> Self {
        Self::Channel(stop)
    }
}

impl From<memory::Error> for Trouble {
    fn from(error: memory::Error) -> Self {
        Self::Memory(error)
    }
}

impl<'a> PageReceiver<'a> {
    pub(super) fn new(ram: &'a GuestRam) -> Self {
        Self {
            ram,
            ranges: ram.regions().iter().map(|region| region.range()).collect(),
            table: Vec::new(),
            runs: Vec::new(),
            populated: ram
                .regions()
                .iter()
                .map(|region| PageBitmap::new(region.pages()))
                .collect(),
        }
    }

    /// Receives one batch, which should belong to `round`.
    pub(super) fn receive(
        &mut self,
        channel: &Channel,
        round: u32,
        patience: &Patience<'_>,
    ) -> Result<Arrived, Trouble> {
        let mut bytes = [0; BatchHeader::SIZE];
        channel.read_exact(&mut bytes, patience)?;
        let header = BatchHeader::read_from_bytes(&bytes).expect("exactly its size");
        let count = match header.check(round).map_err(Stop::from)? {
            Announced::RoundEnd => return Ok(Arrived::RoundEnd),
            Announced::Pages { runs } => runs as usize,
        };
        self.table.resize_with(count, RunDescriptor::new_zeroed);
        channel.read_exact(self.table.as_mut_bytes(), patience)?;
        place(&self.ranges, &header, &self.table, &mut self.runs).map_err(Stop::from)?;
        let (mut contents, mut zero_pages) = (Vec::with_capacity(count), 0);
        for run in &self.runs {
            if run.zero {
                zero_pages += run.pages;
                make_zero(self.ram, &mut self.populated[run.region], run)?;
            } else {
                contents.push(self.ram.pages(run.region, run.first_page, run.pages)?);
            }
        }
        channel.receive_pages(&contents, patience)?;
        Ok(Arrived::Pages {
            bytes: contents.iter().map(|pages| pages.pages() * PAGE_SIZE).sum(),
            zero_pages,
        })
    }
}

/// Zeroes the pages that hold anything. The others are zero, and must not become resident.
fn make_zero(
    ram: &GuestRam,
    populated: &mut PageBitmap,
    run: &PlacedRun,
) -> Result<(), memory::Error> {
    let all = run.first_page..run.first_page + run.pages;
    ram.populated_in(run.region, all.clone(), populated)?;
    let result = populated
        .runs_in(all.clone())
        .try_for_each(|(first, pages)| ram.zero(run.region, first, pages));
    populated.clear_range(all);
    result
}

/// Makes all of the memory read as zeros.
pub(super) fn clear(ram: &GuestRam) -> Result<(), memory::Error> {
    for (region, description) in ram.regions().iter().enumerate() {
        let mut populated = PageBitmap::new(description.pages());
        let pages = description.pages();
        make_zero(
            ram,
            &mut populated,
            &PlacedRun {
                region,
                first_page: 0,
                pages,
                zero: true,
            },
        )?;
    }
    Ok(())
}
