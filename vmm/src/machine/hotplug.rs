//! What may be changed of a machine while it exists: devices that come and go, sizes.
//!
//! ```text
//!   vm.add-disk, -net, -fs, -vsock ──┬─ not built: into the config, there at the next boot
//!                                    └─ built: made, put into a slot, the guest is told; then into the config
//!   vm.remove-device ─┬─ not built: out of the config
//!                     └─ built: the guest is asked ··· it lets go ··· Event::Ejected ─► out of the config
//!   vm.resize: vCPUs ─► into the config, which a reset follows; built: they are there and the guest is told, or it is asked ··· it lets go
//! ```

use crate::config::{DiskConfig, FsConfig, NetConfig, VmConfig, VsockConfig};
use crate::job::JobKind;
use crate::service::{
    DeviceInfo, ErrorKind, Reply, Resize, ResizeDisk, Response, ServiceError, VcpuInfo,
    VcpuRefusal, VmState,
};

use super::error_chain;
use super::instance::Instance;
use super::owner::{Owner, Vm};

fn bad_request(error: impl std::error::Error + 'static) -> ServiceError {
    ServiceError::new(ErrorKind::BadRequest, error_chain(&error))
}

fn failed(error: impl std::error::Error + 'static) -> ServiceError {
    ServiceError::new(ErrorKind::Failed, error_chain(&error))
}

fn no_device(id: &str) -> ServiceError {
    ServiceError::new(
        ErrorKind::NotFound,
        format!("there is no device `{id}` that can be changed: see the ids in vm.info"),
    )
}

/// States in which a machine's devices can change.
pub(super) const CHANGEABLE: [VmState; 4] = [
    VmState::Created,
    VmState::Shutdown,
    VmState::Running,
    VmState::Paused,
];

impl Owner {
    pub(super) fn add_disk(&mut self, disk: DiskConfig) -> Reply {
        self.add(
            |config| {
                config.disks.push(disk);
                config.disks.len() - 1
            },
            |config, at| (config.disks[at].id.clone(), config.disks[at].pci_slot),
            |instance, config, at| instance.add_disk(&mut config.disks[at]),
        )
    }

    pub(super) fn add_net(&mut self, net: NetConfig) -> Reply {
        self.add(
            |config| {
                config.net.push(net);
                config.net.len() - 1
            },
            |config, at| (config.net[at].id.clone(), config.net[at].pci_slot),
            |instance, config, at| instance.add_net(&mut config.net[at]),
        )
    }

    pub(super) fn add_fs(&mut self, fs: FsConfig) -> Reply {
        self.add(
            |config| {
                config.fs.push(fs);
                config.fs.len() - 1
            },
            |config, at| (config.fs[at].id.clone(), config.fs[at].pci_slot),
            |instance, config, at| instance.add_fs(&mut config.fs[at]),
        )
    }

