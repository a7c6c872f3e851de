//! Back ends that lie, are silent or go: the device lives, and nobody waits for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vhost::vhost_user::message::{FrontendReq as Request, VhostUserProtocolFeatures as Protocol};

use super::testing::{BackEnd, Bad, Manner, connected, disk};
use super::{VhostConfig, VhostError, VhostKind, VhostUser};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_ring_is_handed_over_with_all_that_its_back_end_must_know_first() {
    let (folder, driver) = (folder(), Driver::shared(0));
    let (back_end, device) = connected(&folder.path().join("s"), &driver, Manner::good());
    let device = device.expect("a device");
    device.connect(driver.interrupt.clone());
    assert_eq!(device.features(), 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12);
    assert_eq!(
        device.transport_features(),
        1 << 28 | 1 << 29 | 1 << 32 | 1 << 40
    );
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    device.set_features(1 << 32 | 1 << 9 | 1 << 40);
    back_end.heard();
    device.start_queue(driver.queue()).expect("a ring");
    let wanted = [
        Request::SET_FEATURES,
        Request::SET_MEM_TABLE,
        Request::GET_INFLIGHT_FD,
        Request::SET_INFLIGHT_FD,
        Request::SET_VRING_NUM,
        Request::SET_VRING_BASE,
        Request::SET_VRING_ADDR,
        Request::SET_VRING_CALL,
        Request::SET_VRING_KICK,
        Request::SET_VRING_ENABLE,
    ];
    assert_eq!(back_end.heard(), wanted.map(|request| request as u32));
    device.start_logging().expect("it can");
    device.stop_logging();
    assert_eq!(back_end.heard()[0], Request::SET_LOG_BASE as u32);
    let queue = device.stop_queue(0).expect("a ring");
    assert_eq!(queue.next_available(), 0);
    assert_eq!(back_end.heard(), [Request::GET_VRING_BASE as u32]);
}

#[test]
fn what_cannot_work_is_refused_at_once_with_the_reason() {
    let driver = Driver::shared(0);
    let without = |bits: u64| Manner {
        features: Manner::good().features & !bits,
        ..Manner::good()
    };
    let few = Manner {
        rings: 0,
        ..Manner::good()
    };
    let plain = Manner {
        protocol: Protocol::MQ,
        ..Manner::good()
    };
    for (manner, says) in [
        (without(1 << 32), "virtio 1"),
        (without(1 << 30), "protocol features"),
        (few, "1 queues"),
        (plain, "configuration space"),
        (
            Manner::bad(Request::GET_FEATURES, Bad::Silent),
            "does not answer GET_FEATURES",
        ),
        (
            Manner::bad(Request::SET_OWNER, Bad::Silent),
            "does not answer SET_OWNER",
        ),
        (
            Manner::bad(Request::SET_OWNER, Bad::Refuses),
            "refuses SET_OWNER",
        ),
        (Manner::bad(Request::GET_CONFIG, Bad::HangsUp), "hung up"),
        (
            Manner::bad(Request::GET_CONFIG, Bad::Body(vec![0; 12])),
            "not as long",
        ),
        (
            Manner::bad(Request::GET_CONFIG, Bad::Body(Vec::new())),
            "not as long",
        ),
        (
            Manner::bad(Request::GET_FEATURES, Bad::Body(vec![0; 7])),
            "8 bytes",
        ),
        (
            Manner::bad(Request::GET_FEATURES, Bad::Bytes(vec![0xff; 12])),
            "something else",
        ),
        (
            // GET_FEATURES, an answer, of 4 GiB.
            Manner::bad(
                Request::GET_FEATURES,
                Bad::Bytes(vec![1, 0, 0, 0, 5, 0, 0, 0, 255, 255, 255, 255]),
            ),
            "too long",
        ),
    ] {
        let folder = folder();
        let (_back_end, device) = connected(&folder.path().join("s"), &driver, manner);
        let error = device.expect_err(says).to_string();
        assert!(error.contains(says), "{error}; not {says}");
    }
    let folder = folder();
    let nobody = VhostUser::new("disk", disk(&folder.path().join("s")), driver.ram.clone());
    assert!(matches!(nobody, Err(VhostError::Connect { .. })));
    let (_back_end, device) = connected(&folder.path().join("s"), &Driver::new(0), Manner::good());
    assert!(
        device
            .expect_err("private memory")
            .to_string()
            .contains("memory.shared")
    );
    let read_only = VhostConfig {
        kind: VhostKind::Block { read_only: true },
        ..disk(&folder.path().join("t"))
    };
    let _back_end = BackEnd::new(&folder.path().join("t"), Manner::good());
    let device = VhostUser::new("disk", read_only, driver.ram.clone());
    assert!(
        device
            .expect_err("writable")
            .to_string()
            .contains("read-only")
    );
}

