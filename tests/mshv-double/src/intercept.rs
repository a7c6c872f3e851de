//! From a KVM exit to an intercept message.
//!
//! KVM stops in the middle of an instruction and wants an answer. Hyper-V stops before it and wants nothing. So:
//!
//! ```text
//!   exit ─► registers now ─► KVM completes the access with zeroes (immediate exit, again until EINTR)
//!        ─► registers before the instruction (as they are for a read; found by prestate for a write) are set ─► message
//! ```
//!
//! What completion did to registers, pending events or RAM is undone or overwritten: registers by us, RAM by the client,
//! who emulates the same instruction with the right data.

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, kvm_lapic_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events,
};
use mshv_bindings::hv_message;

use crate::events;
use crate::gva::{self, Access};
use crate::kvm::{Exit, Vcpu, XsaveArea};
use crate::memory::{Memory, PAGE};
use crate::message::{Kind, Scene};
use crate::partition::Partition;
use crate::prestate::{Found, Machine, touches_vectors};
use crate::sys::{Answer, note};
use crate::vp::Vp;

/// More pieces than any single instruction has (REP INS is read ahead by up to a page of bytes).
const MOST_PIECES: usize = 8192;

/// How often a load that KVM takes for one from a device, though memory is mapped there, starts again before it is reported.
const MOST_STALE_LOADS: u32 = 1000;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// State that completion may disturb.
struct Saved {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
    xsave: Option<Box<XsaveArea>>,
}

impl Saved {
    fn take(vcpu: &Vcpu) -> Answer<Self> {
        Ok(Saved {
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            events: vcpu.events()?,
            xsave: None,
        })
    }

    /// Sets everything back, with the registers as they were before the instruction.
    fn restore(mut self, vcpu: &Vcpu, regs: &kvm_regs) -> Answer<()> {
        let mut now = vcpu.sregs()?;
        (now.interrupt_bitmap, self.sregs.interrupt_bitmap) = ([0; 4], [0; 4]);
        // Setting segments and control registers costs a flush; hardly any instruction changes them.
        if now != self.sregs {
            vcpu.set_sregs(&self.sregs)?;
        }
        vcpu.set_regs(regs)?;
        if let Some(xsave) = &self.xsave {
            vcpu.set_xsave(xsave)?;
        }
        vcpu.set_events(&self.events)
    }
}

/// Completes the pending access; returns what further pieces were written.
fn complete(vcpu: &Vcpu) -> Answer<Vec<Exit>> {
    let mut pieces = Vec::new();
    vcpu.set_immediate_exit(true);
    for _ in 0..MOST_PIECES {
        vcpu.answer(false);
        match vcpu.complete() {
            Ok(_) => pieces.push(vcpu.exit()),
            Err(libc::EINTR | libc::EAGAIN) => return Ok(pieces),
            Err(error) => return Err(error),
        }
    }
    eprintln!("mshv-double: an access does not come to an end");
    Err(libc::EIO)
}

/// Whether a vector's latest interrupt was level-triggered: its bit in the TMR, which stays until the next one.
fn level_triggered(lapic: &kvm_lapic_state, vector: u8) -> bool {
    let register = 0x180 + usize::from(vector) / 32 * 0x10;
    lapic.regs[register + usize::from(vector) % 32 / 8] as u8 >> (vector % 8) & 1 != 0
}

impl Partition {
    /// Turns an exit into a message; None if the guest goes on.
    pub(crate) fn handle_exit(&self, vp: &Vp) -> Answer<Option<hv_message>> {
        let memory = self
            .memory
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let exit = vp.vcpu.exit();
        match exit {
            Exit::Io {
                out,
                size,
                port,
                data,
            } => self.port(vp, &memory, out, size, port, &data).map(Some),
            Exit::Mmio {
                write: false, gpa, ..
            } => self.load(vp, &memory, gpa),
            Exit::Mmio {
                write: true,
                gpa,
                data,
            } => self.store(vp, &memory, gpa, data).map(Some),
            Exit::ReadMsr { index, unknown } => self.msr(vp, &memory, Kind::Read, index, unknown),
            Exit::WriteMsr { index, unknown } => self.msr(vp, &memory, Kind::Write, index, unknown),
            Exit::Eoi(vector) => {
                drop(memory);
                // KVM reports every end of a vector that was ever routed as level-triggered; Hyper-V those that were.
                if !level_triggered(&vp.vcpu.lapic()?, vector) || self.acknowledge(vector) {
                    return Ok(None);
                }
                let saved = Saved::take(&vp.vcpu)?;
                Ok(Some(self.scene(vp, &saved, &saved.regs).eoi(vector)))
            }
            Exit::Shutdown => {
                let saved = Saved::take(&vp.vcpu)?;
                Ok(Some(self.scene(vp, &saved, &saved.regs).unrecoverable()))
            }
            Exit::InterruptWindow => {
                vp.vcpu.request_interrupt_window(false);
                let saved = Saved::take(&vp.vcpu)?;
                Ok(Some(self.scene(vp, &saved, &saved.regs).deliverable()))
            }
            // With the local APIC in KVM, a halted vCPU stays inside.
            Exit::Halt | Exit::Interrupted => Ok(None),
            Exit::Other(reason, suberror) => self.give_up(vp, &memory, reason, suberror).map(Some),
        }
    }

