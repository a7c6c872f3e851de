//! Interrupts: requests by hypercall, event descriptors, MSI routes, and the end of level-triggered ones.
//!
//! ```text
//!   KVM's GSI table   0..24    level-triggered vectors, so that KVM exits when the guest ends one (KVM_EXIT_IOAPIC_EOI)
//!                     24..     one entry for each GSI of the client that has an irqfd or a route
//! ```

use std::collections::BTreeMap;

use kvm_bindings::*;
use mshv_bindings::*;

use crate::kvm::Vm;
use crate::status::{self, Status};
use crate::sys::{self, Answer, note};

/// Pins that KVM's split irqchip reserves for an I/O APIC in user space.
pub(crate) const PINS: u32 = 24;
/// The driver's limit (drivers/hv/mshv_root.h, MSHV_MAX_GUEST_IRQS).
pub(crate) const MAX_GSIS: usize = 4096;

/// Bits of an MSI (Intel SDM vol. 3, 11.11).
const MSI_BASE: u32 = 0xfee0_0000;
const LOGICAL: u32 = 1 << 2;
const LEVEL: u32 = 1 << 15;
const ASSERT: u32 = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Msi {
    address: u32,
    address_high: u32,
    data: u32,
}

#[derive(Debug)]
struct Irqfd {
    fd: i32,
    gsi: u32,
    resample: Option<sys::OwnFd>,
}

/// All interrupt sources of a partition.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    routes: BTreeMap<u32, Msi>,
    /// The client's GSI → KVM's.
    slots: BTreeMap<u32, u32>,
    irqfds: Vec<Irqfd>,
    /// Level-triggered messages whose end is watched, the latest last.
    level: Vec<Msi>,
}

impl Interrupts {
    /// HvCallAssertVirtualInterrupt.
    pub(crate) fn assert(
        &mut self,
        vm: &Vm,
        asked: &hv_input_assert_virtual_interrupt,
    ) -> Result<(), Status> {
        // SAFETY: both members of the union are 64 plain bits.
        let control = unsafe { asked.control.as_uint64 };
        let (kind, flags) = (control as u32, control >> 32);
        let (vector, destination) = (asked.vector, asked.dest_addr);
        // Bit 30 is "long mode" in mshv-ioctls.
        if asked.target_vtl != 0
            || asked.rsvd_z0 != 0
            || { asked.rsvd_z1 } != 0
            || flags & !(3 | 1 << 30) != 0
        {
            note!("ASSERT_VIRTUAL_INTERRUPT: reserved fields are not zero");
            return Err(status::InvalidParameter);
        }
        let takes_vector = kind <= hv_interrupt_type_HV_X64_INTERRUPT_TYPE_LOWESTPRIORITY;
        let known = matches!(kind, 0..=2 | 4..=7);
        if !known
            || (takes_vector && !(16..256).contains(&vector))
            || vector > 255
            || destination >> 32 != 0
        {
            note!(
                "ASSERT_VIRTUAL_INTERRUPT: type {kind}, vector {vector:#x}, destination {destination:#x}"
            );
            return Err(status::InvalidParameter);
        }
        let level = flags & 1 != 0 && takes_vector;
        let destination = destination as u32;
        let message = Msi {
            address: MSI_BASE
                | (destination & 0xff) << 12
                | if flags & 2 != 0 { LOGICAL } else { 0 },
            address_high: destination & !0xff,
            data: vector | kind << 8 | ASSERT | if level { LEVEL } else { 0 },
        };
        if level {
            self.watch(vm, message)
                .map_err(|_| status::OperationFailed)?;
        }
        let msi = kvm_msi {
            address_lo: message.address,
            address_hi: message.address_high,
            data: message.data,
            ..Default::default()
        };
        // Nobody listening is no error, as on hardware.
        let _ = vm.signal_msi(&msi);
        Ok(())
    }

    /// Makes sure that the end of a level-triggered interrupt is seen.
    fn watch(&mut self, vm: &Vm, message: Msi) -> Answer<()> {
        if self.level.contains(&message) {
            return Ok(());
        }
        if self.level.len() == PINS as usize {
            self.level.remove(0);
        }
        self.level.push(message);
        self.update(vm)
    }

