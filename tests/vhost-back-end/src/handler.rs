//! What the front end asks for.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex};

use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;
use crate::ring::{MAX_SIZE, Ring, notes_len, notes_of};
use crate::{Device, disk, locked};

/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_VERSION_1, event indices, indirect descriptors, VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | EVENT_IDX | 1 << 30 | LOG_ALL;
const EVENT_IDX: u64 = 1 << 29;

/// A front end's session.
pub(crate) struct Handler {
    device: Arc<Mutex<Device>>,
    memory: Memory,
    rings: Vec<Ring>,
    notes: Option<MmapRegion>,
    size: u16,
}

fn failed(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

fn event(file: Option<File>) -> Option<EventFd> {
    // SAFETY: the descriptor is handed over, and is nobody else's.
    file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl Handler {
    pub(crate) fn new(device: Arc<Mutex<Device>>, queues: usize) -> Self {
        Self {
            device,
            memory: Memory::default(),
            rings: (0..queues).filter_map(|_| Ring::new().ok()).collect(),
            notes: None,
            size: MAX_SIZE,
        }
    }

    pub(crate) fn kicks(&self) -> impl Iterator<Item = i32> {
        self.rings.iter().filter_map(Ring::kick_fd)
    }

    /// There is something to do without waiting.
    pub(crate) fn is_busy(&self) -> bool {
        match &*locked(&self.device) {
            Device::Disk(_) => self.rings.iter().any(|ring| !ring.begun.is_empty()),
            Device::Net(net) => {
                self.rings.get(1).is_some_and(|ring| !ring.begun.is_empty())
                    || net.has_frames()
                        && self
                            .rings
                            .first()
                            .is_some_and(|ring| !ring.begun.is_empty())
            }
        }
    }

    /// Takes what is offered and does a few requests of each ring.
    pub(crate) fn work(&mut self, count: usize) -> io::Result<()> {
        for index in 0..self.rings.len() {
            if self.rings[index].is_served() {
                let notes = notes_of(self.notes.as_ref(), index, self.size);
                self.rings[index].take(&self.memory, notes.as_ref())?;
                self.finish(index, count)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, index: usize, count: usize) -> io::Result<()> {
        let notes = notes_of(self.notes.as_ref(), index, self.size);
        let ring = &mut self.rings[index];
        for _ in 0..count {
            let mut device = locked(&self.device);
            let (request, written) = match &mut *device {
                Device::Disk(disk) => {
                    let Some(request) = ring.begun.pop() else {
                        break;
                    };
                    let written = disk.serve(&self.memory, &request)?;
                    (request, written)
                }
                Device::Net(net) if ring.begun.is_empty() || index == 0 && !net.has_frames() => {
                    break;
                }
                Device::Net(net) => {
                    let request = ring.begun.remove(0);
                    let written = match index {
                        0 => net.receive(&self.memory, &request)?,
                        _ => net.sent(&self.memory, &request).map(|()| 0)?,
                    };
                    (request, written)
                }
            };
            ring.finish(&self.memory, notes.as_ref(), request.head, written)?;
        }
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rings.iter_mut().for_each(Ring::stop);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(match &*locked(&self.device) {
            Device::Disk(_) => FEATURES | disk::FEATURES,
            Device::Net(_) => FEATURES,
        })
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.memory.logging = features & LOG_ALL != 0;
        for ring in &mut self.rings {
            ring.queue.set_event_idx(features & EVENT_IDX != 0);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.memory.set(regions, files).map_err(failed)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.queue.set_size(num as u16);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let mut addresses = [descriptor, available, used];
        for address in &mut addresses {
            *address = self.memory.gpa(*address).map_err(failed)?;
        }
        let [descriptors, available, used] =
            addresses.map(|at| (Some(at as u32), Some((at >> 32) as u32)));
        let ring = self.ring(index)?;
        ring.queue
            .set_desc_table_address(descriptors.0, descriptors.1);
        ring.queue.set_avail_ring_address(available.0, available.1);
        ring.queue.set_used_ring_address(used.0, used.1);
        ring.log = flags
            .contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG)
            .then_some(log);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.queue.set_next_avail(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let is_disk = matches!(*locked(&self.device), Device::Disk(_));
        if is_disk {
            self.finish(index as usize, usize::MAX).map_err(failed)?;
        }
        let ring = self.ring(index)?;
        // Buffers that nothing was received into are given back.
        let back = ring.begun.len() as u16;
        ring.begun.clear();
        ring.stop();
        let base = ring.queue.next_avail().wrapping_sub(back);
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let notes = notes_of(self.notes.as_ref(), index.into(), self.size);
        let ring = self
            .rings
            .get_mut(usize::from(index))
            .ok_or(Error::InvalidParam)?;
        ring.kick = event(file);
        ring.start(&self.memory, notes).map_err(failed)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = event(file);
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        let all = Protocol::MQ | Protocol::LOG_SHMFD | Protocol::REPLY_ACK | Protocol::CONFIG;
        Ok(match &*locked(&self.device) {
            Device::Disk(_) => all | Protocol::INFLIGHT_SHMFD,
            Device::Net(_) => all,
        })
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let queues = self.rings.len();
        let space = match &*locked(&self.device) {
            Device::Disk(disk) => disk.space(queues),
            Device::Net(_) => Vec::new(),
        };
        let end = offset.saturating_add(size) as usize;
        let part = space.get(offset as usize..end);
        part.map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("nothing can be configured"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, wish: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let len = notes_len(wish.queue_size) * usize::from(wish.num_queues);
        let file = rustix::fs::memfd_create("notes", MemfdFlags::CLOEXEC).map_err(io::Error::from);
        let file = File::from(file.map_err(failed)?);
        file.set_len(len as u64).map_err(failed)?;
        let given = VhostUserInflight::new(len as u64, 0, wish.num_queues, wish.queue_size);
        Ok((given, file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let offset = FileOffset::new(file, given.mmap_offset);
        let notes = MmapRegion::from_file(offset, given.mmap_size as usize);
        self.notes = Some(notes.map_err(|error| failed(io::Error::other(error)))?);
        self.size = given.queue_size;
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(8)
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidOperation("memory does not grow"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("memory does not shrink"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("there is no state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("there is no state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory of its own"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.memory
            .set_log(file, log.mmap_offset, log.mmap_size)
            .map_err(failed)
    }
}
