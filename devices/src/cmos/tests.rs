//! The clock with a clock of our own, and the memory.

use std::sync::Arc;

use super::*;

/// A real time that the test sets, in nanoseconds.
#[derive(Clone)]
struct Time(Arc<Mutex<Duration>>);

impl Time {
    fn set(&self, seconds: u64, nanos: u32) {
        *self.0.lock().expect("no panic") = Duration::new(seconds, nanos);
    }
}

fn cmos(seconds: u64) -> (Cmos, Time) {
    let time = Time(Arc::new(Mutex::new(Duration::from_secs(seconds))));
    let source = time.0.clone();
    let real_time = Box::new(move || *source.lock().expect("no panic"));
    (
        Cmos::with_real_time(GuestMemorySize::default(), real_time),
        time,
    )
}

fn read(cmos: &Cmos, index: u8) -> u8 {
    let mut data = [0];
    cmos.write(0, &[index]);
    cmos.read(1, &mut data);
    data[0]
}

fn write(cmos: &Cmos, index: u8, value: u8) {
    cmos.write(0, &[index]);
    cmos.write(1, &[value]);
}

/// Seconds, minutes, hours, day of week, day, month, year, century.
fn clock(cmos: &Cmos) -> [u8; 8] {
    [0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| read(cmos, index))
}

/// 2026-11-23 06:05:09, a Monday.
const MONDAY: u64 = 1_795_413_909;

#[test]
fn shows_the_time_in_all_formats() {
    let (cmos, time) = cmos(MONDAY);
    assert_eq!(clock(&cmos), [0x09, 0x05, 0x06, 2, 0x23, 0x11, 0x26, 0x20]);
    write(&cmos, 0x0b, 0x06);
    assert_eq!(clock(&cmos), [9, 5, 6, 2, 23, 11, 26, 20]);
    time.set(MONDAY + 12 * 3600, 0);
    assert_eq!(read(&cmos, 4), 18);
    write(&cmos, 0x0b, 0x04);
    assert_eq!(read(&cmos, 4), 0x86);
    write(&cmos, 0x0b, 0x00);
    // 12-hour BCD over a day: midnight is 12 a.m., noon 12 p.m.
    for (hour, shown) in [
        (0, 0x12),
        (1, 0x01),
        (10, 0x10),
        (11, 0x11),
        (12, 0x92),
        (13, 0x81),
        (22, 0x90),
        (23, 0x91),
    ] {
        time.set(hour * 3600, 0);
        assert_eq!(read(&cmos, 4), shown, "{hour}");
    }
}

#[test]
fn statuses_are_those_of_a_running_clock() {
    let (cmos, time) = cmos(MONDAY);
    assert_eq!(
        [0x0a, 0x0b, 0x0c, 0x0d].map(|index| read(&cmos, index)),
        [0x26, 0x02, 0x00, 0x80]
    );
    write(&cmos, 0x0c, 0xff);
    write(&cmos, 0x0d, 0x00);
    write(&cmos, 0x0a, 0xff);
    assert_eq!(
        [0x0a, 0x0c, 0x0d].map(|index| read(&cmos, index)),
        [0x7f, 0x00, 0x80]
    );
    time.set(MONDAY, 999_755_999);
    assert_eq!(read(&cmos, 0x0a) & 0x80, 0);
    time.set(MONDAY, 999_756_000);
    assert_eq!(read(&cmos, 0x0a) & 0x80, 0x80);
    time.set(MONDAY + 1, 0);
    assert_eq!(read(&cmos, 0x0a) & 0x80, 0);
    // No update while the guest holds the clock.
    write(&cmos, 0x0b, 0x82);
    time.set(MONDAY, 999_999_999);
    assert_eq!(read(&cmos, 0x0a) & 0x80, 0);
}

#[test]
fn the_guest_sets_the_clock_under_set() {
    let (cmos, time) = cmos(MONDAY);
    write(&cmos, 0x0b, 0x82);
    // Held: it does not run.
    time.set(MONDAY + 7, 0);
    assert_eq!(read(&cmos, 0), 0x09);
    // 2000-02-29 23:59:58
    for (index, value) in [
        (0x32, 0x20),
        (9, 0x00),
        (8, 0x02),
        (7, 0x29),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ] {
        write(&cmos, index, value);
    }
    write(&cmos, 0x0b, 0x02);
    assert_eq!(clock(&cmos), [0x58, 0x59, 0x23, 3, 0x29, 0x02, 0x00, 0x20]);
    time.set(MONDAY + 9, 0);
    assert_eq!(clock(&cmos), [0x00, 0x00, 0x00, 4, 0x01, 0x03, 0x00, 0x20]);
}

#[test]
fn one_register_can_be_set_while_it_runs() {
    let (cmos, time) = cmos(MONDAY);
    write(&cmos, 2, 0x30);
    assert_eq!(clock(&cmos), [0x09, 0x30, 0x06, 2, 0x23, 0x11, 0x26, 0x20]);
    time.set(MONDAY + 60, 0);
    assert_eq!(read(&cmos, 2), 0x31);
}

