//! The devices of a config that a guest finds on the PCI bus.
//!
//! ```text
//!   rng, balloon, console, vsock, memory, disks, net  ──normalise──► every one has an id  ──► slots in this order, the same on every host
//! ```

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use devices::net::MacAddr;
use serde::{Deserialize, Serialize};

use super::{ConfigError, VhostMode, VmConfig, field};

/// Most descriptors of a queue (section 2.7 of the virtio specification).
const MAX_QUEUE_SIZE: u16 = 32768;
/// Names of what every machine has: of devices, of their saved states, of groups of counters.
const RESERVED_IDS: [&str; 15] = [
    "rng",
    "mem",
    "balloon",
    "console",
    "vsock",
    "serial",
    "power",
    "cmos",
    "i8042",
    "pci-hotplug",
    "ioapic",
    "bus",
    "hypervisor",
    "watchdog",
    "pvpanic",
];
/// Longest id.
const MAX_ID: usize = 64;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image or block device; empty if a vhost-user back end has it.
    #[serde(
        default,
        deserialize_with = "super::null_is_default",
        skip_serializing_if = "is_empty"
    )]
    pub path: PathBuf,
    /// Another process serves it, by vhost-user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost_user: bool,
    /// The unix socket on which that process listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// The guest cannot write it.
    #[serde(default)]
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// Queues, each with a thread; one for each vCPU by default, 16 at most then, and one with a vhost-user back end.
    #[serde(default)]
    pub num_queues: u16,
    /// Descriptors of a queue, a power of two.
    #[serde(default = "queue_128")]
    pub queue_size: u16,
    /// Name in the machine, made up if it is not given.
    #[serde(default)]
    pub id: Option<String>,
    /// What the guest reads as its serial number, 20 bytes at most; the id by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How fast it may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// System calls instead of io_uring; the latter is also left alone where the host forbids it.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Slot on the PCI bus: 1 to 31, the next free one if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_slot: Option<u8>,
}

/// A rate, as two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Requests, or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens in a full bucket.
    pub size: u64,
    /// Tokens beyond those at the start, which do not come again.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Time in which an empty bucket fills, in milliseconds.
    pub refill_time: u64,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Another process takes and gives its packets, by vhost-user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost_user: bool,
    /// The unix socket of that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Which side listens on it.
    #[serde(default, skip_serializing_if = "VhostMode::is_default")]
    pub vhost_mode: VhostMode,
    /// TAP on the host, made if it is not there; a new name if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Descriptors of a TAP that was opened for this process and passed to it when it was started, one a queue pair, instead of `tap`. The
    /// interface is left as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// IPv4 address of the TAP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    /// Its network mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Ipv4Addr>,
    /// MAC address of the guest; made up if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// MAC address of the TAP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddr>,
    /// Largest packet, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How fast it may be, each way on its own, all queues together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// TCP segmentation may be left to the other side, where the host can.
    #[serde(default = "super::yes", skip_serializing_if = "is_true")]
    pub offload_tso: bool,
    /// UDP fragmentation and segmentation may.
    #[serde(default = "super::yes", skip_serializing_if = "is_true")]
    pub offload_ufo: bool,
    /// Checksums may; without them nothing of the others.
    #[serde(default = "super::yes", skip_serializing_if = "is_true")]
    pub offload_csum: bool,
    /// Queues, an even number: each pair receives and sends.
    #[serde(default = "one_pair")]
    pub num_queues: u16,
    /// Descriptors of a queue, a power of two.
    #[serde(default = "queue_256")]
    pub queue_size: u16,
    /// Name in the machine, made up if it is not given.
    #[serde(default)]
    pub id: Option<String>,
    /// Slot on the PCI bus: 1 to 31, the next free one if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_slot: Option<u8>,
}

/// The source of random numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where they come from: the system's generator, or another file.
    #[serde(default = "urandom")]
    pub src: PathBuf,
}

/// The virtio socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address: 3 to 4294967294.
    pub cid: u64,
    /// Unix socket, made here, on which the host connects to the guest (`CONNECT PORT`); the guest connects to `SOCKET_PORT`.
    pub socket: PathBuf,
    /// Name in the machine, `vsock` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Slot on the PCI bus of one that was added to a machine that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_slot: Option<u8>,
}

