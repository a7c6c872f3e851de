//! Keys of Cloud Hypervisor's config whose features this version does not have.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigError;

/// Top-level keys that are known, but only with an empty value.
const KNOWN: &[&str] = &[
    "balloon",
    "debug_console",
    "devices",
    "disks",
    "fs",
    "iommu",
    "landlock_enable",
    "landlock_rules",
    "net",
    "numa",
    "pci_segments",
    "platform",
    "pmem",
    "pvmemcontrol",
    "pvpanic",
    "rate_limit_groups",
    "rng",
    "sgx_epc",
    "tpm",
    "user_devices",
    "vdpa",
    "vsock",
    "watchdog",
];

/// Whatever other top-level keys a config has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Absent(BTreeMap<String, Value>);

impl Absent {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in &self.0 {
            if !KNOWN.contains(&key.as_str()) {
                return Err(ConfigError::Json(format!(
                    "unknown field `{key}`; the top-level fields are payload, cpus, memory, serial, console, hypervisor"
                )));
            }
            let empty = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            };
            if !empty {
                return Err(ConfigError::Json(format!(
                    "`{key}` asks for a feature that this version does not have; leave it out"
                )));
            }
        }
        Ok(())
    }
}
