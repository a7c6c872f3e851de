//! A page walker in software, for platforms without a translation service.
//!
//! ```text
//!  CR0.PG = 0          linear = physical
//!  CR4.PAE = 0         CR3 ► PDE ─(PSE: 4 MiB)─► PTE
//!  PAE, not long       PDPTE registers ► PDE ─(2 MiB)─► PTE
//!  long mode           CR3 ► [PML5E ►] PML4E ► PDPTE ─(1 GiB)─► PDE ─(2 MiB)─► PTE
//!
//!  at each level: present? ─no─► #PF P=0      reserved bits clear? ─no─► #PF P=1 RSVD=1
//!  at the leaf:   U/S, R/W with CR0.WP, NX, SMEP, SMAP with RFLAGS.AC ─no─► #PF P=1
//!  then:          set accessed everywhere and dirty at the leaf, atomically; start over if an entry changed
//! ```
//!
//! As in SDM vol. 3, chapter 5. Protection keys and shadow-stack pages are not looked at: a guest that is given them
//! needs the hypervisor's own translation.

use arch::x86_64::state::SpecialRegisters;

use super::cpu::rflags;
use super::error::Exception;
use super::platform::{Access, AccessKind, PlatformError, TranslateFailure};

/// Physical memory, as far as a page walk needs it. Addresses are aligned to the length, which is 4 or 8.
pub trait TableMemory {
    /// Reads a table entry.
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), PlatformError>;

    /// Atomically replaces `expected` by `new`, and says whether memory held `expected`.
    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<bool, PlatformError>;
}

/// What a walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0, of which PG and WP matter.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4, of which PSE, PAE, LA57, SMEP and SMAP matter.
    pub cr4: u64,
    /// EFER, of which LMA and NXE matter.
    pub efer: u64,
    /// RFLAGS.AC, which lifts SMAP for explicit accesses.
    pub ac: bool,
    /// The PDPTE registers of a PAE guest; read from memory at CR3 if not known.
    pub pdptrs: Option<[u64; 4]>,
    /// Physical address bits of the guest (CPUID 8000_0008H EAX bits 7:0); above them bits are reserved.
    pub physical_bits: u8,
    /// The guest has 1 GiB pages (CPUID 8000_0001H EDX bit 26).
    pub gigabyte_pages: bool,
}

/// Bits of CR0, CR4 and EFER (SDM vol. 3, section 5.1.3).
mod bits {
    pub(super) const CR0_WP: u64 = 1 << 16;
    pub(super) const CR0_PG: u64 = 1 << 31;
    pub(super) const CR4_PSE: u64 = 1 << 4;
    pub(super) const CR4_PAE: u64 = 1 << 5;
    pub(super) const CR4_LA57: u64 = 1 << 12;
    pub(super) const CR4_SMEP: u64 = 1 << 20;
    pub(super) const CR4_SMAP: u64 = 1 << 21;
    pub(super) const EFER_LMA: u64 = 1 << 10;
    pub(super) const EFER_NXE: u64 = 1 << 11;
}

/// Bits of a table entry (SDM vol. 3, tables 5-4 to 5-20).
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const LARGE: u64 = 1 << 7;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    /// Bits 51:12.
    pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a page-fault error code (SDM vol. 3, section 5.7).
mod error_code {
    pub(super) const PRESENT: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
}

/// How often a walk starts over because another vCPU changed an entry under it.
const ATTEMPTS: u32 = 64;

/// The page tables changed under every attempt of a walk.
#[derive(Debug, thiserror::Error)]
#[error("the page tables for {gva:#x} keep changing")]
pub struct Unsteady {
    /// The linear address.
    pub gva: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// 32-bit entries, two levels.
    Legacy,
    /// 64-bit entries below four PDPTE registers.
    Pae,
    /// 64-bit entries, four or five levels.
    Long,
}

/// An entry that a walk went through.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    value: u64,
}

