//! The common configuration structure (section 4.1.4.3).

use std::sync::atomic::Ordering;

use super::interrupt::NO_VECTOR;
use super::transport::{Inner, VirtioPci};
use crate::virtio::{TRANSPORT_FEATURES, VERSION_1};

/// Bytes of a configuration space that are compared; the longest of ours, a disk's, has 60.
pub(super) const SHOWN: usize = 64;

/// Status: the driver has finished.
pub(super) const DRIVER_OK: u8 = 4;
/// Status: the features are settled.
pub(super) const FEATURES_OK: u8 = 8;
/// Status: the device cannot go on.
const NEEDS_RESET: u8 = 64;

/// Fields, by offset (struct virtio_pci_common_cfg).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    Queues,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    Descriptors(u32),
    Available(u32),
    Used(u32),
    NotifyData,
    QueueReset,
}

/// The field at an offset, and its length in bytes.
fn field(offset: u64) -> Option<(Field, usize)> {
    Some(match offset {
        0x00 => (Field::DeviceFeatureSelect, 4),
        0x04 => (Field::DeviceFeature, 4),
        0x08 => (Field::DriverFeatureSelect, 4),
        0x0c => (Field::DriverFeature, 4),
        0x10 => (Field::ConfigVector, 2),
        0x12 => (Field::Queues, 2),
        0x14 => (Field::Status, 1),
        0x15 => (Field::Generation, 1),
        0x16 => (Field::QueueSelect, 2),
        0x18 => (Field::QueueSize, 2),
        0x1a => (Field::QueueVector, 2),
        0x1c => (Field::QueueEnable, 2),
        0x1e => (Field::QueueNotifyOffset, 2),
        0x20 => (Field::Descriptors(0), 4),
        0x24 => (Field::Descriptors(32), 4),
        0x28 => (Field::Available(0), 4),
        0x2c => (Field::Available(32), 4),
        0x30 => (Field::Used(0), 4),
        0x34 => (Field::Used(32), 4),
        0x38 => (Field::NotifyData, 2),
        0x3a => (Field::QueueReset, 2),
        _ => return None,
    })
}

/// Half of a 64-bit number.
fn half(value: u64, shift: u32) -> u32 {
    (value >> shift) as u32
}

fn with_half(value: &mut u64, shift: u32, new: u32) {
    *value = *value & !(u64::from(u32::MAX) << shift) | u64::from(new) << shift;
}

