//! The configuration of a machine, as JSON: field names and defaults are those of Cloud Hypervisor's
//! API v1, as far as the features exist here.
//!
//! Unknown keys are refused. A key that Cloud Hypervisor knows but that names a feature this version
//! does not have may be absent, `null`, `false`, zero or empty, so that a client which always sends it
//! keeps working; a value that asks for the feature is refused by name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use hypervisor::HypervisorKind;
use serde::{Deserialize, Serialize};

mod absent;
mod devices;
mod memory;
mod vhost;

pub use devices::{
    BalloonConfig, DiskConfig, NetConfig, RateLimiterConfig, RngConfig, TokenBucketConfig,
    VsockConfig, urandom,
};
pub use memory::{HotplugMethod, MemoryConfig};
pub use vhost::{FsConfig, VhostMode};

/// A configuration that cannot be used: which field, why, and what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The JSON does not parse or has a wrong shape.
    #[error("invalid config: {0}")]
    Json(String),
    /// A field has a value that cannot work.
    #[error("{field}: {problem}; {fix}")]
    Field {
        /// Path of the field, dotted.
        field: &'static str,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        fix: String,
    },
}

fn field(field: &'static str, problem: impl Into<String>, fix: impl Into<String>) -> ConfigError {
    ConfigError::Field {
        field,
        problem: problem.into(),
        fix: fix.into(),
    }
}

/// Everything a machine is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What is booted: without a kernel, what is found on the disks.
    #[serde(default, deserialize_with = "null_is_default")]
    pub payload: PayloadConfig,
    /// The first serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The virtio console.
    #[serde(default = "off", deserialize_with = "null_is_off")]
    pub console: SerialConfig,
    /// The source of random numbers, which a guest always has.
    #[serde(default, deserialize_with = "null_is_default")]
    pub rng: RngConfig,
    /// The balloon, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Connections between guest and host without a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The guest can say that its kernel has panicked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pvpanic: bool,
    /// The guest has a watchdog: if it does not pet it, it is reset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub watchdog: bool,
    /// Disks.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub net: Vec<NetConfig>,
    /// File systems of the host.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub fs: Vec<FsConfig>,
    /// Which hypervisor; the host's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<HypervisorKind>,
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// How many the machine boots with.
    pub boot_vcpus: u32,
    /// How many it may have. If they are more than `boot_vcpus`, vCPUs can come and go while the guest runs.
    #[serde(default)]
    pub max_vcpus: u32,
    /// How many there are to be now, and at the guest's next reset: what `vm.resize` has last asked for, where it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// Sockets, dies, cores and threads; all cores of one package by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<TopologyConfig>,
    /// What the guest is shown of the processor: the name of a CPU model (`host` by default), or the path of a file with one.
    #[serde(default = "host_model", skip_serializing_if = "is_host_model")]
    pub model: String,
    /// Features that are switched on or off, whatever the model says.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub features: BTreeMap<String, bool>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            desired_vcpus: None,
            topology: None,
            model: host_model(),
            features: BTreeMap::new(),
        }
    }
}

impl CpusConfig {
    /// Whether vCPUs can come and go. What a guest is told of them must not change while it exists, so it does not depend on how many there
    /// happen to be.
    pub fn hotplug(&self) -> bool {
        self.max_vcpus > self.boot_vcpus
    }