    /// A machine has one at most.
    pub(super) fn add_vsock(&mut self, vsock: VsockConfig) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "add a device to")?;
        if let Some(there) = &vm.config.vsock {
            return Err(ServiceError::wrong_state(format!(
                "the VM has a vsock already, `{}`, and can have one: remove it first",
                there.id()
            )));
        }
        self.add(
            |config| {
                config.vsock = Some(vsock);
                0
            },
            |config, _| {
                let vsock = config.vsock.as_ref();
                (
                    vsock.map(|vsock| vsock.id().to_owned()),
                    vsock.and_then(|vsock| vsock.pci_slot),
                )
            },
            |instance, config, _| match &mut config.vsock {
                Some(vsock) => instance.add_vsock(vsock),
                None => Ok(()),
            },
        )
    }

    fn add(
        &mut self,
        put: impl FnOnce(&mut VmConfig) -> usize,
        place: impl FnOnce(&VmConfig, usize) -> (Option<String>, Option<u8>),
        make: impl FnOnce(&Instance, &mut VmConfig, usize) -> Result<(), super::devices::DeviceError>,
    ) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "add a device to")?;
        let mut config = vm.config.clone();
        let at = put(&mut config);
        config.normalise();
        config.validate().map_err(bad_request)?;
        if let Some(instance) = &vm.instance {
            if vm.state == VmState::Paused {
                return Err(ServiceError::wrong_state(
                    "cannot add a device to a VM that is paused: resume it first",
                ));
            }
            make(instance, &mut config, at).map_err(failed)?;
        }
        let (id, slot) = place(&config, at);
        set_config(vm, config);
        Ok(Response::Device(DeviceInfo {
            id: id.unwrap_or_default(),
            bdf: slot.map(|slot| format!("0000:00:{slot:02x}.0")),
        }))
    }

    pub(super) fn remove_device(&mut self, id: &str) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "remove a device of")?;
        if !removable(&vm.config, id) {
            return Err(no_device(id));
        }
        match &vm.instance {
            // The config follows when the guest has let go.
            Some(instance) if instance.ask_to_remove(id) => {}
            Some(_) => return Err(no_device(id)),
            None => take_out(&mut vm.config, id),
        }
        Ok(Response::Done)
    }

    /// The guest has let a device go.
    pub(super) fn ejected(&mut self, machine: u64, id: &str) {
        if let Some(moving) = &mut self.moving
            && moving.kind == JobKind::Receive
            && moving.arriving == machine
        {
            // The guest runs here already, and this thread does not know of it yet.
            moving.ejected.push(id.to_owned());
            return;
        }
        let Some(vm) = &mut self.vm else { return };
        if vm
            .instance
            .as_ref()
            .is_none_or(|instance| instance.number() != machine)
        {
            return;
        }
        let mut config = vm.config.clone();
        take_out(&mut config, id);
        set_config(vm, config);
        if let Some(moving) = &self.moving {
            // Its destination was told of a device that is no more.
            moving.control.cancel();
        }
    }

    pub(super) fn resize(&mut self, wanted: Resize) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "resize")?;
        let mut config = vm.config.clone();
        // Without hotplug it may be asked for what it has.
        if let Some(vcpus) = wanted.desired_vcpus
            && (config.cpus.hotplug() || vcpus != config.cpus.boot_vcpus)
        {
            config.cpus.desired_vcpus = Some(vcpus);
        }
        if let Some(bytes) = wanted.desired_ram {
            config.memory.want(bytes).map_err(bad_request)?;
        }
        if let Some(size) = wanted.desired_balloon {
            match &mut config.balloon {
                Some(balloon) => balloon.size = size,
                None => {
                    return Err(ServiceError::wrong_state(
                        "the VM has no balloon: give it one with `balloon` in its config",
                    ));
                }
            }
        }
        // All of it or nothing.
        config.validate().map_err(bad_request)?;
        if let Some(instance) = &vm.instance {
            if let Some(size) = wanted.desired_balloon {
                instance.set_balloon(size);
            }
            if let Some(vcpus) = wanted.desired_vcpus {
                instance.resize_vcpus(vcpus);
            }
            if let Some(added) = instance.virtio_mem() {
                added.set_requested_bytes(config.memory.hotplugged_size.unwrap_or(0));
            }
        }
        set_config(vm, config);
        Ok(Response::Done)
    }

    pub(super) fn resize_disk(&mut self, wanted: &ResizeDisk) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "resize a disk of")?;
        if !vm
            .config
            .disks
            .iter()
            .any(|disk| disk.id.as_ref() == Some(&wanted.id))
        {
            return Err(no_device(&wanted.id));
        }
        match &vm.instance {
            Some(instance) => instance
                .resize_disk(&wanted.id, wanted.desired_size)
                .ok_or_else(|| no_device(&wanted.id))?
                .map_err(failed)?,
            None => {
                return Err(ServiceError::wrong_state(
                    "the VM does not run: resize the image itself",
                ));
            }
        }
        Ok(Response::Done)
    }
}

impl Vm {
    /// How the coming and going of vCPUs stands.
    pub(super) fn vcpu_info(&self) -> Option<VcpuInfo> {
        let status = self.instance.as_ref()?.vcpu_status()?;
        let refused = status.refused.into_iter();
        Some(VcpuInfo {
            desired: self.config.cpus.desired(),
            present: status.present,
            pending: status.unanswered,
            refused: refused
                .map(|(id, status)| VcpuRefusal { id, status })
                .collect(),
        })
    }
}

/// Gives a machine this config, as the next host or boot sees it.
pub(super) fn set_config(vm: &mut Vm, config: VmConfig) {
    if let Some(instance) = &vm.instance {
        instance.set_config(config.clone());
    }
    vm.config = config;
}

fn removable(config: &VmConfig, id: &str) -> bool {
    config
        .disks
        .iter()
        .any(|disk| disk.id.as_deref() == Some(id))
        || config.net.iter().any(|net| net.id.as_deref() == Some(id))
        || config.fs.iter().any(|fs| fs.id.as_deref() == Some(id))
        || config.vsock.as_ref().is_some_and(|vsock| vsock.id() == id)
}

fn take_out(config: &mut VmConfig, id: &str) {
    config.disks.retain(|disk| disk.id.as_deref() != Some(id));
    config.net.retain(|net| net.id.as_deref() != Some(id));
    config.fs.retain(|fs| fs.id.as_deref() != Some(id));
    config.vsock.take_if(|vsock| vsock.id() == id);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use migration::MoveControl;

    use super::super::GuestEnd;
    use super::super::owner::Moving;
    use super::*;
    use crate::job::Jobs;

    #[test]
    fn what_goes_before_the_arrival_is_known_is_not_forgotten() {
        let (events, _inbox) = mpsc::channel();
        let jobs = Jobs::default();
        let control = Arc::new(MoveControl::new());
        let job = jobs.start(JobKind::Receive, "unix:/x".to_owned(), control.clone());
        let mut owner = Owner::new(GuestEnd::Stays, None, events, jobs);
        owner.moving = Some(Moving {
            job,
            kind: JobKind::Receive,
            control,
            arriving: 7,
            early: Vec::new(),
            ejected: Vec::new(),
        });
        owner.ejected(6, "of another machine");
        owner.ejected(7, "disk");
        let moving = owner.moving.expect("still");
        assert_eq!(moving.ejected, ["disk"]);
    }
}
