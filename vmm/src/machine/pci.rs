//! The devices on the PCI bus: made from the config, each behind its function.
//!
//! ```text
//!   VmConfig ── rng, balloon, console, vsock, memory, disks, net, fs ──► VirtioDevice ──► VirtioPci ──► its slot of PciBus, or the next free one
//!   add ──► the same, then PciHotplug tells the guest
//!   ask_to_remove ──► PciHotplug asks the guest ──► it ejects (on a vCPU thread) ──► the device ends, Event::Ejected ──► the config
//! ```
//!
//! A slot is written into the config when it is given, so that a destination has every device where the guest knows it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::x86_64::layout;
use devices::balloon::{Balloon, BalloonOptions};
use devices::block::Block;
use devices::net::Net;
use devices::pci::{EjectSink, PciBus, PciHotplug};
use devices::rng::Rng;
use devices::vhost_user::VhostUser;
use devices::virtio::VirtioDevice;
use devices::virtio::pci::{IoEvents, VirtioPci};
use devices::vsock::Vsock;
use devices::{AcpiPower, Bus, Console, MsiSink, VirtioMem};
use hypervisor::{IoEventAddress, IoEventMatch, Vm};
use memory::GuestRam;
use migration::AcceptedFeatures;
use vmm_sys_util::eventfd::EventFd;

use super::demand::Demands;
use super::devices::DeviceError;
use super::ends;
use super::memory::hotplug_region;
use crate::config::{DiskConfig, FsConfig, NetConfig, VmConfig, VsockConfig, urandom};

/// What a device is, for those who need more of it than the bus does.
#[derive(Clone)]
pub(super) enum Device {
    Rng(Arc<Rng>),
    Balloon(Arc<Balloon>),
    Disk(Arc<Block>),
    Net(Arc<Net>),
    Console(Arc<Console>),
    Vsock(Arc<Vsock>),
    Vhost(Arc<VhostUser>),
    Memory(Arc<VirtioMem>),
}

impl Device {
    fn virtio(&self) -> Arc<dyn VirtioDevice> {
        match self {
            Self::Rng(device) => device.clone(),
            Self::Balloon(device) => device.clone(),
            Self::Disk(device) => device.clone(),
            Self::Net(device) => device.clone(),
            Self::Console(device) => device.clone(),
            Self::Vsock(device) => device.clone(),
            Self::Vhost(device) => device.clone(),
            Self::Memory(device) => device.clone(),
        }
    }

    /// Whether it may go while the machine exists. All others are part of every machine of the config: a destination would miss their state.
    fn is_removable(&self) -> bool {
        matches!(
            self,
            Self::Disk(_) | Self::Net(_) | Self::Vhost(_) | Self::Vsock(_)
        )
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        match self {
            Self::Rng(_) | Self::Vsock(_) => Vec::new(),
            Self::Console(console) => vec![("lost_output_bytes", console.lost_output())],
            Self::Balloon(balloon) => {
                let counters = balloon.counters();
                let mut all = vec![
                    ("target_bytes", balloon.target_bytes()),
                    ("actual_bytes", balloon.actual_bytes()),
                    ("inflated_pages", counters.inflated_pages),
                    ("deflated_pages", counters.deflated_pages),
                    ("reported_pages", counters.reported_pages),
                    ("discarded_pages", counters.discarded_pages),
                    ("ignored_pages", counters.ignored_pages),
                    ("failed_pages", counters.failed_pages),
                ];
                // The driver's, which come when it has been asked: by whoever looks, for the next one.
                balloon.request_statistics();
                all.extend(balloon.statistics());
                all
            }
            Self::Vhost(device) => vec![("connected", u64::from(device.is_connected()))],
            Self::Memory(memory) => memory.counters(),
            Self::Disk(disk) => disk.counters(),
            Self::Net(net) => net.counters(),
        }
    }
}

/// A device and where it is.
#[derive(Clone)]
pub(super) struct Function {
    pub(super) id: String,
    pub(super) slot: u8,
    pub(super) device: Device,
    pub(super) transport: Arc<VirtioPci>,
}

