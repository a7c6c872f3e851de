//! Programs that run inside a Linux guest of the lab, each on its own: `features` (what the processor computes), `clocks` (what time it is),
//! `writes` (what a disk keeps), `fill` (what memory keeps), `vsock` (connections to the host); and on its host: `passed` (opens a TAP for a
//! program). They need nothing but a C library, and say what they
//! found in a file or on the console.

use std::io;
use std::path::Path;

/// Replaces a file, so that whoever looks sees all of the new content or all of the old.
pub fn replace(path: &Path, content: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, content)?;
    std::fs::rename(&new, path)
}
