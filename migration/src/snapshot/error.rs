//! Why a snapshot was not written or not restored.

use std::io;
use std::path::{Path, PathBuf};

use crate::{MachineError, Refusal};

/// What is wrong with a snapshot, or with the place for one.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The name is taken.
    #[error("{} exists already; choose another name, or remove it first", .0.display())]
    Exists(PathBuf),
    /// The directory is no snapshot.
    #[error("{} holds no snapshot: there is no file `{}` in it; check the path", .0.display(), super::MANIFEST)]
    NotThere(PathBuf),
    /// A file is something else.
    #[error("{} is not of a snapshot of this program: it does not begin as one; check the path", .0.display())]
    Foreign(PathBuf),
    /// Another build wrote it.
    #[error(
        "{} has version {found} of the snapshot format, and this build reads version {known}; restore it with the build that \
         wrote it", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The one that is known.
        known: u32,
    },
    /// A file is not as it was written.
    #[error("{} is damaged: {what}; use another copy of the snapshot", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The file system says no.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Guest memory cannot be read or written.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The machine's state cannot be written down: a fault of this program.
    #[error("the machine's state cannot be encoded: {0}")]
    Encode(String),
    /// Somebody asked for it.
    #[error("it was cancelled")]
    Cancelled,
}

impl SnapshotError {
    pub(super) fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    /// Somebody asked for it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }
}

/// Why no machine came of a snapshot. Nothing of it is left then, and the snapshot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The files.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// This host cannot have the machine.
    #[error("this host refuses the machine: {}", crate::error::list(.0))]
    Refused(Vec<Refusal>),
    /// The machine does not take its state.
    #[error("the machine does not take its state: {0}")]
    Machine(MachineError),
}

impl RestoreError {
    /// Somebody asked for it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Snapshot(SnapshotError::Cancelled))
    }
}
