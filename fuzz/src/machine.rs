//! A machine with some virtio functions on a PCI bus, its guest, and its host.
//!
//! ```text
//!   input ─► Op, Op, … ─┬─ guest: ECAM, BARs, RAM, rings, resets ──► Bus ─► PciBus, VirtioPci ─► device
//!                       ├─ machine: pause, save and restore, power on ─┘                          │
//!                       ├─ time: step() ──────────────────────────────── queues are served ◄──────┤
//!                       └─ Host: packets, bytes, sizes, peers ────────────────────────────────────┘
//!   the end ─► every function back in its place, reset and set up ─► Host::check: well-formed requests succeed
//! ```

use std::io;
use std::sync::{Arc, Mutex};

use devices::pci::hotplug::EjectSink;
use devices::pci::{PciBus, PciDevice, PciHotplug};
use devices::virtio::VirtioDevice;
use devices::virtio::pci::{IoEvents, VirtioPci};
use devices::{
    AcpiPower, AcpiPowerConfig, Bus, BusSpace, IoapicRoute, MsiSink, Persist, PowerRequest,
    PowerSink, SavedState,
};
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::{Op, Reader};
use crate::queue::Side;
use crate::ram;

/// Where BARs are, and configuration space.
const WINDOW: u64 = 0xc000_0000;
const WINDOW_LEN: u64 = 0x10_0000;
const ECAM: u64 = 0xe000_0000;
/// Most operations of an input.
const MOST_OPS: usize = 400;
/// The features of the transport: indirect descriptors, event indices, version 1, queue reset.
pub const VERSION_1: u64 = 1 << 32;

