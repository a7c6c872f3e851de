//! PCI as far as a driver without firmware needs it: the function, its BARs, its virtio capabilities.
//!
//! ```text
//!   ECAM (ACPI's MCFG, or `ecam=`) ─► bus 0, every slot ─► 1af4:1042 ─► BARs sized, placed if they are not ─► memory, bus master on
//!                                                                        └─► vendor capabilities ─► addresses of the virtio structures
//! ```
//!
//! Specifications: PCI Local Bus 3.0, chapter 6; Virtual I/O Device 1.3, section 4.1.4.

/// Vendor and device of a virtio block device of version 1.
const BLOCK_DEVICE: u32 = 0x1042_1af4;
const SLOTS: u64 = 32;
/// Bytes of ECAM between the functions 0 of two slots.
const SLOT_STEP: u64 = 8 << 12;
const COMMAND: u64 = 0x04;
const BARS: u64 = 0x10;
const BAR_COUNT: usize = 6;
const CAPABILITIES: u64 = 0x34;
/// Memory space, bus master, no INTx.
const ENABLE: u32 = 1 << 1 | 1 << 2 | 1 << 10;
/// Where BARs go that nobody has placed: the upper half of the window below ECAM, in this project and in QEMU's microvm.
const WINDOW: u64 = 0xd000_0000;
const VENDOR_CAPABILITY: u32 = 9;

/// Reads a device register.
///
/// # Safety
/// `at` must be a register of a device, aligned, in the first 4 GiB.
pub unsafe fn read<T: Copy>(at: u64) -> T {
    // SAFETY: the caller's promise; the first 4 GiB are mapped.
    unsafe { (at as *const T).read_volatile() }
}

/// Writes a device register.
///
/// # Safety
/// As [`read`]; the device must not be told to write memory that is in use.
pub unsafe fn write<T: Copy>(at: u64, value: T) {
    // SAFETY: as above.
    unsafe { (at as *mut T).write_volatile(value) };
}

/// Addresses of the structures of a virtio function.
#[derive(Clone, Copy)]
pub struct Function {
    /// Common configuration.
    pub common: u64,
    /// Notifications.
    pub notify: u64,
    /// Bytes between the notification addresses of queue offsets.
    pub notify_step: u64,
    /// Device configuration.
    pub device: u64,
}

struct Config(u64);

impl Config {
    fn read(&self, offset: u64) -> u32 {
        // SAFETY: within the function's page of the ECAM window.
        unsafe { read(self.0 + (offset & 0xffc)) }
    }

    fn write(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { write(self.0 + (offset & 0xffc), value) };
    }

    fn byte(&self, offset: u64) -> u64 {
        u64::from(self.read(offset) >> (8 * (offset & 3)) & 0xff)
    }

    /// Addresses of the memory BARs. One that is at 0 is given an address.
    fn place_bars(&self) -> [u64; BAR_COUNT] {
        let mut addresses = [0; BAR_COUNT];
        let (mut next, mut bar) = (WINDOW, 0);
        while bar < BAR_COUNT {
            let at = BARS + bar as u64 * 4;
            let low = self.read(at);
            self.write(at, u32::MAX);
            let mask = self.read(at);
            self.write(at, low);
            let wide = mask & 0b111 == 0b100;
            if mask != 0 && mask & 1 == 0 {
                let len = u64::from(!(mask & !0xf)) + 1;
                let high = if wide { self.read(at + 4) } else { 0 };
                let mut address = u64::from(low & !0xf) | u64::from(high) << 32;
                if address == 0 {
                    address = next.next_multiple_of(len);
                    next = address + len;
                    self.write(at, address as u32);
                    if wide {
                        self.write(at + 4, 0);
                    }
                }
                addresses[bar] = address;
            }
            bar += 1 + usize::from(wide);
        }
        addresses
    }

    /// The virtio structures; none if one is missing or lies where nothing is mapped.
    fn structures(&self, bars: &[u64; BAR_COUNT]) -> Option<Function> {
        let mut function = Function {
            common: 0,
            notify: 0,
            notify_step: 0,
            device: 0,
        };
        let mut at = self.byte(CAPABILITIES) & !3;
        // A list has 48 entries at most; a loop in it must not hang.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let head = self.read(at);
            if head & 0xff == VENDOR_CAPABILITY {
                let bar = self.byte(at + 4) as usize;
                let address = bars
                    .get(bar)
                    .filter(|&&address| address != 0)
                    .map(|address| address + u64::from(self.read(at + 8)))
                    .filter(|&address| address < 1 << 32);
                // The first one of a kind counts (section 4.1.4).
                match (head >> 24, address) {
                    (1, Some(address)) if function.common == 0 => function.common = address,
                    (2, Some(address)) if function.notify == 0 => {
                        function.notify = address;
                        function.notify_step = u64::from(self.read(at + 16));
                    }
                    (4, Some(address)) if function.device == 0 => function.device = address,
                    _ => {}
                }
            }
            at = u64::from(head >> 8 & 0xfc);
        }
        (function.common != 0 && function.notify != 0 && function.device != 0).then_some(function)
    }
}

/// The first virtio block device on bus 0, ready to be set up.
pub fn find_block_device(ecam: u64) -> Option<Function> {
    let config = (0..SLOTS)
        .map(|slot| Config(ecam + slot * SLOT_STEP))
        .find(|config| config.read(0) == BLOCK_DEVICE)?;
    let bars = config.place_bars();
    // The upper half is the status, whose bits are cleared by ones.
    config.write(COMMAND, config.read(COMMAND) & 0xffff | ENABLE);
    config.structures(&bars)
}
