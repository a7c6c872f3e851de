//! The system calls that a TAP interface is set up with, each wrapped once.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::mac::MacAddr;

/// An interface's name and what is asked or told of it.
#[derive(Clone, Copy)]
pub(super) struct Interface(libc::ifreq);

impl Interface {
    /// None if the name has more than 15 bytes.
    pub(super) fn named(name: &str) -> Option<Self> {
        // SAFETY: zeros are a value of every field of an ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return None;
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        Some(Self(request))
    }

    pub(super) fn name(&self) -> String {
        let bytes: Vec<u8> = self.0.ifr_name.iter().map(|&byte| byte as u8).collect();
        let end = bytes
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    pub(super) fn flags(&self) -> libc::c_int {
        // SAFETY: every bit pattern is a number; the bytes are initialised.
        libc::c_int::from(unsafe { self.0.ifr_ifru.ifru_flags } as u16)
    }

    pub(super) fn with_flags(mut self, flags: libc::c_int) -> Self {
        self.0.ifr_ifru.ifru_flags = flags as libc::c_short;
        self
    }

    pub(super) fn with_mtu(mut self, mtu: u16) -> Self {
        self.0.ifr_ifru.ifru_mtu = mtu.into();
        self
    }

    pub(super) fn with_ip(mut self, ip: Ipv4Addr) -> Self {
        // A sockaddr_in: port, then address, in network order.
        let mut data = [0; 14];
        for (to, from) in data[2..].iter_mut().zip(ip.octets()) {
            *to = from as libc::c_char;
        }
        self.0.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: libc::AF_INET as libc::sa_family_t,
            sa_data: data,
        };
        self
    }

    pub(super) fn with_mac(mut self, mac: MacAddr) -> Self {
        let mut data = [0; 14];
        for (to, from) in data.iter_mut().zip(mac.octets()) {
            *to = from as libc::c_char;
        }
        self.0.ifr_ifru.ifru_hwaddr = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: data,
        };
        self
    }

    pub(super) fn mac_octets(&self) -> [u8; 6] {
        // SAFETY: every bit pattern is a sockaddr; the bytes are initialised.
        let data = unsafe { self.0.ifr_ifru.ifru_hwaddr.sa_data };
        std::array::from_fn(|at| data[at] as u8)
    }

    /// Makes a call that takes an `ifreq`, and keeps what it answers.
    pub(super) fn call(&mut self, fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<()> {
        // SAFETY: the requests of this folder that come here read and write one ifreq, which lives for the call.
        result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut self.0) })
    }
}

/// Makes a call that reads or writes a C `int` at an address.
pub(super) fn call_int(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    value: &mut libc::c_int,
) -> io::Result<()> {
    // SAFETY: the requests of this folder that come here read or write one int, which lives for the call.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut *value) })
}

/// TUNSETOFFLOAD, whose argument is the value itself.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: the request takes a number and no address.
    result(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    })
}

/// A socket to ask about interfaces through.
pub(super) fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: no address is passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    result(fd)?;
    // SAFETY: it was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn result(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