/// All that is on the bus, shared with what ejects.
struct Functions {
    bus: Arc<PciBus>,
    all: Mutex<Vec<Function>>,
    demands: Arc<Demands>,
}

impl Functions {
    fn lock(&self) -> MutexGuard<'_, Vec<Function>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EjectSink for Functions {
    fn ejected(&self, slot: u8) {
        let mut all = self.lock();
        let Some(at) = all
            .iter()
            .position(|function| function.slot == slot && function.device.is_removable())
        else {
            return;
        };
        let gone = all.remove(at);
        drop(all);
        self.bus.remove(slot);
        gone.transport.pause();
        tracing::info!(id = gone.id, "the guest has let the device go");
        self.demands.ejected(gone.id);
    }
}

/// What a function needs of the machine.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) mmio: Arc<Bus>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) msi: Arc<dyn MsiSink>,
    pub(super) vm: Arc<dyn Vm>,
}

/// The bus with its devices.
pub(super) struct PciSet {
    functions: Arc<Functions>,
    hotplug: Arc<PciHotplug>,
    around: Surroundings,
}

impl PciSet {
    /// Makes the bus and its devices, all paused; each slot is written into the config. The images of a machine that arrives are not locked
    /// yet: its source still has them.
    pub(super) fn build(
        config: &mut VmConfig,
        around: Surroundings,
        power: &Arc<AcpiPower>,
        demands: &Arc<Demands>,
        arriving: bool,
    ) -> Result<Self, DeviceError> {
        let window = (layout::PCI_MMIO_BASE, layout::PCI_MMIO_SIZE);
        let bus = Arc::new(PciBus::new(&around.mmio, window));
        around
            .mmio
            .insert(layout::PCI_ECAM_BASE, PciBus::ecam_len(), bus.clone())?;
        let functions = Arc::new(Functions {
            bus,
            all: Mutex::default(),
            demands: Arc::clone(demands),
        });
        let sink: Arc<dyn EjectSink> = functions.clone();
        let set = Self {
            hotplug: Arc::new(PciHotplug::new(Arc::clone(power), sink)),
            functions,
            around,
        };
        let source = Some(config.rng.src.clone()).filter(|source| *source != urandom());
        let rng = Rng::new(source).map_err(|error| refused("rng", error))?;
        set.put("rng", None, Device::Rng(Arc::new(rng)))?;
        if let Some(balloon) = &config.balloon {
            let options = BalloonOptions {
                deflate_on_oom: balloon.deflate_on_oom,
                free_page_reporting: balloon.free_page_reporting,
            };
            let ram = Arc::clone(&set.around.ram);
            let balloon = Balloon::new(ram, balloon.size, options)
                .map_err(|error| refused("balloon", error))?;
            set.put("balloon", None, Device::Balloon(Arc::new(balloon)))?;
        }
        if let Some(end) = super::devices::end(&config.console)? {
            let console = Console::new(end, None).map_err(|error| refused("console", error))?;
            set.put("console", None, Device::Console(Arc::new(console)))?;
        }
        if let Some(region) = hotplug_region(&config.memory, &set.around.ram) {
            let ram = Arc::clone(&set.around.ram);
            let added = config.memory.hotplugged_size.unwrap_or(0);
            let memory =
                VirtioMem::new(ram, region, added).map_err(|error| refused("mem", error))?;
            set.put("mem", None, Device::Memory(Arc::new(memory)))?;
        }
        // Those whose slots are known first, so that no other takes them.
        let mut disks: Vec<&mut DiskConfig> = config.disks.iter_mut().collect();
        disks.sort_by_key(|disk| disk.pci_slot.is_none());
        let mut nets: Vec<&mut NetConfig> = config.net.iter_mut().collect();
        nets.sort_by_key(|net| net.pci_slot.is_none());
        let known = |slot: &Option<u8>| slot.is_some();
        let (old_disks, new_disks) = disks
            .into_iter()
            .partition::<Vec<_>, _>(|disk| known(&disk.pci_slot));
        let (old_nets, new_nets) = nets
            .into_iter()
            .partition::<Vec<_>, _>(|net| known(&net.pci_slot));
        let (old_fs, new_fs) =
            (config.fs.iter_mut()).partition::<Vec<_>, _>(|fs| known(&fs.pci_slot));
        for fs in old_fs {
            set.put_fs(fs)?;
        }
        for disk in old_disks {
            set.put_disk(disk, arriving)?;
        }
        for net in old_nets {
            set.put_net(net)?;
        }
        if let Some(vsock) = &config.vsock {
            set.put_vsock(vsock)?;
        }
        for net in new_nets {
            set.put_net(net)?;
        }
        for disk in new_disks {
            set.put_disk(disk, arriving)?;
        }
        for fs in new_fs {
            set.put_fs(fs)?;
        }
        Ok(set)
    }