/// The other end of a device, and what it is for.
pub trait Host {
    /// Something happens at the host's end.
    fn event(&mut self, kind: u8, data: &[u8]);
    /// Brings the host's end into a state in which requests succeed.
    fn settle(&mut self) {}
    /// Whether the host has changed so that a state may be refused that a guest can bring about.
    fn may_refuse(&self) -> bool {
        false
    }
    /// Features that the driver of [`Host::check`] takes, of those that are offered.
    fn features(&self) -> u64 {
        0
    }
    /// Makes well-formed requests of a device that was just set up, and panics if they do not succeed.
    fn check(&mut self, driver: &mut Driver<'_>);
}

/// Counts messages.
#[derive(Default)]
struct Messages(Mutex<u64>);

impl MsiSink for Messages {
    fn send(&self, _address: u64, _data: u32) {
        *self.0.lock().expect("no panic") += 1;
    }
    fn route_changed(&self, _pin: u32, _route: Option<IoapicRoute>) {}
}

/// Notifications are exits, as with a hypervisor without ioeventfds.
struct NoEvents;

impl IoEvents for NoEvents {
    fn register(&self, _gpa: u64, _event: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unregister(&self, _gpa: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// Slots that the guest has ejected.
#[derive(Default)]
struct Ejected(Mutex<Vec<u8>>);

impl EjectSink for Ejected {
    fn ejected(&self, slot: u8) {
        self.0.lock().expect("no panic").push(slot);
    }
}

struct Deaf;

impl PowerSink for Deaf {
    fn request(&self, _request: PowerRequest) {}
}

impl devices::InterruptLine for Deaf {
    fn trigger(&self) {}
    fn set_level(&self, _high: bool) {}
}

struct Function {
    pci: Arc<VirtioPci>,
    slot: u8,
    /// Where its BAR was at first.
    bar: u32,
    present: bool,
    paused: bool,
    host: Box<dyn Host>,
    side: Side,
}

/// What all functions share.
pub struct World {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    mmio: Arc<Bus>,
    bus: Arc<PciBus>,
    slots: PciHotplug,
    ejected: Arc<Ejected>,
    messages: Arc<Messages>,
}

/// See the module's text.
pub struct Machine {
    world: World,
    functions: Vec<Function>,
}

/// A well-behaved driver of one function.
pub struct Driver<'a> {
    /// The machine.
    pub world: &'a World,
    pci: &'a VirtioPci,
    /// Its queues.
    pub side: &'a mut Side,
}

impl Machine {
    /// With these devices, the first in slot 1.
    pub fn new(devices: Vec<(Arc<dyn VirtioDevice>, Box<dyn Host>)>) -> Self {
        Self::on(ram::fresh(), devices)
    }

    /// The same in memory that a device knows already.
    pub fn on(ram: Arc<GuestRam>, devices: Vec<(Arc<dyn VirtioDevice>, Box<dyn Host>)>) -> Self {
        let mmio = Arc::new(Bus::new(BusSpace::Mmio));
        let bus = Arc::new(PciBus::new(&mmio, (WINDOW, WINDOW_LEN)));
        mmio.insert(ECAM, PciBus::ecam_len(), bus.clone())
            .expect("it is the first");
        let config = AcpiPowerConfig {
            sleep_control: 0,
            sleep_status: 1,
            reset: 2,
            event: 3,
            reset_value: 1,
            s5_sleep_type: 5,
        };
        let ejected = Arc::new(Ejected::default());
        let power = Arc::new(AcpiPower::new(config, Arc::new(Deaf), Arc::new(Deaf)));
        let messages = Arc::new(Messages::default());
        let world = World {
            ram,
            mmio,
            bus,
            slots: PciHotplug::new(power, ejected.clone()),
            ejected,
            messages,
        };
        let mut functions = Vec::new();
        for (device, host) in devices {
            let sizes = device.queue_sizes();
            let memory = world.ram.guest_memory().clone();
            let pci = VirtioPci::new(device, memory, world.messages.clone(), Arc::new(NoEvents));
            let pci = Arc::new(pci.expect("a function"));
            let slot = world.bus.insert(pci.clone(), None).expect("room");
            pci.resume();
            let bar = world.config(slot, 0x10);
            let side = Side::new(functions.len(), &sizes);
            functions.push(Function {
                pci,
                slot,
                bar,
                present: true,
                paused: false,
                host,
                side,
            });
        }
        Self { world, functions }
    }

    /// Does what the input says, then sees whether all still works. Returns how many requests the devices have finished on the way.
    pub fn run(mut self, data: &[u8]) -> u64 {
        let mut input = Reader(data);
        for _ in 0..MOST_OPS {
            if input.is_empty() {
                break;
            }
            let op = Op::read(&mut input);
            self.carry_out(op);
        }
        let finished = self
            .functions
            .iter()
            .map(|it| it.side.finished(&self.world))
            .sum();
        self.check();
        finished
    }

    /// Restores the only device from a state that may be anything, lets it go on, and sees whether all works after a reset.
    pub fn run_restored(mut self, state: &SavedState) {
        let function = &mut self.functions[0];
        function.pause(true);
        crate::states::take(&*function.pci, state);
        self.world.bus.place_all();
        function.pause(false);
        for _ in 0..8 {
            devices::fuzzing::step(false);
        }
        self.check();
    }

    fn function(&mut self, slot: u8) -> (&World, &mut Function) {
        let count = self.functions.len();
        (&self.world, &mut self.functions[usize::from(slot) % count])
    }

    fn carry_out(&mut self, op: Op) {
        let world = &self.world;
        match op {
            Op::ConfigRead { at, len } => {
                world.read(ECAM + u64::from(at) % PciBus::ecam_len(), len)
            }
            Op::ConfigWrite { at, data } => {
                world
                    .mmio
                    .write(ECAM + u64::from(at) % PciBus::ecam_len(), &data);
            }
            Op::MmioRead { gpa, len } => world.read(gpa, len),
            Op::MmioWrite { gpa, data } => {
                world.mmio.write(gpa, &data);
            }
            Op::Ram { at, data } => {
                let base = if at >> 31 != 0 { ram::HIGH.gpa } else { 0 };
                let gpa = GuestAddress(base + u64::from(at & 0x7fff_ffff));
                // Past the end of RAM nothing happens.
                let _ = world.ram.guest_memory().write_slice(&data, gpa);
            }
            Op::Step { how } => {
                for _ in 0..how & 7 {
                    devices::fuzzing::step(how & 0x80 != 0);
                }
            }
            Op::BarRead { slot, at, len } => {
                let (world, function) = self.function(slot);
                if let Some(bar) = function.driver(world).bar() {
                    world.read(bar + u64::from(at), len);
                }
            }
            Op::BarWrite { slot, at, data } => {
                let (world, function) = self.function(slot);
                function.driver(world).write(at.into(), &data);
            }
            Op::Descriptor {
                slot,
                queue,
                index,
                gpa,
                len,
                flags,
                next,
            } => {
                let (world, function) = self.function(slot);
                let queue = function.side.queue(queue);
                queue.descriptor(world, index, (gpa, len, flags, next));
            }
            Op::Available { slot, queue, head } => {
                let (world, function) = self.function(slot);
                function.side.queue(queue).make_available(world, head);
            }
            Op::Notify { slot, queue } => {
                let (world, function) = self.function(slot);
                function.driver(world).notify(queue);
            }
            Op::SetUp { slot, features } => {
                let (world, function) = self.function(slot);
                function.driver(world).set_up(features);
            }
            Op::Chain {
                slot,
                queue,
                how,
                parts,
            } => {
                let (world, function) = self.function(slot);
                function.side.offer(world, queue, &parts, how & 1 != 0);
                function.driver(world).notify(queue);
            }
            Op::Host { slot, kind, data } => self.function(slot).1.host.event(kind, &data),
            Op::Pause { slot, on } => {
                let (_, function) = self.function(slot);
                function.pause(on & 1 != 0);
            }
            Op::Restore { slot, flips } => self.function(slot).1.restore(&flips),
            Op::Reset { slot } => {
                let (world, function) = self.function(slot);
                function.driver(world).write(0x14, &[0]);
            }
            Op::ResetQueue { slot, queue } => {
                let (world, function) = self.function(slot);
                let mut driver = function.driver(world);
                driver.write(0x16, &[queue, 0]);
                driver.write(0x3a, &[1, 0]);
                driver.side.queue(queue).empty(world);
            }
            Op::PowerOn { slot } => {
                let (world, function) = self.function(slot);
                function.pci.power_on();
                world.bus.place_all();
            }
            Op::Slot { slot, present } => {
                let (world, function) = self.function(slot);
                function.set_present(world, present & 1 != 0);
            }
        }
    }

    /// Brings every function back into its place, as a guest could, and sees whether it works.
    fn check(mut self) {
        for function in &mut self.functions {
            function.set_present(&self.world, true);
            self.world.set_config(function.slot, 4, 0);
        }
        for function in &mut self.functions {
            self.world.set_config(function.slot, 0x10, function.bar);
            self.world.set_config(function.slot, 4, 6);
            // What one of them was asked for may still overwrite what another's driver has in memory.
            function.driver(&self.world).write(0x14, &[0]);
            function.pause(false);
        }
        for function in &mut self.functions {
            function.host.settle();
            let features = function.host.features();
            let mut driver = function.driver(&self.world);
            driver.set_up(features);
            assert_eq!(driver.status(), 15, "a device that was reset is ready");
            let before = *self.world.messages.0.lock().expect("no panic");
            function.host.check(&mut Driver {
                world: &self.world,
                pci: &function.pci,
                side: &mut function.side,
            });
            assert_eq!(function.driver(&self.world).status(), 15, "and stays so");
            let after = *self.world.messages.0.lock().expect("no panic");
            assert!(after > before, "its driver hears of it");
        }
    }
}

impl Function {
    fn driver<'a>(&'a mut self, world: &'a World) -> Driver<'a> {
        Driver {
            world,
            pci: &self.pci,
            side: &mut self.side,
        }
    }

    fn pause(&mut self, on: bool) {
        self.paused = on;
        match on {
            true => self.pci.pause(),
            false => self.pci.resume(),
        }
    }

    fn set_present(&mut self, world: &World, present: bool) {
        if present == self.present {
            return;
        }
        self.present = present;
        if present {
            let pci: Arc<dyn PciDevice> = self.pci.clone();
            world
                .bus
                .insert(pci, Some(self.slot))
                .expect("its slot is free");
            world.slots.tell_inserted(self.slot);
        } else {
            world.slots.ask_to_eject(self.slot);
            // What the AML does, and what the machine does then.
            devices::BusDevice::write(&world.slots, 8, &(1u32 << self.slot).to_le_bytes());
            let ejected = std::mem::take(&mut *world.ejected.0.lock().expect("no panic"));
            assert_eq!(ejected, [self.slot]);
            assert!(world.bus.remove(self.slot).is_some());
        }
    }

    /// Saves and restores. What a guest can bring about can be restored, and is the same then.
    fn restore(&mut self, flips: &[(u16, u8)]) {
        self.pci.pause();
        let mut saved = self.pci.save();
        for (at, bits) in flips {
            let at = usize::from(*at) % saved.data.len();
            saved.data[at] ^= bits;
        }
        let restored = self.pci.restore(&saved);
        if flips.iter().all(|(_, bits)| *bits == 0) && !self.host.may_refuse() {
            restored.expect("a state that a guest can bring about");
            assert_eq!(self.pci.save(), saved);
        }
        if !self.paused {
            self.pci.resume();
        }
    }
}

impl World {
    fn read(&self, gpa: u64, len: u8) {
        self.mmio.read(gpa, &mut [0; 16][..usize::from(len % 17)]);
    }

    fn config(&self, slot: u8, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.mmio
            .read(ECAM + u64::from(slot) * 0x8000 + at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_config(&self, slot: u8, at: u64, value: u32) {
        self.mmio
            .write(ECAM + u64::from(slot) * 0x8000 + at, &value.to_le_bytes());
    }
}

impl Driver<'_> {
    fn bar(&self) -> Option<u64> {
        self.pci.bars().first().map(|range| range.gpa)
    }

    /// Writes within the BAR; nothing happens while it is nowhere.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        if let Some(gpa) = self.bar().and_then(|bar| bar.checked_add(at)) {
            self.world.mmio.write(gpa, data);
        }
    }

    /// Reads within the BAR, zeros while it is nowhere.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(gpa) = self.bar().and_then(|bar| bar.checked_add(at)) {
            self.world.mmio.read(gpa, &mut bytes);
        }
        bytes
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// Notifies.
    pub fn notify(&mut self, queue: u8) {
        let queue = u64::from(queue) % self.side.count() as u64;
        self.write(0x3000 + queue * 4, &[queue as u8, 0]);
    }

