//! Guest RAM in a config, and how much it may grow.
//!
//! ```text
//!   size ── what the guest boots with        hotplug_size ── how much can be added
//!     └────────── + hotplugged_size ── how much of that is to be there: the memory that vm.resize asks for
//! ```

use ::memory::layout::{HOTPLUG_UNIT, MAX_RAM, hotplug_range, ram_ranges};
use ::memory::{BLOCK_SIZE, Backing, PAGE_SIZE, RamRange};
use serde::{Deserialize, Serialize};

use super::{ConfigError, field, null_is_default, yes};

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Backed by a memfd that another process could map. Slower to fill; off unless something needs it.
    #[serde(default)]
    pub shared: bool,
    /// Backed by hugetlbfs pages, which the host must have set aside.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those pages in bytes: 2 MiB (default) or 1 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Transparent huge pages are advised.
    #[serde(default = "yes")]
    pub thp: bool,
    /// How memory comes and goes while the guest runs. Cloud Hypervisor's clients always write it; without a size it has no effect.
    #[serde(
        default,
        skip_serializing_if = "HotplugMethod::is_default",
        deserialize_with = "null_is_default"
    )]
    pub hotplug_method: HotplugMethod,
    /// Bytes that can be added at most, a multiple of 128 MiB. Unused addresses and no memory until the guest plugs them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes that are to be added now, a multiple of 2 MiB: from the start, and later what `vm.resize` made of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
}

/// How memory comes and goes while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// As DIMMs announced by ACPI, Cloud Hypervisor's default; not here.
    #[default]
    Acpi,
    /// By a virtio-mem device.
    VirtioMem,
}

impl HotplugMethod {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            thp: true,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
        }
    }
}

impl MemoryConfig {
    /// How guest RAM is backed.
    pub fn backing(&self) -> Backing {
        if self.hugepages {
            Backing::Hugetlbfs {
                page_size: self.hugepage_size.unwrap_or(2 << 20),
            }
        } else if self.shared {
            Backing::Memfd { thp: self.thp }
        } else {
            Backing::Anonymous { thp: self.thp }
        }
    }

    /// All RAM that the guest may ever have, lowest address first: what it boots with, and last the region where memory can be added.
    pub fn ranges(&self) -> Result<Vec<RamRange>, ::memory::Error> {
        let mut ranges = ram_ranges(self.size)?;
        if let Some(plug) = self.hotplug_size {
            ranges.push(hotplug_range(self.size, plug)?);
        }
        Ok(ranges)
    }

    /// The guest's memory in bytes once it has done what it was asked for.
    pub fn wanted(&self) -> u64 {
        self.size.saturating_add(self.hotplugged_size.unwrap_or(0))
    }

    /// Asks for this much memory in all, in bytes, or says what can be asked for.
    pub fn want(&mut self, bytes: u64) -> Result<(), ConfigError> {
        const FIELD: &str = "desired_ram";
        let Some(most) = self.hotplug_size else {
            if bytes == self.size {
                return Ok(());
            }
            return Err(field(
                FIELD,
                format!(
                    "the VM has {} bytes, and was made without memory that can be added",
                    self.size
                ),
                "leave it out, or give the VM `\"hotplug_method\": \"VirtioMem\"` and a `hotplug_size` in its config's `memory`",
            ));
        };
        let added = bytes.checked_sub(self.size).filter(|added| *added <= most);
        match added {
            Some(added) if added.is_multiple_of(BLOCK_SIZE) => {
                self.hotplugged_size = (added != 0).then_some(added);
                Ok(())
            }
            _ => Err(field(
                FIELD,
                format!("{bytes} bytes"),
                format!(
                    "use {} (what it boots with) to {} bytes, in steps of {BLOCK_SIZE}",
                    self.size,
                    self.size.saturating_add(most)
                ),
            )),
        }
    }

    /// A size of nothing is none.
    pub(super) fn normalise(&mut self) {
        for size in [&mut self.hotplug_size, &mut self.hotplugged_size] {
            size.take_if(|size| *size == 0);
        }
    }

