//! What this host's Microsoft hypervisor can do, asked once.

use std::sync::OnceLock;

use arch::x86_64::cpuid::Cpuid;
use mshv_bindings::{
    HV_PARTITION_PROCESSOR_FEATURES_BANKS as FEATURE_BANKS, MSHV_NUM_CPU_FEATURES_BANKS,
    MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES, MSHV_PT_BIT_GPA_SUPER_PAGES, MSHV_PT_BIT_LAPIC,
    MSHV_PT_BIT_X2APIC, MSHV_PT_ISOLATION_NONE,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0 as PROCESSOR_FEATURES0,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1 as PROCESSOR_FEATURES1,
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_XSAVE_FEATURES as XSAVE_FEATURES,
    hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES as SYNTHETIC_FEATURES,
    hv_register_name_HV_REGISTER_INTERRUPT_CLOCK_FREQUENCY as INTERRUPT_CLOCK_FREQUENCY,
    mshv_create_partition_v2,
};
use mshv_ioctls::{Mshv, MshvError, VmFd};

use super::{call, cpuid, registers};
use crate::{Error, Result};

/// HV_PARTITION_SYNTHETIC_PROCESSOR_FEATURES (TLFS; Linux `include/hyperv/hvhdk.h`): what a guest gets of Hyper-V's interface.
///
/// That there is a hypervisor (0) with the interface "Hv#1" (1); reference counter (3), reference TSC (9) and frequencies (11): the
/// means to tell the time, which every guest needs where no timer chip is emulated; hypercall page (7) and VP index (8), without which
/// Linux takes none of it, and the interrupt controller's registers (6), to which the assist page belongs that it sets up then.
///
/// Not among them: SynIC and synthetic timers (4, 5), flushes and idle registers. Their state would have to move too, and a guest has
/// local APIC, timer and IPIs without them.
const SYNTHETIC: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11;

/// The same for a guest that sees no such interface: only that there is a hypervisor (0).
const BARE: u64 = 1;

/// CPUID.1:ECX.TSC_DEADLINE. Not offered: the hypervisor is known to lose its interrupts for guests that did not come through firmware
/// (OpenVMM hides it too), and a lost one is a guest that hangs.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// The opened `/dev/mshv` with its answers.
pub(crate) struct Host {
    /// The device.
    pub fd: Mshv,
    features: [u64; 2],
    xsave_features: u64,
    asked: OnceLock<Asked>,
}

/// What only a VP can tell.
struct Asked {
    cpuid: Cpuid,
    msrs: Vec<u32>,
    apic_timer_hz: Option<u64>,
    tsc_khz: Option<u32>,
}

impl Host {
    /// Asks `fd` all that a partition needs to know before it is made.
    pub(crate) fn new(fd: Mshv) -> Result<Self> {
        const { assert!(MSHV_NUM_CPU_FEATURES_BANKS == 2 && FEATURE_BANKS == 2) };
        let ask = |code, operation| match fd.get_host_partition_property(code) {
            // The first drivers pass hypercalls on for partitions only.
            Err(MshvError::Errno(errno)) if errno.errno() == libc::ENOTTY => Err(Error::Missing {
                what: "hypercalls through /dev/mshv itself (MSHV_ROOT_HVCALL), which the driver of Linux 6.15 does not \
                       have yet: use a newer kernel",
            }),
            answer => answer.map_err(call(operation)),
        };
        Ok(Self {
            features: [
                ask(
                    PROCESSOR_FEATURES0,
                    "HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0",
                )?,
                ask(
                    PROCESSOR_FEATURES1,
                    "HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1",
                )?,
            ],
            xsave_features: ask(
                XSAVE_FEATURES,
                "HV_PARTITION_PROPERTY_PROCESSOR_XSAVE_FEATURES",
            )?,
            asked: OnceLock::new(),
            fd,
        })
    }

    /// Makes a partition and initialises it: local APICs in the hypervisor, every processor feature that the host has, and, if
    /// `hyperv`, the means to tell the time.
    pub(crate) fn create_partition(&self, hyperv: bool) -> Result<VmFd> {
        let flags = [
            MSHV_PT_BIT_LAPIC,
            MSHV_PT_BIT_X2APIC,
            MSHV_PT_BIT_GPA_SUPER_PAGES,
            MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES,
        ];
        // The banks say which features are *not* there.
        let arguments = mshv_create_partition_v2 {
            pt_flags: flags.iter().fold(0, |flags, bit| flags | 1 << bit),
            pt_isolation: MSHV_PT_ISOLATION_NONE.into(),
            pt_num_cpu_fbanks: MSHV_NUM_CPU_FEATURES_BANKS as u16,
            pt_cpu_fbanks: self.features.map(|features| !features),
            pt_disabled_xsave: !self.xsave_features,
            ..Default::default()
        };
        let partition = self
            .fd
            .create_vm_with_args(&arguments)
            .map_err(call("MSHV_CREATE_PARTITION"))?;
        // An early property: only between creation and initialisation.
        partition
            .set_partition_property(SYNTHETIC_FEATURES, if hyperv { SYNTHETIC } else { BARE })
            .map_err(call("HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES"))?;
        partition
            .initialize()
            .map_err(call("MSHV_INITIALIZE_PARTITION"))?;
        Ok(partition)
    }

    /// Everything CPUID can show a guest here.
    pub(crate) fn supported_cpuid(&self) -> Result<&Cpuid> {
        Ok(&self.asked()?.cpuid)
    }

    /// The MSRs that are saved and restored here, sorted.
    pub(crate) fn msr_indices(&self) -> Result<&[u32]> {
        Ok(&self.asked()?.msrs)
    }

    /// Frequency of the local APIC's timer, if the hypervisor says it.
    pub(crate) fn apic_timer_hz(&self) -> Result<Option<u64>> {
        Ok(self.asked()?.apic_timer_hz)
    }

    /// Frequency of a guest's TSC in kHz, if the hypervisor says it.
    pub(crate) fn tsc_khz(&self) -> Result<Option<u32>> {
        Ok(self.asked()?.tsc_khz)
    }

    /// Asks a VP of a partition that is thrown away again.
    fn asked(&self) -> Result<&Asked> {
        if let Some(asked) = self.asked.get() {
            return Ok(asked);
        }
        let partition = self.create_partition(true)?;
        let vp = partition.create_vcpu(0).map_err(call("MSHV_CREATE_VP"))?;
        let mut cpuid = cpuid::enumerate(&vp)?;
        if let Some(leaf) = cpuid.get_mut(1, 0) {
            leaf.ecx &= !LEAF1_ECX_TSC_DEADLINE;
        }
        let asked = Asked {
            cpuid,
            msrs: super::state::msrs::readable(&vp)?,
            tsc_khz: super::time::tsc_khz(&partition),
            apic_timer_hz: registers::read(&vp, &[INTERRUPT_CLOCK_FREQUENCY])
                .ok()
                .and_then(|values| values.first().map(|words| words[0]))
                .filter(|&hz| hz != 0),
        };
        Ok(self.asked.get_or_init(|| asked))
    }
}
