//! ACPI tables: what a guest's kernel learns about the machine that CPUID does not say.
//!
//! ```text
//!   RSDP ──► XSDT ─┬─► FADT ──► DSDT   hardware-reduced: no PM timer, no SCI, no FACS; sleep, reset and
//!                  │                   event ports instead; devices with their ports and GSIs
//!                  ├─► MADT            local APICs, IOAPIC
//!                  ├─► MCFG            PCI configuration window, when there is PCI
//!                  └─► WDAT            the watchdog, when there is one
//! ```
//!
//! What it promises:
//!
//! - The same [`AcpiConfig`] always gives the same bytes: a guest that moves finds what it has read before.
//! - The tables fit between [`ACPI_TABLES`] and 1 MiB, or there is an error.
//! - They are ACPI 6.5 in layout (`FADT` 6.5), and need no interpreter but the one of the guest.

mod cpus;
mod dsdt;
mod hotplug;
mod madt;
mod wdat;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, mcfg};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::layout::{
    ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT,
    ACPI_TABLES, RESET_VECTOR,
};

const OEM_ID: [u8; 6] = *b"VMM   ";
const OEM_TABLE_ID: [u8; 8] = *b"VMMTABLE";
const OEM_REVISION: u32 = 1;
/// Every table starts at a multiple of this.
const ALIGNMENT: usize = 64;
/// Room for all tables.
const MAX_LEN: usize = (RESET_VECTOR - ACPI_TABLES) as usize;

// FADT IA-PC boot architecture flags (ACPI 6.5, table 5.11).
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1;
const BOOT_ARCH_VGA_NOT_PRESENT: u16 = 1 << 2;

/// What the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// vCPUs that are there at boot; their APIC ids are `0..vcpus`.
    pub vcpus: u32,
    /// vCPUs there may be later; at least `vcpus`.
    pub max_vcpus: u32,
    /// vCPUs can come and go while the guest runs: the DSDT has a processor for each of `max_vcpus`, at most 255.
    pub cpu_hotplug: bool,
    /// PCI configuration window, if there is PCI.
    pub ecam: Option<Ecam>,
    /// The first serial port is there.
    pub serial: bool,
    /// The pvpanic device is there.
    pub pvpanic: bool,
    /// The watchdog is there.
    pub watchdog: bool,
}

/// A PCI segment's configuration window (PCI Firmware Specification 3.3, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address of bus 0, below 4 GiB.
    pub base: u64,
    /// Last bus number; the window has 1 MiB for each bus.
    pub last_bus: u8,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are too long.
    #[error(
        "ACPI tables for {max_vcpus} vCPUs need {len} bytes, {MAX_LEN} are there; configure fewer vCPUs"
    )]
    TooLong {
        /// vCPUs described.
        max_vcpus: u32,
        /// What they would need.
        len: usize,
    },
    /// More vCPUs at boot than ever.
    #[error("{vcpus} vCPUs at boot are more than the maximum of {max_vcpus}; raise the maximum")]
    Vcpus {
        /// At boot.
        vcpus: u32,
        /// Ever.
        max_vcpus: u32,
    },
    /// Guest memory is not there.
    #[error("cannot write the ACPI tables to guest address {ACPI_TABLES:#x}: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Tables, ready to be written to guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Guest-physical address of the RSDP.
    pub rsdp_address: u64,
    /// Guest-physical address of the first byte.
    pub base: u64,
    /// The tables.
    pub bytes: Vec<u8>,
}

impl AcpiTables {
    /// Writes the tables where they belong.
    pub fn write_to<M: GuestMemory + ?Sized>(&self, mem: &M) -> Result<(), AcpiError> {
        Ok(mem.write_slice(&self.bytes, GuestAddress(self.base))?)
    }
}

/// Makes the tables.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    let AcpiConfig {
        vcpus, max_vcpus, ..
    } = *config;
    if vcpus > max_vcpus {
        return Err(AcpiError::Vcpus { vcpus, max_vcpus });
    }
    let least = madt::least_len(max_vcpus);
    if least > MAX_LEN {
        return Err(AcpiError::TooLong {
            max_vcpus,
            len: least,
        });
    }

    let mut area = Area {
        bytes: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)],
    };
    let dsdt = area.add(&table(*b"DSDT", 2, &dsdt::body(config)));
    let mut listed = vec![
        area.add(&fadt(config, dsdt)),
        area.add(&table(*b"APIC", 7, &madt::body(config))),
    ];
    if let Some(ecam) = config.ecam {
        listed.push(area.add(&mcfg(ecam)));
    }
    if config.watchdog {
        listed.push(area.add(&table(*b"WDAT", 1, &wdat::body())));
    }
    let pointers: Vec<u8> = listed.into_iter().flat_map(u64::to_le_bytes).collect();
    let xsdt = area.add(&table(*b"XSDT", 1, &pointers));

    let mut bytes = area.bytes;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if bytes.len() > MAX_LEN {
        return Err(AcpiError::TooLong {
            max_vcpus,
            len: bytes.len(),
        });
    }
    Ok(AcpiTables {
        rsdp_address: ACPI_TABLES,
        base: ACPI_TABLES,
        bytes,
    })
}

/// The tables so far.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        ACPI_TABLES + at as u64
    }
}

/// A table with header, length and checksum.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 36;
    let mut sdt = Sdt::new(
        signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

fn fadt(config: &AcpiConfig, dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    // PwrButton and SlpButton say that there is *no* fixed-hardware button: the power button is a device of the
    // DSDT.
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    // Some readers look at the 32-bit pointer only; the specification wants both alike if both are there.
    fadt.dsdt = (dsdt as u32).into();
    fadt.reset_reg = port(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS_PORT);
    // "CMOS RTC not present" stays clear: there is one. "8042" (bit 1) stays clear too: there is only its reset line,
    // and a guest that is told of a keyboard controller searches for a keyboard (0.9 s in Linux).
    let mut boot_arch = BOOT_ARCH_VGA_NOT_PRESENT;
    if config.serial {
        boot_arch |= BOOT_ARCH_LEGACY_DEVICES;
    }
    fadt.iapc_boot_arch = boot_arch.into();
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

fn mcfg(ecam: Ecam) -> Vec<u8> {
    let mut table = mcfg::MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(ecam.base, 0, 0, ecam.last_bus);
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
