//! Stock Debian cloud kernels, from the cache that `cargo xtask test lab` fills.
//!
//! A bzImage is also a container: its payload (Linux `Documentation/arch/x86/boot.rst`, `payload_offset` and
//! `payload_length`) is the compressed ELF kernel, which carries the PVH note and boots by it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// A kernel series of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Debian 12's own 6.1 cloud kernel.
    Debian61,
    /// The 6.12 cloud kernel for Debian 12.
    Debian612,
}

/// The way into a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// The 64-bit boot protocol of a bzImage.
    BzImage,
    /// The PVH entry of the ELF kernel inside.
    Pvh,
}

impl Kernel {
    /// The series as a folder of the cache and as part of a test's name.
    pub fn series(self) -> &'static str {
        match self {
            Kernel::Debian61 => "6.1",
            Kernel::Debian612 => "6.12",
        }
    }

    /// Why this kernel cannot be used here; `None` when it can.
    pub fn missing(self) -> Option<String> {
        self.bz_image().err().map(|_| {
            format!(
                "no {} kernel in {}: run `cargo xtask test lab`",
                self.series(),
                cache().display()
            )
        })
    }

    /// The bzImage.
    pub fn bz_image(self) -> Result<PathBuf> {
        let boot = self.folder().join("boot");
        fs::read_dir(&boot)
            .with_context(|| format!("no kernel in {}", boot.display()))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
            })
            .with_context(|| format!("no vmlinuz in {}", boot.display()))
    }

    /// The kernel file for this way in; the ELF is unpacked on first use and kept in the cache.
    pub fn file(self, entry: Entry) -> Result<PathBuf> {
        let bz_image = self.bz_image()?;
        if entry == Entry::BzImage {
            return Ok(bz_image);
        }
        let elf = self.folder().join("vmlinux");
        if !elf.is_file() {
            let image = fs::read(&bz_image)
                .with_context(|| format!("cannot read {}", bz_image.display()))?;
            let kernel = elf_of(&image)
                .with_context(|| format!("cannot unpack the kernel in {}", bz_image.display()))?;
            // Tests run in parallel: whoever comes first, the file is whole when it has its name.
            let partial = self.folder().join(format!(
                "vmlinux.{}.{:?}",
                std::process::id(),
                std::thread::current().id()
            ));
            fs::write(&partial, kernel)
                .with_context(|| format!("cannot write {}", partial.display()))?;
            fs::rename(&partial, &elf)
                .with_context(|| format!("cannot rename {}", partial.display()))?;
        }
        Ok(elf)
    }

    /// A module's `.ko`, uncompressed; `None` if this kernel has no such module.
    pub fn module(self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(path) = find_module(&self.folder().join("lib/modules"), name)? else {
            return Ok(None);
        };
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(
            if path.extension().is_some_and(|extension| extension == "xz") {
                decompress("xz", &bytes)?
            } else {
                bytes
            },
        ))
    }

    fn folder(self) -> PathBuf {
        cache().join(self.series())
    }
}

impl Entry {
    /// A short name for a test's name.
    pub fn name(self) -> &'static str {
        match self {
            Entry::BzImage => "bzimage",
            Entry::Pvh => "pvh",
        }
    }
}

/// The folder of unpacked kernels: `LAB_CACHE`, or `target/lab-cache` in the repository.
pub fn cache() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join(
        std::env::var_os("LAB_CACHE")
            .map_or_else(|| PathBuf::from("target/lab-cache"), PathBuf::from),
    )
}

fn find_module(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Some(found) = find_module(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|file| {
            file.to_str()
                .and_then(|file| file.strip_prefix(name))
                .is_some_and(|rest| rest == ".ko" || rest == ".ko.xz")
        }) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The ELF kernel inside a bzImage.
fn elf_of(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload_of(image)?;
    let (program, compressed) = match payload {
        // The kernel's build appends the unpacked size, 4 bytes, to what the compressor wrote.
        [0x02, 0x21, 0x4c, 0x18, .., _, _, _, _] => ("lz4", &payload[..payload.len() - 4]),
        [0x28, 0xb5, 0x2f, 0xfd, .., _, _, _, _] => ("zstd", &payload[..payload.len() - 4]),
        [0xfd, b'7', b'z', b'X', b'Z', .., _, _, _, _] => ("xz", &payload[..payload.len() - 4]),
        _ => bail!("its payload is neither lz4, zstd nor xz"),
    };
    let kernel = decompress(program, compressed)?;
    ensure!(
        kernel.starts_with(b"\x7fELF"),
        "its {program} payload is no ELF file"
    );
    Ok(kernel)
}

fn payload_of(image: &[u8]) -> Result<&[u8]> {
    let u32_at = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS"),
        "it has no boot header"
    );
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let (offset, length) = u32_at(0x248)
        .zip(u32_at(0x24c))
        .context("its boot header is cut off")?;
    let start = (sectors + 1) * 512 + offset;
    image
        .get(start..start + length)
        .context("its payload lies beyond its end")
}

/// Pipes `data` through `program -dc`.
fn decompress(program: &str, data: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(["-d", "-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}: install it with apt-get"))?;
    let mut stdin = child
        .stdin
        .take()
        .context("the child has a pipe for its input")?;
    let output = std::thread::scope(|scope| {
        // A writer that fails means that the program stopped reading, which its exit status tells better.
        scope.spawn(move || drop(stdin.write_all(data)));
        child.wait_with_output()
    })?;
    ensure!(
        output.status.success(),
        "{program} cannot unpack it: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(&[0xee; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn finds_the_payload_behind_the_setup_sectors() {
        assert_eq!(payload_of(&image(b"payload")).unwrap(), b"payload");
    }

    #[test]
    fn a_payload_beyond_the_end_is_an_error() {
        let mut image = image(b"payload");
        image.truncate(image.len() - 1);
        assert!(
            payload_of(&image)
                .unwrap_err()
                .to_string()
                .contains("beyond its end")
        );
    }

    #[test]
    fn what_is_no_kernel_is_an_error() {
        assert!(
            elf_of(&[0; 100])
                .unwrap_err()
                .to_string()
                .contains("no boot header")
        );
        assert!(
            elf_of(&image(b"plain text"))
                .unwrap_err()
                .to_string()
                .contains("neither")
        );
    }
}
