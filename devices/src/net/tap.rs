//! A TAP interface of the host, one descriptor a queue pair.

use std::fs::OpenOptions;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ioctl::{self, Interface};
use super::mac::MacAddr;
use super::tap_error::TapError;
use super::{HEADER_LEN, MAX_QUEUE_PAIRS, passed};

/// How an interface is called that nobody has named.
const AUTOMATIC_NAME: &str = "vmtap%d";

/// Which interface, and how it is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapConfig {
    /// Its name, in which `%d` stands for the first free number. An interface that exists is attached, one that does not is made for as
    /// long as it is open. None: `vmtap%d`.
    pub name: Option<String>,
    /// Descriptors to open, one a queue pair.
    pub queue_pairs: u16,
    /// Largest packet without its Ethernet header, in bytes. None: as it is.
    pub mtu: Option<u16>,
    /// Address of the host's end. None: as it is.
    pub host_mac: Option<MacAddr>,
    /// IPv4 address of the host's end. None: as it is.
    pub ip: Option<Ipv4Addr>,
    /// Its network mask. None: that of the address's class.
    pub mask: Option<Ipv4Addr>,
}

impl Default for TapConfig {
    fn default() -> Self {
        Self {
            name: None,
            queue_pairs: 1,
            mtu: None,
            host_mac: None,
            ip: None,
            mask: None,
        }
    }
}

/// Kinds of large packets that not every host's TAP interfaces take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapOffloads {
    /// UDP datagrams to be cut into IP fragments.
    pub ufo: bool,
    /// UDP data to be cut into datagrams, on IPv4 and IPv6.
    pub uso: bool,
}

/// One queue pair of a TAP interface. It does not wait: what cannot be read or written now is EAGAIN. The interface lives for as long as it
/// is open, unless it was made to persist.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    offloads: TapOffloads,
    attached: AtomicBool,
}

impl Tap {
    /// Attaches or makes an interface in the network namespace of the calling thread, sets it up and brings it up. An interface that is up
    /// already and of which nothing is to be changed needs no privilege but to be the user's.
    pub fn open(config: &TapConfig) -> Result<Vec<Self>, TapError> {
        let pairs = config.queue_pairs;
        check_pairs(pairs.into())?;
        let mut name = config.name.as_deref().unwrap_or(AUTOMATIC_NAME).to_owned();
        check_name(&name)?;
        if config.mask.is_some() && config.ip.is_none() {
            return Err(TapError::MaskWithoutIp(name));
        }
        let mut fds = Vec::with_capacity(pairs.into());
        for _ in 0..pairs {
            let (fd, actual) = open_queue(&name, pairs)?;
            // With %d, the first has its number; the others are its further queues.
            name = actual;
            fds.push(fd);
        }
        let taps = Self::all(fds, &name)?;
        set_up(&name, config)?;
        Ok(taps)
    }

    /// Takes descriptors that were passed to this process when it was started, by their numbers; see [`Tap::from_fds`]. They stay open, so
    /// that this can be called again once the interface's device has ended.
    pub fn from_numbers(numbers: &[RawFd]) -> Result<Vec<Self>, TapError> {
        Self::from_fds(passed::duplicates(numbers)?)
    }

    /// Takes descriptors that someone else has opened, one a queue pair of one interface, which is left as it is but for header length and
    /// offloads. Whoever uses the interface still must have stopped reading packets from it. They must have been opened with IFF_NO_PI, which
    /// the system does not let one check: in its answer the same bit says that there is no filter.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        check_pairs(fds.len())?;
        let several = fds.len() > 1;
        let mut name: Option<String> = None;
        for (number, fd) in fds.iter().enumerate() {
            let refuse = |reason: String| TapError::Passed { number, reason };
            // A queue that was detached belongs to no interface until it is attached. That it is attached already is EINVAL.
            let _ = attach(fd.as_fd(), true);
            let found = interface_of(fd.as_fd()).map_err(|error| {
                refuse(format!(
                    "is not attached to a TAP interface ({error}); open /dev/net/tun and make TUNSETIFF with it"
                ))
            })?;
            let flags = found.flags();
            let missing = if flags & libc::IFF_TAP == 0 {
                Some("is a TUN interface: set IFF_TAP")
            } else if flags & libc::IFF_VNET_HDR == 0 {
                Some("has no virtio header: set IFF_VNET_HDR")
            } else if several && flags & libc::IFF_MULTI_QUEUE == 0 {
                Some("has one queue, and several were passed: set IFF_MULTI_QUEUE")
            } else {
                None
            };
            if let Some(missing) = missing {
                return Err(refuse(format!("({:?}) {missing}", found.name())));
            }
            match &name {
                None => name = Some(found.name()),
                Some(first) if *first != found.name() => {
                    return Err(refuse(format!(
                        "is of interface {:?}, the first is of {first:?}; pass the queues of one",
                        found.name()
                    )));
                }
                Some(_) => {}
            }
            rustix::io::ioctl_fionbio(fd, true)
                .map_err(|error| refuse(format!("cannot be made not to wait: {error}")))?;
        }
        Self::all(fds, &name.unwrap_or_default())
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Address of the host's end.
    pub fn host_mac(&self) -> Result<MacAddr, TapError> {
        let fail = |source| TapError::SetUp {
            name: self.name.clone(),
            what: "read its address",
            source,
        };
        let mut interface = interface_of(self.as_fd()).map_err(fail)?;
        interface
            .call(self.as_fd(), libc::SIOCGIFHWADDR)
            .map_err(fail)?;
        MacAddr::new(interface.mac_octets()).map_err(|error| fail(io::Error::other(error)))
    }

