//! How a program ends before its end.

/// Why a program did not come to its end.
#[derive(Debug)]
pub enum Stop {
    /// This host lacks what the program is about.
    Skip(String),
    /// The back end did something else than it must.
    Fail(String),
}

/// The result of a program and of each of its steps.
pub type Outcome<T = ()> = Result<T, Stop>;

// `Stop` is no `Error` itself, so that `?` can turn every error into a failure.
impl<E: std::error::Error> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Fail(error.to_string())
    }
}

/// A failure with this text.
pub(crate) fn fail<T>(text: impl Into<String>) -> Outcome<T> {
    Err(Stop::Fail(text.into()))
}

/// A skip with this reason.
pub(crate) fn skip<T>(reason: impl Into<String>) -> Outcome<T> {
    Err(Stop::Skip(reason.into()))
}

/// Fails with a text unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::outcome::Stop::Fail(format!($($text)+)));
        }
    };
}

/// Fails unless two values are equal; says what they are about.
macro_rules! same {
    ($found:expr, $expected:expr, $($what:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => {
                if *found != *expected {
                    let what = format!($($what)+);
                    let (found, expected) = $crate::outcome::difference(found, expected);
                    return Err($crate::outcome::Stop::Fail(format!(
                        "{what}: {found}, not {expected} (line {})",
                        line!()
                    )));
                }
            }
        }
    };
}

pub(crate) use {ensure, same};

/// Two values as text, of long ones only the part from where they differ.
pub(crate) fn difference<T: std::fmt::Debug + ?Sized, U: std::fmt::Debug + ?Sized>(
    found: &T,
    expected: &U,
) -> (String, String) {
    const LONG: usize = 300;
    let (found, expected) = (format!("{found:x?}"), format!("{expected:x?}"));
    if found.len() <= LONG && expected.len() <= LONG {
        return (found, expected);
    }
    let alike = found
        .chars()
        .zip(expected.chars())
        .take_while(|(a, b)| a == b)
        .count();
    let part = |text: String| {
        let part: String = text
            .chars()
            .skip(alike.saturating_sub(40))
            .take(LONG / 2)
            .collect();
        format!("…{part}…")
    };
    (part(found), part(expected))
}
