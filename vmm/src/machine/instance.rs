//! A machine that has been built: RAM, hypervisor, devices, vCPU threads.
//!
//! ```text
//!   Plan ──build──► Instance (parked) ──load──► kernel in RAM, vCPU 0 at its entry ──resume──► runs
//!                        └─────────────restore(state of another host)──────────────resume──► goes on
//! ```
//!
//! Field order is drop order: vCPUs before the VM, the VM before the RAM it maps.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::memory::{GuestRam, RamRange};
use arch::x86_64::acpi;
use arch::x86_64::boot::{self, BootError, BootSources};
use arch::x86_64::cpu_model::{CpuModel, Unavailable};
use arch::x86_64::cpuid::{Interface, MissingFeature, differences, for_vcpu, has_hyperv};
use arch::x86_64::fresh::FreshState;
use arch::x86_64::layout;
use arch::x86_64::msr;
use arch::x86_64::state::Bytes;
use arch::x86_64::topology::{Topology, TopologyError};
use devices::block::DiskError;
use devices::vhost_user::VhostUser;
use devices::{CpuHotplug, CpuHotplugStatus, VirtioMem, Watchdog};
use hypervisor::{Hypervisor, HypervisorKind, MemorySlot, Vcpu, Vm, VmOptions};
use migration::{AcceptedFeatures, CpuContract, DeviceState, MachineState, Manifest, RunState};

use super::Event;
use super::bus::{IrqSink, MachineBus};
use super::demand::Demands;
use super::devices::{DeviceError, DeviceSet};
use super::ends;
use super::gate::Gate;
use super::memory;
use super::vcpus::VcpuSet;
use crate::boot::{Booted, DiskBootError};
use crate::config::{ConfigError, DiskConfig, FsConfig, NetConfig, VmConfig, VsockConfig};

