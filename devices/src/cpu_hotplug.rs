//! Telling a guest of vCPUs that come, and hearing from it of those that may go: the registers that the DSDT's methods use.
//!
//! ```text
//!              resize: present, inserted                    _OST success: settled
//!   absent ──────────────────────────────► waiting ───────────────────────────► present
//!     ▲                                                                          │   ▲
//!     │                                                   resize: leaving, asked │   │ resize: the asking is taken back
//!     │              _EJ0                                                        ▼   │
//!     └──────────────────────────────────────────────────────────────────────── asked ── _OST with a failure ──► refused (still present)
//! ```
//!
//! A guest may eject what it was not asked for, except the boot processor; and it may never answer: what is known then is that it has not.
//! The newest [`CpuHotplug::resize`] counts. A vCPU that the guest lets go although the asking has been taken back is absent, and comes again
//! with the next resize.
//!
//! Registers of 32 bits, in four rows of eight words with a bit for each vCPU, each row 32 bytes: 0x00 present, 0x20 inserted (reading
//! clears), 0x40 leaving (reading clears), 0x60 eject (write). At 0x80 what `_OST` says (write): the event in bits 15:0, its
//! outcome in 23:16, the vCPU in 31:24.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::power::{AcpiPower, EVENT_CPU};
use crate::state::saved::{CpuHotplugState, HotVcpuState};
use crate::state::{self, Persist, SavedState, StateError};

/// Number of ports.
pub const CPU_HOTPLUG_PORTS: u64 = 0x84;
/// Most vCPUs that the registers have bits for.
pub const MAX_HOTPLUG_VCPUS: u32 = 256;

/// Length of a row in bytes.
const ROW: u64 = 0x20;
const PRESENT: u64 = 0;
const INSERTED: u64 = 1;
const LEAVING: u64 = 2;
const EJECT: u64 = 3;
const ANSWER: u64 = 4;

// `_OST` (ACPI 6.5, section 6.3.5, tables 6.17 to 6.19).
/// The notification "eject request", and an ejection that the operating system has begun itself.
const EJECT_EVENTS: [u32; 2] = [0x3, 0x103];
/// The notifications "bus check" and "device check", and an insertion that is being processed.
const INSERT_EVENTS: [u32; 3] = [0x0, 0x1, 0x200];
const SUCCESS: u8 = 0;
/// Of an insertion: it goes on.
const INSERTION_PENDING: u8 = 0x80;
/// Of an ejection: it goes on.
const EJECTION_PENDING: u8 = 0x84;

/// Lets vCPUs run, and takes them away.
pub trait VcpuSwitch: Send + Sync {
    /// These vCPUs, which were not there, are there when it returns, each in its state after reset: it waits for its start-up. Called on the
    /// thread that calls [`CpuHotplug::resize`], with no lock held.
    fn plug(&self, ids: &[u32]);
    /// It is not there any more. Called on a vCPU's thread, which may be its own: must not wait for it.
    fn unplug(&self, id: u32);
    /// Whether a vCPU is there whose state is restored apart from this.
    fn restored(&self, id: u32, present: bool);
}

/// What the guest is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wish {
    /// Nothing more.
    #[default]
    Settled,
    /// Take the vCPU, of which it has been told.
    Told,
    /// Let it go, for which it has been asked.
    Asked,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    present: bool,
    inserted: bool,
    leaving: bool,
    wish: Wish,
    /// It does not do what it is to do, for this reason.
    refused: Option<u8>,
}

/// What a machine's operator can know of its vCPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuHotplugStatus {
    /// How many are there.
    pub present: u32,
    /// Those of whose coming or going the guest has not said anything.
    pub unanswered: Vec<u32>,
    /// Those that it does not take, or does not let go, with the status that it gave (ACPI 6.5, tables 6.18 and 6.19).
    pub refused: Vec<(u32, u8)>,
}

/// The registers.
pub struct CpuHotplug {
    power: Arc<AcpiPower>,
    switch: Arc<dyn VcpuSwitch>,
    places: Mutex<Vec<Place>>,
}

