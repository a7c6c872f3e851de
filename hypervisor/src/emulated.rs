//! A guest as the instruction emulator sees it, the same for both back ends.
//!
//! ```text
//!   emulator ──► GuestPlatform ── translate ──► emulator::paging, over the guest's page tables in RAM
//!                     ├── read, write ──► RAM (guest_memory: marks what it dirties) or, where there is none, ExitBus
//!                     ├── ports ────────► I/O events (ioevents.rs), then ExitBus
//!                     └── vectors, XSAVE ► ExtendedState: the back end's XSAVE area
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use arch::x86_64::cpuid::{self, Cpuid};

use crate::emulator::paging::{Paging, TableMemory};
use crate::emulator::{
    Access, CpuState, Platform, PlatformError, TranslateFailure, VectorRegisters, Vendor,
    XsaveComponent,
};
use crate::guest_memory::{Memory, Target};
use crate::ioevents::IoEvents;
use crate::xsave::Layout;
use crate::{ExitBus, IoEventAddress, Result};

/// Widest access of a device.
const WIDEST: usize = 8;

/// Instructions that were emulated for the guests of a machine.
#[derive(Default)]
pub(crate) struct Counters {
    completed: AtomicU64,
    failed: AtomicU64,
}

impl Counters {
    /// One more; `completed` unless the emulator could not do it. Answers how many of that kind there have been.
    pub(crate) fn count(&self, completed: bool) -> u64 {
        let counter = if completed {
            &self.completed
        } else {
            &self.failed
        };
        counter.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// For [`crate::Vm::counters`].
    pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            (
                "emulated_instructions",
                self.completed.load(Ordering::Relaxed),
            ),
            ("emulation_failures", self.failed.load(Ordering::Relaxed)),
        ]
    }
}

/// Where a vCPU's extended state is.
pub(crate) trait ExtendedState {
    /// Reads it: an XSAVE area in the standard format.
    fn load(&mut self) -> Result<Vec<u8>>;
    /// Writes it.
    fn store(&mut self, area: &[u8]) -> Result<()>;
    /// XCR0.
    fn xcr0(&mut self) -> Result<u64>;
}

/// Components of an area (SDM vol. 1, section 13.1).
const AVX: u32 = 2;
const ZMM_HI256: u32 = 6;

/// Memory, ports and extended state of the vCPU whose instruction is emulated.
pub(crate) struct GuestPlatform<'a> {
    memory: &'a Memory,
    events: &'a IoEvents,
    bus: &'a dyn ExitBus,
    paging: Paging,
    layout: Layout,
    extended: &'a mut dyn ExtendedState,
    /// The local APIC's page, which is the hypervisor's own.
    apic: Option<u64>,
}

/// IA32_APIC_BASE (SDM vol. 3, section 11.4.4): x2APIC mode, on, and where the page is.
const APIC_X2APIC: u64 = 1 << 10;
const APIC_ON: u64 = 1 << 11;
const APIC_PAGE: u64 = 0x000f_ffff_ffff_f000;

impl<'a> GuestPlatform<'a> {
    /// The platform of an instruction that begins in `state`.
    pub(crate) fn new(
        memory: &'a Memory,
        events: &'a IoEvents,
        bus: &'a dyn ExitBus,
        state: &CpuState,
        cpuid: &Cpuid,
        extended: &'a mut dyn ExtendedState,
    ) -> Self {
        let base = state.special.apic_base;
        Self {
            memory,
            events,
            bus,
            paging: paging(state, cpuid),
            layout: Layout::of(cpuid),
            extended,
            apic: (base & (APIC_ON | APIC_X2APIC) == APIC_ON).then_some(base & APIC_PAGE),
        }
    }

    /// Fails for the local APIC's registers, which only the hypervisor can serve.
    fn not_the_apic(&self, gpa: u64) -> std::result::Result<(), PlatformError> {
        if self.apic == Some(gpa & APIC_PAGE) {
            return Err("it accesses the local APIC, which is the hypervisor's".into());
        }
        Ok(())
    }
}

/// How a vCPU in `state` pages. A guest that was told no width of addresses has 36 bits (SDM vol. 3, section 5.1.4).
fn paging(state: &CpuState, cpuid: &Cpuid) -> Paging {
    let width = cpuid
        .get(0x8000_0008, 0)
        .map_or(36, |entry| entry.eax as u8);
    Paging::new(&state.special, state.general.rflags, width)
}

