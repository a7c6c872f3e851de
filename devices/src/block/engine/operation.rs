//! An operation under way, as a row of system calls that either engine makes.

use std::io;

use smallvec::SmallVec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::disk::{Alignment, Disk, Via};
use super::Place;
use crate::virtio::{QueueError, Segments};

/// Parts of one system call (UIO_MAXIOV of linux/uio.h).
const MAX_PARTS: usize = 1024;
/// Bytes of a bounce buffer; a longer transfer goes through it in rounds.
const BOUNCE: u64 = 256 << 10;
/// Bytes of zeros to write from; a part each.
const ZEROS: u64 = 64 << 10;

static ZERO_PAGES: [Page; (ZEROS / 4096) as usize] = [const { Page([0; 4096]) }; 16];

/// Memory that any O_DIRECT takes.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// What is to be done. Offsets and lengths are bytes, and within the disk.
#[derive(Debug)]
pub(in super::super) enum Operation {
    Read {
        offset: u64,
        into: Segments,
    },
    Write {
        offset: u64,
        from: Segments,
    },
    /// Makes durable what was written by operations that have finished.
    Flush,
    /// The contents are not needed any more.
    Discard {
        offset: u64,
        len: u64,
    },
    /// Reads as zeros from now on; `unmap` if its space may be given back.
    WriteZeroes {
        offset: u64,
        len: u64,
        unmap: bool,
    },
}

/// A system call to make next. Its pointer is good until the next call of a method of the [`Running`] it comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Transfer {
        write: bool,
        durable: bool,
        via: Via,
        memory: Memory,
        offset: u64,
    },
    Sync,
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// BLKDISCARD.
    DiscardDevice {
        offset: u64,
        len: u64,
    },
}

/// Where a call's data are in this process.
#[derive(Clone, Copy, Debug)]
pub(super) enum Memory {
    /// In one piece, as most are: the system need not read a vector.
    One(libc::iovec),
    Many {
        iovecs: *const libc::iovec,
        count: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    DiscardDevice,
    DiscardFile,
    ZeroByHole,
    Zero,
}

enum Step {
    Transfer(Transfer),
    Space { how: Space, offset: u64, len: u64 },
    Sync,
}

/// An operation under way.
pub(super) struct Running {
    step: Step,
    durable: bool,
}

// SAFETY: its pointers are to memory that it owns and to guest memory, which any thread may use while its engine's `Place` keeps it.
unsafe impl Send for Running {}

impl Running {
    pub(super) fn new(operation: Operation, durable: bool, disk: &Disk) -> Self {
        let step = match operation {
            Operation::Read { offset, into } => {
                Step::Transfer(Transfer::guest(offset, into, false))
            }
            Operation::Write { offset, from } => {
                Step::Transfer(Transfer::guest(offset, from, true))
            }
            Operation::Flush => Step::Sync,
            Operation::Discard { offset, len } => {
                let how = if disk.is_block_device() {
                    Space::DiscardDevice
                } else {
                    Space::DiscardFile
                };
                Step::Space { how, offset, len }
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                let how = if unmap {
                    Space::ZeroByHole
                } else {
                    Space::Zero
                };
                Step::Space { how, offset, len }
            }
        };
        Self { step, durable }
    }

    /// What to do next. An error ends the operation.
    pub(super) fn call(&mut self, place: &Place) -> io::Result<Call> {
        Ok(match &mut self.step {
            Step::Transfer(transfer) => {
                transfer.prepare(place)?;
                Call::Transfer {
                    write: transfer.write,
                    durable: transfer.write && self.durable,
                    via: transfer.via,
                    memory: transfer.memory(),
                    offset: transfer.offset + transfer.done,
                }
            }
            Step::Sync => Call::Sync,
            &mut Step::Space { how, offset, len } => {
                let mode = match how {
                    Space::DiscardDevice => return Ok(Call::DiscardDevice { offset, len }),
                    Space::DiscardFile | Space::ZeroByHole => libc::FALLOC_FL_PUNCH_HOLE,
                    Space::Zero => libc::FALLOC_FL_ZERO_RANGE,
                };
                Call::Allocate {
                    mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset,
                    len,
                }
            }
        })
    }

    /// Takes what the call returned, bytes or an errno; none if there is more to do.
    pub(super) fn finished(
        &mut self,
        result: Result<u64, i32>,
        place: &Place,
    ) -> Option<io::Result<()>> {
        let value = match result {
            Ok(value) => value,
            Err(libc::EINTR | libc::EAGAIN) => return None,
            Err(errno) => {
                if self.without_space_call(errno) {
                    return None;
                }
                return Some(Err(io::Error::from_raw_os_error(errno)));
            }
        };
        match &mut self.step {
            Step::Transfer(transfer) => match transfer.advance(value, place) {
                Ok(true) => Some(Ok(())),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            },
            // A transfer is durable by itself; this is not.
            Step::Space { .. } if self.durable => {
                self.step = Step::Sync;
                None
            }
            Step::Space { .. } | Step::Sync => Some(Ok(())),
        }
    }