/// Why a machine cannot be built or started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// The config cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The vCPU topology cannot work.
    #[error("cpus.topology: {0}")]
    Topology(#[from] TopologyError),
    /// A file that the config names cannot be opened.
    #[error("payload.{what}: cannot open {}: {source}", path.display())]
    Open {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No kernel is named, and none found.
    #[error("payload: no kernel is named, and {0}")]
    DiskBoot(#[from] DiskBootError),
    /// The kernel, initramfs or command line cannot be loaded.
    #[error("payload: {0}")]
    Boot(#[from] BootError),
    /// Guest RAM cannot be had.
    #[error("memory: {0}")]
    Memory(#[from] ::memory::Error),
    /// The guest's processor cannot reach all of its memory.
    #[error(
        "memory: it ends at guest address {end:#x}, but the guest's processor has only {bits} address bits; make memory.size or memory.hotplug_size smaller"
    )]
    Addresses {
        /// Where it ends.
        end: u64,
        /// What the processor has.
        bits: u32,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// A device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A thread cannot be started.
    #[error("cannot start a vCPU thread: {0}")]
    Thread(std::io::Error),
    /// This host cannot give what the CPU model has.
    #[error("cpus.model: this host cannot run a guest of the model `{model}`: {}", crate::cpu::list(.missing))]
    Model {
        /// Its name.
        model: String,
        /// What is missing.
        missing: Vec<Unavailable>,
    },
    /// The hypervisor shows something else than it was told to.
    #[error("cpus.model: the hypervisor does not show vCPU {vcpu} what it was told to: {}", crate::cpu::list(.differing))]
    NotGiven {
        /// The vCPU.
        vcpu: u32,
        /// What differs.
        differing: Vec<MissingFeature>,
    },
    /// The ACPI tables do not fit, or cannot be written.
    #[error(transparent)]
    Tables(#[from] acpi::AcpiError),
}

impl BuildError {
    /// Whether the request is at fault, not the host.
    pub(super) fn is_request(&self) -> bool {
        matches!(
            self,
            Self::Config(_)
                | Self::Model { .. }
                | Self::Topology(_)
                | Self::Open { .. }
                | Self::Boot(_)
                | Self::DiskBoot(_)
                | Self::Memory(_)
                | Self::Addresses { .. }
        )
    }
}

/// What a machine is built from.
pub(super) struct Plan {
    config: VmConfig,
    /// What the guest has been told of its processor before; a new guest is told what its model says.
    contract: Option<CpuContract>,
    /// Another host still has it.
    arriving: bool,
}

impl Plan {
    /// A machine of this config, with the contract that it had before, if it had one.
    pub(super) fn new(config: VmConfig, contract: Option<CpuContract>) -> Self {
        Self {
            config,
            contract,
            arriving: false,
        }
    }

    /// A machine that another host still has.
    pub(super) fn arriving(config: VmConfig, contract: CpuContract) -> Self {
        Self {
            config,
            contract: Some(contract),
            arriving: true,
        }
    }

    pub(super) fn ram_ranges(&self) -> Result<Vec<RamRange>, ::memory::Error> {
        self.config.memory.ranges()
    }

    fn topology(&self) -> Result<Topology, TopologyError> {
        match &self.config.cpus.topology {
            None => Ok(Topology::flat(self.config.cpus.max_vcpus)),
            Some(t) => Topology::new(
                u32::from(t.packages),
                u32::from(t.cores_per_die).saturating_mul(u32::from(t.dies_per_package)),
                u32::from(t.threads_per_core),
            ),
        }
    }
}

/// The hypervisor of this kind; the host's own if none is asked for.
pub(crate) fn open_hypervisor(
    kind: Option<HypervisorKind>,
) -> hypervisor::Result<Box<dyn Hypervisor>> {
    match kind {
        None => hypervisor::open_default(),
        Some(kind) => hypervisor::open(kind),
    }
}

/// What a new guest of this model is told on this host.
fn new_contract(hypervisor: &dyn Hypervisor, model: &CpuModel) -> Result<CpuContract, BuildError> {
    crate::cpu::check_interface(hypervisor, model.interface)?;
    let refused = |missing| BuildError::Model {
        model: model.name.clone(),
        missing,
    };
    let cpuid = model
        .apply(&hypervisor.supported_cpuid()?)
        .map_err(refused)?;
    let feature_msrs = model
        .apply_msrs(&cpuid, &hypervisor.feature_msrs()?)
        .map_err(refused)?;
    let timer = hypervisor.apic_timer()?;
    Ok(CpuContract {
        cpuid,
        cross_vendor: model.cross_vendor,
        tsc_khz: None,
        apic_timer_hz: match timer {
            // Its guest reads the frequency, and the other hypervisor knows only one.
            Some(timer) if timer.adjustable && model.interface == Interface::Hyperv => {
                Some(HYPERV_TIMER_HZ)
            }
            timer => timer.map(|timer| timer.hz),
        },
        msrs: hypervisor.msr_indices()?,
        feature_msrs,
    })
}

/// Gives a vCPU what the contract says, and reads it back.
///
/// Some hypervisors list features that they then do not give (a KVM without hardware virtualisation: `arch_capabilities`). If the guest's new
/// model only says "what the host has", the first vCPU takes those out of the contract.
fn show(
    vcpu: &mut dyn Vcpu,
    contract: &mut CpuContract,
    topology: &Topology,
    model: Option<&CpuModel>,
) -> Result<(), BuildError> {
    let id = vcpu.id();
    let give = |vcpu: &mut dyn Vcpu, contract: &CpuContract| {
        let wanted = for_vcpu(&contract.cpuid, topology, id);
        vcpu.set_cpuid(&wanted)?;
        Ok::<_, hypervisor::Error>(differences(&wanted, &vcpu.cpuid()?))
    };
    let mut given = give(vcpu, contract)?;
    if !given.lacking.is_empty()
        && id == 0
        && model.is_some_and(|model| contract.give_up(&given.lacking, model))
    {
        given = give(vcpu, contract)?;
    }
    if !given.lacking.is_empty() {
        return Err(BuildError::NotGiven {
            vcpu: id,
            differing: given.lacking,
        });
    }
    if id == 0 && !given.excess.is_empty() {
        tracing::info!(
            features = crate::cpu::list(&given.excess),
            "this host's hypervisor shows guests what their CPU model does not have"
        );
    }
    Ok(())
}

/// A machine that has been built.
pub(crate) struct Instance {
    /// What was found on a disk and booted; nothing after a move, until the guest resets.
    booted: Mutex<Option<Booted>>,
    number: u64,
    config: Mutex<VmConfig>,
    contract: CpuContract,
    vcpus: VcpuSet,
    devices: DeviceSet,
    bus: Arc<MachineBus>,
    demands: Arc<Demands>,
    vm: Arc<dyn Vm>,
    ram: Arc<GuestRam>,
    slots: Vec<MemorySlot>,
    hypervisor: Box<dyn Hypervisor>,
}

/// The local APIC timer of the Microsoft hypervisor's guests, in Hz.
const HYPERV_TIMER_HZ: u64 = 200_000_000;

impl Instance {
    /// Builds a machine, parked and with empty RAM.
    pub(super) fn build(
        mut plan: Plan,
        number: u64,
        events: &Sender<Event>,
    ) -> Result<Self, BuildError> {
        plan.config.validate()?;
        let topology = plan.topology()?;
        let ranges = plan.ram_ranges()?;
        let hypervisor = open_hypervisor(plan.config.hypervisor)?;
        let ram = Arc::new(GuestRam::new(&ranges, plan.config.memory.backing())?);
        let (mut contract, model) = match plan.contract {
            Some(contract) => (contract, None),
            None => {
                let model = crate::cpu::resolve(&plan.config.cpus)?;
                (new_contract(&*hypervisor, &model)?, Some(model))
            }
        };
        memory::check_addresses(&contract.cpuid, &ranges)?;
        let vm = hypervisor.create_vm(&VmOptions {
            ioapic_pins: layout::IOAPIC_PINS,
            hyperv: has_hyperv(&contract.cpuid),
            apic_timer_hz: contract
                .apic_timer_hz
                .or(hypervisor.apic_timer()?.map(|timer| timer.hz)),
        })?;
        let slots = memory::map(&vm, &ram, hypervisor.kind())?;
        let demands = Arc::new(Demands::new(number, events.clone()));
        let cpus = &plan.config.cpus;
        let gate = Arc::new(Gate::new(cpus.desired(), cpus.max_vcpus));
        let irq_sink = Arc::new(IrqSink::new(Arc::clone(&vm)));
        let (devices, pio, mmio) = DeviceSet::build(
            &mut plan.config,
            &irq_sink,
            &demands,
            &ram,
            &vm,
            &gate,
            plan.arriving,
        )?;
        // Until the machine is resumed nothing goes in or out: what is restored belongs to another machine up to then.
        devices.pause();
        let bus = Arc::new(MachineBus::new(pio, mmio, devices.ioapic()));

        // All that there may ever be: what a vCPU is at this host is decided before the guest is, and the states of all travel.
        let vcpus = (0..plan.config.cpus.max_vcpus)
            .map(|id| {
                let mut vcpu = vm.create_vcpu(id)?;
                show(&mut *vcpu, &mut contract, &topology, model.as_ref())?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, BuildError>>()?;
        if contract.tsc_khz.is_none() {
            contract.tsc_khz = vcpus.first().and_then(|vcpu| vcpu.tsc_khz());
        }
        let fresh = match vcpus.get(1) {
            Some(never_run) if plan.config.cpus.hotplug() => {
                let mut state = never_run.save_state()?;
                msr::apply_boot_values(&mut state);
                msr::apply(&mut state, &contract.feature_msrs);
                Some(FreshState::new(state))
            }
            _ => None,
        };
        let exit_bus: Arc<dyn hypervisor::ExitBus + Send + Sync> = bus.clone();
        let vcpus =
            VcpuSet::start(vcpus, &gate, fresh, &exit_bus, &demands).map_err(BuildError::Thread)?;
        Ok(Self {
            number,
            config: Mutex::new(plan.config),
            contract,
            vcpus,
            devices,
            bus,
            demands,
            vm,
            ram,
            slots,
            hypervisor,
            booted: Mutex::new(None),
        })
    }

    /// The kernel that was found on a disk, if it was.
    pub(super) fn booted(&self) -> Option<Booted> {
        self.booted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Loads kernel, initramfs, command line and ACPI tables, and sets vCPU 0 to the kernel's entry.
    pub(super) fn load(&self) -> Result<(), BuildError> {
        let open = |what, path: &Path| {
            File::open(path).map_err(|source| BuildError::Open {
                what,
                path: path.to_owned(),
                source,
            })
        };
        let config = self.config();
        let payload = &config.payload;
        let mut cmdline = payload.cmdline.clone().unwrap_or_default();
        let (mut kernel, mut initramfs) = match &payload.kernel {
            Some(path) => {
                let initramfs = payload.initramfs.as_deref();
                let initramfs = initramfs.map(|path| open("initramfs", path));
                (open("kernel", path)?, initramfs.transpose()?)
            }
            None => {
                let found = crate::boot::find(&config.boot_disks(), payload.cmdline.as_deref())?;
                tracing::info!(booted = ?found.booted, "booting what is on a disk");
                cmdline.clone_from(&found.booted.cmdline);
                *self.booted.lock().unwrap_or_else(PoisonError::into_inner) = Some(found.booted);
                (found.kernel, found.initramfs)
            }
        };
        let guest_memory = self.ram.guest_memory();
        let tables = acpi::build(&acpi::AcpiConfig {
            vcpus: config.cpus.desired(),
            max_vcpus: config.cpus.max_vcpus,
            cpu_hotplug: config.cpus.hotplug(),
            ecam: Some(acpi::Ecam {
                base: layout::PCI_ECAM_BASE,
                last_bus: 0,
            }),
            serial: self.devices.has_serial(),
            pvpanic: config.pvpanic,
            watchdog: config.watchdog,
        })?;
        tables.write_to(guest_memory)?;
        if let Some(memory) = self.virtio_mem() {
            memory.begin();
        }
        let ranges = memory::at_boot(&config.memory, &self.ram);
        let plan = boot::load(
            guest_memory,
            BootSources {
                kernel: &mut kernel,
                initramfs: initramfs.as_mut(),
                cmdline: &cmdline,
                ram: &ranges,
                rsdp: tables.rsdp_address,
            },
        )?;
        tracing::debug!(?plan, "loaded");
        let mut states = self.vcpus.save()?;
        for (index, state) in states.iter_mut().enumerate() {
            if index == 0 {
                plan.apply(state);
            } else {
                msr::apply_boot_values(state);
            }
            msr::apply(state, &self.contract.feature_msrs);
        }
        self.vcpus.restore(&states)?;
        Ok(())
    }

    /// How often the guest's watchdog has reset it, here or elsewhere.
    pub(super) fn watchdog_resets(&self) -> u64 {
        self.devices.watchdog().map_or(0, Watchdog::resets)
    }

    /// Tells the watchdog what was before this machine was built.
    pub(super) fn was_reset(&self, resets: u64, by_watchdog: bool) {
        if let Some(watchdog) = self.devices.watchdog() {
            watchdog.was_reset(resets, by_watchdog);
        }
    }

    /// The number that tells this machine's demands from those of an earlier one.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What the guest was told of its processor.
    pub(super) fn contract(&self) -> &CpuContract {
        &self.contract
    }

    /// The config, with what was chosen for it.
    pub(super) fn config(&self) -> VmConfig {
        self.locked_config().clone()
    }

    fn locked_config(&self) -> MutexGuard<'_, VmConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device has come or gone.
    pub(super) fn set_config(&self, config: VmConfig) {
        *self.locked_config() = config;
    }

    pub(super) fn add_disk(&self, config: &mut DiskConfig) -> Result<(), DeviceError> {
        self.devices.pci().add_disk(config)
    }

    pub(super) fn add_net(&self, config: &mut NetConfig) -> Result<(), DeviceError> {
        self.devices.pci().add_net(config)
    }

    pub(super) fn add_fs(&self, config: &mut FsConfig) -> Result<(), DeviceError> {
        self.devices.pci().add_fs(config)
    }

    /// The devices that vhost-user back ends serve.
    pub(super) fn vhost(&self) -> Vec<(String, Arc<VhostUser>)> {
        self.devices.pci().vhost()
    }

    /// Why the machine's memory and state are not all that there is of it, if so.
    pub(super) fn check_complete(&self) -> Result<(), DeviceError> {
        self.check_vhost(VhostUser::check_complete)
    }

    /// Why the machine cannot move, if so.
    pub(super) fn check_movable(&self) -> Result<(), DeviceError> {
        self.check_vhost(VhostUser::check_movable)
    }

    fn check_vhost(
        &self,
        check: impl Fn(&VhostUser) -> Result<(), String>,
    ) -> Result<(), DeviceError> {
        for (id, device) in self.vhost() {
            check(&device).map_err(|reason| DeviceError::Stays { id, reason })?;
        }
        Ok(())
    }

    pub(super) fn add_vsock(&self, config: &mut VsockConfig) -> Result<(), DeviceError> {
        self.devices.pci().add_vsock(config)
    }

    /// False if there is no such device.
    pub(super) fn ask_to_remove(&self, id: &str) -> bool {
        self.devices.pci().ask_to_remove(id)
    }

    /// Lets vCPUs come, and asks the guest to let some go.
    pub(super) fn resize_vcpus(&self, wanted: u32) {
        if let Some(hotplug) = self.devices.cpu_hotplug() {
            hotplug.resize(wanted);
        }
    }

    /// How that stands, where vCPUs can come and go.
    pub(super) fn vcpu_status(&self) -> Option<CpuHotplugStatus> {
        self.devices.cpu_hotplug().map(CpuHotplug::status)
    }

    pub(super) fn set_balloon(&self, bytes: u64) {
        self.devices.pci().set_balloon(bytes);
    }

    /// What adds memory, if the config has that.
    pub(super) fn virtio_mem(&self) -> Option<Arc<VirtioMem>> {
        self.devices.pci().virtio_mem()
    }

    /// None if there is no such disk.
    pub(super) fn resize_disk(&self, id: &str, bytes: u64) -> Option<Result<(), DiskError>> {
        let disk = self
            .devices
            .pci()
            .disks()
            .into_iter()
            .find(|(disk, _)| disk == id)?
            .1;
        Some(disk.resize(Some(bytes)).map(drop))
    }

    /// Writes back what caches have of the disks' images, which the handover would do in the pause.
    pub(super) fn write_back_disks(&self) {
        ends::write_back(&self.devices.pci().disks());
    }

    /// Lets the locks of the disks' images go: the machine is paused and another host is to have it.
    pub(super) fn unlock_disks(&self) {
        ends::unlock(&self.devices.pci().disks());
    }

    /// Takes them back before the guest runs again, after a move that has failed or in doubt.
    pub(super) fn lock_disks_again(&self) -> Result<(), DeviceError> {
        self.lock_disks_within(ends::LOCK_PATIENCE)
    }

    /// Makes sure that the machine has the locks of its images, as it does unless a move has failed.
    pub(super) fn lock_disks(&self) -> Result<(), DeviceError> {
        self.lock_disks_within(Duration::ZERO)
    }

    fn lock_disks_within(&self, patience: Duration) -> Result<(), DeviceError> {
        ends::lock_again(&self.devices.pci().disks(), patience).map_err(|(id, source)| {
            DeviceError::Function {
                id,
                source: source.into(),
            }
        })
    }

    /// Tells the network that the guest is here now, and its driver of memory that it can go on.
    pub(super) fn announce(&self) {
        ends::announce(self.devices.pci().nets(), self.vhost());
        if let Some(memory) = self.virtio_mem() {
            memory.nudge();
        }
    }

    /// Fills in what was decided at run time.
    pub(super) fn fill_in(&self, config: &mut VmConfig) {
        self.devices.fill_in(config);
    }

    pub(super) fn hypervisor_name(&self) -> &'static str {
        self.hypervisor.kind().name()
    }

    pub(super) fn demands(&self) -> &Demands {
        &self.demands
    }

    pub(super) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    pub(super) fn memory_slots(&self) -> impl Iterator<Item = MemorySlot> + '_ {
        self.slots.iter().copied()
    }

    pub(super) fn memory_slot(&self, region: usize) -> hypervisor::Result<MemorySlot> {
        self.slots.get(region).copied().ok_or_else(|| {
            hypervisor::Error::Invalid(format!("the machine has no memory region {region}"))
        })
    }

    pub(super) fn press_power_button(&self) {
        self.devices.press_power_button();
    }

    pub(super) fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let hypervisor = self.vm.counters().into_iter();
        let mut all = self.devices.pci().counters();
        if self.locked_config().pvpanic {
            let panics = BTreeMap::from([("panics".to_owned(), self.demands.panics())]);
            all.insert("pvpanic".to_owned(), panics);
        }
        if let Some(watchdog) = self.devices.watchdog() {
            let counters = watchdog.counters().into_iter();
            let counters = counters.map(|(name, count)| (name.to_owned(), count));
            all.insert("watchdog".to_owned(), counters.collect());
        }
        all.extend([
            ("bus".to_owned(), self.bus.counters()),
            (
                "hypervisor".to_owned(),
                hypervisor
                    .map(|(name, count)| (name.to_owned(), count))
                    .collect(),
            ),
        ]);
        all
    }

    /// Stops vCPUs and devices: on return nothing of this machine writes guest memory.
    pub(super) fn pause(&self) {
        self.vcpus.pause();
        self.devices.pause();
    }

    /// Lets devices and vCPUs run.
    pub(super) fn resume(&self) {
        self.devices.resume();
        self.vcpus.resume();
    }

    /// Ends the vCPUs. Devices stay as they are: of a machine that ran, the last output still leaves, of one that is
    /// paused (it has moved away, or never began) none does.
    pub(super) fn stop(&self) {
        self.vcpus.stop();
    }

    /// What a destination must know before it takes this machine.
    pub(super) fn manifest(&self) -> Result<Manifest, migration::MachineError> {
        let config = self.config();
        Ok(Manifest {
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            hypervisor: self.hypervisor_name().to_owned(),
            config: serde_json::to_string(&config)?,
            vcpus: config.cpus.max_vcpus,
            memory: self
                .ram
                .regions()
                .iter()
                .map(|region| region.range())
                .collect(),
            cpu: self.contract.clone(),
            accepted: self.devices.pci().accepted(),
            sent_ns: None,
        })
    }

    /// What its devices lack of what drivers have accepted elsewhere.
    pub(super) fn lacking(&self, accepted: &[AcceptedFeatures]) -> Vec<String> {
        self.devices.pci().lacking(accepted)
    }

    /// Saves everything but RAM. The machine is paused.
    pub(super) fn save(&self, run_state: RunState) -> hypervisor::Result<MachineState> {
        // Devices first: an interrupt on its way has reached a local APIC by then.
        let devices = self
            .devices
            .save()
            .into_iter()
            .map(|(id, state)| DeviceState {
                id,
                kind: state.kind,
                version: state.version,
                data: Bytes(state.data),
            })
            .collect();
        // Right before the first vCPU's TSC, which is to go on by the time since: afterwards, the TSC would fall behind the clock by as long as
        // it takes to save all vCPUs.
        let clock = self.vm.clock()?;
        Ok(MachineState {
            run_state,
            vcpus: self.vcpus.save()?,
            clock,
            devices,
        })
    }

    /// Restores everything but RAM. The machine is paused; on failure it must not be run.
    pub(super) fn restore(&self, mut state: MachineState) -> Result<(), BuildError> {
        // The clock goes on by the time since it was saved, and the TSC with it.
        let stood_ns = state
            .clock
            .host_realtime_ns
            .map_or(0, |then| hypervisor::realtime_ns().saturating_sub(then));
        for vcpu in &mut state.vcpus {
            msr::advance_tsc(vcpu, self.contract.tsc_khz, stood_ns);
        }
        self.vcpus.restore(&state.vcpus)?;
        self.devices.restore(state.devices.iter().map(|device| {
            (
                device.id.as_str(),
                devices::SavedState {
                    kind: device.kind.clone(),
                    version: device.version,
                    data: device.data.0.clone(),
                },
            )
        }))?;
        self.lock_disks()?;
        self.vm.set_clock(&state.clock)?;
        Ok(())
    }
}
