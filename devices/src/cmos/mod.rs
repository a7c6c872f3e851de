//! CMOS: real-time clock (MC146818) and 128 bytes of battery-backed memory.
//!
//! ```text
//!   host's real time + offset ──► calendar ──► BCD or binary, 24 or 12 hours (status B) ──► registers
//!   guest writes ──► status B, SET clear: at once     ──► offset
//!                    status B, SET set:   when it goes ──► offset
//! ```
//!
//! The guest's clock is the host's plus an offset in seconds, and the offset is what moves with the guest: it is right on
//! another host as far as the hosts agree on the time.
//!
//! Update in progress (status A, UIP) is shown for the last 244 µs of each second, as the chip does: a guest that has seen it
//! clear has that long to read a consistent time. No interrupt is wired: status C reads 0, and alarms are only stored.

mod calendar;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use self::calendar::{Calendar, Format};
use crate::bus::{BusDevice, read_bytes, write_bytes};
use crate::state::saved::CmosState;
use crate::state::{self, Persist, SavedState, StateError};

/// Number of ports: index at 0, data at 1.
pub const CMOS_PORTS: u64 = 2;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Bytes behind the data port.
const SIZE: usize = 128;
/// The index port's bit 7 masks NMIs; the rest is the index.
const INDEX_MASK: u8 = 0x7f;

/// The clock's registers (MC146818 data sheet, table "Address map").
mod register {
    pub(super) const SECONDS: usize = 0x00;
    pub(super) const MINUTES: usize = 0x02;
    pub(super) const HOURS: usize = 0x04;
    pub(super) const DAY_OF_WEEK: usize = 0x06;
    pub(super) const DAY: usize = 0x07;
    pub(super) const MONTH: usize = 0x08;
    pub(super) const YEAR: usize = 0x09;
    pub(super) const STATUS_A: usize = 0x0a;
    pub(super) const STATUS_B: usize = 0x0b;
    pub(super) const STATUS_C: usize = 0x0c;
    pub(super) const STATUS_D: usize = 0x0d;
    /// Not the chip's but the PC's; the FADT's CENTURY field names it.
    pub(super) const CENTURY: usize = 0x32;
    /// KiB below 640 KiB, two bytes.
    pub(super) const BASE_MEMORY: usize = 0x15;
    /// KiB from 1 MiB on, at most 65,535, two bytes; and its copy.
    pub(super) const EXTENDED_MEMORY: usize = 0x17;
    pub(super) const EXTENDED_MEMORY_COPY: usize = 0x30;
    /// 64 KiB units from 16 MiB to 4 GiB, two bytes.
    pub(super) const MEMORY_ABOVE_16M: usize = 0x34;
    /// 64 KiB units above 4 GiB, three bytes.
    pub(super) const MEMORY_ABOVE_4G: usize = 0x5b;
}

/// The registers that the clock drives, in the order of [`Calendar::to_registers`].
const CLOCK: [usize; 8] = [
    register::SECONDS,
    register::MINUTES,
    register::HOURS,
    register::DAY_OF_WEEK,
    register::DAY,
    register::MONTH,
    register::YEAR,
    register::CENTURY,
];

/// Status A: update in progress; read-only.
const UIP: u8 = 1 << 7;
/// Status A after power on: 32.768 kHz time base, 1024 Hz periodic rate.
const STATUS_A_RESET: u8 = 0x26;
/// Status B: the guest holds the clock in order to set it.
const SET: u8 = 1 << 7;
/// Status B: binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status B: 24 hours.
const HOURS_24: u8 = 1 << 1;
/// Status D: the battery is good.
const VALID: u8 = 1 << 7;
/// How long before the second UIP shows (MC146818 data sheet, "update cycle": t_BUC).
const UPDATE_NS: u32 = 244_000;
/// Offsets a guest can cause are some ten thousand years at most.
const MAX_OFFSET_S: i64 = 1 << 40;

/// The host's real time since 1970, UTC.
pub type RealTime = Box<dyn Fn() -> Duration + Send + Sync>;

/// What the memory size registers say to firmware that asks them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemorySize {
    /// Bytes of RAM from address 0 to the end of low RAM.
    pub below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub above_4g: u64,
}

