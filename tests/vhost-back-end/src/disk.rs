//! A disk (Virtual I/O Device 1.3, section 5.2): reads, writes, flushes.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::FileExt;

use crate::memory::Memory;
use crate::ring::Request;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const UNSUPPORTED: u8 = 2;
/// SEG_MAX, BLK_SIZE, FLUSH, MQ.
pub(crate) const FEATURES: u64 = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12;

/// An image.
pub(crate) struct Disk {
    file: File,
    sectors: u64,
}

impl Disk {
    pub(crate) fn open(path: &str) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let sectors = file.metadata()?.len() / 512;
        Ok(Self { file, sectors })
    }

    /// `struct virtio_blk_config`, its first 60 bytes.
    pub(crate) fn space(&self, queues: usize) -> Vec<u8> {
        let mut space = vec![0; 60];
        space[..8].copy_from_slice(&self.sectors.to_le_bytes());
        space[12..16].copy_from_slice(&126u32.to_le_bytes());
        space[20..24].copy_from_slice(&512u32.to_le_bytes());
        space[34..36].copy_from_slice(&(queues as u16).to_le_bytes());
        space
    }

    /// Carries a request out; how many bytes were written to the guest.
    pub(crate) fn serve(&self, memory: &Memory, request: &Request) -> Result<u32> {
        let mut header = [0; 16];
        let (Some(&(head, ..)), Some(&(status, ..))) =
            (request.parts.first(), request.parts.last())
        else {
            return Ok(0);
        };
        memory.read(head, &mut header)?;
        let [a, b, c, d, _, _, _, _, place @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let mut at = u64::from_le_bytes(place) * 512;
        let data = request
            .parts
            .get(1..request.parts.len() - 1)
            .unwrap_or_default();
        let mut written = 1;
        for &(gpa, len, _) in data {
            let mut bytes = vec![0; len as usize];
            match kind {
                IN => {
                    self.file.read_exact_at(&mut bytes, at)?;
                    memory.write(gpa, &bytes)?;
                    written += len;
                }
                OUT => {
                    memory.read(gpa, &mut bytes)?;
                    self.file.write_all_at(&bytes, at)?;
                }
                _ => {}
            }
            at += u64::from(len);
        }
        if kind == FLUSH {
            self.file.sync_data()?;
        }
        let answer = if matches!(kind, IN | OUT | FLUSH) {
            OK
        } else {
            UNSUPPORTED
        };
        memory.write(status, &[answer])?;
        Ok(written)
    }
}
