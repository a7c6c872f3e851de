//! Mapping, dirty pages, translation, and that everything is released.

use libtest_mimic::Trial;
use mshv_bindings::*;
use mshv_ioctls::{Mshv, MshvError};

use crate::guest::{CODE, DEVICE, Guest, Ram, partition};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("dirty_pages", dirty_pages),
        trial("mapping_rules", mapping_rules),
        trial("memory_comes_and_goes", memory_comes_and_goes),
        trial("translation", translation),
        trial("closing_releases_everything", closing_releases_everything),
    ]
}

const DIRTY: u8 = MSHV_GPAP_ACCESS_TYPE_DIRTY as u8;
const NOOP: u8 = MSHV_GPAP_ACCESS_OP_NOOP as u8;
const CLEAR: u8 = MSHV_GPAP_ACCESS_OP_CLEAR as u8;
const SET: u8 = MSHV_GPAP_ACCESS_OP_SET as u8;

fn dirty_pages() {
    // stosb to ES:DI, with ES 0; out 1, al
    let guest = Guest::new(&[0x1e, 0x07, 0xaa, 0xe6, 0x01]);
    let pages = 16;
    let bitmap = |operation| {
        guest
            .vm
            .get_gpap_access_bitmap(0, pages, DIRTY, operation)
            .expect("a bitmap")[0]
    };
    assert!(
        guest
            .vm
            .get_gpap_access_bitmap(0, pages, DIRTY, NOOP)
            .is_err(),
        "not tracking"
    );
    guest.vm.enable_dirty_page_tracking().expect("tracking");
    assert_eq!(bitmap(CLEAR), 0xffff, "all pages count as dirty at first");
    assert_eq!(bitmap(NOOP), 0);
    let write = |page: u64| {
        guest.set(&[
            (hv_register_name_HV_X64_REGISTER_RDI, page << 12),
            (hv_register_name_HV_X64_REGISTER_RIP, CODE),
            (hv_register_name_HV_X64_REGISTER_RSP, 0x8000),
        ]);
        guest.port();
    };
    write(5);
    // The stack's page is written as well.
    assert_eq!(bitmap(NOOP), 1 << 5 | 1 << 7);
    assert_eq!(bitmap(NOOP), 1 << 5 | 1 << 7, "looking does not clear");
    assert_eq!(bitmap(CLEAR), 1 << 5 | 1 << 7, "what was, before clearing");
    assert_eq!(bitmap(CLEAR), 0);
    write(9);
    let part = guest
        .vm
        .get_gpap_access_bitmap(8, 3, DIRTY, CLEAR)
        .expect("a part");
    assert_eq!(part, [0b010]);
    assert_eq!(bitmap(NOOP), 1 << 7);
    // A range that leaves memory is refused.
    assert!(
        guest
            .vm
            .get_gpap_access_bitmap(10, pages, DIRTY, NOOP)
            .is_err()
    );
    assert!(
        guest.vm.disable_dirty_page_tracking().is_err(),
        "with clear bits"
    );
    assert_eq!(bitmap(SET), 1 << 7);
    assert_eq!(bitmap(NOOP), 0xffff);
    guest
        .vm
        .disable_dirty_page_tracking()
        .expect("no more tracking");
}

fn mapping_rules() {
    let vm = partition();
    let ram = Ram::new(0x4000);
    let good = ram.region(0x10, true);
    vm.map_user_memory(good).expect("memory");
    let expect = |region: mshv_user_mem_region, error: i32| {
        assert_eq!(
            vm.set_guest_memory(region),
            Err(MshvError::from(error)),
            "{region:x?}"
        );
    };
    let other = Ram::new(0x4000);
    let base = other.region(0x100, true);
    expect(mshv_user_mem_region { size: 0, ..base }, libc::EINVAL);
    expect(
        mshv_user_mem_region {
            size: 0x1001,
            ..base
        },
        libc::EINVAL,
    );
    expect(
        mshv_user_mem_region {
            userspace_addr: base.userspace_addr + 8,
            size: 0x1000,
            ..base
        },
        libc::EINVAL,
    );
    expect(
        mshv_user_mem_region {
            flags: 0x80,
            ..base
        },
        libc::EINVAL,
    );
    expect(
        mshv_user_mem_region {
            rsvd: [0, 0, 0, 1, 0, 0, 0],
            ..base
        },
        libc::EINVAL,
    );
    // Overlaps, in the guest and in the client.
    expect(
        mshv_user_mem_region {
            guest_pfn: 0x13,
            ..base
        },
        libc::EEXIST,
    );
    expect(
        mshv_user_mem_region {
            guest_pfn: 0x200,
            ..good
        },
        libc::EEXIST,
    );
    // Only what was mapped can be unmapped, and only whole.
    let unmap = 1 << MSHV_SET_MEM_BIT_UNMAP;
    expect(
        mshv_user_mem_region {
            flags: unmap,
            ..base
        },
        libc::EINVAL,
    );
    expect(
        mshv_user_mem_region {
            flags: unmap,
            size: 0x1000,
            ..good
        },
        libc::EINVAL,
    );
    vm.unmap_user_memory(good).expect("unmapped");
    expect(
        mshv_user_mem_region {
            flags: unmap,
            ..good
        },
        libc::EINVAL,
    );
}

