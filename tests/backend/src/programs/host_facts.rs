//! What a back end says about its host.

use hypervisor::Hypervisor;

use crate::back_ends::BACK_ENDS;
use crate::outcome::{Outcome, ensure, same};

pub(super) fn capabilities(hypervisor: &dyn Hypervisor) -> Outcome {
    let kind = hypervisor.kind();
    ensure!(
        BACK_ENDS.iter().any(|back_end| back_end.kind == kind),
        "{kind:?} is not one of the back ends"
    );
    let can = hypervisor.capabilities();
    ensure!(can.max_vcpus >= 1 && can.max_memory_slots >= 8, "{can:?}");
    ensure!(
        can.manual_dirty_protect || !can.dirty_initially_all_set,
        "{can:?}"
    );
    same!(hypervisor.capabilities(), can, "asked again");
    Ok(())
}

pub(super) fn cpuid_is_sorted_and_whole(hypervisor: &dyn Hypervisor) -> Outcome {
    let cpuid = hypervisor.supported_cpuid()?;
    ensure!(
        cpuid
            .entries
            .windows(2)
            .all(|pair| (pair[0].leaf, pair[0].subleaf) < (pair[1].leaf, pair[1].subleaf)),
        "the entries are not sorted, or one is there twice"
    );
    let leaf1 = cpuid.get(1, 0).copied().unwrap_or_default();
    ensure!(
        leaf1.ecx & 1 << 31 != 0,
        "guests are not told that they are guests"
    );
    // AMX comes with its state or not at all.
    let tile = cpuid.get(7, 0).is_some_and(|leaf| leaf.edx & 1 << 24 != 0);
    let components = cpuid.get(0xd, 0).map_or(0, |leaf| leaf.eax);
    same!(components & 0x6_0000 == 0x6_0000, tile, "AMX tile state");
    Ok(())
}
