//! The state of a vCPU that comes into a machine which already runs, or has gone from it.

use super::msr::{IA32_TSC, IA32_TSC_ADJUST};
use super::state::{Bytes, VcpuState};

/// The local APIC's id register (SDM vol. 3, table 11-1), whose upper byte is the id.
const LAPIC_ID: usize = 0x20;
/// Hyper-V's registers, and those among them that each processor has for itself (TLFS, chapter 12 on: APIC access, assist page, synthetic
/// interrupts and timers). The others belong to the machine, or only describe the processor.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
const HYPERV_OWN: std::ops::RangeInclusive<u32> = 0x4000_0070..=0x4000_00ff;

/// What an application processor is after reset. What it shares with the running machine is not part of it, so that a restore leaves that
/// alone: the TSC, which runs in step with the others', its frequency, and what Hyper-V's interface keeps once for all.
#[derive(Clone, Debug)]
pub struct FreshState(VcpuState);

impl FreshState {
    /// From the state of an application processor that has never run.
    pub fn new(mut never_run: VcpuState) -> Self {
        never_run.tsc_khz = None;
        never_run.msrs.retain(|msr| {
            !matches!(msr.index, IA32_TSC | IA32_TSC_ADJUST)
                && (!HYPERV.contains(&msr.index) || HYPERV_OWN.contains(&msr.index))
        });
        Self(never_run)
    }

    /// That of vCPU `id`.
    pub fn of(&self, id: u32) -> VcpuState {
        let mut state = self.0.clone();
        state.id = id;
        if let Some(lapic) = &mut state.lapic {
            let Bytes(page) = &mut lapic.registers;
            // After reset it is in xAPIC mode.
            if let Some(register) = page.get_mut(LAPIC_ID..LAPIC_ID + 4) {
                register.copy_from_slice(&(id << 24).to_le_bytes());
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::state::{Activity, Lapic, Msr};

    #[test]
    fn what_belongs_to_the_machine_is_left_out() {
        let msr = |index| Msr { index, value: 7 };
        let never_run = VcpuState {
            id: 1,
            tsc_khz: Some(1),
            activity: Activity::Uninitialized,
            msrs: [
                0x10,
                0x3b,
                0x277,
                0x4000_0000,
                0x4000_0001,
                0x4000_0021,
                0x4000_0073,
                0x4b56_4d01,
            ]
            .map(msr)
            .to_vec(),
            lapic: Some(Lapic {
                registers: Bytes(vec![1; 1024]),
            }),
            ..VcpuState::default()
        };
        let state = FreshState::new(never_run).of(5);
        assert_eq!((state.id, state.tsc_khz), (5, None));
        assert_eq!(state.activity, Activity::Uninitialized);
        assert_eq!(state.msrs, [0x277, 0x4000_0073, 0x4b56_4d01].map(msr));
        let page = state.lapic.expect("kept").registers.0;
        assert_eq!(page[0x1f..0x25], [1, 0, 0, 0, 5, 1]);
    }
}
