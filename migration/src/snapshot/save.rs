//! Writing a snapshot.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use arch::x86_64::state::Bytes;
use memory::GuestRam;
use serde::Serialize;

use super::contents::{CHUNK, ID, Writer, last_page};
use super::format::{self, Body, MemoryFile};
use super::{MANIFEST, MEMORY, SnapshotError};
use crate::control::milliseconds;
use crate::{MachineState, Manifest, MoveControl, Phase, clocks};

/// After this many bytes the disk is waited for, so that neither a cancel nor the end waits for all of them at once.
const SYNC_EVERY: u64 = 256 << 20;

/// A snapshot that is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SaveReport {
    /// Size of the guest's RAM in bytes.
    pub ram_bytes: u64,
    /// Bytes of it that are not zero and were written.
    pub bytes_written: u64,
    /// How long it took, in milliseconds.
    pub total_ms: f64,
}

/// Writes a snapshot of a machine to `directory`, which does not exist or is empty. The machine stays paused while this runs: the
/// caller sees to it that nothing writes its memory.
///
/// On success the whole snapshot is on the disk under its name. On failure, and if it is cancelled, everything is as it was
/// before.
pub fn save(
    directory: &Path,
    manifest: Manifest,
    state: MachineState,
    ram: &GuestRam,
    control: &MoveControl,
) -> Result<SaveReport, SnapshotError> {
    let began = Instant::now();
    control
        .begin()
        .map_err(SnapshotError::file("begin to write", directory))?;
    control.update(|progress| {
        progress.phase = Phase::Reserve;
        progress.bytes_total = ram.total_bytes();
    });
    let result = write(directory, manifest, state, ram, control);
    if result.is_ok() {
        control.update(|progress| progress.phase = Phase::Complete);
    }
    control.end();
    Ok(SaveReport {
        ram_bytes: ram.total_bytes(),
        bytes_written: result?,
        total_ms: milliseconds(began),
    })
}

fn write(
    directory: &Path,
    manifest: Manifest,
    state: MachineState,
    ram: &GuestRam,
    control: &MoveControl,
) -> Result<u64, SnapshotError> {
    let partial = Partial::beside(directory)?;
    let (memory, written) = write_memory(&partial.path.join(MEMORY), ram, control)?;
    let body = Body {
        manifest,
        state,
        memory,
        saved_ns: clocks::realtime_ns(),
    };
    write_manifest(&partial.path.join(MANIFEST), &body)?;
    sync_directory(&partial.path)?;
    if !control.close() {
        return Err(SnapshotError::Cancelled);
    }
    partial.become_whole(directory)?;
    Ok(written)
}

fn create(path: &Path) -> Result<File, SnapshotError> {
    // It holds all secrets of the guest.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(SnapshotError::file("create", path))
}

fn write_memory(
    path: &Path,
    ram: &GuestRam,
    control: &MoveControl,
) -> Result<(MemoryFile, u64), SnapshotError> {
    control.update(|progress| progress.phase = Phase::Memory);
    let failed = |error| SnapshotError::file("write", path)(error);
    let mut id = vec![0; ID];
    getrandom::fill(&mut id).map_err(|error| failed(io::Error::other(error)))?;
    let bytes = ram.total_bytes();
    let file = create(path)?;
    file.write_all_at(&last_page(&id), bytes).map_err(failed)?;
    let mut sums = Vec::new();
    let mut writer = Writer::new(ram, &file, path);
    let (began, mut written, mut synced) = (Instant::now(), 0, 0);
    let mut at = 0;
    while at < bytes {
        if control.is_cancelled() {
            return Err(SnapshotError::Cancelled);
        }
        let end = bytes.min(at + CHUNK as u64);
        let (sum, count) = writer.write(at..end)?;
        sums.extend_from_slice(&sum.to_le_bytes());
        written += count;
        at = end;
        if written - synced >= SYNC_EVERY {
            file.sync_data().map_err(failed)?;
            synced = written;
        }
        control.update(|progress| {
            progress.bytes_sent = written;
            progress.bytes_remaining = bytes - at;
            progress.zero_pages = (at - written) / memory::PAGE_SIZE;
            progress.rate_bytes_per_s = written as f64 / began.elapsed().as_secs_f64();
        });
    }
    file.sync_all().map_err(failed)?;
    let known = MemoryFile {
        id: Bytes(id),
        bytes,
        chunk_bytes: CHUNK as u32,
        sums: Bytes(sums),
    };
    Ok((known, written))
}

fn write_manifest(path: &Path, body: &Body) -> Result<(), SnapshotError> {
    let bytes = format::encode(body)?;
    let mut file = create(path)?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(SnapshotError::file("write", path))
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(SnapshotError::file("write", path))
}

/// The directory that becomes the snapshot. Removed on drop unless it has become it.
struct Partial {
    path: PathBuf,
    parent: PathBuf,
}

impl Partial {
    /// Makes one beside `directory`, if a snapshot can have that name.
    fn beside(directory: &Path) -> Result<Self, SnapshotError> {
        match std::fs::read_dir(directory).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(false) => return Err(SnapshotError::Exists(directory.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(SnapshotError::Exists(directory.to_owned()));
            }
            Err(error) => return Err(SnapshotError::file("look into", directory)(error)),
        }
        let Some(name) = directory.file_name() else {
            return Err(SnapshotError::Exists(directory.to_owned()));
        };
        let parent = match directory.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut random = [0; 4];
        getrandom::fill(&mut random)
            .map_err(|error| SnapshotError::file("name", directory)(io::Error::other(error)))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{:08x}.partial", u32::from_ne_bytes(random)));
        let path = parent.join(hidden);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(SnapshotError::file("create", &path))?;
        Ok(Self {
            path,
            parent: parent.to_owned(),
        })
    }

    /// Gets its name, if nobody has taken it meanwhile.
    fn become_whole(self, directory: &Path) -> Result<(), SnapshotError> {
        // Replaces an empty directory, and nothing else.
        std::fs::rename(&self.path, directory).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotADirectory => SnapshotError::Exists(directory.to_owned()),
            _ => SnapshotError::file("make", directory)(error),
        })?;
        let parent = self.parent.clone();
        drop(self);
        sync_directory(&parent).inspect_err(|_| {
            // Whether it would still be there after a crash is unknown, and the caller hears that there is none.
            let _ = std::fs::remove_dir_all(directory);
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        match std::fs::remove_dir_all(&self.path) {
            Ok(()) => {}
            // It has become the snapshot.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "a part of a snapshot stays behind");
            }
        }
    }
}
