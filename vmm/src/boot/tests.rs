//! Disks as `mke2fs` makes them, and as their guests may leave them.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;

use tempfile::{NamedTempFile, TempDir};

use super::*;

/// A file system of so many MiB with these files, empty ones of a size included.
fn ext4(files: &[(&str, &[u8])], large: &[(&str, u64)], mib: u64) -> Vec<u8> {
    let tree = TempDir::new().expect("a folder");
    let place = |path: &str| {
        let path = tree.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        path
    };
    for (path, bytes) in files {
        std::fs::write(place(path), bytes).expect("a file");
    }
    for (path, len) in large {
        let file = File::create(place(path)).expect("a file");
        file.set_len(*len).expect("a size");
    }
    let image = NamedTempFile::new().expect("a file");
    image.as_file().set_len(mib << 20).expect("a size");
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([tree.path(), image.path()])
        .status();
    assert!(made.expect("mke2fs, of e2fsprogs").success());
    std::fs::read(image.path()).expect("an image")
}

fn image(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("room");
    file
}

fn find_in(bytes: &[u8], cmdline: Option<&str>) -> Result<Found, String> {
    let image = image(bytes);
    let disks = [("root".to_owned(), image.path().to_owned())];
    find(&disks, cmdline).map_err(|error| error.to_string())
}

fn contents(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("memory");
    bytes
}

const ENTRY: &[u8] =
    b"version 2\nlinux /boot/vmlinuz-2\ninitrd /boot/a /boot/b\noptions root=/dev/vda ro\n";

fn debian() -> Vec<u8> {
    ext4(
        &[
            ("boot/vmlinuz-2", b"the second kernel"),
            ("boot/vmlinuz-10", b"the tenth kernel"),
            ("boot/initrd.img-10", b"the tenth"),
            ("boot/a", b"first"),
            ("boot/b", b"second"),
            ("boot/loader/entries/two.conf", ENTRY),
            (
                "boot/loader/entries/one.conf",
                b"version 1\nlinux /boot/vmlinuz-10\noptions one\n",
            ),
        ],
        &[],
        8,
    )
}

/// A disk with one partition, number 3, by a GPT.
fn with_gpt(file_system: &[u8]) -> Vec<u8> {
    let first = 64_u64;
    let last = first + file_system.len() as u64 / 512 - 1;
    let mut disk = vec![0; (last as usize + 1) * 512];
    disk[446 + 4] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 72..512 + 80].copy_from_slice(&2_u64.to_le_bytes());
    disk[512 + 80..512 + 84].copy_from_slice(&128_u32.to_le_bytes());
    disk[512 + 84..512 + 88].copy_from_slice(&128_u32.to_le_bytes());
    let entry = 1024 + 2 * 128;
    disk[entry..entry + 16].fill(7);
    disk[entry + 32..entry + 40].copy_from_slice(&first.to_le_bytes());
    disk[entry + 40..entry + 48].copy_from_slice(&last.to_le_bytes());
    disk[first as usize * 512..].copy_from_slice(file_system);
    disk
}