    fn put_disk(&self, config: &mut DiskConfig, arriving: bool) -> Result<(), DeviceError> {
        let id = config.id.clone().unwrap_or_default();
        let device = if config.vhost_user {
            let disk = ends::vhost_disk(&id, config, &self.around.ram);
            Device::Vhost(Arc::new(disk.map_err(|error| refused(&id, error))?))
        } else {
            let disk = ends::disk(&id, config, arriving).map_err(|error| refused(&id, error))?;
            Device::Disk(Arc::new(disk))
        };
        let slot = self.put(&id, config.pci_slot, device)?;
        config.pci_slot = Some(slot);
        Ok(())
    }

    /// Its slot, if it does not say one, is the first that no other has: the same at every start.
    fn put_vsock(&self, config: &VsockConfig) -> Result<u8, DeviceError> {
        let id = config.id();
        let vsock = Vsock::new(config.cid, config.socket.clone());
        let vsock = vsock.map_err(|error| refused(id, error))?;
        self.put(id, config.pci_slot, Device::Vsock(Arc::new(vsock)))
    }

    fn put_net(&self, config: &mut NetConfig) -> Result<(), DeviceError> {
        let id = config.id.clone().unwrap_or_default();
        let device = if config.vhost_user {
            let net = ends::vhost_net(&id, config, &self.around.ram);
            Device::Vhost(Arc::new(net.map_err(|error| refused(&id, error))?))
        } else {
            let net = ends::net(config).map_err(|error| refused(&id, error))?;
            Device::Net(Arc::new(net))
        };
        let slot = self.put(&id, config.pci_slot, device)?;
        config.pci_slot = Some(slot);
        Ok(())
    }

    fn put_fs(&self, config: &mut FsConfig) -> Result<(), DeviceError> {
        let id = config.id.clone().unwrap_or_default();
        let fs = ends::fs(&id, config, &self.around.ram).map_err(|error| refused(&id, error))?;
        let slot = self.put(&id, config.pci_slot, Device::Vhost(Arc::new(fs)))?;
        config.pci_slot = Some(slot);
        Ok(())
    }

    /// Puts a device behind a function in a slot.
    fn put(&self, id: &str, slot: Option<u8>, device: Device) -> Result<u8, DeviceError> {
        let around = &self.around;
        let memory = around.ram.guest_memory().clone();
        let events = Arc::new(Notifications(Arc::clone(&around.vm)));
        let transport = VirtioPci::new(device.virtio(), memory, Arc::clone(&around.msi), events)
            .map_err(|error| refused(id, error))?;
        let transport = Arc::new(transport);
        let slot = self.functions.bus.insert(transport.clone(), slot)?;
        self.functions.lock().push(Function {
            id: id.to_owned(),
            slot,
            device,
            transport,
        });
        Ok(slot)
    }

    /// Adds a disk to a machine that runs, and tells the guest.
    pub(super) fn add_disk(&self, config: &mut DiskConfig) -> Result<(), DeviceError> {
        self.put_disk(config, false)?;
        self.added();
        Ok(())
    }

