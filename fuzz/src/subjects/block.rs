//! A disk on a file in memory, by system calls: io_uring gives the same operations to the kernel, but not at the same moment each time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::block::{Block, DiskConfig, EngineKind};

use super::{Subject, number};
use crate::machine::{Driver, Host};

/// Size of the image in bytes, and the most that it grows to.
const SIZE: u64 = 256 << 10;
const MOST: u64 = 1 << 20;

struct Image {
    file: File,
    block: Arc<Block>,
    read_only: bool,
}

impl Host for Image {
    fn event(&mut self, kind: u8, data: &[u8]) {
        let bytes = u64::from(number(data).0) * 512 % MOST;
        match kind % 3 {
            // An operator's wish, which may be refused.
            0 => drop(self.block.resize(Some(bytes))),
            // Somebody else changes the file, and it is noticed or not.
            1 => self.file.set_len(bytes.max(512)).expect("memory"),
            _ => drop(self.block.resize(None)),
        }
    }

    fn settle(&mut self) {
        self.file.set_len(SIZE).expect("memory");
        assert_eq!(self.block.resize(None).expect("it has a size"), SIZE);
    }

    /// The image has lost a part that the guest knows of.
    fn may_refuse(&self) -> bool {
        self.file.metadata().expect("a size").len() < self.block.capacity_bytes()
    }

    fn features(&self) -> u64 {
        u64::from(u32::MAX) & !(1 << 29)
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        let header = |kind: u32, sector: u64| {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(sector.to_le_bytes());
            bytes
        };
        let pattern = [0x5a; 512];
        let (status, _) = driver.request(0, &[&header(1, 3), &pattern], &[1]);
        assert_eq!(status, [u8::from(self.read_only)]);
        let (data, len) = driver.request(1, &[&header(0, 3)], &[512, 1]);
        assert_eq!((data[512], len), (0, 513));
        if !self.read_only {
            assert_eq!(data[..512], pattern);
            let (status, _) = driver.request(0, &[&header(4, 0)], &[1]);
            assert_eq!(status, [0]);
        }
        let (serial, _) = driver.request(0, &[&header(8, 0)], &[20, 1]);
        assert_eq!((&serial[..4], serial[20]), (&b"fuzz"[..], 0));
        let capacity = u64::from_le_bytes(driver.read(0x2000));
        assert_eq!(capacity * 512, SIZE);
    }
}

/// The device.
pub fn block(read_only: bool) -> Subject {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("disk", flags).expect("memory"));
    file.set_len(SIZE).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let config = DiskConfig {
        read_only,
        num_queues: 2,
        engine: Some(EngineKind::Sync),
        serial: Some("fuzz".to_owned()),
        ..DiskConfig::new(path)
    };
    let block = Arc::new(Block::new("disk", config).expect("a disk"));
    let image = Image {
        file,
        block: block.clone(),
        read_only,
    };
    (block, Box::new(image))
}
