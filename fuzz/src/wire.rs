//! What peers send and snapshots hold: the protocol of moves, and the manifest of a snapshot.
//!
//! The first byte of an input says which; sums and lengths that nobody could guess are put right.

use std::cell::OnceCell;
use std::path::PathBuf;

use memory::RamRange;
use migration::protocol::batch::{self, Attach, BatchHeader, RunDescriptor};
use migration::protocol::hello::{self, HelloHeader};
use migration::protocol::message::{self, FrameHeader, Message};
use migration::snapshot::{MANIFEST, MEMORY, Snapshot};
use tempfile::TempDir;
use zerocopy::FromBytes;

const RANGES: [RamRange; 2] = [
    RamRange {
        gpa: 0,
        len: 0xc000_0000,
    },
    RamRange {
        gpa: 1 << 32,
        len: 1 << 30,
    },
];

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Decodes an input, and what was decoded again.
pub fn run(data: &[u8]) -> u64 {
    let Some((which, data)) = data.split_first() else {
        return 0;
    };
    match which % 4 {
        0 => greet(data),
        1 => control(data),
        2 => pages(data),
        _ => snapshot(data),
    }
    0
}

fn greet(data: &[u8]) {
    let Ok((header, body)) = HelloHeader::read_from_prefix(data) else {
        return;
    };
    if let Ok(versions) = header.check()
        && let Ok(body) = hello::decode_body(body)
        && let Ok(bytes) = hello::encode(versions, &body)
    {
        let again = hello::decode_body(&bytes[HelloHeader::SIZE..]).expect("our own");
        assert_eq!(again, body);
        let _ = versions.newest_common(migration::protocol::VERSIONS);
    }
}

fn control(data: &[u8]) {
    let Ok((header, body)) = FrameHeader::read_from_prefix(data) else {
        return;
    };
    let Ok(message::Announced::Message(kind, len)) = header.check() else {
        return;
    };
    let body = &body[..body.len().min(len as usize)];
    if let Ok(message) = Message::decode(kind, body) {
        assert_eq!(message.kind(), kind);
        // Some numbers that can be read cannot be written back, such as those of devices without data.
        let bytes = message.encode().expect("it was a message");
        let again = Message::decode(kind, &bytes[FrameHeader::SIZE..]).expect("our own");
        assert_eq!(again, message);
    }
}

fn pages(data: &[u8]) {
    if let Ok((attach, _)) = Attach::read_from_prefix(data) {
        let _ = attach.check(attach.session, 4);
    }
    let Ok((header, rest)) = BatchHeader::read_from_prefix(data) else {
        return;
    };
    let Ok(batch::Announced::Pages { runs }) = header.check(1) else {
        return;
    };
    assert!(runs <= batch::MAX_RUNS);
    let runs = (runs as usize).min(rest.len() / RunDescriptor::SIZE);
    let table: Vec<_> = rest
        .chunks_exact(RunDescriptor::SIZE)
        .take(runs)
        .filter_map(|bytes| RunDescriptor::read_from_bytes(bytes).ok())
        .collect();
    let mut placed = Vec::new();
    if batch::place(&RANGES, &header, &table, &mut placed).is_err() {
        return;
    }
    let mut payload = 0;
    for run in &placed {
        let range = RANGES[run.region];
        assert!(run.pages > 0);
        assert!((run.first_page + run.pages) * memory::PAGE_SIZE <= range.len);
        if !run.zero {
            payload += run.pages * memory::PAGE_SIZE;
        }
    }
    assert_eq!(payload, header.payload_bytes.get());
    assert!(payload <= batch::MAX_PAYLOAD);
}

fn folder() -> PathBuf {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder");
            std::fs::write(folder.path().join(MEMORY), vec![0; 64 << 10]).expect("a file");
            folder
        });
        folder.path().to_owned()
    })
}

/// Magic, version, sum and length of the body, zero, sum.
fn snapshot(data: &[u8]) {
    let mut bytes = data.to_vec();
    if bytes.len() >= 32 {
        let body = crc32c::crc32c(&bytes[32..]);
        let len = bytes.len() as u64 - 32;
        bytes[12..16].copy_from_slice(&body.to_le_bytes());
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[..28]);
        bytes[28..32].copy_from_slice(&sum.to_le_bytes());
    }
    let folder = folder();
    std::fs::write(folder.join(MANIFEST), &bytes).expect("a file");
    if let Ok(snapshot) = Snapshot::open(&folder) {
        let _ = snapshot.manifest();
        let _ = snapshot.verify(&migration::MoveControl::default());
    }
}
