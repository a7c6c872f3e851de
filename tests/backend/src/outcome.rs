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
                    return Err($crate::outcome::Stop::Fail(format!(
                        "{what}: {found:x?}, not {expected:x?} (line {})",
                        line!()
                    )));
                }
            }
        }
    };
}

pub(crate) use {ensure, same};
