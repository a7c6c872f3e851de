//! What is refused as a disk, and locks.

use std::path::{Path, PathBuf};

use super::*;
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

fn image(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join(format!("{bytes}.raw"));
    let file = std::fs::File::create(&path).expect("a file");
    file.set_len(bytes).expect("a size");
    path
}

fn refusal(config: DiskConfig) -> DiskError {
    Block::new("disk", config).expect_err("no disk")
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = refusal(DiskConfig::new(folder.path().join("none.raw")));
    assert!(matches!(missing, DiskError::Missing { .. }));
    assert!(missing.to_string().contains("none.raw"), "{missing}");
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .expect("a FIFO");
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    for path in [folder.path(), &fifo, &socket, Path::new("/dev/null")] {
        for read_only in [false, true] {
            let error = refusal(DiskConfig {
                read_only,
                ..DiskConfig::new(path)
            });
            assert!(matches!(error, DiskError::Kind { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().expect("a path")));
        }
    }
    for bytes in [0, 511] {
        let error = refusal(DiskConfig::new(image(folder.path(), bytes)));
        assert!(matches!(error, DiskError::TooSmall { .. }), "{error}");
    }
    let inside = image(folder.path(), 512).join("inside");
    assert!(matches!(
        refusal(DiskConfig::new(inside)),
        DiskError::Open { .. }
    ));
}

#[test]
fn a_size_is_rounded_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = DiskConfig::new(image(folder.path(), 1535));
    let block = Block::new("disk", config).expect("a disk");
    assert_eq!(block.capacity_bytes(), 1024);
}

#[test]
fn numbers_that_cannot_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = DiskConfig::new(image(folder.path(), 4096));
    for (num_queues, queue_size) in [(0, 256), (65, 256), (1, 0), (1, 2), (1, 255), (1, 65535)] {
        let config = DiskConfig {
            num_queues,
            queue_size,
            ..config.clone()
        };
        assert!(matches!(refusal(config), DiskError::Queues { .. }));
    }
    let config = DiskConfig {
        serial: Some("012345678901234567890".to_owned()),
        rate_limiter: Some(RateLimiterConfig::default()),
        ..config
    };
    assert!(matches!(refusal(config), DiskError::Serial { len: 21, .. }));
}

#[test]
fn one_writer_or_many_readers() {
    let folder = tempfile::tempdir().expect("a folder");
    let writer = DiskConfig::new(image(folder.path(), 4096));
    let reader = DiskConfig {
        read_only: true,
        ..writer.clone()
    };
    let first = Block::new("disk", writer.clone()).expect("a disk");
    for second in [&writer, &reader] {
        let error = refusal(second.clone());
        assert!(matches!(error, DiskError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("in use"), "{error}");
    }
    // A move on one host: opened there, locked when this side has let it go.
    let moved = Disk::open_unlocked(&writer).expect("a disk");
    assert!(matches!(moved.lock(), Err(DiskError::InUse { .. })));
    first.disk().unlock().expect("a lock");
    moved.lock().expect("nobody else");
    assert!(matches!(first.disk().lock(), Err(DiskError::InUse { .. })));
    let driver = Driver::new(0);
    assert!(
        first.start_queue(driver.queue()).is_err(),
        "it may not write"
    );
    moved.unlock().expect("a lock");
    first.start_queue(driver.queue()).expect("it is back");
    assert!(matches!(moved.lock(), Err(DiskError::InUse { .. })));
    drop((first, moved));
    let _readers = [reader.clone(), reader].map(|it| Block::new("disk", it).expect("a disk"));
    assert!(matches!(refusal(writer), DiskError::InUse { .. }));
}
