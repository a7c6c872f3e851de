//! A ring for a queue: operations in batches, completions by the ring's descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::super::slab::Slab;
use super::operation::{Call, Memory};
use super::sync::discard;
use super::{BlockEngine, Completion, Operation, Place, Running};

/// How often a submission is tried again that the kernel has no memory for, a millisecond apart.
const ATTEMPTS: u32 = 10_000;

/// The engine of choice.
pub(super) struct Uring {
    ring: IoUring,
    place: Place,
    /// With the handler's token. An operation is here for as long as the kernel may use what it points to.
    running: Slab<(usize, Running)>,
    done: Vec<Completion>,
    /// Reused: slots and results.
    seen: Vec<(u64, i32)>,
}

impl Uring {
    /// A ring for `entries` operations at a time.
    pub(super) fn new(place: Place, entries: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(entries).next_power_of_two())?;
        ring.submitter().register_files(&place.disk.descriptors())?;
        Ok(Self {
            ring,
            place,
            running: Slab::default(),
            done: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// Puts the next call of an operation into the ring.
    fn issue(&mut self, slot: usize) -> io::Result<()> {
        loop {
            let Some((_, running)) = self.running.get_mut(slot) else {
                return Ok(());
            };
            let call = match running.call(&self.place) {
                Ok(Call::DiscardDevice { offset, len }) => {
                    // The ring has no such operation on all kernels.
                    let result = discard(&self.place, offset, len);
                    if let Some(result) = running.finished(result, &self.place) {
                        self.finish(slot, result);
                        return Ok(());
                    }
                    continue;
                }
                Ok(call) => call,
                Err(error) => {
                    self.finish(slot, Err(error));
                    return Ok(());
                }
            };
            return match self.push(&entry(call).user_data(slot as u64)) {
                Ok(()) => Ok(()),
                Err(error) => {
                    self.finish(slot, Err(io::Error::from(error.kind())));
                    Err(error)
                }
            };
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to is owned by the operation in its slot, which is removed only when the kernel has finished it,
            // or guest memory, which `place` keeps.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.kick()?;
        }
    }

    fn finish(&mut self, slot: usize, result: io::Result<()>) {
        if let Some((token, _)) = self.running.remove(slot) {
            self.done.push(Completion { token, result });
        }
    }

    /// Takes the ring's completions; an operation that has more to do goes on.
    fn reap(&mut self) -> io::Result<()> {
        let mut seen = std::mem::take(&mut self.seen);
        seen.extend(
            self.ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result())),
        );
        let mut result = Ok(());
        for (slot, value) in seen.drain(..) {
            let slot = slot as usize;
            let Some((_, running)) = self.running.get_mut(slot) else {
                continue;
            };
            let value = u64::try_from(value).map_err(|_| value.wrapping_neg());
            match running.finished(value, &self.place) {
                Some(result) => self.finish(slot, result),
                None => result = result.and(self.issue(slot)),
            }
        }
        self.seen = seen;
        result.and_then(|()| self.kick())
    }

    fn enter(&mut self, wait_for: usize) -> io::Result<()> {
        let mut attempts = 0;
        loop {
            match self.ring.submit_and_wait(wait_for) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if attempts < ATTEMPTS => {
                        attempts += 1;
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    _ => return Err(error),
                },
            }
        }
    }
}

impl BlockEngine for Uring {
    fn submit(&mut self, token: usize, operation: Operation, durable: bool) -> io::Result<()> {
        let running = Running::new(operation, durable, &self.place.disk);
        let slot = self.running.insert((token, running));
        self.issue(slot)
    }

    fn kick(&mut self) -> io::Result<()> {
        // The kernel stops at an entry that it refuses, which it reports as a completion.
        while !self.ring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    fn has_finished(&mut self) -> bool {
        !self.done.is_empty() || !self.ring.completion().is_empty()
    }

    fn completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        let result = self.reap();
        into.append(&mut self.done);
        result
    }

    fn wait(&mut self) -> io::Result<()> {
        while self.done.is_empty() && !self.running.is_empty() {
            self.kick()?;
            if self.ring.completion().is_empty() {
                self.enter(1)?;
            }
            self.reap()?;
        }
        Ok(())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open for as long as `self` is.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while !self.running.is_empty() {
            self.done.clear();
            if let Err(error) = self.wait() {
                tracing::error!(%error, "a disk's operations cannot be waited for; their memory is kept");
                std::mem::forget(std::mem::take(&mut self.running));
                std::mem::forget(self.place.memory.clone());
                return;
            }
        }
    }
}

fn entry(call: Call) -> squeue::Entry {
    // Of the registered files, in the order of `Disk::descriptors`.
    let cache = types::Fixed(0);
    match call {
        Call::Transfer {
            write,
            durable,
            via,
            memory,
            offset,
        } => {
            let file = types::Fixed(via as u32);
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            match (write, memory) {
                (false, Memory::One(one)) => {
                    opcode::Read::new(file, one.iov_base.cast(), length(one))
                        .offset(offset)
                        .build()
                }
                (false, Memory::Many { iovecs, count }) => opcode::Readv::new(file, iovecs, count)
                    .offset(offset)
                    .build(),
                (true, Memory::One(one)) => {
                    opcode::Write::new(file, one.iov_base.cast(), length(one))
                        .offset(offset)
                        .rw_flags(flags)
                        .build()
                }
                (true, Memory::Many { iovecs, count }) => opcode::Writev::new(file, iovecs, count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Call::Sync => opcode::Fsync::new(cache)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Allocate { mode, offset, len } => opcode::Fallocate::new(cache, len)
            .offset(offset)
            .mode(mode)
            .build(),
        // Made by `issue`, never put into the ring.
        Call::DiscardDevice { .. } => opcode::Nop::new().build(),
    }
}

/// A part of a request is shorter than 4 GiB; were it not, the rest would follow as after any short transfer.
fn length(part: libc::iovec) -> u32 {
    u32::try_from(part.iov_len).unwrap_or(u32::MAX - 4095)
}

/// See [`super::probe_uring`].
pub(super) fn probe() -> io::Result<()> {
    let ring = IoUring::new(2)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if needed.into_iter().all(|code| probe.is_supported(code)) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring lacks operations; Linux 5.6 has them",
        ))
    }
}
