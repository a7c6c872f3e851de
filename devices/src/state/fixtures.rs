//! Saved states of earlier builds, kept in `devices/fixtures`: each loads in this build, and nothing of it is lost.
//!
//! A new version of a state gets a fixture of its own beside the old one: `VMM_FIXTURES=1 cargo test -p devices fixtures` writes those that
//! are not there yet. An old file is never written again.

use std::path::PathBuf;
use std::sync::Arc;

use memory::{Backing, GuestRam, RamRange};

use super::*;
use crate::interrupt::{InterruptLine, Unconnected};
use crate::pci::{PciDevice, PciHotplug};
use crate::testing::{LineLog, MsiLog, POWER_CONFIG, PowerLog};
use crate::vhost_user::testing::{BackEnd, Manner};
use crate::vhost_user::{VhostConfig, VhostKind, VhostUser};
use crate::virtio::VirtioDevice;
use crate::virtio::pci::tests::{Events, Sent};
use crate::virtio::pci::{VirtioPci, VirtioPciState};
use crate::{
    AcpiPower, Balloon, BalloonOptions, BusDevice, Cmos, Console, CpuHotplug, EndpointConfig,
    GuestMemorySize, I8042, Ioapic, Rng, Serial, VirtioMem, Vsock,
};

/// A device and where a guest reaches it.
enum Made {
    /// Reads and writes of its registers.
    Registers(Arc<dyn BusDevice>, Arc<dyn Persist>),
    /// A function with its BAR.
    Function(Arc<VirtioPci>),
}

fn function(device: Arc<dyn VirtioDevice>, ram: &Arc<GuestRam>) -> Made {
    let memory = ram.guest_memory().clone();
    let made = VirtioPci::new(
        device,
        memory,
        Arc::new(Sent::default()),
        Arc::new(Events::default()),
    );
    Made::Function(Arc::new(made.expect("a function")))
}

fn registers<D: BusDevice + Persist + 'static>(device: D) -> Made {
    let device = Arc::new(device);
    Made::Registers(device.clone(), device)
}

/// A device of a vhost-user back end, which goes again at once.
fn vhost(folder: &std::path::Path, name: &str, kind: VhostKind) -> Made {
    let ranges = [RamRange {
        gpa: 0,
        len: 16 << 20,
    }];
    let ram = Arc::new(GuestRam::new(&ranges, Backing::Memfd { thp: false }).expect("memory"));
    let socket = folder.join(name);
    let _back_end = BackEnd::new(&socket, Manner::good());
    let config = VhostConfig {
        socket,
        kind,
        num_queues: 2,
        queue_size: 64,
    };
    let device = VhostUser::new(name, config, Arc::clone(&ram)).expect("a device");
    function(Arc::new(device), &ram)
}

/// One of each kind, by the name of its fixture. The images and sockets of those that need them are in the folder.
fn devices(folder: &std::path::Path) -> Vec<(&'static str, Made)> {
    let ranges = [RamRange {
        gpa: 0,
        len: 16 << 20,
    }];
    let ram = Arc::new(GuestRam::new(&ranges, Backing::Anonymous { thp: false }).expect("memory"));
    let line: Arc<dyn InterruptLine> = Arc::new(Unconnected);
    let power = Arc::new(AcpiPower::new(
        POWER_CONFIG,
        Arc::new(PowerLog::default()),
        Arc::new(LineLog::default()),
    ));
    let image = folder.join("image");
    std::fs::write(&image, vec![0; 1 << 20]).expect("a file");
    struct Nobody;
    impl crate::pci::EjectSink for Nobody {
        fn ejected(&self, _slot: u8) {}
    }
    impl crate::VcpuSwitch for Nobody {
        fn plug(&self, _ids: &[u32]) {}
        fn unplug(&self, _id: u32) {}
        fn restored(&self, _id: u32, _present: bool) {}
    }
    let disk = |image| {
        let disk = crate::block::Block::new("disk", crate::block::DiskConfig::new(image));
        Arc::new(disk.expect("a disk"))
    };
    let second = folder.join("second");
    std::fs::write(&second, vec![0; 1 << 20]).expect("a file");
    let block = VhostKind::Block { read_only: false };
    let net = VhostKind::Net {
        mac: "52:54:00:12:34:56".parse().expect("an address"),
        mtu: Some(1400),
    };
    let fs = VhostKind::Fs {
        tag: "share".to_owned(),
    };
    let mem = |requested| {
        let made = VirtioMem::new(ram.clone(), 0, requested).expect("a region");
        made.begin();
        // As a driver leaves it: one more than is requested, which it has not given back yet.
        for block in [1, 2, 7] {
            made.plug_for_tests(block);
        }
        made.set_requested_bytes(4 << 20);
        Arc::new(made)
    };
    let balloon = Balloon::new(ram.clone(), 4 << 20, BalloonOptions::default());
    vec![
        (
            "ioapic-1",
            registers(Ioapic::new(Arc::new(MsiLog::default()))),
        ),
        (
            "serial-1",
            registers(Serial::new(EndpointConfig::Null, line).expect("a port")),
        ),
        ("cmos-1", registers(Cmos::new(GuestMemorySize::default()))),
        (
            "i8042-1",
            registers(I8042::new(Arc::new(PowerLog::default()))),
        ),
        (
            "acpi-power-1",
            Made::Registers(power.clone(), power.clone()),
        ),
        ("cpu-hotplug-1", {
            let vcpus = CpuHotplug::new(power.clone(), Arc::new(Nobody), 3, 5);
            vcpus.resize(4);
            vcpus.resize(2);
            registers(vcpus)
        }),
        ("pci-hotplug-1", {
            let slots = PciHotplug::new(power, Arc::new(Nobody));
            slots.tell_inserted(5);
            slots.ask_to_eject(9);
            registers(slots)
        }),
        ("watchdog-1", {
            struct Nobody;
            impl crate::WatchdogSink for Nobody {
                fn bites(&self) {}
            }
            let config = crate::WatchdogConfig {
                period: std::time::Duration::from_millis(100),
                shortest: 1,
                longest: 0xffff,
            };
            let watchdog = crate::Watchdog::new(config, Arc::new(Nobody)).expect("a thread");
            watchdog.was_reset(2, true);
            for (offset, value) in [(4, 300u32), (0, 1)] {
                watchdog.write(offset, &value.to_le_bytes());
            }
            registers(watchdog)
        }),
        ("virtio-blk-1", function(disk(image), &ram)),
        ("virtio-blk-1-capacity", function(disk(second), &ram)),
        (
            "virtio-rng-1",
            function(Arc::new(Rng::new(None).expect("a source")), &ram),
        ),
        (
            "virtio-balloon-1",
            function(Arc::new(balloon.expect("a balloon")), &ram),
        ),
        (
            "virtio-console-1",
            function(
                Arc::new(Console::new(EndpointConfig::Null, None).expect("a console")),
                &ram,
            ),
        ),
        (
            "virtio-vsock-1",
            function(
                Arc::new(Vsock::new(7, folder.join("vsock")).expect("a socket")),
                &ram,
            ),
        ),
        ("virtio-mem-1", function(mem(6 << 20), &ram)),
        (
            "virtio-net-1",
            function(Arc::new(crate::net::testing::unconnected()), &ram),
        ),
        ("virtio-vhost-blk-1", vhost(folder, "blk", block)),
        ("virtio-vhost-net-1", vhost(folder, "net", net)),
        ("virtio-vhost-fs-1", vhost(folder, "fs", fs)),
    ]
}