impl VsockConfig {
    /// Its name in the machine.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or("vsock")
    }
}

/// The balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Bytes that the guest gives back, a multiple of 4 KiB.
    pub size: u64,
    /// The guest may take them again when it has no other memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// The guest tells of memory that it has freed, which is given back at once.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { src: urandom() }
    }
}

fn is_empty(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

/// What older builds do not know is said only where it differs.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

fn queue_128() -> u16 {
    128
}

fn queue_256() -> u16 {
    256
}

fn one_pair() -> u16 {
    2
}

/// The system's generator.
pub fn urandom() -> PathBuf {
    PathBuf::from("/dev/urandom")
}

impl VmConfig {
    /// Gives an id to what has none, and queues to a disk that does not say how many.
    pub(super) fn normalise_devices(&mut self) {
        let mut taken: BTreeSet<String> = self.ids().map(str::to_owned).collect();
        let mut name = |kind: &str| {
            let id = (0..)
                .map(|number| format!("_{kind}{number}"))
                .find(|id| !taken.contains(id))
                .unwrap_or_default();
            taken.insert(id.clone());
            Some(id)
        };
        let queues = self.cpus.boot_vcpus.clamp(1, 16) as u16;
        for disk in &mut self.disks {
            if disk.id.as_deref().is_none_or(str::is_empty) {
                disk.id = name("disk");
            }
            if disk.num_queues == 0 {
                disk.num_queues = if disk.vhost_user { 1 } else { queues };
            }
        }
        if let Some(vsock) = &mut self.vsock {
            // What is empty or the default is not said.
            vsock.id.take_if(|id| id.is_empty() || id == "vsock");
        }
        for net in &mut self.net {
            if net.id.as_deref().is_none_or(str::is_empty) {
                net.id = name("net");
            }
            net.fds.take_if(|fds| fds.is_empty());
        }
        for fs in &mut self.fs {
            if fs.id.as_deref().is_none_or(str::is_empty) {
                fs.id = name("fs");
            }
        }
    }

    fn ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().filter_map(|disk| disk.id.as_deref());
        let nets = self.net.iter().filter_map(|net| net.id.as_deref());
        let fs = self.fs.iter().filter_map(|fs| fs.id.as_deref());
        let vsock = self.vsock.iter().filter_map(|vsock| vsock.id.as_deref());
        disks.chain(nets).chain(fs).chain(vsock)
    }

    pub(super) fn validate_devices(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for id in self.ids() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if id.is_empty() || id.len() > MAX_ID || !id.chars().all(plain) {
                return Err(field(
                    "id",
                    format!(
                        "`{}` is no name of a device",
                        id.chars().take(MAX_ID).collect::<String>()
                    ),
                    format!("use up to {MAX_ID} letters, digits, `-`, `_` or `.`"),
                ));
            }
            if RESERVED_IDS.contains(&id) {
                return Err(field(
                    "id",
                    format!("`{id}` is a device of every machine"),
                    "use another name",
                ));
            }
            if !seen.insert(id) {
                return Err(field(
                    "id",
                    format!("`{id}` is there twice"),
                    "give each device its own",
                ));
            }
        }
        for disk in &self.disks {
            queues(
                "disks.num_queues",
                "disks.queue_size",
                disk.num_queues,
                disk.queue_size,
            )?;
            if disk.serial.as_ref().is_some_and(|serial| serial.len() > 20) {
                return Err(field("disks.serial", "longer than 20 bytes", "shorten it"));
            }
            let limits = disk.rate_limiter_config.iter();
            limits
                .copied()
                .try_for_each(|limits| rate("disks.rate_limiter_config", limits))?;
        }
        for net in &self.net {
            queues(
                "net.num_queues",
                "net.queue_size",
                net.num_queues,
                net.queue_size,
            )?;
            let limits = net.rate_limiter_config.iter();
            limits
                .copied()
                .try_for_each(|limits| rate("net.rate_limiter_config", limits))?;
            if !net.num_queues.is_multiple_of(2) {
                return Err(field(
                    "net.num_queues",
                    format!("{} is odd", net.num_queues),
                    "one to receive and one to send make a pair: use an even number",
                ));
            }
        }
        self.validate_descriptors()?;
        let mut macs = BTreeSet::new();
        if let Some(twice) = self
            .net
            .iter()
            .filter_map(|net| net.mac)
            .find(|mac| !macs.insert(mac.octets()))
        {
            return Err(field(
                "net.mac",
                format!("{twice} is there twice"),
                "give each interface its own, or none",
            ));
        }
        let slots = self.disks.iter().filter_map(|disk| disk.pci_slot);
        let mut taken = BTreeSet::new();
        let slots = slots.chain(self.net.iter().filter_map(|net| net.pci_slot));
        let slots = slots.chain(self.fs.iter().filter_map(|fs| fs.pci_slot));
        for slot in slots.chain(self.vsock.iter().filter_map(|vsock| vsock.pci_slot)) {
            if !(1..devices::pci::SLOTS).contains(&slot) || !taken.insert(slot) {
                return Err(field(
                    "pci_slot",
                    format!("{slot} is there twice, or no slot"),
                    "use 1 to 31, each once, or leave it out",
                ));
            }
        }
        if let Some(vsock) = &self.vsock
            && !(3..u64::from(u32::MAX)).contains(&vsock.cid)
        {
            return Err(field(
                "vsock.cid",
                vsock.cid.to_string(),
                "use 3 to 4294967294",
            ));
        }
        if let Some(balloon) = &self.balloon
            && (balloon.size > self.memory.size || !balloon.size.is_multiple_of(4096))
        {
            return Err(field(
                "balloon.size",
                format!("{} bytes", balloon.size),
                "use a multiple of 4096, at most the size of memory",
            ));
        }
        Ok(())
    }
}

