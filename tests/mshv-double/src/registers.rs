//! HvCallGetVpRegisters and HvCallSetVpRegisters: which KVM state a register name stands for.
//!
//! A call names many registers. [`Bank`] fetches each kind of KVM state at most once, and writes back once what changed.

use std::sync::atomic::Ordering;

use kvm_bindings::*;
use mshv_bindings::*;

use crate::events;
use crate::kvm::{Vcpu, XsaveArea};
use crate::status::{self, Status};
use crate::sys::{Answer, note};
use crate::vp::VpState;

/// HvX64RegisterTscDeadline (TLFS, HV_REGISTER_NAME); the bindings leave it out.
const HV_X64_REGISTER_TSC_DEADLINE: u32 = 0x0008_0095;
const IA32_TSC: u32 = 0x10;

/// Bits that EFER has on any processor: SCE, LME, LMA, NXE (AMD APM vol. 2, 3.1.7), and AMD's further ones.
const EFER_DEFINED: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11 | 0xf << 12 | 3 << 17 | 3 << 20;

/// The value of a register: up to 128 bits, the lower half first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Value(pub(crate) [u64; 2]);

impl From<u64> for Value {
    fn from(low: u64) -> Self {
        Value([low, 0])
    }
}

/// The MSR that a register name stands for, where there is one.
fn msr_of(name: u32) -> Option<u32> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match name {
        hv_register_name_HV_X64_REGISTER_TSC => IA32_TSC,
        hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE => 0xc000_0102,
        hv_register_name_HV_X64_REGISTER_PAT => 0x277,
        hv_register_name_HV_X64_REGISTER_SYSENTER_CS => 0x174,
        hv_register_name_HV_X64_REGISTER_SYSENTER_ESP => 0x175,
        hv_register_name_HV_X64_REGISTER_SYSENTER_EIP => 0x176,
        hv_register_name_HV_X64_REGISTER_STAR => 0xc000_0081,
        hv_register_name_HV_X64_REGISTER_LSTAR => 0xc000_0082,
        hv_register_name_HV_X64_REGISTER_CSTAR => 0xc000_0083,
        hv_register_name_HV_X64_REGISTER_SFMASK => 0xc000_0084,
        hv_register_name_HV_X64_REGISTER_TSC_AUX => 0xc000_0103,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_CAP => 0xfe,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE => 0x2ff,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASE0
            ..=hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASEF => {
            0x200 + 2 * (name - hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASE0)
        }
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASK0
            ..=hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASKF => {
            0x201 + 2 * (name - hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASK0)
        }
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX64K00000 => 0x250,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16K80000 => 0x258,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16KA0000 => 0x259,
        hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KC0000
            ..=hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KF8000 => {
            0x268 + name - hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KC0000
        }
        hv_register_name_HV_X64_REGISTER_BNDCFGS => 0xd90,
        hv_register_name_HV_X64_REGISTER_DEBUG_CTL => 0x1d9,
        hv_register_name_HV_X64_REGISTER_SPEC_CTRL => 0x48,
        hv_register_name_HV_X64_REGISTER_VIRT_SPEC_CTRL => 0xc001_011f,
        hv_register_name_HV_X64_REGISTER_U_XSS => 0xda0,
        hv_register_name_HV_X64_REGISTER_U_CET => 0x6a0,
        hv_register_name_HV_X64_REGISTER_S_CET => 0x6a2,
        hv_register_name_HV_X64_REGISTER_PL0_SSP => 0x6a4,
        hv_register_name_HV_X64_REGISTER_PL1_SSP => 0x6a5,
        hv_register_name_HV_X64_REGISTER_PL2_SSP => 0x6a6,
        hv_register_name_HV_X64_REGISTER_PL3_SSP => 0x6a7,
        hv_register_name_HV_X64_REGISTER_INTERRUPT_SSP_TABLE_ADDR => 0x6a8,
        HV_X64_REGISTER_TSC_DEADLINE => 0x6e0,
        hv_register_name_HV_X64_REGISTER_TSC_ADJUST => 0x3b,
        hv_register_name_HV_X64_REGISTER_MSR_IA32_MISC_ENABLE => 0x1a0,
        hv_register_name_HV_X64_REGISTER_IA32_FEATURE_CONTROL => 0x3a,
        hv_register_name_HV_REGISTER_GUEST_OS_ID => HV_X64_MSR_GUEST_OS_ID,
        hv_register_name_HV_X64_REGISTER_HYPERCALL => HV_X64_MSR_HYPERCALL,
        hv_register_name_HV_REGISTER_REFERENCE_TSC => HV_X64_MSR_REFERENCE_TSC,
        hv_register_name_HV_REGISTER_VP_ASSIST_PAGE => HV_X64_MSR_VP_ASSIST_PAGE,
        _ => return None,
    })
}

