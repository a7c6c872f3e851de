//! Where a destination waits for its source.

use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::MoveUrl;
use crate::channel::Channel;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// A socket that waits for a source. A unix socket's path is removed on drop.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    url: MoveUrl,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(
        UnixListener,
        #[expect(dead_code, reason = "its drop removes the path")] SocketPath,
    ),
}

/// A path that this process has made, with what identifies it.
#[derive(Debug)]
struct SocketPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// A listener that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is taken.
    #[error("cannot listen on {url}: the path exists; remove it, or choose another")]
    Exists {
        /// Where.
        url: MoveUrl,
    },
    /// Anything else.
    #[error("cannot listen on {url}: {error}")]
    System {
        /// Where.
        url: MoveUrl,
        /// The system's reason.
        error: io::Error,
    },
}

impl Listener {
    /// Begins to listen. A unix socket is made with mode 0600; a path that exists is refused, whatever it is.
    pub fn bind(url: &MoveUrl) -> Result<Self, BindError> {
        let failed = |error: io::Error| match (url, error.kind()) {
            (MoveUrl::Unix { .. }, io::ErrorKind::AddrInUse) => {
                BindError::Exists { url: url.clone() }
            }
            _ => BindError::System {
                url: url.clone(),
                error,
            },
        };
        match url {
            MoveUrl::Tcp { host, port } => {
                let addresses = (host.as_str(), *port).to_socket_addrs().map_err(failed)?;
                let socket =
                    TcpListener::bind(addresses.collect::<Vec<_>>().as_slice()).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let port = socket.local_addr().map_err(failed)?.port();
                Ok(Self {
                    socket: Socket::Tcp(socket),
                    url: MoveUrl::Tcp {
                        host: host.clone(),
                        port,
                    },
                })
            }
            MoveUrl::Unix { path } => Ok(Self {
                socket: bind_unix(path).map_err(failed)?,
                url: url.clone(),
            }),
        }
    }

    /// Where it listens; a port 0 is resolved.
    pub fn local_url(&self) -> MoveUrl {
        self.url.clone()
    }

    /// The next connection, or [`io::ErrorKind::WouldBlock`].
    pub(crate) fn accept(&self) -> io::Result<Channel> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, peer) = socket.accept()?;
                Ok(Channel::tcp(OwnedFd::from(stream), peer.to_string()))
            }
            Socket::Unix(socket, _) => {
                let (stream, _) = socket.accept()?;
                Ok(Channel::unix(OwnedFd::from(stream), self.url.to_string()))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket, _) => socket.as_fd(),
        }
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Somebody may have put something else in its place.
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<Socket> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // The mode of the path is the socket's mode at the time of the bind, so there is no moment at which
    // anybody else could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let made = std::fs::symlink_metadata(path)?;
    let path = SocketPath {
        path: path.to_owned(),
        device: made.dev(),
        inode: made.ino(),
    };
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(Socket::Unix(UnixListener::from(socket), path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn unix(path: &Path) -> MoveUrl {
        MoveUrl::Unix { path: path.into() }
    }

    #[test]
    fn a_unix_socket_is_private_and_removed() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("s");
        let listener = Listener::bind(&unix(&path)).expect("free path");
        let mode = std::fs::metadata(&path).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_exists_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("s");
        std::fs::write(&path, "precious").expect("written");
        let error = Listener::bind(&unix(&path)).expect_err("path exists");
        assert!(error.to_string().contains("exists"), "{error}");
        assert_eq!(
            std::fs::read_to_string(&path).expect("still there"),
            "precious"
        );

        std::fs::remove_file(&path).expect("removed");
        let listener = Listener::bind(&unix(&path)).expect("free path");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "new").expect("written");
        drop(listener);
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "new");
    }

    #[test]
    fn port_zero_is_resolved() {
        let url = "tcp:127.0.0.1:0".parse().expect("valid");
        let listener = Listener::bind(&url).expect("loopback");
        assert!(!listener.local_url().to_string().ends_with(":0"));
    }
}
