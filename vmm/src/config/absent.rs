//! Keys of Cloud Hypervisor's config whose features this version does not have.

use serde_json::{Map, Value};

use super::{ConfigError, field};

/// The keys; one with a dot is inside of a section, or of every item of a list.
const KNOWN: &[&str] = &[
    "balloon.id",
    "cpus.affinity",
    "cpus.core_scheduling",
    "cpus.kvm_hyperv",
    "cpus.max_phys_bits",
    "cpus.nested",
    "debug_console",
    "devices",
    "disks.backing_files",
    "disks.disable_aio",
    "disks.iommu",
    "disks.pci_segment",
    "disks.queue_affinity",
    "disks.rate_limit_group",
    "fs.pci_segment",
    "iommu",
    "landlock_enable",
    "landlock_rules",
    "memory.mergeable",
    "memory.prefault",
    "memory.reserve",
    "memory.zones",
    "net.iommu",
    "net.pci_segment",
    "numa",
    "payload.firmware",
    "payload.host_data",
    "payload.igvm",
    "pci_segments",
    "platform",
    "pmem",
    "pvmemcontrol",
    "rate_limit_groups",
    "rng.iommu",
    "sgx_epc",
    "tpm",
    "user_devices",
    "vdpa",
    "vsock.iommu",
    "vsock.pci_segment",
];

/// Takes those keys out of a config, if they ask for nothing.
pub(super) fn strip(config: &mut Value) -> Result<(), ConfigError> {
    let Value::Object(config) = config else {
        // Not a config at all, which its parser says better.
        return Ok(());
    };
    for &path in KNOWN {
        let removed: Vec<Value> = match path.split_once('.') {
            None => config.remove(path).into_iter().collect(),
            Some((section, key)) => {
                let sections = match config.get_mut(section) {
                    Some(Value::Array(items)) => items.iter_mut().collect(),
                    section => section.into_iter().collect::<Vec<_>>(),
                };
                let sections = sections.into_iter().filter_map(Value::as_object_mut);
                sections
                    .filter_map(|section: &mut Map<_, _>| section.remove(key))
                    .collect()
            }
        };
        if removed.iter().any(|value| !asks_for_nothing(value)) {
            return Err(field(
                path,
                "asks for a feature that this version does not have",
                "leave it out",
            ));
        }
    }
    Ok(())
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.values().all(asks_for_nothing),
    }
}