#[test]
fn a_ring_comes_back_from_a_back_end_that_is_silent_or_lies() {
    let wrong = Manner {
        base: 9,
        ..Manner::good()
    };
    let huge = Manner {
        base: 0x1_0000,
        ..Manner::good()
    };
    for manner in [
        wrong,
        huge,
        Manner::bad(Request::GET_VRING_BASE, Bad::Silent),
        Manner::bad(Request::GET_VRING_BASE, Bad::HangsUp),
        Manner::bad(Request::GET_VRING_BASE, Bad::Body(vec![1; 8])),
    ] {
        let (folder, driver) = (folder(), Driver::shared(0));
        let (back_end, device) = connected(&folder.path().join("s"), &driver, Manner::good());
        let device = device.expect("a device");
        device.connect(driver.interrupt.clone());
        device.start_queue(driver.queue()).expect("a ring");
        back_end.behave(manner);
        let queue = device.stop_queue(0).expect("a ring");
        assert_eq!(queue.next_available(), 0);
        back_end.behave(Manner::good());
        // It is looked for, and serves again.
        wait_until("it is back", || device.is_connected());
        back_end.heard();
        device.start_queue(queue).expect("a ring");
        assert!(back_end.heard().contains(&(Request::SET_VRING_KICK as u32)));
        assert_eq!(
            driver
                .interrupt
                .reset
                .load(std::sync::atomic::Ordering::SeqCst),
            0
        );
    }
}

#[test]
fn one_that_went_is_looked_for_and_gets_its_rings_again() {
    let (folder, mut driver) = (folder(), Driver::shared(0));
    let (back_end, device) = connected(&folder.path().join("s"), &driver, Manner::good());
    let device = device.expect("a device");
    device.connect(driver.interrupt.clone());
    device.start_queue(driver.queue()).expect("a ring");
    // It has notes of what it has begun: a request under way is no reason to give up.
    driver.offer(&[b"abc"], &[1]);
    device.start_logging().expect("it can");
    back_end.heard();
    back_end.hang_up();
    assert!(back_end.wait_for(Request::SET_VRING_ENABLE));
    wait_until("it is back", || device.is_connected());
    drop(back_end);
    wait_until("it is gone", || !device.is_connected());
    assert!(
        device
            .check_movable()
            .expect_err("it is gone")
            .contains("gone")
    );
    assert!(device.start_logging().is_err());
    // Pausing needs nobody.
    let queue = device.stop_queue(0).expect("a ring");
    assert_eq!(queue.next_available(), 0);
    // It comes back while the machine is paused: what it had begun is for this machine to have finished.
    {
        let _back_end = BackEnd::new(&folder.path().join("s"), Manner::good());
        wait_until("it is back", || device.is_connected());
        assert!(
            device
                .check_complete()
                .expect_err("unfinished")
                .contains("to finish")
        );
        device.start_queue(queue).expect("a ring");
        assert_eq!(device.check_complete(), Ok(()));
    }
    wait_until("it is gone", || !device.is_connected());
    // One that is smaller, and one that cannot note requests, are not taken for it; a good one is.
    let smaller = Manner {
        sectors: 1024,
        ..Manner::good()
    };
    let forgetful = Manner {
        protocol: Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG,
        ..Manner::good()
    };
    for manner in [smaller, forgetful] {
        let back_end = BackEnd::new(&folder.path().join("s"), manner);
        assert!(back_end.wait_for(Request::GET_CONFIG));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!device.is_connected());
    }
    let back_end = BackEnd::new(&folder.path().join("s"), Manner::good());
    assert!(back_end.wait_for(Request::SET_VRING_ENABLE));
    assert_eq!(
        driver
            .interrupt
            .reset
            .load(std::sync::atomic::Ordering::SeqCst),
        0
    );
}

