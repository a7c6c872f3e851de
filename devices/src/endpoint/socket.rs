//! A unix socket that serves one client at a time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
    bind, listen, recv, send, socket_with,
};

use super::error::EndpointError;
use super::{Endpoint, Received};

/// Clients that may wait for their turn.
const BACKLOG: i32 = 4;
/// Only the owner may talk to the guest's console.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A listening socket and its file. Accepting does not wait.
pub(crate) struct Listener {
    pub(crate) fd: OwnedFd,
    _file: SocketFile,
}

impl Listener {
    /// Listens at a path where nothing may be yet.
    pub(crate) fn new(path: &Path, backlog: i32) -> Result<Self, EndpointError> {
        Self::listen(path, backlog).map_err(|error| match error {
            Errno::ADDRINUSE => EndpointError::SocketExists {
                path: path.to_owned(),
            },
            error => EndpointError::Socket {
                path: path.to_owned(),
                source: error.into(),
            },
        })
    }

    fn listen(path: &Path, backlog: i32) -> Result<Self, Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        let file = SocketFile::new(path)?;
        // Nobody can connect before `listen`.
        chmod(path, MODE)?;
        listen(&fd, backlog)?;
        Ok(Self { fd, _file: file })
    }

    /// The next client, whose socket does not wait either.
    pub(crate) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
    }
}

/// The listening socket and the client.
pub(crate) struct Socket {
    listener: Listener,
    client: Option<OwnedFd>,
}

impl Socket {
    pub(crate) fn new(path: &Path) -> Result<Self, EndpointError> {
        Ok(Socket {
            listener: Listener::new(path, BACKLOG)?,
            client: None,
        })
    }
}

impl Endpoint for Socket {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.client.is_none().then(|| self.listener.fd.as_fd())
    }

    fn accept(&mut self) {
        let accepted = self.listener.accept();
        if let Err(error) = &accepted {
            tracing::debug!(%error, "no client of the socket is there any more");
        }
        self.client = accepted.ok();
    }

    fn read(&mut self, buffer: &mut [u8]) -> Received {
        let Some(client) = &self.client else {
            return Received::Nothing;
        };
        match recv(client, buffer, RecvFlags::empty()) {
            Ok((count @ 1.., _)) => return Received::Bytes(count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok((0, _)) | Err(_) => self.client = None,
        }
        Received::Nothing
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(client) = &self.client else { return 0 };
        match send(client, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => return count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.client = None,
        }
        0
    }
}

/// The socket's file, which goes with it unless something else has taken its place.
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> Result<Self, Errno> {
        // Another directory may be the current one when the file is removed.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let identity = Self::identity(&path)?;
        Ok(SocketFile { path, identity })
    }

    fn identity(path: &Path) -> Result<(u64, u64), Errno> {
        let stat = lstat(path)?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identity(&self.path) == Ok(self.identity) {
            // Somebody who removes it in between has done the same.
            let _ = unlink(&self.path);
        }
    }
}
