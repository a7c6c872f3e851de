//! Where packets go to and come from: a TAP interface, or in tests a socket.

use std::io;
use std::os::fd::BorrowedFd;

use super::ioctl;
use super::mac::MacAddr;

/// One queue pair's host side. Each read gives and each write takes one packet behind its 12-byte `virtio_net_hdr_v1`, without waiting.
pub(crate) trait Port: Send + Sync {
    /// What to read, write and poll.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Which packets the reader takes: bits `TUN_F_*`. One call is for all queue pairs.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;
    /// Whether the host gives it packets.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// Writes one packet, all of it or nothing.
///
/// # Safety
///
/// The buffers must be mapped for as long as the call lasts.
pub(super) unsafe fn write_packet(
    fd: BorrowedFd<'_>,
    buffers: &[libc::iovec],
) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: the list lives for the call, and the caller answers for what it points to.
    count(unsafe { libc::writev(fd.as_raw_fd(), buffers.as_ptr(), buffers.len() as i32) })
}

/// Reads one packet; what the buffers have no room for is lost.
///
/// # Safety
///
/// The buffers must be mapped for as long as the call lasts, and nobody may hold a reference into them.
pub(super) unsafe fn read_packet(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: the list lives for the call, and the caller answers for what it points to.
    count(unsafe { libc::readv(fd.as_raw_fd(), buffers.as_ptr(), buffers.len() as i32) })
}

fn count(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

impl Port for super::Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        ioctl::set_offloads(self.as_fd(), offloads)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.attach(attached)
    }
}

/// The frame by which switches learn where a station is now: RARP, "who am I" (RFC 903), to everybody, padded to the least length.
pub fn rarp_frame(mac: MacAddr) -> [u8; 60] {
    let station = mac.octets();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&station);
    // Ethertype; hardware type Ethernet, protocol IPv4, their address lengths; operation 3, request reverse.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    // Sender and target are the station itself; both IP addresses stay 0.
    frame[22..28].copy_from_slice(&station);
    frame[32..38].copy_from_slice(&station);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rarp_asks_for_itself() {
        let mac: MacAddr = "52:54:00:12:34:56".parse().expect("an address");
        let frame = rarp_frame(mac);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac.octets());
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3]);
        for at in [22, 32] {
            assert_eq!(frame[at..at + 6], mac.octets());
            assert_eq!(frame[at + 6..at + 10], [0; 4]);
        }
    }
}
