//! A raw disk image or block device: opened, locked, measured.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::engine::EngineKind;
use super::error::DiskError;
use super::host;
use crate::rate_limiter::RateLimiterConfig;

/// The unit of the protocol in bytes, whatever the block size (section 5.2.4).
pub const SECTOR: u64 = 512;

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// The guest cannot write, nor is the file opened for it.
    pub read_only: bool,
    /// Past the host's page cache, with O_DIRECT.
    pub direct: bool,
    /// What the guest sees as serial number, at most 20 bytes.
    pub serial: Option<String>,
    /// 1 to 64.
    pub num_queues: u16,
    /// Descriptors of a queue, a power of two from 4 on.
    pub queue_size: u16,
    /// All queues together; none is no limit.
    pub rate_limiter: Option<RateLimiterConfig>,
    /// How the host is asked; none chooses what it has.
    pub engine: Option<EngineKind>,
}

impl DiskConfig {
    /// A writable disk with one queue of 256 and the host's page cache.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: false,
            serial: None,
            num_queues: 1,
            queue_size: 256,
            rate_limiter: None,
            engine: None,
        }
    }
}

/// What O_DIRECT asks for, in bytes, each a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory.
    pub(super) memory: u64,
    /// Of offsets in the file and of lengths.
    pub(super) offset: u64,
}

/// Which of a disk's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    /// Through the page cache.
    Cache,
    /// With O_DIRECT.
    Direct,
}

/// An open disk. It stays locked for as long as it is open, unless [`Disk::unlock`] says otherwise.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    read_only: bool,
    block_device: bool,
    /// Has the lock. A description of its own, which no ring knows: a ring lets its files go some time after it is closed, even by the end
    /// of the process, and the next machine would find the disk in use.
    locked: File,
    cached: File,
    direct: Option<(File, Alignment)>,
    logical_block: u32,
    physical_block: u32,
    /// Bytes in which space can be given back; none if it cannot.
    discard: Option<u32>,
    /// Held while the size is changed.
    resizing: Mutex<()>,
    /// Whether it has the lock.
    held: Mutex<bool>,
}

