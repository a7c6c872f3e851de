//! The MADT: local APICs and the IOAPIC (ACPI 6.5, section 5.2.12).

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};

use super::AcpiConfig;
use crate::x86_64::layout::{IOAPIC_BASE, LAPIC_BASE};

/// The first id that a local APIC structure cannot hold: 0xff addresses all.
const FIRST_X2APIC_ID: u32 = 255;
/// Length of a local APIC structure.
const LAPIC_LEN: usize = 8;

/// Less than the table for so many vCPUs has.
pub(super) fn least_len(max_vcpus: u32) -> usize {
    (max_vcpus as usize).saturating_mul(LAPIC_LEN)
}

/// All behind the table's header.
pub(super) fn body(config: &AcpiConfig) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(LAPIC_BASE as u32).to_le_bytes());
    // Flags: PCAT_COMPAT clear, there are no 8259s.
    bytes.extend_from_slice(&0u32.to_le_bytes());
    for id in 0..config.max_vcpus {
        let status = if id < config.vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        match u8::try_from(id) {
            Ok(small) if id < FIRST_X2APIC_ID => {
                ProcessorLocalApic::new(small, small, status).to_aml_bytes(&mut bytes);
            }
            _ => bytes.extend_from_slice(&x2apic(id, status)),
        }
    }
    IoApic::new(0, IOAPIC_BASE as u32, 0).to_aml_bytes(&mut bytes);
    bytes.extend_from_slice(&LAPIC_NMI);
    if config.max_vcpus > FIRST_X2APIC_ID {
        bytes.extend_from_slice(&X2APIC_NMI);
    }
    bytes
}

/// Processor local x2APIC structure (table 5.32), for ids that need more than 8 bits.
fn x2apic(id: u32, status: EnabledStatus) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = 9;
    bytes[1] = 16;
    bytes[4..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..12].copy_from_slice(&(status as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&id.to_le_bytes());
    bytes
}

/// Local APIC NMI structure (table 5.27): LINT1 of all processors, polarity and trigger of the bus.
const LAPIC_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
/// Local x2APIC NMI structure (table 5.33), the same for the others.
const X2APIC_NMI: [u8; 12] = [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
