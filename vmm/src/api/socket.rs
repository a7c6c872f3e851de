//! The API's unix socket: made with mode 0600, never taken from somebody else, removed at the end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the API cannot be offered at a path.
#[derive(Debug, thiserror::Error)]
pub enum ApiSocketError {
    /// Another process listens there.
    #[error("API socket {0}: a process listens on it already; choose another path")]
    InUse(PathBuf),
    /// A socket was left there.
    #[error(
        "API socket {0}: exists, but nobody listens on it: it was left by a process that was killed; \
         remove it or choose another path"
    )]
    Stale(PathBuf),
    /// Something else is there.
    #[error("API socket {0}: exists and is not a socket; choose another path")]
    NotASocket(PathBuf),
    /// Something is there, and it cannot be told what.
    #[error("API socket {0}: exists; remove it or choose another path")]
    Exists(PathBuf),
    /// The path does not fit into a socket address.
    #[error(
        "API socket {0}: the path is longer than the 107 bytes a socket address holds; choose a shorter one"
    )]
    TooLong(PathBuf),
    /// The directory is missing.
    #[error("API socket {0}: its directory does not exist; create it or choose another path")]
    NoDirectory(PathBuf),
    /// Anything else.
    #[error("API socket {path}: cannot {what}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// How.
        source: io::Error,
    },
}

/// A listening socket and its file, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct ApiSocket {
    path: PathBuf,
    /// Device and inode, so that only our own file is removed.
    identity: (u64, u64),
    listener: Option<UnixListener>,
}

impl ApiSocket {
    /// Makes the socket at `path`, where nothing may be.
    pub(super) fn bind(path: &Path) -> Result<Self, ApiSocketError> {
        let failed = |what, errno: rustix::io::Errno| ApiSocketError::Io {
            path: path.to_owned(),
            what,
            source: errno.into(),
        };
        let address =
            SocketAddrUnix::new(path).map_err(|_| ApiSocketError::TooLong(path.to_owned()))?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|e| failed("make a socket", e))?;
        // Linux gives the file the mode of the socket's own inode, less the umask: so the file is born
        // with 0600, with no window and without touching the umask, which all threads share.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|e| failed("set the mode", e))?;
        rustix::net::bind(&socket, &address).map_err(|errno| match errno {
            rustix::io::Errno::ADDRINUSE => occupied(path),
            rustix::io::Errno::NOENT => ApiSocketError::NoDirectory(path.to_owned()),
            errno => failed("bind it", errno),
        })?;
        let bound = Self::bound(path, socket).map_err(|source| ApiSocketError::Io {
            path: path.to_owned(),
            what: "look at it",
            source,
        })?;
        if let Some(listener) = &bound.listener {
            rustix::net::listen(listener, BACKLOG).map_err(|e| failed("listen on it", e))?;
        }
        Ok(bound)
    }

    fn bound(path: &Path, socket: OwnedFd) -> io::Result<Self> {
        // Absolute, so that it can be removed even if somebody changes the working directory.
        let path = std::path::absolute(path)?;
        let file = std::fs::symlink_metadata(&path)?;
        Ok(Self {
            path,
            identity: (file.dev(), file.ino()),
            listener: Some(UnixListener::from(socket)),
        })
    }

    /// The listening, non-blocking socket; once.
    pub(super) fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot remove the API socket");
        }
    }
}

/// Says what occupies a path.
fn occupied(path: &Path) -> ApiSocketError {
    let path = path.to_owned();
    match std::fs::symlink_metadata(&path) {
        Ok(file) if !file.file_type().is_socket() => ApiSocketError::NotASocket(path),
        Ok(_) => match UnixStream::connect(&path) {
            Ok(_) => ApiSocketError::InUse(path),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => ApiSocketError::Stale(path),
            Err(_) => ApiSocketError::Exists(path),
        },
        Err(_) => ApiSocketError::Exists(path),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn socket_is_private_and_goes_away() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let socket = ApiSocket::bind(&path).expect("bind");
        let mode = std::fs::symlink_metadata(&path)
            .expect("is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).expect("listens");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn only_our_own_file_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let socket = ApiSocket::bind(&path).expect("bind");
        // Keep the first inode alive, so that its number is not given out again.
        std::fs::rename(&path, dir.path().join("moved.sock")).expect("rename");
        std::fs::write(&path, "somebody else's").expect("write");
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn existing_paths_are_refused_by_what_they_are() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");

        std::fs::write(&path, "").expect("write");
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(ApiSocketError::NotASocket(_))
        ));
        std::fs::remove_file(&path).expect("remove");

        let other = UnixListener::bind(&path).expect("bind");
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(ApiSocketError::InUse(_))
        ));
        drop(other);
        let error = ApiSocket::bind(&path).expect_err("a stale socket");
        assert!(matches!(error, ApiSocketError::Stale(_)));
        assert!(
            error
                .to_string()
                .contains("remove it or choose another path"),
            "{error}"
        );
        assert!(path.exists(), "a stale socket is not removed silently");

        std::fs::remove_file(&path).expect("remove");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &path).expect("symlink");
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(ApiSocketError::NotASocket(_))
        ));
    }

    #[test]
    fn impossible_paths_say_why() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        assert!(matches!(
            ApiSocket::bind(&long),
            Err(ApiSocketError::TooLong(_))
        ));
        let lost = Path::new("/nonexistent-directory/api.sock");
        assert!(matches!(
            ApiSocket::bind(lost),
            Err(ApiSocketError::NoDirectory(_))
        ));
    }
}
