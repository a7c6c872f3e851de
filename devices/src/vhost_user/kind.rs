//! What differs between disks, networks and file systems.

use std::io;

use super::error::VhostError;
use crate::net::{CARRIED, MacAddr, NetFront};
use crate::virtio::{DeviceType, read_space};

/// `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding: what the features below tell of, and no more than the least
/// that back ends have (section 5.2.4).
const BLOCK_SPACE: u32 = 60;
/// Where its `num_queues` is.
const BLOCK_QUEUES: usize = 34;
/// VIRTIO_BLK_F_RO.
const BLOCK_READ_ONLY: u64 = 1 << 5;
/// VIRTIO_BLK_F_MQ.
const BLOCK_MQ: u64 = 1 << 12;
/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES (section 5.2.3). Not CONFIG_WCE: a cache is
/// written back when the driver says so.
const BLOCK_FEATURES: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | BLOCK_READ_ONLY
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | BLOCK_MQ
    | 1 << 13
    | 1 << 14;
/// Longest name of a file system (section 5.11.4).
const TAG: usize = 36;
/// Commands are few and short.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What a device is, as its config says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VhostKind {
    /// A disk.
    Block {
        /// It must be read-only.
        read_only: bool,
    },
    /// A network interface.
    Net {
        /// The guest's address.
        mac: MacAddr,
        /// The MTU that the driver is told, if any.
        mtu: Option<u16>,
    },
    /// A file system.
    Fs {
        /// What the guest mounts it by, 1 to 36 bytes.
        tag: String,
    },
}

/// The same with what it keeps.
pub(super) enum Kind {
    Block { read_only: bool },
    Net { front: NetFront, first_mac: MacAddr },
    Fs { tag: String },
}

impl Kind {
    pub(super) fn new(kind: VhostKind, queues: u16) -> Result<Self, VhostError> {
        Ok(match kind {
            VhostKind::Block { read_only } => Self::Block { read_only },
            VhostKind::Net { mac, mtu } => Self::Net {
                front: NetFront::new(mac, mtu, queues / 2)?,
                first_mac: mac,
            },
            VhostKind::Fs { tag } if (1..=TAG).contains(&tag.len()) => Self::Fs { tag },
            VhostKind::Fs { tag } => {
                let problem = format!(
                    "a tag of {} bytes; a file system's has 1 to {TAG}",
                    tag.len()
                );
                return Err(VhostError::Config(problem));
            }
        })
    }

    pub(super) fn device_type(&self) -> DeviceType {
        match self {
            Self::Block { .. } => DeviceType {
                name: "virtio-vhost-blk",
                id: 2,
                pci_class: [0x01, 0x80, 0x00],
            },
            Self::Net { .. } => DeviceType {
                name: "virtio-vhost-net",
                id: 1,
                pci_class: [0x02, 0, 0],
            },
            Self::Fs { .. } => DeviceType {
                name: "virtio-vhost-fs",
                id: 26,
                pci_class: [0x01, 0x80, 0x00],
            },
        }
    }

    /// Rings that the back end serves, when the config says `queues`.
    pub(super) fn rings(&self, queues: u16) -> u16 {
        match self {
            Self::Block { .. } | Self::Net { .. } => queues,
            // The first is for requests that go first (section 5.11.2).
            Self::Fs { .. } => queues + 1,
        }
    }

    /// All queues that the driver sees.
    pub(super) fn queue_sizes(&self, queues: u16, size: u16) -> Vec<u16> {
        let mut sizes = vec![size; self.rings(queues).into()];
        if let Self::Net { .. } = self {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    /// Features that are the back end's to have.
    pub(super) fn carried(&self) -> u64 {
        match self {
            Self::Block { .. } => BLOCK_FEATURES,
            Self::Net { .. } => CARRIED,
            Self::Fs { .. } => 0,
        }
    }

    /// Features that this side has.
    pub(super) fn own(&self) -> u64 {
        match self {
            Self::Net { front, .. } => front.features(),
            Self::Block { .. } | Self::Fs { .. } => 0,
        }
    }

    /// Whether what the back end offers is what the config says.
    pub(super) fn check(&self, offered: u64, queues: u16) -> Result<(), VhostError> {
        match self {
            Self::Block { read_only: true } if offered & BLOCK_READ_ONLY == 0 => {
                Err(VhostError::Config(
                    "the disk is to be read-only, but its back end lets it be written: make it read-only there".to_owned(),
                ))
            }
            Self::Block { .. } if queues > 1 && offered & BLOCK_MQ == 0 => {
                Err(VhostError::Lacks(format!("{queues} queues: it has one (no VIRTIO_BLK_F_MQ)")))
            }
            _ => Ok(()),
        }
    }

    /// Bytes of the configuration space that the back end is asked for; none if this side knows all of it.
    pub(super) fn space_from_back_end(&self) -> Option<u32> {
        matches!(self, Self::Block { .. }).then_some(BLOCK_SPACE)
    }

    /// The configuration space; `theirs` is what the back end has said.
    pub(super) fn read_space(&self, theirs: &[u8], queues: u16, offset: u64, data: &mut [u8]) {
        match self {
            Self::Block { .. } => {
                let mut space = theirs.to_vec();
                // Its number may be larger than what there is here.
                if let Some(field) = space.get_mut(BLOCK_QUEUES..BLOCK_QUEUES + 2) {
                    field.copy_from_slice(&queues.to_le_bytes());
                }
                read_space(&space, offset, data);
            }
            Self::Net { front, .. } => read_space(&front.space(), offset, data),
            Self::Fs { tag } => {
                let mut space = [0; TAG + 4];
                space[..tag.len()].copy_from_slice(tag.as_bytes());
                space[TAG..].copy_from_slice(&u32::from(queues).to_le_bytes());
                read_space(&space, offset, data);
            }
        }
    }

    /// Whether a back end may take requests up again of which nobody knows whether they were carried out, by the used ring's position: packets
    /// go in their order, and one that is lost or comes twice harms nobody.
    pub(super) fn forgives(&self) -> bool {
        matches!(self, Self::Net { .. })
    }

    /// Whether a ring that is started is also to be served.
    pub(super) fn is_active(&self, ring: u16) -> bool {
        match self {
            Self::Net { front, .. } => front.is_active(ring / 2),
            Self::Block { .. } | Self::Fs { .. } => true,
        }
    }

    pub(super) fn front(&self) -> Option<&NetFront> {
        match self {
            Self::Net { front, .. } => Some(front),
            Self::Block { .. } | Self::Fs { .. } => None,
        }
    }

    /// Why its back end's state cannot go to another one, if so.
    pub(super) fn stays(&self) -> Option<&'static str> {
        match self {
            Self::Fs { .. } => Some(
                "open files and what the guest knows of them are in its back end, which cannot hand them over: unmount it in the guest, then \
                 remove it with vm.remove-device",
            ),
            Self::Block { .. } | Self::Net { .. } => None,
        }
    }
}

/// Size of a disk in sectors of 512 bytes, from its configuration space.
pub(super) fn capacity(space: &[u8]) -> Option<u64> {
    space.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// How many queues a device may have here.
pub(super) fn check_queues(kind: &VhostKind, queues: u16, size: u16) -> io::Result<()> {
    let even = !matches!(kind, VhostKind::Net { .. }) || queues.is_multiple_of(2);
    if !(1..=64).contains(&queues) || !even || !size.is_power_of_two() || size > 32768 {
        return Err(io::Error::other(format!(
            "{queues} queues of {size} descriptors; use 1 to 64, of a power of two, and pairs for a network"
        )));
    }
    Ok(())
}