    /// Adds a network interface to a machine that runs, and tells the guest.
    pub(super) fn add_net(&self, config: &mut NetConfig) -> Result<(), DeviceError> {
        self.put_net(config)?;
        self.added();
        Ok(())
    }

    /// Adds a file system to a machine that runs, and tells the guest.
    pub(super) fn add_fs(&self, config: &mut FsConfig) -> Result<(), DeviceError> {
        self.put_fs(config)?;
        self.added();
        Ok(())
    }

    /// Adds a vsock to a machine that runs, and tells the guest.
    pub(super) fn add_vsock(&self, config: &mut VsockConfig) -> Result<(), DeviceError> {
        config.pci_slot = Some(self.put_vsock(config)?);
        self.added();
        Ok(())
    }

    /// Lets the newest device run and tells the guest of it.
    fn added(&self) {
        let new = self.functions.lock().last().cloned();
        if let Some(new) = new {
            new.transport.resume();
            self.hotplug.tell_inserted(new.slot);
        }
    }

    pub(super) fn set_balloon(&self, bytes: u64) {
        if let Some(Function {
            device: Device::Balloon(balloon),
            ..
        }) = self.find("balloon")
        {
            balloon.set_target_bytes(bytes);
        }
    }

    /// Asks the guest to let a device go; false if there is none of this id.
    pub(super) fn ask_to_remove(&self, id: &str) -> bool {
        let slot = self.find(id).map(|function| function.slot);
        if let Some(slot) = slot {
            self.hotplug.ask_to_eject(slot);
        }
        slot.is_some()
    }

    pub(super) fn find(&self, id: &str) -> Option<Function> {
        let all = self.functions.lock();
        all.iter().find(|function| function.id == id).cloned()
    }

    pub(super) fn hotplug(&self) -> Arc<PciHotplug> {
        Arc::clone(&self.hotplug)
    }

    pub(super) fn functions(&self) -> Vec<Function> {
        self.functions.lock().clone()
    }

    /// What the drivers have accepted of each device.
    pub(super) fn accepted(&self) -> Vec<AcceptedFeatures> {
        let functions = self.functions().into_iter();
        functions
            .map(|function| AcceptedFeatures {
                features: function.transport.accepted(),
                id: function.id,
            })
            .filter(|accepted| accepted.features != 0)
            .collect()
    }

    /// What these devices lack of what drivers have accepted elsewhere, one reason a device. A device that is not here is none of this
    /// method's business.
    pub(super) fn lacking(&self, accepted: &[AcceptedFeatures]) -> Vec<String> {
        let reason = |wanted: &AcceptedFeatures| {
            let function = self.find(&wanted.id)?;
            let missing = function.transport.lacking(wanted.features);
            let place = match &function.device {
                Device::Net(net) => net.interface().unwrap_or("its interface"),
                _ => "it",
            };
            (!missing.is_empty()).then(|| {
                format!(
                    "device {}: the guest's driver uses {}, which {place} does not offer at this host",
                    wanted.id,
                    missing.join(", ")
                )
            })
        };
        accepted.iter().filter_map(reason).collect()
    }

    pub(super) fn pause(&self) {
        for function in self.functions() {
            function.transport.pause();
        }
    }

    pub(super) fn resume(&self) {
        for function in self.functions() {
            function.transport.resume();
        }
    }

    /// Puts the BARs where the restored configuration spaces say.
    pub(super) fn restored(&self) {
        self.functions.bus.place_all();
    }

