//! Message-signalled interrupts and their routes.
//!
//! ```text
//!   address 31:20 = 0xfee   19:12 destination   2 logical     63:40 the destination's upper bits (x2APIC, as KVM has them)
//!   data     7:0 vector     10:8 delivery mode  15 level-triggered
//! ```
//! (SDM vol. 3, section 11.11: message signalled interrupts.)

use mshv_bindings::mshv_user_irq_table;
use mshv_ioctls::{InterruptRequest, VmFd};

use super::call;
use crate::{Error, GsiRoute, Msi, Result};

/// MSHV_MAX_GUEST_IRQS (Linux `drivers/hv/mshv.h`).
const MAX_ROUTES: usize = 4096;

/// HV_X64_INTERRUPT_TYPE_LOWESTPRIORITY; fixed is 0.
const LOWEST_PRIORITY: u32 = 1;

/// The request that delivers a message. `None`: the message is none that a local APIC takes.
pub(crate) fn request(msi: Msi) -> Option<InterruptRequest> {
    let low = msi.address as u32;
    if low >> 20 != 0xfee {
        return None;
    }
    let delivery = msi.data >> 8 & 0b111;
    // Remote read (3) and start-up (6) are no messages. The values of HV_INTERRUPT_TYPE are those of the delivery mode.
    if matches!(delivery, 3 | 6) {
        return None;
    }
    let extended = (msi.address >> 40) << 8;
    Some(InterruptRequest {
        interrupt_type: delivery,
        apic_id: u64::from(low >> 12 & 0xff) | extended,
        vector: msi.data & 0xff,
        level_triggered: msi.data & 1 << 15 != 0,
        logical_destination_mode: low & 1 << 2 != 0,
        long_mode: false,
    })
}

/// Replaces the routing table.
pub(crate) fn set_routes(fd: &VmFd, routes: &[GsiRoute]) -> Result<()> {
    let words = table(routes)?;
    // SAFETY: the words begin with the table's header (8 bytes) and go on with as many entries as it says; the structure has
    // no alignment beyond theirs, and the driver reads header and entries only.
    let table = unsafe { &*words.as_ptr().cast::<mshv_user_irq_table>() };
    fd.set_msi_routing(table)
        .map_err(call("MSHV_SET_MSI_ROUTING"))
}

/// `struct mshv_user_irq_table`: a count, then for each route GSI, address (low, high) and data.
fn table(routes: &[GsiRoute]) -> Result<Vec<u64>> {
    if routes.len() > MAX_ROUTES {
        return Err(Error::Invalid(format!(
            "{} interrupt routes are more than the {MAX_ROUTES} that the driver takes",
            routes.len()
        )));
    }
    let mut words = Vec::with_capacity(1 + 2 * routes.len());
    // The driver refuses a whole table for one message with an upper half, and delivers any other as an interrupt whatever it says. What is
    // none leads nowhere, as with hardware; a guest can write such a thing into the IOAPIC.
    let usable = |route: &&GsiRoute| {
        route.msi.address >> 32 == 0
            && request(route.msi).is_some_and(|request| request.interrupt_type <= LOWEST_PRIORITY)
    };
    words.push(routes.iter().filter(usable).count() as u64);
    for route in routes.iter().filter(usable) {
        let Msi { address, data } = route.msi;
        words.push(u64::from(route.gsi) | address << 32);
        words.push(address >> 32 | u64::from(data) << 32);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_laid_out_as_the_driver_reads_it() {
        use mshv_bindings::mshv_user_irq_entry;
        use std::mem::offset_of;
        assert_eq!(offset_of!(mshv_user_irq_table, entries), 8);
        assert_eq!(size_of::<mshv_user_irq_entry>(), 16);
        assert_eq!(offset_of!(mshv_user_irq_entry, address_lo), 4);
        assert_eq!(offset_of!(mshv_user_irq_entry, address_hi), 8);
        let msi = Msi {
            address: 0xfee0_2000,
            data: 0x44,
        };
        let route = |gsi, msi| GsiRoute { gsi, msi };
        let words = table(&[route(7, msi)]).expect("few");
        assert_eq!(words, [1, 7 | 0xfee0_2000 << 32, 0x44 << 32]);
        let upper = Msi {
            address: 0x1_fee0_2000,
            ..msi
        };
        let nmi = Msi { data: 0x400, ..msi };
        let nothing = Msi::default();
        let some = [
            route(1, upper),
            route(2, nmi),
            route(3, nothing),
            route(7, msi),
        ];
        assert_eq!(table(&some).expect("few"), words);
        assert!(table(&vec![GsiRoute { gsi: 1, msi }; 5000]).is_err());
    }

    #[test]
    fn a_message_is_taken_apart_as_the_manual_has_it() {
        let of = |address, data| request(Msi { address, data });
        let fixed = of(0xfee0_3004, 0xc042).expect("fixed");
        assert_eq!(
            (fixed.interrupt_type, fixed.apic_id, fixed.vector),
            (0, 3, 0x42)
        );
        assert!(fixed.level_triggered && fixed.logical_destination_mode);
        let nmi = of(0xfee0_0000, 0x400).expect("NMI");
        assert_eq!((nmi.interrupt_type, nmi.level_triggered), (4, false));
        let far = of(0x0000_0100_fee0_1000, 0x30).expect("x2APIC");
        assert_eq!(far.apic_id, 0x101);
        assert!(of(0xfee0_0000, 0x300).is_none() && of(0xfee0_0000, 0x600).is_none());
        assert!(of(0xfed0_0000, 0x30).is_none());
    }
}
