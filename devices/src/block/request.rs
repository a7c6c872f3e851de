//! What a chain asks for, and whether it may (section 5.2.6).

use memory::GuestMemoryMmap;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::config_space::MAX_RANGE_SECTORS;
use super::disk::SECTOR;
use super::engine::Operation;
use crate::virtio::{Chain, QueueError};

/// VIRTIO_BLK_S_OK, IOERR and UNSUPP.
pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

/// VIRTIO_BLK_T_*.
pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

/// Bytes of a serial number.
pub(super) const SERIAL_LEN: usize = 20;

/// Bit 0 of a range's flags: the space may be given back.
const UNMAP: u32 = 1;

type Le32 = zerocopy::little_endian::U32;
type Le64 = zerocopy::little_endian::U64;

/// The start of `struct virtio_blk_req`.
#[derive(Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Range {
    sector: Le64,
    num_sectors: Le32,
    flags: Le32,
}

/// The disk, as far as it decides on requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// In sectors.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
    pub(super) discard: bool,
    /// Buffers of a request: what is kept for one stays bounded.
    pub(super) parts: usize,
}

/// What kind of operation it is, for counters and the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// What to do with a chain.
#[derive(Debug)]
pub(super) enum Request {
    /// Ask the engine.
    Do {
        kind: Kind,
        operation: Operation,
        /// Where it begins.
        sector: u64,
        /// Data that it moves.
        bytes: u64,
    },
    /// Answer with the first bytes of the serial number.
    Identify { len: usize },
    /// Answer at once.
    Answer { status: u8 },
}

const REFUSED: Request = Request::Answer { status: IOERR };
const UNKNOWN: Request = Request::Answer { status: UNSUPP };
const NOTHING: Request = Request::Answer { status: OK };

impl Request {
    /// Reads a chain. An error is one that cannot be answered, for want of a header or of room for a status.
    pub(super) fn parse(
        chain: &Chain,
        memory: &GuestMemoryMmap,
        limits: Limits,
    ) -> Result<Self, QueueError> {
        let mut header = Header::default();
        if chain.readable.read(memory, 0, header.as_mut_bytes())? < size_of::<Header>() {
            return Err(QueueError::Request("a disk request without a whole header"));
        }
        let Some(room) = chain.writable.len().checked_sub(1) else {
            return Err(QueueError::Request(
                "a disk request without room for a status",
            ));
        };
        if chain.readable.parts().len() + chain.writable.parts().len() > limits.parts {
            return Ok(REFUSED);
        }
        let start = size_of::<Header>() as u64;
        let data = chain.readable.len() - start;
        let sector = header.sector.get();
        Ok(match header.kind.get() {
            IN => match transfer(sector, room, limits) {
                Some(offset) if room > 0 => Self::Do {
                    kind: Kind::Read,
                    operation: Operation::Read {
                        offset,
                        into: chain.writable.slice(0, room),
                    },
                    sector,
                    bytes: room,
                },
                Some(_) => NOTHING,
                None => REFUSED,
            },
            OUT if limits.read_only => REFUSED,
            OUT => match transfer(sector, data, limits) {
                Some(offset) if data > 0 => Self::Do {
                    kind: Kind::Write,
                    operation: Operation::Write {
                        offset,
                        from: chain.readable.slice(start, data),
                    },
                    sector,
                    bytes: data,
                },
                Some(_) => NOTHING,
                None => REFUSED,
            },
            FLUSH => Self::Do {
                kind: Kind::Flush,
                operation: Operation::Flush,
                sector: 0,
                bytes: 0,
            },
            GET_ID => Self::Identify {
                len: room.min(SERIAL_LEN as u64) as usize,
            },
            DISCARD if !limits.discard && !limits.read_only => UNKNOWN,
            kind @ (DISCARD | WRITE_ZEROES) => {
                let mut range = Range::default();
                let len = chain.readable.read(memory, start, range.as_mut_bytes())?;
                // One range a request, as max_discard_seg and max_write_zeroes_seg say.
                if limits.read_only || len < size_of::<Range>() || data != len as u64 {
                    REFUSED
                } else {
                    of_range(kind, &range, limits)
                }
            }
            _ => UNKNOWN,
        })
    }
}

/// Where a transfer begins in bytes, if it is within the disk and of whole sectors.
fn transfer(sector: u64, bytes: u64, limits: Limits) -> Option<u64> {
    // The used ring counts in 32 bits, the status included.
    let sane = bytes.is_multiple_of(SECTOR) && bytes < u64::from(u32::MAX);
    let end = sector.checked_add(bytes / SECTOR)?;
    (sane && end <= limits.capacity).then(|| sector * SECTOR)
}

fn of_range(kind: u32, range: &Range, limits: Limits) -> Request {
    let (sector, flags) = (range.sector.get(), range.flags.get());
    let sectors = range.num_sectors.get();
    if flags & !UNMAP != 0 || (kind == DISCARD && flags != 0) {
        return UNKNOWN;
    }
    let bytes = u64::from(sectors) * SECTOR;
    if sectors > MAX_RANGE_SECTORS {
        return REFUSED;
    }
    let Some(offset) = transfer(sector, bytes, limits) else {
        return REFUSED;
    };
    if sectors == 0 {
        return NOTHING;
    }
    let (kind, operation) = if kind == DISCARD {
        (Kind::Discard, Operation::Discard { offset, len: bytes })
    } else {
        let operation = Operation::WriteZeroes {
            offset,
            len: bytes,
            unmap: flags & UNMAP != 0 && limits.discard,
        };
        (Kind::WriteZeroes, operation)
    };
    Request::Do {
        kind,
        operation,
        sector,
        bytes: 0,
    }
}
