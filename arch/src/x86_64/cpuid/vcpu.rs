//! The fields of CPUID that tell one vCPU from another, and how vCPUs share cores and caches.

use super::{Cpuid, CpuidEntry, Vendor, bit};
use crate::x86_64::topology::Topology;

/// Level types of leaf 0xb (SDM vol. 2A, CPUID, table 3-8; APM vol. 3, appendix E.3.10).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Highest cache level that the threads of a core share among themselves only.
const LAST_CORE_CACHE: u32 = 2;

/// What CPUID shows vCPU `id` of a machine whose vCPUs all have `base` and are arranged as `topology`.
///
/// Only ids, counts and sharing change; features do not. Leaves that the base's own maxima leave out are not added.
pub fn for_vcpu(base: &Cpuid, topology: &Topology, id: u32) -> Cpuid {
    let mut cpuid = base.clone();
    identity(&mut cpuid, topology, id);
    for subleaf in caches(&mut cpuid, 4) {
        let cores = topology.cores_per_package().next_power_of_two() - 1;
        subleaf.eax = set_field(subleaf.eax, 26, 6, cores);
        share_cache(subleaf, topology);
    }
    for leaf in [0xb, 0x1f] {
        if cpuid.max_basic() >= leaf {
            cpuid.replace(leaf, extended_topology(leaf, topology, id));
        }
    }
    if cpuid.vendor() == Vendor::Amd {
        amd(&mut cpuid, topology, id);
    }
    cpuid
}

/// Leaf 1.
fn identity(cpuid: &mut Cpuid, topology: &Topology, id: u32) {
    let Some(leaf) = cpuid.get_mut(1, 0) else {
        return;
    };
    let threads = topology.vcpus_per_package();
    leaf.ebx = set_field(leaf.ebx, 24, 8, id & 0xff);
    // "Maximum number of addressable ids", of which 8 bits are there.
    leaf.ebx = set_field(leaf.ebx, 16, 8, threads.next_power_of_two().min(255));
    // HTT: the count above is valid.
    leaf.edx = set_field(leaf.edx, 28, 1, u32::from(threads > 1));
}

/// The listed subleaves of a cache leaf that describe a cache.
fn caches(cpuid: &mut Cpuid, leaf: u32) -> impl Iterator<Item = &mut CpuidEntry> {
    cpuid
        .entries
        .iter_mut()
        .filter(move |e| e.leaf == leaf && e.eax & 0x1f != 0)
}

/// How many ids share a cache: those of a core up to level 2, those of a package above.
fn share_cache(subleaf: &mut CpuidEntry, topology: &Topology) {
    let level = subleaf.eax >> 5 & 0x7;
    let sharing = if level <= LAST_CORE_CACHE {
        topology.threads_per_core()
    } else {
        topology.vcpus_per_package()
    };
    subleaf.eax = set_field(subleaf.eax, 14, 12, sharing.next_power_of_two() - 1);
}

/// Leaves 0xb and 0x1f: threads, cores, and the level that says there is nothing more.
fn extended_topology(leaf: u32, topology: &Topology, id: u32) -> [CpuidEntry; 3] {
    let level = |subleaf, shift, count, kind: u32| CpuidEntry {
        leaf,
        subleaf: Some(subleaf),
        eax: shift,
        ebx: count,
        ecx: kind << 8 | subleaf,
        edx: id,
    };
    [
        level(
            0,
            topology.thread_bits(),
            topology.threads_per_core(),
            LEVEL_THREAD,
        ),
        level(
            1,
            topology.package_shift(),
            topology.vcpus_per_package(),
            LEVEL_CORE,
        ),
        level(2, 0, 0, 0),
    ]
}

/// AMD's leaves (APM vol. 3, appendix E.4).
fn amd(cpuid: &mut Cpuid, topology: &Topology, id: u32) {
    let threads = topology.vcpus_per_package();
    let mut extensions = false;
    if let Some(leaf) = cpuid.get_mut(0x8000_0001, 0) {
        // CmpLegacy: more than one core in a package.
        leaf.ecx = set_field(leaf.ecx, 1, 1, u32::from(threads > 1));
        extensions = leaf.ecx & bit(22) != 0;
    }
    if let Some(leaf) = cpuid.get_mut(0x8000_0008, 0) {
        leaf.ecx = set_field(leaf.ecx, 0, 8, (threads - 1).min(255));
        leaf.ecx = set_field(leaf.ecx, 12, 4, topology.package_shift().min(15));
    }
    if !extensions {
        return;
    }
    for subleaf in caches(cpuid, 0x8000_001d) {
        share_cache(subleaf, topology);
    }
    if let Some(leaf) = cpuid.get_mut(0x8000_001e, 0) {
        leaf.eax = id;
        leaf.ebx = set_field(leaf.ebx, 0, 8, topology.core_of(id));
        leaf.ebx = set_field(leaf.ebx, 8, 8, topology.threads_per_core() - 1);
        // One node in each package.
        leaf.ecx = topology.package_of(id) & 0xff;
    }
}

/// Replaces `width` bits from `shift` on; a value that is too large becomes the largest there is.
fn set_field(register: u32, shift: u32, width: u32, value: u32) -> u32 {
    let max = (1 << width) - 1;
    (register & !(max << shift)) | value.min(max) << shift
}
