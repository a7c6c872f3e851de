//! Memory slots as only KVM takes them.

use backend::guest::{Guest, RAM};

use crate::kvm;

/// KVM lets a slot be mapped over itself, which must not end its tracking.
#[test]
fn a_slot_mapped_again_stays_tracked() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&*kvm).expect("a guest");
    let (vm, slot) = (&guest.vm, guest.slot);
    vm.start_dirty_log(slot).expect("start");
    // SAFETY: the guest's own memory, which outlives the machine.
    unsafe { vm.map_memory(slot) }.expect("map again");
    let mut words = vec![0; (RAM / 4096 / 64) as usize];
    vm.fetch_dirty_log(slot, &mut words).expect("still tracked");
}
