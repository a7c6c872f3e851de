//! The devices of a machine: which there are, where they sit, and their saved state.

use std::sync::Arc;

use arch::x86_64::layout;
use devices::{
    AcpiPower, AcpiPowerConfig, Bus, BusDevice, BusError, BusSpace, Cmos, GuestMemorySize, I8042,
    InterruptLine, Ioapic, Persist, SavedState, Serial, SerialBackend, SerialError, StateError,
};

use super::bus::IrqSink;
use super::demand::Demands;
use crate::config::{ConfigError, SerialMode, VmConfig};

/// Why a device cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// Two devices want one address: our own fault.
    #[error(transparent)]
    Bus(#[from] BusError),
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
    Missing(&'static str),
}

/// All devices of a machine.
pub(super) struct DeviceSet {
    ioapic: Arc<Ioapic>,
    serial: Option<Arc<Serial>>,
    power: Arc<AcpiPower>,
    cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
}

impl DeviceSet {
    /// Makes the devices and the buses they sit on.
    pub(super) fn build(
        config: &VmConfig,
        irq_sink: &Arc<IrqSink>,
        demands: &Arc<Demands>,
    ) -> Result<(Self, Bus, Bus), DeviceError> {
        let (pio, mmio) = (Bus::new(BusSpace::Pio), Bus::new(BusSpace::Mmio));
        let ioapic = Arc::new(Ioapic::new(irq_sink.clone()));
        mmio.insert(layout::IOAPIC_BASE, layout::IOAPIC_SIZE, ioapic.clone())?;
        let line = |irq: u32| -> Arc<dyn InterruptLine> { ioapic.line(irq) };

        let serial = match serial_backend(config)? {
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
        let ram = memory::layout::ram_ranges(config.memory.size).unwrap_or_default();
        let (low, high): (Vec<memory::RamRange>, Vec<memory::RamRange>) = ram
            .into_iter()
            .partition(|range| range.gpa < layout::MMIO_HOLE_END);
        let cmos = Arc::new(Cmos::new(GuestMemorySize {
            below_4g: low.iter().map(|range| range.len).sum(),
            above_4g: high.iter().map(|range| range.len).sum(),
        }));
        pio.insert(u64::from(layout::CMOS_PORT), 2, cmos.clone())?;
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
        let set = Self {
            ioapic,
            serial,
            power,
            cmos,
            i8042,
        };
        Ok((set, pio, mmio))
    }

    /// The devices that have state, by the id their state travels under. The IOAPIC comes last: restoring it may send
    /// interrupts, and its lines must not be moved by other devices' restore afterwards.
    fn persistent(&self) -> Vec<(&'static str, Arc<dyn Persist>)> {
        let mut all: Vec<(&'static str, Arc<dyn Persist>)> = vec![
            ("power", self.power.clone()),
            ("cmos", self.cmos.clone()),
            ("i8042", self.i8042.clone()),
        ];
        if let Some(serial) = &self.serial {
            all.push(("serial", serial.clone()));
        }
        all.push(("ioapic", self.ioapic.clone()));
        all
    }

    pub(super) fn ioapic(&self) -> Arc<Ioapic> {
        Arc::clone(&self.ioapic)
    }

    pub(super) fn has_serial(&self) -> bool {
        self.serial.is_some()
    }

    pub(super) fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Fills in what was decided at run time: the terminal of a PTY.
    pub(super) fn fill_in(&self, config: &mut VmConfig) {
        if let Some(path) = self.serial.as_ref().and_then(|serial| serial.pty_path()) {
            config.serial.file = Some(path.to_owned());
        }
    }

    /// Stops device threads: on return no device writes guest memory or raises an interrupt.
    pub(super) fn pause(&self) {
        if let Some(serial) = &self.serial {
            serial.pause();
        }
    }

    pub(super) fn resume(&self) {
        if let Some(serial) = &self.serial {
            serial.resume();
        }
    }

    pub(super) fn save(&self) -> Vec<(&'static str, SavedState)> {
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
                .map_err(|source| DeviceError::State {
                    id: id.to_owned(),
                    source,
                })?;
        }
        match states.iter().find(|(id, _)| *id != "serial") {
            Some((id, _)) => Err(DeviceError::Unknown((*id).to_owned())),
            None => Ok(()),
        }
    }
}

fn serial_backend(config: &VmConfig) -> Result<Option<SerialBackend>, ConfigError> {
    let serial = &config.serial;
    let missing = |field: &'static str| ConfigError::Field {
        field,
        problem: "missing".into(),
        fix: "name a path".into(),
    };
    Ok(match serial.mode {
        SerialMode::Off => None,
        SerialMode::Null => Some(SerialBackend::Null),
        SerialMode::Tty => Some(SerialBackend::Stdio),
        SerialMode::Pty => Some(SerialBackend::Pty),
        SerialMode::File => Some(SerialBackend::File {
            path: serial.file.clone().ok_or_else(|| missing("serial.file"))?,
            append: true,
        }),
        SerialMode::Socket => Some(SerialBackend::Socket {
            path: serial
                .socket
                .clone()
                .ok_or_else(|| missing("serial.socket"))?,
        }),
    })
}
