//! FXSAVE, XSAVE and their relatives (SDM vol. 1, chapter 13), for platforms that offer the extended state.
//!
//! ```text
//!  Platform::xsave_area ─► Area (standard format)      guest memory
//!                            │  save: components of RFBM ──────► standard or compacted
//!                            │  restore: of RFBM ◄────────────── standard or compacted, else initial
//!                            ▼
//!  Platform::set_xsave_area
//! ```
//!
//! XSAVEOPT and XSAVES save whatever is in use: that it was not modified since the last XRSTOR is not known here.

use iced_x86::{Instruction, Mnemonic};

use super::cpu::{Cpu, SegmentName, control, reg};
use super::error::{Exception, Step, Stop, general_protection, invalid_opcode, vector};
use super::memory::Span;
use super::platform::{AccessKind, XsaveComponent};

/// Bits of XCR0 and of the masks.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

/// The legacy region and its parts (SDM vol. 1, table 10-2).
const LEGACY_BYTES: usize = 512;
const HEADER_BYTES: usize = 64;
/// Where the extended region begins.
const EXTENDED: usize = LEGACY_BYTES + HEADER_BYTES;
/// FCW to FDP, and the stack registers.
const X87_PARTS: [(usize, usize); 2] = [(0, 24), (32, 128)];
/// MXCSR and its mask.
const MXCSR: (usize, usize) = (24, 8);
/// XMM0 to XMM15, and XMM0 to XMM7.
const XMM: (usize, usize) = (160, 256);
const XMM_LOW: (usize, usize) = (160, 128);
/// Initial FCW and MXCSR (SDM vol. 1, section 13.6).
const INITIAL_FCW: u16 = 0x37f;
/// Low byte of the status word, and its bit ES: an unmasked exception is pending.
const STATUS_WORD: usize = 2;
const SUMMARY: u8 = 1 << 7;
const INITIAL_MXCSR: u32 = 0x1f80;

/// The whole extended state, at least legacy region and header.
struct Area {
    data: Vec<u8>,
    /// XSTATE_BV: the components that are not in their initial state.
    in_use: u64,
}

/// Where a component is saved, and where the area has it.
#[derive(Clone, Copy)]
struct Placed {
    index: u32,
    /// Offset in the guest's memory.
    to: usize,
    component: XsaveComponent,
}

/// The extended components of a save or restore, in order.
struct Layout {
    placed: [Option<Placed>; 62],
    /// Bytes in all.
    bytes: usize,
}

impl Area {
    fn get(&self, (at, bytes): (usize, usize)) -> Step<&[u8]> {
        let end = at.checked_add(bytes).ok_or(Stop::Unsupported)?;
        self.data.get(at..end).ok_or(Stop::Unsupported)
    }

    fn get_mut(&mut self, (at, bytes): (usize, usize)) -> Step<&mut [u8]> {
        let end = at.checked_add(bytes).ok_or(Stop::Unsupported)?;
        self.data.get_mut(at..end).ok_or(Stop::Unsupported)
    }

    fn mxcsr(&self) -> Step<u32> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.get((MXCSR.0, 4))?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn set_mxcsr(&mut self, value: u32) -> Step {
        self.get_mut((MXCSR.0, 4))?
            .copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    /// Gives the legacy components that are not in use their initial values; of the XMM registers those in `xmm`.
    fn initialise_legacy(&mut self, xmm: (usize, usize)) -> Step {
        if self.in_use & X87 == 0 {
            for part in X87_PARTS {
                self.get_mut(part)?.fill(0);
            }
            self.get_mut((0, 2))?
                .copy_from_slice(&INITIAL_FCW.to_le_bytes());
        }
        if self.in_use & SSE == 0 {
            self.get_mut(xmm)?.fill(0);
        }
        Ok(())
    }

    /// Notes a component as in use if it is not all zero.
    fn note_use(&mut self, bit: u64, part: (usize, usize)) -> Step {
        if self.get(part)?.iter().any(|byte| *byte != 0) {
            self.in_use |= bit;
        }
        Ok(())
    }
}

fn range(component: XsaveComponent) -> (usize, usize) {
    (component.offset as usize, component.bytes as usize)
}

impl Cpu<'_> {
    /// The extended state, with the initial values of the legacy components that are not in use.
    fn area(&mut self) -> Step<Area> {
        let data = self.platform.xsave_area()?.ok_or(Stop::Unsupported)?;
        let mut area = Area { data, in_use: 0 };
        let mut bits = [0; 8];
        bits.copy_from_slice(area.get((LEGACY_BYTES, 8))?);
        area.in_use = u64::from_le_bytes(bits);
        area.get((0, EXTENDED))?;
        area.initialise_legacy(XMM)?;
        if area.mxcsr()? != INITIAL_MXCSR {
            area.in_use |= SSE;
        }
        Ok(area)
    }

