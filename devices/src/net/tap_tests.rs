//! TAP interfaces of the system, each test in a network namespace of its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities};

use super::features::*;
use super::ioctl::{Interface, control_socket};
use super::testing::*;
use super::{HEADER_LEN, MacAddr, Net, NetConfig, Tap, TapConfig, TapError};
use crate::virtio::testing::Driver;
use crate::virtio::{VERSION_1, VirtioDevice};

/// An ethertype for experiments (IEEE Std 802).
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Header of a packet socket's packets: `virtio_net_hdr` without num_buffers.
const SOCKET_HEADER: usize = 10;

/// Runs a test on a thread in a namespace of its own, or says why it cannot.
fn in_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            // SAFETY: the thread has opened nothing that belongs to its network namespace.
            let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
            if let Err(error) = unshared {
                eprintln!("SKIP: no network namespace: {error}");
            } else if let Err(error) = File::open("/dev/net/tun") {
                eprintln!("SKIP: /dev/net/tun: {error}");
            } else {
                test();
            }
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn named(name: &str) -> TapConfig {
    TapConfig {
        name: Some(name.to_owned()),
        ..TapConfig::default()
    }
}

/// A socket on the host's end of an interface.
fn wire(name: &str) -> File {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no address is passed; the descriptor belongs to nobody else.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            i32::from(all),
        );
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let name = std::ffi::CString::new(name).expect("a name");
    let on = 1_i32;
    let (packet_vnet_hdr, packet_ignore_outgoing) = (15, 23);
    // SAFETY: zeros are a value of the address; all pointers live for the calls, with the lengths that are given.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of_val(&address) as u32;
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len);
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        for option in [packet_vnet_hdr, packet_ignore_outgoing] {
            let value = (&raw const on).cast();
            let set = libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value, 4);
            assert_eq!(set, 0, "{}", io::Error::last_os_error());
        }
    }
    File::from(socket)
}

/// A frame of an experiment, from its Ethernet header on.
fn frame(seed: u8, payload: usize) -> Vec<u8> {
    let mut frame = mac().octets().to_vec();
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(EXPERIMENT);
    frame.extend((0..payload).map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed)));
    frame
}

fn send(mut wire: &File, frame: &[u8]) {
    let mut bytes = vec![0; SOCKET_HEADER];
    bytes.extend(frame);
    assert_eq!(wire.write(&bytes).expect("room"), bytes.len());
}

/// The next frame of this ethertype; the system sends some of its own.
fn take(mut wire: &File, ethertype: [u8; 2]) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 17];
    let mut len = 0;
    until("a frame", || match wire.read(&mut bytes) {
        Ok(read) => {
            len = read;
            bytes[SOCKET_HEADER + 12..SOCKET_HEADER + 14] == ethertype
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    });
    bytes[SOCKET_HEADER..len].to_vec()
}

/// The same on the guest's side, with the header before it. For each frame of any type that came, a buffer of these parts is offered.
fn next(driver: &mut Driver, ethertype: [u8; 2], again: &[u32]) -> Vec<u8> {
    loop {
        let (head, len) = driver.wait_used();
        let mut all = driver.written(head);
        all.truncate(len as usize);
        let buffers = u16::from_le_bytes([all[10], all[11]]);
        for _ in 1..buffers {
            let (head, len) = driver.used().expect("all buffers of a packet at once");
            let mut part = driver.written(head);
            part.truncate(len as usize);
            all.extend(part);
        }
        if !again.is_empty() {
            driver.offer(&[], again);
        }
        if all[HEADER_LEN + 12..HEADER_LEN + 14] == ethertype {
            return all;
        }
    }
}

fn on(taps: Vec<Tap>, accepted: u64) -> Net {
    let net = Net::new(NetConfig::new(mac()), taps).expect("a device");
    net.set_features(accepted & net.features() | VERSION_1);
    net
}