    fn validate_hotplug(&self) -> Result<(), ConfigError> {
        let added = self.hotplugged_size.unwrap_or(0);
        let Some(most) = self.hotplug_size else {
            return match added {
                0 => Ok(()),
                _ => Err(field(
                    "memory.hotplugged_size",
                    "given although there is no hotplug_size",
                    "say with hotplug_size how much can be added, or leave both out",
                )),
            };
        };
        if self.hotplug_method != HotplugMethod::VirtioMem {
            return Err(field(
                "memory.hotplug_method",
                "Acpi (which is also the default) cannot add memory in this version",
                "use \"VirtioMem\": the guest needs the driver virtio_mem, which distributions' kernels have",
            ));
        }
        if !most.is_multiple_of(HOTPLUG_UNIT) || most > MAX_RAM.saturating_sub(self.size) {
            return Err(field(
                "memory.hotplug_size",
                format!("{most} bytes"),
                "use a multiple of 134217728 (128 MiB); with memory.size the most is 16 TiB",
            ));
        }
        if added > most || !added.is_multiple_of(BLOCK_SIZE) {
            return Err(field(
                "memory.hotplugged_size",
                format!("{added} bytes"),
                format!("use a multiple of {BLOCK_SIZE}, at most hotplug_size ({most})"),
            ));
        }
        if self.hugepage_size == Some(1 << 30) {
            return Err(field(
                "memory.hotplug_size",
                "memory comes and goes in blocks of 2 MiB, which pages of 1 GiB cannot",
                "use huge pages of 2 MiB, or none",
            ));
        }
        Ok(())
    }