    fn store_area(&mut self, mut area: Area) -> Step {
        if area.mxcsr()? != INITIAL_MXCSR {
            area.in_use |= SSE;
        }
        let bits = area.in_use.to_le_bytes();
        area.get_mut((LEGACY_BYTES, 8))?.copy_from_slice(&bits);
        self.platform.set_xsave_area(&area.data)?;
        Ok(())
    }

    /// Whether FIP and FDP have 64 bits.
    fn has_wide_pointers(instruction: &Instruction) -> bool {
        matches!(
            instruction.mnemonic(),
            Mnemonic::Fxsave64
                | Mnemonic::Fxrstor64
                | Mnemonic::Xsave64
                | Mnemonic::Xsaveopt64
                | Mnemonic::Xsavec64
                | Mnemonic::Xsaves64
                | Mnemonic::Xrstor64
                | Mnemonic::Xrstors64
        )
    }

    /// Cuts FIP and FDP to 32 bits, with selectors of 0, which is what processors save that no longer keep them.
    fn narrow_pointers(instruction: &Instruction, legacy: &mut [u8]) {
        if Self::has_wide_pointers(instruction) {
            return;
        }
        for at in [12, 20] {
            if let Some(upper) = legacy.get_mut(at..at + 4) {
                upper.fill(0);
            }
        }
    }

    /// FXSAVE.
    pub(super) fn fxsave(&mut self, instruction: &Instruction) -> Step {
        self.check_fx()?;
        let (segment, offset) = self.address(instruction)?;
        let span = self.fx_span(segment, offset, AccessKind::Write)?;
        let mut area = self.area()?;
        let bytes = self.fx_bytes();
        let legacy = area.get_mut((0, bytes))?;
        Self::narrow_pointers(instruction, legacy);
        self.write_span(&span.part(0, bytes), legacy)
    }

    /// FXRSTOR.
    pub(super) fn fxrstor(&mut self, instruction: &Instruction) -> Step {
        self.check_fx()?;
        let (segment, offset) = self.address(instruction)?;
        let span = self.fx_span(segment, offset, AccessKind::Read)?;
        let mut area = self.area()?;
        let bytes = self.fx_bytes();
        let mask = {
            let mut mask = [0; 4];
            mask.copy_from_slice(area.get((28, 4))?);
            mask
        };
        let legacy = area.get_mut((0, bytes))?;
        self.read_span(&span.part(0, bytes), legacy)?;
        Self::narrow_pointers(instruction, legacy);
        area.get_mut((28, 4))?.copy_from_slice(&mask);
        self.check_mxcsr(area.mxcsr()?)?;
        area.in_use |= X87 | SSE;
        self.store_area(area)
    }

    /// FXSAVE and FXRSTOR without XMM8 to XMM15 outside 64-bit mode.
    fn fx_bytes(&self) -> usize {
        let (at, bytes) = self.xmm();
        at + bytes
    }

    /// The XMM registers that the mode can reach.
    fn xmm(&self) -> (usize, usize) {
        if self.is_64bit() { XMM } else { XMM_LOW }
    }

    /// The part of a component that the mode can reach: outside 64-bit mode no register above the seventh (SDM vol. 1,
    /// sections 13.5.3 and 13.5.5).
    fn reachable(&self, placed: &Placed) -> (usize, usize) {
        let (at, bytes) = range(placed.component);
        let most = match placed.index {
            _ if self.is_64bit() => bytes,
            // Upper halves of YMM, of ZMM; ZMM16 to ZMM31.
            2 => 8 * 16,
            6 => 8 * 32,
            7 => 0,
            _ => bytes,
        };
        (at, bytes.min(most))
    }

