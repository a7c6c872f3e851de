//! bzImages (Linux `Documentation/arch/x86/boot.rst`).
//!
//! ```text
//!   0x000 boot sector   0x1f1 setup header   (setup_sects + 1) * 512: 32/64-bit kernel ──► pref_address
//!                                                                     its entry at +0x200
//! ```

use std::io::{Read, Seek};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::{Limits, Segment, Source, check_memory};
use crate::x86_64::boot::error::BootError;
use crate::x86_64::boot::{MemoryMap, PAGE};
use crate::x86_64::layout::{CMDLINE_MAX, HIGH_RAM};

/// Where the file says "HdrS".
pub(super) const MAGIC_OFFSET: u64 = 0x202;
const HEADER_OFFSET: u64 = 0x1f1;
/// The setup header ends at 0x202 plus the byte at 0x201.
const HEADER_END_BASE: u64 = 0x202;
const SECTOR: u64 = 512;
const BOOT_FLAG: u16 = 0xaa55;
/// Boot protocol 2.12, which brought `xloadflags`.
const LEAST_VERSION: u16 = 0x20c;
/// loadflags bit 0.
const LOADED_HIGH: u8 = 1;
/// xloadflags bit 0: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// xloadflags bit 1: kernel, initramfs and command line may be above 4 GiB.
const ENTRY_OFFSET: u64 = 0x200;

/// A bzImage.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct BzImage {
    /// The kernel's setup header, as in the file; what the file does not have is zero.
    pub(in super::super) header: setup_header,
    /// Where the protected-mode kernel goes.
    pub(in super::super) load: u64,
    /// The protected-mode kernel.
    pub(super) payload: Segment,
    /// End of the memory it needs to unpack itself.
    end: u64,
}

impl BzImage {
    /// The 64-bit entry point.
    pub(in super::super) fn entry(&self) -> u64 {
        self.load + ENTRY_OFFSET
    }

    pub(super) fn limits(&self) -> Limits {
        let kernel_cmdline_max = self.header.cmdline_size as usize;
        Limits {
            start: self.load,
            end: self.end,
            // Low RAM is below 4 GiB, so xloadflags' CAN_BE_LOADED_ABOVE_4G does not matter.
            initramfs_max: u64::from(self.header.initrd_addr_max),
            cmdline_max: kernel_cmdline_max.min(CMDLINE_MAX - 1),
        }
    }
}

/// Reads the setup header and decides where the kernel goes.
pub(super) fn parse<K: Read + Seek>(
    file: &mut Source<'_, K>,
    map: &MemoryMap,
) -> Result<BzImage, BootError> {
    let header = read_header(file)?;
    let version = header.version;
    if version < LEAST_VERSION {
        return Err(BootError::BzImageTooOld(version));
    }
    if header.boot_flag != BOOT_FLAG {
        return Err(BootError::BzImageMalformed(
            "the boot sector's signature is missing",
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::BzImageMalformed(
            "it is a zImage, to be loaded low",
        ));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImageNot64Bit);
    }

    // Zero setup sectors mean four, for historical reasons (boot.rst, "setup_sects").
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let file_offset = (setup_sectors + 1) * SECTOR;
    if file.len <= file_offset + ENTRY_OFFSET {
        let what = "the bzImage's protected-mode kernel";
        let end = file_offset + ENTRY_OFFSET + 1;
        return Err(BootError::Truncated {
            what,
            start: file_offset,
            end,
            len: file.len,
        });
    }
    let file_size = file.len - file_offset;
    let load = load_address(&header)?;
    // The kernel unpacks itself within init_size bytes from where it is loaded.
    let needed = file_size.max(u64::from(header.init_size));
    check_memory(map, load, needed)?;
    let payload = Segment {
        file_offset,
        file_size,
        gpa: load,
        memory_size: file_size,
    };
    Ok(BzImage {
        header,
        load,
        payload,
        end: (load + needed).next_multiple_of(PAGE),
    })
}

/// The address the kernel would prefer. A relocatable kernel may be told another one, but unpacks itself no lower than
/// this, so that nothing is gained by choosing one.
fn load_address(header: &setup_header) -> Result<u64, BootError> {
    let (preferred, alignment) = (header.pref_address, u64::from(header.kernel_alignment));
    if header.relocatable_kernel == 0 {
        return Ok(preferred);
    }
    if !alignment.is_power_of_two() {
        return Err(BootError::BzImageMalformed(
            "its kernel_alignment is not a power of two",
        ));
    }
    // At most 4 GiB more than pref_address; what cannot be is saturated and then found outside RAM.
    let start = preferred.max(HIGH_RAM);
    Ok(start
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX))
}

/// Reads only as much as the header says it has: what follows is code.
fn read_header<K: Read + Seek>(file: &mut Source<'_, K>) -> Result<setup_header, BootError> {
    let mut jump = [0u8; 1];
    file.read("the bzImage's setup header", HEADER_END_BASE - 1, &mut jump)?;
    let end = HEADER_END_BASE + u64::from(jump[0]);
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let len = bytes.len().min((end - HEADER_OFFSET) as usize);
    file.read(
        "the bzImage's setup header",
        HEADER_OFFSET,
        &mut bytes[..len],
    )?;
    Ok(header)
}
