//! The function on the PCI bus, and what moves queues between it and the device.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::GuestMemoryMmap;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::IoEvents;
use super::common::{DRIVER_OK, FEATURES_OK, SHOWN};
use super::interrupt::{NO_VECTOR, PciInterrupt};
use super::queues::{QueueSlot, QueueState};
use crate::pci::{Bar, BarRange, ConfigSpace, Identity, Msix, MsixState, PciDevice};
use crate::state::{decode, encode};
use crate::virtio::{EVENT_IDX, VirtioDevice, VirtioInterrupt};
use crate::{MsiSink, Persist, SavedState, StateError};

const BAR: u8 = 0;
const BAR_LEN: u32 = 0x8000;
const PART_LEN: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;
/// Most queues: one notification address and one vector each, and one vector for the configuration.
const MAX_QUEUES: usize = 255;

/// Capability IDs: vendor-specific, MSI-X.
const VENDOR: u8 = 9;
const MSIX: u8 = 0x11;
/// Within the capability of type VIRTIO_PCI_CAP_PCI_CFG: BAR, offset, length, and the window.
const ACCESS_BAR: u16 = 4;
const ACCESS_OFFSET: u16 = 8;
const ACCESS_LEN: u16 = 12;
const ACCESS_DATA: u16 = 16;

/// The saved type, version 1; see [`crate::state::saved`] for its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtioPciState {
    /// Configuration space.
    #[serde(with = "serde_bytes")]
    pub config: Vec<u8>,
    /// MSI-X.
    pub msix: MsixState,
    /// Device status, without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// DEVICE_NEEDS_RESET.
    pub broken: bool,
    /// Features that the driver has accepted.
    pub driver_features: u64,
    /// Features that the device offered.
    pub device_features: u64,
    /// device_feature_select.
    pub device_feature_select: u32,
    /// driver_feature_select.
    pub driver_feature_select: u32,
    /// queue_select.
    pub queue_select: u16,
    /// config_msix_vector.
    pub config_vector: u16,
    /// ISR status.
    pub isr: u8,
    /// config_generation.
    pub generation: u8,
    /// The queues.
    pub queues: Vec<QueueState>,
    /// What the device keeps.
    #[serde(with = "serde_bytes")]
    pub device: Vec<u8>,
}

pub(super) struct Inner {
    config: ConfigSpace,
    pub(super) status: u8,
    pub(super) driver_features: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSlot>,
    paused: bool,
    /// The device's configuration space when the driver asked for its generation last.
    pub(super) shown: Option<[u8; SHOWN]>,
    /// Where the notification addresses are registered.
    notify_at: Option<u64>,
}

/// A virtio device on a PCI bus.
pub struct VirtioPci {
    pub(super) device: Arc<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    io_events: Arc<dyn IoEvents>,
    pub(super) interrupt: Arc<PciInterrupt>,
    /// Offsets of the MSI-X capability and of the one for access by configuration space.
    capabilities: (u16, u16),
    inner: Mutex<Inner>,
}

impl VirtioPci {
    /// Puts a device behind a function. It is paused until [`VirtioPci::resume`].
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        sink: Arc<dyn MsiSink>,
        io_events: Arc<dyn IoEvents>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            let error = format!("{} queues; the most is {MAX_QUEUES}", sizes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let queues = sizes
            .iter()
            .map(|size| Ok(QueueSlot::new(*size, Arc::new(EventFd::new(EFD_NONBLOCK)?))))
            .collect::<io::Result<Vec<_>>>()?;
        let vectors = sizes.len() as u16 + 1;
        let (config, capabilities) = config_space(&*device, vectors)
            .ok_or_else(|| io::Error::other("no room for the capabilities"))?;
        let interrupt = PciInterrupt::new(Msix::new(vectors, sink), sizes.len());
        let for_device: Arc<dyn VirtioInterrupt> = interrupt.clone();
        device.connect(for_device);
        Ok(Self {
            device,
            memory,
            io_events,
            interrupt,
            capabilities,
            inner: Mutex::new(Inner {
                config,
                status: 0,
                driver_features: 0,
                device_feature_select: 0,
                driver_feature_select: 0,
                queue_select: 0,
                queues,
                paused: true,
                shown: None,
                notify_at: None,
            }),
        })
    }

    /// Takes all queues back from the device: on return nothing of it touches guest memory.
    pub fn pause(&self) {
        let mut inner = self.lock();
        inner.paused = true;
        self.stop_queues(&mut inner);
    }

