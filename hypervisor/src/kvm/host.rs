//! What this host's KVM can do, asked once.

use std::sync::OnceLock;

use arch::x86_64::cpu_model::FEATURE_MSRS;
use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::Msr;
use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NESTED_STATE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_SREGS2,
    KVM_CAP_SYS_HYPERV_CPUID, KVM_CAP_TSC_CONTROL, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_XCRS, KVM_CAP_XSAVE2,
    KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, Msrs, kvm_msr_entry,
};

use super::{call, cpuid, ioctl};
use crate::{Error, Result};

/// XSTATE component 18, AMX tile data (SDM vol. 1, section 13.1): the only one that needs a permission.
const XSTATE_TILE_DATA: u32 = 18;

/// The opened `/dev/kvm` with its answers.
pub(crate) struct Host {
    /// The device.
    pub fd: kvm_ioctls::Kvm,
    /// Flags for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0 without manual protection.
    pub dirty_protect: u64,
    /// KVM_GET_CLOCK and KVM_SET_CLOCK know CLOCK_REALTIME.
    pub clock_realtime: bool,
    /// KVM_CAP_TSC_CONTROL.
    pub tsc_scaling: bool,
    /// KVM_GET_SREGS2.
    pub sregs2: bool,
    /// KVM_CAP_EXCEPTION_PAYLOAD.
    pub exception_payload: bool,
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT.
    pub triple_fault_event: bool,
    /// KVM_CAP_XCRS.
    pub xcrs: bool,
    /// KVM_CAP_DEBUGREGS.
    pub debug_registers: bool,
    /// Flags for KVM_CAP_X2APIC_API; 0 without.
    pub x2apic_api: u64,
    /// KVM_CAP_TSC_DEADLINE_TIMER.
    pub tsc_deadline: bool,
    /// KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    pub apic_bus_cycles: bool,
    /// Bytes of an XSAVE area here.
    pub xsave_size: usize,
    /// Bytes of the largest nested state, 0 when KVM does not even report it.
    pub nested_size: usize,
    supported: OnceLock<Cpuid>,
    msrs: OnceLock<Vec<u32>>,
    nested_works: OnceLock<bool>,
}