    /// KVM cannot go on. A fetch from where no memory is, which KVM calls a failed emulation, is an intercept like any
    /// other; all else is an error of KVM, which Hyper-V has no message for.
    fn give_up(&self, vp: &Vp, memory: &Memory, reason: u32, suberror: u32) -> Answer<hv_message> {
        let saved = Saved::take(&vp.vcpu)?;
        let machine = Machine {
            memory,
            sregs: &saved.sregs,
        };
        let code = machine.message_bytes(saved.regs.rip);
        if (reason, suberror) == (KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION)
            && code.is_empty()
        {
            let gva = machine.fetch_address(saved.regs.rip);
            let fetch = Access {
                execute: true,
                exempt: true,
                ..Default::default()
            };
            if let Ok(gpa) = gva::translate(memory, &saved.sregs, gva, fetch) {
                let scene = self.scene(vp, &saved, &saved.regs);
                return Ok(scene.memory(false, Kind::Execute, gpa, Some(gva), &code));
            }
        }
        eprintln!(
            "mshv-double: KVM gave up on VP {}: exit {reason}, {suberror}, rip {:#x}, code {code:02x?}",
            vp.index, saved.regs.rip
        );
        Err(libc::EIO)
    }

    /// HVMSG_X64_INTERRUPTION_DELIVERABLE, if the VP could take an external interrupt right now. (KVM tells by itself only
    /// as long as the local APIC passes the PIC's interrupts on.)
    pub(crate) fn deliverable(&self, vp: &Vp) -> Answer<Option<hv_message>> {
        let saved = Saved::take(&vp.vcpu)?;
        let open = saved.regs.rflags & INTERRUPT_FLAG != 0
            && saved.events.interrupt.shadow == 0
            && saved.events.exception.pending == 0
            && events::pending_interruption(&saved.events) == 0;
        Ok(open.then(|| self.scene(vp, &saved, &saved.regs).deliverable()))
    }

    fn scene<'a>(&self, vp: &Vp, saved: &'a Saved, regs: &'a kvm_regs) -> Scene<'a> {
        Scene {
            partition: self.id,
            vp: vp.index,
            regs,
            sregs: &saved.sregs,
            events: &saved.events,
        }
    }

    fn port(
        &self,
        vp: &Vp,
        memory: &Memory,
        out: bool,
        size: usize,
        port: u16,
        data: &[u8],
    ) -> Answer<hv_message> {
        let saved = Saved::take(&vp.vcpu)?;
        complete(&vp.vcpu)?;
        let sregs = saved.sregs;
        let machine = Machine {
            memory,
            sregs: &sregs,
        };
        let mut regs = saved.regs;
        let mut instruction = machine.decode(regs.rip);
        if out {
            // Hardware's fast path retires the instruction on completion, the emulator before the exit.
            let after = vp.vcpu.regs()?;
            if after.rip == saved.regs.rip {
                let Some(found) = machine.before_out(&saved.regs, port, size, data) else {
                    return Err(self.lost(vp, &machine, &saved.regs, "OUT", u64::from(port), data));
                };
                (regs, instruction) = (found.regs, Some(found.instruction));
            }
        }
        let kind = if out { Kind::Write } else { Kind::Read };
        let code = machine.message_bytes(regs.rip);
        let message =
            self.scene(vp, &saved, &regs)
                .io_port(kind, port, size, instruction.as_ref(), &code);
        saved.restore(&vp.vcpu, &regs)?;
        Ok(message)
    }

