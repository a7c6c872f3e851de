//! The tables, walked as a guest would.

use super::*;
use vm_memory::GuestMemoryMmap;

fn config(vcpus: u32) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        max_vcpus: vcpus,
        cpu_hotplug: false,
        ecam: None,
        serial: true,
        pvpanic: false,
        watchdog: false,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The table at a guest-physical address, checked for length and checksum.
fn table_at(tables: &AcpiTables, gpa: u64) -> &[u8] {
    let at = (gpa - tables.base) as usize;
    let len = u32_at(&tables.bytes, at + 4) as usize;
    let table = &tables.bytes[at..at + len];
    assert_eq!(
        sum(table),
        0,
        "checksum of {:?}",
        String::from_utf8_lossy(&table[..4])
    );
    table
}

/// What the XSDT lists.
fn listed(tables: &AcpiTables) -> Vec<&[u8]> {
    let at = (tables.rsdp_address - tables.base) as usize;
    let rsdp = &tables.bytes[at..at + 36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    let xsdt = table_at(tables, u64_at(rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    xsdt[36..]
        .chunks(8)
        .map(|pointer| table_at(tables, u64_at(pointer, 0)))
        .collect()
}

fn find<'a>(tables: &'a AcpiTables, signature: &[u8; 4]) -> Option<&'a [u8]> {
    listed(tables)
        .into_iter()
        .find(|table| &table[..4] == signature)
}

#[test]
fn every_table_is_found_and_sums_up() {
    let tables = build(&config(2)).expect("builds");
    let names: Vec<_> = listed(&tables)
        .iter()
        .map(|table| table[..4].to_vec())
        .collect();
    assert_eq!(names, [b"FACP".to_vec(), b"APIC".to_vec()]);
    let ecam = Some(Ecam {
        base: 0xe000_0000,
        last_bus: 255,
    });
    let tables = build(&AcpiConfig { ecam, ..config(2) }).expect("builds");
    let mcfg = find(&tables, b"MCFG").expect("listed");
    assert_eq!(
        (u64_at(mcfg, 44), mcfg[54], mcfg[55], mcfg.len()),
        (0xe000_0000, 0, 255, 60)
    );
    assert_eq!(
        build(&config(2)).expect("builds"),
        build(&config(2)).expect("builds")
    );
}

#[test]
fn a_watchdog_has_its_table() {
    assert!(find(&build(&config(1)).expect("builds"), b"WDAT").is_none());
    let with = AcpiConfig {
        watchdog: true,
        ..config(1)
    };
    let tables = build(&with).expect("builds");
    let wdat = find(&tables, b"WDAT").expect("listed");
    assert_eq!(u32_at(wdat, 36), 32);
    // As drivers compare it: a segment of 0xff, not of 0xffff.
    assert_eq!(wdat[40..45], [0xff, 0, 0xff, 0xff, 0xff]);
    assert_eq!(
        [u32_at(wdat, 48), u32_at(wdat, 52), u32_at(wdat, 56)],
        [100, 0xffff, 1]
    );
    assert_eq!((wdat[60], u32_at(wdat, 64)), (0x81, 10));
    let entries: Vec<&[u8]> = wdat[68..].chunks(24).collect();
    assert_eq!(entries.len(), 10);
    let actions: Vec<u8> = entries.iter().map(|entry| entry[0]).collect();
    assert_eq!(actions, [1, 4, 5, 6, 8, 9, 10, 11, 32, 33]);
    for entry in entries {
        assert_eq!(entry[4..8], [1, 32, 0, 3], "ports of 32 bits");
        assert!((0x680..0x690).contains(&u64_at(entry, 8)));
    }
}

#[test]
fn the_fadt_describes_hardware_reduced_acpi() {
    let tables = build(&config(1)).expect("builds");
    let fadt = find(&tables, b"FACP").expect("listed");
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5), "version 6.5");
    // Offsets: ACPI 6.5, table 5.9.
    let dsdt = table_at(&tables, u64_at(fadt, 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
    assert_eq!(u32_at(fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(
        fadt[109], 0b101,
        "legacy devices, no VGA, no keyboard controller, a CMOS clock"
    );
    let port = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(fadt, at + 4));
    assert_eq!(port(116), (1, 8, 1, u64::from(ACPI_RESET_PORT)));
    assert_eq!(fadt[128], ACPI_RESET_VALUE);
    assert_eq!(port(244), (1, 8, 1, u64::from(ACPI_SLEEP_CONTROL_PORT)));
    assert_eq!(port(256), (1, 8, 1, u64::from(ACPI_SLEEP_STATUS_PORT)));
}

/// The MADT's structures: type and content.
fn structures(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (one, next) = rest.split_at(usize::from(rest[1]));
        found.push(one);
        rest = next;
    }
    found
}

#[test]
fn the_madt_lists_every_vcpu_in_the_form_its_id_needs() {
    for vcpus in [1, 2, 255, 256, 300] {
        let max_vcpus = vcpus + 2;
        let tables = build(&AcpiConfig {
            max_vcpus,
            ..config(vcpus)
        })
        .expect("builds");
        let madt = find(&tables, b"APIC").expect("listed");
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 0));
        let mut ids = Vec::new();
        let (mut ioapics, mut nmis) = (0, 0);
        for entry in structures(madt) {
            match entry[0] {
                0 => ids.push((u32::from(entry[3]), u32_at(entry, 4))),
                9 => ids.push((u32_at(entry, 4), u32_at(entry, 8))),
                1 => {
                    assert_eq!((u32_at(entry, 4), u32_at(entry, 8)), (0xfec0_0000, 0));
                    ioapics += 1;
                }
                4 | 10 => nmis += 1,
                other => panic!("structure {other}"),
            }
            assert!(
                entry[0] != 0 || entry[3] != 0xff,
                "0xff addresses all local APICs"
            );
        }
        let expected: Vec<_> = (0..max_vcpus)
            .map(|id| (id, if id < vcpus { 1 } else { 2 }))
            .collect();
        assert_eq!(ids, expected);
        assert_eq!((ioapics, nmis), (1, if max_vcpus > 255 { 2 } else { 1 }));
    }
}