/// What a guest does to it before it is saved: some of everything that is kept.
fn use_it(device: &Made) {
    match device {
        Made::Registers(registers, _) => {
            // The last is the serial port's line control, the IOAPIC's window, the clock's data.
            for (offset, value) in [
                (0, 0x12u32),
                (0x10, 0x0001_0031),
                (1, 0),
                (3, 0x1b),
                (7, 0x5a),
            ] {
                let len = if offset % 4 == 0 && offset != 0 { 4 } else { 1 };
                registers.write(offset, &value.to_le_bytes()[..len]);
            }
        }
        Made::Function(function) => {
            function.set_bar(0, 0xc000_8000);
            function.write_config(4, &[6, 0]);
            for (at, value, len) in [
                (0x4000u64, 0xfee0_1000u32, 4),
                (0x4008, 0x41, 4),
                (0x400c, 0, 4),
                (0x14, 3, 1),
                // VERSION_1 and event indices.
                (0x08, 0, 4),
                (0x0c, 1 << 29, 4),
                (0x08, 1, 4),
                (0x0c, 1, 4),
                (0x14, 11, 1),
                (0x10, 0, 2),
                (0x16, 0, 2),
                (0x18, 16, 2),
                (0x1a, 0, 2),
                (0x20, 0x1000, 4),
                (0x28, 0x2000, 4),
                (0x30, 0x3000, 4),
                (0x1c, 1, 2),
                (0x14, 15, 1),
            ] {
                function.write_bar(0, at, &value.to_le_bytes()[..len]);
            }
        }
    }
}

fn persist(device: &Made) -> &dyn Persist {
    match device {
        Made::Registers(_, persist) => &**persist,
        Made::Function(function) => &**function,
    }
}

#[test]
fn states_of_earlier_builds_load_and_lose_nothing() {
    let fixtures = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures"));
    let folder = tempfile::tempdir().expect("a folder");
    for (name, device) in devices(folder.path()) {
        let path = fixtures.join(name);
        if std::env::var_os("VMM_FIXTURES").is_some() && !path.exists() {
            use_it(&device);
            let state = rmp_serde::to_vec_named(&persist(&device).save()).expect("encodes");
            std::fs::create_dir_all(&fixtures).expect("a folder");
            std::fs::write(&path, state).expect("a file");
            continue;
        }
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let old: SavedState = rmp_serde::from_slice(&bytes).expect(name);
        let device_ref = persist(&device);
        device_ref
            .restore(&old)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let new = device_ref.save();
        if let Made::Function(_) = device {
            let decode = |state: &SavedState| VirtioPciState {
                // What this host's device offers is its own matter.
                device_features: 0,
                ..decode::<VirtioPciState>(device_ref, state).expect(name)
            };
            let (old, mut new) = (decode(&old), decode(&new));
            if old.device.is_empty() {
                // A build that kept nothing of this device.
                new.device.clear();
            }
            assert!(old.queues[0].enabled && old.status == 15, "{name}: {old:?}");
            assert_eq!(old, new, "{name}");
        } else {
            assert_eq!(old, new, "{name}");
        }
    }
}
