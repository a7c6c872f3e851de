//! Opening connections to a destination without getting stuck in it.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::channel::{Channel, Limit, Patience, Stop, poll};
use crate::{Cause, MoveUrl};

/// One end of one host: where all connections of a move go, once the first of them has been made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Connects to `url`. Of a name with several addresses it is the first that answers; each gets its part of the time.
pub(crate) fn connect(url: &MoveUrl, patience: &Patience<'_>) -> Result<(Channel, Target), Cause> {
    let unreachable = |error| Cause::Unreachable {
        url: url.to_string(),
        error,
    };
    let targets = match url {
        MoveUrl::Unix { path } => vec![Target::Unix(path.clone())],
        MoveUrl::Tcp { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .map_err(unreachable)?
            .map(Target::Tcp)
            .collect(),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let count = targets.len();
    for (tried, target) in targets.into_iter().enumerate() {
        let limit = match patience.limit {
            Limit::Until(end, length) => {
                let rest = end.saturating_duration_since(Instant::now());
                Limit::Until(Instant::now() + rest / (count - tried) as u32, length)
            }
            other => other,
        };
        match open(&target, &Patience { limit, ..*patience }) {
            Ok(channel) => return Ok((channel, target)),
            Err(Stop::Lost(error)) => last = error,
            Err(stop) => return Err(stop.into_cause(patience.doing)),
        }
    }
    Err(unreachable(last))
}

/// Connects once more to where another connection of the move has gone.
pub(crate) fn open(target: &Target, patience: &Patience<'_>) -> Result<Channel, Stop> {
    match target {
        Target::Tcp(address) => Ok(Channel::tcp(
            connect_tcp(*address, patience)?,
            address.to_string(),
        )),
        Target::Unix(path) => {
            let lost = |error: Errno| Stop::Lost(error.into());
            let socket = new_socket(AddressFamily::UNIX).map_err(lost)?;
            let address = SocketAddrUnix::new(path).map_err(lost)?;
            rustix::net::connect(&socket, &address).map_err(lost)?;
            Ok(Channel::unix(socket, format!("unix:{}", path.display())))
        }
    }
}

fn new_socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

fn connect_tcp(address: SocketAddr, patience: &Patience<'_>) -> Result<OwnedFd, Stop> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let lost = |error: Errno| Stop::Lost(error.into());
    let socket = new_socket(family).map_err(lost)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            let mut fds = vec![PollFd::new(&socket, PollFlags::OUT)];
            fds.extend(patience.wake.map(|wake| PollFd::new(wake, PollFlags::IN)));
            if !poll(&mut fds, patience.limit)? {
                return Err(Stop::Lost(io::ErrorKind::TimedOut.into()));
            }
            if fds.get(1).is_some_and(|wake| !wake.revents().is_empty()) {
                return Err(Stop::Cancelled);
            }
            sockopt::socket_error(&socket)
                .and_then(|result| result)
                .map_err(lost)?;
        }
        Err(error) => return Err(lost(error)),
    }
    // On a port of the ephemeral range where nobody listens, TCP can connect a socket to itself.
    let ends = (
        rustix::net::getsockname(&socket),
        rustix::net::getpeername(&socket),
    );
    if let (Ok(own), Ok(peer)) = ends
        && Some(&own) == peer.as_ref()
    {
        return Err(Stop::Lost(io::ErrorKind::ConnectionRefused.into()));
    }
    Ok(socket)
}