    /// Zeros another way, where the file system or the device cannot do it the way that was tried.
    fn without_space_call(&mut self, errno: i32) -> bool {
        let Step::Space { how, offset, len } = self.step else {
            return false;
        };
        if !matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) {
            return false;
        }
        self.step = match how {
            Space::DiscardDevice | Space::DiscardFile => return false,
            Space::ZeroByHole => Step::Space {
                how: Space::Zero,
                offset,
                len,
            },
            Space::Zero => Step::Transfer(Transfer::zeros(offset, len)),
        };
        true
    }
}

enum Data {
    Guest(Segments),
    Zeros,
}

/// Bytes between memory and the file.
struct Transfer {
    write: bool,
    offset: u64,
    len: u64,
    done: u64,
    data: Data,
    /// Of the call that is made next or under way.
    iovecs: SmallVec<[libc::iovec; 1]>,
    via: Via,
    bounce: Option<Vec<Page>>,
}

impl Transfer {
    fn guest(offset: u64, segments: Segments, write: bool) -> Self {
        Self {
            write,
            offset,
            len: segments.len(),
            done: 0,
            data: Data::Guest(segments),
            iovecs: SmallVec::new(),
            via: Via::Cache,
            bounce: None,
        }
    }

    fn zeros(offset: u64, len: u64) -> Self {
        Self {
            len,
            data: Data::Zeros,
            ..Self::guest(offset, Segments::default(), true)
        }
    }

    /// Sets up the vectors of the next call.
    fn prepare(&mut self, place: &Place) -> io::Result<()> {
        let left = self.len - self.done;
        self.bounce = None;
        self.iovecs.clear();
        match &self.data {
            Data::Guest(all) if self.done == 0 => all.iovecs(&place.memory, &mut self.iovecs),
            Data::Guest(all) => all
                .slice(self.done, left)
                .iovecs(&place.memory, &mut self.iovecs),
            Data::Zeros => {
                zeros(left, &mut self.iovecs);
                Ok(())
            }
        }
        .map_err(into_io)?;
        self.iovecs.truncate(MAX_PARTS);
        self.via = match place.disk.alignment() {
            Some(alignment) if self.fits_file(alignment) => Via::Direct,
            // A piece of a block: the page cache reads the rest of it. The kernel keeps both ways consistent.
            _ => Via::Cache,
        };
        if let (Via::Direct, Some(alignment)) = (self.via, place.disk.alignment())
            && !fit_memory(&self.iovecs, alignment)
        {
            self.use_bounce(left.min(BOUNCE), place)?;
        }
        Ok(())
    }

    /// A vector of more than one part is on the heap, so that it stays where it is when this is moved.
    fn memory(&self) -> Memory {
        match self.iovecs.as_slice() {
            [one] => Memory::One(*one),
            many => Memory::Many {
                iovecs: many.as_ptr(),
                count: many.len() as u32,
            },
        }
    }

    fn fits_file(&self, alignment: Alignment) -> bool {
        let at = self.offset + self.done;
        (at | (self.len - self.done)).is_multiple_of(alignment.offset)
            && alignment.memory <= size_of::<Page>() as u64
            && alignment.offset <= BOUNCE
    }

    fn use_bounce(&mut self, len: u64, place: &Place) -> io::Result<()> {
        let pages = len.div_ceil(size_of::<Page>() as u64) as usize;
        let mut bounce = vec![Page([0; 4096]); pages];
        let bytes = &mut bounce.as_mut_slice().as_mut_bytes()[..len as usize];
        if let (true, Data::Guest(segments)) = (self.write, &self.data) {
            segments
                .read(&place.memory, self.done, bytes)
                .map_err(into_io)?;
        }
        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
        self.bounce = Some(bounce);
        Ok(())
    }

    /// Takes what a call has moved; true if that was the rest.
    fn advance(&mut self, moved: u64, place: &Place) -> io::Result<bool> {
        if moved == 0 && self.done < self.len {
            return Err(if self.write {
                io::ErrorKind::WriteZero.into()
            } else {
                io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends there")
            });
        }
        if let (false, Some(bounce), Data::Guest(segments)) = (self.write, &self.bounce, &self.data)
        {
            let bytes = &bounce.as_slice().as_bytes()[..moved as usize];
            segments
                .write(&place.memory, self.done, bytes)
                .map_err(into_io)?;
        }
        self.done += moved;
        Ok(self.done >= self.len)
    }
}

/// Parts that name the same zeros again and again.
fn zeros(mut left: u64, all: &mut SmallVec<[libc::iovec; 1]>) {
    while left > 0 && all.len() < MAX_PARTS {
        let len = left.min(ZEROS);
        all.push(libc::iovec {
            // They are only written from.
            iov_base: ZERO_PAGES.as_ptr().cast_mut().cast(),
            iov_len: len as usize,
        });
        left -= len;
    }
}

fn fit_memory(iovecs: &[libc::iovec], alignment: Alignment) -> bool {
    iovecs.iter().all(|part| {
        (part.iov_base as u64).is_multiple_of(alignment.memory)
            && (part.iov_len as u64).is_multiple_of(alignment.offset)
    })
}

fn into_io(error: QueueError) -> io::Error {
    io::Error::other(error)
}