/// Registers that the double merely keeps: synthetic interrupts and timers, crash parameters, and the like.
fn is_kept(name: u32) -> bool {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    {
        matches!(
            name,
            hv_register_name_HV_REGISTER_DISPATCH_SUSPEND
                | hv_register_name_HV_REGISTER_GUEST_CRASH_P0..=hv_register_name_HV_REGISTER_GUEST_CRASH_CTL
                | hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS
                | hv_register_name_HV_X64_REGISTER_PENDING_DEBUG_EXCEPTION
                | hv_register_name_HV_REGISTER_PENDING_EVENT1
                | hv_register_name_HV_REGISTER_SINT0..=hv_register_name_HV_REGISTER_SCONTROL
                | hv_register_name_HV_REGISTER_SIEFP
                | hv_register_name_HV_REGISTER_SIMP
                | hv_register_name_HV_REGISTER_SIRBP
                | hv_register_name_HV_REGISTER_EOM
                | hv_register_name_HV_REGISTER_STIMER0_CONFIG..=hv_register_name_HV_REGISTER_STIMER3_COUNT
                | hv_register_name_HV_X64_REGISTER_SSP
                | hv_register_name_HV_X64_REGISTER_CR_INTERCEPT_CONTROL
                | hv_register_name_HV_X64_REGISTER_CR_INTERCEPT_CR0_MASK
                | hv_register_name_HV_X64_REGISTER_CR_INTERCEPT_CR4_MASK
        )
    }
}

/// KVM state, fetched when first needed.
pub(crate) struct Bank<'a> {
    vcpu: &'a Vcpu,
    regs: Cached<kvm_regs>,
    sregs: Cached<kvm_sregs>,
    xsave: Cached<XsaveArea>,
    xcrs: Cached<kvm_xcrs>,
    debug: Cached<kvm_debugregs>,
    events: Cached<kvm_vcpu_events>,
    mp_state: Cached<kvm_mp_state>,
}

struct Cached<T> {
    value: Option<T>,
    changed: bool,
}

impl<T: Copy> Cached<T> {
    const EMPTY: Self = Cached {
        value: None,
        changed: false,
    };

    fn get(&mut self, fetch: impl FnOnce() -> Answer<T>) -> Result<&mut T, Status> {
        if self.value.is_none() {
            self.value = Some(fetch().map_err(|_| status::OperationFailed)?);
        }
        self.value.as_mut().ok_or(status::OperationFailed)
    }

    fn change(&mut self, fetch: impl FnOnce() -> Answer<T>) -> Result<&mut T, Status> {
        self.changed = true;
        self.get(fetch)
    }

    fn write(&self, store: impl FnOnce(&T) -> Answer<()>) -> Answer<()> {
        match (&self.value, self.changed) {
            (Some(value), true) => store(value),
            _ => Ok(()),
        }
    }
}

fn general(regs: &mut kvm_regs, name: u32) -> Option<&mut u64> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match name {
        hv_register_name_HV_X64_REGISTER_RAX => &mut regs.rax,
        hv_register_name_HV_X64_REGISTER_RCX => &mut regs.rcx,
        hv_register_name_HV_X64_REGISTER_RDX => &mut regs.rdx,
        hv_register_name_HV_X64_REGISTER_RBX => &mut regs.rbx,
        hv_register_name_HV_X64_REGISTER_RSP => &mut regs.rsp,
        hv_register_name_HV_X64_REGISTER_RBP => &mut regs.rbp,
        hv_register_name_HV_X64_REGISTER_RSI => &mut regs.rsi,
        hv_register_name_HV_X64_REGISTER_RDI => &mut regs.rdi,
        hv_register_name_HV_X64_REGISTER_R8 => &mut regs.r8,
        hv_register_name_HV_X64_REGISTER_R9 => &mut regs.r9,
        hv_register_name_HV_X64_REGISTER_R10 => &mut regs.r10,
        hv_register_name_HV_X64_REGISTER_R11 => &mut regs.r11,
        hv_register_name_HV_X64_REGISTER_R12 => &mut regs.r12,
        hv_register_name_HV_X64_REGISTER_R13 => &mut regs.r13,
        hv_register_name_HV_X64_REGISTER_R14 => &mut regs.r14,
        hv_register_name_HV_X64_REGISTER_R15 => &mut regs.r15,
        hv_register_name_HV_X64_REGISTER_RIP => &mut regs.rip,
        hv_register_name_HV_X64_REGISTER_RFLAGS => &mut regs.rflags,
        _ => return None,
    })
}

