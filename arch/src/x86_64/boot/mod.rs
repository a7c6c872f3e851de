//! How a guest is started: kernel, initramfs and command line into its memory, registers into vCPU 0.
//!
//! ```text
//!                      ┌─ ELF with PVH note ──► pvh:     32-bit entry, RBX = hvm_start_info
//!   kernel::identify ──┤
//!    (by its content)  └─ bzImage ───────────► linux64: 64-bit entry, RSI = zero page, identity map
//!
//!   load(memory, sources) ──► BootPlan ──► apply(state of vCPU 0 after reset)      [firmware's part]
//!                                     └──► msr::apply_boot_values(each other vCPU) [they wait for SIPI]
//! ```
//!
//! What it promises:
//!
//! - A kernel is told by its content, never by its name.
//! - No kernel, initramfs or command line, however malformed, causes a panic, an allocation that its size decides,
//!   or a write outside the guest's RAM or over the boot structures: it is an error that says what is wrong.
//! - Guest memory that is not part of what is loaded is not touched: not made resident, not changed.
//! - Everything lands at the addresses of [`layout`](super::layout).

mod error;
mod kernel;
mod linux64;
mod memory_map;
mod pvh;
mod registers;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemory, ReadVolatile};

pub use self::error::BootError;
use self::kernel::{Image, Kernel};
pub use self::memory_map::{MemoryKind, MemoryMap, MemoryMapEntry};
use super::layout::{ACPI_RESET_PORT, ACPI_RESET_VALUE, CMDLINE, CMDLINE_MAX, RESET_VECTOR};
use super::state::VcpuState;

/// Guest page size.
const PAGE: u64 = 4096;

/// What stands at the reset vector, where a PC has its firmware: 16-bit code that asks for a reset.
///
/// Linux goes there to reboot when ACPI is hardware-reduced and there is no EFI (`machine_real_restart`).
const RESET_CODE: [u8; 9] = {
    let [port_low, port_high] = ACPI_RESET_PORT.to_le_bytes();
    [
        0xb0,
        ACPI_RESET_VALUE, // mov al, value
        0xba,
        port_low,
        port_high, // mov dx, port
        0xee,      // out dx, al
        0xf4,      // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
};

/// What a guest is started from.
#[derive(Debug)]
pub struct BootSources<'a, K> {
    /// The kernel: an ELF file with a PVH note, or a bzImage.
    pub kernel: &'a mut K,
    /// The initial RAM file system, if any.
    pub initramfs: Option<&'a mut File>,
    /// The kernel's command line, without a terminating zero.
    pub cmdline: &'a str,
    /// The guest's RAM: guest-physical address and length of each range, in bytes, page aligned.
    pub ram: &'a [(u64, u64)],
    /// Guest-physical address of the ACPI RSDP; 0 if there are no ACPI tables.
    pub rsdp: u64,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH: 32-bit protected mode without paging.
    Pvh,
    /// Linux's 64-bit boot protocol: long mode with an identity map.
    Linux64,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Linux64 => "Linux 64-bit",
        })
    }
}

/// A loaded guest: what the boot processor must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootPlan {
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Guest-physical address of its first instruction.
    pub entry: u64,
    /// Guest-physical address of what it is handed: `hvm_start_info` or `boot_params`.
    pub boot_info: u64,
    /// First address and end of the memory that the kernel needs to start.
    pub kernel: (u64, u64),
    /// Address and length of the initramfs in bytes.
    pub initramfs: Option<(u64, u64)>,
}

impl BootPlan {
    /// Changes the state of vCPU 0 from what it is after reset to what the kernel expects at its entry. All other
    /// vCPUs stay as reset left them, with [`apply_boot_values`](super::msr::apply_boot_values) applied.
    pub fn apply(&self, state: &mut VcpuState) {
        registers::apply(self, state);
        super::msr::apply_boot_values(state);
    }
}