    /// How many there are to be.
    pub fn desired(&self) -> u32 {
        self.desired_vcpus.unwrap_or(self.boot_vcpus)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if self.boot_vcpus == 0 || self.boot_vcpus > MAX_VCPUS {
            return Err(field(
                "cpus.boot_vcpus",
                format!("{} vCPUs", self.boot_vcpus),
                format!("use 1 to {MAX_VCPUS}"),
            ));
        }
        if self.max_vcpus > MAX_VCPUS {
            return Err(field(
                "cpus.max_vcpus",
                format!("{} vCPUs", self.max_vcpus),
                format!("use at most {MAX_VCPUS}"),
            ));
        }
        if self.max_vcpus < self.boot_vcpus {
            return Err(field(
                "cpus.max_vcpus",
                format!(
                    "{} is less than boot_vcpus, {}",
                    self.max_vcpus, self.boot_vcpus
                ),
                "make it at least as much or leave it out",
            ));
        }
        match self.desired_vcpus {
            Some(_) if !self.hotplug() => Err(field(
                "cpus.desired_vcpus",
                format!(
                    "the VM always has the {} vCPUs that it boots with",
                    self.boot_vcpus
                ),
                "give it a cpus.max_vcpus of more than its cpus.boot_vcpus when it is created, or leave this out",
            )),
            Some(wanted) if wanted == 0 || wanted > self.max_vcpus => Err(field(
                "cpus.desired_vcpus",
                format!("{wanted} vCPUs"),
                format!(
                    "use 1 to {}, which is the VM's cpus.max_vcpus",
                    self.max_vcpus
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// How the vCPUs are arranged. The product of all must be `max_vcpus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopologyConfig {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages (sockets).
    pub packages: u16,
}

fn host_model() -> String {
    "host".to_owned()
}

/// What older builds do not know is said only where it differs.
fn is_host_model(model: &str) -> bool {
    model == "host"
}

fn yes() -> bool {
    true
}

/// Cloud Hypervisor's clients may write `null`.
fn null_is_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// Kernel image: an ELF with a PVH note, or a bzImage. None: one that is found on the disks, at every boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line. It replaces the one that is found on a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Only a host that was not trusted has named these files: nobody here opens them until the operator names them (`vm.payload`). Set at
    /// an arrival, and kept in snapshots and moves, whoever is trusted there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub untold: bool,
}

/// Where a serial port or console leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// There is no port.
    Off,
    /// A port that leads nowhere.
    #[default]
    Null,
    /// A new pseudo terminal; its path appears as `file` in `vm.info`.
    Pty,
    /// Standard input and output of the `vmm` process.
    Tty,
    /// Appended to `file`.
    File,
    /// A unix socket at `socket` that one client at a time connects to.
    Socket,
}

/// The first serial port, or the console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Where it leads.
    pub mode: SerialMode,
    /// Output file of [`SerialMode::File`], or the terminal of [`SerialMode::Pty`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Socket of [`SerialMode::Socket`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Cloud Hypervisor's flag for a device behind an IOMMU; a serial port never is.
    #[serde(default, skip_serializing)]
    pub iommu: bool,
}

/// Paths of an end's fields.
struct EndNames {
    file: &'static str,
    socket: &'static str,
    iommu: &'static str,
}

const SERIAL: EndNames = EndNames {
    file: "serial.file",
    socket: "serial.socket",
    iommu: "serial.iommu",
};
const CONSOLE: EndNames = EndNames {
    file: "console.file",
    socket: "console.socket",
    iommu: "console.iommu",
};

fn off() -> SerialConfig {
    SerialConfig {
        mode: SerialMode::Off,
        ..SerialConfig::default()
    }
}

fn null_is_off<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<SerialConfig, D::Error> {
    Option::deserialize(deserializer).map(|console| console.unwrap_or_else(off))
}

impl SerialConfig {
    fn validate(&self, names: &EndNames) -> Result<(), ConfigError> {
        match self.mode {
            SerialMode::File if self.file.is_none() => Err(field(
                names.file,
                "missing although the mode is File",
                "name the file that the guest's output is appended to",
            )),
            SerialMode::Socket if self.socket.is_none() => Err(field(
                names.socket,
                "missing although the mode is Socket",
                "name the unix socket to create",
            )),
            _ if self.iommu => Err(field(
                names.iommu,
                "it is never behind an IOMMU",
                "leave it out",
            )),
            _ => Ok(()),
        }
    }
}

impl std::str::FromStr for SerialConfig {
    type Err = ConfigError;

    /// `off`, `null`, `pty`, `tty`, `file=PATH` or `socket=PATH`, as on the command line.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (mode, path) = match text.split_once('=') {
            Some((mode, path)) => (mode, Some(PathBuf::from(path))),
            None => (text, None),
        };
        let mut config = Self::default();
        config.mode = match (mode, path) {
            ("off", None) => SerialMode::Off,
            ("null", None) => SerialMode::Null,
            ("pty", None) => SerialMode::Pty,
            ("tty", None) => SerialMode::Tty,
            ("file", Some(path)) if !path.as_os_str().is_empty() => {
                config.file = Some(path);
                SerialMode::File
            }
            ("socket", Some(path)) if !path.as_os_str().is_empty() => {
                config.socket = Some(path);
                SerialMode::Socket
            }
            _ => {
                return Err(field(
                    "serial",
                    format!("`{text}` is not a serial port"),
                    "use off, null, pty, tty, file=PATH or socket=PATH",
                ));
            }
        };
        Ok(config)
    }
}

