//! The lab: hardware-style nested KVM without hardware, as a small API for tests.
//!
//! QEMU's emulator provides AMD SVM, a stock Debian kernel inside it (the *lab host*) loads `kvm_amd`, and
//! the product runs there with stock kernels as its guests.
//!
//! ```text
//!   test ── Lab::host(cpu)…run(script) ──▶ initramfs ──▶ QEMU (TCG) ──▶ lab host ──▶ vmm ──▶ guest
//!    ▲                                     image.rs       machine.rs    │ script.sh   guest's busybox
//!    └──────── Outcome { exit, log } ◀── marker line on the serial ◀────┘ on the host's serial console
//!
//!   Lab::pair(host, host).run(script, script):  lab host 10.0.0.1 ══ unix socket ══ lab host 10.0.0.2
//! ```
//!
//! Promises:
//! - A run ends in the script's own exit status, or in an error that carries the log.
//! - A boot is retried only when no result came at all (the emulator can, rarely, lose a guest), never
//!   after an explicit failure; every retry is counted in [`retries`].
//! - No QEMU and no temporary file outlives its run, on success, failure or panic.
//! - What the machine lacks is found by [`missing`] before anything starts, as a sentence for a skip.

pub mod cpio;
mod image;
pub mod kernel;
mod machine;
mod run;
mod workdir;

pub use image::Image;
pub use kernel::{Entry, Kernel};
pub use run::{Cpu, Host, Lab, Outcome, Pair, retries};

use std::path::PathBuf;

/// Why the lab cannot run here, with what to do about it; `None` when it can.
pub fn missing() -> Option<String> {
    for (program, package) in [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("xz", "xz-utils"),
        ("setpriv", "util-linux"),
        ("ldd", "libc-bin"),
    ] {
        if find(program).is_none() {
            return Some(format!(
                "{program} is not installed: apt-get install {package}"
            ));
        }
    }
    [Kernel::Debian61, Kernel::Debian612]
        .iter()
        .find_map(|kernel| kernel.missing())
}

/// Where a program is, looked up in `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
