//! Linear addresses: segmentation and alignment checks, pages, and accesses that may cross one.

use super::cpu::{Cpu, SegmentName, access, control, rflags};
use super::error::{Exception, Step, Stop, general_protection, vector};
use super::platform::{Access, AccessKind, TranslateFailure};

/// Bytes of the smallest page, which no access of the platform crosses.
pub(super) const PAGE_BYTES: u64 = 4096;

/// How often a LOCK form tries again after another vCPU was faster.
const LOCK_ATTEMPTS: u32 = 64;

/// A checked and translated stretch of memory, in one page or two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// Guest physical address of the first byte, and of the first in the second page.
    gpa: [u64; 2],
    /// Bytes in the first page.
    first: usize,
    /// Bytes in all.
    bytes: usize,
}

impl Span {
    /// `bytes` bytes (at least 1) of the span, from `start` on. They must lie within it.
    pub(super) fn part(&self, start: usize, bytes: usize) -> Self {
        if start >= self.first {
            let within = (start - self.first) as u64;
            return Self {
                gpa: [self.gpa[1].wrapping_add(within), 0],
                first: bytes,
                bytes,
            };
        }
        Self {
            gpa: [self.gpa[0].wrapping_add(start as u64), self.gpa[1]],
            first: (self.first - start).min(bytes),
            bytes,
        }
    }
}