impl Host {
    /// Asks `fd` all that a machine needs to know.
    pub(crate) fn new(fd: kvm_ioctls::Kvm) -> Result<Self> {
        // A kernel without dynamic XSTATE, or a CPU without AMX, refuses: then AMX is not offered, see `supported_cpuid`.
        if let Err(error) = ioctl::request_guest_xstate(XSTATE_TILE_DATA) {
            tracing::debug!(%error, "guests get no AMX tile data here");
        }
        let ask =
            |capability: u32| u64::try_from(fd.check_extension_raw(capability.into())).unwrap_or(0);
        if ask(KVM_CAP_SPLIT_IRQCHIP) == 0 {
            return Err(Error::Missing {
                what: "KVM_CAP_SPLIT_IRQCHIP (Linux 4.5 or later has it)",
            });
        }
        let dirty_protect = ask(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
            & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let x2apic_api = if ask(KVM_CAP_X2APIC_API) == 0 {
            0
        } else {
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
        };
        let size = |capability| usize::try_from(ask(capability)).unwrap_or(0);
        Ok(Self {
            dirty_protect,
            clock_realtime: ask(KVM_CAP_ADJUST_CLOCK) & u64::from(KVM_CLOCK_REALTIME) != 0,
            tsc_scaling: ask(KVM_CAP_TSC_CONTROL) != 0,
            sregs2: ask(KVM_CAP_SREGS2) != 0,
            exception_payload: ask(KVM_CAP_EXCEPTION_PAYLOAD) != 0,
            triple_fault_event: ask(KVM_CAP_X86_TRIPLE_FAULT_EVENT) != 0,
            xcrs: ask(KVM_CAP_XCRS) != 0,
            debug_registers: ask(KVM_CAP_DEBUGREGS) != 0,
            x2apic_api,
            tsc_deadline: ask(KVM_CAP_TSC_DEADLINE_TIMER) != 0,
            apic_bus_cycles: ask(KVM_CAP_X86_APIC_BUS_CYCLES_NS) != 0,
            xsave_size: size(KVM_CAP_XSAVE2).max(ioctl::XSAVE_MIN),
            nested_size: size(KVM_CAP_NESTED_STATE),
            supported: OnceLock::new(),
            msrs: OnceLock::new(),
            nested_works: OnceLock::new(),
            fd,
        })
    }

    /// Everything CPUID can show a guest here; asked of KVM once, since each leaf may cost it an exit of its own.
    pub(crate) fn supported_cpuid(&self) -> Result<&Cpuid> {
        if let Some(known) = self.supported.get() {
            return Ok(known);
        }
        let answer = self
            .fd
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let offered = cpuid::offered(cpuid::from_kvm(answer.as_slice()), self.tsc_deadline);
        Ok(self.supported.get_or_init(|| offered))
    }

    /// Hyper-V's leaves that KVM can back; none before Linux 5.11, which asks a vCPU for them.
    pub(crate) fn enlightenments(&self) -> Result<Cpuid> {
        if self.fd.check_extension_raw(KVM_CAP_SYS_HYPERV_CPUID.into()) <= 0 {
            return Ok(Cpuid::default());
        }
        let table =
            ioctl::supported_hyperv_cpuid(&self.fd).map_err(call("KVM_GET_SUPPORTED_HV_CPUID"))?;
        Ok(cpuid::from_kvm(table.as_slice()))
    }

    /// The MSRs that are saved and restored here, sorted.
    pub(crate) fn msr_indices(&self) -> Result<&[u32]> {
        if let Some(known) = self.msrs.get() {
            return Ok(known);
        }
        let list = self
            .fd
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let indices = super::state::msrs::with_unlisted(list.as_slice());
        Ok(self.msrs.get_or_init(|| indices))
    }

    /// The registers of KVM's feature list that a CPU model can decide, with all that this host can give.
    pub(crate) fn feature_msrs(&self) -> Result<Vec<Msr>> {
        let list = self
            .fd
            .get_msr_feature_index_list()
            .map_err(call("KVM_GET_MSR_FEATURE_INDEX_LIST"))?;
        let mut registers = Vec::new();
        for index in FEATURE_MSRS {
            if !list.as_slice().contains(&index) {
                continue;
            }
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut table = Msrs::from_entries(&[entry])
                .map_err(|_| Error::Invalid("one MSR is too many for one call".into()))?;
            if self.fd.get_msrs(&mut table).map_err(call("KVM_GET_MSRS"))? == 1 {
                registers.extend(table.as_slice().iter().map(|entry| Msr {
                    index,
                    value: entry.data,
                }));
            }
        }
        Ok(registers)
    }

    /// Frequency of a guest's TSC in kHz; nothing on a host whose TSC is not stable. Asks a throw-away vCPU.
    pub(crate) fn tsc_khz(&self) -> Result<Option<u32>> {
        let vm = self.fd.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        Ok(vcpu.get_tsc_khz().ok().filter(|&khz| khz != 0))
    }

    /// Whether nested state can really be read: reported, of use to a guest, and tried on a throw-away vCPU.
    ///
    /// A KVM without hardware virtualisation reports the capability and then fails each call. The trial is made at
    /// most once, and only where CPUID offers VMX or SVM, so it costs nothing on other hosts.
    pub(crate) fn nested_works(&self) -> bool {
        *self.nested_works.get_or_init(|| {
            self.nested_size != 0
                && self
                    .supported_cpuid()
                    .is_ok_and(cpuid::offers_virtualisation)
                && self.try_nested().is_ok()
        })
    }

    fn try_nested(&self) -> std::io::Result<()> {
        let vm = self.fd.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        ioctl::get_nested_state(&vcpu, self.nested_size).map(drop)
    }
}