/// The same as a logical partition, number 5, of an MBR.
fn with_mbr(file_system: &[u8]) -> Vec<u8> {
    let (table, first) = (32_u32, 33_u32);
    let mut disk = vec![0; first as usize * 512 + file_system.len()];
    for (at, kind, start) in [
        (0, 0x0f, table),
        (table as usize * 512, 0x83, first - table),
    ] {
        disk[at + 446 + 4] = kind;
        disk[at + 446 + 8..at + 446 + 12].copy_from_slice(&start.to_le_bytes());
        let sectors = file_system.len() as u32 / 512;
        disk[at + 446 + 12..at + 446 + 16].copy_from_slice(&sectors.to_le_bytes());
        disk[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
    }
    disk[first as usize * 512..].copy_from_slice(file_system);
    disk
}

#[test]
fn the_newest_entry_is_found_wherever_the_file_system_is() {
    let file_system = debian();
    for (disk, partition) in [
        (file_system.clone(), None),
        (with_gpt(&file_system), Some(3)),
        (with_mbr(&file_system), Some(5)),
    ] {
        let mut found = find_in(&disk, None).expect("a kernel");
        let booted = &found.booted;
        assert_eq!(booted.partition, partition);
        assert_eq!(booted.by, "/boot/loader/entries/two.conf");
        assert_eq!(booted.kernel, "/boot/vmlinuz-2");
        assert_eq!(booted.cmdline, "root=/dev/vda ro");
        assert_eq!(contents(&mut found.kernel), b"the second kernel");
        // One after the other, at multiples of four.
        let mut initramfs = found.initramfs.expect("two files");
        assert_eq!(contents(&mut initramfs), b"first\0\0\0second\0\0");
        let found = find_in(&disk, Some("mine")).expect("a kernel");
        assert_eq!(found.booted.cmdline, "mine");
    }
}

#[test]
fn the_ways_to_name_a_kernel_in_their_order() {
    let grub: &[u8] = b"menuentry 'x' {\n linux /vmlinuz-2 quiet\n initrd /initrd.img-2\n}\n";
    let mut files: Vec<(&str, &[u8])> = vec![
        ("vmlinuz-9", b"9"),
        ("initrd.img-9", b"i9"),
        ("vmlinuz-2", b"2"),
        ("initrd.img-2", b"i2"),
    ];
    for (file, by, kernel) in [
        (None, "/vmlinuz-*", "/vmlinuz-9"),
        (Some(("vmlinuz", &b"link"[..])), "/vmlinuz", "/vmlinuz"),
        (
            Some(("grub/grub.cfg", grub)),
            "/grub/grub.cfg",
            "/vmlinuz-2",
        ),
        (
            Some(("loader/entries/e.conf", b"linux /vmlinuz-9\n")),
            "/loader/entries/e.conf",
            "/vmlinuz-9",
        ),
        // Newer, by default.
        (
            Some(("loader/entries/a.conf", b"linux /vmlinuz-2\n")),
            "/loader/entries/e.conf",
            "/vmlinuz-9",
        ),
        (
            Some(("loader/loader.conf", b"timeout 3\ndefault a*\n")),
            "/loader/entries/a.conf",
            "/vmlinuz-2",
        ),
    ] {
        files.extend(file);
        let found = find_in(&ext4(&files, &[], 4), None).expect("a kernel");
        assert_eq!((&*found.booted.by, &*found.booted.kernel), (by, kernel));
    }
}

#[test]
fn what_does_not_boot_is_refused_with_the_reason() {
    let refused = |bytes: &[u8], parts: &[&str]| {
        let error = find_in(bytes, None).expect_err("nothing to boot");
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
    };
    refused(&[0; 4096], &["root: neither a file system nor a partition"]);
    refused(&[], &["root: neither"]);
    let empty = ext4(&[("etc/hostname", b"x")], &[], 4);
    refused(&empty, &["root: no kernel", "grub/grub.cfg"]);
    refused(&with_gpt(&empty), &["root, partition 3: no kernel"]);
    let whole = debian();
    refused(&whole[..whole.len() / 2], &["cut off", "8388608 bytes"]);
    let large = [("vmlinuz", files::MOST_KERNEL + 1)];
    refused(&ext4(&[], &large, 8), &["/vmlinuz is too large"]);
    let error = find(&[], None).expect_err("no disk").to_string();
    assert!(error.contains("no disk at all"), "{error}");
    let disks = [("root".to_owned(), PathBuf::from("/nowhere"))];
    let error = find(&disks, None).expect_err("no image").to_string();
    assert!(error.contains("cannot read /nowhere"), "{error}");
}

#[test]
fn damage_is_an_error_or_harmless() {
    let whole = with_gpt(&debian());
    let image = image(&whole);
    let disks = [("root".to_owned(), image.path().to_owned())];
    let file = image.as_file();
    let mut seed = 1_u32;
    let mut random = move || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed >> 8
    };
    // Of what is not zero, a few bytes at a time.
    let used: Vec<u64> = (0..whole.len() as u64)
        .filter(|at| whole[*at as usize] != 0)
        .collect();
    for _ in 0..3000 {
        let places: Vec<u64> = (0..random() % 4 + 1)
            .map(|_| used[random() as usize % used.len()])
            .collect();
        for at in &places {
            file.write_all_at(&[random() as u8], *at).expect("room");
        }
        let _ = find(&disks, None);
        for at in &places {
            let byte = [whole[*at as usize]];
            file.write_all_at(&byte, *at).expect("room");
        }
    }
    let mut file = file;
    file.seek(SeekFrom::Start(0)).expect("a file");
    assert!(find(&disks, None).is_ok(), "all is as it was");
}
