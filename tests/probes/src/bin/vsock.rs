//! Both ends of connections between guest and host over virtio-vsock.
//!
//! ```text
//!   in the guest  vsock echo PORT                gives back what comes, connection by connection
//!                 vsock tell PORT TEXT           connects to the host's PORT, writes a line, prints the line that comes back
//!   on the host   vsock ask SOCKET PORT TEXT     connects to the guest's PORT by the machine's socket, does the same
//!                 vsock answer SOCKET            waits for the guest at SOCKET, answers one line with `heard: ` before it
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

/// VMADDR_CID_HOST and VMADDR_CID_ANY.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    unsafe {
        let fd = check(libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: zeros are a valid address of no family.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn echo(port: u32) -> io::Result<()> {
    let (socket, here) = (socket()?, address(ANY, port));
    let len = size_of_val(&here) as libc::socklen_t;
    // SAFETY: the address lives and has this length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const here).cast(), len) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 4) })?;
    println!("vsock: listening");
    loop {
        // SAFETY: the peer's address is not asked for; the descriptor is new and nobody else's.
        let stream = unsafe {
            let (none, no_len) = (std::ptr::null_mut(), std::ptr::null_mut());
            File::from_raw_fd(check(libc::accept(socket.as_raw_fd(), none, no_len))?)
        };
        let copied = io::copy(&mut stream.try_clone()?, &mut &stream);
        println!("vsock: {copied:?}");
    }
}

/// Writes a line and returns the one that comes back.
fn ask(stream: impl io::Read + Write, text: &str) -> io::Result<String> {
    let mut stream = BufReader::new(stream);
    writeln!(stream.get_mut(), "{text}")?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    Ok(line)
}

fn tell(port: u32, text: &str) -> io::Result<String> {
    let (socket, there) = (socket()?, address(HOST, port));
    let len = size_of_val(&there) as libc::socklen_t;
    // SAFETY: the address lives and has this length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const there).cast(), len) })?;
    ask(File::from(socket), text)
}

fn connect(path: &str, port: u32, text: &str) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    let greeting = ask(&stream, &format!("CONNECT {port}"))?;
    if !greeting.starts_with("OK ") {
        return Err(io::Error::other(format!("{greeting:?} is no OK")));
    }
    ask(&stream, text)
}

fn answer(path: &str) -> io::Result<String> {
    let stream = UnixListener::bind(path)?.accept()?.0;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    (&stream).write_all(format!("heard: {line}").as_bytes())?;
    Ok(line)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let port = |text: &str| text.parse::<u32>().map_err(io::Error::other);
    let result = match args[..] {
        ["echo", at] => port(at).and_then(|at| echo(at).map(|()| String::new())),
        ["tell", at, text] => port(at).and_then(|at| tell(at, text)),
        ["ask", path, at, text] => port(at).and_then(|at| connect(path, at, text)),
        ["answer", path] => answer(path),
        _ => {
            eprintln!(
                "usage: vsock echo PORT | tell PORT TEXT | ask SOCKET PORT TEXT | answer SOCKET"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(line) => {
            print!("vsock: {line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("VSOCK-BAD {error}");
            ExitCode::FAILURE
        }
    }
}