#[test]
fn what_is_no_time_is_ignored() {
    let (cmos, _) = cmos(MONDAY);
    let shown = clock(&cmos);
    for (index, value) in [
        (0, 0x60),
        (0, 0x0a),
        (2, 0xff),
        (4, 0x24),
        (7, 0x31),
        (7, 0),
        (8, 0x13),
        (8, 0),
        (9, 0xa0),
    ] {
        write(&cmos, index, value);
        assert_eq!(clock(&cmos), shown, "{index} {value:#x}");
    }
}

#[test]
fn memory_sizes_are_told() {
    let size = GuestMemorySize {
        below_4g: 3 << 30,
        above_4g: 5 << 30,
    };
    let cmos = Cmos::new(size);
    let word = |low: u8| u16::from(read(&cmos, low)) | u16::from(read(&cmos, low + 1)) << 8;
    assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(word(0x34), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
    assert_eq!(
        (word(0x5b), read(&cmos, 0x5d)),
        ((5u64 << 30 >> 16) as u16, (5u64 << 30 >> 32) as u8)
    );
    let tiny = Cmos::new(GuestMemorySize {
        below_4g: 1 << 19,
        above_4g: u64::MAX,
    });
    assert_eq!(
        [0x15, 0x16, 0x17, 0x34, 0x5b, 0x5c, 0x5d].map(|index| read(&tiny, index)),
        [0, 2, 0, 0, 255, 255, 255]
    );
}

#[test]
fn memory_is_kept_and_the_index_wraps_at_128() {
    let (cmos, _) = cmos(MONDAY);
    write(&cmos, 0x0f, 0xaa);
    write(&cmos, 0x7f, 0x55);
    assert_eq!((read(&cmos, 0x8f), read(&cmos, 0xff)), (0xaa, 0x55));
    // Index and data in one 16-bit write.
    cmos.write(0, &[0x40, 0x77]);
    assert_eq!(read(&cmos, 0x40), 0x77);
    let mut index = [0];
    cmos.read(0, &mut index);
    assert_eq!(index, [0xff]);
    cmos.reset();
    assert_eq!(read(&cmos, 0x7f), 0x55);
}

#[test]
fn the_guests_time_moves_with_it() {
    let (from, _) = cmos(MONDAY);
    write(&from, 2, 0x30);
    write(&from, 0x7f, 0x55);
    // The other host's clock is 20 seconds further when the guest gets there.
    let (to, time) = cmos(MONDAY + 20);
    to.restore(&from.save()).expect("own state");
    assert_eq!(to.save(), from.save());
    assert_eq!(read(&to, 0x7f), 0x55);
    assert_eq!(&clock(&to)[..3], [0x29, 0x30, 0x06]);
    // A clock that is held stays held.
    write(&from, 0x0b, 0x82);
    to.restore(&from.save()).expect("own state");
    time.set(MONDAY + 500, 0);
    assert_eq!(&clock(&to)[..3], [0x09, 0x30, 0x06]);
}

#[test]
fn the_calendar_is_right_on_every_day_of_ten_thousand_years() {
    let binary = Format {
        binary: true,
        hours_24: true,
    };
    let (mut year, mut month, mut day, mut day_of_week) = (0u16, 1u8, 1u8, 7u8);
    let mut seconds = -62_167_219_200;
    while year < 10_000 {
        let calendar = Calendar::from_unix(seconds);
        assert_eq!(
            (
                calendar.year,
                calendar.month,
                calendar.day,
                calendar.day_of_week
            ),
            (year, month, day, day_of_week)
        );
        assert_eq!(calendar.to_unix(), seconds);
        assert_eq!(
            Calendar::from_registers(&calendar.to_registers(binary), binary),
            Some(calendar)
        );
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = [
            31,
            if leap { 29 } else { 28 },
            31,
            30,
            31,
            30,
            31,
            31,
            30,
            31,
            30,
            31,
        ][usize::from(month) - 1];
        (day, month, year) = match (day == last, month) {
            (false, _) => (day + 1, month, year),
            (true, 12) => (1, 1, year + 1),
            (true, _) => (1, month + 1, year),
        };
        day_of_week = day_of_week % 7 + 1;
        seconds += 86_400;
    }
    assert_eq!(Calendar::from_unix(i64::MIN).year, 0);
    assert_eq!(Calendar::from_unix(i64::MAX).year, 9999);
}

#[test]
fn every_second_of_a_day_goes_through_every_format() {
    for binary in [false, true] {
        for hours_24 in [false, true] {
            let format = Format { binary, hours_24 };
            for seconds in 0..86_400 {
                let calendar = Calendar::from_unix(seconds);
                assert_eq!(
                    Calendar::from_registers(&calendar.to_registers(format), format),
                    Some(calendar)
                );
            }
        }
    }
}
