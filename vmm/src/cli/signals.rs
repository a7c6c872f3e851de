//! SIGINT, SIGTERM and SIGHUP: the first asks, the second does not.

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Calls `first` at the first signal and `second` at the second, on a thread of its own; then the
/// process ends with status 128 + signal, at once.
pub(super) fn on_stop(
    first: impl FnOnce() + Send + 'static,
    second: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot take signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut arriving = signals.forever();
            if arriving.next().is_some() {
                first();
            }
            if let Some(signal) = arriving.next() {
                second();
                std::process::exit(128 + signal);
            }
        })
        .context("cannot start the thread for signals")?;
    Ok(())
}
