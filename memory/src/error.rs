//! Why guest memory could not be had or reached.

use std::io;

/// An error of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory size cannot be laid out.
    #[error("a guest memory of {size} bytes is not possible: {reason}")]
    Size {
        /// The size asked for, in bytes.
        size: u64,
        /// What is wrong with it, and what to do.
        reason: &'static str,
    },
    /// A RAM range is not usable.
    #[error("the RAM range at {gpa:#x} of {len:#x} bytes is not usable: {reason}")]
    Range {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host is too small.
    #[error(
        "the guest wants {wanted} bytes of memory, but {what} {available} bytes; make the guest smaller{advice}"
    )]
    TooLarge {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes there are.
        available: u64,
        /// Which limit it is.
        what: &'static str,
        /// A further way out.
        advice: &'static str,
    },
    /// The huge page size is not one the host knows.
    #[error("huge pages of {page_size} bytes are not possible: {reason}")]
    HugePage {
        /// Page size asked for, in bytes.
        page_size: u64,
        /// What is wrong with it, and what to do.
        reason: &'static str,
    },
    /// A file cannot be what guest memory begins as.
    #[error("the file cannot be mapped as guest memory: {reason}")]
    MapFile {
        /// What is in the way.
        reason: &'static str,
    },
    /// A call to the system failed.
    #[error("{operation} failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Pages outside of a region were asked for.
    #[error(
        "pages {first_page}..+{pages} are outside of RAM region {region}, which has {region_pages}"
    )]
    OutOfRange {
        /// Index of the region.
        region: usize,
        /// First page asked for.
        first_page: u64,
        /// Number of pages asked for.
        pages: u64,
        /// Pages in the region; zero if there is no such region.
        region_pages: u64,
    },
}

impl Error {
    pub(crate) fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation,
            source: source.into(),
        }
    }
}