    pub(super) fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let functions = self.functions().into_iter();
        functions
            .map(|function| {
                let counters = function.device.counters().into_iter();
                let counters = counters.map(|(name, value)| (name.to_owned(), value));
                (function.id, counters.collect::<BTreeMap<_, _>>())
            })
            .filter(|(_, counters)| !counters.is_empty())
            .collect()
    }

    /// The pseudo terminal of the console, if it leads to one.
    pub(super) fn console_pty(&self) -> Option<PathBuf> {
        match self.find("console")?.device {
            Device::Console(console) => console.pty_path().map(Path::to_owned),
            _ => None,
        }
    }

    /// What adds memory.
    pub(super) fn virtio_mem(&self) -> Option<Arc<VirtioMem>> {
        match self.find("mem")?.device {
            Device::Memory(memory) => Some(memory),
            _ => None,
        }
    }

    pub(super) fn disks(&self) -> Vec<(String, Arc<Block>)> {
        let functions = self.functions().into_iter();
        functions
            .filter_map(|function| match function.device {
                Device::Disk(disk) => Some((function.id, disk)),
                _ => None,
            })
            .collect()
    }

    pub(super) fn vhost(&self) -> Vec<(String, Arc<VhostUser>)> {
        let functions = self.functions().into_iter();
        functions
            .filter_map(|function| match function.device {
                Device::Vhost(device) => Some((function.id, device)),
                _ => None,
            })
            .collect()
    }

    pub(super) fn nets(&self) -> Vec<Arc<Net>> {
        let functions = self.functions().into_iter();
        functions
            .filter_map(|function| match function.device {
                Device::Net(net) => Some(net),
                _ => None,
            })
            .collect()
    }
}

fn refused(id: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DeviceError {
    DeviceError::Function {
        id: id.to_owned(),
        source: source.into(),
    }
}

/// Notification addresses, as I/O events of the hypervisor.
struct Notifications(Arc<dyn Vm>);

impl IoEvents for Notifications {
    fn register(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .register_ioevent(event, IoEventAddress::Mmio(gpa), IoEventMatch::Any)
            .map_err(io::Error::other)
    }

    fn unregister(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .unregister_ioevent(event, IoEventAddress::Mmio(gpa), IoEventMatch::Any)
            .map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use devices::{BusSpace, IoapicRoute};
    use memory::{Backing, RamRange};

    use super::super::Event;
    use super::*;

    struct Nobody;

    impl MsiSink for Nobody {
        fn send(&self, _address: u64, _data: u32) {}
        fn route_changed(&self, _pin: u32, _route: Option<IoapicRoute>) {}
    }

    impl IoEvents for Nobody {
        fn register(&self, _gpa: u64, _event: &EventFd) -> io::Result<()> {
            Ok(())
        }
        fn unregister(&self, _gpa: u64, _event: &EventFd) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_guest_ejects_only_what_the_config_can_do_without() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [0; 4096]).expect("room");
        let disk = devices::block::DiskConfig::new(path);
        let disk = Device::Disk(Arc::new(Block::new("d", disk).expect("an image")));
        let rng = Device::Rng(Arc::new(Rng::new(None).expect("no file")));
        let ranges = [RamRange {
            gpa: 0,
            len: 1 << 20,
        }];
        let ram = GuestRam::new(&ranges, Backing::Anonymous { thp: false }).expect("memory");
        let mmio = Arc::new(Bus::new(BusSpace::Mmio));
        let (events, inbox) = mpsc::channel();
        let functions = Functions {
            bus: Arc::new(PciBus::new(&mmio, (0xc000_0000, 0x10_0000))),
            all: Mutex::default(),
            demands: Arc::new(Demands::new(7, events)),
        };
        for (id, device) in [("rng", rng), ("d", disk)] {
            let memory = ram.guest_memory().clone();
            let transport =
                VirtioPci::new(device.virtio(), memory, Arc::new(Nobody), Arc::new(Nobody));
            let transport = Arc::new(transport.expect("a function"));
            let slot = functions.bus.insert(transport.clone(), None).expect("room");
            functions.lock().push(Function {
                id: id.to_owned(),
                slot,
                device,
                transport,
            });
        }
        for slot in 0..32 {
            functions.ejected(slot);
        }
        let left: Vec<String> = functions.lock().iter().map(|f| f.id.clone()).collect();
        assert_eq!(left, ["rng"]);
        assert!(matches!(inbox.try_recv(), Ok(Event::Ejected(7, id)) if id == "d"));
        assert!(inbox.try_recv().is_err());
    }
}
