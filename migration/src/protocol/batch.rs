//! Data channels: batches of runs of pages.
//!
//! ```text
//!   Attach │ BatchHeader │ RunDescriptor × runs │ contents of the raw runs │ BatchHeader │ …
//! ```

use memory::{PAGE_SIZE, RamRange};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ProtocolError;

/// First bytes of a data channel.
pub const ATTACH_MAGIC: [u8; 8] = *b"VMMDATA\n";
/// First bytes of every batch.
pub const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"PAGE");
/// Most runs in one batch: with header and table they fit one `writev`.
pub const MAX_RUNS: u32 = 1000;
/// Most contents in one batch, in bytes.
pub const MAX_PAYLOAD: u64 = 64 << 20;

/// Says which move a data channel belongs to.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Attach {
    /// [`ATTACH_MAGIC`].
    pub magic: [u8; 8],
    /// From [`super::message::Accept`].
    pub session: [u8; 16],
    /// Number of the channel, from 0.
    pub index: U16,
    /// Data channels of the move; not zero, and the same in all.
    pub count: U16,
    /// Zero.
    pub reserved: [u8; 4],
}

impl Attach {
    /// Size in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// Channel `index` of `count`.
    pub fn new(session: [u8; 16], index: u16, count: u16) -> Self {
        Self {
            magic: ATTACH_MAGIC,
            session,
            index: index.into(),
            count: count.into(),
            reserved: [0; 4],
        }
    }

    /// Checks that it belongs to the move with this session, whose data channels are `most` at most.
    pub fn check(&self, session: [u8; 16], most: u16) -> Result<(), &'static str> {
        if self.magic != ATTACH_MAGIC {
            Err("it is no data channel")
        } else if self.session != session {
            Err("it belongs to another move")
        } else if self.count.get() > most || self.index.get() >= self.count.get() {
            Err("it is one too many")
        } else {
            Ok(())
        }
    }
}

/// What precedes every batch.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BatchHeader {
    /// [`BATCH_MAGIC`].
    pub magic: U32,
    /// [`KIND_PAGES`] or [`KIND_ROUND_END`].
    pub kind: U16,
    /// Zero.
    pub reserved: U16,
    /// Number of the round, from 1.
    pub round: U32,
    /// Number of run descriptors that follow.
    pub runs: U32,
    /// Bytes of contents that follow them.
    pub payload_bytes: U64,
}

/// [`BatchHeader::kind`]: runs of pages follow.
pub const KIND_PAGES: u16 = 1;
/// [`BatchHeader::kind`]: nothing follows; everything of the round has been sent on this channel.
pub const KIND_ROUND_END: u16 = 2;

/// A run of pages.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RunDescriptor {
    /// First guest-physical address, page aligned.
    pub gpa: U64,
    /// Number of pages, not zero.
    pub pages: U32,
    /// [`ENCODING_RAW`] or [`ENCODING_ZERO`].
    pub encoding: U16,
    /// Zero.
    pub reserved: U16,
}

/// [`RunDescriptor::encoding`]: the contents follow as they are.
pub const ENCODING_RAW: u16 = 0;
/// [`RunDescriptor::encoding`]: the pages are zero; nothing follows.
pub const ENCODING_ZERO: u16 = 1;

impl BatchHeader {
    /// Size in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// The header of a batch of pages.
    pub fn pages(round: u32, runs: u32, payload_bytes: u64) -> Self {
        Self {
            magic: BATCH_MAGIC.into(),
            kind: KIND_PAGES.into(),
            reserved: 0.into(),
            round: round.into(),
            runs: runs.into(),
            payload_bytes: payload_bytes.into(),
        }
    }

    /// The mark at the end of a round.
    pub fn round_end(round: u32) -> Self {
        Self {
            kind: KIND_ROUND_END.into(),
            ..Self::pages(round, 0, 0)
        }
    }

