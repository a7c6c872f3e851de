//! The functions of libc that the double takes the place of.
//!
//! ```text
//!   open("/dev/mshv") ─► a placeholder descriptor, entered in the table     anything else ─► the kernel
//!   ioctl(type 0xB8)  ─► the object behind the descriptor                   anything else ─► the kernel
//!   close, mmap       ─► if the descriptor is in the table                  anything else ─► the kernel
//! ```
//!
//! Everything else goes straight to the kernel by system call. Looking up the next definition (`dlsym`) would be no
//! gain, as libc's functions do no more, and it may allocate, which must not happen here: the allocator itself calls `mmap`.
//! What is lost: they are no cancellation points.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::sys::{self, Answer};
use crate::table;

/// Hands a result to the caller in libc's way.
fn answer<T>(result: Answer<T>, failed: T) -> T {
    result.unwrap_or_else(|error| {
        // SAFETY: the location of this thread's errno is always valid.
        unsafe { *libc::__errno_location() = error };
        failed
    })
}

/// # Safety
///
/// `path` points to a C string, as for `openat(2)`.
unsafe fn open_at(directory: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: vouched for by the caller; the kernel would check it, we have to trust it.
    if !path.is_null() && unsafe { CStr::from_ptr(path) } == c"/dev/mshv" && !table::device_exists()
    {
        return answer(table::open(flags), -1);
    }
    // SAFETY: vouched for by the caller.
    answer(unsafe { sys::openat(directory, path, flags, mode) }, -1)
}

/// `open(2)`.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: vouched for by the caller.
    unsafe { open_at(libc::AT_FDCWD, path, flags, mode) }
}

/// `open(2)` under its large file name.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: u32) -> c_int {
    // SAFETY: vouched for by the caller.
    unsafe { open_at(libc::AT_FDCWD, path, flags, mode) }
}

/// `openat(2)`.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn openat(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: vouched for by the caller.
    unsafe { open_at(directory, path, flags, mode) }
}

/// `openat(2)` under its large file name.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn openat64(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: u32,
) -> c_int {
    // SAFETY: vouched for by the caller.
    unsafe { open_at(directory, path, flags, mode) }
}

/// `close(2)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn close(fd: c_int) -> c_int {
    // The object outlives its descriptor: another thread may be inside.
    let object = table::remove(fd);
    let result = sys::close(fd);
    drop(object);
    answer(result, -1)
}

/// `ioctl(2)`.
///
/// # Safety
///
/// As for the system call: `argument` is what the request demands.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn ioctl(fd: c_int, request: u64, argument: *mut c_void) -> c_int {
    // The driver's own type of requests; on any other descriptor they are somebody else's.
    if request >> 8 & 0xff == u64::from(mshv_bindings::MSHV_IOCTL)
        && let Some(object) = table::find(fd)
    {
        // The kernel takes 32 bits of the request.
        // SAFETY: vouched for by the caller.
        return answer(
            unsafe { object.ioctl(request & 0xffff_ffff, argument as u64) },
            -1,
        );
    }
    // SAFETY: vouched for by the caller.
    answer(unsafe { sys::ioctl(fd, request, argument as usize) }, -1)
}

/// # Safety
///
/// As for `mmap(2)`.
unsafe fn map(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if flags & libc::MAP_ANONYMOUS == 0 && table::is_ours(fd) {
        return answer(table::map(fd, offset), libc::MAP_FAILED);
    }
    // SAFETY: vouched for by the caller.
    answer(
        unsafe { sys::mmap(address, length, protection, flags, fd, offset) },
        libc::MAP_FAILED,
    )
}

/// `mmap(2)`.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: vouched for by the caller.
    unsafe { map(address, length, protection, flags, fd, offset) }
}

/// `mmap(2)` under its large file name.
///
/// # Safety
///
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: vouched for by the caller.
    unsafe { map(address, length, protection, flags, fd, offset) }
}
