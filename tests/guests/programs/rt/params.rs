//! The command line: `key=value` words.

/// A copy of the command line, as given by the loader.
pub struct Params {
    bytes: [u8; Params::MAX],
    len: usize,
}

impl Params {
    /// Longest command line kept.
    pub const MAX: usize = 2048;

    /// Takes the text up to its zero byte.
    ///
    /// # Safety
    /// `text` must be readable up to a zero byte or [`Params::MAX`] bytes.
    pub unsafe fn copy(text: *const u8) -> Params {
        let mut params = Params {
            bytes: [0; Self::MAX],
            len: 0,
        };
        while params.len < Self::MAX {
            // SAFETY: the caller's promise.
            let byte = unsafe { text.add(params.len).read() };
            if byte == 0 {
                break;
            }
            params.bytes[params.len] = byte;
            params.len += 1;
        }
        params
    }

    /// No parameters.
    pub const fn empty() -> Params {
        Params {
            bytes: [0; Self::MAX],
            len: 0,
        }
    }

    /// The value of `key`; the last one counts.
    pub fn text(&self, key: &str) -> Option<&str> {
        let line = core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("");
        line.split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .filter(|&(name, _)| name == key)
            .last()
            .map(|(_, value)| value)
    }

    /// A whole number, decimal or with `0x`; anything else is as if it was not there, and said.
    pub fn number(&self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        if parsed.is_err() {
            super::serial::line(format_args!("guest: ignored {key}={text}: not a number"));
        }
        parsed.ok()
    }

    /// `on`/`1`/`true` or anything else.
    pub fn flag(&self, key: &str, default: bool) -> bool {
        self.text(key)
            .map_or(default, |text| matches!(text, "on" | "1" | "true"))
    }

    /// A fraction from 0 to 1 (`0.25`), in millionths; anything else is as if it was not there, and said.
    pub fn parts_per_million(&self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = part.as_bytes().iter().take(6);
        let valid = part.bytes().all(|digit| digit.is_ascii_digit());
        let mut value = whole
            .parse::<u64>()
            .ok()
            .filter(|&whole| valid && whole <= 1);
        let mut unit = 1_000_000;
        value = value.map(|whole| whole * unit);
        for digit in digits {
            unit /= 10;
            value = value.map(|sum| sum + u64::from(digit.wrapping_sub(b'0')) * unit);
        }
        let value = value.filter(|&sum| sum <= 1_000_000);
        if value.is_none() {
            super::serial::line(format_args!(
                "guest: ignored {key}={text}: not a fraction from 0 to 1"
            ));
        }
        value
    }
}
