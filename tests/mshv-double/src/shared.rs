//! General registers, special registers and events by way of the page shared with KVM (KVM_CAP_SYNC_REGS).
//!
//! Every intercept needs them all, before and after KVM completes the access; as ioctls they would cost more than the
//! exit itself. So KVM writes them to the page at each exit, and takes general registers and events from there at the next
//! entry. Special registers are set at once: KVM refuses impossible ones, and the client is to hear of it.
//!
//! ```text
//!   KVM_RUN ─► exit: page is fresh ─► read: from the page   set: to the page, dirty ─► KVM_RUN
//!                       │ set of state that may interact, or a run without an exit
//!                       └────────► settled: dirty state goes to KVM by ioctl; reads and sets are ioctls again
//! ```

use std::sync::atomic::Ordering;

use kvm_bindings::*;

use crate::kvm::Vcpu;
use crate::sys::Answer;

/// All that can be shared.
pub(crate) const SHARED: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

/// What may be set of events: never NMIs, start-up and INIT that another thread may just have sent, which would get lost.
fn settable(events: &kvm_vcpu_events) -> kvm_vcpu_events {
    let mut events = *events;
    events.flags &= KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_PAYLOAD;
    events
}

impl Vcpu {
    fn fresh(&self, what: u32) -> bool {
        self.fresh.load(Ordering::Relaxed) & what == what
    }

    /// Tells what of the page is worth reading from now on.
    pub(crate) fn set_fresh(&self, what: u32) {
        let what = if self.shares { what } else { 0 };
        self.fresh.store(what, Ordering::Relaxed);
    }

    /// The registers in the page.
    fn page(&self) -> *mut kvm_sync_regs {
        // SAFETY: the page is mapped for as long as `self` lives; only an address is made here.
        unsafe { &raw mut (*self.run_page()).s.regs }
    }

    fn mark_dirty(&self, what: u32) {
        // SAFETY: the page is mapped, and the caller holds the VP, so KVM does not use it now.
        unsafe { (*self.run_page()).kvm_dirty_regs |= u64::from(what) };
    }

    /// Hands over to KVM what is still in the page only, and forgets the page.
    pub(crate) fn settle(&self) -> Answer<()> {
        // SAFETY: as in `mark_dirty`.
        let (dirty, page) = unsafe {
            let dirty = (*self.run_page()).kvm_dirty_regs;
            (*self.run_page()).kvm_dirty_regs = 0;
            (dirty, *self.page())
        };
        self.set_fresh(0);
        if dirty & u64::from(KVM_SYNC_X86_REGS) != 0 {
            self.store_regs(&page.regs)?;
        }
        if dirty & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
            self.store_events(&page.events)?;
        }
        Ok(())
    }

    pub(crate) fn regs(&self) -> Answer<kvm_regs> {
        if self.fresh(KVM_SYNC_X86_REGS) {
            // SAFETY: as in `mark_dirty`.
            return Ok(unsafe { (*self.page()).regs });
        }
        self.fetch_regs()
    }

    /// Sets the general registers. A pending exception stays, which KVM would drop with them.
    pub(crate) fn set_regs(&self, regs: &kvm_regs) -> Answer<()> {
        if self.fresh(KVM_SYNC_X86_REGS | KVM_SYNC_X86_EVENTS) {
            let events = settable(&self.events()?);
            // SAFETY: as in `mark_dirty`.
            unsafe { ((*self.page()).regs, (*self.page()).events) = (*regs, events) };
            self.mark_dirty(KVM_SYNC_X86_REGS | KVM_SYNC_X86_EVENTS);
            return Ok(());
        }
        let events = self.fetch_events()?;
        self.store_regs(regs)?;
        if events.exception.pending != 0 {
            self.store_events(&settable(&events))?;
        }
        Ok(())
    }

    pub(crate) fn events(&self) -> Answer<kvm_vcpu_events> {
        if self.fresh(KVM_SYNC_X86_EVENTS) {
            // SAFETY: as in `mark_dirty`.
            return Ok(unsafe { (*self.page()).events });
        }
        self.fetch_events()
    }

    pub(crate) fn set_events(&self, events: &kvm_vcpu_events) -> Answer<()> {
        let events = settable(events);
        if self.fresh(KVM_SYNC_X86_EVENTS) {
            // SAFETY: as in `mark_dirty`.
            unsafe { (*self.page()).events = events };
            self.mark_dirty(KVM_SYNC_X86_EVENTS);
            return Ok(());
        }
        self.store_events(&events)
    }

    pub(crate) fn sregs(&self) -> Answer<kvm_sregs> {
        if self.fresh(KVM_SYNC_X86_SREGS) {
            // SAFETY: as in `mark_dirty`.
            return Ok(unsafe { (*self.page()).sregs });
        }
        self.fetch_sregs()
    }

    pub(crate) fn set_sregs(&self, sregs: &kvm_sregs) -> Answer<()> {
        self.settle()?;
        self.store_sregs(sregs)
    }

    /// Sets the activity. A vCPU that waits for its start-up IPI takes nothing from the page.
    pub(crate) fn set_mp_state(&self, state: &kvm_mp_state) -> Answer<()> {
        self.settle()?;
        self.store_mp_state(state)
    }

    /// Sets the local APIC, whose task priority is a special register as well.
    pub(crate) fn set_lapic(&self, lapic: &kvm_lapic_state) -> Answer<()> {
        self.settle()?;
        self.store_lapic(lapic)
    }
}
