//! Opens a TAP interface and runs a program that finds it open: what a manager without its own privileges in the program does.
//!
//! ```text
//!   passed NAME N[,M…] PROGRAM [ARGS…]     descriptors N, M … are queues of interface NAME, with virtio headers
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// `struct ifreq` as TUNSETIFF takes it.
#[repr(C)]
struct Interface {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Makes descriptor `number` a queue of the interface.
fn pass(name: &str, number: i32, several: bool) -> io::Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut interface = Interface {
        name: [0; libc::IFNAMSIZ],
        flags: flags as libc::c_short,
        rest: [0; 22],
    };
    for (to, from) in interface.name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from;
    }
    // SAFETY: the structure is as long as the system's and lives for the call; the descriptor that dup2 makes is nobody's.
    unsafe {
        check(libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF as _,
            &raw mut interface,
        ))?;
        // Without FD_CLOEXEC, unless it has the number already.
        if file.as_raw_fd() == number {
            let file = file.into_raw_fd();
            check(libc::fcntl(file, libc::F_SETFD, 0))?;
        } else {
            check(libc::dup2(file.as_raw_fd(), number))?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [name, numbers, program, arguments @ ..] = &words[..] else {
        eprintln!("passed: NAME N[,M...] PROGRAM [ARGS...]");
        return ExitCode::from(2);
    };
    let numbers: Vec<&str> = numbers.split(',').collect();
    for number in &numbers {
        let passed = number
            .parse()
            .map_err(io::Error::other)
            .and_then(|number| pass(name, number, numbers.len() > 1));
        if let Err(error) = passed {
            eprintln!("passed: {name}, {number}: {error}");
            return ExitCode::FAILURE;
        }
    }
    let error = Command::new(program).args(arguments).exec();
    eprintln!("passed: {program}: {error}");
    ExitCode::FAILURE
}
