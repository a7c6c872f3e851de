//! The devices of a machine: which there are, where they sit, and their saved state.

use std::sync::Arc;
use std::time::Duration;

use arch::x86_64::layout;
use devices::{
    AcpiPower, AcpiPowerConfig, Bus, BusDevice, BusError, BusSpace, Cmos, CpuHotplug,
    EndpointConfig, GuestMemorySize, I8042, InterruptLine, Ioapic, MsiSink, Persist, PvPanic,
    SavedState, Serial, SerialError, StateError, Watchdog, WatchdogConfig,
};

use devices::cpu_hotplug::CPU_HOTPLUG_PORTS;
use devices::pci::PciError;
use devices::pci::hotplug::HOTPLUG_PORTS;
use devices::pvpanic::{PVPANIC_PORT, PVPANIC_PORTS};
use devices::watchdog::WATCHDOG_PORTS;
use hypervisor::Vm;
use memory::GuestRam;

use super::bus::IrqSink;
use super::demand::Demands;
use super::gate::Gate;
use super::pci::{PciSet, Surroundings};
use crate::config::{ConfigError, SerialConfig, SerialMode, VmConfig};

/// Why a device cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// Two devices want one address: our own fault.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus has no place for it.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// It cannot be made.
    #[error("device {id}: {source}")]
    Function {
        /// The device.
        id: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine cannot be taken elsewhere with it.
    #[error("device {id}: {reason}")]
    Stays {
        /// The device.
        id: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The serial port's other end cannot be opened.
    #[error("serial: {0}")]
    Serial(#[from] SerialError),
    /// The config cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A state cannot be taken over.
    #[error("device {id}: {source}")]
    State {
        /// The device.
        id: String,
        /// Why.
        source: StateError,
    },
    /// A state belongs to no device here.
    #[error("the guest has a device {0} that this machine does not have")]
    Unknown(String),
    /// A device's state did not come.
    #[error("the state of device {0} is missing")]
    Missing(String),
}

/// As the WDAT describes it.
const WATCHDOG: WatchdogConfig = WatchdogConfig {
    period: Duration::from_millis(layout::WATCHDOG_PERIOD_MS as u64),
    shortest: layout::WATCHDOG_MIN_COUNT,
    longest: layout::WATCHDOG_MAX_COUNT,
};

/// All devices of a machine.
pub(super) struct DeviceSet {
    ioapic: Arc<Ioapic>,
    serial: Option<Arc<Serial>>,
    power: Arc<AcpiPower>,
    cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
    watchdog: Option<Arc<Watchdog>>,
    cpu_hotplug: Option<Arc<CpuHotplug>>,
    pci: PciSet,
}

impl DeviceSet {
    /// Makes the devices and the buses they sit on.
    pub(super) fn build(
        config: &mut VmConfig,
        irq_sink: &Arc<IrqSink>,
        demands: &Arc<Demands>,
        ram: &Arc<GuestRam>,
        vm: &Arc<dyn Vm>,
        gate: &Arc<Gate>,
        arriving: bool,
    ) -> Result<(Self, Bus, Arc<Bus>), DeviceError> {
        let (pio, mmio) = (Bus::new(BusSpace::Pio), Arc::new(Bus::new(BusSpace::Mmio)));
        let ioapic = Arc::new(Ioapic::new(irq_sink.clone()));
        mmio.insert(layout::IOAPIC_BASE, layout::IOAPIC_SIZE, ioapic.clone())?;
        let line = |irq: u32| -> Arc<dyn InterruptLine> { ioapic.line(irq) };

        let serial = match end(&config.serial)? {
            Some(backend) => {
                let serial = Arc::new(Serial::new(backend, line(layout::SERIAL_IRQ))?);
                pio.insert(u64::from(layout::SERIAL_PORT), 8, serial.clone())?;
                Some(serial)
            }
            None => None,
        };
        let i8042 = Arc::new(I8042::new(demands.clone()));
        pio.insert(
            u64::from(layout::I8042_PORT),
            devices::i8042::I8042_PORTS,
            i8042.clone(),
        )?;
        let ranges = memory::layout::ram_ranges(config.memory.size).unwrap_or_default();
        let (low, high): (Vec<memory::RamRange>, Vec<memory::RamRange>) = ranges
            .into_iter()
            .partition(|range| range.gpa < layout::MMIO_HOLE_END);
        let cmos = Arc::new(Cmos::new(GuestMemorySize {
            below_4g: low.iter().map(|range| range.len).sum(),
            above_4g: high.iter().map(|range| range.len).sum(),
        }));
        pio.insert(u64::from(layout::CMOS_PORT), 2, cmos.clone())?;
        if config.pvpanic {
            let panics: Arc<dyn BusDevice> = Arc::new(PvPanic::new(demands.clone()));
            pio.insert(PVPANIC_PORT, PVPANIC_PORTS, panics)?;
        }
        let watchdog = match config.watchdog {
            true => {
                let made = Watchdog::new(WATCHDOG, demands.clone());
                let made = Arc::new(made.map_err(|source| DeviceError::Function {
                    id: "watchdog".to_owned(),
                    source: source.into(),
                })?);
                pio.insert(
                    u64::from(layout::WATCHDOG_PORT),
                    WATCHDOG_PORTS,
                    made.clone(),
                )?;
                Some(made)
            }
            false => None,
        };
        let first = layout::ACPI_SLEEP_CONTROL_PORT;
        let offset = |port: u16| u64::from(port - first);
        let power = Arc::new(AcpiPower::new(
            AcpiPowerConfig {
                sleep_control: 0,
                sleep_status: offset(layout::ACPI_SLEEP_STATUS_PORT),
                reset: offset(layout::ACPI_RESET_PORT),
                event: offset(layout::ACPI_EVENT_PORT),
                reset_value: layout::ACPI_RESET_VALUE,
                s5_sleep_type: layout::ACPI_S5_SLEEP_TYPE,
            },
            demands.clone(),
            line(layout::ACPI_EVENT_IRQ),
        ));
        let ports = offset(layout::ACPI_EVENT_PORT) + 1;
        let on_bus: Arc<dyn BusDevice> = power.clone();
        pio.insert(u64::from(first), ports, on_bus)?;
        let cpus = &config.cpus;
        let cpu_hotplug = match cpus.hotplug() {
            true => {
                let (present, max) = (cpus.desired(), cpus.max_vcpus);
                let registers = CpuHotplug::new(power.clone(), gate.clone(), present, max);
                let registers = Arc::new(registers);
                let port = u64::from(layout::CPU_HOTPLUG_PORT);
                pio.insert(port, CPU_HOTPLUG_PORTS, registers.clone())?;
                Some(registers)
            }
            false => None,
        };
        let msi: Arc<dyn MsiSink> = irq_sink.clone();
        let around = Surroundings {
            mmio: Arc::clone(&mmio),
            ram: Arc::clone(ram),
            msi,
            vm: Arc::clone(vm),
        };
        let pci = PciSet::build(config, around, &power, demands, arriving)?;
        let slots: Arc<dyn BusDevice> = pci.hotplug();
        pio.insert(u64::from(layout::PCI_HOTPLUG_PORT), HOTPLUG_PORTS, slots)?;
        let set = Self {
            pci,
            ioapic,
            serial,
            power,
            cmos,
            i8042,
            watchdog,
            cpu_hotplug,
        };
        Ok((set, pio, mmio))
    }

    /// The devices that have state, by the id their state travels under. The IOAPIC comes last: restoring it may send
    /// interrupts, and its lines must not be moved by other devices' restore afterwards.
    fn persistent(&self) -> Vec<(String, Arc<dyn Persist>)> {
        let mut all: Vec<(String, Arc<dyn Persist>)> = vec![
            ("power".to_owned(), self.power.clone()),
            ("cmos".to_owned(), self.cmos.clone()),
            ("i8042".to_owned(), self.i8042.clone()),
            ("pci-hotplug".to_owned(), self.pci.hotplug()),
        ];
        if let Some(hotplug) = &self.cpu_hotplug {
            all.push(("cpu-hotplug".to_owned(), hotplug.clone()));
        }
        if let Some(serial) = &self.serial {
            all.push(("serial".to_owned(), serial.clone()));
        }
        if let Some(watchdog) = &self.watchdog {
            all.push(("watchdog".to_owned(), watchdog.clone()));
        }
        for function in self.pci.functions() {
            all.push((function.id, function.transport));
        }
        all.push(("ioapic".to_owned(), self.ioapic.clone()));
        all
    }

    pub(super) fn pci(&self) -> &PciSet {
        &self.pci
    }

    /// None in a machine whose vCPUs do not come and go.
    pub(super) fn cpu_hotplug(&self) -> Option<&CpuHotplug> {
        self.cpu_hotplug.as_deref()
    }

    pub(super) fn ioapic(&self) -> Arc<Ioapic> {
        Arc::clone(&self.ioapic)
    }

    pub(super) fn has_serial(&self) -> bool {
        self.serial.is_some()
    }

    pub(super) fn watchdog(&self) -> Option<&Watchdog> {
        self.watchdog.as_deref()
    }

    pub(super) fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Fills in what was decided at run time: the terminal of a PTY.
    pub(super) fn fill_in(&self, config: &mut VmConfig) {
        if let Some(path) = self.serial.as_ref().and_then(|serial| serial.pty_path()) {
            config.serial.file = Some(path.to_owned());
        }
        if let Some(path) = self.pci.console_pty() {
            config.console.file = Some(path);
        }
    }

    /// Stops device threads: on return no device writes guest memory or raises an interrupt.
    pub(super) fn pause(&self) {
        if let Some(serial) = &self.serial {
            serial.pause();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.pause();
        }
        self.pci.pause();
    }

    pub(super) fn resume(&self) {
        if let Some(serial) = &self.serial {
            serial.resume();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.resume();
        }
        self.pci.resume();
    }

    pub(super) fn save(&self) -> Vec<(String, SavedState)> {
        self.persistent()
            .into_iter()
            .map(|(id, device)| (id, device.save()))
            .collect()
    }

    /// Restores each device from the state with its id. A state for a device that is not here is refused, and so is
    /// a device whose state did not come; only a serial port may differ, because the operator may place it elsewhere.
    pub(super) fn restore<'a>(
        &self,
        states: impl Iterator<Item = (&'a str, SavedState)>,
    ) -> Result<(), DeviceError> {
        let mut states: Vec<(&str, SavedState)> = states.collect();
        for (id, device) in self.persistent() {
            let Some(at) = states.iter().position(|(state, _)| *state == id) else {
                if id == "serial" {
                    continue;
                }
                return Err(DeviceError::Missing(id));
            };
            let (_, state) = states.swap_remove(at);
            device
                .restore(&state)
                .map_err(|source| DeviceError::State { id, source })?;
        }
        self.pci.restored();
        match states.iter().find(|(id, _)| *id != "serial") {
            Some((id, _)) => Err(DeviceError::Unknown((*id).to_owned())),
            None => Ok(()),
        }
    }
}

/// Where a serial port or console leads; none if there is to be no such device.
pub(super) fn end(config: &SerialConfig) -> Result<Option<EndpointConfig>, ConfigError> {
    let missing = |field: &'static str| ConfigError::Field {
        field,
        problem: "missing".into(),
        fix: "name a path".into(),
    };
    Ok(match config.mode {
        SerialMode::Off => None,
        SerialMode::Null => Some(EndpointConfig::Null),
        SerialMode::Tty => Some(EndpointConfig::Stdio),
        SerialMode::Pty => Some(EndpointConfig::Pty),
        SerialMode::File => Some(EndpointConfig::File {
            path: config.file.clone().ok_or_else(|| missing("file"))?,
            append: true,
        }),
        SerialMode::Socket => Some(EndpointConfig::Socket {
            path: config.socket.clone().ok_or_else(|| missing("socket"))?,
        }),
    })
}
