//! Commands, configuration space, saved state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::features::*;
use super::testing::*;
use super::{MacAddr, Net, NetConfig, NetError, rarp_frame};
use crate::virtio::testing::{Counted, Driver};
use crate::virtio::{VERSION_1, VirtioDevice};

const OK: u8 = 0;
const ERR: u8 = 1;

/// Gives a command, in two buffers, and returns the answer.
fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    let (class, data) = bytes.split_at(bytes.len().min(2));
    let head = driver.offer(&[class, data], &[1]);
    assert_eq!(driver.wait_used(), (head, 1));
    driver.written(head)[0]
}

fn set_offloads(offloads: u64) -> Vec<u8> {
    let mut bytes = vec![5, 0];
    bytes.extend(offloads.to_le_bytes());
    bytes
}

fn config(net: &Net) -> [u8; 12] {
    let mut space = [0xff; 12];
    net.read_config(0, &mut space);
    space
}

#[test]
fn what_it_is() {
    let (net, _, _) = device(3, 0);
    let kind = net.device_type();
    assert_eq!(
        (kind.name, kind.id, kind.pci_class),
        ("virtio-net", 1, [2, 0, 0])
    );
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    assert_eq!(net.features() & (MQ | MTU), MQ | MTU);
    assert_eq!(config(&net)[..6], mac().octets());
    assert_eq!(config(&net)[6..], [1, 0, 3, 0, 0xdc, 0x05]);
    let mut beyond = [0xff; 4];
    net.read_config(10, &mut beyond);
    assert_eq!(beyond, [0xdc, 0x05, 0, 0]);
    net.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    let plain = Net::on_ports(NetConfig::new(mac()), ports(1).0, Default::default());
    let features = plain.expect("a device").features();
    assert_eq!(
        features & (MQ | MTU | GUEST_UFO | HOST_UFO | GUEST_USO4 | HOST_USO),
        0
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let with = |change: fn(&mut NetConfig), pairs| {
        let mut config = NetConfig::new(mac());
        change(&mut config);
        Net::on_ports(config, ports(pairs).0, OFFLOADS).map(drop)
    };
    assert!(with(|_| {}, 1).is_ok());
    assert!(matches!(with(|_| {}, 0), Err(NetError::QueuePairs(0))));
    assert!(matches!(with(|_| {}, 65), Err(NetError::QueuePairs(65))));
    assert!(matches!(
        with(|config| config.queue_size = 100, 1),
        Err(NetError::QueueSize(100))
    ));
    assert!(matches!(
        with(|config| config.queue_size = 2048, 1),
        Err(NetError::QueueSize(2048))
    ));
    assert!(matches!(
        with(|config| config.mtu = Some(67), 1),
        Err(NetError::Mtu(67))
    ));
}

#[test]
fn commands_are_carried_out() {
    let (net, _others, host) = device(2, u64::MAX);
    let mut control = started(&net, 4);
    let address = [0x02, 1, 2, 3, 4, 5];
    for accepted in [
        &[0, 0, 1][..],
        &[0, 1, 0],
        // No addresses; one unicast and two multicast addresses.
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[
            1, 0, 1, 0, 0, 0, 2, 1, 1, 1, 1, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 2,
        ],
        &[1, 1, 2, 1, 2, 3, 4, 5],
        &[3, 0],
        &[4, 0, 2, 0],
    ] {
        assert_eq!(command(&mut control, accepted), OK, "{accepted:?}");
    }
    assert_eq!(net.mac().octets(), address);
    assert_eq!(config(&net)[..6], address);
    assert_eq!(host.asked(), [Asked::Attached(1, true)]);
    let some = GUEST_CSUM | GUEST_TSO4;
    assert_eq!(command(&mut control, &set_offloads(some)), OK);
    assert_eq!(
        host.asked(),
        [Asked::Offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4)]
    );
    assert_eq!(command(&mut control, &[4, 0, 1, 0]), OK);
    assert_eq!(host.asked(), [Asked::Attached(1, false)]);
    host.refuses.store(true, Ordering::SeqCst);
    assert_eq!(command(&mut control, &[4, 0, 2, 0]), ERR);
    assert_eq!(command(&mut control, &set_offloads(0)), ERR);
    host.refuses.store(false, Ordering::SeqCst);
    net.stop_queue(4).expect("a queue");
    net.reset();
    assert_eq!(net.mac(), mac());
    assert_eq!(
        host.asked(),
        [Asked::Offloads(0), Asked::Attached(1, false)]
    );
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let (net, _others, host) = device(2, net_features());
    let mut control = started(&net, 4);
    let bytes = net.save();
    for refused in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 2],
        &[0, 0, 1, 1],
        &[0, 2, 1],
        &[1, 0],
        &[1, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[1, 1, 2, 1, 2, 3, 4],
        &[1, 1, 2, 1, 2, 3, 4, 5, 6],
        // A group, nobody.
        &[1, 1, 3, 1, 2, 3, 4, 5],
        &[1, 1, 0, 0, 0, 0, 0, 0],
        &[2, 0, 1, 0],
        &[3, 0, 0],
        &[3, 1],
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 2],
        &[4, 1, 2, 0],
        &[5, 0, 0],
        &[5, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        &[6, 0],
        &[255, 255, 255],
    ] {
        assert_eq!(command(&mut control, refused), ERR, "{refused:?}");
    }
    assert_eq!(command(&mut control, &vec![0; 70_000]), ERR);
    assert_eq!(net.save(), bytes);
    assert_eq!(host.asked(), []);
    // Without room for an answer.
    control.offer(&[&[0, 0, 1]], &[]);
    until("reset", || {
        control.interrupt.reset.load(Ordering::SeqCst) == 1
    });
}

