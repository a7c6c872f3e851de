//! Snapshots of machines without a hypervisor: what is in the files, and what is refused.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::x86_64::state::Bytes;
use memory::{Backing, GuestRam, PAGE_SIZE, RamRange};
use tempfile::TempDir;

use super::*;
use crate::{
    DestinationMachine, DeviceState, MachineError, MachineState, Manifest, MoveControl, Phase,
    Refusal, RefusalKind, RunState,
};

const MIB: u64 = 1 << 20;
const ANONYMOUS: Backing = Backing::Anonymous { thp: true };
const MEMFD: Backing = Backing::Memfd { thp: false };
/// Chunks of the file do not end where regions do.
const RANGES: [RamRange; 2] = [
    RamRange {
        gpa: 0,
        len: 5 * MIB + 3 * PAGE_SIZE,
    },
    RamRange {
        gpa: 1 << 32,
        len: 7 * MIB,
    },
];
/// Pages with something in them: region and page.
const FULL: [(usize, u64); 7] = [
    (0, 0),
    (0, 1),
    (0, 700),
    (0, 1282),
    (1, 0),
    (1, 900),
    (1, 1791),
];

fn pattern(region: usize, page: u64) -> [u8; PAGE_SIZE as usize] {
    std::array::from_fn(|i| (i as u64 * 7 + page * 31 + region as u64) as u8 | 1)
}

fn ram(backing: Backing) -> Arc<GuestRam> {
    Arc::new(GuestRam::new(&RANGES, backing).expect("a little memory"))
}

fn filled(backing: Backing) -> Arc<GuestRam> {
    let ram = ram(backing);
    for (region, page) in FULL {
        ram.pages(region, page, 1)
            .expect("in range")
            .write_from(&pattern(region, page));
    }
    // Touched, and zero all the same.
    ram.pages(1, 40, 1)
        .expect("in range")
        .write_from(&[0; PAGE_SIZE as usize]);
    ram
}

fn check_filled(ram: &GuestRam) {
    let mut page_now = [0; PAGE_SIZE as usize];
    for (region, range) in RANGES.iter().enumerate() {
        for page in 0..range.len / PAGE_SIZE {
            ram.pages(region, page, 1)
                .expect("in range")
                .read_into(&mut page_now);
            match FULL.contains(&(region, page)) {
                true => assert_eq!(
                    page_now,
                    pattern(region, page),
                    "region {region}, page {page}"
                ),
                false => assert!(
                    page_now.iter().all(|b| *b == 0),
                    "region {region}, page {page}"
                ),
            }
        }
    }
}

fn manifest() -> Manifest {
    Manifest {
        vmm_version: "1.2.3".into(),
        config: "{}".into(),
        vcpus: 1,
        memory: RANGES.to_vec(),
        ..Manifest::default()
    }
}

fn state() -> MachineState {
    MachineState {
        devices: vec![DeviceState {
            id: "serial0".into(),
            kind: "serial".into(),
            version: 3,
            data: Bytes(vec![1, 2, 3]),
        }],
        ..MachineState::default()
    }
}

/// A machine of memory only.
struct Fake {
    backing: Backing,
    refuses: bool,
    ram: Option<Arc<GuestRam>>,
    state: Option<MachineState>,
    resumed: bool,
    discarded: bool,
}

impl Fake {
    fn new(backing: Backing) -> Self {
        Self {
            backing,
            refuses: false,
            ram: None,
            state: None,
            resumed: false,
            discarded: false,
        }
    }
}

impl DestinationMachine for Fake {
    fn reserve(&mut self, seen: &Manifest) -> Result<Arc<GuestRam>, Vec<Refusal>> {
        assert_eq!(*seen, manifest());
        if self.refuses {
            return Err(vec![Refusal::new(RefusalKind::Cpu, "no AMX here")]);
        }
        let ram = ram(self.backing);
        self.ram = Some(Arc::clone(&ram));
        Ok(ram)
    }

    fn restore(&mut self, state: MachineState) -> Result<(), MachineError> {
        self.state = Some(state);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.resumed = true;
        Ok(())
    }

    fn discard(&mut self) {
        self.discarded = true;
    }
}

