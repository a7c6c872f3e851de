//! A disk with its driver, for tests: on files of a temporary folder, over the engines, with and without O_DIRECT.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

pub(super) const SIZE: u64 = 4 << 20;

/// How a disk is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) engine: EngineKind,
    pub(super) direct: bool,
}

/// Those that this host has: io_uring and O_DIRECT may be refused.
pub(super) fn ways(folder: &Path) -> Vec<Way> {
    let probe = NamedTempFile::new_in(folder).expect("a file");
    probe.as_file().set_len(SIZE).expect("a size");
    let mut all = Vec::new();
    for engine in [EngineKind::Sync, EngineKind::IoUring] {
        for direct in [false, true] {
            let config = DiskConfig {
                direct,
                engine: Some(engine),
                ..DiskConfig::new(probe.path())
            };
            match Block::new("probe", config) {
                Ok(_) => all.push(Way { engine, direct }),
                Err(error @ (DiskError::Engine { .. } | DiskError::Direct { .. })) => {
                    eprintln!("left out: {error}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    all
}

/// A folder on a file system that is likely to have O_DIRECT.
pub(super) fn folder() -> TempDir {
    let program = std::env::current_exe().expect("this program");
    tempfile::tempdir_in(program.parent().expect("its folder")).expect("a folder")
}

/// A running disk, its driver and its file.
pub(super) struct Machine {
    pub(super) block: Block,
    pub(super) driver: Driver,
    pub(super) file: NamedTempFile,
}

impl Machine {
    pub(super) fn new(folder: &Path, way: Way, change: impl FnOnce(&mut DiskConfig)) -> Self {
        let mut file = NamedTempFile::new_in(folder).expect("a file");
        let pattern: Vec<u8> = (0..SIZE).map(pattern).collect();
        file.write_all(&pattern).expect("room");
        let mut config = DiskConfig {
            direct: way.direct,
            engine: Some(way.engine),
            serial: Some("serial-0123456789".to_owned()),
            ..DiskConfig::new(file.path())
        };
        change(&mut config);
        let block = Block::new("disk", config).expect("a disk");
        let driver = Driver::new(0);
        Self::start(block, driver, file)
    }

    pub(super) fn start(block: Block, driver: Driver, file: NamedTempFile) -> Self {
        block.connect(driver.interrupt.clone());
        block.set_features(block.features());
        block.start_queue(driver.queue()).expect("a thread");
        Self {
            block,
            driver,
            file,
        }
    }

    /// Makes a request and waits for it; returns the status, the data and the length that was said.
    pub(super) fn ask(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[&[u8]],
        room: &[u32],
    ) -> (u8, Vec<u8>, u32) {
        let head = self.offer(kind, sector, data, room);
        let (used, len) = self.driver.wait_used();
        assert_eq!(used, head);
        let mut written = self.driver.written(head);
        let status = written.pop().expect("a status");
        (status, written, len)
    }

    pub(super) fn offer(&mut self, kind: u32, sector: u64, data: &[&[u8]], room: &[u32]) -> u16 {
        let header = header(kind, sector);
        let mut readable: Vec<&[u8]> = vec![&header];
        readable.extend(data);
        // A status of 0xff, to see that it is written.
        let mut parts = Vec::new();
        for bytes in readable {
            let at = self.driver.buffer(bytes.len() as u32);
            let memory = self.driver.memory();
            memory.write_slice(bytes, GuestAddress(at)).expect("RAM");
            parts.push((at, bytes.len() as u32, false));
        }
        for &len in room {
            parts.push((self.driver.buffer(len), len, true));
        }
        let status = self.driver.buffer(1);
        let memory = self.driver.memory();
        memory
            .write_slice(&[0xff], GuestAddress(status))
            .expect("RAM");
        parts.push((status, 1, true));
        self.driver.offer_parts(&parts)
    }

    pub(super) fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let range = range(sector, sectors, flags);
        self.ask(kind, 0, &[&range], &[]).0
    }

    pub(super) fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = File::open(self.file.path()).expect("the file");
        file.read_exact_at(&mut bytes, offset).expect("bytes");
        bytes
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let all = self.block.counters();
        all.iter().find(|(it, _)| *it == name).expect("a counter").1
    }
}

fn pattern(at: u64) -> u8 {
    (at % 251) as u8 ^ (at >> 12) as u8 | 1
}

pub(super) fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(pattern).collect()
}

/// Compares without printing megabytes.
pub(super) fn same(left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len());
    let differs = left
        .iter()
        .zip(right)
        .position(|(left, right)| left != right);
    assert_eq!(differs, None, "the first byte that differs");
}

pub(super) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Runs a body over all ways, each on a new disk.
pub(super) fn each(body: impl Fn(&mut Machine)) {
    each_with(|_| {}, body);
}

/// The same with a change of the configuration.
pub(super) fn each_with(change: impl Fn(&mut DiskConfig), body: impl Fn(&mut Machine)) {
    let folder = folder();
    for way in ways(folder.path()) {
        eprintln!("{way:?}");
        body(&mut Machine::new(folder.path(), way, &change));
    }
}