    /// All that a driver does before it makes requests (section 3.1.1), with MSI-X.
    pub fn set_up(&mut self, features: u64) {
        let slot = self.side.slot();
        if self.bar().is_none() {
            self.world.set_config(slot, 4, 6);
        }
        self.write(0x14, &[0]);
        self.enable_msix(slot);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        let mut offered = 0;
        for select in [0u32, 1] {
            self.write(0, &select.to_le_bytes());
            offered |= u64::from(u32::from_le_bytes(self.read(4))) << (32 * select);
        }
        let accepted = features & offered | VERSION_1;
        for select in [0u32, 1] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &((accepted >> (32 * select)) as u32).to_le_bytes());
        }
        self.write(0x14, &[11]);
        self.write(0x10, &[0, 0]);
        for number in 0..self.side.count() {
            let queue = self.side.queue(number as u8);
            queue.empty(self.world);
            let (size, places) = (queue.size, queue.places());
            self.write(0x16, &(number as u16).to_le_bytes());
            self.write(0x18, &size.to_le_bytes());
            self.write(0x1a, &(number as u16 + 1).to_le_bytes());
            for (at, gpa) in (0x20..).step_by(8).zip(places) {
                self.write(at, &(gpa as u32).to_le_bytes());
                self.write(at + 4, &((gpa >> 32) as u32).to_le_bytes());
            }
            self.write(0x1c, &[1, 0]);
        }
        self.write(0x14, &[15]);
    }

    fn enable_msix(&mut self, slot: u8) {
        let mut at = u64::from(self.world.config(slot, 0x34) & 0xfc);
        let mut control = 0;
        // An empty slot has an endless list.
        for _ in 0..48 {
            control = self.world.config(slot, at);
            if control & 0xff == 0x11 {
                break;
            }
            at = u64::from(control >> 8 & 0xfc);
        }
        self.world
            .set_config(slot, at, control & 0x3fff_ffff | 0x8000_0000);
        for vector in 0..=self.side.count() as u64 {
            for (word, value) in (0..).step_by(4).zip([0xfee0_0000u32, 0, 0x40, 0]) {
                self.write(0x4000 + vector * 16 + word, &value.to_le_bytes());
            }
        }
    }

    /// Makes a request and waits for it; what was written into its writable buffers, and the length that was said.
    pub fn request(&mut self, queue: u8, readable: &[&[u8]], writable: &[u32]) -> (Vec<u8>, u32) {
        let request = self.offer(queue, readable, writable);
        self.wait(queue, &request)
    }

    /// Makes a request.
    pub fn offer(&mut self, queue: u8, readable: &[&[u8]], writable: &[u32]) -> Request {
        use crate::input::Part;
        let readable = readable.iter().map(|bytes| Part::Readable(bytes.to_vec()));
        let writable = writable.iter().map(|len| Part::Writable(*len));
        let parts: Vec<_> = readable.chain(writable).collect();
        let (head, writable) = self.side.offer(self.world, queue, &parts, false);
        self.notify(queue);
        Request { head, writable }
    }

    /// Lets the device work until a request that was made comes back.
    pub fn wait(&mut self, queue: u8, request: &Request) -> (Vec<u8>, u32) {
        for _ in 0..1000 {
            if devices::fuzzing::step(false) == 0 {
                // A while later.
                devices::fuzzing::step(true);
            }
            if let Some((head, len)) = self.side.queue(queue).used(self.world) {
                assert_eq!(head, request.head, "requests come back in order");
                let mut all = Vec::new();
                for &(gpa, len) in &request.writable {
                    let mut part = vec![0; len as usize];
                    let memory = self.world.ram.guest_memory();
                    memory
                        .read_slice(&mut part, GuestAddress(gpa))
                        .expect("RAM");
                    all.extend(part);
                }
                return (all, len);
            }
            assert_eq!(self.status(), 15, "a well-formed request breaks nothing");
        }
        panic!("a well-formed request never comes back");
    }
}

/// A request that was made.
pub struct Request {
    head: u16,
    writable: Vec<(u64, u32)>,
}
