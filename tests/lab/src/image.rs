//! The user spaces of lab hosts and guests: busybox, kernel modules, an init, and what a test adds.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Kernel;
use crate::cpio::Archive;

/// What a lab host loads, in this order: KVM, then virtio for the link between two hosts, then bridges.
const HOST_MODULES: [&str; 16] = [
    "irqbypass",
    "kvm",
    "kvm-amd",
    "tun",
    "tap",
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "llc",
    "stp",
    "bridge",
];

/// What a guest loads: the power button and the device that its key press is read from.
const GUEST_MODULES: [&str; 2] = ["evdev", "button"];

/// An initramfs under construction: a busybox user space whose modules and init are set.
#[derive(Clone, Debug)]
pub struct Image {
    archive: Archive,
    libraries: BTreeSet<PathBuf>,
}

impl Image {
    /// A lab host's user space for its kernel.
    pub fn host(kernel: Kernel) -> Result<Self> {
        let mut image = Self::busybox(kernel, &HOST_MODULES)?;
        image
            .archive
            .file("init", 0o755, include_bytes!("inside/host-init.sh"));
        image
            .archive
            .file("lab/lib.sh", 0o644, include_bytes!("inside/lib.sh"));
        Ok(image)
    }

    /// A guest's user space: a shell on the first serial port, and the power button turns it off. It loads these modules too.
    pub fn guest(kernel: Kernel, modules: &[&str]) -> Result<Self> {
        let modules: Vec<&str> = GUEST_MODULES.iter().chain(modules).copied().collect();
        let mut image = Self::busybox(kernel, &modules)?;
        image
            .archive
            .file("init", 0o755, include_bytes!("inside/guest-init.sh"));
        Ok(image)
    }

    /// Adds a file with this content.
    pub fn data(&mut self, inside: &str, data: &[u8]) {
        self.archive.file(inside, 0o644, data);
    }

    /// Adds a file of this machine, with its permissions.
    pub fn file(&mut self, host: &Path, inside: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let data = fs::read(host).with_context(|| format!("cannot read {}", host.display()))?;
        let mode = fs::metadata(host)?.permissions().mode();
        self.archive.file(inside, mode, &data);
        Ok(())
    }

    /// Adds a program of this machine and every shared library it needs, each at its own path.
    pub fn program(&mut self, host: &Path, inside: &str) -> Result<()> {
        self.file(host, inside)?;
        for library in libraries(host)? {
            if self.libraries.insert(library.clone()) {
                let path = library
                    .to_str()
                    .with_context(|| format!("{} is not UTF-8", library.display()))?;
                self.file(&library, path)?;
            }
        }
        Ok(())
    }

    /// The initramfs.
    pub fn finish(self) -> Vec<u8> {
        self.archive.finish()
    }

    fn busybox(kernel: Kernel, modules: &[&str]) -> Result<Self> {
        let busybox = crate::find("busybox")
            .context("busybox is not installed: apt-get install busybox-static")?;
        let mut archive = Archive::new();
        for folder in ["proc", "sys", "dev", "tmp", "root", "etc"] {
            archive.folder(folder);
        }
        let applets = Command::new(&busybox)
            .arg("--list")
            .output()
            .context("cannot start busybox")?;
        for applet in String::from_utf8_lossy(&applets.stdout).split_whitespace() {
            if applet != "busybox" {
                archive.link(&format!("bin/{applet}"), "busybox");
            }
        }
        let mut order = String::new();
        for name in modules {
            // One that is absent is built in, or belongs to another kernel series.
            if let Some(module) = kernel.module(name)? {
                archive.file(&format!("lib/m/{name}.ko"), 0o644, &module);
                order.push_str(name);
                order.push('\n');
            }
        }
        archive.file("lib/m/order", 0o644, order.as_bytes());
        let mut image = Self {
            archive,
            libraries: BTreeSet::new(),
        };
        image.program(&busybox, "bin/busybox")?;
        Ok(image)
    }
}

/// The shared libraries that `ldd` finds for a program, the dynamic loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .env("LC_ALL", "C")
        .arg(program)
        .output()
        .context("cannot start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A static program has none, which ldd reports as a failure.
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            errors.contains("not a dynamic executable"),
            "ldd cannot read {}: {}",
            program.display(),
            errors.trim()
        );
        return Ok(Vec::new());
    }
    parse_ldd(&text).with_context(|| format!("{} lacks a library", program.display()))
}

fn parse_ldd(text: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in text.lines().map(str::trim) {
        let place = line
            .split_once("=>")
            .map_or(line, |(_, place)| place.trim());
        ensure!(!place.starts_with("not found"), "{line}");
        if let Some(path) = place
            .split_whitespace()
            .next()
            .filter(|path| path.starts_with('/'))
        {
            paths.push(PathBuf::from(path));
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_libraries_and_the_loader_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libgcc_s.so.1",
            "/lib64/ld-linux-x86-64.so.2",
        ]
        .map(PathBuf::from);
        assert_eq!(parse_ldd(text).unwrap(), expected);
        assert_eq!(
            parse_ldd("\tstatically linked\n").unwrap(),
            Vec::<PathBuf>::new()
        );
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        assert!(
            parse_ldd("\tlibnone.so.1 => not found\n")
                .unwrap_err()
                .to_string()
                .contains("libnone.so.1")
        );
    }
}
