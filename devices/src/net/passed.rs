//! Descriptors that whoever started this process has opened for it.
//!
//! ```text
//!   inherited, no FD_CLOEXEC ── first use: FD_CLOEXEC is set, it is known from now on ──► a duplicate for each device that is made of it
//!   our own, FD_CLOEXEC ──────── refused: nobody has passed it
//! ```
//!
//! What survives an exec had no FD_CLOEXEC, and all that this process opens itself has it: so no number in a config makes a device of a
//! descriptor that is something else's. The descriptors stay open for as long as the process: a machine that is reset, or an interface that
//! is added again, needs them once more.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

use super::tap_error::TapError;

/// Numbers below are standard input, output and error.
const FIRST: RawFd = 3;

static KNOWN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Duplicates of descriptors that were passed to this process, by their numbers.
pub(super) fn duplicates(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, TapError> {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let each = numbers.iter().enumerate();
    each.map(|(at, &number)| {
        duplicate(&mut known, number).map_err(|reason| TapError::Passed {
            number: at,
            reason: format!("(number {number}) {reason}"),
        })
    })
    .collect()
}

fn duplicate(known: &mut BTreeSet<RawFd>, number: RawFd) -> Result<OwnedFd, String> {
    if number < FIRST {
        return Err("is standard input, output or error, or none at all".to_owned());
    }
    // SAFETY: it is only asked whether it is open, changed in its flag, and duplicated, which harms no owner that it may have.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let system = |error: rustix::io::Errno| io::Error::from(error).to_string();
    let flags = fcntl_getfd(fd).map_err(|_| {
        "is not open: pass it to this process when it is started, without FD_CLOEXEC".to_owned()
    })?;
    if !known.contains(&number) {
        if flags.contains(FdFlags::CLOEXEC) {
            return Err("is one of this process's own, not one that was passed to it".to_owned());
        }
        fcntl_setfd(fd, flags | FdFlags::CLOEXEC).map_err(system)?;
        known.insert(number);
    }
    fcntl_dupfd_cloexec(fd, FIRST).map_err(system)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;

    #[test]
    fn only_what_was_passed_is_taken_and_as_often_as_it_is_needed() {
        let own = std::fs::File::open("/dev/null").expect("a file");
        let reason = |number| {
            let refused = duplicates(&[number]).expect_err("not passed");
            refused.to_string()
        };
        assert!(reason(own.as_raw_fd()).contains("own"));
        assert!(reason(1).contains("standard"));
        assert!(reason(-1).contains("none at all"));
        assert!(reason(9999).contains("not open"));
        // As if it had been there from the start.
        let passed = own.as_fd().try_clone_to_owned().expect("a descriptor");
        fcntl_setfd(&passed, FdFlags::empty()).expect("open");
        for _ in 0..2 {
            let made = duplicates(&[passed.as_raw_fd()]).expect("passed");
            assert_ne!(made[0].as_raw_fd(), passed.as_raw_fd());
            for fd in [&passed, &made[0]] {
                assert_eq!(fcntl_getfd(fd), Ok(FdFlags::CLOEXEC));
            }
        }
    }
}
