//! Fixed guest-physical addresses and interrupt numbers.
//!
//! ```text
//! 0x0000_0500  boot GDT                     0xc000_0000  end of low RAM, MMIO hole begins: PCI BARs
//! 0x0000_6000  PVH start info               0xe000_0000  PCI ECAM window (when there is PCI)
//! 0x0000_7000  Linux zero page              0xfec0_0000  IOAPIC
//! 0x0000_9000  boot page tables             0xfee0_0000  local APICs
//! 0x0002_0000  kernel command line          0x1_0000_0000  high RAM begins
//! 0x0009_fc00  end of conventional memory
//! 0x000e_0000  ACPI RSDP and tables
//! 0x000f_fff0  reset vector
//! 0x0010_0000  kernel
//! ```

/// Start of the window below 4 GiB that holds no RAM. Mirrors `memory::layout::MMIO_HOLE_START`
/// (the two rooms do not import each other; a test in `vmm` compares them).
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of that window.
pub const MMIO_HOLE_END: u64 = 1 << 32;

/// Boot GDT for the 64-bit Linux protocol and PVH.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` and what it points to.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Boot page tables: PML4, PDPT, PDs.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line, with its terminating zero (Linux x86 COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; the EBDA would follow.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI RSDP; the other tables follow.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where a processor in real mode goes to reset the machine (F000:FFF0), up to 1 MiB.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where the kernel may begin.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Where PCI devices' BARs are.
pub const PCI_MMIO_BASE: u64 = MMIO_HOLE_START;
/// Length of that window.
pub const PCI_MMIO_SIZE: u64 = PCI_ECAM_BASE - PCI_MMIO_BASE;
/// PCI ECAM window, when there is PCI; always kept free.
pub const PCI_ECAM_BASE: u64 = 0xe000_0000;
/// ECAM window size: 256 buses of 1 MiB.
pub const PCI_ECAM_SIZE: u64 = 0x1000_0000;

/// IOAPIC register window.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// IOAPIC register window size.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Number of IOAPIC pins, which are also the first GSIs.
pub const IOAPIC_PINS: u32 = 24;
/// Local APIC register page.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Three pages that an Intel VMX host needs for real mode (KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page for the same purpose (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// i8042 data port; command and status is at +4.
pub const I8042_PORT: u16 = 0x60;
/// CMOS index port; data at +1.
pub const CMOS_PORT: u16 = 0x70;
/// ACPI sleep control register (8 bit), FADT SLEEP_CONTROL_REG.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register (8 bit), FADT SLEEP_STATUS_REG.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register (8 bit), FADT RESET_REG.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// Written to [`ACPI_RESET_PORT`] to reset.
pub const ACPI_RESET_VALUE: u8 = 1;
/// Event flags of the generic event device (8 bit, read clears): bit 0 is the power button, bit 1 are PCI slots, bit 2 are vCPUs.
pub const ACPI_EVENT_PORT: u16 = 0x604;
/// pvpanic (QEMU `docs/specs/pvpanic.rst`).
pub const PVPANIC_PORT: u16 = 0x505;
/// PCI hotplug registers (three of 32 bits, a bit a slot): inserted, leaving (reading clears either), eject.
pub const PCI_HOTPLUG_PORT: u16 = 0x610;
/// First of the watchdog's 16 ports.
pub const WATCHDOG_PORT: u16 = 0x680;
/// Length of one of its counts, in milliseconds.
pub const WATCHDOG_PERIOD_MS: u32 = 100;
/// Fewest counts of its countdown.
pub const WATCHDOG_MIN_COUNT: u32 = 1;
/// Most counts of its countdown.
pub const WATCHDOG_MAX_COUNT: u32 = 0xffff;
/// vCPU hotplug registers (33 of 32 bits), when vCPUs can come and go: four rows of eight with a bit a vCPU (present, inserted, leaving, eject;
/// reading the middle two clears), and the guest's answers.
pub const CPU_HOTPLUG_PORT: u16 = 0x700;
/// Slots of the PCI bus, of which the first is the host bridge's.
pub const PCI_SLOTS: u8 = 32;
/// The generic event device's interrupt (edge).
pub const ACPI_EVENT_IRQ: u32 = 5;
/// SLP_TYP value for S5 (soft off) in the DSDT's `_S5_`.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;