    /// WAIT: an x87 exception that is pending comes now (SDM vol. 2, WAIT/FWAIT; vol. 1, section 8.7.1).
    pub(super) fn wait(&mut self) -> Step {
        let cr0 = self.special.cr0;
        if cr0 & control::CR0_MP != 0 && cr0 & control::CR0_TS != 0 {
            return Err(Exception::fault(vector::NM).into());
        }
        let area = self.platform.xsave_area()?.ok_or(Stop::Unsupported)?;
        if area
            .get(STATUS_WORD)
            .is_none_or(|status| status & SUMMARY == 0)
        {
            return Ok(());
        }
        if cr0 & control::CR0_NE == 0 {
            // It would be reported over a pin to an interrupt controller, which is not there.
            return Err(Stop::Unsupported);
        }
        Err(Exception::fault(vector::MF).into())
    }

    fn check_fx(&self) -> Step {
        if self.special.cr0 & (control::CR0_EM | control::CR0_TS) != 0 {
            return Err(Exception::fault(vector::NM).into());
        }
        Ok(())
    }

    fn fx_span(&mut self, segment: SegmentName, offset: u64, kind: AccessKind) -> Step<Span> {
        self.span_aligned_to(segment, offset, LEGACY_BYTES, 16, kind)
    }

    /// Checks that come first, and the requested-feature bitmap.
    fn check_xsave(&mut self, supervisor: bool) -> Step<u64> {
        if self.special.cr4 & control::CR4_OSXSAVE == 0 {
            return invalid_opcode();
        }
        if self.special.cr0 & control::CR0_TS != 0 {
            return Err(Exception::fault(vector::NM).into());
        }
        if supervisor {
            if self.cpl != 0 {
                return general_protection();
            }
            if self.platform.xss()? != 0 {
                return Err(Stop::Unsupported);
            }
        }
        let wanted = self.part(reg::DX, 4) << 32 | self.part(reg::AX, 4);
        Ok(wanted & self.platform.xcr0()?)
    }

    /// Where the extended components of `mask` are in memory.
    fn layout(&mut self, mask: u64, compacted: bool) -> Step<Layout> {
        let mut layout = Layout {
            placed: [None; 62],
            bytes: EXTENDED,
        };
        for (slot, index) in layout.placed.iter_mut().zip(2u32..) {
            if mask >> index & 1 == 0 {
                continue;
            }
            let component = self
                .platform
                .xsave_component(index)
                .ok_or(Stop::Unsupported)?;
            let (standard, bytes) = range(component);
            let to = if !compacted {
                standard
            } else if component.aligned {
                layout.bytes.next_multiple_of(64)
            } else {
                layout.bytes
            };
            let end = to.checked_add(bytes).ok_or(Stop::Unsupported)?;
            layout.bytes = layout.bytes.max(end);
            // More than two pages are not handled at once; only AMX has as much.
            if layout.bytes > 4096 || bytes == 0 || to < EXTENDED {
                return Err(Stop::Unsupported);
            }
            *slot = Some(Placed {
                index,
                to,
                component,
            });
        }
        Ok(layout)
    }

