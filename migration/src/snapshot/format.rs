//! The manifest file: a fixed header, then msgpack with field names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use arch::x86_64::state::Bytes;
use memory::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::SnapshotError;
use crate::{MachineState, Manifest};

/// The version that this build writes, and the only one that it reads.
pub(super) const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"VMMSNAP\n";
/// Longest body in bytes: the state of the largest machine, and the checksums of 16 TiB of memory.
const MAX_BODY: u64 = 128 << 20;
/// Largest chunk of memory with a checksum of its own that is read, in bytes.
const MAX_CHUNK: u32 = 64 << 20;

/// How the manifest file begins.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C of the body.
    body_sum: U32,
    /// Length of the body in bytes.
    length: U64,
    /// Zero.
    reserved: U32,
    /// CRC-32C of the header before this field.
    sum: U32,
}

impl Header {
    const SIZE: usize = size_of::<Self>();

    fn new(body: &[u8]) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION.into(),
            body_sum: crc32c::crc32c(body).into(),
            length: (body.len() as u64).into(),
            reserved: 0.into(),
            sum: 0.into(),
        };
        header.sum = header.right_sum().into();
        header
    }

    fn right_sum(&self) -> u32 {
        crc32c::crc32c(&self.as_bytes()[..Self::SIZE - size_of::<U32>()])
    }
}

/// Everything but memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Body {
    pub(super) manifest: Manifest,
    pub(super) state: MachineState,
    pub(super) memory: MemoryFile,
    /// When it was saved, by CLOCK_REALTIME in nanoseconds since 1970, for people.
    #[serde(default)]
    pub(super) saved_ns: u64,
}

/// What the memory file must be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MemoryFile {
    /// Random: it stands in the memory file too.
    pub(super) id: Bytes,
    /// Length of all RAM regions in bytes.
    pub(super) bytes: u64,
    /// Bytes that one checksum is for; the last chunk may be shorter.
    pub(super) chunk_bytes: u32,
    /// CRC-32C of each chunk, four bytes each, little endian.
    pub(super) sums: Bytes,
}

impl MemoryFile {
    pub(super) fn sum(&self, chunk: u64) -> Option<u32> {
        let (sums, _) = self.sums.0.as_chunks::<4>();
        sums.get(usize::try_from(chunk).ok()?)
            .map(|sum| u32::from_le_bytes(*sum))
    }
}

/// Header and body as they stand in the file.
pub(super) fn encode(body: &Body) -> Result<Vec<u8>, SnapshotError> {
    let body =
        rmp_serde::to_vec_named(body).map_err(|error| SnapshotError::Encode(error.to_string()))?;
    if body.len() as u64 > MAX_BODY {
        return Err(SnapshotError::Encode(format!(
            "{} bytes are too many",
            body.len()
        )));
    }
    let mut bytes = Header::new(&body).as_bytes().to_vec();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads and checks a manifest file.
pub(super) fn read(path: &Path) -> Result<Body, SnapshotError> {
    let failed = |error| SnapshotError::file("read", path)(error);
    let mut file = File::open(path).map_err(SnapshotError::file("open", path))?;
    let length = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::new();
    (&mut file)
        .take(Header::SIZE as u64)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let Ok(header) = Header::read_from_bytes(&bytes) else {
        return Err(if bytes.starts_with(&MAGIC) {
            SnapshotError::damaged(path, format!("it ends after {} bytes", bytes.len()))
        } else {
            SnapshotError::Foreign(path.to_owned())
        });
    };
    let body_length = check_header(&header, length, path)?;
    let mut body = Vec::new();
    file.take(body_length)
        .read_to_end(&mut body)
        .map_err(failed)?;
    if crc32c::crc32c(&body) != header.body_sum.get() {
        return Err(SnapshotError::damaged(
            path,
            "its contents do not have the checksum that it says",
        ));
    }
    let body: Body = rmp_serde::from_slice(&body)
        .map_err(|error| SnapshotError::damaged(path, format!("it cannot be decoded: {error}")))?;
    check_memory(&body).map_err(|what| SnapshotError::damaged(path, what))?;
    Ok(body)
}

/// The length of the body.
fn check_header(header: &Header, file_length: u64, path: &Path) -> Result<u64, SnapshotError> {
    if header.magic != MAGIC {
        return Err(SnapshotError::Foreign(path.to_owned()));
    }
    let version = header.version.get();
    if version != VERSION {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            found: version,
            known: VERSION,
        });
    }
    if header.right_sum() != header.sum.get() {
        return Err(SnapshotError::damaged(
            path,
            "its first 32 bytes do not have the checksum that they say",
        ));
    }
    let length = header.length.get();
    let expected = length.saturating_add(Header::SIZE as u64);
    if file_length != expected {
        return Err(SnapshotError::damaged(
            path,
            format!("it has {file_length} bytes instead of {expected}"),
        ));
    }
    if length > MAX_BODY {
        return Err(SnapshotError::damaged(path, "it is absurdly long"));
    }
    Ok(length)
}

/// What must hold between the parts.
fn check_memory(body: &Body) -> Result<(), &'static str> {
    let memory = &body.memory;
    let ranges = body
        .manifest
        .memory
        .iter()
        .try_fold(0u64, |sum, range| sum.checked_add(range.len));
    if ranges != Some(memory.bytes) || !memory.bytes.is_multiple_of(PAGE_SIZE) {
        return Err("the lengths of its memory ranges do not fit together");
    }
    if memory.chunk_bytes == 0
        || memory.chunk_bytes > MAX_CHUNK
        || !u64::from(memory.chunk_bytes).is_multiple_of(PAGE_SIZE)
    {
        return Err("its chunk size is not possible");
    }
    let chunks = memory.bytes.div_ceil(u64::from(memory.chunk_bytes));
    if memory.sums.0.len() as u64 != chunks.saturating_mul(4) {
        return Err("the number of its checksums is wrong");
    }
    Ok(())
}
