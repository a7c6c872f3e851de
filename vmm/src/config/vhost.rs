//! Devices that another process serves by vhost-user: which keys belong to them, and which do not.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, DiskConfig, NetConfig, VmConfig, field};

/// Longest name of a file system, in bytes (section 5.11.4 of the virtio specification).
const MAX_TAG: usize = 36;

/// A file system of the host's, shared by another process (`virtiofsd`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// What the guest mounts it by, 36 bytes at most.
    pub tag: String,
    /// The unix socket on which its back end listens.
    pub socket: PathBuf,
    /// Queues for requests.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors of a queue, a power of two.
    #[serde(default = "queue_1024")]
    pub queue_size: u16,
    /// Name in the machine, made up if it is not given.
    #[serde(default)]
    pub id: Option<String>,
    /// Slot on the PCI bus: 1 to 31, the next free one if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_slot: Option<u8>,
}

/// Which side of a vhost-user connection listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The back end does.
    #[default]
    Client,
    /// The machine would.
    Server,
}

impl VhostMode {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn one() -> u16 {
    1
}

fn queue_1024() -> u16 {
    1024
}

impl DiskConfig {
    /// The back end's socket, of a disk that has one.
    pub fn back_end(&self) -> Option<&Path> {
        self.vhost_socket.as_deref().filter(|_| self.vhost_user)
    }
}

impl NetConfig {
    /// The back end's socket, of an interface that has one.
    pub fn back_end(&self) -> Option<&Path> {
        self.vhost_socket.as_deref().filter(|_| self.vhost_user)
    }
}

/// `vhost_user` and `vhost_socket` go together.
fn pair(
    vhost_user: bool,
    socket: Option<&PathBuf>,
    (flag, path): (&'static str, &'static str),
) -> Result<(), ConfigError> {
    match (vhost_user, socket) {
        (true, None) => Err(field(
            path,
            "missing although vhost_user is true",
            "name the unix socket on which the back end listens",
        )),
        (false, Some(_)) => Err(field(
            flag,
            "false although there is a vhost_socket",
            "set it to true, or leave the socket out",
        )),
        _ => Ok(()),
    }
}

/// What cannot be together with a back end.
fn without(there: &[(&'static str, bool)]) -> Result<(), ConfigError> {
    match there.iter().find(|(_, there)| *there) {
        Some((key, _)) => Err(field(
            key,
            "given for a device of a vhost-user back end",
            "leave it out: this is the back end's affair",
        )),
        None => Ok(()),
    }
}

impl VmConfig {
    pub(super) fn validate_vhost(&self) -> Result<(), ConfigError> {
        for disk in &self.disks {
            let keys = ("disks.vhost_user", "disks.vhost_socket");
            pair(disk.vhost_user, disk.vhost_socket.as_ref(), keys)?;
            let no_path = disk.path.as_os_str().is_empty();
            if disk.vhost_user {
                without(&[
                    ("disks.path", !no_path),
                    ("disks.direct", disk.direct),
                    ("disks.serial", disk.serial.is_some()),
                    (
                        "disks.rate_limiter_config",
                        disk.rate_limiter_config.is_some(),
                    ),
                    ("disks.disable_io_uring", disk.disable_io_uring),
                ])?;
            } else if no_path {
                return Err(field(
                    "disks.path",
                    "missing",
                    "name an image or a block device, or set vhost_user and vhost_socket",
                ));
            }
        }
        for net in &self.net {
            let keys = ("net.vhost_user", "net.vhost_socket");
            pair(net.vhost_user, net.vhost_socket.as_ref(), keys)?;
            if net.vhost_user {
                without(&[
                    ("net.tap", net.tap.is_some()),
                    ("net.ip", net.ip.is_some()),
                    ("net.mask", net.mask.is_some()),
                    ("net.host_mac", net.host_mac.is_some()),
                    ("net.fds", net.fds.is_some()),
                    ("net.rate_limiter_config", net.rate_limiter_config.is_some()),
                    ("net.offload_tso", !net.offload_tso),
                    ("net.offload_ufo", !net.offload_ufo),
                    ("net.offload_csum", !net.offload_csum),
                ])?;
                if net.vhost_mode == VhostMode::Server {
                    return Err(field(
                        "net.vhost_mode",
                        "Server, and this version only connects",
                        "use Client and let the back end listen",
                    ));
                }
            }
        }
        for fs in &self.fs {
            super::devices::queues(
                "fs.num_queues",
                "fs.queue_size",
                fs.num_queues,
                fs.queue_size,
            )?;
            if fs.tag.is_empty() || fs.tag.len() > MAX_TAG {
                return Err(field(
                    "fs.tag",
                    format!("{} bytes", fs.tag.len()),
                    format!("use 1 to {MAX_TAG}"),
                ));
            }
            if self.fs.iter().filter(|other| other.tag == fs.tag).count() > 1 {
                return Err(field(
                    "fs.tag",
                    format!("`{}` is there twice", fs.tag),
                    "give each file system its own",
                ));
            }
        }
        let needs = self.disks.iter().any(|disk| disk.vhost_user)
            || self.net.iter().any(|net| net.vhost_user)
            || !self.fs.is_empty();
        if needs && !self.memory.shared && !self.memory.hugepages {
            return Err(field(
                "memory.shared",
                "false, and a vhost-user back end must be given the guest's memory",
                "set \"memory\": {\"shared\": true}",
            ));
        }
        Ok(())
    }
}
