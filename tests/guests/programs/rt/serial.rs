//! The serial port, by port I/O from ring 3.
//!
//! Every access is an exit to the VMM, so the line status is never polled before a write: a virtual
//! UART takes bytes at any rate.

use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
/// Longest line; more is cut.
const LINE: usize = 512;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Writes a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: port I/O does not touch this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O does not touch this program's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// The next received byte, if there is one.
pub fn receive() -> Option<u8> {
    // All ones is a port that nobody serves.
    let status = inb(LINE_STATUS);
    (status & 1 != 0 && status != 0xff).then(|| inb(COM1))
}

struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len < LINE {
                self.bytes[self.len] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Writes one whole line; lines of several CPUs do not mix.
pub fn line(text: fmt::Arguments<'_>) {
    let mut buffer = Line {
        bytes: [0; LINE],
        len: 0,
    };
    let _ = buffer.write_fmt(text);
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    for &byte in &buffer.bytes[..buffer.len] {
        outb(COM1, byte);
    }
    outb(COM1, b'\n');
    BUSY.store(false, Ordering::Release);
}