    /// What it takes besides what every one does.
    pub fn offloads(&self) -> TapOffloads {
        self.offloads
    }

    /// The open descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Lets the host give it packets, or not.
    pub(super) fn attach(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::SeqCst) != attached {
            attach(self.as_fd(), attached)?;
            self.attached.store(attached, Ordering::SeqCst);
        }
        Ok(())
    }

    fn all(fds: Vec<OwnedFd>, name: &str) -> Result<Vec<Self>, TapError> {
        let mut taps = Vec::with_capacity(fds.len());
        for fd in fds {
            let call = |what, request, mut value| {
                ioctl::call_int(fd.as_fd(), request, &mut value)
                    .map_err(|source| failed(name, what, source))
            };
            call(
                "set the header's length",
                libc::TUNSETVNETHDRSZ,
                HEADER_LEN as libc::c_int,
            )?;
            call("set the header's byte order", libc::TUNSETVNETLE, 1)?;
            let offloads = probe(fd.as_fd()).map_err(|source| {
                failed(
                    name,
                    "set which packets may be left to the reader to cut",
                    source,
                )
            })?;
            taps.push(Self {
                fd,
                name: name.to_owned(),
                offloads,
                attached: AtomicBool::new(true),
            });
        }
        Ok(taps)
    }
}

fn check_pairs(pairs: usize) -> Result<(), TapError> {
    if pairs == 0 || pairs > usize::from(MAX_QUEUE_PAIRS) {
        return Err(TapError::QueuePairs(pairs));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() >= libc::IFNAMSIZ {
        "it is too long"
    } else if name == "." || name == ".." {
        "it is a directory's"
    } else if name
        .bytes()
        .any(|byte| byte.is_ascii_control() || byte.is_ascii_whitespace() || b"/:".contains(&byte))
    {
        "it has a space, a slash, a colon or a control character"
    } else if name.contains('%') && (name.matches('%').count() != 1 || !name.contains("%d")) {
        "it has a % that is not one %d"
    } else {
        return Ok(());
    };
    Err(TapError::Name {
        name: name.chars().take(32).collect(),
        reason,
    })
}

/// Opens one queue; returns the name that the interface really has.
fn open_queue(name: &str, pairs: u16) -> Result<(OwnedFd, String), TapError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(TapError::NoDriver)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if pairs > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut interface = interface(name)?.with_flags(flags);
    let owned = || name.to_owned();
    interface
        .call(file.as_fd(), libc::TUNSETIFF)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TapError::Permission { name: owned() },
            Some(libc::EBUSY) => TapError::InUse { name: owned() },
            Some(libc::EINVAL) => TapError::Mismatch {
                name: owned(),
                queue_pairs: pairs,
            },
            _ => failed(name, "attach a queue to it", error),
        })?;
    Ok((file.into(), interface.name()))
}

/// Finds out what the host takes. Leaves all offloads off.
fn probe(fd: BorrowedFd<'_>) -> io::Result<TapOffloads> {
    let takes = |offloads| ioctl::set_offloads(fd, libc::TUN_F_CSUM | offloads).is_ok();
    let offloads = TapOffloads {
        ufo: takes(libc::TUN_F_UFO),
        uso: takes(libc::TUN_F_USO4 | libc::TUN_F_USO6),
    };
    ioctl::set_offloads(fd, 0)?;
    Ok(offloads)
}

fn set_up(name: &str, config: &TapConfig) -> Result<(), TapError> {
    let socket = ioctl::control_socket().map_err(|source| failed(name, "set it up", source))?;
    let call = |what, request, mut interface: Interface| {
        interface
            .call(socket.as_fd(), request)
            .map_err(|source| failed(name, what, source))?;
        Ok::<_, TapError>(interface)
    };
    let plain = interface(name)?;
    if let Some(mtu) = config.mtu {
        call("set its MTU", libc::SIOCSIFMTU, plain.with_mtu(mtu))?;
    }
    if let Some(mac) = config.host_mac {
        call("set its address", libc::SIOCSIFHWADDR, plain.with_mac(mac))?;
    }
    if let Some(ip) = config.ip {
        call("set its IP address", libc::SIOCSIFADDR, plain.with_ip(ip))?;
    }
    if let Some(mask) = config.mask {
        let mask = plain.with_ip(mask);
        call("set its network mask", libc::SIOCSIFNETMASK, mask)?;
    }
    let flags = call("read its flags", libc::SIOCGIFFLAGS, plain)?.flags();
    if flags & libc::IFF_UP == 0 {
        let up = plain.with_flags(flags | libc::IFF_UP);
        call("bring it up", libc::SIOCSIFFLAGS, up)?;
    }
    Ok(())
}

fn interface(name: &str) -> Result<Interface, TapError> {
    Interface::named(name).ok_or_else(|| TapError::Name {
        name: name.chars().take(32).collect(),
        reason: "it is too long",
    })
}

fn interface_of(fd: BorrowedFd<'_>) -> io::Result<Interface> {
    let mut interface = Interface::named("").ok_or(io::ErrorKind::InvalidInput)?;
    interface.call(fd, libc::TUNGETIFF)?;
    Ok(interface)
}

fn attach(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let mut interface = Interface::named("")
        .ok_or(io::ErrorKind::InvalidInput)?
        .with_flags(flag);
    interface.call(fd, libc::TUNSETQUEUE)
}

fn failed(name: &str, what: &'static str, source: io::Error) -> TapError {
    TapError::SetUp {
        name: name.to_owned(),
        what,
        source,
    }
}
