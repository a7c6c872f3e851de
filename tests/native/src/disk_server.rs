//! Processes that serve a disk by vhost-user: `qemu-storage-daemon`, and a back end of our own that notes what it has begun.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The program of [`Server::Qemu`].
const DAEMON: &str = "qemu-storage-daemon";

/// Which back end serves a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `qemu-storage-daemon` (package `qemu-system-common`).
    Qemu,
    /// `vhost-back-end` of this project's tests.
    Ours,
}

impl Server {
    /// For the name of a test.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Ours => "ours",
        }
    }

    /// Why it cannot be started here, if so.
    pub fn missing(self) -> Option<String> {
        let path = std::env::var_os("PATH")?;
        let there = std::env::split_paths(&path).any(|folder| folder.join(DAEMON).is_file());
        (self == Self::Qemu && !there)
            .then(|| format!("{DAEMON} is not installed: apt-get install qemu-system-common"))
    }

    fn command(self, image: &Path, socket: &Path, queues: u32) -> Result<Command> {
        let (image, at) = (image.display(), socket.display());
        if self == Self::Ours {
            let path = crate::process::binary()?.with_file_name("vhost-back-end");
            ensure!(
                path.is_file(),
                "{} does not exist: run `cargo build --release -p vhost-back-end`",
                path.display()
            );
            let mut command = Command::new(path);
            command.args([
                "disk",
                &at.to_string(),
                &image.to_string(),
                &queues.to_string(),
            ]);
            return Ok(command);
        }
        let mut command = Command::new(DAEMON);
        // Two of them have the image while a guest moves; only one has a guest that runs.
        let node = format!("driver=file,node-name=image,filename={image},locking=off");
        let export = format!(
            "type=vhost-user-blk,id=disk,node-name=image,writable=on,num-queues={queues},addr.type=unix,addr.path={at}"
        );
        command.args(["--blockdev", &node, "--export", &export]);
        Ok(command)
    }
}

/// A process that serves one disk.
pub struct DiskServer {
    server: Server,
    image: PathBuf,
    socket: PathBuf,
    queues: u32,
    child: Child,
}

impl DiskServer {
    /// Serves `image` on `socket`.
    pub fn start(server: Server, image: &Path, socket: &Path, queues: u32) -> Result<Self> {
        Ok(Self {
            server,
            image: image.to_owned(),
            socket: socket.to_owned(),
            queues,
            child: spawn(server, image, socket, queues)?,
        })
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }

    /// Starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.child = spawn(self.server, &self.image, &self.socket, self.queues)?;
        Ok(())
    }

    /// What all of its processes have written to standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log(&self.socket)).unwrap_or_default()
    }
}

fn log(socket: &Path) -> PathBuf {
    socket.with_extension("log")
}

fn spawn(server: Server, image: &Path, socket: &Path, queues: u32) -> Result<Child> {
    let _ = std::fs::remove_file(socket);
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log(socket))?;
    let mut child = server
        .command(image, socket, queues)?
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .context("no back end: qemu-storage-daemon is in the package qemu-system-common")?;
    let deadline = Instant::now() + Duration::from_secs(20);
    // Not by a connection, which would be taken for the front end; the name alone is there before anybody listens.
    while !listens(socket)? {
        ensure!(
            Instant::now() < deadline && child.try_wait()?.is_none(),
            "no back end listens on {}",
            socket.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a process listens on a unix socket: the flag of /proc/net/unix that is set by listen(2).
fn listens(socket: &Path) -> Result<bool> {
    const LISTENING: &str = "00010000";
    let (table, path) = (
        std::fs::read_to_string("/proc/net/unix")?,
        socket.display().to_string(),
    );
    Ok(table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(LISTENING) && fields.nth(3) == Some(path.as_str())
    }))
}