fn net_features() -> u64 {
    device(2, 0).0.features()
}

#[test]
fn commands_of_features_that_were_not_accepted_are_refused() {
    let (net, _others, _) = device(2, CTRL_VQ);
    // Without VIRTIO_NET_F_MQ the control queue comes after the first pair.
    let mut control = started(&net, 2);
    for refused in [
        &[0, 0, 1][..],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 1, 2, 1, 2, 3, 4, 5],
        &[3, 0],
        &[4, 0, 1, 0],
        &set_offloads(0),
    ] {
        assert_eq!(command(&mut control, refused), ERR, "{refused:?}");
    }
}

#[test]
fn a_receiver_starts_and_stops_with_its_pair() {
    let (net, others, _) = device(2, u64::MAX);
    let mut control = started(&net, 4);
    let mut second = started(&net, 2);
    for _ in 0..3 {
        let head = second.offer(&[], &[1536]);
        others[1].send(&packet(1, 60)).expect("room");
        assert_eq!(second.used(), None);
        assert_eq!(command(&mut control, &[4, 0, 2, 0]), OK);
        assert_eq!(second.wait_used(), (head, 72));
        assert_eq!(command(&mut control, &[4, 0, 1, 0]), OK);
        // It has seen that it is not active when it has stopped and started.
        let queue = net.stop_queue(2).expect("a queue");
        net.start_queue(queue).expect("a thread");
    }
}

#[test]
fn announcing() {
    let (net, others, _) = device(1, CTRL_VQ);
    let counted = Arc::new(Counted::default());
    net.connect(counted.clone());
    assert!(!net.announce());
    assert_eq!(config(&net)[6], 1);
    net.set_features(VERSION_1 | CTRL_VQ | GUEST_ANNOUNCE);
    assert!(net.announce());
    assert_eq!(config(&net)[6], 3);
    assert_eq!(counted.config.load(Ordering::SeqCst), 1);
    let mut control = started(&net, 2);
    assert_eq!(command(&mut control, &[3, 0]), OK);
    assert_eq!(config(&net)[6], 1);
    net.send_rarp().expect("room");
    let sent = receive(&others[0]).expect("a packet");
    assert_eq!(sent[..12], [0; 12]);
    assert_eq!(sent[12..], rarp_frame(mac()));
}

#[test]
fn state_goes_from_one_to_another() {
    for features_first in [true, false] {
        let (net, _others, _) = device(2, u64::MAX);
        let mut control = started(&net, 4);
        for bytes in [
            &[1, 1, 2, 1, 2, 3, 4, 5][..],
            &[4, 0, 2, 0],
            &set_offloads(GUEST_CSUM),
        ] {
            assert_eq!(command(&mut control, bytes), OK);
        }
        net.announce();
        net.stop_queue(4).expect("a queue");
        let saved = net.save();
        let (to, _others, host) = device(2, 0);
        if features_first {
            to.set_features(u64::MAX);
        }
        to.restore(&saved).expect("a state");
        if !features_first {
            to.set_features(u64::MAX);
        }
        assert_eq!(to.save(), saved);
        assert_eq!(config(&to), config(&net));
        assert_eq!(config(&to)[6], 3);
        let asked = host.asked();
        assert!(asked.contains(&Asked::Attached(1, true)));
        let last = asked
            .iter()
            .rfind(|asked| matches!(asked, Asked::Offloads(_)));
        assert_eq!(last, Some(&Asked::Offloads(libc::TUN_F_CSUM)));
    }
}

#[derive(serde::Serialize)]
struct Newer<'a> {
    #[serde(with = "serde_bytes")]
    mac: &'a [u8],
    active_pairs: u16,
    offloads: Option<u64>,
    of_tomorrow: u32,
}

#[test]
fn states_that_cannot_be_are_refused() {
    let (net, _others, host) = device(2, u64::MAX);
    let before = net.save();
    let restore = |mac: &[u8], active_pairs, offloads| {
        let newer = Newer {
            mac,
            active_pairs,
            offloads,
            of_tomorrow: 7,
        };
        net.restore(&rmp_serde::to_vec_named(&newer).expect("bytes"))
    };
    let good = [2, 0, 0, 0, 0, 1];
    for (mac, pairs, offloads, reason) in [
        (&good[..5], 1, None, "5 octets"),
        (&[1, 0, 0, 0, 0, 1], 1, None, "group"),
        (&[0; 6], 1, None, "zeros"),
        (&good, 0, None, "0 active"),
        (&good, 3, None, "3 active"),
        (&good, 1, Some(MRG_RXBUF), "no offloads"),
    ] {
        let error = restore(mac, pairs, offloads).expect_err(reason);
        assert!(error.contains(reason), "{error}");
    }
    for nonsense in [&b""[..], b"\xc1", &before[..before.len() - 1], &[0; 5000]] {
        assert!(net.restore(nonsense).is_err());
    }
    host.refuses.store(true, Ordering::SeqCst);
    assert!(restore(&good, 2, None).is_err());
    host.refuses.store(false, Ordering::SeqCst);
    assert_eq!(net.save(), before);
    restore(&good, 2, Some(GUEST_CSUM)).expect("a newer build's state");
    assert_eq!(net.mac(), MacAddr::new(good).expect("an address"));
}
