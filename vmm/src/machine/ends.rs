//! The host's ends of devices: images that are opened and locked, TAPs, and what happens to them when a machine moves.
//!
//! ```text
//!   source       open, locked ──── paused for the handover: unlocked ────────────── failure: locked again, then resumed
//!   destination        Reserve: open, not locked ──── state restored: locked ──┬─── commit: it runs; announces its addresses
//!                                                                              └─── failure: dropped, and so unlocked
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::block::{Block, Disk, DiskConfig as BlockConfig, DiskError, EngineKind};
use devices::net::{
    MacAddr, Net, NetConfig as Interface, NetError, Offloads, Tap, TapConfig, TapError,
};
use devices::rate_limiter::{RateLimiterConfig as Limits, TokenBucketConfig as Bucket};
use devices::vhost_user::{VhostConfig, VhostError, VhostKind, VhostUser};
use memory::GuestRam;

use crate::config::{DiskConfig, FsConfig, NetConfig, RateLimiterConfig, TokenBucketConfig};

/// How long a source waits for an image that the destination has locked and is about to let go.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// When a guest's addresses are announced after a move, after the arrival: switches learn from the first that comes through.
const ANNOUNCEMENTS_MS: [u64; 6] = [0, 50, 150, 400, 1000, 3000];

/// Why a network interface cannot be.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetEndError {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("no random MAC address: {0}")]
    Random(#[from] std::io::Error),
}

fn limits(config: RateLimiterConfig) -> Limits {
    let bucket = |bucket: TokenBucketConfig| Bucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst,
        refill_time_ms: bucket.refill_time,
    };
    Limits {
        bandwidth: config.bandwidth.map(bucket),
        ops: config.ops.map(bucket),
    }
}

/// Opens a disk's image.
pub(super) fn disk(id: &str, config: &DiskConfig, arriving: bool) -> Result<Block, DiskError> {
    let made = BlockConfig {
        path: config.path.clone(),
        read_only: config.readonly,
        direct: config.direct,
        serial: Some(
            config
                .serial
                .clone()
                .unwrap_or_else(|| id.chars().take(20).collect()),
        ),
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        rate_limiter: config.rate_limiter_config.map(limits),
        engine: config.disable_io_uring.then_some(EngineKind::Sync),
    };
    if arriving {
        let disk = Disk::open_unlocked(&made)?;
        Block::with_disk(id, made, disk)
    } else {
        Block::new(id, made)
    }
}

/// Opens a TAP. A MAC address that was not given is written into the config.
pub(super) fn net(config: &mut NetConfig) -> Result<Net, NetEndError> {
    let mac = match config.mac {
        Some(mac) => mac,
        None => MacAddr::random()?,
    };
    config.mac = Some(mac);
    let taps = match &config.fds {
        Some(fds) => Tap::from_numbers(fds)?,
        None => Tap::open(&TapConfig {
            name: config.tap.clone(),
            queue_pairs: config.num_queues / 2,
            mtu: config.mtu,
            host_mac: config.host_mac,
            ip: config.ip,
            mask: config.mask,
        })?,
    };
    let interface = Interface {
        mac,
        mtu: config.mtu,
        rate_limiter: config.rate_limiter_config.map(limits),
        offloads: Offloads {
            tso: config.offload_tso,
            ufo: config.offload_ufo,
            csum: config.offload_csum,
        },
        queue_size: config.queue_size,
    };
    Ok(Net::new(interface, taps)?)
}

/// Writes back what caches have of the images, while the guest still runs.
pub(super) fn write_back(disks: &[(String, Arc<Block>)]) {
    for (id, disk) in disks {
        if let Err(error) = disk.disk().write_back() {
            tracing::warn!(id, %error, "the image cannot be written back yet; the handover will try again");
        }
    }
}

/// Lets go the locks of all images, for a destination that takes them.
pub(super) fn unlock(disks: &[(String, Arc<Block>)]) {
    for (id, disk) in disks {
        if let Err(error) = disk.disk().unlock() {
            tracing::warn!(id, %error, "the image stays locked; a destination on this host cannot have it");
        }
    }
}

/// Locks all images, or says which cannot be.
pub(super) fn lock(disks: &[(String, Arc<Block>)]) -> Result<(), (String, DiskError)> {
    for (id, disk) in disks {
        disk.disk().lock().map_err(|error| (id.clone(), error))?;
    }
    Ok(())
}

