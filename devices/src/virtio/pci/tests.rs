//! A driver against the transport, with a device that echoes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::pci::{PciBus, PciDevice};
use crate::virtio::testing::Driver;
use crate::virtio::{
    DeviceType, QueueError, QueueHandler, VERSION_1, VirtioDevice, Virtqueue, Worker,
};
use crate::{Bus, BusSpace, IoapicRoute, MsiSink, Persist};

/// Copies what it reads to what it writes.
struct Echo;

impl QueueHandler for Echo {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let memory = queue.memory().clone();
        while let Some(chain) = queue.pop()? {
            let mut bytes = vec![0; chain.readable.len() as usize];
            chain.readable.read(&memory, 0, &mut bytes)?;
            let written = queue.write(&chain.writable, 0, &bytes)?;
            queue.complete(chain.head, written as u32)?;
        }
        queue.signal()
    }
}

#[derive(Default)]
struct EchoDevice(Mutex<BTreeMap<u16, Worker<Echo>>>);

impl VirtioDevice for EchoDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "echo",
            id: 42,
            pci_class: [0xff, 0, 0],
        }
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![Driver::SIZE, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_space(b"configuration", offset, data);
    }
    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let worker = Worker::start("echo", Echo, queue)?;
        self.0.lock().expect("no panic").insert(index, worker);
        Ok(())
    }
    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.0.lock().expect("no panic").remove(&index)?;
        worker.stop().map(|(_, queue)| queue)
    }
}

/// Remembers the data of messages.
#[derive(Default)]
pub(crate) struct Sent(Mutex<Vec<u32>>);

impl MsiSink for Sent {
    fn send(&self, _address: u64, data: u32) {
        self.0.lock().expect("no panic").push(data);
    }
    fn route_changed(&self, _pin: u32, _route: Option<IoapicRoute>) {}
}

/// Remembers what is registered.
#[derive(Default)]
pub(crate) struct Events(Mutex<Vec<u64>>);

impl IoEvents for Events {
    fn register(&self, gpa: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().expect("no panic").push(gpa);
        Ok(())
    }
    fn unregister(&self, gpa: u64, _event: &EventFd) -> io::Result<()> {
        self.0
            .lock()
            .expect("no panic")
            .retain(|known| *known != gpa);
        Ok(())
    }
}

struct Machine {
    driver: Driver,
    mmio: Arc<Bus>,
    pci: Arc<PciBus>,
    function: Arc<VirtioPci>,
    sent: Arc<Sent>,
    events: Arc<Events>,
}

const WINDOW: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000;

impl Machine {
    fn new() -> Self {
        Self::with(Driver::new(0))
    }

    fn with(driver: Driver) -> Self {
        let mmio = Arc::new(Bus::new(BusSpace::Mmio));
        let pci = Arc::new(PciBus::new(&mmio, (WINDOW, 0x10_0000)));
        mmio.insert(ECAM, PciBus::ecam_len(), pci.clone())
            .expect("free");
        let (sent, events) = (Arc::new(Sent::default()), Arc::new(Events::default()));
        let function = VirtioPci::new(
            Arc::new(EchoDevice::default()),
            driver.memory().clone(),
            sent.clone(),
            events.clone(),
        );
        let function = Arc::new(function.expect("a function"));
        assert_eq!(pci.insert(function.clone(), None), Ok(1));
        function.resume();
        Self {
            driver,
            mmio,
            pci,
            function,
            sent,
            events,
        }
    }

    fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.mmio.read(ECAM + 0x8000 + offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_config(&self, offset: u64, value: u32) {
        self.mmio
            .write(ECAM + 0x8000 + offset, &value.to_le_bytes());
    }

    fn write(&self, at: u64, data: &[u8]) -> bool {
        self.mmio.write(WINDOW + at, data)
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.mmio.read(WINDOW + at, &mut bytes);
        bytes
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// What a driver does up to DRIVER_OK, with queue 0 and vector 1.
    fn set_up(&self, features: u64) {
        self.set_config(4, 6);
        self.set_config(self.msix(), 0xc000_0000 | 0x11);
        self.set_config(self.msix(), 0x8000_0011);
        for (word, at) in [0xfee0_0000u32, 0, 0x51, 0]
            .into_iter()
            .zip((0x4010..).step_by(4))
        {
            self.write(at, &word.to_le_bytes());
        }
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for select in [0u32, 1] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.write(0x14, &[11]);
        self.set_up_queue();
        self.write(0x14, &[15]);
    }

    fn set_up_queue(&self) {
        self.write(0x16, &[0, 0]);
        self.write(0x18, &Driver::SIZE.to_le_bytes());
        self.write(0x1a, &[1, 0]);
        for (at, address) in [(0x20, 0x1000u64), (0x28, 0x5000), (0x30, 0x6000)] {
            self.write(at, &(address as u32).to_le_bytes());
            self.write(at + 4, &[0; 4]);
        }
        self.write(0x1c, &[1, 0]);
    }

    fn msix(&self) -> u64 {
        let mut at = u64::from(self.config(0x34) & 0xff);
        while self.config(at) & 0xff != 0x11 {
            at = u64::from(self.config(at) >> 8 & 0xff);
            assert_ne!(at, 0, "no MSI-X");
        }
        at
    }

    fn echo(&mut self, text: &[u8]) {
        let head = self.driver.offer(&[text], &[text.len() as u32]);
        self.write(0x3000, &[0, 0]);
        assert_eq!(self.driver.wait_used(), (head, text.len() as u32));
        assert_eq!(self.driver.written(head), text);
    }
}

#[test]
fn a_driver_sets_it_up_and_is_interrupted() {
    let mut machine = Machine::new();
    assert_eq!(machine.config(0), 0x106a_1af4);
    assert!(!machine.write(0, &[0; 4]), "decoding is off");
    machine.set_up(VERSION_1 | 1);
    assert_eq!(machine.status(), 15);
    assert_eq!(
        *machine.events.0.lock().expect("no panic"),
        [WINDOW + 0x3000, WINDOW + 0x3004]
    );
    machine.echo(b"hello");
    while machine.sent.0.lock().expect("no panic").is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(machine.sent.0.lock().expect("no panic")[0], 0x51);
    assert_eq!(machine.read::<1>(0x1000), [1]);
    assert_eq!(machine.read::<1>(0x1000), [0]);
    assert_eq!(&machine.read::<8>(0x2000), b"configur");
    machine.write(0x14, &[0]);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read::<2>(0x1c), [0, 0]);
}

#[test]
fn what_a_driver_has_accepted_is_known_once_it_is_settled() {
    let machine = Machine::new();
    assert_eq!(machine.function.accepted(), 0);
    machine.set_up(VERSION_1 | 1);
    assert_eq!(machine.function.accepted(), VERSION_1 | 1);
    assert!(machine.function.lacking(VERSION_1 | 1).is_empty());
    assert_eq!(
        machine.function.lacking(VERSION_1 | 1 << 5 | 1 << 54),
        ["feature bit 5", "feature bit 54"]
    );
    machine.write(0x14, &[0]);
    assert_eq!(machine.function.accepted(), 0);
}

#[test]
fn a_network_device_names_what_its_interface_does_not_take() {
    let net = crate::net::testing::unconnected();
    let driver = Driver::new(0);
    let function = VirtioPci::new(
        Arc::new(net),
        driver.memory().clone(),
        Arc::new(Sent::default()),
        Arc::new(Events::default()),
    )
    .expect("a function");
    let accepted = VERSION_1 | 1 << 0 | 1 << 3 | 1 << 22 | 1 << 50;
    assert_eq!(
        function.lacking(accepted),
        ["VIRTIO_NET_F_MTU", "VIRTIO_NET_F_MQ", "feature bit 50"]
    );
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let machine = Machine::new();
    machine.set_up(VERSION_1 | 1 << 20);
    assert_eq!(machine.status() & 8, 0, "FEATURES_OK");
    assert_eq!(machine.status() & 4, 0, "DRIVER_OK");
    let machine = Machine::new();
    machine.set_up(1);
    assert_eq!(machine.status() & 8, 0, "not of version 1");
}

#[test]
fn bars_move_and_the_neighbours_stay() {
    let mut machine = Machine::new();
    machine.set_up(VERSION_1);
    machine.set_config(0x10, 0xc001_0000);
    assert!(!machine.write(0, &[0; 4]));
    assert_eq!(
        *machine.events.0.lock().expect("no panic"),
        [WINDOW + 0x1_3000, WINDOW + 0x1_3004]
    );
    // Over the ECAM window: nothing answers, the window goes on.
    machine.set_config(0x10, ECAM as u32);
    assert_eq!(machine.config(0), 0x106a_1af4);
    assert!(machine.events.0.lock().expect("no panic").is_empty());
    machine.set_config(0x10, WINDOW as u32);
    machine.echo(b"back again");
    machine.pci.remove(1).expect("it was there");
    assert!(!machine.write(0, &[0; 4]));
    assert_eq!(machine.config(0), u32::MAX);
}

#[test]
fn a_queue_is_reset_alone() {
    let mut machine = Machine::new();
    machine.set_up(VERSION_1);
    machine.echo(b"before");
    machine.write(0x3a, &[1, 0]);
    assert_eq!(machine.read::<2>(0x3a), [0, 0]);
    assert_eq!(machine.read::<2>(0x1c), [0, 0]);
    machine.driver.offer(&[b"nobody"], &[6]);
    machine.write(0x3000, &[0, 0]);
    assert_eq!(machine.driver.used(), None);
    machine.driver.restart();
    machine.set_up_queue();
    assert_eq!(machine.status(), 15);
    machine.echo(b"after");
}

#[test]
fn rings_outside_ram_need_a_reset_and_get_it() {
    let mut machine = Machine::new();
    machine.set_up(VERSION_1);
    machine.write(0x16, &[1, 0]);
    machine.write(0x18, &[16, 0]);
    for at in (0x20..0x38).step_by(4) {
        machine.write(at, &0xffff_f000u32.to_le_bytes());
    }
    machine.write(0x1c, &[1, 0]);
    assert_eq!(machine.status(), 15 | 64);
    // Queue 0 is served all the same.
    machine.echo(b"still here");
    machine.write(0x14, &[0]);
    assert_eq!(machine.status(), 0);
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut machine = Machine::new();
    machine.set_up(VERSION_1);
    machine.driver.offer_parts(&[(1 << 40, 8, true)]);
    machine.write(0x3000, &[0, 0]);
    while machine.status() & 64 == 0 {
        std::thread::yield_now();
    }
    machine.write(0x14, &[0]);
    assert_eq!(machine.status(), 0);
}

/// A device whose configuration is one number.
#[derive(Default)]
struct Number(std::sync::atomic::AtomicU64);

impl VirtioDevice for Number {
    fn device_type(&self) -> DeviceType {
        EchoDevice::default().device_type()
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let number = self.0.load(std::sync::atomic::Ordering::SeqCst);
        crate::virtio::read_space(&number.to_le_bytes(), offset, data);
    }
    fn start_queue(&self, _queue: Virtqueue) -> io::Result<()> {
        Ok(())
    }
    fn stop_queue(&self, _index: u16) -> Option<Virtqueue> {
        None
    }
}

/// A driver that reads two halves of two values sees it by the generation, also if the device has not told of the change yet.
#[test]
fn the_generation_changes_with_the_value() {
    let device = Arc::new(Number::default());
    let function = VirtioPci::new(
        device.clone(),
        Driver::new(0).memory().clone(),
        Arc::new(Sent::default()),
        Arc::new(Events::default()),
    )
    .expect("a function");
    let generation = || {
        let mut byte = [0];
        function.read_bar(0, 0x15, &mut byte);
        byte[0]
    };
    let first = generation();
    assert_eq!(generation(), first, "nothing has changed");
    device
        .0
        .store(1 << 32 | 1, std::sync::atomic::Ordering::SeqCst);
    let second = generation();
    assert_ne!(second, first);
    assert_eq!(generation(), second);
}

/// A device that comes finds an address that no other has, wherever a guest has put those before this machine was made.
#[test]
fn a_new_device_gets_no_address_of_one_that_was_restored() {
    for decoding in [6, 0] {
        let machine = Machine::new();
        machine.set_config(0x10, WINDOW as u32 + 0x8000);
        machine.set_config(4, decoding);
        let saved = machine.function.save();
        let there = Machine::new();
        there.function.pause();
        there.function.restore(&saved).expect("the same device");
        there.pci.place_all();
        let second = VirtioPci::new(
            Arc::new(EchoDevice::default()),
            there.driver.memory().clone(),
            there.sent.clone(),
            there.events.clone(),
        );
        let second = Arc::new(second.expect("a function"));
        there.pci.insert(second.clone(), None).expect("room");
        let mut bar = [0; 4];
        second.read_config(0x10, &mut bar);
        let at = u64::from(u32::from_le_bytes(bar));
        assert_ne!(at, WINDOW + 0x8000, "decoding: {decoding}");
        assert!((WINDOW..WINDOW + 0x10_0000).contains(&at));
    }
}

#[test]
fn a_paused_device_serves_nothing_and_goes_on_elsewhere() {
    let mut machine = Machine::new();
    machine.set_up(VERSION_1 | crate::virtio::EVENT_IDX);
    machine.echo(b"here");
    machine.function.pause();
    let head = machine.driver.offer(&[b"later"], &[5]);
    machine.write(0x3000, &[0, 0]);
    assert_eq!(machine.driver.used(), None);
    let saved = machine.function.save();
    let Machine {
        driver,
        function: old,
        ..
    } = machine;
    let mut there = Machine::with(driver);
    there.function.pause();
    there.function.restore(&saved).expect("the same device");
    there.pci.place_all();
    assert_eq!(there.function.save(), saved);
    assert_eq!(there.driver.used(), None);
    there.function.resume();
    assert_eq!(there.driver.wait_used(), (head, 5));
    there.echo(b"there");
    drop(old);
    // A state of nonsense changes nothing.
    let mut state: VirtioPciState = crate::state::decode(&*there.function, &saved).expect("ours");
    state.queues[0].size = 4096;
    assert!(
        there
            .function
            .restore(&crate::state::encode(&*there.function, &state))
            .is_err()
    );
    state.queues[0].size = 64;
    state.driver_features |= 1 << 23;
    assert!(
        there
            .function
            .restore(&crate::state::encode(&*there.function, &state))
            .is_err()
    );
    there.echo(b"still there");
}

#[test]
fn a_driver_that_has_not_finished_moves_with_all_that_it_has_written() {
    let here = Machine::new();
    here.set_config(4, 6);
    here.write(0x14, &[3]);
    here.write(12, &u32::MAX.to_le_bytes());
    here.write(0x16, &[1, 0]);
    here.write(0x18, &[0xff, 0xff]);
    here.write(0x1c, &[1, 0]);
    here.function.pause();
    let saved = here.function.save();
    let state: VirtioPciState = crate::state::decode(&*here.function, &saved).expect("ours");
    assert_eq!(
        (state.driver_features as u32, state.queues[1].size),
        (u32::MAX, 0xffff)
    );
    let there = Machine::new();
    there.function.pause();
    there.function.restore(&saved).expect("the same device");
    assert_eq!(there.function.save(), saved);
    // What it has written is judged when it says that it has finished.
    there.function.resume();
    there.pci.place_all();
    there.write(0x14, &[11]);
    assert_eq!(there.status() & 8, 0, "FEATURES_OK");
}

#[test]
fn any_access_anywhere() {
    let machine = Machine::new();
    machine.set_up(VERSION_1);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..60_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let len = [1, 2, 4, 8][(seed >> 40 & 3) as usize];
        let data = seed.to_le_bytes();
        if seed >> 50 & 3 == 0 {
            machine
                .function
                .write_config((seed >> 8 & 0xffc) as u16, &data[..len.min(4)]);
            machine
                .function
                .read_config((seed >> 20 & 0xffc) as u16, &mut [0; 4][..len.min(4)]);
        } else {
            machine
                .function
                .write_bar(0, seed >> 8 & 0x7fff, &data[..len]);
            machine
                .function
                .read_bar(0, seed >> 20 & 0x7fff, &mut [0; 8][..len]);
        }
    }
    machine
        .driver
        .memory()
        .read_obj::<u64>(GuestAddress(0))
        .expect("RAM");
}