fn memory_comes_and_goes() {
    // mov al, es:[di]; out 1, al
    let guest = Guest::new(&[0x26, 0x8a, 0x05, 0xe6, 0x01]);
    let extra = Ram::new(0x1000);
    extra.write(0, &[0x5a]);
    for _ in 0..3 {
        guest.set(&[
            (hv_register_name_HV_X64_REGISTER_RIP, CODE),
            (hv_register_name_HV_X64_REGISTER_RDI, 0),
        ]);
        assert_eq!({ guest.memory().guest_physical_address }, DEVICE);
        guest
            .vm
            .map_user_memory(extra.region(DEVICE >> 12, true))
            .expect("memory");
        assert_eq!(guest.port().rax as u8, 0x5a);
        guest
            .vm
            .unmap_user_memory(extra.region(DEVICE >> 12, true))
            .expect("unmapped");
    }
    assert_eq!(extra.read(0, 1), [0x5a]);
}

fn translation() {
    let guest = Guest::new(&[0xf4]);
    let look = |gva, flags| {
        let (gpa, result) = guest
            .vcpu
            .translate_gva(gva, u64::from(flags))
            .expect("an answer");
        // SAFETY: both members of the union are 64 plain bits.
        (unsafe { result.as_uint64 } as u32, gpa)
    };
    // Without paging, an address is itself; whether memory is there is told.
    assert_eq!(look(0x1234, HV_TRANSLATE_GVA_VALIDATE_READ), (0, 0x1234));
    let unmapped = hv_translate_gva_result_code_HV_TRANSLATE_GVA_GPA_UNMAPPED;
    assert_eq!(look(DEVICE, HV_TRANSLATE_GVA_VALIDATE_READ).0, unmapped);
    // Long mode with page tables at 0x9000: a 2 MiB page for 0, a 4 KiB page, read-only and supervisor's, at 2 MiB.
    let entry = |at: usize, value: u64| guest.ram.write(at, &value.to_le_bytes());
    entry(0x9000, 0xa000 | 7);
    entry(0xa000, 0xb000 | 7);
    entry(0xb000, 0x80 | 7);
    entry(0xb008, 0xc000 | 7);
    entry(0xc000, 0x3000 | 1);
    guest.set(&[
        (hv_register_name_HV_X64_REGISTER_CR3, 0x9000),
        (hv_register_name_HV_X64_REGISTER_CR4, 0x20),
        (hv_register_name_HV_X64_REGISTER_EFER, 0x500),
        (hv_register_name_HV_X64_REGISTER_CR0, 0x8001_0011),
    ]);
    let read = HV_TRANSLATE_GVA_VALIDATE_READ | HV_TRANSLATE_GVA_SUPERVISOR_ACCESS;
    assert_eq!(look(0x5678, read), (0, 0x5678));
    assert_eq!(look(0x20_0123, read), (0, 0x3123));
    let violation = hv_translate_gva_result_code_HV_TRANSLATE_GVA_PRIVILEGE_VIOLATION;
    assert_eq!(
        look(0x20_0123, read | HV_TRANSLATE_GVA_VALIDATE_WRITE).0,
        violation
    );
    assert_eq!(
        look(
            0x20_0123,
            HV_TRANSLATE_GVA_VALIDATE_READ | HV_TRANSLATE_GVA_USER_ACCESS
        )
        .0,
        violation
    );
    let absent = hv_translate_gva_result_code_HV_TRANSLATE_GVA_PAGE_NOT_PRESENT;
    assert_eq!(look(0x20_1000, read).0, absent);
    assert_eq!(look(0x8000_0000, read).0, absent);
    assert!(
        guest.vcpu.translate_gva(0, 1 << 40).is_err(),
        "an unknown flag"
    );
}

/// Open descriptors of this process: what they are.
fn descriptors() -> Vec<String> {
    let folder = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let links = folder
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let mut names: Vec<_> = links.map(|link| link.display().to_string()).collect();
    names.retain(|name| name.contains("kvm") || name.contains("mshv"));
    names.sort();
    names
}

/// Runs alone in a process of its own: the other trials open descriptors at the same time.
fn closing_releases_everything() {
    const ALONE: &str = "MSHV_DOUBLE_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().expect("this executable"))
            .args(["--exact", "closing_releases_everything"])
            .env(ALONE, "1")
            .stdout(std::process::Stdio::null())
            .status()
            .expect("this executable starts");
        assert!(status.success());
        return;
    }
    assert_eq!(descriptors(), [""; 0]);
    let hv = Mshv::new().expect("/dev/mshv opens");
    let vm = hv.create_vm().expect("a partition");
    vm.initialize().expect("initialize");
    let ram = Ram::new(0x1000);
    vm.map_user_memory(ram.region(0, true)).expect("memory");
    let vcpu = vm.create_vcpu(0).expect("a VP");
    assert!(descriptors().iter().any(|name| name.contains("kvm-vcpu")));
    drop(hv);
    drop(vm);
    // The VP keeps the partition.
    assert!(descriptors().iter().any(|name| name.contains("kvm-vm")));
    vcpu.get_regs().expect("still there");
    drop(vcpu);
    assert_eq!(descriptors(), [""; 0]);
    // Other files are none of our business, also at numbers that were ours.
    for _ in 0..3 {
        let file = std::fs::File::open("/proc/self/stat").expect("a file");
        std::io::read_to_string(file).expect("its text");
    }
}
