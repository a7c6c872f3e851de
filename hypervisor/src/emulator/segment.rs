//! Loads of segment registers, and what a port access may do.

use arch::x86_64::state::Segment;

use super::cpu::{Cpu, SegmentName, access};
use super::error::{Exception, Step, Stop, general_protection, invalid_opcode, vector};
use super::platform::AccessKind;

/// Requested privilege level and table indicator of a selector.
const RPL: u16 = 3;
const TABLE_LDT: u16 = 1 << 2;
/// Offset of the I/O map base in a 32- or 64-bit TSS (SDM vol. 3, figures 8-2 and 8-11).
const TSS_IO_MAP_BASE: u64 = 102;

/// A segment descriptor in a table.
pub(super) struct Descriptor {
    address: u64,
    /// Its eight bytes.
    pub(super) raw: u64,
    pub(super) segment: Segment,
}

impl Cpu<'_> {
    /// Loads a data segment register (SDM vol. 2, MOV: "Loading a segment register").
    pub(super) fn load_segment(&mut self, name: SegmentName, selector: u16) -> Step {
        if name == SegmentName::Cs {
            return invalid_opcode();
        }
        let segment = if self.paragraphs() {
            let old = *self.segment(name);
            Segment {
                selector,
                base: u64::from(selector) << 4,
                ..old
            }
        } else if selector & !RPL == 0 {
            self.null_segment(name, selector)?
        } else {
            self.described_segment(name, selector)?
        };
        self.segment_load = Some((name, segment));
        Ok(())
    }

    fn null_segment(&self, name: SegmentName, selector: u16) -> Step<Segment> {
        let mut rights = access::UNUSABLE;
        if name == SegmentName::Ss {
            let allowed = self.is_64bit() && self.cpl < 3 && u16::from(self.cpl) == selector & RPL;
            if !allowed {
                return general_protection();
            }
            // CPL is read from SS.DPL.
            rights |= u32::from(self.cpl) << 5;
        }
        Ok(Segment {
            selector,
            base: 0,
            limit: 0,
            access: rights,
        })
    }

    /// The descriptor that a selector names; `None` beyond the table's limit, without a table, and for null.
    pub(super) fn descriptor(&mut self, selector: u16) -> Step<Option<Descriptor>> {
        if selector & !RPL == 0 {
            return Ok(None);
        }
        let index = u64::from(selector & !(RPL | TABLE_LDT));
        let (base, limit) = if selector & TABLE_LDT == 0 {
            let table = &self.special.gdt;
            (table.base, u64::from(table.limit))
        } else {
            let table = &self.special.ldt;
            if table.access & access::UNUSABLE != 0 || table.access & access::PRESENT == 0 {
                return Ok(None);
            }
            (table.base, u64::from(table.limit))
        };
        if index + 7 > limit {
            return Ok(None);
        }
        let mut address = base.wrapping_add(index);
        if !self.long_mode_active() {
            address &= 0xffff_ffff;
        }
        let span = self.system_span(address, 8, AccessKind::Read)?;
        let raw = self.load(&span)?;
        Ok(Some(Descriptor {
            address,
            raw,
            segment: parse(selector, raw),
        }))
    }

    fn described_segment(&mut self, name: SegmentName, selector: u16) -> Step<Segment> {
        let code = u32::from(selector & !RPL);
        let gp = || Stop::from(Exception::with_code(vector::GP, code));
        let Descriptor {
            address, segment, ..
        } = self.descriptor(selector)?.ok_or_else(gp)?;
        let rights = segment.access;
        let rpl = (selector & RPL) as u8;
        let dpl = access::dpl(&segment);
        let is_code = rights & access::CODE != 0;
        let enabled = rights & access::WRITABLE_OR_READABLE != 0;
        let not_system = rights & access::NOT_SYSTEM != 0;
        let allowed = if name == SegmentName::Ss {
            not_system && !is_code && enabled && rpl == self.cpl && dpl == self.cpl
        } else {
            let conforming = is_code && rights & access::DOWN_OR_CONFORMING != 0;
            let readable = not_system && (!is_code || enabled);
            readable && (conforming || dpl >= self.cpl.max(rpl))
        };
        if !allowed {
            return Err(gp());
        }
        if rights & access::PRESENT == 0 {
            let vector = if name == SegmentName::Ss {
                vector::SS
            } else {
                vector::NP
            };
            return Err(Exception::with_code(vector, code).into());
        }
        if rights & access::ACCESSED == 0 {
            let span = self.system_span(address, 8, AccessKind::Write)?;
            let accessed = u128::from(access::ACCESSED) << 40;
            self.update_span(&span, true, |old| (old | accessed, ()))?;
        }
        Ok(Segment {
            access: rights | access::ACCESSED,
            ..segment
        })
    }

    /// Whether the guest may access `bytes` ports from `port` on (SDM vol. 1, section 19.5), if the options ask
    /// for the check.
    pub(super) fn check_port(&mut self, port: u16, bytes: u16) -> Step {
        if !self.options.check_io_permission || !self.protected() {
            return Ok(());
        }
        if self.cpl <= self.iopl() && !self.virtual_8086() {
            return Ok(());
        }
        let tss = self.special.tr;
        let limit = u64::from(tss.limit);
        // Only 32- and 64-bit TSSs (types 9 and 11) have a bitmap.
        let has_map = matches!(tss.access & 0xf, 9 | 11) && tss.access & access::PRESENT != 0;
        if !has_map || limit < TSS_IO_MAP_BASE + 1 {
            return general_protection();
        }
        let base = tss.base;
        let map = self.system_word(base.wrapping_add(TSS_IO_MAP_BASE))?;
        let offset = map + u64::from(port >> 3);
        // The processor always reads two bytes.
        if offset + 1 > limit {
            return general_protection();
        }
        let bits = self.system_word(base.wrapping_add(offset))?;
        let wanted = (1u64 << bytes) - 1;
        if bits >> (port & 7) & wanted != 0 {
            return general_protection();
        }
        Ok(())
    }

    fn system_word(&mut self, address: u64) -> Step<u64> {
        let span = self.system_span(address, 2, AccessKind::Read)?;
        self.load(&span)
    }
}

/// A code or data segment descriptor (SDM vol. 3, section 3.4.5).
fn parse(selector: u16, descriptor: u64) -> Segment {
    let base = descriptor >> 16 & 0xff_ffff | descriptor >> 56 << 24;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let rights = (descriptor >> 40) as u32 & 0xf0ff;
    let limit = if rights & access::GRANULAR != 0 {
        limit << 12 | 0xfff
    } else {
        limit
    };
    Segment {
        selector,
        base,
        limit,
        access: rights,
    }
}