/// The page tables.
struct Tables<'a>(&'a Memory);

impl TableMemory for Tables<'_> {
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> std::result::Result<(), PlatformError> {
        if !self.0.load(gpa, data) {
            // What a processor reads where nothing answers.
            data.fill(0xff);
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> std::result::Result<bool, PlatformError> {
        match self.0.target(gpa, new.len()) {
            Target::Ram => Ok(self.0.compare_exchange(gpa, expected, new).unwrap_or(false)),
            // Accessed and dirty bits of tables in read-only memory cannot be set, and nobody misses them.
            Target::ReadOnly | Target::Device => Ok(true),
        }
    }
}

impl Platform for GuestPlatform<'_> {
    fn translate(
        &mut self,
        gva: u64,
        access: Access,
    ) -> std::result::Result<u64, TranslateFailure> {
        self.paging.translate(&mut Tables(self.memory), gva, access)
    }

    fn read(&mut self, gpa: u64, data: &mut [u8]) -> std::result::Result<(), PlatformError> {
        if !self.memory.load(gpa, data) {
            self.not_the_apic(gpa)?;
            for (at, part) in (gpa..).step_by(WIDEST).zip(data.chunks_mut(WIDEST)) {
                part.fill(0xff);
                self.bus.mmio_read(at, part);
            }
        }
        Ok(())
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> std::result::Result<(), PlatformError> {
        if !self.memory.store(gpa, data) {
            self.not_the_apic(gpa)?;
            for (at, part) in (gpa..).step_by(WIDEST).zip(data.chunks(WIDEST)) {
                if !self.events.write(IoEventAddress::Mmio(at), part) {
                    self.bus.mmio_write(at, part);
                }
            }
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> std::result::Result<bool, PlatformError> {
        if self.memory.target(gpa, new.len()) != Target::Ram {
            self.write(gpa, new)?;
            return Ok(true);
        }
        if let Some(done) = self.memory.compare_exchange(gpa, expected, new) {
            return Ok(done);
        }
        // Unaligned: the processor would lock the bus, which a process cannot.
        let mut here = [0; 16];
        let Some(here) = here.get_mut(..new.len()) else {
            return Ok(false);
        };
        self.memory.load(gpa, here);
        Ok(here == expected && self.memory.store(gpa, new))
    }

    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> std::result::Result<(), PlatformError> {
        data.fill(0xff);
        self.bus.pio_read(port, data);
        Ok(())
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> std::result::Result<(), PlatformError> {
        if !self.events.write(IoEventAddress::Pio(port), data) {
            self.bus.pio_write(port, data);
        }
        Ok(())
    }

    fn vectors(&mut self) -> std::result::Result<VectorRegisters, PlatformError> {
        let avx = self.layout.component(AVX).is_some();
        VectorRegisters::from_xsave_area(&self.extended.load()?, avx).ok_or_else(too_short)
    }

    fn set_vectors(&mut self, vectors: &VectorRegisters) -> std::result::Result<(), PlatformError> {
        let zmm_upper = self.layout.component(ZMM_HI256);
        let mut area = self.extended.load()?;
        vectors
            .to_xsave_area(&mut area, zmm_upper.map(|place| place.offset as usize))
            .ok_or_else(too_short)?;
        Ok(self.extended.store(&area)?)
    }

    fn xcr0(&mut self) -> std::result::Result<u64, PlatformError> {
        Ok(self.extended.xcr0()?)
    }

    fn xsave_area(&mut self) -> std::result::Result<Option<Vec<u8>>, PlatformError> {
        Ok(Some(self.extended.load()?))
    }

    fn set_xsave_area(&mut self, area: &[u8]) -> std::result::Result<(), PlatformError> {
        Ok(self.extended.store(area)?)
    }

    fn xsave_component(&mut self, index: u32) -> Option<XsaveComponent> {
        self.layout.component(index)
    }
}

fn too_short() -> PlatformError {
    "the XSAVE area is too short for its registers".into()
}

/// Whose processor the guest believes to have.
pub(crate) fn vendor(cpuid: &Cpuid) -> Vendor {
    match cpuid.vendor() {
        cpuid::Vendor::Amd => Vendor::Amd,
        cpuid::Vendor::Intel => Vendor::Intel,
    }
}
