//! What needs a special host: a full file system, a block device, many parts. Left out where the host does not allow it.

use std::path::Path;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress};

use super::request::{DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES};
use super::testing::{Machine, Way, each, each_with, expected, folder, header, range, same, ways};
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

/// Opens a sparse image on a file system with room for 16 pages, which only the descriptor keeps.
fn tiny(way: Way) -> Option<Block> {
    let open = move || {
        let folder = tempfile::tempdir().expect("a folder");
        // A mount namespace of this thread, so that nobody else sees the file system and it goes with the descriptor.
        let path = std::ffi::CString::new(folder.path().to_str().expect("a path")).expect("a path");
        // SAFETY: it changes this thread only, which ends here.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        let mount =
            |kind: &std::ffi::CStr, target: &std::ffi::CStr, flags, options: &std::ffi::CStr| {
                // SAFETY: all are strings that end.
                unsafe {
                    libc::mount(
                        kind.as_ptr(),
                        target.as_ptr(),
                        kind.as_ptr(),
                        flags,
                        options.as_ptr().cast(),
                    )
                }
            };
        if result != 0
            || mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE, c"") != 0
            || mount(c"tmpfs", &path, 0, c"size=64k") != 0
        {
            eprintln!("left out: {}", std::io::Error::last_os_error());
            return None;
        }
        let image = folder.path().join("disk.raw");
        let file = std::fs::File::create(&image).expect("a file");
        file.set_len(1 << 20).expect("a sparse file");
        let config = DiskConfig {
            engine: Some(way.engine),
            ..DiskConfig::new(image)
        };
        let disk = Block::new("disk", config).expect("a disk");
        // SAFETY: the path ends; the descriptor keeps the file system.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        Some(disk)
    };
    std::thread::spawn(open).join().expect("no panic")
}

#[test]
fn a_full_host_is_an_error_and_no_loss() {
    let folder = folder();
    for way in ways(folder.path()) {
        if way.direct {
            continue;
        }
        let Some(block) = tiny(way) else { return };
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut machine = Machine::start(block, Driver::new(0), file);
        let mut written = 0;
        let mut refused = 0;
        for number in 0..24u8 {
            let data = [number + 1; 4096];
            match machine.ask(OUT, u64::from(number) * 8, &[&data], &[]).0 {
                OK => written += 1,
                IOERR => refused += 1,
                status => panic!("status {status}"),
            }
        }
        assert!(written > 0 && refused > 0, "{written} and {refused}");
        // A request of which a part has room is no success either.
        assert_eq!(machine.ask(OUT, 1024, &[&[1; 128 << 10]], &[]).0, IOERR);
        assert_eq!(machine.counter("errors"), refused + 1);
        for number in 0..written {
            let (status, read, _) = machine.ask(IN, number * 8, &[], &[4096]);
            assert_eq!(status, OK);
            same(&read, &[number as u8 + 1; 4096]);
        }
        // tmpfs cannot zero a range otherwise than by a hole: zeros are written where there is room, holes made where that may be.
        assert_eq!(machine.range(WRITE_ZEROES, 0, 8, 0), OK);
        assert_eq!(machine.range(WRITE_ZEROES, 512, 512, 0), IOERR);
        assert_eq!(machine.range(WRITE_ZEROES, 0, 2048, 1), OK);
        let (status, read, _) = machine.ask(IN, 0, &[], &[65536]);
        assert_eq!(status, OK);
        same(&read, &[0; 65536]);
        assert_eq!(machine.ask(OUT, 0, &[&[3; 4096]], &[]).0, OK);
    }
}

/// Where the buffers of [`in_parts`] are: 512 bytes each, 1024 apart.
const DATA: u64 = 0x100_0000;

/// Makes a request of many buffers by an indirect table; returns its status and the length that was said.
fn in_parts(machine: &mut Machine, kind: u32, sector: u64, parts: u32) -> (u8, u32) {
    let (table, header_at, status_at) = (0x300_0000u64, 0x200_0000, 0x200_1000);
    let memory = machine.driver.memory().clone();
    let put = |at: u32, gpa: u64, len: u32, flags: u16| {
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend((at as u16 + 1).to_le_bytes());
        let place = GuestAddress(table + u64::from(at) * 16);
        memory.write_slice(&bytes, place).expect("RAM");
    };
    memory
        .write_slice(&header(kind, sector), GuestAddress(header_at))
        .expect("RAM");
    put(0, header_at, 16, 1);
    for part in 0..parts {
        let flags = if kind == IN { 1 | 2 } else { 1 };
        put(part + 1, DATA + u64::from(part) * 1024, 512, flags);
    }
    put(parts + 1, status_at, 1, 2);
    machine.driver.descriptor(40, table, (parts + 2) * 16, 4, 0);
    machine.driver.make_available(40);
    let (head, len) = machine.driver.wait_used();
    assert_eq!(head, 40);
    let status = memory.read_obj(GuestAddress(status_at)).expect("RAM");
    (status, len)
}

