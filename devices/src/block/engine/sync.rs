//! One system call after the other, on the queue's thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::super::disk::Via;
use super::super::host;
use super::operation::{Call, Memory};
use super::{BlockEngine, Completion, Operation, Place, Running};

/// The engine for hosts without io_uring.
pub(super) struct Sync {
    place: Place,
    done: Vec<Completion>,
}

impl Sync {
    pub(super) fn new(place: Place) -> Self {
        Self {
            place,
            done: Vec::new(),
        }
    }

    fn run(&self, mut running: Running) -> io::Result<()> {
        loop {
            let call = running.call(&self.place)?;
            // SAFETY: the call is the one that `running` has just named, and it lives until the call has returned.
            let result = unsafe { make(call, &self.place) };
            if let Some(result) = running.finished(result, &self.place) {
                return result;
            }
        }
    }
}

impl BlockEngine for Sync {
    fn submit(&mut self, token: usize, operation: Operation, durable: bool) -> io::Result<()> {
        let result = self.run(Running::new(operation, durable, &self.place.disk));
        self.done.push(Completion { token, result });
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn has_finished(&mut self) -> bool {
        !self.done.is_empty()
    }

    fn completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        into.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Makes a call; bytes or an errno.
///
/// # Safety
///
/// The pointers of `call` must be good, which they are right after [`Running::call`].
unsafe fn make(call: Call, place: &Place) -> Result<u64, i32> {
    let result: i64 = match call {
        Call::Transfer {
            write,
            durable,
            via,
            memory,
            offset,
        } => {
            let fd = place.disk.file(via).as_raw_fd();
            let (iovecs, count) = match &memory {
                Memory::One(one) => (std::ptr::from_ref(one), 1),
                &Memory::Many { iovecs, count } => (iovecs, count as i32),
            };
            let offset = offset as i64;
            // SAFETY: the caller vouches for the vectors.
            unsafe {
                if write {
                    let flags = if durable { libc::RWF_DSYNC } else { 0 };
                    libc::pwritev2(fd, iovecs, count, offset, flags) as i64
                } else {
                    libc::preadv(fd, iovecs, count, offset) as i64
                }
            }
        }
        Call::Sync => {
            // SAFETY: it takes no pointer.
            unsafe { libc::fdatasync(place.disk.file(Via::Cache).as_raw_fd()) }.into()
        }
        Call::Allocate { mode, offset, len } => {
            let fd = place.disk.file(Via::Cache).as_raw_fd();
            // SAFETY: it takes no pointer.
            unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) }.into()
        }
        Call::DiscardDevice { offset, len } => {
            return discard(place, offset, len);
        }
    };
    u64::try_from(result).map_err(|_| errno(&io::Error::last_os_error()))
}

/// Discards on a block device; bytes or an errno.
pub(super) fn discard(place: &Place, offset: u64, len: u64) -> Result<u64, i32> {
    host::discard(place.disk.file(Via::Cache), offset, len)
        .map(|()| 0)
        .map_err(|error| errno(&error))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
