//! Requests: what they do, and what is refused. One body over the engines, with and without O_DIRECT.

use tempfile::NamedTempFile;

use super::config_space;
use super::request::{DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES};
use super::testing::{Machine, SIZE, each, expected, folder, header, range, same, ways};
use super::*;
use crate::virtio::VirtioDevice;

#[test]
fn what_is_written_is_read() {
    each(|machine| {
        let data: Vec<u8> = (0..8192u32).map(|at| (at * 7) as u8).collect();
        let (status, _, len) = machine.ask(OUT, 8, &[&data], &[]);
        assert_eq!((status, len), (OK, 1));
        same(&machine.on_disk(8 * 512, 8192), &data);
        let (status, read, len) = machine.ask(IN, 8, &[], &[8192]);
        assert_eq!((status, len), (OK, 8193));
        assert_eq!(read, data);
        let (status, read, _) = machine.ask(IN, SIZE / 512 - 1, &[], &[512]);
        assert_eq!((status, read), (OK, expected(SIZE - 512, 512)));
        assert_eq!(machine.ask(FLUSH, 0, &[], &[]).0, OK);
        let counted = [
            "read_ops",
            "read_bytes",
            "write_ops",
            "write_bytes",
            "flush_ops",
        ]
        .map(|name| machine.counter(name));
        assert_eq!(counted, [2, 8704, 1, 8192, 1]);
    });
}

#[test]
fn any_split_into_parts() {
    each(|machine| {
        // Odd lengths, and sectors that are no whole blocks.
        for (sector, lens) in [
            (1, vec![1u32, 511]),
            (3, vec![100, 13, 911]),
            (16, vec![4096, 8192]),
            (48, vec![7, 4089, 4096, 1, 4095]),
        ] {
            let total: usize = lens.iter().sum::<u32>() as usize;
            let (status, read, len) = machine.ask(IN, sector, &[], &lens);
            assert_eq!((status, len as usize), (OK, total + 1));
            same(&read, &expected(sector * 512, total));
            let data: Vec<u8> = (0..total).map(|at| at as u8 ^ 0x55).collect();
            let mut rest = &data[..];
            let mut parts = Vec::new();
            for &len in &lens {
                let (part, more) = rest.split_at(len as usize);
                parts.push(part);
                rest = more;
            }
            assert_eq!(machine.ask(OUT, sector, &parts, &[]).0, OK);
            same(&machine.on_disk(sector * 512, total), &data);
            assert_eq!(
                machine.on_disk(sector * 512 - 1, 1),
                expected(sector * 512 - 1, 1)
            );
        }
    });
}

#[test]
fn a_transfer_longer_than_a_bounce_buffer() {
    each(|machine| {
        let len = 1 << 20;
        let (status, read, _) = machine.ask(IN, 0, &[], &[3, len - 3]);
        assert_eq!(status, OK);
        same(&read, &expected(0, len as usize));
        let data: Vec<u8> = (0..len).map(|at| (at >> 3) as u8).collect();
        assert_eq!(machine.ask(OUT, 8, &[&data[..5], &data[5..]], &[]).0, OK);
        same(&machine.on_disk(4096, len as usize), &data);
    });
}

#[test]
fn header_and_status_may_be_anywhere() {
    each(|machine| {
        // The header in pieces, with data in the last of them; the status behind data in one buffer.
        let mut bytes = header(OUT, 2);
        bytes.extend([0xab; 512]);
        let head = machine
            .driver
            .offer(&[&bytes[..3], &bytes[3..10], &bytes[10..]], &[1]);
        assert_eq!(machine.driver.wait_used(), (head, 1));
        assert_eq!(machine.on_disk(1024, 512), [0xab; 512]);
        let head = machine.driver.offer(&[&header(IN, 2)], &[513]);
        assert_eq!(machine.driver.wait_used(), (head, 513));
        let mut read = machine.driver.written(head);
        assert_eq!(read.pop(), Some(OK));
        assert_eq!(read, [0xab; 512]);
    });
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    each(|machine| {
        for (kind, sector, flags) in [
            (DISCARD, 8, 0),
            (WRITE_ZEROES, 64, 0),
            (WRITE_ZEROES, 128, 1),
            // No whole blocks.
            (WRITE_ZEROES, 193, 0),
            (WRITE_ZEROES, 257, 1),
        ] {
            if kind == DISCARD && machine.block.features() & config_space::DISCARD == 0 {
                continue;
            }
            assert_eq!(machine.range(kind, sector, 16, flags), OK, "{sector}");
            let at = sector * 512;
            let (status, read, _) = machine.ask(IN, sector, &[], &[8192]);
            assert_eq!((status, read), (OK, vec![0; 8192]));
            assert_eq!(machine.on_disk(at - 1, 1), expected(at - 1, 1));
            assert_eq!(machine.on_disk(at + 8192, 1), expected(at + 8192, 1));
        }
        assert_eq!(machine.file.as_file().metadata().expect("it").len(), SIZE);
        assert_eq!(machine.counter("write_zeroes_ops"), 4);
    });
}