#[test]
fn an_interface_is_set_up() {
    in_namespace(|| {
        let host_mac: MacAddr = "02:00:00:00:00:07".parse().expect("an address");
        let ip = Ipv4Addr::new(10, 11, 12, 1);
        let taps = Tap::open(&TapConfig {
            mtu: Some(4000),
            host_mac: Some(host_mac),
            ip: Some(ip),
            mask: Some(Ipv4Addr::new(255, 255, 255, 0)),
            ..TapConfig::default()
        })
        .expect("a TAP interface");
        assert_eq!(taps.len(), 1);
        assert_eq!(taps[0].name(), "vmtap0");
        assert_eq!(taps[0].host_mac().expect("an address"), host_mac);
        eprintln!("this host takes {:?}", taps[0].offloads());
        // The address is there, its network is reached through the interface, and a packet of the MTU goes out whole.
        let socket = UdpSocket::bind((ip, 0)).expect("the address");
        socket.set_broadcast(true).expect("a socket");
        socket
            .send_to(&[0; 3000], (Ipv4Addr::new(10, 11, 12, 255), 9))
            .expect("a network");
        let mut packet = [0; 4096];
        let mut len = 0;
        until("a packet", || {
            len = rustix::io::read(taps[0].as_fd(), &mut packet).unwrap_or(0);
            packet[HEADER_LEN + 12..HEADER_LEN + 14] == [8, 0]
        });
        assert_eq!(len, HEADER_LEN + 14 + 20 + 8 + 3000);
        let second = Tap::open(&TapConfig::default()).expect("another");
        assert_eq!(second[0].name(), "vmtap1");
        drop(taps);
        assert_eq!(
            Tap::open(&TapConfig::default()).expect("a third")[0].name(),
            "vmtap0"
        );
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    for (name, reason) in [
        ("", "empty"),
        ("sixteen-bytes-xx", "too long"),
        ("..", "directory"),
        ("a b", "space"),
        ("a/b", "slash"),
        ("a\0b", "control"),
        ("a%s", "%d"),
        ("%d%d", "%d"),
    ] {
        let error = Tap::open(&named(name)).expect_err(name).to_string();
        assert!(error.contains(reason), "{error}");
    }
    for queue_pairs in [0, 65] {
        let config = TapConfig {
            queue_pairs,
            ..TapConfig::default()
        };
        assert!(matches!(Tap::open(&config), Err(TapError::QueuePairs(_))));
    }
    let mask = TapConfig {
        mask: Some(Ipv4Addr::BROADCAST),
        ..TapConfig::default()
    };
    assert!(matches!(Tap::open(&mask), Err(TapError::MaskWithoutIp(_))));
    in_namespace(|| {
        let _first = Tap::open(&named("one")).expect("a TAP interface");
        let several = TapConfig {
            queue_pairs: 2,
            ..named("one")
        };
        for (config, expected) in [
            (named("one"), "\"one\" is in use"),
            (several, "\"one\" exists, but is not a TAP interface with"),
            (named("lo"), "\"lo\" exists"),
            (
                TapConfig {
                    mtu: Some(5),
                    ..named("small")
                },
                "\"small\": cannot set its MTU",
            ),
        ] {
            let error = Tap::open(&config).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut sets = capabilities(None).expect("capabilities");
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).expect("fewer capabilities");
        let error = Tap::open(&named("two")).expect_err("no permission");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
}

#[test]
fn descriptors_that_are_passed_are_looked_at() {
    let reason = |fds: Vec<OwnedFd>| Tap::from_fds(fds).expect_err("not a tap").to_string();
    let null = || File::open("/dev/null").expect("a file").into();
    assert!(reason(vec![null()]).contains("descriptor 0"));
    assert!(matches!(
        Tap::from_fds(Vec::new()),
        Err(TapError::QueuePairs(0))
    ));
    in_namespace(|| {
        let raw = |name: &str, flags| {
            let file = File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .expect("the device");
            let mut interface = Interface::named(name).expect("a name").with_flags(flags);
            interface
                .call(file.as_fd(), libc::TUNSETIFF)
                .expect("an interface");
            OwnedFd::from(file)
        };
        let full = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let several = full | libc::IFF_MULTI_QUEUE;
        for (flags, expected) in [
            (
                libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
                "IFF_TAP",
            ),
            (libc::IFF_TAP | libc::IFF_NO_PI, "IFF_VNET_HDR"),
        ] {
            let error = reason(vec![raw("odd", flags)]);
            assert!(error.contains(expected), "{error}");
        }
        let closed = File::open("/dev/net/tun").expect("the device");
        assert!(reason(vec![closed.into()]).contains("TUNSETIFF"));
        let error = reason(vec![raw("a", full), raw("b", full)]);
        assert!(error.contains("IFF_MULTI_QUEUE"), "{error}");
        let error = reason(vec![raw("a", several), raw("b", several)]);
        assert!(error.contains("\"b\""), "{error}");
        let taps = Tap::from_fds(vec![raw("c", several), raw("c", several)]).expect("taps");
        assert_eq!((taps.len(), taps[1].name()), (2, "c"));
        let mut nothing = [0; 64];
        let read = rustix::io::read(taps[0].as_fd(), &mut nothing);
        assert_eq!(read, Err(rustix::io::Errno::AGAIN), "it does not wait");
        // By their numbers, as a machine does at each of its starts.
        let passed = [raw("d", several), raw("d", several)];
        for fd in &passed {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("open");
        }
        let numbers = passed.each_ref().map(AsRawFd::as_raw_fd);
        for _ in 0..2 {
            let again = Tap::from_numbers(&numbers).expect("taps");
            assert_eq!((again.len(), again[0].name()), (2, "d"));
            drop(on(again, 0));
        }
        // A device detaches the second; passed on, it is taken all the same.
        let fds = taps
            .iter()
            .map(|tap| tap.as_fd().try_clone_to_owned().expect("a descriptor"))
            .collect();
        let _net = on(taps, 0);
        assert_eq!(Tap::from_fds(fds).expect("taps").len(), 2);
    });
}

#[test]
fn frames_go_both_ways() {
    for (pairs, accepted) in [(1, 0), (1, u64::MAX), (2, u64::MAX)] {
        in_namespace(|| {
            let config = TapConfig {
                queue_pairs: pairs,
                mtu: Some(60_000),
                ..named("net%d")
            };
            let net = on(Tap::open(&config).expect("a TAP interface"), accepted);
            let wire = wire("net0");
            let mut rx = started(&net, 0);
            let mut tx = started(&net, 1);
            let parts = [12, 600, 1000];
            for _ in 0..8 {
                rx.offer(&[], &parts);
            }
            for seed in 0..30_u8 {
                let sent = frame(seed, 50 + usize::from(seed) * 40);
                send(&wire, &sent);
                let got = next(&mut rx, EXPERIMENT, &parts);
                assert_eq!(got[HEADER_LEN..], sent);
                let sent = frame(seed, 1400);
                tx.offer(&[&[0; HEADER_LEN], &sent[..14], &sent[14..]], &[]);
                tx.wait_used();
                assert_eq!(take(&wire, EXPERIMENT), sent);
            }
            if accepted & MRG_RXBUF != 0 {
                for _ in 0..12 {
                    rx.offer(&[], &[5000]);
                }
                let sent = frame(1, 45_000);
                send(&wire, &sent);
                assert_eq!(next(&mut rx, EXPERIMENT, &[])[HEADER_LEN..], sent);
            }
            net.send_rarp().expect("an interface");
            assert_eq!(take(&wire, [0x80, 0x35])[..], super::rarp_frame(mac())[..]);
            if pairs == 2 {
                let mut control = started(&net, 4);
                for active in [2, 1, 2] {
                    let head = control.offer(&[&[4, 0, active, 0]], &[1]);
                    control.wait_used();
                    assert_eq!(control.written(head), [0]);
                }
                let mut second = started(&net, 3);
                let sent = frame(9, 100);
                second.offer(&[&[0; HEADER_LEN], &sent], &[]);
                second.wait_used();
                assert_eq!(take(&wire, EXPERIMENT), sent);
            }
        });
    }
}

/// TCP on IPv4, four segments' worth, and the header that says so.
fn segments() -> ([u8; SOCKET_HEADER], Vec<u8>) {
    let mut frame = frame(5, 40 + 4000);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[
        0x45, 0, 0x0f, 0xc8, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    frame[34..54].copy_from_slice(&[
        0, 9, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    // NEEDS_CSUM, TCPV4; headers of 54 bytes, segments of 1000; checksum from 34 on, at 16.
    let header = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    (header, frame)
}

#[test]
fn large_packets_go_whole_to_who_takes_them() {
    for (accepted, pieces) in [(u64::MAX, 1), (MRG_RXBUF, 4)] {
        in_namespace(|| {
            let net = on(Tap::open(&named("net")).expect("a TAP interface"), accepted);
            let wire = wire("net");
            let mut rx = started(&net, 0);
            let mut tx = started(&net, 1);
            for _ in 0..20 {
                rx.offer(&[], &[1536]);
            }
            let (header, frame) = segments();
            let mut bytes = header.to_vec();
            bytes.extend(&frame);
            assert_eq!((&wire).write(&bytes).expect("room"), bytes.len());
            let mut payload = Vec::<u8>::new();
            for _ in 0..pieces {
                let got = next(&mut rx, [8, 0], &[]);
                if pieces == 1 {
                    // The length of the headers is the kernel's guess.
                    assert_eq!((&got[..2], &got[4..10]), (&header[..2], &header[4..]));
                    assert_eq!(got[10], 3);
                } else {
                    assert_eq!((got[0], got[1], got.len()), (0, 0, HEADER_LEN + 1054));
                }
                payload.extend(&got[HEADER_LEN + 54..]);
            }
            assert!(payload == frame[54..], "{} bytes", payload.len());
            let mut whole = header.to_vec();
            whole.extend([0, 0]);
            tx.offer(&[&whole, &frame], &[]);
            tx.wait_used();
            let got = take(&wire, [8, 0]);
            assert!(got[54..] == frame[54..], "{} bytes", got.len());
            // A header that the host cannot make sense of.
            whole[1] = 0x77;
            tx.offer(&[&whole, &frame], &[]);
            tx.wait_used();
            assert_eq!(counter(&net, "tx_errors"), 1);
        });
    }
}

#[test]
fn an_interface_that_is_down_drops() {
    in_namespace(|| {
        let net = on(Tap::open(&named("net")).expect("a TAP interface"), u64::MAX);
        let mut tx = started(&net, 1);
        let mut rx = started(&net, 0);
        let set = |flags| {
            let socket = control_socket().expect("a socket");
            let mut interface = Interface::named("net").expect("a name").with_flags(flags);
            interface
                .call(socket.as_fd(), libc::SIOCSIFFLAGS)
                .expect("an interface");
        };
        set(0);
        tx.offer(&[&[0; HEADER_LEN], &frame(1, 60)], &[]);
        tx.wait_used();
        assert_eq!(counter(&net, "tx_dropped"), 1);
        set(libc::IFF_UP);
        let wire = wire("net");
        let sent = frame(2, 60);
        tx.offer(&[&[0; HEADER_LEN], &sent], &[]);
        tx.wait_used();
        assert_eq!(take(&wire, EXPERIMENT), sent);
        for _ in 0..8 {
            rx.offer(&[], &[1536]);
        }
        send(&wire, &sent);
        assert_eq!(next(&mut rx, EXPERIMENT, &[])[HEADER_LEN..], sent);
    });
}