    /// Lets the device serve the queues that the driver has set up.
    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        self.start_queues(&mut inner);
    }

    /// As after power-on: the machine is reset.
    pub fn power_on(&self) {
        let mut inner = self.lock();
        self.reset_device(&mut inner);
        self.interrupt.msix.reset();
        inner.config.write(4, &[0, 0]);
    }

    /// The features that the driver has settled on, or none before it has.
    pub fn accepted(&self) -> u64 {
        let inner = self.lock();
        match inner.status & FEATURES_OK {
            0 => 0,
            _ => inner.driver_features,
        }
    }

    /// What is missing here of features that a driver has accepted elsewhere, by name.
    pub fn lacking(&self, accepted: u64) -> Vec<String> {
        let missing = accepted & !self.offered();
        let bits = (0..u64::BITS).filter(|bit| missing >> bit & 1 != 0);
        bits.map(|bit| match self.device.feature_name(bit) {
            Some(name) => name.to_owned(),
            None => format!("feature bit {bit}"),
        })
        .collect()
    }

    pub(super) fn name(&self) -> &'static str {
        self.device.device_type().name
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts what is enabled and does not run yet, if the driver has finished and the machine runs.
    pub(super) fn start_queues(&self, inner: &mut Inner) {
        if inner.paused
            || inner.status & DRIVER_OK == 0
            || self.interrupt.broken.load(Ordering::SeqCst)
        {
            return;
        }
        let event_idx = inner.driver_features & EVENT_IDX != 0;
        for (index, queue) in (0..).zip(&mut inner.queues) {
            if !queue.enabled || queue.running {
                continue;
            }
            let interrupt: Arc<dyn VirtioInterrupt> = self.interrupt.clone();
            let Some(made) = queue.make(index, &self.memory, event_idx, interrupt) else {
                tracing::warn!(
                    device = self.name(),
                    queue = index,
                    "the driver's rings are not in RAM"
                );
                self.interrupt.needs_reset();
                return;
            };
            match self.device.start_queue(made) {
                Ok(()) => queue.running = true,
                Err(error) => {
                    tracing::error!(device = self.name(), queue = index, %error, "a queue cannot be started");
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    fn stop_queues(&self, inner: &mut Inner) {
        for (index, queue) in (0..).zip(&mut inner.queues) {
            self.stop_queue(index, queue);
        }
    }

    fn stop_queue(&self, index: u16, queue: &mut QueueSlot) {
        if !std::mem::take(&mut queue.running) {
            return;
        }
        match self.device.stop_queue(index) {
            Some(mut stopped) => {
                // The count of what the driver has not heard of is not kept.
                if let Err(error) = stopped.signal() {
                    tracing::warn!(device = self.name(), queue = index, %error, "the driver cannot be told");
                }
                queue.take_back(stopped);
            }
            None => {
                tracing::error!(
                    device = self.name(),
                    queue = index,
                    "the device has lost a queue"
                );
                self.interrupt.needs_reset();
            }
        }
    }

    pub(super) fn enable_queue(&self, inner: &mut Inner, index: usize) {
        if let Some(queue) = inner.queues.get_mut(index) {
            queue.enabled = true;
            self.start_queues(inner);
        }
    }

    pub(super) fn reset_queue(&self, inner: &mut Inner, index: usize) {
        if let Some(queue) = inner.queues.get_mut(index) {
            self.stop_queue(index as u16, queue);
            queue.reset();
        }
    }

    pub(super) fn reset_device(&self, inner: &mut Inner) {
        self.stop_queues(inner);
        inner.queues.iter_mut().for_each(QueueSlot::reset);
        self.device.reset();
        self.interrupt.reset();
        inner.status = 0;
        inner.driver_features = 0;
        inner.device_feature_select = 0;
        inner.driver_feature_select = 0;
        inner.queue_select = 0;
    }

    /// The access that the capability of type VIRTIO_PCI_CAP_PCI_CFG describes: offset in BAR 0 and length.
    fn described(config: &ConfigSpace, capability: u16) -> Option<(u64, usize)> {
        let word = |at| {
            let mut bytes = [0; 4];
            config.read(capability + at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (bar, offset, len) = (
            word(ACCESS_BAR) as u8,
            word(ACCESS_OFFSET),
            word(ACCESS_LEN),
        );
        (bar == BAR && matches!(len, 1 | 2 | 4)).then_some((u64::from(offset), len as usize))
    }
}

/// The function's header and capabilities; the offsets of two of them.
fn config_space(device: &dyn VirtioDevice, vectors: u16) -> Option<(ConfigSpace, (u16, u16))> {
    let kind = device.device_type();
    let identity = Identity {
        // Section 4.1.2: vendor 0x1af4, device 0x1040 and the device type, revision 1 or more.
        vendor: 0x1af4,
        device: 0x1040 + kind.id,
        revision: 1,
        class: kind.pci_class,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40 + kind.id,
    };
    let mut config = ConfigSpace::new(
        identity,
        &[Bar {
            number: BAR,
            len: BAR_LEN,
        }],
    );
    // cap_len, cfg_type, bar, id, two bytes of padding, offset, length.
    let body = |kind: u8, offset: u64, len: u32, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, BAR, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(more);
        body
    };
    let part = PART_LEN as u32;
    config.add_capability(VENDOR, &body(1, COMMON, part, &[]), &[])?;
    config.add_capability(
        VENDOR,
        &body(2, NOTIFY, part, &NOTIFY_STEP.to_le_bytes()),
        &[],
    )?;
    config.add_capability(VENDOR, &body(3, ISR, part, &[]), &[])?;
    config.add_capability(VENDOR, &body(4, DEVICE, part, &[]), &[])?;
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let access = config.add_capability(VENDOR, &body(5, 0, 0, &[0; 4]), &writable)?;
    let mut body = Vec::new();
    body.extend((vectors - 1).to_le_bytes());
    body.extend((TABLE as u32 | u32::from(BAR)).to_le_bytes());
    body.extend((PENDING as u32 | u32::from(BAR)).to_le_bytes());
    let msix = config.add_capability(MSIX, &body, &[0, 0xc0])?;
    Some((config, (msix, access)))
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let (_, access) = self.capabilities;
        let inner = self.lock();
        let window = access + ACCESS_DATA;
        let described = (offset == window).then(|| Self::described(&inner.config, access));
        match described.flatten() {
            Some((at, len)) if len == data.len() => {
                drop(inner);
                self.read_bar(BAR, at, data);
            }
            _ => inner.config.read(offset, data),
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let (msix, access) = self.capabilities;
        let mut inner = self.lock();
        inner.config.write(offset, data);
        let mut control = [0; 2];
        inner.config.read(msix + 2, &mut control);
        self.interrupt.msix.set_control(u16::from_le_bytes(control));
        if offset == access + ACCESS_DATA
            && let Some((at, len)) = Self::described(&inner.config, access)
            && len == data.len()
        {
            drop(inner);
            self.write_bar(BAR, at, data);
        }
    }

    fn bars(&self) -> Vec<BarRange> {
        self.lock().config.bar_ranges()
    }

    fn bars_moved(&self, mapped: &[BarRange]) {
        let mut inner = self.lock();
        let new = mapped.first().map(|range| range.gpa + NOTIFY);
        if inner.notify_at == new {
            return;
        }
        let addresses = |base: u64| (base..).step_by(NOTIFY_STEP as usize);
        if let Some(old) = inner.notify_at.take() {
            for (queue, gpa) in inner.queues.iter().zip(addresses(old)) {
                if let Err(error) = self.io_events.unregister(gpa, &queue.kick) {
                    tracing::warn!(device = self.name(), %error, "a notification address stays registered");
                }
            }
        }
        if let Some(new) = new {
            for (queue, gpa) in inner.queues.iter().zip(addresses(new)) {
                // Without it the write is an exit, which ends at the same event.
                if let Err(error) = self.io_events.register(gpa, &queue.kick) {
                    tracing::debug!(device = self.name(), %error, "notifications are exits");
                }
            }
        }
        inner.notify_at = new;
    }

    fn set_bar(&self, bar: u8, gpa: u64) {
        self.lock().config.set_bar(bar, gpa as u32);
    }

    fn bar_sizes(&self) -> Vec<(u8, u64)> {
        vec![(BAR, u64::from(BAR_LEN))]
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let within = offset % PART_LEN;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.interrupt.isr.swap(0, Ordering::SeqCst);
                }
            }
            DEVICE => self.device.read_config(within, data),
            TABLE => self.interrupt.msix.read_table(within, data),
            PENDING => self.interrupt.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) {
        let within = offset % PART_LEN;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => self.device.write_config(within, data),
            NOTIFY => {
                let queue = (within / u64::from(NOTIFY_STEP)) as usize;
                if let Some(queue) = self.lock().queues.get(queue) {
                    // Full means that it has been told often enough.
                    let _ = queue.kick.write(1);
                }
            }
            TABLE => self.interrupt.msix.write_table(within, data),
            _ => {}
        }
    }
}

impl Persist for VirtioPci {
    fn kind(&self) -> &'static str {
        self.name()
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        let inner = self.lock();
        let vectors = self.interrupt.queue_vectors.iter();
        let state = VirtioPciState {
            config: inner.config.bytes().to_vec(),
            msix: self.interrupt.msix.save(),
            status: inner.status,
            broken: self.interrupt.broken.load(Ordering::SeqCst),
            driver_features: inner.driver_features,
            device_features: self.offered(),
            device_feature_select: inner.device_feature_select,
            driver_feature_select: inner.driver_feature_select,
            queue_select: inner.queue_select,
            config_vector: self.interrupt.config_vector.load(Ordering::SeqCst),
            isr: self.interrupt.isr.load(Ordering::SeqCst),
            generation: self.interrupt.generation.load(Ordering::SeqCst),
            queues: inner
                .queues
                .iter()
                .zip(vectors)
                .map(|(queue, vector)| queue.save(vector.load(Ordering::SeqCst)))
                .collect(),
            device: self.device.save(),
        };
        encode(self, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let state: VirtioPciState = decode(self, state)?;
        let kind = self.kind();
        let wrong = |field, reason: String| StateError::OutOfRange {
            kind,
            field,
            reason,
        };
        let mut inner = self.lock();
        if state.queues.len() != inner.queues.len() {
            let reason = format!(
                "{} queues; this device has {}",
                state.queues.len(),
                inner.queues.len()
            );
            return Err(wrong("queues", reason));
        }
        // A driver may write anything before it has finished; that must not keep its guest where it is.
        let serves = state.status & DRIVER_OK != 0 && !state.broken;
        for (queue, slot) in state.queues.iter().zip(&inner.queues) {
            if serves && queue.enabled && queue.size > slot.max_size {
                let reason = format!("{} descriptors; the most is {}", queue.size, slot.max_size);
                return Err(wrong("queues", reason));
            }
        }
        let accepted = match state.status & FEATURES_OK {
            0 => 0,
            _ => state.driver_features,
        };
        let missing = self.lacking(accepted);
        if !missing.is_empty() {
            let missing = missing.join(", ");
            let reason = format!("the driver uses {missing}, which this device does not offer");
            return Err(wrong("driver_features", reason));
        }
        let vectors = self.interrupt.msix.vectors();
        let known = |vector: u16| vector < vectors || vector == NO_VECTOR;
        if !known(state.config_vector) || !state.queues.iter().all(|queue| known(queue.vector)) {
            return Err(wrong(
                "vector",
                format!("one that is not there; there are {vectors}"),
            ));
        }
        let mut config = inner.config.clone();
        if !config.restore(&state.config) {
            return Err(wrong("config", format!("{} bytes", state.config.len())));
        }
        let before = self.interrupt.msix.save();
        if !self.interrupt.msix.restore(&state.msix) {
            return Err(wrong(
                "msix",
                format!("{} entries; there are {vectors}", state.msix.table.len()),
            ));
        }
        // The device may have to know them to judge what it kept.
        self.device.set_features(accepted);
        if let Err(reason) = self.device.restore(&state.device) {
            self.interrupt.msix.restore(&before);
            return Err(wrong("device", reason));
        }
        inner.config = config;
        inner.status = state.status;
        inner.driver_features = state.driver_features;
        inner.device_feature_select = state.device_feature_select;
        inner.driver_feature_select = state.driver_feature_select;
        inner.queue_select = state.queue_select;
        for ((slot, queue), vector) in inner
            .queues
            .iter_mut()
            .zip(&state.queues)
            .zip(&self.interrupt.queue_vectors)
        {
            slot.restore(queue);
            vector.store(queue.vector, Ordering::SeqCst);
        }
        let interrupt = &self.interrupt;
        interrupt
            .config_vector
            .store(state.config_vector, Ordering::SeqCst);
        interrupt.isr.store(state.isr, Ordering::SeqCst);
        interrupt
            .generation
            .store(state.generation, Ordering::SeqCst);
        interrupt.broken.store(state.broken, Ordering::SeqCst);
        interrupt
            .driver_ok
            .store(state.status & DRIVER_OK != 0, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.pause();
    }
}