#[test]
fn what_may_not_be_is_refused_and_does_nothing() {
    each(|machine| {
        let end = SIZE / 512;
        let sector = [7; 512];
        for (kind, at, data, room, wanted) in [
            (IN, end, vec![], vec![512], IOERR),
            (IN, end - 1, vec![], vec![1024], IOERR),
            (IN, u64::MAX, vec![], vec![512], IOERR),
            (IN, u64::MAX / 512 + 1, vec![], vec![512], IOERR),
            (IN, 0, vec![], vec![511], IOERR),
            (IN, 0, vec![], vec![], OK),
            (OUT, end, vec![&sector[..]], vec![], IOERR),
            (OUT, u64::MAX - 1, vec![&sector[..]], vec![], IOERR),
            (OUT, 0, vec![&sector[1..]], vec![], IOERR),
            (OUT, 0, vec![], vec![], OK),
            (77, 0, vec![&sector[..]], vec![512], UNSUPP),
            (14, 0, vec![&range(0, 1, 0)[..]], vec![], UNSUPP),
            (DISCARD, 0, vec![], vec![], IOERR),
            (DISCARD, 0, vec![&range(0, 1, 0)[..15]], vec![], IOERR),
            (
                DISCARD,
                0,
                vec![&range(0, 1, 0)[..], &range(8, 1, 0)[..]],
                vec![],
                IOERR,
            ),
            (DISCARD, 0, vec![&range(end, 1, 0)[..]], vec![], IOERR),
            (DISCARD, 0, vec![&range(u64::MAX, 1, 0)[..]], vec![], IOERR),
            (DISCARD, 0, vec![&range(0, u32::MAX, 0)[..]], vec![], IOERR),
            (DISCARD, 0, vec![&range(0, 8, 1)[..]], vec![], UNSUPP),
            (DISCARD, 0, vec![&range(0, 0, 0)[..]], vec![], OK),
            (
                WRITE_ZEROES,
                0,
                vec![&range(end - 1, 2, 0)[..]],
                vec![],
                IOERR,
            ),
            (WRITE_ZEROES, 0, vec![&range(0, 8, 2)[..]], vec![], UNSUPP),
        ] {
            let (status, ..) = machine.ask(kind, at, &data, &room);
            assert_eq!(status, wanted, "{kind} at {at}: {data:?} {room:?}");
        }
        same(
            &machine.on_disk(0, SIZE as usize),
            &expected(0, SIZE as usize),
        );
        assert_eq!(
            machine
                .driver
                .interrupt
                .reset
                .load(std::sync::atomic::Ordering::SeqCst),
            0
        );
    });
}

#[test]
fn serial_number() {
    each(|machine| {
        let (status, id, len) = machine.ask(GET_ID, 0, &[], &[20]);
        assert_eq!((status, len), (OK, 21));
        assert_eq!(id, b"serial-0123456789\0\0\0");
        let (status, id, len) = machine.ask(GET_ID, 0, &[], &[7, 6]);
        assert_eq!((status, id, len), (OK, b"serial-012345".to_vec(), 14));
    });
}

#[test]
fn a_read_only_disk_is_only_read() {
    let folder = folder();
    for way in ways(folder.path()) {
        let mut machine = Machine::new(folder.path(), way, |config| config.read_only = true);
        let features = machine.block.features();
        assert_ne!(features & config_space::RO, 0);
        assert_eq!(
            features & (config_space::DISCARD | config_space::WRITE_ZEROES),
            0
        );
        let (status, read, _) = machine.ask(IN, 4, &[], &[512]);
        assert_eq!((status, read), (OK, expected(2048, 512)));
        assert_eq!(machine.ask(OUT, 4, &[&[0; 512]], &[]).0, IOERR);
        assert_eq!(machine.range(DISCARD, 0, 8, 0), IOERR);
        assert_eq!(machine.range(WRITE_ZEROES, 0, 8, 0), IOERR);
        assert_eq!(machine.ask(FLUSH, 0, &[], &[]).0, OK);
        assert_eq!(machine.on_disk(0, 8192), expected(0, 8192));
    }
}

#[test]
fn configuration_space_as_the_specification_says() {
    let folder = folder();
    let file = NamedTempFile::new_in(folder.path()).expect("a file");
    file.as_file().set_len(SIZE).expect("a size");
    let config = DiskConfig {
        num_queues: 4,
        ..DiskConfig::new(file.path())
    };
    let block = Block::new("disk", config).expect("a disk");
    assert_eq!(block.queue_sizes(), [256; 4]);
    let mut space = [0xee; 70];
    block.read_config(0, &mut space);
    let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().expect("four bytes"));
    assert_eq!(
        (u32_at(0), u32_at(12), u32_at(20)),
        (SIZE as u32 / 512, 254, 512)
    );
    assert_eq!(u16::from_le_bytes([space[34], space[35]]), 4);
    assert_eq!((u32_at(48), u32_at(52)), (1 << 22, 1));
    if block.features() & config_space::DISCARD != 0 {
        assert_eq!((u32_at(36), u32_at(40), space[56]), (1 << 22, 1, 1));
        assert!(u32_at(44) > 0);
    }
    assert_eq!(space[60..], [0; 10]);
    assert_ne!(block.features() & config_space::MQ, 0);
    assert_eq!(block.features() & (1 << 1 | 1 << 11 | config_space::RO), 0);
    assert!(["io_uring", "sync"].contains(&block.engine_name()));
}