#[test]
fn one_without_notes_takes_nothing_up_again_that_it_may_have_done() {
    let forgetful = Manner {
        protocol: Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG,
        ..Manner::good()
    };
    let (folder, mut driver) = (folder(), Driver::shared(0));
    let (back_end, device) = connected(&folder.path().join("s"), &driver, forgetful);
    let device = device.expect("a device");
    device.connect(driver.interrupt.clone());
    let resets = || driver_resets(&driver);
    device.start_queue(driver.queue()).expect("a ring");
    assert!(device.check_movable().expect_err("no log").contains("LOG"));
    // Idle: it may come and go.
    back_end.heard();
    back_end.hang_up();
    assert!(back_end.wait_for(Request::SET_VRING_ENABLE));
    assert_eq!(resets(), 0);
    driver.offer(&[b"abc"], &[1]);
    wait_until("it is back", || device.is_connected());
    back_end.heard();
    back_end.hang_up();
    wait_until("the driver is told", || driver_resets(&driver) == 1);
    wait_until("it is back", || device.is_connected());
    assert!(!back_end.heard().contains(&(Request::SET_VRING_KICK as u32)));
    // The driver resets the device and begins anew.
    assert!(device.stop_queue(0).is_some());
    device.reset();
    driver.restart();
    device.start_queue(driver.queue()).expect("a ring");
    assert!(back_end.wait_for(Request::SET_VRING_KICK));
}

#[test]
fn what_was_asked_for_while_nobody_was_there_is_not_in_doubt() {
    use std::sync::atomic::Ordering;
    let forgetful = Manner {
        protocol: Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG,
        ..Manner::good()
    };
    let (folder, mut driver) = (folder(), Driver::shared(0));
    let (back_end, device) = connected(&folder.path().join("s"), &driver, forgetful.clone());
    let device = device.expect("a device");
    device.connect(driver.interrupt.clone());
    device.start_queue(driver.queue()).expect("a ring");
    drop(back_end);
    wait_until("it is gone", || !device.is_connected());
    // It may have ended requests without a call.
    wait_until("the driver looks", || {
        driver.interrupt.used.load(Ordering::SeqCst) > 0
    });
    driver.offer(&[b"abc"], &[1]);
    let queue = device.stop_queue(0).expect("a ring");
    assert_eq!(driver_resets(&driver), 0);
    let back_end = BackEnd::new(&folder.path().join("s"), forgetful);
    wait_until("it is back", || device.is_connected());
    assert_eq!(device.check_complete(), Ok(()));
    device.start_queue(queue).expect("a ring");
    assert!(back_end.wait_for(Request::SET_VRING_KICK));
    // Now it may have begun it, and the one after it is not asked about a ring that it was not given.
    back_end.hang_up();
    wait_until("the driver is told", || driver_resets(&driver) == 1);
    wait_until("it is back", || device.is_connected());
    back_end.heard();
    assert!(device.stop_queue(0).is_some());
    assert!(!back_end.heard().contains(&(Request::GET_VRING_BASE as u32)));
    assert_eq!(driver_resets(&driver), 1);
}

fn driver_resets(driver: &Driver) -> usize {
    driver
        .interrupt
        .reset
        .load(std::sync::atomic::Ordering::SeqCst)
}

#[test]
fn a_state_is_for_a_disk_that_is_not_smaller() {
    let (folder, driver) = (folder(), Driver::shared(0));
    let (_back_end, device) = connected(&folder.path().join("s"), &driver, Manner::good());
    let saved = device.expect("a device").save();
    let smaller = Manner {
        sectors: 2047,
        ..Manner::good()
    };
    let (_back_end, device) = connected(&folder.path().join("t"), &driver, smaller);
    let device = device.expect("a device");
    assert!(
        device
            .restore(&saved)
            .expect_err("smaller")
            .contains("2048")
    );
    assert!(device.restore(&[0xc1; 9]).is_err());
}