impl GuestMemorySize {
    fn store(self, nvram: &mut [u8; SIZE]) {
        let kib = |bytes: u64, limit: u64| (bytes >> 10).min(limit);
        let units = |bytes: u64, limit: u64| (bytes >> 16).min(limit);
        let extended = kib(self.below_4g.saturating_sub(1 << 20), 0xffff);
        for (at, len, value) in [
            (register::BASE_MEMORY, 2, kib(self.below_4g, 640)),
            (register::EXTENDED_MEMORY, 2, extended),
            (register::EXTENDED_MEMORY_COPY, 2, extended),
            (
                register::MEMORY_ABOVE_16M,
                2,
                units(self.below_4g.saturating_sub(16 << 20), 0xffff),
            ),
            (
                register::MEMORY_ABOVE_4G,
                3,
                units(self.above_4g, 0xff_ffff),
            ),
        ] {
            nvram[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }
}

struct Registers {
    index: u8,
    /// The clock's registers count only while SET is set.
    nvram: [u8; SIZE],
    offset_s: i64,
}

/// The CMOS. It covers [`CMOS_PORTS`] ports from the index port on.
pub struct Cmos {
    real_time: RealTime,
    registers: Mutex<Registers>,
}

impl Cmos {
    /// A CMOS whose clock shows the host's UTC.
    pub fn new(memory: GuestMemorySize) -> Self {
        // A host whose clock is before 1970 shows the guest 1970.
        Self::with_real_time(
            memory,
            Box::new(|| {
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default()
            }),
        )
    }

    /// A CMOS with another source of time.
    pub fn with_real_time(memory: GuestMemorySize, real_time: RealTime) -> Self {
        let mut nvram = [0; SIZE];
        nvram[register::STATUS_A] = STATUS_A_RESET;
        nvram[register::STATUS_B] = HOURS_24;
        nvram[register::STATUS_D] = VALID;
        memory.store(&mut nvram);
        Cmos {
            real_time,
            registers: Mutex::new(Registers {
                index: 0,
                nvram,
                offset_s: 0,
            }),
        }
    }

    /// What a machine reset does: the battery keeps memory and clock, the index returns to 0, and a clock that is held
    /// runs on.
    pub fn reset(&self) {
        let mut registers = self.lock();
        registers.index = 0;
        registers.nvram[register::STATUS_B] &= !SET;
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from((self.real_time)().as_secs()).unwrap_or(i64::MAX)
    }

    /// What the clock's registers show now.
    fn clock(&self, registers: &Registers) -> [u8; CLOCK.len()] {
        if registers.nvram[register::STATUS_B] & SET != 0 {
            return CLOCK.map(|at| registers.nvram[at]);
        }
        let seconds = self.host_seconds().saturating_add(registers.offset_s);
        Calendar::from_unix(seconds).to_registers(registers.format())
    }

    /// Makes the clock show `clock` from now on. What is no time is ignored: the chip's behaviour is undefined then.
    fn set_clock(&self, registers: &mut Registers, clock: &[u8; CLOCK.len()]) {
        let Some(calendar) = Calendar::from_registers(clock, registers.format()) else {
            tracing::debug!(
                ?clock,
                "the guest set its clock to what is no time; ignored"
            );
            return;
        };
        registers.offset_s = calendar.to_unix().saturating_sub(self.host_seconds());
    }

    fn read_register(&self) -> u8 {
        let registers = self.lock();
        let at = usize::from(registers.index);
        if let Some(which) = CLOCK.iter().position(|clock| *clock == at) {
            return self.clock(&registers)[which];
        }
        match at {
            register::STATUS_A => {
                let held = registers.nvram[register::STATUS_B] & SET != 0;
                let updating = (self.real_time)().subsec_nanos() >= 1_000_000_000 - UPDATE_NS;
                registers.nvram[at] | if updating && !held { UIP } else { 0 }
            }
            register::STATUS_C => 0,
            _ => registers.nvram[at],
        }
    }

    fn write_register(&self, value: u8) {
        let mut registers = self.lock();
        let at = usize::from(registers.index);
        let held = registers.nvram[register::STATUS_B] & SET != 0;
        if let Some(which) = CLOCK.iter().position(|clock| *clock == at) {
            if held {
                registers.nvram[at] = value;
            } else {
                let mut clock = self.clock(&registers);
                clock[which] = value;
                self.set_clock(&mut registers, &clock);
            }
            return;
        }
        match at {
            register::STATUS_A => registers.nvram[at] = value & !UIP,
            register::STATUS_B => {
                let clock = self.clock(&registers);
                registers.nvram[at] = value;
                if held && value & SET == 0 {
                    self.set_clock(&mut registers, &clock);
                } else if !held && value & SET != 0 {
                    for (at, byte) in CLOCK.into_iter().zip(clock) {
                        registers.nvram[at] = byte;
                    }
                }
            }
            register::STATUS_C | register::STATUS_D => {}
            _ => registers.nvram[at] = value,
        }
    }
}

impl Registers {
    fn format(&self) -> Format {
        let status = self.nvram[register::STATUS_B];
        Format {
            binary: status & BINARY != 0,
            hours_24: status & HOURS_24 != 0,
        }
    }
}

impl BusDevice for Cmos {
    /// The index port cannot be read, as on a PC.
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| {
            if offset == DATA {
                self.read_register()
            } else {
                0xff
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| match offset {
            INDEX => self.lock().index = value & INDEX_MASK,
            DATA => self.write_register(value),
            _ => {}
        });
    }
}

impl Persist for Cmos {
    fn kind(&self) -> &'static str {
        "cmos"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        let registers = self.lock();
        let saved = CmosState {
            index: registers.index,
            nvram: registers.nvram.to_vec(),
            offset_s: registers.offset_s,
        };
        state::encode(self, &saved)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let kind = self.kind();
        let refuse = |field, reason| StateError::OutOfRange {
            kind,
            field,
            reason,
        };
        let saved: CmosState = state::decode(self, state)?;
        if saved.index & !INDEX_MASK != 0 {
            return Err(refuse(
                "index",
                format!("{:#x} is beyond {SIZE} bytes", saved.index),
            ));
        }
        if saved
            .offset_s
            .checked_abs()
            .is_none_or(|offset| offset > MAX_OFFSET_S)
        {
            return Err(refuse(
                "offset_s",
                format!("{} seconds is longer than any calendar", saved.offset_s),
            ));
        }
        let mut nvram: [u8; SIZE] = saved.nvram.try_into().map_err(|nvram: Vec<u8>| {
            refuse("nvram", format!("{} bytes instead of {SIZE}", nvram.len()))
        })?;
        nvram[register::STATUS_A] &= !UIP;
        nvram[register::STATUS_D] = VALID;
        *self.lock() = Registers {
            index: saved.index,
            nvram,
            offset_s: saved.offset_s,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
