//! Reading a snapshot, and making a machine of it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use memory::{Backing, GuestRam};
use serde::{Deserialize, Serialize};

use super::contents::{Reader, check, map};
use super::format::{self, Body};
use super::{MANIFEST, MEMORY, RestoreError, SnapshotError};
use crate::control::milliseconds;
use crate::{DestinationMachine, Manifest, MoveControl, Phase, RunState};

/// How the memory comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loading {
    /// Mapped, and read when it is first used: at once, however large the guest is. Only private anonymous memory that is not pinned can do
    /// so; other memory is read as by `Verified`.
    #[default]
    Lazy,
    /// Read and checked before the guest runs, which then needs the files no more.
    Verified,
}

/// A machine that has been restored, and is paused.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RestoreReport {
    /// How the memory came back.
    pub loading: Loading,
    /// Size of the guest's RAM in bytes.
    pub ram_bytes: u64,
    /// Bytes of it that were read and checked.
    pub bytes_read: u64,
    /// How long it took, in milliseconds.
    pub total_ms: f64,
}

/// A snapshot whose manifest is whole and whose memory has the right length and belongs to it.
#[derive(Debug)]
pub struct Snapshot {
    body: Body,
    memory: File,
    memory_path: PathBuf,
}

impl Snapshot {
    /// Opens the snapshot in `directory`, or says what is wrong with it.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let body = format::read(&directory.join(MANIFEST)).map_err(|error| match error {
            SnapshotError::File { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                SnapshotError::NotThere(directory.to_owned())
            }
            error => error,
        })?;
        let memory_path = directory.join(MEMORY);
        let memory = File::open(&memory_path).map_err(SnapshotError::file("open", &memory_path))?;
        check(&memory, &memory_path, &body.memory)?;
        Ok(Self {
            body,
            memory,
            memory_path,
        })
    }

    /// What the machine is.
    pub fn manifest(&self) -> &Manifest {
        &self.body.manifest
    }

    /// Reads all memory and compares it with its checksums. Returns how many bytes were not zero.
    pub fn verify(&self, control: &MoveControl) -> Result<u64, SnapshotError> {
        self.read(None, control)
    }

    /// Fills `ram`, which is fresh and has the manifest's regions. Returns how it was done and how many bytes were read.
    fn load(
        &self,
        ram: &GuestRam,
        loading: Loading,
        control: &MoveControl,
    ) -> Result<(Loading, u64), SnapshotError> {
        match (loading, ram.backing()) {
            (Loading::Lazy, Backing::Anonymous { .. }) if !ram.is_pinned() => {
                map(ram, &self.memory, &self.memory_path)?;
                Ok((Loading::Lazy, 0))
            }
            _ => Ok((Loading::Verified, self.read(Some(ram), control)?)),
        }
    }

    fn read(&self, ram: Option<&GuestRam>, control: &MoveControl) -> Result<u64, SnapshotError> {
        let mut reader = Reader::new(&self.memory, &self.memory_path, &self.body.memory);
        let (began, mut read) = (Instant::now(), 0);
        for (index, bytes) in reader.chunks() {
            if control.is_cancelled() {
                return Err(SnapshotError::Cancelled);
            }
            let end = bytes.end;
            read += reader.read(index, bytes, ram)?;
            control.update(|progress| {
                progress.bytes_sent = read;
                progress.bytes_remaining = self.body.memory.bytes - end;
                progress.rate_bytes_per_s = read as f64 / began.elapsed().as_secs_f64();
            });
        }
        Ok(read)
    }
}

/// Makes a machine of the snapshot in `directory`, by the same steps and with the same refusals as one that moves in. It is
/// paused afterwards, whatever it was before.
///
/// On failure, and if it is cancelled, nothing is left of it.
pub fn restore(
    directory: &Path,
    machine: &mut dyn DestinationMachine,
    loading: Loading,
    control: &MoveControl,
) -> Result<RestoreReport, RestoreError> {
    let began = Instant::now();
    control
        .begin()
        .map_err(SnapshotError::file("begin to read", directory))?;
    let result = run(directory, machine, loading, control);
    match result {
        Ok(_) => control.update(|progress| progress.phase = Phase::Complete),
        Err(_) => machine.discard(),
    }
    control.end();
    let (loading, ram_bytes, bytes_read) = result?;
    Ok(RestoreReport {
        loading,
        ram_bytes,
        bytes_read,
        total_ms: milliseconds(began),
    })
}

fn run(
    directory: &Path,
    machine: &mut dyn DestinationMachine,
    loading: Loading,
    control: &MoveControl,
) -> Result<(Loading, u64, u64), RestoreError> {
    control.update(|progress| progress.phase = Phase::Reserve);
    let snapshot = Snapshot::open(directory)?;
    let ram = machine
        .reserve(snapshot.manifest())
        .map_err(RestoreError::Refused)?;
    let total = ram.total_bytes();
    if total != snapshot.body.memory.bytes {
        return Err(RestoreError::Machine(
            "its memory is not as large as the snapshot's".into(),
        ));
    }
    control.update(|progress| {
        progress.phase = Phase::Memory;
        progress.bytes_total = total;
    });
    let (loading, read) = snapshot.load(&ram, loading, control)?;
    if !control.close() {
        return Err(SnapshotError::Cancelled.into());
    }
    control.update(|progress| progress.phase = Phase::Handover);
    let mut state = snapshot.body.state;
    state.run_state = RunState::Paused;
    machine.restore(state).map_err(RestoreError::Machine)?;
    machine.resume().map_err(RestoreError::Machine)?;
    Ok((loading, total, read))
}