#[test]
fn a_network_keeps_its_control_queue_here() {
    const CTRL_VQ: u64 = 1 << 17;
    const GUEST_ANNOUNCE: u64 = 1 << 21;
    const MQ: u64 = 1 << 22;
    let folder = folder();
    let socket = folder.path().join("s");
    let back_end = BackEnd::new(&socket, Manner::good());
    let drivers: Vec<_> = (0..4).map(Driver::shared).collect();
    let config = VhostConfig {
        socket,
        kind: VhostKind::Net {
            mac: "52:54:00:12:34:56".parse().expect("an address"),
            mtu: Some(1400),
        },
        num_queues: 4,
        queue_size: 64,
    };
    let device = VhostUser::new("nic", config, drivers[0].ram.clone()).expect("a device");
    device.connect(drivers[0].interrupt.clone());
    let own = CTRL_VQ | GUEST_ANNOUNCE | MQ;
    assert_eq!(device.features() & own, own);
    assert_eq!(device.queue_sizes(), [64; 5]);
    let mut space = [0; 12];
    device.read_config(0, &mut space);
    assert_eq!(
        space,
        [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0, 0x78, 5]
    );
    device.set_features(1 << 32 | own);
    for driver in &drivers {
        device.start_queue(driver.queue()).expect("a ring");
    }
    assert_eq!(back_end.switched(), [(0, 1), (1, 1), (2, 0), (3, 0)]);
    let mut control = Driver::shared(4);
    device.start_queue(control.queue()).expect("a queue");
    let mut command = |bytes: &[u8]| {
        let head = control.offer(&[bytes], &[1]);
        control.wait_used();
        control.written(head)[0]
    };
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    assert_eq!(back_end.switched(), [(2, 1), (3, 1)]);
    assert_eq!(command(&[4, 0, 3, 0]), 1);
    // Back with the pairs that were in use.
    back_end.heard();
    back_end.hang_up();
    assert!(back_end.wait_for(Request::SET_VRING_ENABLE));
    wait_until("it is back", || device.is_connected());
    assert_eq!(back_end.switched(), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    assert!(device.announce());
    device.read_config(0, &mut space);
    assert_eq!(space[6..8], [3, 0]);
    assert_eq!(command(&[3, 0]), 0);
    for index in 0..5 {
        assert!(device.stop_queue(index).is_some());
    }
    let saved = device.save();
    device.reset();
    assert!(!device.announce());
    assert_eq!(device.restore(&saved), Ok(()));
}

/// Requests whose answers are read, with a ring's life.
const ANSWERED: [Request; 10] = [
    Request::GET_FEATURES,
    Request::GET_PROTOCOL_FEATURES,
    Request::SET_PROTOCOL_FEATURES,
    Request::GET_QUEUE_NUM,
    Request::SET_OWNER,
    Request::GET_CONFIG,
    Request::SET_MEM_TABLE,
    Request::GET_INFLIGHT_FD,
    Request::GET_VRING_BASE,
    Request::SET_LOG_BASE,
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn no_answer_does_harm(
        request in prop::sample::select(ANSWERED.to_vec()),
        bytes in prop::collection::vec(any::<u8>(), 0..80),
        framed in any::<bool>(),
    ) {
        let bad = if framed { Bad::Body(bytes) } else { Bad::Bytes(bytes) };
        let (folder, driver) = (folder(), Driver::shared(0));
        let back_end = BackEnd::new(&folder.path().join("s"), Manner::bad(request, bad));
        let config = disk(&folder.path().join("s"));
        let ram = Arc::clone(&driver.ram);
        if let Ok(device) = VhostUser::open("disk", config, ram, Duration::from_millis(20)) {
            device.connect(driver.interrupt.clone());
            let _ = device.start_queue(driver.queue());
            let _ = device.start_logging();
            device.collect_dirty();
            prop_assert!(device.stop_queue(0).is_some());
        }
        drop(back_end);
    }
}
