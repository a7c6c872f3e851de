//! Booting what is on a disk: there is no firmware, so the kernel is looked for as a boot loader would.
//!
//! ```text
//!   disks ─► whole, or partitions (GPT, MBR)      partitions.rs
//!              └─► ext2, ext3, ext4               files.rs: bounded reads
//!                    └─► which kernel             choice.rs
//!                          1. loader/entries/*.conf        Boot Loader Specification
//!                          2. grub/grub.cfg                the default entry's linux and initrd lines
//!                          3. vmlinuz and initrd.img       links, as Debian keeps them
//!                          4. the newest vmlinuz-VERSION and its initrd
//!                                └─► Found: kernel and initramfs in memory of their own, command line
//! ```
//!
//! It happens at each boot and each reset of the guest, so that a guest that has installed a new kernel reboots into it. The guest writes all
//! of this: everything that is read is bounded, in each file and in all, nothing is followed for ever, and what makes no sense is an error
//! that says what was looked at.

mod choice;
mod files;
mod partitions;

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Why a disk does not boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskBootError {
    /// No disk has a kernel.
    #[error("no disk has a kernel to boot; looked at {0}")]
    Nothing(String),
    /// What was found cannot be loaded.
    #[error("disk {disk}: {reason}")]
    Unusable {
        /// Its id or path.
        disk: String,
        /// Why.
        reason: String,
    },
}

/// Where a machine's kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// The disk's id.
    pub disk: String,
    /// Number of the partition; none if the disk has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// What named the kernel: an entry or a link.
    pub by: String,
    /// The kernel's path in the file system.
    pub kernel: String,
    /// The initial RAM file systems' paths.
    pub initramfs: Vec<String>,
    /// The command line.
    pub cmdline: String,
}

/// A kernel that was found, ready to be loaded.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) booted: Booted,
    pub(crate) kernel: File,
    pub(crate) initramfs: Option<File>,
}

/// Looks for a kernel on the disks (id and path), one after the other. A command line of the operator's replaces that of an entry.
pub(crate) fn find(
    disks: &[(String, PathBuf)],
    cmdline: Option<&str>,
) -> Result<Found, DiskBootError> {
    let mut looked = Vec::new();
    for (id, path) in disks {
        match on_disk(id, path, cmdline, &mut looked) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(reason) => {
                return Err(DiskBootError::Unusable {
                    disk: id.clone(),
                    reason,
                });
            }
        }
    }
    Err(DiskBootError::Nothing(match looked.is_empty() {
        true => "no disk at all".to_owned(),
        false => looked.join("; "),
    }))
}

fn on_disk(
    id: &str,
    path: &Path,
    cmdline: Option<&str>,
    looked: &mut Vec<String>,
) -> Result<Option<Found>, String> {
    let failed = |error| format!("cannot read {}: {error}", path.display());
    let disk = File::open(path).map_err(failed)?;
    let parts = partitions::of(&disk).map_err(failed)?;
    for part in &parts {
        let place = match part.number {
            Some(number) => format!("{id}, partition {number}"),
            None => id.to_owned(),
        };
        let files = match files::Files::open(&disk, part) {
            Ok(files) => files,
            Err(reason) => {
                looked.push(format!("{place}: {reason}"));
                continue;
            }
        };
        match choice::choose(&files) {
            Ok(choice) => {
                let initramfs = match choice.initramfs.as_slice() {
                    [] => None,
                    paths => Some(files.copy(paths, files::MOST_INITRAMFS)?),
                };
                let kernel =
                    files.copy(std::slice::from_ref(&choice.kernel), files::MOST_KERNEL)?;
                return Ok(Some(Found {
                    booted: Booted {
                        disk: id.to_owned(),
                        partition: part.number,
                        by: choice.by,
                        kernel: choice.kernel,
                        initramfs: choice.initramfs,
                        cmdline: cmdline.unwrap_or(&choice.cmdline).to_owned(),
                    },
                    kernel,
                    initramfs,
                }));
            }
            Err(reason) => looked.push(format!("{place}: {reason}")),
        }
    }
    if parts.is_empty() {
        looked.push(format!("{id}: neither a file system nor a partition"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