    fn load(&self, vp: &Vp, memory: &Memory, gpa: u64) -> Answer<Option<hv_message>> {
        let mut saved = Saved::take(&vp.vcpu)?;
        let sregs = saved.sregs;
        let machine = Machine {
            memory,
            sregs: &sregs,
        };
        let regs = saved.regs;
        let instruction = machine.decode(regs.rip);
        if instruction.as_ref().is_none_or(touches_vectors) {
            saved.xsave = Some(Box::new(vp.vcpu.xsave()?));
        }
        complete(&vp.vcpu)?;
        let gva = instruction.and_then(|instruction| machine.reaches(&instruction, &regs, gpa));
        // An access by the processor itself (a page table, a descriptor) or a fetch has no operand that gets there.
        let code = machine.message_bytes(regs.rip);
        let stale = memory.region(gpa / PAGE).is_some();
        let message = self
            .scene(vp, &saved, &regs)
            .memory(stale, Kind::Read, gpa, gva, &code);
        saved.restore(&vp.vcpu, &regs)?;
        // All mapped memory can be read. Seen about once in forty runs of the tests, right after a page was mapped: KVM still knew it
        // for a device's. A processor would read it, so the instruction starts again.
        if stale && vp.stale_loads.fetch_add(1, Ordering::Relaxed) < MOST_STALE_LOADS {
            return Ok(None);
        }
        vp.stale_loads.store(0, Ordering::Relaxed);
        Ok(Some(message))
    }

    fn store(&self, vp: &Vp, memory: &Memory, gpa: u64, mut data: Vec<u8>) -> Answer<hv_message> {
        let saved = Saved::take(&vp.vcpu)?;
        let sregs = saved.sregs;
        let machine = Machine {
            memory,
            sregs: &sregs,
        };
        // Wide stores come in pieces of 8 bytes and end at pages; together they are one store.
        for piece in complete(&vp.vcpu)? {
            if let Exit::Mmio {
                write: true,
                data: more,
                ..
            } = piece
            {
                data.extend(more);
            }
        }
        let Some(Found { regs, gva, .. }) = machine.before_store(&saved.regs, gpa, &data) else {
            return Err(self.lost(vp, &machine, &saved.regs, "store", gpa, &data));
        };
        let code = machine.message_bytes(regs.rip);
        let mapped = memory.region(gpa / PAGE).is_some();
        let message =
            self.scene(vp, &saved, &regs)
                .memory(mapped, Kind::Write, gpa, Some(gva), &code);
        saved.restore(&vp.vcpu, &regs)?;
        Ok(message)
    }

    fn msr(
        &self,
        vp: &Vp,
        memory: &Memory,
        kind: Kind,
        index: u32,
        unknown: bool,
    ) -> Answer<Option<hv_message>> {
        if !self.intercepts_msr(kind) {
            note!("VP {}: {kind:?} of MSR {index:#x}", vp.index);
            // A bad value for a known MSR is a fault, whatever happens to unknown ones.
            vp.vcpu.answer(!(unknown && self.ignores_unknown_msrs()));
            return Ok(None);
        }
        let saved = Saved::take(&vp.vcpu)?;
        complete(&vp.vcpu)?;
        let sregs = saved.sregs;
        let regs = saved.regs;
        let length = Machine {
            memory,
            sregs: &sregs,
        }
        .decode(regs.rip)
        .map_or(2, |instruction| instruction.len());
        let message = self.scene(vp, &saved, &regs).msr(kind, index, length);
        saved.restore(&vp.vcpu, &regs)?;
        Ok(Some(message))
    }

    /// Tells that no instruction explains an access: an error of the double, never passed over in silence.
    fn lost(
        &self,
        vp: &Vp,
        machine: &Machine,
        regs: &kvm_regs,
        what: &str,
        at: u64,
        data: &[u8],
    ) -> i32 {
        let start = regs.rip.wrapping_sub(15);
        let before = machine.message_bytes(start);
        let after = machine.message_bytes(regs.rip);
        eprintln!(
            "mshv-double: VP {}: no instruction explains {what} of {data:02x?} at {at:#x}; rip {:#x}, before {before:02x?}, \
             after {after:02x?}, {regs:x?}",
            vp.index, regs.rip
        );
        libc::EIO
    }
}
