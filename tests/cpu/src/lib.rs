//! Dumps of real processors (`dumps/`, see its README), for tests of CPU models.
//!
//! ```text
//!   dumps/*.json ──► dump(name) ──► tests/corpus.rs: comparisons of known pairs, baselines, built-in models
//! ```

use std::path::{Path, PathBuf};

use arch::x86_64::cpu_model::CpuDump;

/// The folder of the dumps.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dumps")
}

/// Names of all dumps, sorted.
pub fn names() -> std::io::Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(folder())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// A dump, as it would have been taken in 64-bit mode: Intel's processors say SYSCALL only there, and some sources asked in 32-bit mode.
pub fn dump(name: &str) -> Result<CpuDump, String> {
    let path = folder().join(format!("{name}.json"));
    let json = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut dump: CpuDump =
        serde_json::from_slice(&json).map_err(|error| format!("{}: {error}", path.display()))?;
    if let Some(leaf) = dump.cpuid.get_mut(0x8000_0001, 0) {
        leaf.edx |= 1 << 11;
    }
    Ok(dump)
}
