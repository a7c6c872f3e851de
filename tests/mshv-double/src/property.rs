//! Partition properties (TLFS, HV_PARTITION_PROPERTY_CODE): the host's and the guest's.

use kvm_bindings::kvm_clock_data;
use mshv_bindings::*;

use crate::cpuid::{self, Features, synthetic};
use crate::partition::{Host, Inner, Partition};
use crate::status::{self, Status};
use crate::sys::note;
use crate::vp::lock;
use crate::xsave::Layout;

/// HV_PARTITION_PROCESSOR_VENDOR.
fn vendor(host: &Host) -> u64 {
    match cpuid::find(&host.cpuid, 0, 0).map(|leaf| leaf.ebx.to_le_bytes()) {
        Some(name) if &name == b"Genu" => 1,
        Some(name) if &name == b"Hygo" => 2,
        _ => 0,
    }
}

/// Properties that follow from features and processor, for the host and for a partition alike.
fn of_processor(host: &Host, features: &Features, code: u32) -> Option<u64> {
    let address_bits =
        || u64::from(cpuid::find(&host.cpuid, 0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff));
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    Some(match code {
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_VENDOR => vendor(host),
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0
        | hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES_DEPRECATED => {
            features.processor[0]
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1 => {
            features.processor[1]
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_XSAVE_FEATURES => features.xsave,
        hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES => {
            features.synthetic
        }
        // CPUID.1:EBX[15:8], in units of 8 bytes.
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_CL_FLUSH_SIZE => {
            u64::from(cpuid::find(&host.cpuid, 1, 0).map_or(8, |leaf| leaf.ebx >> 8 & 0xff))
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_PHYSICAL_ADDRESS_WIDTH
        | hv_partition_property_code_HV_PARTITION_PROPERTY_IMPLEMENTED_PHYSICAL_ADDRESS_BITS => {
            address_bits()
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_XSAVE_STATES => features.xsave_states(),
        hv_partition_property_code_HV_PARTITION_PROPERTY_MAX_XSAVE_DATA_SIZE => {
            Layout::new(&host.cpuid, features.xsave_states()).size as u64
        }
        // HV_COMPATIBILITY_21_H2.
        hv_partition_property_code_HV_PARTITION_PROPERTY_COMPATIBILITY_VERSION => 0x0006_0000,
        _ => return None,
    })
}

/// HvCallGetPartitionProperty for the host itself.
pub(crate) fn get_host(host: &Host, code: u32) -> Result<u64, Status> {
    of_processor(host, &host.features, code).ok_or_else(|| {
        note!("host property {code:#x} is unknown");
        status::UnknownProperty
    })
}

/// Properties that are kept without an effect, and may be read back.
fn is_kept(code: u32) -> bool {
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    {
        matches!(
            code,
            hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_RESERVE
                ..=hv_partition_property_code_HV_PARTITION_PROPERTY_CPU_GROUP_ID
                | hv_partition_property_code_HV_PARTITION_PROPERTY_ZERO_MEMORY_ON_RESET
                | hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSORS_PER_SOCKET
                | hv_partition_property_code_HV_PARTITION_PROPERTY_NON_ARCHITECTURAL_CORE_SHARING
                | hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION
        )
    }
}

/// What is asked of KVM's first vCPU, which must not be inside KVM_RUN: it may sleep there for good, and the hypervisor answers at once. The
/// partition's lock is not held meanwhile, which a VP may need to get out.
fn of_first_vp(partition: &Partition, code: u32) -> Option<Result<u64, Status>> {
    let first = partition.vp(0);
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match code {
        hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_CLOCK_FREQUENCY => Some(
            first
                .map_err(|_| status::InvalidPartitionState)
                .map(|vp| vp.visit(|_| vp.vcpu.tsc_khz()))
                .map(|khz| u64::from(khz.unwrap_or_default().unsigned_abs()) * 1000),
        ),
        hv_partition_property_code_HV_PARTITION_PROPERTY_GUEST_OS_ID => Some(Ok(first
            .ok()
            .and_then(|vp| vp.visit(|_| vp.vcpu.msr(HV_X64_MSR_GUEST_OS_ID)).ok())
            .unwrap_or(0))),
        _ => None,
    }
}

/// HvCallGetPartitionProperty.
pub(crate) fn get(partition: &Partition, code: u32) -> Result<u64, Status> {
    if let Some(value) = of_first_vp(partition, code) {
        return value;
    }
    let inner = lock(&partition.inner);
    if let Some(value) = of_processor(&partition.host, &inner.features, code) {
        return Ok(value);
    }
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match code {
        hv_partition_property_code_HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING => {
            let memory = partition
                .memory
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(u64::from(memory.tracking()))
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_TIME_FREEZE => {
            Ok(u64::from(partition.frozen()))
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_REFERENCE_TIME => {
            Ok(clock(partition, &inner)? / 100)
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_PRIVILEGE_FLAGS => Ok(0),
        _ if is_kept(code) => Ok(inner.properties.get(&code).copied().unwrap_or(0)),
        _ => {
            note!("partition property {code:#x} is unknown");
            Err(status::UnknownProperty)
        }
    }
}

/// The partition's reference time in nanoseconds: KVM's clock, on which its reference counter MSR runs as well.
fn clock(partition: &Partition, inner: &Inner) -> Result<u64, Status> {
    match inner.frozen_clock {
        Some(clock) => Ok(clock),
        None => partition
            .vm
            .clock()
            .map(|data| data.clock)
            .map_err(|_| status::OperationFailed),
    }
}

fn set_clock(partition: &Partition, clock: u64) -> Result<(), Status> {
    let data = kvm_clock_data {
        clock,
        ..Default::default()
    };
    partition
        .vm
        .set_clock(&data)
        .map_err(|_| status::OperationFailed)
}

/// HvCallSetPartitionProperty.
pub(crate) fn set(partition: &Partition, code: u32, value: u64) -> Result<(), Status> {
    let mut inner = lock(&partition.inner);
    let flag = |value: u64| match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => {
            note!("partition property {code:#x}: {value:#x} is out of range");
            Err(status::PropertyValueOutOfRange)
        }
    };
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match code {
        hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES => {
            if inner.initialized {
                note!("synthetic features are set after the partition was initialized");
                return Err(status::InvalidPartitionState);
            }
            if value & synthetic::RESERVED != 0 {
                note!("synthetic features {value:#x} have reserved bits");
                return Err(status::InvalidParameter);
            }
            inner.features.synthetic = value;
            Ok(())
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION => {
            let ignore = flag(value)?;
            partition.set_ignores_unknown_msrs(ignore);
            inner.properties.insert(code, value);
            Ok(())
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING => {
            if !inner.initialized {
                return Err(status::InvalidPartitionState);
            }
            // Bit 1 is the granularity: 0 is 4 KiB, the only one here.
            let on = flag(value)?;
            let mut memory = partition
                .memory
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            memory.track(&partition.vm, on)
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_TIME_FREEZE => {
            let freeze = flag(value)?;
            if freeze == partition.frozen() {
                return Ok(());
            }
            if freeze {
                partition.set_frozen(true);
                inner.frozen_clock = Some(clock(partition, &inner)?);
            } else {
                if let Some(frozen) = inner.frozen_clock.take() {
                    set_clock(partition, frozen)?;
                }
                partition.set_frozen(false);
            }
            Ok(())
        }
        hv_partition_property_code_HV_PARTITION_PROPERTY_REFERENCE_TIME => {
            let nanoseconds = value
                .checked_mul(100)
                .ok_or(status::PropertyValueOutOfRange)?;
            match &mut inner.frozen_clock {
                Some(frozen) => {
                    *frozen = nanoseconds;
                    Ok(())
                }
                None => set_clock(partition, nanoseconds),
            }
        }
        _ if is_kept(code) => {
            inner.properties.insert(code, value);
            Ok(())
        }
        _ if of_processor(&partition.host, &inner.features, code).is_some() => {
            note!("partition property {code:#x} cannot be set");
            Err(status::OperationDenied)
        }
        _ => {
            note!("partition property {code:#x} is unknown");
            Err(status::UnknownProperty)
        }
    }
}

/// HvCallGetPartitionPropertyEx: the extended properties, as the bytes of the output.
pub(crate) fn get_extended(code: u32) -> Result<Vec<u8>, Status> {
    // Both are banks: how many, three reserved words, the banks.
    let banked = |bank: u64| [1u64.to_le_bytes(), bank.to_le_bytes()].concat();
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match code {
        // Bit 4: synthetic features can be asked for one by one.
        hv_partition_property_code_HV_PARTITION_PROPERTY_VMM_CAPABILITIES => Ok(banked(1 << 4)),
        hv_partition_property_code_HV_PARTITION_PROPERTY_ASSIGNABLE_SYNTHETIC_PROC_FEATURES => {
            Ok(banked(!synthetic::RESERVED))
        }
        _ => {
            note!("extended property {code:#x} is unknown");
            Err(status::UnknownProperty)
        }
    }
}