/// Loads a guest into `mem`. Nothing is undone on an error: the memory is then good for another `load` at most.
///
/// `mem` must cover `sources.ram`. Memory that the kernel takes for zero (`.bss`) is cleared where it is not.
pub fn load<M, K>(mem: &M, sources: BootSources<'_, K>) -> Result<BootPlan, BootError>
where
    M: GuestMemory + ?Sized,
    K: Read + Seek + ReadVolatile,
{
    let map = MemoryMap::new(sources.ram)?;
    check_cmdline(sources.cmdline)?;
    let Kernel { image, limits } = kernel::identify(sources.kernel, &map)?;

    kernel::load(mem, sources.kernel, &image)?;
    let initramfs = match sources.initramfs {
        Some(file) => Some(load_initramfs(
            mem,
            file,
            &map,
            limits.end,
            limits.initramfs_max,
        )?),
        None => None,
    };
    if sources.cmdline.len() > limits.cmdline_max {
        return Err(BootError::CmdlineTooLong {
            len: sources.cmdline.len(),
            max: limits.cmdline_max,
        });
    }
    write_cmdline(mem, sources.cmdline)?;

    let loaded = Loaded {
        rsdp: sources.rsdp,
        initramfs,
    };
    let (protocol, entry, boot_info) = match &image {
        Image::Elf(elf) => (Protocol::Pvh, elf.entry, pvh::write(mem, &map, &loaded)?),
        Image::BzImage(bz) => (
            Protocol::Linux64,
            bz.entry(),
            linux64::write(mem, &map, &loaded, bz)?,
        ),
    };
    write(mem, "the reset vector", RESET_VECTOR, &RESET_CODE)?;
    let gdt = registers::boot_gdt(protocol);
    write(mem, "the boot GDT", super::layout::BOOT_GDT, &gdt)?;
    Ok(BootPlan {
        protocol,
        entry,
        boot_info,
        kernel: (limits.start, limits.end),
        initramfs,
    })
}

/// What is in guest memory besides the kernel.
struct Loaded {
    rsdp: u64,
    initramfs: Option<(u64, u64)>,
}

fn check_cmdline(cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            max: CMDLINE_MAX - 1,
        });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    Ok(())
}

fn write_cmdline<M: GuestMemory + ?Sized>(mem: &M, cmdline: &str) -> Result<(), BootError> {
    let mut bytes = Vec::with_capacity(cmdline.len() + 1);
    bytes.extend_from_slice(cmdline.as_bytes());
    bytes.push(0);
    write(mem, "the command line", CMDLINE, &bytes)
}

/// Puts the initramfs as high in low RAM as the kernel allows, page aligned, above `kernel_end`.
fn load_initramfs<M: GuestMemory + ?Sized>(
    mem: &M,
    file: &mut File,
    map: &MemoryMap,
    kernel_end: u64,
    max: u64,
) -> Result<(u64, u64), BootError> {
    const WHAT: &str = "the initramfs";
    let io = |source| BootError::Read { what: WHAT, source };
    let size = file.seek(SeekFrom::End(0)).map_err(io)?;
    if size == 0 {
        return Err(BootError::InitramfsEmpty);
    }
    let top = map.low_end().min(max.saturating_add(1));
    let room = top.saturating_sub(kernel_end);
    let start = top.checked_sub(size).map(|start| start & !(PAGE - 1));
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        return Err(BootError::InitramfsTooBig { size, room });
    };
    file.rewind().map_err(io)?;
    read_into(mem, WHAT, start, file, size)?;
    Ok((start, size))
}

/// Reads `len` bytes of a file straight into guest memory.
fn read_into<M: GuestMemory + ?Sized, F: ReadVolatile>(
    mem: &M,
    what: &'static str,
    gpa: u64,
    file: &mut F,
    len: u64,
) -> Result<(), BootError> {
    let failed = |source| BootError::Memory { what, gpa, source };
    let count = usize::try_from(len).map_err(|_| BootError::TooBig { what, len })?;
    mem.read_exact_volatile_from(GuestAddress(gpa), file, count)
        .map_err(failed)
}

fn write<M: GuestMemory + ?Sized>(
    mem: &M,
    what: &'static str,
    gpa: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(gpa))
        .map_err(|source| BootError::Memory { what, gpa, source })
}

/// Makes guest memory zero, without touching pages that already are: reading a page of private memory that was
/// never written does not make it resident.
fn clear<M: GuestMemory + ?Sized>(mem: &M, start: u64, len: u64) -> Result<(), BootError> {
    const WHAT: &str = "the kernel's zeroed data";
    const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];
    let mut page = ZEROES;
    let (mut gpa, end) = (start, start.saturating_add(len));
    while gpa < end {
        let next = ((gpa | (PAGE - 1)) + 1).min(end);
        let bytes = &mut page[..(next - gpa) as usize];
        mem.read_slice(bytes, GuestAddress(gpa))
            .map_err(|source| BootError::Memory {
                what: WHAT,
                gpa,
                source,
            })?;
        if *bytes != ZEROES[..bytes.len()] {
            write(mem, WHAT, gpa, &ZEROES[..bytes.len()])?;
        }
        gpa = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