fn saved(backing: Backing) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("snapshot");
    let report = save(
        &directory,
        manifest(),
        state(),
        &filled(backing),
        &MoveControl::new(),
    )
    .expect("saved");
    assert_eq!(report.bytes_written, FULL.len() as u64 * PAGE_SIZE);
    (folder, directory)
}

fn restored(directory: &Path, backing: Backing, loading: Loading) -> (Fake, RestoreReport) {
    let mut machine = Fake::new(backing);
    let control = MoveControl::new();
    let report = restore(directory, &mut machine, loading, &control).expect("restored");
    assert_eq!(control.progress().phase, Phase::Complete);
    (machine, report)
}

/// Why the snapshot is refused; also that nothing is left of the machine.
fn refusal(directory: &Path, loading: Loading) -> SnapshotError {
    let mut machine = Fake::new(ANONYMOUS);
    match restore(directory, &mut machine, loading, &MoveControl::new()) {
        Err(RestoreError::Snapshot(error)) => {
            assert!(machine.discarded && machine.state.is_none());
            error
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn comes_back_as_it_was_by_every_way_and_more_than_once() {
    for from in [ANONYMOUS, MEMFD] {
        let (folder, directory) = saved(from);
        for (to, loading, used) in [
            (ANONYMOUS, Loading::Lazy, Loading::Lazy),
            (ANONYMOUS, Loading::Lazy, Loading::Lazy),
            (ANONYMOUS, Loading::Verified, Loading::Verified),
            (MEMFD, Loading::Lazy, Loading::Verified),
        ] {
            let (machine, report) = restored(&directory, to, loading);
            assert_eq!(report.loading, used);
            let state_now = machine.state.expect("a state");
            assert_eq!(state_now.run_state, RunState::Paused);
            assert_eq!(state_now.devices, state().devices);
            assert!(machine.resumed && !machine.discarded);
            let ram = machine.ram.expect("memory");
            check_filled(&ram);
            // It goes on to write, and no other restore sees it.
            ram.pages(0, 0, 1)
                .expect("in range")
                .write_from(&[9; PAGE_SIZE as usize]);
        }
        let names: Vec<_> = fs::read_dir(folder.path()).expect("a folder").collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }
}

#[test]
fn zero_pages_are_neither_written_nor_become_resident() {
    let (_folder, directory) = saved(ANONYMOUS);
    let metadata = fs::metadata(directory.join(MEMORY)).expect("there");
    assert_eq!(metadata.len(), 12 * MIB + 4 * PAGE_SIZE);
    assert!(
        metadata.blocks() * 512 < MIB,
        "{} blocks",
        metadata.blocks()
    );
    let (machine, _) = restored(
        &directory,
        Backing::Anonymous { thp: false },
        Loading::Verified,
    );
    let ram = machine.ram.expect("memory");
    let populated: u64 = (0..2)
        .map(|region| ram.populated(region).expect("readable").count())
        .sum();
    assert_eq!(populated, FULL.len() as u64);
}

#[test]
fn a_snapshot_of_a_lazily_restored_machine_lacks_nothing() {
    let (folder, directory) = saved(ANONYMOUS);
    let (machine, _) = restored(&directory, ANONYMOUS, Loading::Lazy);
    // Nobody has used a page of it yet, and the first snapshot may go.
    fs::remove_dir_all(&directory).expect("removed");
    let second = folder.path().join("second");
    let ram = machine.ram.expect("memory");
    let report =
        save(&second, manifest(), state(), &ram, &MoveControl::new()).expect("saved again");
    assert_eq!(report.bytes_written, FULL.len() as u64 * PAGE_SIZE);
    drop(ram);
    let (machine, _) = restored(&second, ANONYMOUS, Loading::Verified);
    check_filled(&machine.ram.expect("memory"));
}

#[test]
fn the_files_are_for_nobody_else() {
    let (_folder, directory) = saved(ANONYMOUS);
    for (path, mode) in [
        (directory.clone(), 0o700),
        (directory.join(MANIFEST), 0o600),
        (directory.join(MEMORY), 0o600),
    ] {
        let mode_now = fs::metadata(&path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode_now & !mode, 0, "{}", path.display());
    }
}

#[test]
fn a_name_that_is_taken_is_refused_and_an_empty_directory_is_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let try_at = |path: &Path| {
        let ram = filled(ANONYMOUS);
        save(path, manifest(), state(), &ram, &MoveControl::new())
    };
    let directory = folder.path().join("a");
    fs::create_dir(&directory).expect("made");
    try_at(&directory).expect("an empty directory is as good as none");
    let again = try_at(&directory).expect_err("refused");
    assert!(matches!(again, SnapshotError::Exists(_)), "{again}");
    let file = folder.path().join("file");
    fs::write(&file, "mine").expect("written");
    let error = try_at(&file).expect_err("refused");
    assert!(matches!(error, SnapshotError::Exists(_)), "{error}");
    assert_eq!(fs::read(&file).expect("there"), b"mine");
    let error = try_at(&folder.path().join("no/such")).expect_err("refused");
    assert!(error.to_string().contains("no/"), "{error}");
    restored(&directory, ANONYMOUS, Loading::Verified);
}

#[test]
fn a_cancel_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("snapshot");
    let control = MoveControl::new();
    assert!(control.cancel());
    let error = save(
        &directory,
        manifest(),
        state(),
        &filled(ANONYMOUS),
        &control,
    )
    .expect_err("cancelled");
    assert!(error.is_cancelled());
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);

    let (_folder, directory) = saved(ANONYMOUS);
    for loading in [Loading::Lazy, Loading::Verified] {
        let control = MoveControl::new();
        assert!(control.cancel());
        let mut machine = Fake::new(ANONYMOUS);
        let error = restore(&directory, &mut machine, loading, &control).expect_err("cancelled");
        assert!(error.is_cancelled() && machine.discarded && !machine.resumed);
    }
}