fn control(sregs: &mut kvm_sregs, name: u32) -> Option<&mut u64> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match name {
        hv_register_name_HV_X64_REGISTER_CR0
        | hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR0 => &mut sregs.cr0,
        hv_register_name_HV_X64_REGISTER_CR2 => &mut sregs.cr2,
        hv_register_name_HV_X64_REGISTER_CR3
        | hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR3 => &mut sregs.cr3,
        hv_register_name_HV_X64_REGISTER_CR4
        | hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR4 => &mut sregs.cr4,
        hv_register_name_HV_X64_REGISTER_CR8
        | hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR8 => &mut sregs.cr8,
        hv_register_name_HV_X64_REGISTER_EFER => &mut sregs.efer,
        hv_register_name_HV_X64_REGISTER_APIC_BASE => &mut sregs.apic_base,
        _ => return None,
    })
}

fn segment(sregs: &mut kvm_sregs, name: u32) -> Option<&mut kvm_segment> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match name {
        hv_register_name_HV_X64_REGISTER_ES => &mut sregs.es,
        hv_register_name_HV_X64_REGISTER_CS => &mut sregs.cs,
        hv_register_name_HV_X64_REGISTER_SS => &mut sregs.ss,
        hv_register_name_HV_X64_REGISTER_DS => &mut sregs.ds,
        hv_register_name_HV_X64_REGISTER_FS => &mut sregs.fs,
        hv_register_name_HV_X64_REGISTER_GS => &mut sregs.gs,
        hv_register_name_HV_X64_REGISTER_LDTR => &mut sregs.ldt,
        hv_register_name_HV_X64_REGISTER_TR => &mut sregs.tr,
        _ => return None,
    })
}

fn table(sregs: &mut kvm_sregs, name: u32) -> Option<&mut kvm_dtable> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match name {
        hv_register_name_HV_X64_REGISTER_IDTR => Some(&mut sregs.idt),
        hv_register_name_HV_X64_REGISTER_GDTR => Some(&mut sregs.gdt),
        _ => None,
    }
}

fn debug(regs: &mut kvm_debugregs, name: u32) -> Option<&mut u64> {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match name {
        hv_register_name_HV_X64_REGISTER_DR0..=hv_register_name_HV_X64_REGISTER_DR3 => {
            &mut regs.db[(name - hv_register_name_HV_X64_REGISTER_DR0) as usize]
        }
        hv_register_name_HV_X64_REGISTER_DR6 => &mut regs.dr6,
        hv_register_name_HV_X64_REGISTER_DR7 => &mut regs.dr7,
        _ => return None,
    })
}

/// Where a floating point register lies in the legacy XSAVE region, as bytes (Intel SDM vol. 1, table 10-2).
fn legacy_offset(name: u32) -> Option<usize> {
    Some(match name {
        hv_register_name_HV_X64_REGISTER_XMM0..=hv_register_name_HV_X64_REGISTER_XMM15 => {
            160 + 16 * (name - hv_register_name_HV_X64_REGISTER_XMM0) as usize
        }
        hv_register_name_HV_X64_REGISTER_FP_MMX0..=hv_register_name_HV_X64_REGISTER_FP_MMX7 => {
            32 + 16 * (name - hv_register_name_HV_X64_REGISTER_FP_MMX0) as usize
        }
        _ => return None,
    })
}

/// A segment in Hyper-V's form.
pub(crate) fn to_hv_segment(segment: &kvm_segment) -> hv_x64_segment_register {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    let attributes = u16::from(segment.type_ & 15)
        | bit(segment.s, 4)
        | u16::from(segment.dpl & 3) << 5
        | bit(segment.present, 7)
        | bit(segment.avl, 12)
        | bit(segment.l, 13)
        | bit(segment.db, 14)
        | bit(segment.g, 15);
    hv_x64_segment_register {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
    }
}

