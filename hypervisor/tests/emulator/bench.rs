//! A vCPU on a bench: a mode, registers, memory, one instruction, and what it did.

use arch::x86_64::state::{DescriptorTable, GeneralRegisters, Segment, SpecialRegisters};
use hypervisor::emulator::{CpuState, Exception, Options, Outcome, emulate};

use crate::flat::{Flat, Page, Seen};
use crate::host::user_mode;

/// Where the pages are: linear and physical.
pub(crate) const BASE: u64 = 0x1_0000;
/// RIP of the instruction.
pub(crate) const RIP: u64 = 0x100;

/// The vCPU and its platform.
pub(crate) struct Bench {
    pub(crate) state: CpuState,
    pub(crate) platform: Flat,
    pub(crate) options: Options,
}

fn segment(selector: u16, base: u64, limit: u32, access: u32) -> Segment {
    Segment {
        selector,
        base,
        limit,
        access,
    }
}

impl Bench {
    fn new(special: SpecialRegisters) -> Self {
        let mut platform = Flat::new(BASE, &[Page::ReadWrite; 32]);
        platform.log = Some(Vec::new());
        Self {
            state: CpuState {
                general: GeneralRegisters {
                    rip: RIP,
                    rflags: 2,
                    rsp: 0x800,
                    ..GeneralRegisters::default()
                },
                special,
                interrupt_shadow: 0,
            },
            platform,
            options: Options::default(),
        }
    }

    /// Real mode: CS 1000H, DS 1000H, ES 2000H, SS 1800H.
    pub(crate) fn real() -> Self {
        let data = |selector: u16| segment(selector, u64::from(selector) << 4, 0xffff, 0x93);
        Self::new(SpecialRegisters {
            cs: data(0x1000),
            ds: data(0x1000),
            es: data(0x2000),
            ss: data(0x1800),
            fs: data(0x1000),
            gs: data(0x1000),
            cr0: 0x10,
            ..SpecialRegisters::default()
        })
    }

    /// Protected mode, ring 0, 32-bit: flat CS and SS, DS at `BASE` with 16 pages.
    pub(crate) fn protected() -> Self {
        Self::new(SpecialRegisters {
            cs: segment(8, 0, u32::MAX, 0xc09b),
            ds: segment(0x10, BASE, 0xffff, 0x4093),
            es: segment(0x10, BASE, 0xffff, 0x4093),
            ss: segment(0x10, BASE, 0xffff, 0x4093),
            fs: segment(0, 0, 0, 1 << 16),
            gs: segment(0, 0, 0, 1 << 16),
            ldt: segment(0, 0, 0, 1 << 16),
            // The GDT in the last page.
            gdt: DescriptorTable {
                base: BASE + 31 * 4096,
                limit: 0x7f,
            },
            cr0: 0x11,
            ..SpecialRegisters::default()
        })
    }

    /// The same in ring 3, with alignment checks enabled in CR0.
    pub(crate) fn protected_user() -> Self {
        let mut bench = Self::protected();
        let special = &mut bench.state.special;
        special.cs = segment(0x1b, 0, u32::MAX, 0xc0fb);
        special.ss.access |= 0x60;
        special.cr0 |= 1 << 18;
        bench
    }

    /// Virtual-8086 mode with IOPL 0.
    pub(crate) fn virtual_8086() -> Self {
        let mut bench = Self::real();
        let special = &mut bench.state.special;
        special.cr0 = 0x11;
        for segment in [
            &mut special.cs,
            &mut special.ds,
            &mut special.es,
            &mut special.ss,
        ] {
            segment.access = 0xf3;
        }
        bench.state.general.rflags |= 1 << 17;
        bench
    }

    /// 64-bit mode, ring 0; RSP on the pages.
    pub(crate) fn long() -> Self {
        let mut special = user_mode(0);
        special.cs.access = 0xa09b;
        special.ss.access = 0xc093;
        let mut bench = Self::new(special);
        bench.state.general.rsp = BASE + 0x800;
        bench.state.special.gdt = DescriptorTable {
            base: BASE + 31 * 4096,
            limit: 0x7f,
        };
        bench
    }

    pub(crate) fn general(&mut self) -> &mut GeneralRegisters {
        &mut self.state.general
    }

    /// Sets memory at a linear address.
    pub(crate) fn poke(&mut self, address: u64, bytes: &[u8]) -> &mut Self {
        let at = (address - BASE) as usize;
        self.platform.memory[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Memory at a linear address, as a number.
    pub(crate) fn peek(&self, address: u64, bytes: usize) -> u64 {
        let at = (address - BASE) as usize;
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.platform.memory[at..at + bytes]);
        u64::from_le_bytes(value)
    }

    /// Emulates `bytes` as the instruction at RIP.
    pub(crate) fn run(&mut self, bytes: &[u8]) -> Outcome {
        self.log().clear();
        emulate(&mut self.platform, &mut self.state, bytes, &self.options)
            .expect("the emulator knows the instruction")
    }

    /// As [`Self::run`], and it must complete with RIP behind it.
    pub(crate) fn complete(&mut self, bytes: &[u8]) -> &mut Self {
        let next = self.state.general.rip + bytes.len() as u64;
        assert_eq!(self.run(bytes), Outcome::Completed, "{bytes:02x?}");
        assert_eq!(self.state.general.rip, next, "{bytes:02x?}");
        self
    }

    /// As [`Self::run`], and it must fault, leaving registers and memory alone.
    pub(crate) fn fault(&mut self, bytes: &[u8]) -> Exception {
        let (state, memory) = (self.state, self.platform.memory.clone());
        let outcome = self.run(bytes);
        let Outcome::Exception(exception) = outcome else {
            panic!("{bytes:02x?}: {outcome:?} instead of an exception");
        };
        assert_eq!(self.state, state, "{bytes:02x?}");
        assert!(
            self.platform.memory == memory,
            "{bytes:02x?}: memory changed"
        );
        exception
    }

    pub(crate) fn log(&mut self) -> &mut Vec<Seen> {
        self.platform.log.as_mut().expect("the bench has a log")
    }
}
