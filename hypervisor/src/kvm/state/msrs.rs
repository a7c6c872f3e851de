//! Model-specific registers.
//!
//! Saved is what the host lists (KVM_GET_MSR_INDEX_LIST) and what KVM keeps per vCPU without listing it ([`UNLISTED`]); of that, what
//! can be read. Which those are is remembered per machine, so that a pause costs one call for 256 registers, not one more for
//! each register that fails.
//!
//! A restore sets all of them, and goes on after one that KVM refuses if nothing is lost by it: the vCPU already has the value
//! (feature registers such as IA32_ARCH_CAPABILITIES, which some hosts let nobody set), or the register does not exist here and
//! was zero. Otherwise the restore is refused by the register's name.
//!
//! # The time-stamp counter
//!
//! IA32_TSC is written as it was read. KVM takes a write that lies within a second of where the machine's TSC would be by
//! now as meant to be the same TSC, and gives that vCPU the first one's offset. All vCPUs are saved after all
//! have stopped, so the first one's value is at or past everything that any vCPU has seen: the guest's TSC is
//! synchronised again and never goes back. For the very first write of a machine that comparison is with the zero that it was
//! created with (before Linux 6.7), so another value, far away, is written before. The time that the machine stood still has been added to the values
//! beforehand (`arch::x86_64::msr::advance_tsc`). A guest that had set its TSCs less than a second apart gets them synchronised.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use arch::x86_64::state::{Msr, StateElement, VcpuState};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::refused;
use crate::kvm::call;
use crate::kvm::vcpu::KvmVcpu;
use crate::msr::{IA32_TSC, cannot_have_used, in_order, refusal};
use crate::{Error, Result};

/// Writing these makes KVM write the time to guest memory, at an address that the guest may use otherwise by now. A
/// guest writes them anew before each reading (Documentation/virt/kvm/x86/msr.rst).
const KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// Most registers of one call: KVM refuses its own maximum (Linux `arch/x86/kvm/x86.c`, `MAX_IO_MSRS`, is 256, and so many are too many).
const ONE_CALL: usize = 255;
/// A time-stamp far from any other.
const FAR_AWAY: u64 = 1 << 60;

/// Registers that KVM keeps for each vCPU but does not list (SDM vol. 4, chapter 2; APM vol. 2, appendix A): IA32_DEBUGCTL, the MTRRs (8
/// variable ranges, 11 fixed ones, the default type), four registers for each of KVM's 32 machine-check banks, TSC_AUX (which it lists only
/// where its processor has RDTSCP), and AMD's two of OS-visible workarounds.
const UNLISTED: [std::ops::RangeInclusive<u32>; 9] = [
    0x1d9..=0x1d9,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
    0x400..=0x47f,
    0xc000_0103..=0xc000_0103,
    0xc001_0140..=0xc001_0141,
];

/// The host's list with what it leaves out, sorted, each once.
pub(crate) fn with_unlisted(listed: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = listed
        .iter()
        .copied()
        .chain(UNLISTED.into_iter().flatten())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Which registers a machine's vCPUs can read, once one of them has tried.
#[derive(Default)]
pub(crate) struct ReadableMsrs(Mutex<Option<Arc<[u32]>>>);

impl ReadableMsrs {
    fn known(&self) -> Option<Arc<[u32]>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn learn(&self, indices: impl Iterator<Item = u32>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(indices.collect());
    }

    /// Something has changed what can be read.
    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

pub(super) fn save(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    let known = vcpu.vm.readable_msrs.known();
    let indices = match &known {
        Some(known) => known,
        None => vcpu.vm.host.msr_indices()?,
    };
    state.msrs = read(&vcpu.fd, indices)?;
    if state.msrs.len() != indices.len() || known.is_none() {
        vcpu.vm
            .readable_msrs
            .learn(state.msrs.iter().map(|msr| msr.index));
    }
    Ok(())
}

/// Reads those of `indices` that can be read. KVM stops at the first that cannot and says how far it came.
fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(ONE_CALL)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut table = table(&entries)?;
        let done = vcpu
            .get_msrs(&mut table)
            .map_err(call("KVM_GET_MSRS"))?
            .min(batch.len());
        values.extend(table.as_slice()[..done].iter().map(|e| Msr {
            index: e.index,
            value: e.data,
        }));
        // If it stopped early, the one it stopped at is passed over.
        rest = &rest[(done + usize::from(done < batch.len()))..];
    }
    Ok(values)
}

pub(super) fn restore(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let mut ordered = in_order(&state.msrs);
    ordered.retain(|msr| !KVM_WALL_CLOCK.contains(&msr.index));
    if !vcpu.vm.tsc_written.swap(true, Ordering::Relaxed)
        && let Some(at) = ordered.iter().position(|msr| msr.index == IA32_TSC)
    {
        let value = ordered[at].value ^ FAR_AWAY;
        ordered.insert(
            at,
            Msr {
                index: IA32_TSC,
                value,
            },
        );
    }
    let mut rest = &ordered[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(ONE_CALL)];
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let done = vcpu
            .fd
            .set_msrs(&table(&entries)?)
            .map_err(call("KVM_SET_MSRS"))?
            .min(batch.len());
        if let Some(&stopped_at) = batch.get(done) {
            tolerate(vcpu, stopped_at)?;
        }
        rest = &rest[(done + usize::from(done < batch.len()))..];
    }
    Ok(())
}

/// Whether nothing is lost by not setting a register that KVM has refused.
fn tolerate(vcpu: &KvmVcpu, wanted: Msr) -> Result<()> {
    let here = read(&vcpu.fd, &[wanted.index])?
        .first()
        .map(|msr| msr.value);
    match here {
        Some(value) if value == wanted.value => Ok(()),
        None if wanted.value == 0 => Ok(()),
        _ if cannot_have_used(wanted) => Ok(()),
        here => Err(refused(vcpu, StateElement::Msrs, refusal(wanted, here))),
    }
}

fn table(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries)
        .map_err(|_| Error::Invalid(format!("{} MSRs are too many for one call", entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sorted_and_has_each_register_once() {
        let all = with_unlisted(&[0xc000_0081, 0x277, 0x2ff, 0x10]);
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(
            [0x10, 0x277, 0x2ff, 0x20f, 0x47f, 0xc000_0081]
                .iter()
                .all(|index| all.binary_search(index).is_ok())
        );
    }
}