    /// Checks everything that can be checked without the table, for a batch that should belong to `round`.
    pub fn check(&self, round: u32) -> Result<Announced, ProtocolError> {
        let wrong = |field, found: u64, reason| {
            Err(ProtocolError::Batch {
                field,
                found,
                reason,
            })
        };
        if self.magic.get() != BATCH_MAGIC {
            return wrong(
                "magic",
                self.magic.get().into(),
                "it is not the start of a batch",
            );
        }
        if self.round.get() != round {
            return Err(ProtocolError::Mismatch {
                field: "round",
                found: self.round.get().into(),
                expected: round.into(),
            });
        }
        let (runs, payload) = (self.runs.get(), self.payload_bytes.get());
        match self.kind.get() {
            KIND_ROUND_END if runs == 0 && payload == 0 => Ok(Announced::RoundEnd),
            KIND_ROUND_END => wrong("runs", runs.into(), "the end of a round carries nothing"),
            KIND_PAGES if runs == 0 => wrong("runs", 0, "it is empty"),
            KIND_PAGES if runs > MAX_RUNS => Err(ProtocolError::TooLong {
                what: "a table of runs",
                found: runs.into(),
                limit: MAX_RUNS.into(),
            }),
            KIND_PAGES if payload > MAX_PAYLOAD => Err(ProtocolError::TooLong {
                what: "a batch of pages",
                found: payload,
                limit: MAX_PAYLOAD,
            }),
            KIND_PAGES => Ok(Announced::Pages { runs }),
            kind => wrong("kind", kind.into(), "it is unknown"),
        }
    }
}

/// What a batch header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// A table of this many runs.
    Pages {
        /// Number of runs, 1 to [`MAX_RUNS`].
        runs: u32,
    },
    /// The end of the round.
    RoundEnd,
}

impl RunDescriptor {
    /// Size in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// A run of pages.
    pub fn new(gpa: u64, pages: u32, encoding: u16) -> Self {
        Self {
            gpa: gpa.into(),
            pages: pages.into(),
            encoding: encoding.into(),
            reserved: 0.into(),
        }
    }
}

/// A run that has been checked: it lies in one RAM region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedRun {
    /// Index of the region.
    pub region: usize,
    /// First page in it.
    pub first_page: u64,
    /// Number of pages, not zero.
    pub pages: u64,
    /// The pages are zero; nothing follows for them.
    pub zero: bool,
}

/// Checks a whole table against the guest's RAM and the header, before anything is written. Addresses rise.
pub fn place(
    ranges: &[RamRange],
    header: &BatchHeader,
    table: &[RunDescriptor],
    into: &mut Vec<PlacedRun>,
) -> Result<(), ProtocolError> {
    into.clear();
    let (mut payload, mut end) = (0u64, 0);
    for run in table {
        let placed = place_run(ranges, run)?;
        // Overlapping runs would make a small table a lot of work.
        if run.gpa.get() < end {
            return Err(ProtocolError::Batch {
                field: "address",
                found: run.gpa.get(),
                reason: "it is not behind the run before it",
            });
        }
        end = run.gpa.get() + placed.pages * PAGE_SIZE;
        if !placed.zero {
            payload += placed.pages * PAGE_SIZE;
        }
        into.push(placed);
    }
    if payload != header.payload_bytes.get() {
        return Err(ProtocolError::Mismatch {
            field: "payload length",
            found: header.payload_bytes.get(),
            expected: payload,
        });
    }
    Ok(())
}

