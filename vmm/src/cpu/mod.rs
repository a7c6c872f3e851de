//! CPU models and hosts: from the names in a config and the files on a disk to what `arch` works with.
//!
//! ```text
//!   cpus.model, cpus.features ──resolve──► CpuModel ──► what a guest is shown (machine)
//!   NAME or FILE ─────────────load──────┘
//!   this host ─────────────────dump──► CpuDump ──► `vmm cpu …`, GET /cpu
//! ```

mod host;
mod model;
mod verify;

pub(crate) use host::dump;
pub(crate) use model::{check, list, load, offered, resolve};
pub(crate) use verify::{Verdict, verify};

/// Longest file of a model or a dump, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Reads a file that somebody else wrote.
pub(crate) fn read_file(path: &std::path::Path) -> Result<Vec<u8>, String> {
    let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
    let length = std::fs::metadata(path).map_err(wrong)?.len();
    if length > MAX_FILE {
        return Err(format!(
            "{}: {length} bytes are too many; is it the right file?",
            path.display()
        ));
    }
    std::fs::read(path).map_err(wrong)
}