/// Most vCPUs of a machine: one xAPIC id each, and 255 is the broadcast.
pub const MAX_VCPUS: u32 = 254;

impl VmConfig {
    /// Parses and checks a config.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let config = Self::from_peer(json)?;
        crate::cpu::check(&config.cpus)?;
        Ok(config)
    }

    /// Parses and checks the config of a machine that moves in. Which model its processor was made from need not be known here: it brings
    /// its contract.
    pub fn from_peer(json: &[u8]) -> Result<Self, ConfigError> {
        let mut json: serde_json::Value = crate::json::parse(json).map_err(ConfigError::Json)?;
        if !json.is_object() {
            // Of a sequence an empty config could be made.
            return Err(ConfigError::Json("it must be an object: { … }".to_owned()));
        }
        absent::strip(&mut json)?;
        let mut config: Self = crate::json::from_value(json).map_err(ConfigError::Json)?;
        config.normalise();
        config.validate()?;
        Ok(config)
    }

    /// Parses one device, as it would be in `section` of a config.
    pub fn device<T: serde::de::DeserializeOwned>(
        section: &'static str,
        json: &[u8],
    ) -> Result<T, ConfigError> {
        let device: serde_json::Value = crate::json::parse(json).map_err(ConfigError::Json)?;
        let mut config = serde_json::json!({ section: device });
        absent::strip(&mut config)?;
        crate::json::from_value(config[section].take()).map_err(ConfigError::Json)
    }

    /// Fills in what follows from other fields.
    pub fn normalise(&mut self) {
        if self.cpus.max_vcpus == 0 {
            self.cpus.max_vcpus = self.cpus.boot_vcpus;
        }
        self.memory.normalise();
        self.normalise_devices();
    }

    /// Checks everything that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let cpus = &self.cpus;
        cpus.validate()?;
        if let Some(t) = &cpus.topology {
            let product = [
                t.threads_per_core,
                t.cores_per_die,
                t.dies_per_package,
                t.packages,
            ]
            .iter()
            .fold(1u64, |product, &n| product.saturating_mul(u64::from(n)));
            if product != u64::from(cpus.max_vcpus) {
                return Err(field(
                    "cpus.topology",
                    format!(
                        "describes {product} vCPUs, but max_vcpus is {}",
                        cpus.max_vcpus
                    ),
                    "make the product of its four numbers equal to max_vcpus",
                ));
            }
        }
        self.memory.validate()?;
        if self.payload.kernel.is_none() {
            if self.payload.initramfs.is_some() {
                return Err(field(
                    "payload.initramfs",
                    "given without a kernel",
                    "name the kernel, too, or leave both to what is found on the disks",
                ));
            }
            if self.local_disks().next().is_none() {
                return Err(field(
                    "payload.kernel",
                    "missing, and there is no disk with one",
                    "name an ELF kernel with a PVH note or a bzImage, or a disk to boot from",
                ));
            }
        }
        self.serial.validate(&SERIAL)?;
        self.console.validate(&CONSOLE)?;
        self.validate_devices()?;
        self.validate_vhost()?;
        if self.console.mode == SerialMode::Tty && self.serial.mode == SerialMode::Tty {
            return Err(field(
                "console.mode",
                "Tty, as serial.mode is",
                "let one of them lead elsewhere: there is one standard input",
            ));
        }
        Ok(())
    }

    /// The disks that this process reads itself.
    fn local_disks(&self) -> impl Iterator<Item = &DiskConfig> {
        self.disks.iter().filter(|disk| !disk.vhost_user)
    }

    /// Where a kernel is looked for: ids and paths.
    pub(crate) fn boot_disks(&self) -> Vec<(String, PathBuf)> {
        self.local_disks()
            .map(|disk| (disk.id.clone().unwrap_or_default(), disk.path.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests;