/// Locks the images of a guest that comes back after a failed move. The destination may still be letting them go. A guest whose image
/// somebody else has must not run: no queue starts without the lock, so it would find its disks dead, and could not be helped any more.
pub(super) fn lock_again(
    disks: &[(String, Arc<Block>)],
    patience: Duration,
) -> Result<(), (String, DiskError)> {
    let until = Instant::now() + patience;
    loop {
        match lock(disks) {
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

/// Connects to the vhost-user back end of a disk.
pub(super) fn vhost_disk(
    id: &str,
    config: &DiskConfig,
    ram: &Arc<GuestRam>,
) -> Result<VhostUser, VhostError> {
    let made = VhostConfig {
        socket: config.vhost_socket.clone().unwrap_or_default(),
        kind: VhostKind::Block {
            read_only: config.readonly,
        },
        num_queues: config.num_queues,
        queue_size: config.queue_size,
    };
    VhostUser::new(id, made, Arc::clone(ram))
}

/// The same of a network interface. A MAC address that was not given is written into the config.
pub(super) fn vhost_net(
    id: &str,
    config: &mut NetConfig,
    ram: &Arc<GuestRam>,
) -> Result<VhostUser, VhostError> {
    let mac = match config.mac {
        Some(mac) => mac,
        None => MacAddr::random()?,
    };
    config.mac = Some(mac);
    let made = VhostConfig {
        socket: config.vhost_socket.clone().unwrap_or_default(),
        kind: VhostKind::Net {
            mac,
            mtu: config.mtu,
        },
        num_queues: config.num_queues,
        queue_size: config.queue_size,
    };
    VhostUser::new(id, made, Arc::clone(ram))
}

/// The same of a file system.
pub(super) fn fs(
    id: &str,
    config: &FsConfig,
    ram: &Arc<GuestRam>,
) -> Result<VhostUser, VhostError> {
    let made = VhostConfig {
        socket: config.socket.clone(),
        kind: VhostKind::Fs {
            tag: config.tag.clone(),
        },
        num_queues: config.num_queues,
        queue_size: config.queue_size,
    };
    VhostUser::new(id, made, Arc::clone(ram))
}

/// Tells the network where a guest is now: by its driver if that can, and by RARP in its name. Returns at once.
pub(super) fn announce(nets: Vec<Arc<Net>>, vhost: Vec<(String, Arc<VhostUser>)>) {
    if nets.is_empty() && vhost.is_empty() {
        return;
    }
    for net in &nets {
        net.announce();
    }
    for (_, device) in &vhost {
        device.announce();
    }
    let announcer = std::thread::Builder::new()
        .name("announce".to_owned())
        .spawn(move || {
            let start = Instant::now();
            // A device that has ended is held by nobody else.
            let weak: Vec<_> = nets.iter().map(Arc::downgrade).collect();
            drop(nets);
            let vhost: Vec<_> = vhost
                .iter()
                .map(|(_, device)| Arc::downgrade(device))
                .collect();
            for at in ANNOUNCEMENTS_MS.map(Duration::from_millis) {
                std::thread::sleep(at.saturating_sub(start.elapsed()));
                for net in weak.iter().filter_map(std::sync::Weak::upgrade) {
                    if let Err(error) = net.send_rarp() {
                        tracing::warn!(%error, "the network is not told where the guest is");
                    }
                }
                for device in vhost.iter().filter_map(std::sync::Weak::upgrade) {
                    device.send_rarp();
                }
            }
        });
    if let Err(error) = announcer {
        tracing::warn!(%error, "the network is not told where the guest is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_comes_back_only_to_images_that_nobody_else_has() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [0; 4096]).expect("room");
        let json = format!(r#"{{"path": {path:?}, "num_queues": 1}}"#);
        let config: DiskConfig = serde_json::from_str(&json).expect("a config");
        let make = |arriving| {
            let disk = disk("d", &config, arriving).expect("an image");
            [("d".to_owned(), Arc::new(disk))]
        };
        let (there, here) = (make(false), make(true));
        let moment = Duration::from_millis(30);
        assert!(matches!(
            lock_again(&here, moment),
            Err((id, DiskError::InUse { .. })) if id == "d"
        ));
        unlock(&there);
        assert!(lock_again(&here, moment).is_ok());
        assert!(lock(&there).is_err());
    }
}
