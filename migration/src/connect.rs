//! Opening a connection to a destination without getting stuck in it.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::channel::{Channel, Patience, Stop, poll};
use crate::{Cause, MoveUrl};

/// Connects to `url`. Of a name with several addresses, the first that answers.
pub(crate) fn connect(url: &MoveUrl, patience: &Patience<'_>) -> Result<Channel, Cause> {
    let unreachable = |error| Cause::Unreachable {
        url: url.to_string(),
        error,
    };
    match url {
        MoveUrl::Unix { path } => {
            let socket = new_socket(AddressFamily::UNIX).map_err(unreachable)?;
            let address = SocketAddrUnix::new(path).map_err(|error| unreachable(error.into()))?;
            rustix::net::connect(&socket, &address).map_err(|error| unreachable(error.into()))?;
            Ok(Channel::unix(socket, url.to_string()))
        }
        MoveUrl::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host.as_str(), *port)
                .to_socket_addrs()
                .map_err(unreachable)?
            {
                match connect_tcp(address, patience) {
                    Ok(socket) => return Ok(Channel::tcp(socket, address.to_string())),
                    Err(Stop::Lost(error)) => last = error,
                    Err(stop) => return Err(stop.into_cause(patience.doing)),
                }
            }
            Err(unreachable(last))
        }
    }
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        family,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

fn connect_tcp(address: SocketAddr, patience: &Patience<'_>) -> Result<OwnedFd, Stop> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = new_socket(family).map_err(Stop::Lost)?;
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
                .map_err(|error| Stop::Lost(error.into()))?;
        }
        Err(error) => return Err(Stop::Lost(error.into())),
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
