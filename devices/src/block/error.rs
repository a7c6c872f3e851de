//! Why a disk cannot be used.

use std::io;
use std::path::PathBuf;

/// Why a disk cannot be used. Each message names the disk and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error("disk {} does not exist; create the image or correct the path", .path.display())]
    Missing {
        /// The disk's path.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("cannot open disk {} for {access}: {source}; check its permissions, or make the disk read-only", .path.display())]
    Open {
        /// The disk's path.
        path: PathBuf,
        /// `reading` or `reading and writing`.
        access: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// It is a directory, a pipe, a socket or a character device.
    #[error("disk {} is a {kind}; a disk is a regular file or a block device", .path.display())]
    Kind {
        /// The disk's path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It has no sector.
    #[error("disk {} has {bytes} bytes, less than one sector of 512; give the image its size, with truncate for example", .path.display())]
    TooSmall {
        /// The disk's path.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
    },
    /// Another machine has it.
    #[error("disk {} is in use: {holder} has it open; stop the other machine, or open the disk read-only in both", .path.display())]
    InUse {
        /// The disk's path.
        path: PathBuf,
        /// Who, as well as it can be said.
        holder: &'static str,
    },
    /// It cannot be locked at all.
    #[error("cannot lock disk {}: {source}; keep the image on a file system that has locks", .path.display())]
    Lock {
        /// The disk's path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Its file system has no direct I/O.
    #[error("disk {} cannot be opened with O_DIRECT: {source}; turn `direct` off", .path.display())]
    Direct {
        /// The disk's path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Its properties cannot be read.
    #[error("cannot read the {what} of disk {}: {source}", .path.display())]
    Query {
        /// The disk's path.
        path: PathBuf,
        /// Which.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The serial number is too long.
    #[error("the serial of disk {} has {len} bytes; give at most 20", .path.display())]
    Serial {
        /// The disk's path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Numbers or sizes of queues that cannot be.
    #[error("disk {} has {count} queues of {size}; give 1 to 64 queues, of a power of two from 4 to 32768", .path.display())]
    Queues {
        /// The disk's path.
        path: PathBuf,
        /// Number of queues.
        count: u16,
        /// Their size.
        size: u16,
    },
    /// The engine that was asked for is not there.
    #[error("disk {} cannot use io_uring here: {source}; leave `engine` out, or choose the synchronous one", .path.display())]
    Engine {
        /// The disk's path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A new size that it cannot take.
    #[error("disk {} of {old} bytes cannot be made {new} bytes: {reason}", .path.display())]
    Resize {
        /// The disk's path.
        path: PathBuf,
        /// Its size in bytes.
        old: u64,
        /// The size that was asked for, in bytes.
        new: u64,
        /// Why, and what to do.
        reason: String,
    },
}
