//! A temporary folder for one run: initramfs and sockets, removed when the run ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

const PREFIX: &str = "vmm-lab-";

/// A folder that goes when this value is dropped.
#[derive(Debug)]
pub(crate) struct Workdir(PathBuf);

impl Workdir {
    /// Creates a folder named after this process, after clearing those of processes that were killed.
    pub(crate) fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// A path inside.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        // Nothing to be done if it fails; the next run sweeps.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes folders whose process is gone: Ctrl-C leaves no time to clean up.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let process = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|rest| rest.split_once('-'));
        if let Some((process, _)) = process
            && process.parse::<u32>().is_ok()
            && !Path::new("/proc").join(process).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_gone_after_its_use_even_on_panic() {
        let folder = Workdir::new().unwrap();
        let path = folder.join("");
        fs::write(folder.join("file"), "data").unwrap();
        let result = std::panic::catch_unwind(move || {
            let _keep = &folder;
            assert!(folder.join("file").is_file());
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(result.is_err());
        assert!(!path.exists());
    }
}
