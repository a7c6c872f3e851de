//! The buffers of a request.

use memory::GuestMemoryMmap;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::QueueError;

/// Buffers of a side of a usual request: a header, data, a status. More take an allocation.
const USUAL: usize = 2;

/// Buffers of a chain in a row: guest-physical addresses and lengths, all in RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    parts: SmallVec<[(u64, u32); USUAL]>,
    len: u64,
}

impl Segments {
    /// All bytes together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Guest-physical addresses and lengths in bytes.
    pub fn parts(&self) -> &[(u64, u32)] {
        &self.parts
    }

    /// The part of these buffers from byte `offset` on, at most `len` bytes.
    pub fn slice(&self, offset: u64, len: u64) -> Segments {
        let mut slice = Segments::default();
        for (gpa, part) in self.pieces(offset, len) {
            slice.parts.push((gpa, part));
            slice.len += u64::from(part);
        }
        slice
    }

    /// The parts of [`Segments::slice`].
    pub(super) fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u32)> {
        let (mut skip, mut left) = (offset, len);
        self.parts.iter().filter_map(move |&(gpa, part)| {
            let part = u64::from(part);
            if skip >= part {
                skip -= part;
                return None;
            }
            let take = (part - skip).min(left);
            let piece = (take > 0).then_some((gpa + skip, take as u32));
            left -= take;
            skip = 0;
            piece
        })
    }

    /// Copies bytes from `offset` on out of guest memory; returns how many there were.
    pub fn read(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (gpa, part) in self.pieces(offset, into.len() as u64) {
            let end = done + part as usize;
            let bytes = &mut into[done..end];
            match memory.get_slice(GuestAddress(gpa), bytes.len()) {
                Ok(slice) => _ = slice.copy_to(bytes),
                // Across two regions.
                Err(_) => memory.read_slice(bytes, GuestAddress(gpa))?,
            }
            done = end;
        }
        Ok(done)
    }

    /// Copies bytes into guest memory from `offset` on, and marks them dirty at once; returns how many there was room for. Who has the queue
    /// uses [`super::Virtqueue::write`].
    pub(crate) fn write(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        from: &[u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (gpa, part) in self.pieces(offset, from.len() as u64) {
            let end = done + part as usize;
            memory.write_slice(&from[done..end], GuestAddress(gpa))?;
            done = end;
        }
        Ok(done)
    }

    /// Host addresses for a system call that reads or writes these buffers, appended to `all`. They are good for as long as `memory` is;
    /// who lets the system write through them says so to [`super::Virtqueue::written`] afterwards.
    pub fn iovecs(
        &self,
        memory: &GuestMemoryMmap,
        all: &mut impl Extend<libc::iovec>,
    ) -> Result<(), QueueError> {
        for &(gpa, len) in &self.parts {
            if let Ok(slice) = memory.get_slice(GuestAddress(gpa), len as usize) {
                all.extend([iovec(&slice)]);
                continue;
            }
            // Across two regions.
            for slice in memory.get_slices(GuestAddress(gpa), len as usize) {
                all.extend([iovec(&slice?)]);
            }
        }
        Ok(())
    }

    pub(super) fn push(
        &mut self,
        memory: &GuestMemoryMmap,
        gpa: u64,
        len: u32,
    ) -> Result<(), QueueError> {
        if len == 0 {
            return Ok(());
        }
        if !GuestMemoryBackend::check_range(memory, GuestAddress(gpa), len as usize) {
            return Err(QueueError::NotRam { gpa, len });
        }
        self.parts.push((gpa, len));
        self.len += u64::from(len);
        Ok(())
    }
}

fn iovec<B: vm_memory::bitmap::BitmapSlice>(
    slice: &vm_memory::VolatileSlice<'_, B>,
) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// A request: buffers that the device reads, then buffers that it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// What [`super::Virtqueue::complete`] names it by.
    pub head: u16,
    /// Device-readable.
    pub readable: Segments,
    /// Device-writable.
    pub writable: Segments,
}

#[cfg(test)]
mod tests {
    use smallvec::SmallVec;

    use super::*;

    #[test]
    fn pieces_of_buffers() {
        let segments = Segments {
            parts: SmallVec::from_slice(&[(100, 10), (200, 20), (300, 30)]),
            len: 60,
        };
        for (offset, len, parts) in [
            (0, 60, vec![(100, 10), (200, 20), (300, 30)]),
            (5, 10, vec![(105, 5), (200, 5)]),
            (10, 20, vec![(200, 20)]),
            (59, 9, vec![(329, 1)]),
            (60, 1, vec![]),
            (0, 0, vec![]),
        ] {
            let len_of_all = parts
                .iter()
                .map(|part: &(u64, u32)| u64::from(part.1))
                .sum();
            let expected = Segments {
                parts: parts.into(),
                len: len_of_all,
            };
            assert_eq!(segments.slice(offset, len), expected, "{offset} {len}");
        }
    }
}
