//! The virtio block device: set up, and its queues (Virtual I/O Device 1.3, sections 3.1.1, 4.1.4.3, 5.2).
//!
//! Nothing here takes an interrupt: no vector is set, INTx is off, and the driver says in its rings that it looks by itself.

use super::pci::{self, Function};
use super::queue::Queue;
use super::rt::machine::Machine;

// struct virtio_pci_common_cfg.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_AVAILABLE: u64 = 0x28;
const QUEUE_USED: u64 = 0x30;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// VIRTIO_F_EVENT_IDX (bit 29).
const EVENT_IDX: u32 = 1 << 29;
/// VIRTIO_F_VERSION_1 (bit 32), in the upper half.
const VERSION_1: u32 = 1;

/// Most queues used.
pub const MAX_QUEUES: usize = 16;

/// The disk.
pub struct Disk {
    /// 4 KiB blocks, whole ones.
    pub blocks: u64,
    /// Whether event indices were agreed on.
    pub event_idx: bool,
    queues: [Option<Queue>; MAX_QUEUES],
}

impl Disk {
    /// Sets the device up with `queues` queues for `depth` requests each; says why if it cannot.
    pub fn set_up(
        machine: &Machine,
        function: Function,
        queues: usize,
        depth: u16,
        event_idx: bool,
    ) -> Result<Disk, &'static str> {
        let device = Registers(function);
        device.set(STATUS, 0u8);
        while device.get::<u8>(STATUS) != 0 {
            core::hint::spin_loop();
        }
        device.set(STATUS, ACKNOWLEDGE);
        device.set(STATUS, ACKNOWLEDGE | DRIVER);
        device.set(DEVICE_FEATURE_SELECT, 0u32);
        let wanted = if event_idx { EVENT_IDX } else { 0 };
        let low = device.get::<u32>(DEVICE_FEATURE) & wanted;
        device.set(DRIVER_FEATURE_SELECT, 0u32);
        device.set(DRIVER_FEATURE, low);
        device.set(DRIVER_FEATURE_SELECT, 1u32);
        device.set(DRIVER_FEATURE, VERSION_1);
        device.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if device.get::<u8>(STATUS) & FEATURES_OK == 0 {
            return Err("the disk does not accept version 1");
        }
        if usize::from(device.get::<u16>(NUM_QUEUES)) < queues || queues > MAX_QUEUES {
            return Err("the disk has fewer queues than `queues`");
        }
        let event_idx = low & EVENT_IDX != 0;
        let mut disk = Disk {
            blocks: 0,
            event_idx,
            queues: [const { None }; MAX_QUEUES],
        };
        for (index, place) in disk.queues[..queues].iter_mut().enumerate() {
            device.set(QUEUE_SELECT, index as u16);
            let size = device.get::<u16>(QUEUE_SIZE);
            let offset = u64::from(device.get::<u16>(QUEUE_NOTIFY_OFFSET));
            let notify = function.notify + offset * function.notify_step;
            let queue = Queue::lay_out(machine, index as u16, size, depth, notify, event_idx)
                .ok_or("the disk's queues are too small for `depth`")?;
            device.set_wide(QUEUE_DESCRIPTORS, queue.descriptors());
            device.set_wide(QUEUE_AVAILABLE, queue.available());
            device.set_wide(QUEUE_USED, queue.used());
            device.set(QUEUE_ENABLE, 1u16);
            *place = Some(queue);
        }
        device.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        // SAFETY: the first field of struct virtio_blk_config, the capacity in sectors of 512 bytes.
        let sectors = unsafe {
            let half = |at| u64::from(pci::read::<u32>(function.device + at));
            half(0) | half(4) << 32
        };
        disk.blocks = sectors / 8;
        if disk.blocks == 0 {
            return Err("the disk has no whole block");
        }
        Ok(disk)
    }

    /// The queues.
    pub fn queues(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.queues.iter_mut().flatten()
    }
}

struct Registers(Function);

impl Registers {
    fn get<T: Copy>(&self, offset: u64) -> T {
        // SAFETY: a field of the common configuration, at its offset.
        unsafe { pci::read(self.0.common + offset) }
    }

    fn set<T: Copy>(&self, offset: u64, value: T) {
        // SAFETY: as above; the rings that it is told of are this program's own.
        unsafe { pci::write(self.0.common + offset, value) };
    }

    fn set_wide(&self, offset: u64, value: u64) {
        self.set(offset, value as u32);
        self.set(offset + 4, (value >> 32) as u32);
    }
}