impl Cpu<'_> {
    /// The linear address of `bytes` bytes at `offset` in a segment, if the segment allows the access.
    pub(super) fn linear(
        &self,
        name: SegmentName,
        offset: u64,
        bytes: u64,
        kind: AccessKind,
    ) -> Step<u64> {
        let segment = self.segment(name);
        if self.is_64bit() {
            let linear = self.base(name).wrapping_add(offset);
            let last = linear.wrapping_add(bytes.saturating_sub(1));
            if !self.canonical(linear) || !self.canonical(last) {
                return self.segment_violation(name);
            }
            return Ok(linear);
        }
        let offset = offset & 0xffff_ffff;
        if !self.paragraphs() && !self.type_allows(name, kind) {
            return self.segment_violation(name);
        }
        // Offsets are 32 bits wide here, so the sum cannot wrap.
        let last = offset + bytes.saturating_sub(1);
        let limit = u64::from(segment.limit);
        let data = segment.access & access::CODE == 0;
        let within = if data && segment.access & access::DOWN_OR_CONFORMING != 0 {
            let top = if segment.access & access::BIG != 0 {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if !within {
            return self.segment_violation(name);
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// The base of a segment, which in 64-bit mode only FS and GS have.
    fn base(&self, name: SegmentName) -> u64 {
        match name {
            SegmentName::Fs | SegmentName::Gs => self.segment(name).base,
            _ if self.is_64bit() => 0,
            _ => self.segment(name).base,
        }
    }

    fn type_allows(&self, name: SegmentName, kind: AccessKind) -> bool {
        let rights = self.segment(name).access;
        if rights & access::UNUSABLE != 0 {
            return false;
        }
        let code = rights & access::CODE != 0;
        let enabled = rights & access::WRITABLE_OR_READABLE != 0;
        match kind {
            AccessKind::Read => !code || enabled,
            AccessKind::Write => !code && enabled,
            AccessKind::Execute => code,
        }
    }

    fn segment_violation<T>(&self, name: SegmentName) -> Step<T> {
        let vector = match name {
            SegmentName::Ss => vector::SS,
            _ => vector::GP,
        };
        Err(Exception::with_code(vector, 0).into())
    }

    /// Whether an address is canonical under 4- or 5-level paging (SDM vol. 1, section 3.3.7.1).
    pub(super) fn canonical(&self, address: u64) -> bool {
        let unused = if self.special.cr4 & control::CR4_LA57 != 0 {
            64 - 57
        } else {
            64 - 48
        };
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// Checks and translates a data access of `bytes` bytes (1 to 4096), both pages if it crosses one.
    pub(super) fn span(
        &mut self,
        name: SegmentName,
        offset: u64,
        bytes: usize,
        kind: AccessKind,
    ) -> Step<Span> {
        self.span_of(name, offset, bytes, bytes, kind)
    }

    /// As [`Self::span`], where alignment is a matter of elements of `element` bytes.
    pub(super) fn span_of(
        &mut self,
        name: SegmentName,
        offset: u64,
        bytes: usize,
        element: usize,
        kind: AccessKind,
    ) -> Step<Span> {
        let linear = self.linear(name, offset, bytes as u64, kind)?;
        self.check_alignment(linear, element)?;
        self.span_at(linear, bytes, kind)
    }

    /// As [`Self::span`], for an address that must be a multiple of `bytes`, or #GP(0).
    pub(super) fn aligned_span(
        &mut self,
        name: SegmentName,
        offset: u64,
        bytes: usize,
        kind: AccessKind,
    ) -> Step<Span> {
        self.span_aligned_to(name, offset, bytes, bytes as u64, kind)
    }

    /// As [`Self::span`], for an address that must be a multiple of `alignment`, or #GP(0).
    pub(super) fn span_aligned_to(
        &mut self,
        name: SegmentName,
        offset: u64,
        bytes: usize,
        alignment: u64,
        kind: AccessKind,
    ) -> Step<Span> {
        // Before the segment's own checks: where both fail, it is #GP even in SS.
        let unchecked = self.base(name).wrapping_add(offset);
        if !unchecked.is_multiple_of(alignment) {
            return general_protection();
        }
        let linear = self.linear(name, offset, bytes as u64, kind)?;
        self.span_at(linear, bytes, kind)
    }

    fn span_at(&mut self, linear: u64, bytes: usize, kind: AccessKind) -> Step<Span> {
        let in_page = (PAGE_BYTES - linear % PAGE_BYTES) as usize;
        let first = in_page.min(bytes);
        let mut gpa = [self.translate(linear, kind)?, 0];
        if first < bytes {
            let mut second = linear.wrapping_add(first as u64);
            if !self.is_64bit() {
                second &= 0xffff_ffff;
            }
            gpa[1] = self.translate(second, kind)?;
        }
        Ok(Span { gpa, first, bytes })
    }

    /// #AC (SDM vol. 3, section 7.15) for an operand whose width, a power of two, is its alignment.
    fn check_alignment(&self, linear: u64, bytes: usize) -> Step {
        let enabled = self.cpl == 3
            && self.flags_before & rflags::AC != 0
            && self.special.cr0 & control::CR0_AM != 0;
        if enabled && bytes.is_power_of_two() && !linear.is_multiple_of(bytes as u64) {
            return Err(Exception::with_code(vector::AC, 0).into());
        }
        Ok(())
    }

    /// Translates a linear address for an access of the current privilege level.
    pub(super) fn translate(&mut self, linear: u64, kind: AccessKind) -> Step<u64> {
        let access = Access {
            kind,
            user: self.cpl == 3,
            implicit: false,
        };
        let slot = match kind {
            AccessKind::Read => 0,
            AccessKind::Write => 1,
            AccessKind::Execute => return self.ask_translation(linear, access),
        };
        let page = linear & !(PAGE_BYTES - 1);
        if let Some((known, gpa)) = self.pages[slot]
            && known == page
        {
            return Ok(gpa | (linear - page));
        }
        let gpa = self.ask_translation(linear, access)?;
        self.pages[slot] = Some((page, gpa & !(PAGE_BYTES - 1)));
        Ok(gpa)
    }

    fn ask_translation(&mut self, linear: u64, access: Access) -> Step<u64> {
        self.platform
            .translate(linear, access)
            .map_err(|failure| match failure {
                TranslateFailure::Exception(exception) => Stop::Exception(exception),
                TranslateFailure::Platform(error) => Stop::Platform(error),
            })
    }

    /// A descriptor-table or TSS access: supervisor, whatever CPL is.
    pub(super) fn system_span(
        &mut self,
        linear: u64,
        bytes: usize,
        kind: AccessKind,
    ) -> Step<Span> {
        let access = Access {
            kind,
            user: false,
            implicit: true,
        };
        let in_page = (PAGE_BYTES - linear % PAGE_BYTES) as usize;
        let first = in_page.min(bytes);
        let mut gpa = [self.ask_translation(linear, access)?, 0];
        if first < bytes {
            gpa[1] = self.ask_translation(linear.wrapping_add(first as u64), access)?;
        }
        Ok(Span { gpa, first, bytes })
    }

    /// Reads a whole span into the start of `data`.
    pub(super) fn read_span(&mut self, span: &Span, data: &mut [u8]) -> Step {
        let Some(data) = data.get_mut(..span.bytes) else {
            return Err(Stop::Unsupported);
        };
        let (first, second) = data.split_at_mut(span.first);
        self.platform.read(span.gpa[0], first)?;
        if !second.is_empty() {
            self.platform.read(span.gpa[1], second)?;
        }
        Ok(())
    }

    /// Writes a whole span from the start of `data`.
    pub(super) fn write_span(&mut self, span: &Span, data: &[u8]) -> Step {
        let Some(data) = data.get(..span.bytes) else {
            return Err(Stop::Unsupported);
        };
        let (first, second) = data.split_at(span.first);
        self.platform.write(span.gpa[0], first)?;
        if !second.is_empty() {
            self.platform.write(span.gpa[1], second)?;
        }
        Ok(())
    }

    /// Reads a span of up to 8 bytes as a number.
    pub(super) fn load(&mut self, span: &Span) -> Step<u64> {
        let mut data = [0; 8];
        self.read_span(span, &mut data)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes the low bytes of a number to a span of up to 8 bytes.
    pub(super) fn store(&mut self, span: &Span, value: u64) -> Step {
        self.write_span(span, &value.to_le_bytes())
    }

    /// Reads up to 16 bytes as a number.
    pub(super) fn load_wide(&mut self, span: &Span) -> Step<u128> {
        let mut data = [0; 16];
        self.read_span(span, &mut data)?;
        Ok(u128::from_le_bytes(data))
    }

    /// Replaces `old` by `new`, atomically if the span lies in one page, and says whether `old` was there. A
    /// locked access that crosses pages ("split lock") is done in two halves.
    pub(super) fn exchange(&mut self, span: &Span, old: u128, new: u128) -> Step<bool> {
        let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
        if span.first < span.bytes {
            self.write_span(span, &new)?;
            return Ok(true);
        }
        let (Some(old), Some(new)) = (old.get(..span.bytes), new.get(..span.bytes)) else {
            return Err(Stop::Unsupported);
        };
        Ok(self.platform.compare_exchange(span.gpa[0], old, new)?)
    }

    /// Reads a writable span, lets `change` compute what to write, and writes it: atomically if `locked`.
    /// `change` may be called more than once.
    pub(super) fn update_span<T>(
        &mut self,
        span: &Span,
        locked: bool,
        change: impl Fn(u128) -> (u128, T),
    ) -> Step<T> {
        if !locked {
            let (value, result) = change(self.load_wide(span)?);
            self.write_span(span, &value.to_le_bytes())?;
            return Ok(result);
        }
        for _ in 0..LOCK_ATTEMPTS {
            let old = self.load_wide(span)?;
            let (value, result) = change(old);
            if self.exchange(span, old, value)? {
                return Ok(result);
            }
        }
        Err(Stop::Retry)
    }
}