/// What a walk found.
struct Walk {
    used: [Used; 5],
    count: usize,
    /// Bits of linear address that the page covers.
    shift: u32,
    base: u64,
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Paging {
    /// The paging of a vCPU, on a guest with 1 GiB pages.
    pub fn new(special: &SpecialRegisters, rflags: u64, physical_bits: u8) -> Self {
        Self {
            cr0: special.cr0,
            cr3: special.cr3,
            cr4: special.cr4,
            efer: special.efer,
            ac: rflags & rflags::AC != 0,
            pdptrs: special.pdptrs,
            physical_bits,
            gigabyte_pages: true,
        }
    }

    /// Translates a linear address, checks the access and sets accessed and dirty bits.
    ///
    /// # Errors
    ///
    /// #PF, an error of `memory`, or [`Unsteady`].
    pub fn translate(
        &self,
        memory: &mut dyn TableMemory,
        gva: u64,
        access: Access,
    ) -> Result<u64, TranslateFailure> {
        if self.cr0 & bits::CR0_PG == 0 {
            return Ok(gva & 0xffff_ffff);
        }
        for _ in 0..ATTEMPTS {
            let walk = self.walk(memory, gva, access)?;
            if !self.permits(&walk, access) {
                return Err(self.fault(gva, access, error_code::PRESENT));
            }
            let marked = self
                .mark(memory, &walk, access.kind == AccessKind::Write)
                .map_err(TranslateFailure::Platform)?;
            if marked {
                let offset = gva & ((1 << walk.shift) - 1);
                return Ok(walk.base & !((1 << walk.shift) - 1) | offset);
            }
        }
        Err(TranslateFailure::Platform(Box::new(Unsteady { gva })))
    }

    fn format(&self) -> Format {
        if self.cr4 & bits::CR4_PAE == 0 {
            Format::Legacy
        } else if self.efer & bits::EFER_LMA == 0 {
            Format::Pae
        } else {
            Format::Long
        }
    }

    fn walk(
        &self,
        memory: &mut dyn TableMemory,
        gva: u64,
        access: Access,
    ) -> Result<Walk, TranslateFailure> {
        let format = self.format();
        let (mut table, levels) = match format {
            Format::Legacy => (self.cr3 & 0xffff_f000, 2),
            Format::Pae => (self.directory(memory, gva, access)?, 2),
            Format::Long if self.cr4 & bits::CR4_LA57 != 0 => (self.cr3 & entry::ADDRESS, 5),
            Format::Long => (self.cr3 & entry::ADDRESS, 4),
        };
        let (index_bits, entry_bytes) = match format {
            Format::Legacy => (10, 4),
            _ => (9, 8),
        };
        let mut walk = Walk {
            used: [Used::default(); 5],
            count: 0,
            shift: 12,
            base: 0,
            writable: true,
            user: true,
            no_execute: false,
        };
        for level in (1..=levels).rev() {
            let shift = 12 + index_bits * (level - 1);
            let index = gva >> shift & ((1 << index_bits) - 1);
            let gpa = table + index * entry_bytes;
            let value = read_entry(memory, gpa, entry_bytes)?;
            if value & entry::PRESENT == 0 {
                return Err(self.fault(gva, access, 0));
            }
            let large = level > 1 && value & entry::LARGE != 0 && self.may_be_large(level);
            if value & self.reserved(format, level, large, value) != 0 {
                let code = error_code::PRESENT | error_code::RESERVED;
                return Err(self.fault(gva, access, code));
            }
            if let Some(used) = walk.used.get_mut(walk.count) {
                *used = Used { gpa, value };
                walk.count += 1;
            }
            walk.writable &= value & entry::WRITABLE != 0;
            walk.user &= value & entry::USER != 0;
            walk.no_execute |= value & entry::NO_EXECUTE != 0;
            if large || level == 1 {
                walk.shift = shift;
                walk.base = self.page_base(format, large, value);
                break;
            }
            table = match format {
                Format::Legacy => value & 0xffff_f000,
                _ => value & entry::ADDRESS,
            };
        }
        Ok(walk)
    }

    /// The page directory that a PDPTE names.
    fn directory(
        &self,
        memory: &mut dyn TableMemory,
        gva: u64,
        access: Access,
    ) -> Result<u64, TranslateFailure> {
        let index = gva >> 30 & 3;
        let value = match self.pdptrs {
            Some(pdptrs) => pdptrs[index as usize & 3],
            None => read_entry(memory, (self.cr3 & 0xffff_ffe0) + index * 8, 8)?,
        };
        if value & entry::PRESENT == 0 {
            return Err(self.fault(gva, access, 0));
        }
        // Reserved bits of a PDPTE were checked when CR3 was loaded.
        Ok(value & entry::ADDRESS)
    }

    fn may_be_large(&self, level: u32) -> bool {
        match (self.format(), level) {
            (Format::Legacy, 2) => self.cr4 & bits::CR4_PSE != 0,
            (_, 2) => true,
            (Format::Long, 3) => self.gigabyte_pages,
            _ => false,
        }
    }

    /// Bits that must be zero in an entry.
    fn reserved(&self, format: Format, level: u32, large: bool, value: u64) -> u64 {
        let width = u32::from(self.physical_bits.clamp(32, 52));
        if format == Format::Legacy {
            // PSE-36 (SDM vol. 3, table 5-4): bits 20:13 are address bits 39:32, of which not all exist.
            if !large {
                return 0;
            }
            let existing = width.min(40) - 32;
            return 1 << 21 | (0x1f_e000 & !(((1u64 << existing) - 1) << 13));
        }
        let mut reserved = entry::ADDRESS & !((1u64 << width) - 1);
        if format == Format::Pae {
            // Bits 62:52 are ignored in long mode only.
            reserved |= 0x7ff << 52;
        }
        if self.efer & bits::EFER_NXE == 0 {
            reserved |= entry::NO_EXECUTE;
        }
        if large {
            // Bit 12 is PAT; from 13 up to the page's size nothing.
            reserved |= ((1 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
        } else if level > 1 && value & entry::LARGE != 0 {
            reserved |= entry::LARGE;
        }
        reserved
    }

    fn page_base(&self, format: Format, large: bool, value: u64) -> u64 {
        match (format, large) {
            (Format::Legacy, true) => value & 0xffc0_0000 | (value >> 13 & 0xff) << 32,
            (Format::Legacy, false) => value & 0xffff_f000,
            _ => value & entry::ADDRESS,
        }
    }

    fn permits(&self, walk: &Walk, access: Access) -> bool {
        if access.user && !walk.user {
            return false;
        }
        let supervisor_on_user = !access.user && walk.user;
        match access.kind {
            AccessKind::Execute => {
                let smep = self.cr4 & bits::CR4_SMEP != 0;
                !(walk.no_execute || supervisor_on_user && smep)
            }
            kind => {
                let smap = self.cr4 & bits::CR4_SMAP != 0 && (access.implicit || !self.ac);
                if supervisor_on_user && smap {
                    return false;
                }
                let protected = access.user || self.cr0 & bits::CR0_WP != 0;
                kind == AccessKind::Read || walk.writable || !protected
            }
        }
    }

    /// Sets accessed and dirty bits; `false` if an entry changed meanwhile.
    fn mark(
        &self,
        memory: &mut dyn TableMemory,
        walk: &Walk,
        write: bool,
    ) -> Result<bool, PlatformError> {
        let bytes = match self.format() {
            Format::Legacy => 4,
            _ => 8,
        };
        for (index, used) in walk.used.iter().take(walk.count).enumerate() {
            let leaf = index + 1 == walk.count;
            let mut wanted = entry::ACCESSED;
            if leaf && write {
                wanted |= entry::DIRTY;
            }
            if used.value & wanted == wanted {
                continue;
            }
            let (old, new) = (
                used.value.to_le_bytes(),
                (used.value | wanted).to_le_bytes(),
            );
            let (old, _) = old.split_at(bytes);
            let (new, _) = new.split_at(bytes);
            if !memory.compare_exchange(used.gpa, old, new)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn fault(&self, gva: u64, access: Access, reason: u32) -> TranslateFailure {
        let mut code = reason;
        if access.user {
            code |= error_code::USER;
        }
        match access.kind {
            AccessKind::Read => {}
            AccessKind::Write => code |= error_code::WRITE,
            AccessKind::Execute => {
                let no_execute = self.cr4 & bits::CR4_PAE != 0 && self.efer & bits::EFER_NXE != 0;
                if no_execute || self.cr4 & bits::CR4_SMEP != 0 {
                    code |= error_code::FETCH;
                }
            }
        }
        TranslateFailure::Exception(Exception::page_fault(code, gva))
    }
}

fn read_entry(memory: &mut dyn TableMemory, gpa: u64, bytes: u64) -> Result<u64, TranslateFailure> {
    let mut value = [0; 8];
    let (data, _) = value.split_at_mut(bytes as usize);
    memory.read(gpa, data).map_err(TranslateFailure::Platform)?;
    Ok(u64::from_le_bytes(value))
}