    /// XSAVE, XSAVEOPT, XSAVEC, XSAVES.
    pub(super) fn xsave(&mut self, instruction: &Instruction) -> Step {
        let mnemonic = instruction.mnemonic();
        let supervisor = matches!(mnemonic, Mnemonic::Xsaves | Mnemonic::Xsaves64);
        let compacted = supervisor || matches!(mnemonic, Mnemonic::Xsavec | Mnemonic::Xsavec64);
        let only_in_use =
            compacted || matches!(mnemonic, Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
        let mask = self.check_xsave(supervisor)?;
        let layout = self.layout(mask, compacted)?;
        let (segment, offset) = self.address(instruction)?;
        let kind = AccessKind::Write;
        let span = self.span_aligned_to(segment, offset, layout.bytes, 64, kind)?;
        let mut area = self.area()?;
        Self::narrow_pointers(instruction, area.get_mut((0, LEGACY_BYTES))?);
        let in_use = area.in_use & mask;
        let saved = if only_in_use { in_use } else { mask };
        let header = span.part(LEGACY_BYTES, 16);
        let old = self.load_wide(&header)?;
        if saved & X87 != 0 {
            for part in X87_PARTS {
                self.save(&span, part.0, area.get(part)?)?;
            }
        }
        let mxcsr = if compacted {
            saved & SSE != 0
        } else {
            mask & (SSE | AVX) != 0
        };
        if mxcsr {
            self.save(&span, MXCSR.0, area.get(MXCSR)?)?;
        }
        if saved & SSE != 0 {
            let xmm = self.xmm();
            self.save(&span, xmm.0, area.get(xmm)?)?;
        }
        for placed in layout.placed.iter().flatten() {
            if saved >> placed.index & 1 == 0 {
                continue;
            }
            let reachable = self.reachable(placed);
            if in_use >> placed.index & 1 == 0 {
                area.get_mut(reachable)?.fill(0);
            }
            self.save(&span, placed.to, area.get(reachable)?)?;
        }
        if compacted {
            let bits = u128::from(in_use) | u128::from(mask | COMPACTED) << 64;
            self.write_span(&header, &bits.to_le_bytes())
        } else {
            let bits = old as u64 & !mask | in_use;
            self.store(&span.part(LEGACY_BYTES, 8), bits)
        }
    }

    fn save(&mut self, span: &Span, at: usize, data: &[u8]) -> Step {
        if data.is_empty() {
            return Ok(());
        }
        self.write_span(&span.part(at, data.len()), data)
    }

    /// XRSTOR and XRSTORS.
    pub(super) fn xrstor(&mut self, instruction: &Instruction) -> Step {
        let supervisor = matches!(
            instruction.mnemonic(),
            Mnemonic::Xrstors | Mnemonic::Xrstors64
        );
        let mask = self.check_xsave(supervisor)?;
        let (segment, offset) = self.address(instruction)?;
        let kind = AccessKind::Read;
        let span = self.span_aligned_to(segment, offset, EXTENDED, 64, kind)?;
        let mut header = [0; HEADER_BYTES];
        self.read_span(&span.part(LEGACY_BYTES, HEADER_BYTES), &mut header)?;
        let (stored, format) = self.check_header(&header, supervisor)?;
        let compacted = format & COMPACTED != 0;
        // In the compacted format all of XCOMP_BV's components take space, in the standard one none is in the way.
        let layout = self.layout(
            if compacted { format & !COMPACTED } else { mask },
            compacted,
        )?;
        let span = self.span_aligned_to(segment, offset, layout.bytes, 64, kind)?;
        let mut area = self.area()?;
        let loaded = stored & mask;
        area.in_use = area.in_use & !mask | loaded;
        area.initialise_legacy(self.xmm())?;
        if loaded & X87 != 0 {
            for part in X87_PARTS {
                self.read_span(&span.part(part.0, part.1), area.get_mut(part)?)?;
            }
            Self::narrow_pointers(instruction, area.get_mut((0, LEGACY_BYTES))?);
        }
        if loaded & SSE != 0 {
            let xmm = self.xmm();
            self.read_span(&span.part(xmm.0, xmm.1), area.get_mut(xmm)?)?;
        }
        let load_mxcsr = if compacted {
            loaded & SSE != 0
        } else {
            mask & (SSE | AVX) != 0
        };
        if load_mxcsr {
            let value = self.load(&span.part(MXCSR.0, 4))? as u32;
            self.check_mxcsr(value)?;
            area.set_mxcsr(value)?;
        } else if mask & SSE != 0 {
            area.set_mxcsr(INITIAL_MXCSR)?;
        }
        for placed in layout.placed.iter().flatten() {
            let to = area.get_mut(self.reachable(placed))?;
            if loaded >> placed.index & 1 != 0 && !to.is_empty() {
                self.read_span(&span.part(placed.to, to.len()), to)?;
            }
        }
        for placed in self.layout(mask, false)?.placed.iter().flatten() {
            if loaded >> placed.index & 1 == 0 {
                area.get_mut(self.reachable(placed))?.fill(0);
                // What the mode cannot reach stays, and is then still in use.
                area.note_use(1 << placed.index, range(placed.component))?;
            }
        }
        area.note_use(SSE, XMM)?;
        self.store_area(area)
    }

    /// XSTATE_BV and XCOMP_BV of a header, or #GP(0) (SDM vol. 1, sections 13.8.1 and 13.12).
    fn check_header(&mut self, header: &[u8; HEADER_BYTES], supervisor: bool) -> Step<(u64, u64)> {
        let mut words = [0u64; 8];
        for (word, bytes) in words.iter_mut().zip(header.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            *word = u64::from_le_bytes(value);
        }
        let [stored, format, rest @ ..] = words;
        let enabled = self.platform.xcr0()?;
        let valid = if format & COMPACTED != 0 {
            let present = format & !COMPACTED;
            present & !enabled == 0 && stored & !present == 0 && rest.iter().all(|word| *word == 0)
        } else {
            !supervisor && stored & !enabled == 0 && format == 0 && rest[0] == 0
        };
        if !valid {
            return general_protection();
        }
        Ok((stored, format))
    }
}
