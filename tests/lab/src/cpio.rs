//! A writer of initramfs archives: cpio in the `newc` format.
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`. A header is 110 ASCII
//! characters, name and data are padded to 4 bytes, and the entry `TRAILER!!!` ends the archive. Folders
//! on the way to an entry are created by the writer, once.

use std::collections::BTreeSet;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive under construction; every entry belongs to root.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder, and those above it; one that is there already is left alone.
    pub fn folder(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.entry(path, S_IFDIR | 0o755, &[]);
        self.folders.insert(path.to_owned());
    }

    /// Adds a file with the permission bits `mode`. Of two with the same path the kernel keeps the later.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.above(path);
        self.entry(path.trim_matches('/'), S_IFREG | (mode & 0o7777), data);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.above(path);
        self.entry(path.trim_matches('/'), S_IFLNK | 0o777, target.as_bytes());
    }

    /// The archive with its trailer.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn above(&mut self, path: &str) {
        if let Some((above, _)) = path.trim_matches('/').rsplit_once('/') {
            self.folder(above);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let size = u32::try_from(data.len()).expect("an initramfs entry is smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device and rdev (major, minor), name size, checksum
        for field in [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and data of each entry, read back field by field.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let hex = |at: usize| {
            u32::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
        };
        let (mut at, mut found) = (0, Vec::new());
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) =
                (hex(at + 14), hex(at + 54) as usize, hex(at + 94) as usize);
            let name =
                String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            at = (data + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(at, bytes.len());
                return found;
            }
            found.push((name, mode, bytes[data..data + size].to_vec()));
        }
    }

    #[test]
    fn writes_entries_with_their_folders_once() {
        let mut archive = Archive::new();
        archive.file("/a/b/one", 0o755, b"12345");
        archive.file("a/b/two", 0o644, b"");
        archive.link("/a/three", "b/one");
        let entries = entries(&archive.finish());
        let listed: Vec<_> = entries
            .iter()
            .map(|(name, mode, _)| (name.as_str(), *mode))
            .collect();
        assert_eq!(
            listed,
            [
                ("a", 0o040_755),
                ("a/b", 0o040_755),
                ("a/b/one", 0o100_755),
                ("a/b/two", 0o100_644),
                ("a/three", 0o120_777)
            ]
        );
        assert_eq!(entries[2].2, b"12345");
        assert_eq!(entries[4].2, b"b/one");
    }

    #[test]
    fn an_empty_archive_is_only_a_trailer() {
        assert_eq!(entries(&Archive::new().finish()), []);
    }
}
