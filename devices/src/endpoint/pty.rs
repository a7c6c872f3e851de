//! A pseudo-terminal.
//!
//! This process holds the other side open too: the raw mode stays, and the master never hangs up, which could not be waited
//! for. So output that nobody reads fills the terminal's own buffer first, and then the queue.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::error::EndpointError;
use super::{Endpoint, Received};

/// The master, and the slave that is held open.
pub(crate) struct Pty {
    master: OwnedFd,
    _slave: OwnedFd,
    path: PathBuf,
}

impl Pty {
    pub(crate) fn new() -> Result<Self, EndpointError> {
        Self::open().map_err(|error| EndpointError::Pty(error.into()))
    }

    fn open() -> Result<Self, Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(OsString::from_vec(
            ptsname(&master, Vec::new())?.into_bytes(),
        ));
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut mode = tcgetattr(&slave)?;
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode)?;
        let status = fcntl_getfl(&master)?;
        fcntl_setfl(&master, status | OFlags::NONBLOCK)?;
        Ok(Pty {
            master,
            _slave: slave,
            path,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Endpoint for Pty {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        Some(self.master.as_fd())
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        Some(self.master.as_fd())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Received {
        match rustix::io::read(&self.master, buffer) {
            Ok(count @ 1..) => Received::Bytes(count),
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::WouldBlock => {
                Received::Nothing
            }
            Ok(0) | Err(_) => Received::Later,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        rustix::io::write(&self.master, bytes).unwrap_or(0)
    }
}
