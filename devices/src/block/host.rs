//! What is asked of the host about a disk's file, one system call a function.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl, fcntl_setfl};

use super::disk::Alignment;

/// Alignment for O_DIRECT where the system does not tell: no disk asks for more.
const SAFE_ALIGNMENT: u64 = 4096;

/// BLKDISCARD of linux/fs.h: `_IO(0x12, 119)`, an offset and a length in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Takes O_NONBLOCK away.
pub(super) fn wait_again(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// The logical and the physical block size of a block device in bytes.
pub(super) fn block_sizes(device: &File) -> io::Result<(u32, u32)> {
    let logical = rustix::fs::ioctl_blksszget(device)?;
    let physical = rustix::fs::ioctl_blkpbszget(device)?;
    if !logical.is_power_of_two() || !physical.is_power_of_two() || logical < 512 {
        return Err(io::Error::other(format!(
            "blocks of {logical} and {physical} bytes"
        )));
    }
    Ok((logical, physical))
}

/// A second open file description of the same file: by its descriptor, for another file may be at the path by now.
pub(super) fn reopen(file: &File, read_only: bool, flags: i32) -> io::Result<File> {
    File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The same file with O_DIRECT, and what that asks for.
pub(super) fn open_direct(
    file: &File,
    read_only: bool,
    block_device: bool,
    logical_block: u32,
) -> io::Result<(File, Alignment)> {
    let direct = reopen(file, read_only, libc::O_DIRECT)?;
    let alignment = match direct_alignment(&direct) {
        Some(Alignment { offset: 0, .. }) => {
            return Err(io::Error::other("the file system has no direct I/O"));
        }
        Some(alignment) => alignment,
        None => Alignment {
            memory: SAFE_ALIGNMENT,
            offset: if block_device {
                logical_block.into()
            } else {
                SAFE_ALIGNMENT
            },
        },
    };
    if !alignment.offset.is_power_of_two() || !alignment.memory.is_power_of_two() {
        return Err(io::Error::other(format!("{alignment:?} is impossible")));
    }
    Ok((direct, alignment))
}

/// Asks statx, which knows from Linux 6.1 on.
fn direct_alignment(file: &File) -> Option<Alignment> {
    // SAFETY: statx is numbers only; zeros are one.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is empty and ends; `found` is a statx to be written.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut found,
        )
    };
    (result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0).then(|| Alignment {
        memory: found.stx_dio_mem_align.max(1).into(),
        offset: found.stx_dio_offset_align.into(),
    })
}

/// Forgets what the page cache has of a file, as far as it is written back.
pub(super) fn forget_cache(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: no pointers; the descriptor is open.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether space of a file can be given back. Asked far behind its end, where nothing is and nobody writes: it may be another machine's still,
/// which may grow it.
pub(super) fn file_discard(file: &File, bytes: u64) -> bool {
    let far = bytes.checked_add(1 << 42);
    let Some(behind) = far.and_then(|far| far.checked_next_multiple_of(1 << 20)) else {
        return false;
    };
    fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        behind,
        4096,
    )
    .is_ok()
}

/// In which units of bytes a block device discards; none if it does not.
pub(super) fn device_discard(device: u64) -> Option<u32> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let read = |name: &str| {
        // A partition's limits are those of its disk, one folder up.
        ["queue", "../queue"].iter().find_map(|queue| {
            let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        })
    };
    let most: u64 = read("discard_max_bytes")?;
    let unit: u64 = read("discard_granularity")?;
    (most > 0).then(|| u32::try_from(unit).unwrap_or(0).max(512))
}

/// Gives a range of a block device back, in bytes.
pub(super) fn discard(device: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: it reads two numbers of 64 bits.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Locks the whole file: to write, against all others; to read, against writers.
pub(super) fn lock(file: &File, write: bool) -> io::Result<()> {
    set_lock(file, if write { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Gives the lock up.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK)
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: flock is numbers only; zeros are one, and mean the whole file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: it reads a flock.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