#[test]
fn the_hosts_refusal_is_passed_on() {
    let (_folder, directory) = saved(ANONYMOUS);
    let mut machine = Fake::new(ANONYMOUS);
    machine.refuses = true;
    let error =
        restore(&directory, &mut machine, Loading::Lazy, &MoveControl::new()).expect_err("refused");
    assert!(error.to_string().contains("no AMX here"), "{error}");
    assert!(machine.discarded);
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for missing in [folder.path().to_owned(), folder.path().join("nothing")] {
        let error = refusal(&missing, Loading::Lazy);
        assert!(matches!(error, SnapshotError::NotThere(_)), "{error}");
    }
    for foreign in [
        "",
        "VMM",
        "{\"json\": 1}",
        "some text that is longer than a header is",
    ] {
        fs::write(folder.path().join(MANIFEST), foreign).expect("written");
        let error = refusal(folder.path(), Loading::Lazy);
        assert!(matches!(error, SnapshotError::Foreign(_)), "{error}");
    }
}

#[test]
fn another_version_is_refused_before_anything_else_is_read() {
    let (_folder, directory) = saved(ANONYMOUS);
    let path = directory.join(MANIFEST);
    let mut bytes = fs::read(&path).expect("there");
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    // Nothing else needs to be as this version has it.
    bytes[12..].fill(0xee);
    fs::write(&path, bytes).expect("written");
    let error = refusal(&directory, Loading::Lazy);
    assert!(
        matches!(
            error,
            SnapshotError::Version {
                found: 2,
                known: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn every_flipped_bit_of_the_manifest_is_found() {
    let (_folder, directory) = saved(ANONYMOUS);
    let path = directory.join(MANIFEST);
    let good = fs::read(&path).expect("there");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, bad).expect("written");
        let error = refusal(&directory, Loading::Lazy);
        let right = match at {
            0..8 => matches!(error, SnapshotError::Foreign(_)),
            8..12 => matches!(error, SnapshotError::Version { .. }),
            _ => matches!(error, SnapshotError::Damaged { .. }),
        };
        assert!(right, "byte {at}: {error}");
    }
    fs::write(&path, good).expect("written");
    restored(&directory, ANONYMOUS, Loading::Lazy);
}

#[test]
fn every_wrong_length_of_the_manifest_is_found() {
    let (_folder, directory) = saved(ANONYMOUS);
    let path = directory.join(MANIFEST);
    let good = fs::read(&path).expect("there");
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).expect("written");
        let error = refusal(&directory, Loading::Lazy);
        let right = match length {
            0..8 => matches!(error, SnapshotError::Foreign(_)),
            _ => matches!(error, SnapshotError::Damaged { .. }),
        };
        assert!(right, "{length} bytes: {error}");
    }
    let mut longer = good.clone();
    longer.push(0);
    fs::write(&path, longer).expect("written");
    let error = refusal(&directory, Loading::Lazy);
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
}

