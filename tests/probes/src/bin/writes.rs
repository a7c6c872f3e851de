//! Writes a disk or a file, and looks whether it keeps what was written.
//!
//! ```text
//!   writes run TARGET STATUS   blocks at random places, past the page cache; each carries its place, a generation that rises, and a sum
//!                              of all that; every block that is read must be the last that was written there
//!   writes check TARGET        every block is whole and in its place, or was never written
//! ```
//!
//! `run` replaces STATUS twice a second with `writes-ok N writes, M reads, F flushes` and ends only by a signal, or with `WRITES-BAD why`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks of the target that are used, at most.
const MOST_BLOCKS: u64 = 4096;
/// Writes between two flushes.
const FLUSH_EVERY: u64 = 16;

/// O_DIRECT wants aligned memory.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// FNV-1a.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl Block {
    fn new(place: u64, generation: u64) -> Self {
        let mut block = Self([0; BLOCK]);
        let mut state = place << 32 ^ generation ^ 0x9e37_79b9_7f4a_7c15;
        for word in block.0.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
        }
        block.0[8..16].copy_from_slice(&place.to_le_bytes());
        block.0[16..24].copy_from_slice(&generation.to_le_bytes());
        let sum = sum(&block.0[8..]);
        block.0[..8].copy_from_slice(&sum.to_le_bytes());
        block
    }

    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// Whether it is a whole block of this place; its generation.
    fn generation(&self, place: u64) -> Result<u64, String> {
        if self.word(0) != sum(&self.0[8..]) {
            return Err(format!("block {place} is torn or foreign"));
        }
        if self.word(8) != place {
            return Err(format!("block {place} holds block {}", self.word(8)));
        }
        Ok(self.word(16))
    }
}

fn open(target: &Path, write: bool) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        // Who only checks may do so where there is no way past the cache.
        .custom_flags(if write { libc::O_DIRECT } else { 0 })
        .open(target)?;
    let len = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    Ok((file, (len / BLOCK as u64).min(MOST_BLOCKS)))
}

fn run(target: &Path, status: &Path) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what}: {error}");
    let (file, blocks) = open(target, true).map_err(|error| failed("open", error))?;
    let mut generations = vec![None; blocks as usize];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let (mut writes, mut reads, mut flushes) = (0u64, 0u64, 0u64);
    let mut told = Instant::now();
    println!("writes: {blocks} blocks");
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let place = (random >> 20) % blocks;
        let at = place * BLOCK as u64;
        let known = &mut generations[place as usize];
        match *known {
            Some(generation) if random & 3 == 0 => {
                let mut block = Block([0; BLOCK]);
                file.read_exact_at(&mut block.0, at)
                    .map_err(|error| failed("read", error))?;
                let found = block.generation(place)?;
                if found != generation {
                    return Err(format!(
                        "block {place} is of generation {found}, not {generation}"
                    ));
                }
                reads += 1;
            }
            _ => {
                writes += 1;
                file.write_all_at(&Block::new(place, writes).0, at)
                    .map_err(|error| failed("write", error))?;
                *known = Some(writes);
                if writes.is_multiple_of(FLUSH_EVERY) {
                    file.sync_data().map_err(|error| failed("flush", error))?;
                    flushes += 1;
                }
            }
        }
        if told.elapsed() > Duration::from_millis(500) || writes + reads == 1 {
            let line = format!("writes-ok {writes} writes, {reads} reads, {flushes} flushes\n");
            probes::replace(status, &line).map_err(|error| failed("status", error))?;
            told = Instant::now();
        }
    }
}

fn check(target: &Path) -> Result<(), String> {
    let (file, blocks) = open(target, false).map_err(|error| error.to_string())?;
    let (mut whole, mut newest) = (0, 0);
    for place in 0..blocks {
        let mut block = Block([0; BLOCK]);
        file.read_exact_at(&mut block.0, place * BLOCK as u64)
            .map_err(|error| format!("read: {error}"))?;
        if block.0 != [0; BLOCK] {
            newest = block.generation(place)?.max(newest);
            whole += 1;
        }
    }
    println!("check-ok {whole} of {blocks} blocks, newest {newest}");
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["run", target, status] => run(Path::new(target), Path::new(status)),
        ["check", target] => check(Path::new(target)),
        _ => {
            eprintln!("usage: writes run TARGET STATUS, or writes check TARGET");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("WRITES-BAD {why}");
            ExitCode::FAILURE
        }
    }
}
