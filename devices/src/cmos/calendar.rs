//! Between seconds since 1970 and the clock's registers. Proleptic Gregorian, years 0 to 9999, no leap seconds.

/// How the registers show numbers (status B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Binary, not BCD.
    pub(super) binary: bool,
    /// Hours 0 to 23, not 1 to 12 with bit 7 for the afternoon.
    pub(super) hours_24: bool,
}

/// Hours register: afternoon, in 12-hour format.
const PM: u8 = 1 << 7;
const SECONDS_A_DAY: i64 = 86_400;
/// Days in 400 years.
const DAYS_AN_ERA: i64 = 146_097;
/// 1970-01-01 counted from 0000-03-01.
const EPOCH_DAY: i64 = 719_468;
/// 0000-01-01 and 9999-12-31 23:59:59, in seconds since 1970.
const FIRST: i64 = -62_167_219_200;
const LAST: i64 = 253_402_300_799;

/// A date and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
    /// 1 is Sunday. Follows from the date; what a guest writes there is ignored.
    pub(super) day_of_week: u8,
}

impl Calendar {
    /// The date and time of `seconds`, which is moved into the range of years.
    pub(super) fn from_unix(seconds: i64) -> Calendar {
        let seconds = seconds.clamp(FIRST, LAST);
        let (days, time) = (
            seconds.div_euclid(SECONDS_A_DAY),
            seconds.rem_euclid(SECONDS_A_DAY),
        );
        // Years that begin on 1 March put the leap day last, so that a month's first day is a linear function of it.
        let day_of_era = (days + EPOCH_DAY).rem_euclid(DAYS_AN_ERA);
        let era = (days + EPOCH_DAY).div_euclid(DAYS_AN_ERA);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Calendar {
            year: (era * 400 + year_of_era + i64::from(month <= 2)) as u16,
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
            // 1970-01-01 was a Thursday.
            day_of_week: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Seconds since 1970. The fields are in range.
    pub(super) fn to_unix(self) -> i64 {
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * march_month + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_AN_ERA + day_of_era - EPOCH_DAY;
        days * SECONDS_A_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// Seconds, minutes, hours, day of week, day, month, year, century.
    pub(super) fn to_registers(self, format: Format) -> [u8; 8] {
        let hour = match (format.hours_24, self.hour) {
            (true, hour) => format.encode(hour),
            (false, hour) => {
                let half = if hour >= 12 { PM } else { 0 };
                let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
                format.encode(twelve) | half
            }
        };
        [
            format.encode(self.second),
            format.encode(self.minute),
            hour,
            format.encode(self.day_of_week),
            format.encode(self.day),
            format.encode(self.month),
            format.encode((self.year % 100) as u8),
            format.encode((self.year / 100) as u8),
        ]
    }

    /// The reverse; `None` for what is no date or time.
    pub(super) fn from_registers(registers: &[u8; 8], format: Format) -> Option<Calendar> {
        let [second, minute, hour, _, day, month, year, century] = *registers;
        let hour = if format.hours_24 {
            format.decode(hour, 0, 23)?
        } else {
            let afternoon = if hour & PM != 0 { 12 } else { 0 };
            format.decode(hour & !PM, 1, 12)? % 12 + afternoon
        };
        let year = u16::from(format.decode(century, 0, 99)?) * 100
            + u16::from(format.decode(year, 0, 99)?);
        let month = format.decode(month, 1, 12)?;
        let calendar = Calendar {
            year,
            month,
            day: format.decode(day, 1, days_in_month(year, month))?,
            hour,
            minute: format.decode(minute, 0, 59)?,
            second: format.decode(second, 0, 59)?,
            day_of_week: 0,
        };
        Some(Calendar::from_unix(calendar.to_unix()))
    }
}

impl Format {
    /// `value` is below 100.
    fn encode(self, value: u8) -> u8 {
        if self.binary {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(self, register: u8, least: u8, most: u8) -> Option<u8> {
        let value = match (self.binary, register >> 4, register & 0xf) {
            (true, ..) => register,
            (false, tens @ 0..=9, ones @ 0..=9) => tens * 10 + ones,
            _ => return None,
        };
        (least..=most).contains(&value).then_some(value)
    }
}

fn days_in_month(year: u16, month: u8) -> u8 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => {
            29
        }
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}