/// A manifest whose checksums are right and whose contents are not.
#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    type Change = fn(&mut format::Body);
    let changes: [(&str, Change); 6] = [
        ("ranges", |body| {
            body.manifest.memory.pop();
        }),
        ("endless ranges", |body| {
            body.manifest.memory[0].len = u64::MAX - 4095;
        }),
        ("bytes", |body| body.memory.bytes += PAGE_SIZE),
        ("no chunks", |body| body.memory.chunk_bytes = 0),
        ("odd chunks", |body| body.memory.chunk_bytes = 4097),
        ("sums", |body| {
            body.memory.sums.0.pop();
        }),
    ];
    for (name, change) in changes {
        let (_folder, directory) = saved(ANONYMOUS);
        let path = directory.join(MANIFEST);
        let mut body = format::read(&path).expect("good");
        change(&mut body);
        fs::write(&path, format::encode(&body).expect("encoded")).expect("written");
        let error = refusal(&directory, Loading::Lazy);
        assert!(
            matches!(error, SnapshotError::Damaged { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn damaged_memory_is_found_by_reading_it() {
    let (_folder, directory) = saved(ANONYMOUS);
    let path = directory.join(MEMORY);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("there");
    // In a page that is full, in a hole of a chunk with data, in a chunk that is all hole.
    for at in [5, 3 * PAGE_SIZE + 17, 3 * MIB, 12 * MIB + 3 * PAGE_SIZE - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("readable");
        file.write_all_at(&[byte[0] ^ 4], at).expect("writable");
        let error = refusal(&directory, Loading::Verified);
        assert!(
            matches!(error, SnapshotError::Damaged { .. }),
            "{at}: {error}"
        );
        let opened = Snapshot::open(&directory).expect("its manifest is good");
        opened
            .verify(&MoveControl::new())
            .expect_err("damaged memory");
        // A lazy restore cannot know, and does not say that it does.
        restored(&directory, ANONYMOUS, Loading::Lazy);
        file.write_all_at(&byte, at).expect("writable");
    }
    // Data that became a hole.
    file.write_all_at(&[0; PAGE_SIZE as usize], 0)
        .expect("writable");
    let error = refusal(&directory, Loading::Verified);
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
}

#[test]
fn memory_that_is_cut_or_of_another_snapshot_is_found_even_lazily() {
    let (_folder, directory) = saved(ANONYMOUS);
    let (_other_folder, other) = saved(ANONYMOUS);
    let path = directory.join(MEMORY);
    let good = fs::read(&path).expect("there");
    for length in [0, 1, good.len() - 1, good.len() - 4096, good.len() + 1] {
        let mut bytes = good.clone();
        bytes.resize(length, 0);
        fs::write(&path, bytes).expect("written");
        let error = refusal(&directory, Loading::Lazy);
        assert!(
            matches!(error, SnapshotError::Damaged { .. }),
            "{length}: {error}"
        );
    }
    fs::copy(other.join(MEMORY), &path).expect("copied");
    let error = refusal(&directory, Loading::Lazy);
    assert!(error.to_string().contains("another snapshot"), "{error}");
    fs::write(&path, vec![0; good.len()]).expect("written");
    let error = refusal(&directory, Loading::Lazy);
    assert!(error.to_string().contains("last page"), "{error}");
    fs::remove_file(&path).expect("removed");
    let error = refusal(&directory, Loading::Lazy);
    assert!(error.to_string().contains(MEMORY), "{error}");
    // A copy without holes is as good.
    fs::write(&path, good).expect("written");
    let (machine, _) = restored(&directory, ANONYMOUS, Loading::Verified);
    check_filled(&machine.ram.expect("memory"));
}