/// Whether a table contains some bytes.
fn contains(table: &[u8], bytes: &[u8]) -> bool {
    table.windows(bytes.len()).any(|window| window == bytes)
}

#[test]
fn the_dsdt_has_the_devices_that_are_there() {
    let dsdt = |config: &AcpiConfig| {
        let tables = build(config).expect("builds");
        let fadt = find(&tables, b"FACP").expect("listed");
        table_at(&tables, u64_at(fadt, 140)).to_vec()
    };
    let all = dsdt(&AcpiConfig {
        ecam: Some(Ecam {
            base: 0xe000_0000,
            last_bus: 0,
        }),
        ..config(1)
    });
    for name in [
        b"_S5_", b"COM1", b"RTC_", b"MBRD", b"PWRB", b"GED_", b"_EVT",
    ] {
        assert!(contains(&all, name), "{name:?}");
    }
    let few = dsdt(&AcpiConfig {
        serial: false,
        ..config(1)
    });
    for name in [b"COM1", b"MBRD"] {
        assert!(!contains(&few, name), "{name:?}");
    }
    // \_S5_: Name(_S5_, Package(2) { 5, 0 }).
    assert!(contains(&few, b"_S5_\x12\x05\x02\x0a\x05\x00"));
}

#[test]
fn the_dsdt_has_processors_only_where_they_can_come_and_go() {
    let dsdt = |max_vcpus, cpu_hotplug| {
        let tables = build(&AcpiConfig {
            max_vcpus,
            cpu_hotplug,
            ..config(1)
        })
        .expect("fits");
        let fadt = find(&tables, b"FACP").expect("listed");
        table_at(&tables, u64_at(fadt, 140)).to_vec()
    };
    // No word of them, for the same kernel must find the same machine as before there was hotplug.
    let (fixed, one) = (dsdt(4, false), dsdt(1, false));
    assert_eq!(fixed, one);
    for name in [&b"CPUS"[..], b"ACPI0007", b"CSCN"] {
        assert!(!contains(&fixed, name), "{name:?}");
    }
    for max_vcpus in [2, 32, 33, 254] {
        let all = dsdt(max_vcpus, true);
        let count = |bytes: &[u8]| {
            all.windows(bytes.len())
                .filter(|window| *window == bytes)
                .count()
        };
        let processors = max_vcpus as usize;
        assert_eq!(count(b"ACPI0007"), processors);
        for method in [b"_MAT", b"_OST"] {
            assert_eq!(count(method), processors, "{method:?}");
        }
        assert_eq!(count(b"_EJ0"), processors - 1, "the boot processor stays");
        // Name(_MAT, Buffer(8) { local APIC, its length, UID, APIC id, enabled }).
        let last = u8::try_from(max_vcpus - 1).expect("small");
        let apic = [0x11, 0x0b, 0x0a, 8, 0, 8, last, last, 1, 0, 0, 0];
        assert_eq!(count(&[&b"_MAT"[..], &apic].concat()), 1);
        // Notified once of coming and, unless it is the first, once of going; the scan and the event method know its name.
        let notify = |id: u32, what: u8| {
            let name = format!("C{id:03}");
            let value: &[u8] = if what == 1 { &[1] } else { &[0x0a, what] };
            count(&[&[0x86], name.as_bytes(), value].concat())
        };
        for id in 0..max_vcpus {
            assert_eq!((notify(id, 1), notify(id, 3)), (1, usize::from(id > 0)));
        }
        assert_eq!(count(b"CSCN"), 2, "defined and called");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = build(&AcpiConfig {
        vcpus: 3,
        ..config(2)
    })
    .expect_err("more than the maximum");
    assert!(matches!(
        error,
        AcpiError::Vcpus {
            vcpus: 3,
            max_vcpus: 2
        }
    ));
    for max_vcpus in [9000, u32::MAX] {
        let error = build(&AcpiConfig {
            max_vcpus,
            ..config(1)
        })
        .err();
        assert!(
            matches!(error, Some(AcpiError::TooLong { .. })),
            "{max_vcpus}"
        );
    }
    assert!(build(&config(4096)).expect("fits").bytes.len() <= MAX_LEN);
}

#[test]
fn tables_are_written_where_they_point() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let tables = build(&config(1)).expect("builds");
    tables.write_to(&mem).expect("writes");
    let mut signature = [0; 8];
    mem.read_slice(&mut signature, GuestAddress(tables.rsdp_address))
        .expect("in RAM");
    assert_eq!(&signature, b"RSD PTR ");
    let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)]).expect("memory");
    assert!(matches!(tables.write_to(&small), Err(AcpiError::Memory(_))));
}

#[test]
#[ignore = "leaves the tables for iasl -d: VMM_TEST_ACPI_DIR=/path"]
fn tables_can_be_dumped() {
    let directory =
        std::env::var_os("VMM_TEST_ACPI_DIR").expect("VMM_TEST_ACPI_DIR names a directory");
    let ecam = Some(Ecam {
        base: 0xe000_0000,
        last_bus: 255,
    });
    let tables = build(&AcpiConfig {
        ecam,
        max_vcpus: 254,
        cpu_hotplug: true,
        ..config(2)
    })
    .expect("builds");
    let fadt = find(&tables, b"FACP").expect("listed");
    let mut all = listed(&tables);
    all.push(table_at(&tables, u64_at(fadt, 140)));
    for table in all {
        let name = String::from_utf8_lossy(&table[..4]).to_lowercase() + ".aml";
        let path = std::path::Path::new(&directory).join(name);
        std::fs::write(path, table).expect("writes");
    }
}
