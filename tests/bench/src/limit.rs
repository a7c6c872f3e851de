//! The limit: a plain copy of as many bytes over TCP loopback, from filled into fresh huge-page memory, by one thread at
//! each end.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ptr;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use serde_json::{Value, json};

use crate::Common;
use crate::stats::{cell, median_of, rounded};

/// Size of one read or write in bytes.
const CHUNK: usize = 1 << 20;

/// Anonymous memory with huge pages advised.
struct Memory {
    start: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Result<Self> {
        // SAFETY: a new anonymous mapping, of which only `Memory` knows.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        // SAFETY: the mapping just made.
        unsafe { madvise(start, len, Advice::LinuxHugepage)? };
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as `self` and is borrowed from it mutably; anonymous memory is zero-initialised.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nobody borrows it any more.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            eprintln!("bench: munmap: {error}");
        }
    }
}

/// Touches as much memory as a destination will need, and gives it back.
///
/// Where this machine is a virtual one that reports its free memory, its host takes that back and hands it out again at a
/// second a GiB: several times what a move costs. So this is called right before each measurement, of whichever side.
pub(crate) fn warm(mib: u64) -> Result<()> {
    let mut memory = Memory::new(usize::try_from(mib << 20)?)?;
    for page in memory.bytes().chunks_mut(4096) {
        page[0] = 1;
    }
    Ok(())
}

/// Copies `mib` MiB once.
pub(crate) fn copied(mib: u64) -> Result<Value> {
    let len = usize::try_from(mib << 20)?;
    let mut source = Memory::new(len)?;
    for page in source.bytes().chunks_mut(4096) {
        page.fill(0xa5);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    warm(mib)?;
    let begin = Instant::now();
    let receiver = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut destination = Memory::new(len)?;
        for chunk in destination.bytes().chunks_mut(CHUNK) {
            stream.read_exact(chunk)?;
        }
        stream.write_all(&[1])?;
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    for chunk in source.bytes().chunks(CHUNK) {
        stream.write_all(chunk)?;
    }
    stream.read_exact(&mut [0])?;
    let elapsed = begin.elapsed();
    receiver
        .join()
        .ok()
        .context("the receiving thread panicked")??;
    Ok(json!({
        "total_ms": elapsed.as_secs_f64() * 1000.0,
        "bytes_per_s": len as f64 / elapsed.as_secs_f64(),
    }))
}

/// Runs and prints.
pub(crate) fn run(options: Common) -> Result<()> {
    let mib = 2048;
    let runs = (0..options.runs)
        .map(|_| Ok(json!({"limit": copied(mib)?})))
        .collect::<Result<Vec<_>>>()?;
    let result = json!({
        "case": "limit",
        "bytes": mib << 20,
        "limit": {
            "total_ms": rounded(median_of(&runs, "limit", "total_ms")),
            "bytes_per_s": rounded(median_of(&runs, "limit", "bytes_per_s")),
        },
        "runs": runs,
    });
    if options.json {
        println!("{result}");
    } else {
        println!("{mib} MiB over TCP loopback into fresh huge pages:");
        println!(
            "{} ms, {} bytes/s",
            cell(&result["limit"]["total_ms"]),
            cell(&result["limit"]["bytes_per_s"])
        );
    }
    Ok(())
}