impl NetConfig {
    /// What makes no sense together with descriptors that were passed.
    fn beside_descriptors(&self) -> Option<&'static str> {
        [
            ("tap", self.tap.is_some()),
            ("ip", self.ip.is_some()),
            ("mask", self.mask.is_some()),
            ("host_mac", self.host_mac.is_some()),
        ]
        .into_iter()
        .find_map(|(name, there)| there.then_some(name))
    }
}

impl VmConfig {
    fn validate_descriptors(&self) -> Result<(), ConfigError> {
        let wrong = |problem: String, fix: &str| Err(field("net.fds", problem, fix));
        let mut seen = BTreeSet::new();
        for net in &self.net {
            let Some(fds) = &net.fds else { continue };
            if fds.len() * 2 != usize::from(net.num_queues) {
                return wrong(
                    format!("{} for {} queues", fds.len(), net.num_queues),
                    "pass one for each pair of queues, and set num_queues to twice as many",
                );
            }
            if let Some(name) = net.beside_descriptors() {
                return wrong(
                    format!("given together with `{name}`"),
                    "leave it out: an interface that is passed is set up already",
                );
            }
            if let Some(twice) = fds.iter().find(|fd| !seen.insert(**fd)) {
                return wrong(
                    format!("{twice} is there twice"),
                    "pass a descriptor for each pair of queues",
                );
            }
        }
        Ok(())
    }
}

pub(super) fn queues(
    number_field: &'static str,
    size_field: &'static str,
    number: u16,
    size: u16,
) -> Result<(), ConfigError> {
    if number == 0 || number > 64 {
        return Err(field(
            number_field,
            format!("{number} queues"),
            "use 1 to 64",
        ));
    }
    if !size.is_power_of_two() || !(16..=MAX_QUEUE_SIZE).contains(&size) {
        return Err(field(
            size_field,
            format!("{size} descriptors"),
            format!("use a power of two from 16 to {MAX_QUEUE_SIZE}"),
        ));
    }
    Ok(())
}

fn rate(field_name: &'static str, limits: RateLimiterConfig) -> Result<(), ConfigError> {
    let buckets = [limits.bandwidth, limits.ops];
    match buckets
        .iter()
        .flatten()
        .find(|bucket| bucket.size == 0 || bucket.refill_time == 0)
    {
        Some(_) => Err(field(
            field_name,
            "a bucket of no size, or one that never fills",
            "give size and refill_time (in milliseconds) greater than zero, or leave the bucket out",
        )),
        None => Ok(()),
    }
}
