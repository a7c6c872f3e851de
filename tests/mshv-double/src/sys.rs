//! System calls made without libc's wrappers.
//!
//! This library *is* the process's `open`, `close`, `ioctl` and `mmap`, so it must never call those names itself: they
//! would land here again, possibly before any constructor ran or inside the allocator. The kernel is asked directly.

use std::ffi::{c_char, c_int, c_long, c_void};

/// The result of a driver call: what the ioctl returns, or the errno it fails with.
pub(crate) type Answer<T = i32> = Result<T, i32>;

/// Turns the kernel's convention (a small negative number is an error) into a `Result`.
fn checked(value: c_long) -> Answer<c_long> {
    if value == -1 {
        // SAFETY: the location of this thread's errno is always valid.
        Err(unsafe { *libc::__errno_location() })
    } else {
        Ok(value)
    }
}

/// `openat(2)`.
///
/// # Safety
///
/// `path` points to a C string.
pub(crate) unsafe fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: u32) -> Answer {
    // SAFETY: the caller vouches for the path; the kernel checks the rest.
    checked(unsafe { libc::syscall(libc::SYS_openat, dir, path, flags, mode) }).map(|fd| fd as i32)
}

/// `close(2)`.
pub(crate) fn close(fd: c_int) -> Answer {
    // SAFETY: closing a number is safe for memory; whose it is, the caller knows.
    checked(unsafe { libc::syscall(libc::SYS_close, fd) }).map(|value| value as i32)
}

/// `ioctl(2)` with a number or an address as its argument.
///
/// # Safety
///
/// If the request reads or writes memory at `argument`, that memory is valid for it.
pub(crate) unsafe fn ioctl(fd: c_int, request: u64, argument: usize) -> Answer {
    // SAFETY: vouched for by the caller.
    checked(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) })
        .map(|value| value as i32)
}

/// `mmap(2)`.
///
/// # Safety
///
/// As for `mmap(2)`: a fixed mapping replaces what was there.
pub(crate) unsafe fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Answer<*mut c_void> {
    // SAFETY: vouched for by the caller.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mmap,
            address,
            length,
            protection,
            flags,
            fd,
            offset,
        )
    })
    .map(|address| address as *mut c_void)
}

/// `munmap(2)`.
///
/// # Safety
///
/// Nothing uses the range any more.
pub(crate) unsafe fn munmap(address: *mut c_void, length: usize) {
    // SAFETY: vouched for by the caller.
    unsafe { libc::syscall(libc::SYS_munmap, address, length) };
}

/// A descriptor that stands for one of our objects in the client's hands: an empty memory file, so that `fstat`,
/// `poll` and `fcntl` on it behave.
pub(crate) fn placeholder(name: &std::ffi::CStr, close_on_exec: bool) -> Answer {
    let flags = if close_on_exec { libc::MFD_CLOEXEC } else { 0 };
    // SAFETY: the name is a C string.
    checked(unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), flags) })
        .map(|fd| fd as i32)
}

/// A file descriptor of ours that the client never sees.
#[derive(Debug)]
pub(crate) struct OwnFd(pub(crate) c_int);

impl Drop for OwnFd {
    fn drop(&mut self) {
        // Nothing can be done about an error here, and the kernel releases the descriptor in any case.
        let _ = close(self.0);
    }
}

/// Reads a structure from the client, as `copy_from_user` does.
///
/// # Safety
///
/// `address` is 0 or points to memory that holds a `T`; any bit pattern is a valid `T`.
pub(crate) unsafe fn copy_from<T: Copy>(address: u64) -> Answer<T> {
    if address < 4096 {
        return Err(libc::EFAULT);
    }
    // SAFETY: vouched for by the caller; alignment is not required.
    Ok(unsafe { (address as *const T).read_unaligned() })
}

/// Writes a structure to the client, as `copy_to_user` does.
///
/// # Safety
///
/// `address` is 0 or points to writable memory of at least the size of a `T`.
pub(crate) unsafe fn copy_to<T: Copy>(address: u64, value: &T) -> Answer<()> {
    if address < 4096 {
        return Err(libc::EFAULT);
    }
    // SAFETY: vouched for by the caller; alignment is not required.
    unsafe { (address as *mut T).write_unaligned(*value) };
    Ok(())
}

/// Whether refused requests are told on stderr (`MSHV_DOUBLE_LOG=1`).
pub(crate) fn logging() -> bool {
    static LOG: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *LOG.get_or_init(|| std::env::var_os("MSHV_DOUBLE_LOG").is_some_and(|value| value == "1"))
}

/// Tells on stderr, if asked to, why a request is refused.
macro_rules! note {
    ($($text:tt)*) => {
        if $crate::sys::logging() {
            eprintln!("mshv-double: {}", format_args!($($text)*));
        }
    };
}
pub(crate) use note;