fn place_run(ranges: &[RamRange], run: &RunDescriptor) -> Result<PlacedRun, ProtocolError> {
    let (gpa, pages) = (run.gpa.get(), run.pages.get());
    let wrong = |field, found, reason| {
        Err(ProtocolError::Batch {
            field,
            found,
            reason,
        })
    };
    if !gpa.is_multiple_of(PAGE_SIZE) {
        return wrong("address", gpa, "it is not page aligned");
    }
    if pages == 0 {
        return wrong("run length", 0, "it is empty");
    }
    let zero = match run.encoding.get() {
        ENCODING_RAW => false,
        ENCODING_ZERO => true,
        other => return wrong("encoding", other.into(), "it is unknown"),
    };
    let bytes = u64::from(pages) * PAGE_SIZE;
    let found = ranges.iter().enumerate().find_map(|(region, range)| {
        let offset = gpa.checked_sub(range.gpa)?;
        (offset.checked_add(bytes)? <= range.len).then_some((region, offset / PAGE_SIZE))
    });
    match found {
        Some((region, first_page)) => Ok(PlacedRun {
            region,
            first_page,
            pages: pages.into(),
            zero,
        }),
        None => Err(ProtocolError::OutsideRam { gpa, pages }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RANGES: [RamRange; 2] = [
        RamRange {
            gpa: 0,
            len: 64 * PAGE_SIZE,
        },
        RamRange {
            gpa: 1 << 32,
            len: 16 * PAGE_SIZE,
        },
    ];

    fn placed(table: &[RunDescriptor], payload: u64) -> Result<Vec<PlacedRun>, ProtocolError> {
        let mut into = Vec::new();
        let header = BatchHeader::pages(1, table.len() as u32, payload);
        place(&RANGES, &header, table, &mut into).map(|()| into)
    }

    #[test]
    fn good_runs_are_placed() {
        let table = [
            RunDescriptor::new(63 * PAGE_SIZE, 1, ENCODING_RAW),
            RunDescriptor::new(1 << 32, 16, ENCODING_ZERO),
        ];
        let runs = placed(&table, PAGE_SIZE).expect("valid");
        assert_eq!(
            runs[0],
            PlacedRun {
                region: 0,
                first_page: 63,
                pages: 1,
                zero: false
            }
        );
        assert_eq!(
            runs[1],
            PlacedRun {
                region: 1,
                first_page: 0,
                pages: 16,
                zero: true
            }
        );
    }

    #[test]
    fn bad_runs_are_refused_with_the_value() {
        for (gpa, pages, encoding, payload, part) in [
            (64 * PAGE_SIZE, 1, ENCODING_RAW, PAGE_SIZE, "0x40000"),
            (63 * PAGE_SIZE, 2, ENCODING_RAW, 2 * PAGE_SIZE, "0x3f000"),
            (
                (1 << 32) + 15 * PAGE_SIZE,
                2,
                ENCODING_ZERO,
                0,
                "0x10000f000",
            ),
            (
                u64::MAX - PAGE_SIZE + 1,
                1,
                ENCODING_RAW,
                PAGE_SIZE,
                "0xfffffffffffff000",
            ),
            (0, u32::MAX, ENCODING_ZERO, 0, "4294967295"),
            (123, 1, ENCODING_RAW, PAGE_SIZE, "0x7b"),
            (0, 0, ENCODING_RAW, 0, "empty"),
            (0, 1, 77, 0, "0x4d"),
            (0, 1, ENCODING_RAW, 0, "payload length"),
            (0, 1, ENCODING_ZERO, PAGE_SIZE, "payload length"),
        ] {
            let error =
                placed(&[RunDescriptor::new(gpa, pages, encoding)], payload).expect_err(part);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn headers_are_checked() {
        assert_eq!(BatchHeader::round_end(3).check(3), Ok(Announced::RoundEnd));
        assert_eq!(
            BatchHeader::pages(3, 5, 0).check(3),
            Ok(Announced::Pages { runs: 5 })
        );
        assert!(BatchHeader::pages(2, 5, 0).check(3).is_err());
        assert!(BatchHeader::pages(3, 0, 0).check(3).is_err());
        assert!(BatchHeader::pages(3, MAX_RUNS + 1, 0).check(3).is_err());
        assert!(BatchHeader::pages(3, 1, MAX_PAYLOAD + 1).check(3).is_err());
        assert!(
            BatchHeader {
                runs: 1.into(),
                ..BatchHeader::round_end(3)
            }
            .check(3)
            .is_err()
        );
        assert!(
            BatchHeader {
                kind: 9.into(),
                ..BatchHeader::round_end(3)
            }
            .check(3)
            .is_err()
        );
        assert!(
            BatchHeader {
                magic: 9.into(),
                ..BatchHeader::round_end(3)
            }
            .check(3)
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn nothing_outside_of_ram_is_ever_placed(bytes in proptest::collection::vec(any::<u8>(), RunDescriptor::SIZE), near in any::<bool>(), payload in any::<u64>()) {
            let mut run = RunDescriptor::read_from_bytes(&bytes).expect("its size");
            if near {
                run.gpa = (run.gpa.get() % (1 << 33) / PAGE_SIZE * PAGE_SIZE).into();
                run.encoding = (run.encoding.get() % 3).into();
                run.pages = (run.pages.get() % 80).into();
            }
            let payload = if near { u64::from(run.pages.get()) * PAGE_SIZE } else { payload };
            if let Ok(runs) = placed(&[run], payload) {
                for run in runs {
                    prop_assert!((run.first_page + run.pages) * PAGE_SIZE <= RANGES[run.region].len);
                }
            }
        }
    }
}