#[test]
fn more_parts_than_a_system_call_takes() {
    const PARTS: u32 = 2500;
    let body = |machine: &mut Machine| {
        let len = PARTS * 512;
        assert_eq!(in_parts(machine, IN, 8, PARTS), (OK, len + 1));
        assert_eq!(in_parts(machine, OUT, 0, PARTS), (OK, 1));
        let wanted = expected(4096, len as usize);
        for part in 0..PARTS as usize {
            let mut bytes = [0; 512];
            let at = GuestAddress(DATA + part as u64 * 1024);
            let memory = machine.driver.memory();
            memory.read_slice(&mut bytes, at).expect("RAM");
            same(&bytes, &wanted[part * 512..(part + 1) * 512]);
        }
        same(&machine.on_disk(0, wanted.len()), &wanted);
    };
    each_with(|config| config.queue_size = 4096, body);
}

#[test]
fn more_parts_than_any_driver_may_send() {
    each(|machine| {
        assert_eq!(in_parts(machine, IN, 0, 1022).0, OK);
        assert_eq!(in_parts(machine, IN, 0, 1023), (IOERR, 1));
    });
}

/// A loop device, gone with this.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).expect("a name");
        output
            .status
            .success()
            .then(|| Self(name.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_of_large_blocks() {
    let folder = folder();
    for way in ways(folder.path()) {
        let mut file = tempfile::NamedTempFile::new_in(folder.path()).expect("a file");
        std::io::Write::write_all(&mut file, &expected(0, 4 << 20)).expect("room");
        let Some(device) = Loop::new(file.path()) else {
            eprintln!("left out: this host has no loop device for us");
            return;
        };
        let config = DiskConfig {
            direct: way.direct,
            engine: Some(way.engine),
            ..DiskConfig::new(&device.0)
        };
        let block = Block::new("disk", config.clone()).expect("a disk");
        assert!(matches!(
            Block::new("disk", config),
            Err(DiskError::InUse { .. })
        ));
        assert_eq!(block.capacity_bytes(), 4 << 20);
        let mut bytes = [0; 4];
        block.read_config(20, &mut bytes);
        assert_eq!(u32::from_le_bytes(bytes), 4096);
        let grown = block.resize(Some(8 << 20));
        assert!(matches!(grown, Err(DiskError::Resize { .. })));
        let mut machine = Machine::start(block, Driver::new(0), file);
        let (status, read, _) = machine.ask(IN, 8, &[], &[100, 8092]);
        assert_eq!(status, OK);
        same(&read, &expected(4096, 8192));
        // A sector is less than its block.
        assert_eq!(machine.ask(OUT, 3, &[&[5; 512]], &[]).0, OK);
        assert_eq!(machine.ask(OUT, 16, &[&[6; 8192]], &[]).0, OK);
        for (sector, sectors, unmap) in [(64, 16, 0), (128, 16, 1), (193, 3, 0), (257, 3, 1)] {
            assert_eq!(machine.range(WRITE_ZEROES, sector, sectors, unmap), OK);
            let len = sectors * 512;
            let (status, read, _) = machine.ask(IN, sector, &[], &[len]);
            assert_eq!(status, OK);
            same(&read, &vec![0; len as usize]);
        }
        if machine.block.features() & config_space::DISCARD != 0 {
            let range = range(1024, 64, 0);
            assert_eq!(machine.ask(DISCARD, 0, &[&range], &[]).0, OK);
        }
        let (status, read, _) = machine.ask(IN, 0, &[], &[4096]);
        assert_eq!(status, OK);
        same(&read[1536..2048], &[5; 512]);
        same(&read[..1536], &expected(0, 1536));
        same(&read[2048..], &expected(2048, 2048));
        assert_eq!(machine.ask(FLUSH, 0, &[], &[]).0, OK);
    }
}