fn segment_words(segment: &kvm_segment) -> [u64; 2] {
    let hv = to_hv_segment(segment);
    // SAFETY: every member of the union is 16 plain bits.
    let attributes = unsafe { hv.__bindgen_anon_1.attributes };
    [
        hv.base,
        u64::from(hv.limit) | u64::from(hv.selector) << 32 | u64::from(attributes) << 48,
    ]
}

fn set_segment(segment: &mut kvm_segment, [base, rest]: [u64; 2]) {
    let attributes = rest >> 48;
    let bit = |at: u32| (attributes >> at & 1) as u8;
    *segment = kvm_segment {
        base,
        limit: rest as u32,
        selector: (rest >> 32) as u16,
        type_: (attributes & 15) as u8,
        s: bit(4),
        dpl: (attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(7) ^ 1,
        padding: 0,
    };
}

impl<'a> Bank<'a> {
    pub(crate) fn new(vcpu: &'a Vcpu) -> Self {
        Bank {
            vcpu,
            regs: Cached::EMPTY,
            sregs: Cached::EMPTY,
            xsave: Cached::EMPTY,
            xcrs: Cached::EMPTY,
            debug: Cached::EMPTY,
            events: Cached::EMPTY,
            mp_state: Cached::EMPTY,
        }
    }

    /// Writes back what was changed. KVM refuses impossible values, as the hypervisor does.
    pub(crate) fn flush(self) -> Result<(), Status> {
        let vcpu = self.vcpu;
        let mut sregs = self.sregs;
        if let Some(value) = &mut sregs.value {
            // Otherwise KVM would queue again what this holds; pending interrupts are set as events.
            value.interrupt_bitmap = [0; 4];
        }
        let written = (|| {
            sregs.write(|value| vcpu.set_sregs(value))?;
            self.regs.write(|value| vcpu.set_regs(value))?;
            self.xcrs.write(|value| vcpu.set_xcrs(value))?;
            self.xsave.write(|value| vcpu.set_xsave(value))?;
            self.debug.write(|value| vcpu.set_debug_regs(value))?;
            self.mp_state.write(|value| vcpu.set_mp_state(value))?;
            self.events.write(|value| vcpu.set_events(value))
        })();
        written.map_err(|error| {
            note!("register values are refused by KVM: errno {error}");
            status::InvalidRegisterValue
        })
    }

    /// The value of one register.
    pub(crate) fn get(&mut self, state: &VpState, name: u32) -> Result<Value, Status> {
        let vcpu = self.vcpu;
        if name >> 16 == 2 {
            let regs = self.regs.get(|| vcpu.regs())?;
            return general(regs, name)
                .map(|value| (*value).into())
                .ok_or(status::InvalidParameter);
        }
        if let Some(offset) = legacy_offset(name) {
            let area = self.xsave.get(|| vcpu.xsave())?;
            return Ok(Value([pair(area, offset), pair(area, offset + 8)]));
        }
        let sregs = self.sregs.get(|| vcpu.sregs())?;
        if let Some(value) = control(sregs, name) {
            return Ok((*value).into());
        }
        if let Some(segment) = segment(sregs, name) {
            return Ok(Value(segment_words(segment)));
        }
        if let Some(table) = table(sregs, name) {
            return Ok(Value([u64::from(table.limit) << 48, table.base]));
        }
        if let Some(value) = debug(self.debug.get(|| vcpu.debug_regs())?, name) {
            return Ok((*value).into());
        }
        if let Some(msr) = msr_of(name) {
            return Ok(vcpu
                .msr(msr)
                .unwrap_or_else(|_| state.kept(name).0[0])
                .into());
        }
        #[expect(non_upper_case_globals, reason = "names of the TLFS")]
        Ok(match name {
            hv_register_name_HV_X64_REGISTER_FP_CONTROL_STATUS => {
                let area = self.xsave.get(|| vcpu.xsave())?;
                Value([pair(area, 0), pair(area, 8)])
            }
            hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS => {
                let area = self.xsave.get(|| vcpu.xsave())?;
                Value([pair(area, 16), pair(area, 24)])
            }
            hv_register_name_HV_X64_REGISTER_XFEM => {
                self.xcrs.get(|| vcpu.xcrs())?.xcrs[0].value.into()
            }
            hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND => {
                u64::from(state.explicit_suspend).into()
            }
            hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND => {
                u64::from(state.intercept_suspend).into()
            }
            hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE => {
                events::activity(self.mp_state.get(|| vcpu.mp_state())?).into()
            }
            hv_register_name_HV_REGISTER_PENDING_INTERRUPTION => {
                events::pending_interruption(self.events.get(|| vcpu.events())?).into()
            }
            hv_register_name_HV_REGISTER_INTERRUPT_STATE => {
                events::interrupt_state(self.events.get(|| vcpu.events())?).into()
            }
            hv_register_name_HV_REGISTER_PENDING_EVENT0 => {
                Value(events::pending_event(self.events.get(|| vcpu.events())?))
            }
            hv_register_name_HV_REGISTER_VP_INDEX
            | hv_register_name_HV_X64_REGISTER_INITIAL_APIC_ID
            | hv_register_name_HV_X64_REGISTER_APIC_ID => u64::from(state.index).into(),
            hv_register_name_HV_X64_REGISTER_APIC_VERSION => 0x0005_0014.into(),
            hv_register_name_HV_REGISTER_HYPERVISOR_VERSION => {
                Value([0x6583 | 0x000a_0000 << 32, 0])
            }
            hv_register_name_HV_REGISTER_SVERSION => 1.into(),
            hv_register_name_HV_REGISTER_VP_RUNTIME
            | hv_register_name_HV_REGISTER_VP_ROOT_SIGNAL_COUNT => 0.into(),
            hv_register_name_HV_REGISTER_TIME_REF_COUNT => vcpu
                .msr(HV_X64_MSR_TIME_REF_COUNT)
                .unwrap_or_default()
                .into(),
            hv_register_name_HV_REGISTER_PROCESSOR_CLOCK_FREQUENCY => {
                (u64::from(vcpu.tsc_khz().unwrap_or_default().unsigned_abs()) * 1000).into()
            }
            // KVM's local APIC timer counts nanoseconds.
            hv_register_name_HV_REGISTER_INTERRUPT_CLOCK_FREQUENCY => {
                state.timing.apic_timer_hz.into()
            }
            _ if is_kept(name) => state.kept(name),
            _ => {
                note!("register {name:#x} is unknown");
                return Err(status::InvalidParameter);
            }
        })
    }

    /// Sets one register; takes effect with [`Self::flush`].
    pub(crate) fn set(
        &mut self,
        state: &mut VpState,
        name: u32,
        value: Value,
    ) -> Result<(), Status> {
        let vcpu = self.vcpu;
        let Value([low, high]) = value;
        if name >> 16 == 2 {
            let regs = self.regs.change(|| vcpu.regs())?;
            return general(regs, name)
                .map(|slot| *slot = low)
                .ok_or(status::InvalidParameter);
        }
        if let Some(offset) = legacy_offset(name) {
            let area = self.xsave.change(|| vcpu.xsave())?;
            set_pair(area, offset, low);
            set_pair(area, offset + 8, high);
            // The component is in use from now on.
            set_pair(
                area,
                512,
                pair(area, 512) | if offset >= 160 { 2 } else { 1 },
            );
            return Ok(());
        }
        #[expect(non_upper_case_globals, reason = "names of the TLFS")]
        let special = match name {
            hv_register_name_HV_X64_REGISTER_EFER | hv_register_name_HV_X64_REGISTER_APIC_BASE => {
                true
            }
            hv_register_name_HV_X64_REGISTER_XFEM => false,
            _ => matches!(name >> 16, 4 | 6 | 7),
        };
        if special {
            // KVM checks control registers, but not this one.
            if name == hv_register_name_HV_X64_REGISTER_EFER && low & !EFER_DEFINED != 0 {
                note!("EFER: {low:#x} has reserved bits");
                return Err(status::InvalidRegisterValue);
            }
            let sregs = self.sregs.change(|| vcpu.sregs())?;
            return if let Some(slot) = control(sregs, name) {
                *slot = low;
                Ok(())
            } else if let Some(slot) = segment(sregs, name) {
                set_segment(slot, value.0);
                Ok(())
            } else if let Some(slot) = table(sregs, name) {
                (slot.limit, slot.base) = ((low >> 48) as u16, high);
                Ok(())
            } else {
                Err(status::InvalidParameter)
            };
        }
        if name >> 16 == 5 {
            let regs = self.debug.change(|| vcpu.debug_regs())?;
            return debug(regs, name)
                .map(|slot| *slot = low)
                .ok_or(status::InvalidParameter);
        }
        if let Some(msr) = msr_of(name) {
            // Some KVMs take any memory type from user space.
            let types_known = low
                .to_le_bytes()
                .iter()
                .all(|kind| matches!(kind, 0 | 1 | 4..=7));
            if name == hv_register_name_HV_X64_REGISTER_PAT && !types_known {
                note!("PAT: {low:#x} names unknown memory types");
                return Err(status::InvalidRegisterValue);
            }
            if msr == IA32_TSC && !state.timing.tsc_written.swap(true, Ordering::Relaxed) {
                // KVM takes a value close to where the TSC would be by now as meant to be in step, and before Linux 6.7 compares the first
                // one with the zero of creation: one that is far from any goes ahead.
                vcpu.set_msr(msr, low ^ 1 << 60)
                    .map_err(|_| status::InvalidRegisterValue)?;
            }
            return match vcpu.set_msr(msr, low) {
                Ok(()) => Ok(()),
                // A feature that the partition does not have: its register stays at zero, and may be set to it.
                Err(_) if vcpu.msr(msr) == Ok(low) => Ok(()),
                Err(_) if vcpu.msr(msr).is_ok() => {
                    note!("register {name:#x}: value {low:#x} is refused");
                    Err(status::InvalidRegisterValue)
                }
                Err(_) => {
                    state.keep(name, value);
                    Ok(())
                }
            };
        }
        #[expect(non_upper_case_globals, reason = "names of the TLFS")]
        match name {
            hv_register_name_HV_X64_REGISTER_FP_CONTROL_STATUS => {
                let area = self.xsave.change(|| vcpu.xsave())?;
                set_pair(area, 0, low);
                set_pair(area, 8, high);
                set_pair(area, 512, pair(area, 512) | 1);
            }
            hv_register_name_HV_X64_REGISTER_XMM_CONTROL_STATUS => {
                let area = self.xsave.change(|| vcpu.xsave())?;
                set_pair(area, 16, low);
                // The mask tells what the processor can do; it is not set.
                set_pair(area, 24, high & 0xffff_ffff | pair(area, 24) & !0xffff_ffff);
                set_pair(area, 512, pair(area, 512) | 2);
            }
            hv_register_name_HV_X64_REGISTER_XFEM => {
                let xcrs = self.xcrs.change(|| vcpu.xcrs())?;
                xcrs.nr_xcrs = 1;
                xcrs.xcrs[0] = kvm_xcr {
                    xcr: 0,
                    reserved: 0,
                    value: low,
                };
            }
            hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND => state.explicit_suspend = low & 1 != 0,
            hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND => {
                state.intercept_suspend = low & 1 != 0;
            }
            hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE => {
                events::set_activity(self.mp_state.change(|| vcpu.mp_state())?, low)?;
            }
            hv_register_name_HV_REGISTER_PENDING_INTERRUPTION => {
                events::set_pending_interruption(self.events.change(|| vcpu.events())?, low)?;
            }
            hv_register_name_HV_REGISTER_INTERRUPT_STATE => {
                events::set_interrupt_state(self.events.change(|| vcpu.events())?, low)?;
            }
            hv_register_name_HV_REGISTER_PENDING_EVENT0 => {
                events::set_pending_event(self.events.change(|| vcpu.events())?, [low, high])?;
            }
            _ if is_kept(name) => state.keep(name, value),
            _ => {
                note!("register {name:#x} is unknown or cannot be set");
                return Err(status::InvalidParameter);
            }
        }
        Ok(())
    }
}

/// 64 bits of the XSAVE area, by byte offset.
fn pair(area: &XsaveArea, offset: usize) -> u64 {
    u64::from(area[offset / 4]) | u64::from(area[offset / 4 + 1]) << 32
}

fn set_pair(area: &mut XsaveArea, offset: usize, value: u64) {
    area[offset / 4] = value as u32;
    area[offset / 4 + 1] = (value >> 32) as u32;
}