impl CpuHotplug {
    /// For `max` vCPUs (at most [`MAX_HOTPLUG_VCPUS`]), of which the first `present` are there, which `switch` knows. Events go through
    /// `power`.
    pub fn new(power: Arc<AcpiPower>, switch: Arc<dyn VcpuSwitch>, present: u32, max: u32) -> Self {
        let places = (0..max.min(MAX_HOTPLUG_VCPUS))
            .map(|id| Place {
                present: id < present,
                ..Place::default()
            })
            .collect();
        Self {
            power,
            switch,
            places: Mutex::new(places),
        }
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the first `wanted` vCPUs, and only these, be there: those that come are there at once and the guest is told; those that
    /// are to go it is asked for. Asked again, it is told again of what it has not settled.
    pub fn resize(&self, wanted: u32) {
        let places = self.places();
        let coming: Vec<u32> = places
            .iter()
            .zip(0..)
            .filter(|(place, id)| !place.present && *id < wanted)
            .map(|(_, id)| id)
            .collect();
        drop(places);
        // Before the guest can know of it: it could start the vCPU at once.
        if !coming.is_empty() {
            self.switch.plug(&coming);
        }
        let mut news = false;
        let mut places = self.places();
        for (place, id) in places.iter_mut().zip(0..) {
            let wish = match (place.present, id < wanted || id == 0) {
                (false, true) => Wish::Told,
                (true, true) if place.wish == Wish::Told => Wish::Told,
                (true, true) => Wish::Settled,
                (true, false) => Wish::Asked,
                (false, false) => continue,
            };
            *place = Place {
                present: true,
                // What it has not read yet of an earlier wish, it reads before this one.
                inserted: place.inserted || wish == Wish::Told,
                leaving: wish == Wish::Asked,
                wish,
                refused: None,
            };
            news |= wish != Wish::Settled;
        }
        drop(places);
        if news {
            self.power.raise(EVENT_CPU);
        }
    }

    /// How things are.
    pub fn status(&self) -> CpuHotplugStatus {
        let mut status = CpuHotplugStatus::default();
        for (place, id) in self.places().iter().zip(0..) {
            status.present += u32::from(place.present);
            match (place.wish, place.refused) {
                (Wish::Settled, _) => {}
                (_, None) => status.unanswered.push(id),
                (_, Some(why)) => status.refused.push((id, why)),
            }
        }
        status
    }

    /// One word of a row.
    fn read_word(&self, row: u64, word: usize) -> u32 {
        let mut places = self.places();
        let mine = places.iter_mut().skip(word * 32).take(32);
        let mut value = 0;
        for (place, bit) in mine.zip(0..) {
            let set = match row {
                PRESENT => place.present,
                INSERTED => std::mem::take(&mut place.inserted),
                LEAVING => std::mem::take(&mut place.leaving),
                _ => false,
            };
            value |= u32::from(set) << bit;
        }
        value
    }

    fn eject(&self, word: usize, bits: u32) {
        let mut places = self.places();
        for bit in (0..32).filter(|bit| bits >> bit & 1 != 0) {
            let at = word * 32 + bit;
            match places.get_mut(at) {
                Some(place) if at != 0 && place.present => {
                    *place = Place::default();
                    self.switch.unplug(at as u32);
                    tracing::info!(vcpu = at, "the guest has let the vCPU go");
                }
                _ => {}
            }
        }
    }

    fn answer(&self, value: u32) {
        let (id, why, event) = (value >> 24, (value >> 16) as u8, value & 0xffff);
        let mut places = self.places();
        let Some(place) = places.get_mut(id as usize).filter(|place| place.present) else {
            return;
        };
        match (place.wish, why) {
            (Wish::Told, INSERTION_PENDING) | (Wish::Asked, EJECTION_PENDING) => return,
            (Wish::Told, SUCCESS) if INSERT_EVENTS.contains(&event) => {
                place.wish = Wish::Settled;
                place.refused = None;
                return;
            }
            (Wish::Told, _) if INSERT_EVENTS.contains(&event) => {}
            // Whether an ejection has succeeded, the ejection itself says.
            (Wish::Asked, SUCCESS) => return,
            (Wish::Asked, _) if EJECT_EVENTS.contains(&event) => {}
            _ => return,
        }
        place.refused = Some(why);
        tracing::warn!(
            vcpu = id,
            event,
            status = why,
            "the guest does not do what it is to do with a vCPU"
        );
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Half a word would clear what nobody has seen.
        if data.len() == 4 && offset.is_multiple_of(4) {
            let value = self.read_word(offset / ROW, (offset % ROW / 4) as usize);
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match (offset / ROW, offset % ROW) {
            (EJECT, within) if within.is_multiple_of(4) => self.eject((within / 4) as usize, value),
            (ANSWER, 0) => self.answer(value),
            _ => {}
        }
    }
}

impl Persist for CpuHotplug {
    fn kind(&self) -> &'static str {
        "cpu-hotplug"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        let vcpus = self.places().iter().map(Place::saved).collect();
        state::encode(self, &CpuHotplugState { vcpus })
    }

    /// The interrupt of what is pending is part of the local APICs' state, and is not raised again.
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: CpuHotplugState = state::decode(self, state)?;
        let impossible = |reason: String| StateError::OutOfRange {
            kind: "cpu-hotplug",
            field: "vcpus",
            reason,
        };
        let mut places = self.places();
        if saved.vcpus.len() != places.len() {
            return Err(impossible(format!(
                "{} vCPUs in a machine of at most {}",
                saved.vcpus.len(),
                places.len()
            )));
        }
        if !saved.vcpus.first().is_some_and(|boot| boot.present) {
            return Err(impossible("the boot processor is absent".to_owned()));
        }
        let absent = HotVcpuState::default();
        if let Some(at) = saved
            .vcpus
            .iter()
            .position(|vcpu| !vcpu.present && *vcpu != absent)
        {
            return Err(impossible(format!("vCPU {at} is absent and pending")));
        }
        *places = saved.vcpus.iter().map(Place::restored).collect();
        for (place, id) in places.iter().zip(0..) {
            self.switch.restored(id, place.present);
        }
        Ok(())
    }
}

impl Place {
    fn saved(&self) -> HotVcpuState {
        HotVcpuState {
            present: self.present,
            inserted: self.inserted,
            leaving: self.leaving,
            told: self.wish == Wish::Told,
            asked: self.wish == Wish::Asked,
            refused: self.refused,
        }
    }

    fn restored(saved: &HotVcpuState) -> Self {
        Self {
            present: saved.present,
            inserted: saved.inserted,
            leaving: saved.leaving,
            wish: match (saved.told, saved.asked) {
                (_, true) => Wish::Asked,
                (true, false) => Wish::Told,
                (false, false) => Wish::Settled,
            },
            refused: saved.refused,
        }
    }
}

#[cfg(test)]
#[path = "cpu_hotplug_tests.rs"]
mod tests;