impl Disk {
    /// Opens and locks it.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let disk = Self::open_unlocked(config)?;
        disk.lock()?;
        Ok(disk)
    }

    /// Opens it without the lock, for a machine that is being moved here while the other side still holds it. Nothing may be written until
    /// [`Disk::lock`] has succeeded.
    pub fn open_unlocked(config: &DiskConfig) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let cached = open_file(&path, config.read_only)?;
        let query = |what| {
            let path = path.clone();
            move |source| DiskError::Query { path, what, source }
        };
        let metadata = cached.metadata().map_err(query("type"))?;
        let block_device = metadata.file_type().is_block_device();
        let (logical_block, physical_block) = if block_device {
            host::block_sizes(&cached).map_err(query("block size"))?
        } else {
            let preferred = u32::try_from(metadata.blksize()).unwrap_or(0);
            (SECTOR as u32, power_of_two(preferred, SECTOR as u32))
        };
        let locked = host::reopen(&cached, config.read_only, 0).map_err(query("descriptor"))?;
        let direct = config
            .direct
            .then(|| host::open_direct(&cached, config.read_only, block_device, logical_block))
            .transpose()
            .map_err(|source| DiskError::Direct {
                path: path.clone(),
                source,
            })?;
        let bytes = size_of(&cached, block_device).map_err(query("size"))?;
        if bytes < SECTOR {
            return Err(DiskError::TooSmall { path, bytes });
        }
        if !bytes.is_multiple_of(SECTOR) {
            tracing::warn!(
                path = %path.display(),
                bytes,
                "the disk's size is no multiple of 512; the guest does not see the rest"
            );
        }
        let discard = if config.read_only {
            None
        } else if block_device {
            host::device_discard(metadata.rdev())
        } else {
            host::file_discard(&cached, bytes).then_some(physical_block)
        };
        Ok(Self {
            path,
            read_only: config.read_only,
            block_device,
            locked,
            cached,
            direct,
            logical_block,
            physical_block,
            discard,
            resizing: Mutex::new(()),
            held: Mutex::new(false),
        })
    }

    /// Locks the whole file against other machines: for itself if it is writable, against writers if it is read-only.
    ///
    /// It is an open file description's lock, which the system keeps per inode: other names of the file are covered, other device nodes of
    /// the same block device are not.
    ///
    /// Another host may have written to a block device meanwhile: what this host's page cache has of it is forgotten. That takes time, so
    /// a disk that is locked already is left as it is.
    pub fn lock(&self) -> Result<(), DiskError> {
        let mut held = self.held();
        if *held {
            return Ok(());
        }
        self.try_lock()?;
        *held = true;
        if self.block_device
            && let Err(error) = host::forget_cache(&self.cached)
        {
            tracing::warn!(path = %self.path.display(), %error, "the page cache of the disk may be old");
        }
        Ok(())
    }

    fn try_lock(&self) -> Result<(), DiskError> {
        host::lock(&self.locked, !self.read_only).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => DiskError::InUse {
                path: self.path.clone(),
                holder: if self.read_only {
                    "a machine that writes to it"
                } else {
                    "another machine"
                },
            },
            _ => DiskError::Lock {
                path: self.path.clone(),
                source,
            },
        })
    }

    /// Lets another machine lock it. Nothing may be written from now on.
    ///
    /// What this host's page cache has for a block device is on it before: another host does not see the cache. (Of a file on a network,
    /// the file system takes care, by the lock.)
    pub fn unlock(&self) -> Result<(), DiskError> {
        let mut held = self.held();
        self.write_back().map_err(|source| DiskError::Lock {
            path: self.path.clone(),
            source,
        })?;
        // Whatever comes of it, the next lock asks the system.
        *held = false;
        host::unlock(&self.locked).map_err(|source| DiskError::Lock {
            path: self.path.clone(),
            source,
        })
    }

    /// Writes back what this host's page cache has for a block device, so that there is little left to write when [`Disk::unlock`] does
    /// it while a guest stands still.
    pub fn write_back(&self) -> io::Result<()> {
        match self.block_device && !self.read_only {
            true => self.cached.sync_data(),
            false => Ok(()),
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, bool> {
        self.held
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The size as it is now, in whole sectors of 512 bytes.
    pub fn sectors(&self) -> Result<u64, DiskError> {
        let bytes = self.bytes()?;
        if bytes < SECTOR {
            return Err(DiskError::TooSmall {
                path: self.path.clone(),
                bytes,
            });
        }
        Ok(bytes / SECTOR)
    }

    /// Grows an image to so many bytes. It never shrinks one, for data would be lost; a block device must have the size already.
    pub fn grow(&self, new: u64) -> Result<(), DiskError> {
        let _one = self
            .resizing
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let old = self.bytes()?;
        let refuse = |reason: &str| {
            Err(DiskError::Resize {
                path: self.path.clone(),
                old,
                new,
                reason: reason.to_owned(),
            })
        };
        if new == old {
            Ok(())
        } else if !new.is_multiple_of(SECTOR) {
            refuse("a size is a multiple of 512")
        } else if new < old {
            refuse("a disk does not shrink, for data would be lost")
        } else if self.read_only {
            refuse("it is read-only")
        } else if self.block_device {
            refuse("resize the block device on the host first")
        } else {
            self.cached
                .set_len(new)
                .or_else(|error| refuse(&error.to_string()))
        }
    }

    fn bytes(&self) -> Result<u64, DiskError> {
        size_of(&self.cached, self.block_device).map_err(|source| DiskError::Query {
            path: self.path.clone(),
            what: "size",
            source,
        })
    }

    /// Bytes of the smallest block that the guest is to use.
    pub(super) fn logical_block(&self) -> u32 {
        self.logical_block
    }

    /// Bytes of a block that is written without reading it first.
    pub(super) fn physical_block(&self) -> u32 {
        self.physical_block.max(self.logical_block)
    }

    pub(super) fn discard(&self) -> Option<u32> {
        self.discard
    }

    pub(super) fn is_block_device(&self) -> bool {
        self.block_device
    }

    pub(super) fn alignment(&self) -> Option<Alignment> {
        self.direct.as_ref().map(|(_, alignment)| *alignment)
    }

    pub(super) fn file(&self, via: Via) -> &File {
        match (&self.direct, via) {
            (Some((direct, _)), Via::Direct) => direct,
            _ => &self.cached,
        }
    }

    /// The descriptors in the order of [`Via`].
    pub(super) fn descriptors(&self) -> [i32; 2] {
        [Via::Cache, Via::Direct].map(|via| self.file(via).as_raw_fd())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Not by closing alone: a child that another thread is just starting has a copy of the descriptor until it executes.
        if let Err(error) = self.unlock() {
            tracing::warn!(%error, "a disk stays locked for a moment");
        }
    }
}

/// Opens what is a file or a block device, and never waits for a FIFO's other end.
fn open_file(path: &Path, read_only: bool) -> Result<File, DiskError> {
    let refused = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT) => DiskError::Missing {
            path: path.to_owned(),
        },
        Some(libc::EISDIR) => DiskError::Kind {
            path: path.to_owned(),
            kind: "directory",
        },
        Some(libc::ENXIO) => DiskError::Kind {
            path: path.to_owned(),
            kind: "socket, or a device that is not there",
        },
        _ => DiskError::Open {
            path: path.to_owned(),
            access: if read_only {
                "reading"
            } else {
                "reading and writing"
            },
            source,
        },
    };
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(refused)?;
    let kind = file.metadata().map_err(refused)?.file_type();
    let kind = if kind.is_file() || kind.is_block_device() {
        // io_uring would not wait for such a file either.
        host::wait_again(&file).map_err(refused)?;
        return Ok(file);
    } else if kind.is_dir() {
        "directory"
    } else if kind.is_fifo() {
        "FIFO"
    } else if kind.is_char_device() {
        "character device"
    } else {
        "special file"
    };
    Err(DiskError::Kind {
        path: path.to_owned(),
        kind,
    })
}

fn size_of(file: &File, block_device: bool) -> io::Result<u64> {
    if block_device {
        // Nobody uses the position; the end of a block device is its size.
        let mut file = file;
        file.seek(SeekFrom::End(0))
    } else {
        Ok(file.metadata()?.len())
    }
}

/// A size that a file system says, made one that can be told to a guest.
fn power_of_two(bytes: u32, least: u32) -> u32 {
    if bytes.is_power_of_two() && (least..=1 << 20).contains(&bytes) {
        bytes
    } else {
        4096.max(least)
    }
}
