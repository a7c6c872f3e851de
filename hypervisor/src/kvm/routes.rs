//! The GSI routing table in KVM's form.

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
};

use crate::{Error, GsiRoute, Result};

/// Every route is an MSI: with a split irqchip KVM has no pins of its own to route to.
///
/// KVM also learns from the routes of the IOAPIC's GSIs which vectors are level-triggered, and so whose end of
/// interrupt it must report.
pub(crate) fn to_kvm(routes: &[GsiRoute]) -> Result<KvmIrqRouting> {
    let entries: Vec<_> = routes
        .iter()
        .map(|route| kvm_irq_routing_entry {
            gsi: route.gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: route.msi.address as u32,
                    address_hi: (route.msi.address >> 32) as u32,
                    data: route.msi.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        })
        .collect();
    KvmIrqRouting::from_entries(&entries).map_err(|_| {
        Error::Invalid(format!(
            "{} interrupt routes are more than the {KVM_MAX_IRQ_ROUTES} that KVM takes",
            routes.len()
        ))
    })
}
