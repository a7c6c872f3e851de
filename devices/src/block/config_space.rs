//! Features and the configuration space (sections 5.2.3 and 5.2.4).

use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout};

use super::disk::{Disk, DiskConfig, SECTOR};

pub(super) const SEG_MAX: u64 = 1 << 2;
pub(super) const RO: u64 = 1 << 5;
pub(super) const BLK_SIZE: u64 = 1 << 6;
pub(super) const FLUSH: u64 = 1 << 9;
pub(super) const TOPOLOGY: u64 = 1 << 10;
pub(super) const MQ: u64 = 1 << 12;
pub(super) const DISCARD: u64 = 1 << 13;
pub(super) const WRITE_ZEROES: u64 = 1 << 14;

/// What the specification calls a bit.
pub(crate) fn feature_name(bit: u32) -> Option<&'static str> {
    let name = match 1_u64.checked_shl(bit)? {
        SEG_MAX => "VIRTIO_BLK_F_SEG_MAX",
        RO => "VIRTIO_BLK_F_RO",
        BLK_SIZE => "VIRTIO_BLK_F_BLK_SIZE",
        FLUSH => "VIRTIO_BLK_F_FLUSH",
        TOPOLOGY => "VIRTIO_BLK_F_TOPOLOGY",
        MQ => "VIRTIO_BLK_F_MQ",
        DISCARD => "VIRTIO_BLK_F_DISCARD",
        WRITE_ZEROES => "VIRTIO_BLK_F_WRITE_ZEROES",
        _ => return None,
    };
    Some(name)
}

/// Sectors of one discard or write-zeroes request, 2 GiB: the host's time for one stays bounded.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

type Le16 = zerocopy::little_endian::U16;
type Le32 = zerocopy::little_endian::U32;
type Le64 = zerocopy::little_endian::U64;

/// `struct virtio_blk_config`, up to the last field of a feature that is offered.
#[derive(Debug, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    /// In sectors of 512 bytes.
    capacity: Le64,
    size_max: Le32,
    seg_max: Le32,
    cylinders: Le16,
    heads: u8,
    sectors: u8,
    blk_size: Le32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: Le16,
    opt_io_size: Le32,
    writeback: u8,
    unused0: u8,
    num_queues: Le16,
    max_discard_sectors: Le32,
    max_discard_seg: Le32,
    discard_sector_alignment: Le32,
    max_write_zeroes_sectors: Le32,
    max_write_zeroes_seg: Le32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl ConfigSpace {
    /// What the driver sees of a disk of `capacity` sectors.
    pub(super) fn new(disk: &Disk, config: &DiskConfig, capacity: u64) -> Self {
        let logical = disk.logical_block();
        let ratio = disk.physical_block() / logical;
        let mut space = Self::new_zeroed();
        space.capacity = capacity.into();
        // A request has a header and a status besides.
        space.seg_max = u32::from(config.queue_size - 2).into();
        space.blk_size = logical.into();
        space.physical_block_exp = ratio.trailing_zeros() as u8;
        space.min_io_size = u16::try_from(ratio).unwrap_or(1).into();
        space.num_queues = config.num_queues.into();
        if let Some(unit) = disk.discard() {
            space.max_discard_sectors = MAX_RANGE_SECTORS.into();
            space.max_discard_seg = 1.into();
            space.discard_sector_alignment = (unit / SECTOR as u32).into();
            space.write_zeroes_may_unmap = 1;
        }
        if !disk.read_only() {
            space.max_write_zeroes_sectors = MAX_RANGE_SECTORS.into();
            space.max_write_zeroes_seg = 1.into();
        }
        space
    }
}

/// What is offered for a disk.
pub(super) fn features(disk: &Disk, config: &DiskConfig) -> u64 {
    let mut offered = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
    if config.num_queues > 1 {
        offered |= MQ;
    }
    if disk.read_only() {
        offered |= RO;
    } else {
        offered |= WRITE_ZEROES;
        if disk.discard().is_some() {
            offered |= DISCARD;
        }
    }
    offered
}