    /// Checks what can be checked without touching the host.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let memory = self;
        if memory.size == 0 {
            return Err(field(
                "memory.size",
                "0 bytes",
                "give the size in bytes, e.g. 1073741824",
            ));
        }
        if !memory.size.is_multiple_of(PAGE_SIZE) {
            return Err(field(
                "memory.size",
                format!("{} is not a multiple of 4096", memory.size),
                "round it to whole pages",
            ));
        }
        if memory.size < 16 << 20 {
            return Err(field(
                "memory.size",
                format!("{} bytes are too few for any kernel", memory.size),
                "use at least 16777216 (16 MiB); the unit is bytes",
            ));
        }
        match (memory.hugepages, memory.hugepage_size) {
            (false, Some(_)) => Err(field(
                "memory.hugepage_size",
                "given although memory.hugepages is false",
                "set hugepages or leave hugepage_size out",
            )),
            (true, Some(size)) if size != 2 << 20 && size != 1 << 30 => Err(field(
                "memory.hugepage_size",
                format!("{size} bytes"),
                "use 2097152 or 1073741824",
            )),
            (true, size) if !memory.size.is_multiple_of(size.unwrap_or(2 << 20)) => Err(field(
                "memory.size",
                format!("{} is not a multiple of the huge page size", memory.size),
                "round it to whole huge pages",
            )),
            _ => self.validate_hotplug(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::VmConfig;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn parse(memory: &Value) -> Result<VmConfig, ConfigError> {
        let config = json!({"payload": {"kernel": "vmlinux"}, "memory": memory});
        VmConfig::from_json(config.to_string().as_bytes())
    }

    fn growing() -> MemoryConfig {
        let memory = json!({
            "size": 256 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 512 * MIB, "hotplugged_size": 64 * MIB,
        });
        parse(&memory).expect("a config").memory
    }

    #[test]
    fn a_region_for_more_memory_follows_the_ram() {
        let memory = growing();
        assert_eq!(memory.wanted(), 320 * MIB);
        let ranges = memory.ranges().expect("valid sizes");
        let ranges: Vec<_> = ranges.iter().map(|range| (range.gpa, range.len)).collect();
        assert_eq!(ranges, [(0, 256 * MIB), (1 << 32, 512 * MIB)]);
        // Without it nothing is as it was not before.
        for memory in [
            json!({"size": 256 * MIB}),
            json!({"size": 256 * MIB, "hotplug_method": "Acpi", "hotplug_size": 0, "hotplugged_size": null}),
            json!({"size": 256 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": null}),
            json!({"size": 256 * MIB, "hotplug_method": null}),
        ] {
            let memory = parse(&memory).expect("a config").memory;
            assert_eq!(memory.ranges().expect("a size").len(), 1);
            assert_eq!((memory.hotplug_size, memory.hotplugged_size), (None, None));
        }
        let text = serde_json::to_string(&MemoryConfig::default()).expect("serialises");
        assert!(!text.contains("hotplug"), "older builds refuse it: {text}");
        let text = serde_json::to_value(growing()).expect("serialises");
        assert_eq!(parse(&text).expect("its own output").memory, growing());
    }

    #[test]
    fn sizes_that_cannot_work_are_refused_by_name() {
        let with = |method: &str, size: u64, added: u64| {
            json!({
                "size": 256 * MIB, "hotplug_method": method, "hotplug_size": size, "hotplugged_size": added,
            })
        };
        for (name, fix, memory) in [
            (
                "memory.hotplug_method",
                "VirtioMem",
                with("Acpi", 512 * MIB, 0),
            ),
            (
                "memory.hotplug_method",
                "VirtioMem",
                json!({"size": 256 * MIB, "hotplug_size": 512 * MIB}),
            ),
            (
                "memory.hotplug_size",
                "128 MiB",
                with("VirtioMem", 64 * MIB, 0),
            ),
            (
                "memory.hotplug_size",
                "16 TiB",
                with("VirtioMem", 1 << 44, 0),
            ),
            (
                "memory.hotplugged_size",
                "536870912",
                with("VirtioMem", 512 * MIB, 514 * MIB),
            ),
            (
                "memory.hotplugged_size",
                "2097152",
                with("VirtioMem", 512 * MIB, MIB),
            ),
            (
                "memory.hotplugged_size",
                "hotplug_size",
                with("VirtioMem", 0, 2 * MIB),
            ),
            (
                "memory.hotplug_size",
                "2 MiB",
                json!({
                    "size": 1u64 << 30, "hugepages": true, "hugepage_size": 1u64 << 30,
                    "hotplug_method": "VirtioMem", "hotplug_size": 1u64 << 30,
                }),
            ),
        ] {
            let error = parse(&memory).expect_err(name).to_string();
            assert!(error.starts_with(&format!("{name}: ")), "{memory}: {error}");
            assert!(error.contains(fix), "{memory}: {error}");
        }
        let error = parse(&with("Other", 0, 0))
            .expect_err("no method")
            .to_string();
        assert!(
            error.contains("Acpi") && error.contains("VirtioMem"),
            "{error}"
        );
    }

    #[test]
    fn what_can_be_asked_for_has_bounds_and_steps() {
        let mut memory = growing();
        for bad in [
            0,
            256 * MIB - 1,
            255 * MIB,
            257 * MIB,
            768 * MIB + 1,
            770 * MIB,
            u64::MAX,
        ] {
            let error = memory.want(bad).expect_err("out of bounds").to_string();
            assert!(error.starts_with("desired_ram: "), "{error}");
            assert!(
                error.contains("268435456") && error.contains("805306368"),
                "{error}"
            );
            assert_eq!(memory, growing());
        }
        for (bytes, added) in [
            (256 * MIB, None),
            (258 * MIB, Some(2 * MIB)),
            (768 * MIB, Some(512 * MIB)),
        ] {
            memory.want(bytes).expect("within bounds");
            assert_eq!((memory.hotplugged_size, memory.wanted()), (added, bytes));
        }
        let mut fixed = MemoryConfig::default();
        fixed.want(512 * MIB).expect("what it has");
        let error = fixed.want(1 << 30).expect_err("it cannot").to_string();
        assert!(error.contains("VirtioMem"), "{error}");
    }
}