impl VirtioPci {
    /// Reads fields of their own width (or 8 bytes, two of them); all else reads as zeros.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        if data.len() == 8 {
            let (low, high) = data.split_at_mut(4);
            self.read_common(offset, low);
            self.read_common(offset.saturating_add(4), high);
            return;
        }
        data.fill(0);
        let Some((field, len)) = field(offset) else {
            return;
        };
        if data.len() != len {
            return;
        }
        if field == Field::Generation {
            data.fill(self.generation());
            return;
        }
        let inner = self.lock();
        let queue = inner.queues.get(usize::from(inner.queue_select));
        let of_queue = |read: fn(&super::queues::QueueSlot) -> u64, shift| {
            queue.map_or(0, |queue| half(read(queue), shift))
        };
        let value = match field {
            Field::DeviceFeatureSelect => inner.device_feature_select,
            Field::DeviceFeature => match inner.device_feature_select {
                0 => half(self.offered(), 0),
                1 => half(self.offered(), 32),
                _ => 0,
            },
            Field::DriverFeatureSelect => inner.driver_feature_select,
            Field::DriverFeature => match inner.driver_feature_select {
                0 => half(inner.driver_features, 0),
                1 => half(inner.driver_features, 32),
                _ => 0,
            },
            Field::ConfigVector => u32::from(self.interrupt.config_vector.load(Ordering::SeqCst)),
            Field::Queues => inner.queues.len() as u32,
            Field::Status => u32::from(self.status(&inner)),
            // Answered before.
            Field::Generation => 0,
            Field::QueueSelect => u32::from(inner.queue_select),
            Field::QueueSize => queue.map_or(0, |queue| u32::from(queue.size)),
            Field::QueueVector => {
                let vector = self
                    .interrupt
                    .queue_vectors
                    .get(usize::from(inner.queue_select));
                vector.map_or(u32::from(NO_VECTOR), |vector| {
                    u32::from(vector.load(Ordering::SeqCst))
                })
            }
            Field::QueueEnable => queue.map_or(0, |queue| u32::from(queue.enabled)),
            Field::QueueNotifyOffset => queue.map_or(0, |_| u32::from(inner.queue_select)),
            Field::Descriptors(shift) => of_queue(|queue| queue.descriptors, shift),
            Field::Available(shift) => of_queue(|queue| queue.available, shift),
            Field::Used(shift) => of_queue(|queue| queue.used, shift),
            Field::NotifyData => u32::from(inner.queue_select),
            // A reset is over before the write that asks for it is.
            Field::QueueReset => 0,
        };
        data.copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// Writes fields of their own width (or 8 bytes, two of them); all else does nothing.
    pub(super) fn write_common(&self, offset: u64, data: &[u8]) {
        if data.len() == 8 {
            self.write_common(offset, &data[..4]);
            self.write_common(offset.saturating_add(4), &data[4..]);
            return;
        }
        let Some((field, len)) = field(offset) else {
            return;
        };
        if data.len() != len {
            return;
        }
        let mut bytes = [0; 4];
        bytes[..len].copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        let mut inner = self.lock();
        let select = usize::from(inner.queue_select);
        match field {
            Field::DeviceFeatureSelect => inner.device_feature_select = value,
            Field::DriverFeatureSelect => inner.driver_feature_select = value,
            Field::DriverFeature => {
                let shift = match inner.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                if inner.status & FEATURES_OK == 0 {
                    with_half(&mut inner.driver_features, shift, value);
                }
            }
            Field::ConfigVector => {
                self.interrupt
                    .config_vector
                    .store(self.vector(value), Ordering::SeqCst);
            }
            Field::Status => self.write_status(&mut inner, value as u8),
            Field::QueueSelect => inner.queue_select = value as u16,
            Field::QueueVector => {
                if let Some(vector) = self.interrupt.queue_vectors.get(select) {
                    vector.store(self.vector(value), Ordering::SeqCst);
                }
            }
            Field::QueueEnable if value == 1 => self.enable_queue(&mut inner, select),
            Field::QueueReset if value == 1 => self.reset_queue(&mut inner, select),
            Field::QueueSize | Field::Descriptors(_) | Field::Available(_) | Field::Used(_) => {
                let Some(queue) = inner.queues.get_mut(select).filter(|queue| !queue.enabled)
                else {
                    return;
                };
                match field {
                    Field::QueueSize => queue.size = value as u16,
                    Field::Descriptors(shift) => with_half(&mut queue.descriptors, shift, value),
                    Field::Available(shift) => with_half(&mut queue.available, shift, value),
                    Field::Used(shift) => with_half(&mut queue.used, shift, value),
                    _ => {}
                }
            }
            Field::DeviceFeature
            | Field::Queues
            | Field::Generation
            | Field::QueueNotifyOffset
            | Field::NotifyData
            | Field::QueueEnable
            | Field::QueueReset => {}
        }
    }

    /// The count of changes of the configuration space (section 2.5.3.1): one that the device has not told of yet is counted now, for a
    /// driver may have read one half of a value before it, and the other after it.
    fn generation(&self) -> u8 {
        let mut space = [0; SHOWN];
        let mut inner = self.lock();
        self.device.read_config(0, &mut space);
        if inner
            .shown
            .replace(space)
            .is_some_and(|shown| shown != space)
        {
            self.interrupt.generation.fetch_add(1, Ordering::SeqCst);
        }
        self.interrupt.generation.load(Ordering::SeqCst)
    }

    /// The features that the device and this transport offer.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | self.device.transport_features() & TRANSPORT_FEATURES
    }

    fn status(&self, inner: &Inner) -> u8 {
        match self.interrupt.broken.load(Ordering::SeqCst) {
            true => inner.status | NEEDS_RESET,
            false => inner.status,
        }
    }

    /// A vector that there is, or none.
    fn vector(&self, value: u32) -> u16 {
        match value as u16 {
            vector if vector < self.interrupt.msix.vectors() => vector,
            _ => NO_VECTOR,
        }
    }

    fn write_status(&self, inner: &mut Inner, value: u8) {
        if value == 0 {
            self.reset_device(inner);
            return;
        }
        // A driver only sets bits; NEEDS_RESET is ours.
        let new = value & !inner.status & !NEEDS_RESET;
        inner.status |= new;
        if new & FEATURES_OK != 0 {
            let wanted = inner.driver_features;
            if wanted & !self.offered() != 0 || wanted & VERSION_1 == 0 {
                inner.status &= !FEATURES_OK;
                tracing::warn!(
                    device = self.name(),
                    wanted,
                    "the driver wants features that are not offered, or none of version 1"
                );
            } else {
                self.device.set_features(wanted);
            }
        }
        if new & DRIVER_OK != 0 {
            if inner.status & FEATURES_OK == 0 {
                inner.status &= !DRIVER_OK;
                return;
            }
            self.interrupt.driver_ok.store(true, Ordering::SeqCst);
            self.start_queues(inner);
        }
    }
}
