//! The log, on standard error.
//!
//! Its filter is the plain level-by-target list, not the regular-expression one: a process that boots
//! a guest in two milliseconds has none to spare for a filter.

use std::io::IsTerminal;
use std::str::FromStr;

use anyhow::{Context, anyhow};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Names the level where the command line does not.
const VARIABLE: &str = "VMM_LOG";

/// What is logged: a level for everything, or one for each of several parts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Filter(Targets);

impl FromStr for Filter {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        // The parser of levels takes nothing at all for `error`.
        if !text.is_empty()
            && let Ok(level) = text.parse::<LevelFilter>()
        {
            return Ok(Self(Targets::new().with_default(level)));
        }
        // A lone word would be taken for a part, and everything of it would be logged.
        if !text.contains('=') {
            return Err(anyhow!(
                "use off, error, warn, info, debug or trace, or PART=LEVEL"
            ));
        }
        text.parse()
            .map(Self)
            .map_err(|e| anyhow!("{e}; use e.g. warn,migration=debug"))
    }
}

/// Starts to log; once in a process. The environment decides if `filter` does not.
pub(super) fn start(filter: Option<Filter>) -> anyhow::Result<()> {
    let Filter(targets) = match filter {
        Some(filter) => filter,
        None => match std::env::var(VARIABLE) {
            Ok(text) if !text.is_empty() => text
                .parse()
                .with_context(|| format!("the environment variable {VARIABLE} is `{text}`"))?,
            _ => Filter(Targets::new().with_default(LevelFilter::WARN)),
        },
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry()
        .with(targets)
        .with(lines)
        .try_init()
        .context("cannot start the log")
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_and_parts() {
        let enables = |filter: &str, part, level| {
            filter
                .parse::<Filter>()
                .expect(filter)
                .0
                .would_enable(part, &level)
        };
        assert!(enables("debug", "vmm", Level::DEBUG));
        assert!(!enables("debug", "vmm", Level::TRACE));
        assert!(!enables("off", "vmm", Level::ERROR));
        assert!(enables("warn,migration=debug", "migration", Level::DEBUG));
        assert!(enables("warn,migration=debug", "devices", Level::WARN));
        assert!(!enables("warn,migration=debug", "devices", Level::DEBUG));
        for wrong in ["loud", "", "migration=loud"] {
            assert!(wrong.parse::<Filter>().is_err(), "{wrong}");
        }
    }
}
