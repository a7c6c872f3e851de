//! A partition's time: it stands still while no VP is inside `run`.
//!
//! ```text
//!   created: frozen ──► first VP enters run: runs ──► last VP leaves run: frozen ──► …
//! ```
//!
//! The hypervisor can freeze TSCs and reference time of all VPs together (HV_PARTITION_PROPERTY_TIME_FREEZE). While they are frozen, the TSCs
//! of several VPs are read at one moment and written for one moment, so a restored guest's TSCs are as synchronised as they
//! were; and the reference time may be set.

use std::sync::{Mutex, PoisonError};

use arch::x86_64::state::MachineClock;
use mshv_bindings::{
    hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_CLOCK_FREQUENCY as PROCESSOR_CLOCK_FREQUENCY,
    hv_partition_property_code_HV_PARTITION_PROPERTY_REFERENCE_TIME as REFERENCE_TIME,
    hv_partition_property_code_HV_PARTITION_PROPERTY_TIME_FREEZE as TIME_FREEZE,
};
use mshv_ioctls::VmFd;

use super::call;
use crate::Result;

/// Nanoseconds of a unit of the reference time.
const UNIT_NS: u64 = 100;

/// How many VPs are inside `run`.
#[derive(Default)]
pub(crate) struct Running(Mutex<u32>);

impl Running {
    /// A partition whose time stands still from now on.
    pub(crate) fn frozen(fd: &VmFd) -> Result<Self> {
        freeze(fd, true)?;
        Ok(Self::default())
    }

    /// A VP enters `run`.
    pub(crate) fn enter(&self, fd: &VmFd) -> Result<()> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *running == 0 {
            freeze(fd, false)?;
        }
        *running += 1;
        Ok(())
    }

    /// A VP leaves `run`.
    pub(crate) fn leave(&self, fd: &VmFd) -> Result<()> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *running = running.saturating_sub(1);
        if *running == 0 {
            freeze(fd, true)?;
        }
        Ok(())
    }
}

fn freeze(fd: &VmFd, frozen: bool) -> Result<()> {
    fd.set_partition_property(TIME_FREEZE, frozen.into())
        .map_err(call("HV_PARTITION_PROPERTY_TIME_FREEZE"))
}

/// See [`crate::Vm::clock`].
pub(crate) fn clock(fd: &VmFd) -> Result<MachineClock> {
    let units = fd
        .get_partition_property(REFERENCE_TIME)
        .map_err(call("HV_PARTITION_PROPERTY_REFERENCE_TIME"))?;
    Ok(MachineClock {
        guest_ns: units.saturating_mul(UNIT_NS),
        host_realtime_ns: Some(crate::realtime_ns()),
        host_tsc: None,
    })
}

/// See [`crate::Vm::set_clock`]. The partition's time is frozen.
pub(crate) fn set_clock(fd: &VmFd, clock: &MachineClock) -> Result<()> {
    fd.set_partition_property(
        REFERENCE_TIME,
        advanced(clock, crate::realtime_ns()) / UNIT_NS,
    )
    .map_err(call("HV_PARTITION_PROPERTY_REFERENCE_TIME"))
}

/// The guest's time now, in nanoseconds.
fn advanced(clock: &MachineClock, now_ns: u64) -> u64 {
    let passed = clock
        .host_realtime_ns
        .map_or(0, |then| now_ns.saturating_sub(then));
    clock.guest_ns.saturating_add(passed)
}

/// Frequency of the partition's TSC in kHz, where it is known.
pub(crate) fn tsc_khz(fd: &VmFd) -> Option<u32> {
    let hz = fd.get_partition_property(PROCESSOR_CLOCK_FREQUENCY).ok()?;
    u32::try_from(hz / 1000).ok().filter(|&khz| khz != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_advances_by_the_real_time_passed_and_never_goes_back() {
        let clock = MachineClock {
            guest_ns: 1000,
            host_realtime_ns: Some(50),
            host_tsc: None,
        };
        assert_eq!(advanced(&clock, 80), 1030);
        assert_eq!(advanced(&clock, 20), 1000);
        let unknown = MachineClock {
            host_realtime_ns: None,
            ..clock
        };
        assert_eq!(advanced(&unknown, 80), 1000);
    }
}
