//! Segments for compatibility mode: an LDT with data segments of every kind over the data pages, and a 16-bit code segment.

use std::io;

use arch::x86_64::state::{Segment, SpecialRegisters};

use crate::generate::Layout;
use crate::native::{CODE_PAGE, DATA, End, Processor, Registers, Selectors};
use crate::random::Random;

/// `struct user_desc` of Linux, asm/ldt.h.
#[repr(C)]
struct UserDescriptor {
    entry_number: u32,
    base: u32,
    limit: u32,
    /// 32-bit (0), contents (1 and 2), read- or execute-only (3), limit in pages (4), not present (5), usable (6).
    flags: u32,
}

/// What a segment holds: `contents` of `struct user_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data = 0,
    ExpandDown = 1,
    Code = 2,
}

/// A segment of the LDT.
#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: Kind,
    base: u64,
    limit: u32,
    big: bool,
    /// Not writable, or not readable.
    restricted: bool,
}

const fn data(base: u64, limit: u32, big: bool) -> Entry {
    Entry {
        kind: Kind::Data,
        base,
        limit,
        big,
        restricted: false,
    }
}

const fn expand_down(limit: u32, big: bool) -> Entry {
    Entry {
        kind: Kind::ExpandDown,
        ..data(DATA, limit, big)
    }
}

/// The code segment first.
const ENTRIES: [Entry; 9] = [
    Entry {
        kind: Kind::Code,
        ..data(CODE_PAGE as u64, 0xffff, false)
    },
    data(DATA, 0x4fff, true),
    data(DATA, 0x2abb, true),
    data(DATA + 0x800, 0xffff, false),
    data(DATA - 0x7000, 0xfff0, false),
    expand_down(0x1fff, false),
    expand_down(0x17ff, true),
    Entry {
        restricted: true,
        ..data(DATA, 0x4fff, true)
    },
    Entry {
        kind: Kind::Code,
        ..data(DATA, 0x4fff, true)
    },
];

/// Linux's selectors of flat 32-bit code and data.
const FLAT_CODE: u16 = 0x23;
const FLAT_DATA: u16 = 0x2b;

fn segment(selector: u16) -> Segment {
    if selector == FLAT_CODE || selector == FLAT_DATA {
        return Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            access: if selector == FLAT_CODE {
                0xc0fb
            } else {
                0xc0f3
            },
        };
    }
    let entry = ENTRIES[usize::from(selector >> 3)];
    // Accessed, S, DPL 3, present.
    let mut access = 0xf1;
    access |= match entry.kind {
        Kind::Data => 0,
        Kind::ExpandDown => 4,
        Kind::Code => 8,
    };
    if !entry.restricted {
        access |= 2;
    }
    if entry.big {
        access |= 1 << 14;
    }
    Segment {
        selector,
        base: entry.base,
        limit: entry.limit,
        access,
    }
}

/// Gives the process the LDT.
pub(crate) fn install() -> io::Result<()> {
    for (index, entry) in ENTRIES.iter().enumerate() {
        let descriptor = UserDescriptor {
            entry_number: index as u32,
            base: entry.base as u32,
            limit: entry.limit,
            flags: u32::from(entry.big)
                | (entry.kind as u32) << 1
                | u32::from(entry.restricted) << 3
                | 1 << 6,
        };
        const WRITE: libc::c_int = 0x11;
        // SAFETY: the kernel reads one descriptor of the size given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_modify_ldt,
                WRITE,
                &raw const descriptor,
                size_of::<UserDescriptor>(),
            )
        };
        // The raw call returns an int; libc has sign-extended its error.
        if result as i32 != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether 16- and 32-bit code runs here: a NOP of each does.
pub(crate) fn work(processor: &mut Processor, registers: &Registers) -> bool {
    [ldt(0), FLAT_CODE].into_iter().all(|cs| {
        let selectors = Selectors {
            cs,
            ds: FLAT_DATA,
            es: FLAT_DATA,
            ss: FLAT_DATA,
            short: cs != FLAT_CODE,
        };
        let mut registers = registers.clone();
        registers.flags = 0x202;
        processor.run(&[0x90], &mut registers, Some(selectors)) == End::Next
    })
}

/// The selector of an entry of the LDT, for ring 3.
fn ldt(index: u64) -> u16 {
    (index << 3 | 7) as u16
}

/// The segments of one case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen(Selectors);

/// Picks segments.
pub(crate) fn choose(random: &mut Random) -> Chosen {
    let mut pick = |choices: u64, flat_in: u64| {
        if random.one_in(flat_in) {
            FLAT_DATA
        } else {
            ldt(1 + random.below(choices))
        }
    };
    let (ds, es) = (pick(8, 3), pick(8, 3));
    // SS must be writable.
    let ss = pick(6, 2);
    let short = random.one_in(2);
    Chosen(Selectors {
        cs: if short { ldt(0) } else { FLAT_CODE },
        ds,
        es,
        ss,
        short,
    })
}

impl Chosen {
    pub(crate) fn selectors(&self) -> Selectors {
        self.0
    }

    pub(crate) fn special(&self, base: SpecialRegisters) -> SpecialRegisters {
        SpecialRegisters {
            cs: segment(self.0.cs),
            ds: segment(self.0.ds),
            es: segment(self.0.es),
            ss: segment(self.0.ss),
            ..base
        }
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout {
            bits: if self.0.short { 16 } else { 32 },
            cs: segment(self.0.cs).base,
            ds: segment(self.0.ds).base,
            es: segment(self.0.es).base,
            ss: segment(self.0.ss).base,
            gs: 0,
            decoder_options: 0,
        }
    }
}
