//! How vCPUs are arranged: threads in cores in packages.
//!
//! ```text
//!   APIC id:  │ package │ core │ thread │        id == index of the vCPU
//!                        └──┬─┘ └──┬──┘
//!                        core_bits thread_bits
//! ```
//!
//! A vCPU's APIC id is its index. Levels below another one therefore have a size that is a power of
//! two: otherwise ids would have gaps.

/// The arrangement of a machine's vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    packages: u32,
    cores: u32,
    threads: u32,
}

/// Why an arrangement is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A level is empty.
    #[error(
        "the CPU topology has a level of size 0; packages, cores and threads must each be at least 1"
    )]
    Empty,
    /// A size is not a power of two although something is above it.
    #[error(
        "{count} {level} per {parent} is not a power of two; APIC ids would have gaps, choose a power of two"
    )]
    NotPowerOfTwo {
        /// What is counted.
        level: &'static str,
        /// What contains it.
        parent: &'static str,
        /// How many there are.
        count: u32,
    },
    /// More vCPUs than fit 32-bit APIC ids comfortably.
    #[error("{0} vCPUs are too many; at most {max} are possible", max = Topology::MAX_VCPUS)]
    TooMany(u64),
}

impl Topology {
    /// Most vCPUs that can be described. Also the bound on what is allocated for them.
    pub const MAX_VCPUS: u32 = 4096;

    /// One package, each vCPU a core with one thread. `vcpus` is taken to be at least 1 and at most
    /// [`Self::MAX_VCPUS`].
    pub const fn flat(vcpus: u32) -> Self {
        let cores = if vcpus == 0 {
            1
        } else if vcpus > Self::MAX_VCPUS {
            Self::MAX_VCPUS
        } else {
            vcpus
        };
        Self {
            packages: 1,
            cores,
            threads: 1,
        }
    }

    /// `packages` of `cores` (each) of `threads` (each).
    pub fn new(packages: u32, cores: u32, threads: u32) -> Result<Self, TopologyError> {
        if packages == 0 || cores == 0 || threads == 0 {
            return Err(TopologyError::Empty);
        }
        let total = u64::from(packages)
            .saturating_mul(u64::from(cores))
            .saturating_mul(u64::from(threads));
        if total > u64::from(Self::MAX_VCPUS) {
            return Err(TopologyError::TooMany(total));
        }
        if !threads.is_power_of_two() {
            let (level, parent) = ("threads", "core");
            return Err(TopologyError::NotPowerOfTwo {
                level,
                parent,
                count: threads,
            });
        }
        if packages > 1 && !cores.is_power_of_two() {
            let (level, parent) = ("cores", "package");
            return Err(TopologyError::NotPowerOfTwo {
                level,
                parent,
                count: cores,
            });
        }
        Ok(Self {
            packages,
            cores,
            threads,
        })
    }

    /// All vCPUs.
    pub const fn vcpus(&self) -> u32 {
        self.packages * self.cores * self.threads
    }

    /// Packages (sockets).
    pub const fn packages(&self) -> u32 {
        self.packages
    }

    /// Cores in a package.
    pub const fn cores_per_package(&self) -> u32 {
        self.cores
    }

    /// Threads in a core.
    pub const fn threads_per_core(&self) -> u32 {
        self.threads
    }

    /// vCPUs in a package.
    pub const fn vcpus_per_package(&self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of the APIC id below the core number.
    pub const fn thread_bits(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of the APIC id below the package number.
    pub const fn package_shift(&self) -> u32 {
        bits(self.vcpus_per_package())
    }

    /// The package of a vCPU.
    pub const fn package_of(&self, id: u32) -> u32 {
        id >> self.package_shift()
    }

    /// The core of a vCPU, within its package.
    pub const fn core_of(&self, id: u32) -> u32 {
        (id & ((1 << self.package_shift()) - 1)) >> self.thread_bits()
    }
}

/// Bits needed to number `count` things.
const fn bits(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_is_one_package_of_cores() {
        for (vcpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (255, 8), (257, 9)] {
            let topology = Topology::flat(vcpus);
            assert_eq!(topology.vcpus(), vcpus);
            assert_eq!(topology.package_shift(), shift, "{vcpus} vCPUs");
            assert_eq!(topology.package_of(vcpus - 1), 0);
            assert_eq!(topology.core_of(vcpus - 1), vcpus - 1);
        }
        assert_eq!(Topology::flat(0).vcpus(), 1);
        assert_eq!(Topology::flat(u32::MAX).vcpus(), Topology::MAX_VCPUS);
    }

    #[test]
    fn levels_share_the_apic_id() {
        let topology = Topology::new(2, 4, 2).expect("a valid topology");
        assert_eq!((topology.thread_bits(), topology.package_shift()), (1, 3));
        let places: Vec<_> = (0..16)
            .map(|id| (topology.package_of(id), topology.core_of(id)))
            .collect();
        assert_eq!(places[0], (0, 0));
        assert_eq!(places[1], (0, 0));
        assert_eq!(places[7], (0, 3));
        assert_eq!(places[8], (1, 0));
        assert_eq!(places[15], (1, 3));
    }

    #[test]
    fn impossible_arrangements_are_refused() {
        assert_eq!(Topology::new(0, 1, 1), Err(TopologyError::Empty));
        assert!(matches!(
            Topology::new(1, 2, 3),
            Err(TopologyError::NotPowerOfTwo { count: 3, .. })
        ));
        assert!(matches!(
            Topology::new(2, 3, 1),
            Err(TopologyError::NotPowerOfTwo { count: 3, .. })
        ));
        assert!(Topology::new(1, 3, 1).is_ok());
        assert!(matches!(
            Topology::new(u32::MAX, u32::MAX, u32::MAX),
            Err(TopologyError::TooMany(_))
        ));
    }
}