    /// Hands the whole GSI table to KVM.
    fn update(&self, vm: &Vm) -> Answer<()> {
        let entry = |gsi: u32, message: &Msi| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address,
                address_hi: message.address_high,
                data: message.data,
                ..Default::default()
            };
            entry
        };
        let watched = self
            .level
            .iter()
            .zip(0..PINS)
            .map(|(message, pin)| entry(pin, message));
        let routed = self
            .slots
            .iter()
            .filter_map(|(gsi, slot)| Some(entry(*slot, self.routes.get(gsi)?)));
        vm.set_routing(&watched.chain(routed).collect::<Vec<_>>())
    }

    /// KVM's number for a GSI of the client.
    fn slot(&mut self, gsi: u32) -> u32 {
        let next = PINS + self.slots.len() as u32;
        *self.slots.entry(gsi).or_insert(next)
    }

    /// MSHV_SET_MSI_ROUTING, with the checks of `mshv_update_routing_table`.
    pub(crate) fn set_msi_routing(
        &mut self,
        vm: &Vm,
        entries: &[mshv_user_irq_entry],
    ) -> Answer<()> {
        let mut routes = BTreeMap::new();
        for entry in entries {
            let message = Msi {
                address: entry.address_lo,
                address_high: entry.address_hi,
                data: entry.data,
            };
            let wrong = entry.gsi as usize >= MAX_GSIS || entry.address_hi != 0;
            if wrong || routes.insert(entry.gsi, message).is_some() {
                note!("SET_MSI_ROUTING: GSI out of range or twice, or a high address: {entry:x?}");
                return Err(libc::EINVAL);
            }
        }
        self.routes = routes;
        for entry in entries {
            self.slot(entry.gsi);
        }
        let level: Vec<Msi> = self
            .routes
            .values()
            .copied()
            .filter(|message| message.data & LEVEL != 0)
            .collect();
        for message in level {
            self.watch(vm, message)?;
        }
        self.update(vm)
    }

    /// MSHV_IRQFD, with the checks of `mshv_set_unset_irqfd`.
    pub(crate) fn irqfd(&mut self, vm: &Vm, asked: &mshv_user_irqfd) -> Answer<()> {
        if asked.flags >> MSHV_IRQFD_BIT_COUNT != 0 {
            note!("IRQFD: unknown flags {:#x}", asked.flags);
            return Err(libc::EINVAL);
        }
        let slot = self.slot(asked.gsi);
        let request = |flags| kvm_irqfd {
            fd: asked.fd as u32,
            gsi: slot,
            flags,
            ..Default::default()
        };
        if asked.flags >> MSHV_IRQFD_BIT_DEASSIGN & 1 != 0 {
            self.irqfds
                .retain(|irqfd| (irqfd.fd, irqfd.gsi) != (asked.fd, asked.gsi));
            return vm.irqfd(&request(KVM_IRQFD_FLAG_DEASSIGN));
        }
        let mut resample = None;
        if asked.flags >> MSHV_IRQFD_BIT_RESAMPLE & 1 != 0 {
            if self
                .routes
                .get(&asked.gsi)
                .is_none_or(|message| message.data & LEVEL == 0)
            {
                note!("IRQFD: a resample descriptor needs a level-triggered route");
                return Err(libc::EINVAL);
            }
            // The descriptor is the client's; ours lives as long as the irqfd, as the kernel's reference does.
            // SAFETY: F_DUPFD_CLOEXEC touches no memory.
            let copy = unsafe { libc::fcntl(asked.resamplefd, libc::F_DUPFD_CLOEXEC, 0) };
            if copy < 0 {
                return Err(libc::EBADF);
            }
            resample = Some(sys::OwnFd(copy));
        }
        vm.irqfd(&request(0))?;
        self.irqfds.push(Irqfd {
            fd: asked.fd,
            gsi: asked.gsi,
            resample,
        });
        Ok(())
    }

    /// An end of interrupt. The driver looks for a resampler by the *vector* (`mshv_intercept_isr` passes it to
    /// `mshv_notify_acked_gsi`), so only a GSI that equals its vector is served; all else goes to the client.
    pub(crate) fn acknowledge(&self, vector: u8) -> bool {
        let mut served = false;
        for irqfd in self
            .irqfds
            .iter()
            .filter(|irqfd| irqfd.gsi == u32::from(vector))
        {
            if let Some(resample) = &irqfd.resample {
                let one = 1u64;
                // SAFETY: eight bytes are written to an event descriptor.
                unsafe { libc::write(resample.0, (&raw const one).cast(), 8) };
                served = true;
            }
        }
        served
    }

    /// MSHV_IOEVENTFD, with the checks of `mshv_set_unset_ioeventfd`; KVM finds collisions and strangers.
    #[expect(
        clippy::unused_self,
        reason = "registrations belong to the partition, though KVM keeps them"
    )]
    pub(crate) fn ioeventfd(&mut self, vm: &Vm, asked: &mshv_user_ioeventfd) -> Answer<()> {
        if asked.flags >> MSHV_IOEVENTFD_BIT_COUNT != 0 || asked.rsvd != [0; 4] {
            note!("IOEVENTFD: unknown flags or reserved bytes: {asked:x?}");
            return Err(libc::EINVAL);
        }
        if asked.flags >> MSHV_IOEVENTFD_BIT_PIO & 1 != 0 {
            note!("IOEVENTFD: ports are not supported");
            return Err(libc::EOPNOTSUPP);
        }
        if !matches!(asked.len, 0 | 1 | 2 | 4 | 8)
            || asked.addr.checked_add(u64::from(asked.len)).is_none()
        {
            note!(
                "IOEVENTFD: length {} or address {:#x}",
                asked.len,
                asked.addr
            );
            return Err(libc::EINVAL);
        }
        let mut flags = 0;
        if asked.flags >> MSHV_IOEVENTFD_BIT_DATAMATCH & 1 != 0 {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        if asked.flags >> MSHV_IOEVENTFD_BIT_DEASSIGN & 1 != 0 {
            flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        }
        vm.ioeventfd(&kvm_ioeventfd {
            datamatch: asked.datamatch,
            addr: asked.addr,
            len: asked.len,
            fd: asked.fd,
            flags,
            ..Default::default()
        })
    }
}
