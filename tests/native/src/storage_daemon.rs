//! `qemu-storage-daemon` (package `qemu-system-common`) as the back end of a disk.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// A running daemon with one export.
pub struct StorageDaemon {
    child: Child,
    socket: PathBuf,
}

impl StorageDaemon {
    /// Exports `image` on `socket`.
    pub fn start(image: &Path, socket: &Path, queues: u32) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            // Two of them have the image while a guest moves; only one has a guest that runs.
            .arg(format!(
                "driver=file,node-name=image,filename={},locking=off",
                image.display()
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=disk,node-name=image,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null());
        let child = command
            .spawn()
            .context("qemu-storage-daemon (package qemu-system-common)")?;
        let mut daemon = Self {
            child,
            socket: socket.to_owned(),
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            ensure!(
                Instant::now() < deadline && daemon.child.try_wait()?.is_none(),
                "qemu-storage-daemon does not listen on {}",
                socket.display()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.kill();
    }
}
