//! The signal that makes a vCPU's thread leave the guest. Both back ends use the same one.

use std::sync::OnceLock;

use crate::{Error, Result};

/// The signal: the first real-time signal that the C library leaves free.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Does nothing: its arrival alone ends the call that runs the guest.
extern "C" fn on_kick(_signal: libc::c_int) {}

/// Installs the handler, once in the life of the process.
pub(crate) fn install_handler() -> Result<()> {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    if INSTALLED.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zero is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // A system call of a device model that happens to run on the vCPU thread is restarted; the one that runs the guest never is.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing, so it is safe at any point; `action` is initialised.
    if unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(failed("sigaction", std::io::Error::last_os_error()));
    }
    INSTALLED.get_or_init(|| ());
    Ok(())
}

/// Lets the signal through to this thread.
pub(crate) fn unblock_on_this_thread() -> Result<()> {
    // SAFETY: `set` is initialised by `sigemptyset` before use, and only this thread's mask changes.
    let error = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if error == 0 {
        Ok(())
    } else {
        Err(failed(
            "pthread_sigmask",
            std::io::Error::from_raw_os_error(error),
        ))
    }
}

fn failed(operation: &'static str, source: std::io::Error) -> Error {
    Error::Call { operation, source }
}
