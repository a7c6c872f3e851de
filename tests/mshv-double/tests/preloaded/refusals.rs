//! What the driver and the hypervisor refuse, with their errno and status.

use std::os::fd::AsRawFd;

use libtest_mimic::Trial;
use mshv_bindings::*;
use mshv_ioctls::{InterruptRequest, IoEventAddress, Mshv, MshvError, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{Guest, Ram, partition, set};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("unknown_requests", unknown_requests),
        trial("creation", creation),
        trial("order", order),
        trial("hypercall_envelopes", hypercall_envelopes),
        trial("register_calls", register_calls),
        trial("properties", properties),
        trial("interrupt_requests", interrupt_requests),
        trial("event_descriptors", event_descriptors),
        trial("state_buffers", state_buffers),
        trial("access_bitmaps", access_bitmaps),
        trial("mappings_of_a_vp", mappings_of_a_vp),
    ]
}

/// The errno of an ioctl that must fail.
fn errno_of(fd: &impl AsRawFd, request: u64, argument: *mut u8) -> i32 {
    // SAFETY: the request is refused, or the argument is what it demands.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    assert_eq!(result, -1, "request {request:#x} succeeded");
    std::io::Error::last_os_error()
        .raw_os_error()
        .expect("an errno")
}

fn errno(error: i32) -> MshvError {
    MshvError::from(error)
}

/// The status of a hypercall that must fail.
#[track_caller]
fn status<T: std::fmt::Debug>(result: Result<T, MshvError>) -> u32 {
    match result {
        Err(MshvError::Hypercall { status_raw, .. }) => u32::from(status_raw),
        other => panic!("{other:?}"),
    }
}

fn unknown_requests() {
    let guest = Guest::new(&[0xf4]);
    let mut space = [0u8; 4096];
    for number in [0x06u64, 0x0a, 0xf0, 0xf2, 0xff] {
        let request = 0x4008_0000 | 0xb800 | number;
        assert_eq!(
            errno_of(&guest.vm, request, space.as_mut_ptr()),
            libc::ENOTTY
        );
        assert_eq!(
            errno_of(&guest.vcpu, request, space.as_mut_ptr()),
            libc::ENOTTY
        );
    }
    // The right number with a wrong size of structure is another request.
    assert_eq!(
        errno_of(&guest.vm, 0x4010_b801, space.as_mut_ptr()),
        libc::ENOTTY
    );
    // Requests of another kind of descriptor.
    assert_eq!(
        errno_of(&guest.vcpu, 0x4004_b801, space.as_mut_ptr()),
        libc::ENOTTY
    );
    // Not of the driver at all.
    assert_eq!(
        errno_of(&guest.vm, libc::TIOCGWINSZ, space.as_mut_ptr()),
        libc::ENOTTY
    );
    // The driver's requests on somebody else's descriptor.
    let file = std::fs::File::open("/proc/self/stat").expect("a file");
    assert_eq!(
        errno_of(&file, 0x4004_b801, space.as_mut_ptr()),
        libc::ENOTTY
    );
}

fn creation() {
    let hv = Mshv::new().expect("/dev/mshv opens");
    let good = hv.make_default_partition_create_arg(mshv_ioctls::VmType::Normal);
    let refused = |args: mshv_create_partition_v2| {
        assert_eq!(
            hv.create_vm_with_args(&args).map(drop),
            Err(errno(libc::EINVAL))
        );
    };
    refused(mshv_create_partition_v2 {
        pt_flags: good.pt_flags | 1 << 40,
        ..good
    });
    refused(mshv_create_partition_v2 {
        pt_isolation: 1,
        ..good
    });
    refused(mshv_create_partition_v2 {
        pt_isolation: 9,
        ..good
    });
    refused(mshv_create_partition_v2 {
        pt_num_cpu_fbanks: 1,
        ..good
    });
    refused(mshv_create_partition_v2 {
        pt_rsvd: [0, 0, 1, 0, 0, 0],
        ..good
    });
    refused(mshv_create_partition_v2 {
        pt_rsvd1: [0, 1],
        ..good
    });
    hv.create_vm_with_args(&good).expect("a partition");
    // The first version of the structure, which has no features.
    let old = mshv_create_partition_v2 {
        pt_flags: good.pt_flags & 7,
        pt_rsvd1: [5, 5],
        ..good
    };
    hv.create_vm_with_args(&old).expect("a partition");
}

fn order() {
    let hv = Mshv::new().expect("/dev/mshv opens");
    let vm = hv.create_vm().expect("a partition");
    let ram = Ram::new(0x1000);
    assert_eq!(vm.create_vcpu(0).map(drop), Err(errno(libc::EIO)));
    assert_eq!(
        vm.map_user_memory(ram.region(0, true)),
        Err(errno(libc::EIO))
    );
    let synthetic = hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES;
    vm.set_partition_property(synthetic, 3)
        .expect("early enough");
    vm.initialize().expect("initialize");
    vm.initialize().expect("twice does no harm");
    assert_eq!(
        status(vm.set_partition_property(synthetic, 3)),
        HV_STATUS_INVALID_PARTITION_STATE
    );
    vm.create_vcpu(0).expect("a VP");
    // The VP's descriptor is closed by now, but the VP exists as long as the partition.
    assert_eq!(vm.create_vcpu(0).map(drop), Err(errno(libc::EEXIST)));
    let far = mshv_create_vp { vp_index: 256 };
    assert_eq!(
        errno_of(&vm, 0x4004_b801, (&raw const far).cast_mut().cast()),
        libc::EINVAL
    );
}

fn call(vm: &VmFd, args: mshv_root_hvcall) -> (Result<(), MshvError>, mshv_root_hvcall) {
    let mut args = args;
    (vm.hvcall(&mut args), args)
}

fn hypercall_envelopes() {
    let guest = Guest::new(&[0xf4]);
    let (input, mut output) = ([0u8; 4096], [0u8; 4096]);
    let good = mshv_root_hvcall {
        code: HVCALL_GET_PARTITION_PROPERTY as u16,
        in_sz: 16,
        out_sz: 8,
        in_ptr: input.as_ptr() as u64,
        out_ptr: output.as_mut_ptr() as u64,
        ..Default::default()
    };
    for bad in [
        mshv_root_hvcall { status: 1, ..good },
        mshv_root_hvcall { in_ptr: 0, ..good },
        mshv_root_hvcall { in_sz: 7, ..good },
        mshv_root_hvcall {
            in_sz: 4097,
            ..good
        },
        mshv_root_hvcall { out_sz: 0, ..good },
        mshv_root_hvcall {
            out_sz: 4097,
            ..good
        },
        mshv_root_hvcall {
            rsvd: [0, 0, 0, 0, 0, 1],
            ..good
        },
        // Not in the driver's list.
        mshv_root_hvcall {
            code: HVCALL_READ_GPA as u16,
            ..good
        },
        mshv_root_hvcall {
            code: HVCALL_WRITE_GPA as u16,
            ..good
        },
        mshv_root_hvcall {
            code: HVCALL_CREATE_VP as u16,
            ..good
        },
        mshv_root_hvcall {
            code: HVCALL_DELETE_VP as u16,
            ..good
        },
    ] {
        let mut args = bad;
        assert_eq!(
            errno_of(&guest.vm, 0xc028_b807, (&raw mut args).cast()),
            libc::EINVAL,
            "{bad:x?}"
        );
    }
    // The hypervisor's part: the status tells, and reps are none.
    for bad in [
        mshv_root_hvcall { reps: 1, ..good },
        mshv_root_hvcall { in_sz: 8, ..good },
        mshv_root_hvcall {
            code: HVCALL_GET_VP_REGISTERS as u16,
            reps: 0,
            ..good
        },
    ] {
        let (result, args) = call(&guest.vm, bad);
        assert_eq!(
            status(result),
            HV_STATUS_INVALID_HYPERCALL_INPUT,
            "{bad:x?}"
        );
        assert_eq!({ args.reps }, 0);
    }
    let (result, _) = call(&guest.vm, good);
    assert_eq!(status(result), HV_STATUS_UNKNOWN_PROPERTY);
    // Properties are set on the partition's descriptor only, and the host answers questions only.
    let mut set = mshv_root_hvcall {
        code: HVCALL_SET_PARTITION_PROPERTY as u16,
        in_sz: 24,
        ..good
    };
    assert_eq!(
        errno_of(&guest.vcpu, 0xc028_b807, (&raw mut set).cast()),
        libc::EINVAL
    );
    // SAFETY: a constant C string.
    let device = unsafe { libc::open(c"/dev/mshv".as_ptr(), libc::O_CLOEXEC) };
    assert!(device >= 0);
    assert_eq!(
        errno_of(&device, 0xc028_b807, (&raw mut set).cast()),
        libc::EINVAL
    );
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(device) };
}

fn register_calls() {
    let guest = Guest::new(&[0xf4]);
    let known = (hv_register_name_HV_X64_REGISTER_RAX, 1);
    assert_eq!(
        status(set(&guest.vcpu, &[known, (0x0fff_ffff, 1)])),
        HV_STATUS_INVALID_PARAMETER
    );
    assert_eq!(
        guest.get(known.0),
        1,
        "what came before the wrong one is done"
    );
    let mut reserved = hv_register_assoc {
        name: known.0,
        ..Default::default()
    };
    reserved.reserved2 = 1;
    assert_eq!(
        status(guest.vcpu.set_reg(&[reserved])),
        HV_STATUS_INVALID_PARAMETER
    );
    for (name, value) in [
        (hv_register_name_HV_X64_REGISTER_CR4, 1 << 40),
        (hv_register_name_HV_X64_REGISTER_EFER, 1 << 60),
        (hv_register_name_HV_X64_REGISTER_XFEM, 1 << 50 | 3),
        (hv_register_name_HV_X64_REGISTER_PAT, 0xff),
        (hv_register_name_HV_REGISTER_INTERRUPT_STATE, 1 << 10),
        (
            hv_register_name_HV_REGISTER_PENDING_INTERRUPTION,
            1 | 0x1ff << 16,
        ),
    ] {
        assert_eq!(
            status(set(&guest.vcpu, &[(name, value)])),
            HV_STATUS_INVALID_REGISTER_VALUE,
            "{name:#x}"
        );
    }
    assert_eq!(
        status(guest.vm.register_deliverabilty_notifications(7, 0)),
        HV_STATUS_INVALID_VP_INDEX
    );
}

fn properties() {
    let vm = partition();
    let features = hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0;
    assert_eq!(
        status(vm.set_partition_property(features, 0)),
        HV_STATUS_OPERATION_DENIED
    );
    assert_eq!(
        status(vm.set_partition_property(0x1234_5678, 0)),
        HV_STATUS_UNKNOWN_PROPERTY
    );
    assert_eq!(
        status(vm.get_partition_property(0x1234_5678)),
        HV_STATUS_UNKNOWN_PROPERTY
    );
    assert_eq!(
        status(vm.get_partition_property_ex(1, 0).map(drop)),
        HV_STATUS_UNKNOWN_PROPERTY
    );
    let hv = Mshv::new().expect("/dev/mshv opens");
    let early = hv.create_vm().expect("a partition");
    let synthetic = hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES;
    assert_eq!(
        status(early.set_partition_property(synthetic, 1 << 63)),
        HV_STATUS_INVALID_PARAMETER
    );
    let tracking = hv_partition_property_code_HV_PARTITION_PROPERTY_GPA_PAGE_ACCESS_TRACKING;
    assert_eq!(
        status(early.set_partition_property(tracking, 1)),
        HV_STATUS_INVALID_PARTITION_STATE
    );
    let intercept = mshv_install_intercept {
        access_type_mask: 1,
        intercept_type: 77,
        intercept_parameter: hv_intercept_parameters { as_uint64: 0 },
    };
    assert_eq!(
        status(vm.install_intercept(intercept)),
        HV_STATUS_INVALID_PARAMETER
    );
}

fn interrupt_requests() {
    let guest = Guest::new(&[0xf4]);
    let good = || InterruptRequest {
        interrupt_type: hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED,
        apic_id: 0,
        vector: 0x40,
        level_triggered: false,
        logical_destination_mode: false,
        long_mode: false,
    };
    for bad in [
        InterruptRequest {
            vector: 5,
            ..good()
        },
        InterruptRequest {
            vector: 0x100,
            ..good()
        },
        InterruptRequest {
            interrupt_type: 3,
            ..good()
        },
        InterruptRequest {
            interrupt_type: 99,
            ..good()
        },
    ] {
        assert_eq!(
            status(guest.vm.request_virtual_interrupt(&bad)),
            HV_STATUS_INVALID_PARAMETER,
            "{bad:?}"
        );
    }
    guest
        .vm
        .request_virtual_interrupt(&good())
        .expect("an interrupt");
}

fn event_descriptors() {
    let guest = Guest::new(&[0xf4]);
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    let refused = |args: mshv_user_irqfd| {
        let mut args = args;
        errno_of(&guest.vm, 0x4010_b803, (&raw mut args).cast())
    };
    assert_eq!(
        refused(mshv_user_irqfd {
            fd: event.as_raw_fd(),
            resamplefd: 0,
            gsi: 1,
            flags: 8
        }),
        libc::EINVAL
    );
    assert_eq!(
        refused(mshv_user_irqfd {
            fd: 9999,
            resamplefd: 0,
            gsi: 1,
            flags: 0
        }),
        libc::EBADF
    );
    let port = IoEventAddress::Pio(1);
    assert!(
        guest
            .vm
            .register_ioevent(&event, &port, NoDatamatch)
            .is_err()
    );
    let refused = |args: mshv_user_ioeventfd| {
        let mut args = args;
        errno_of(&guest.vm, 0x4020_b804, (&raw mut args).cast())
    };
    let good = mshv_user_ioeventfd {
        addr: 0x1000_0000,
        len: 4,
        fd: event.as_raw_fd(),
        ..Default::default()
    };
    assert_eq!(
        refused(mshv_user_ioeventfd { flags: 2, ..good }),
        libc::EOPNOTSUPP
    );
    assert_eq!(
        refused(mshv_user_ioeventfd { flags: 8, ..good }),
        libc::EINVAL
    );
    assert_eq!(
        refused(mshv_user_ioeventfd { len: 3, ..good }),
        libc::EINVAL
    );
    assert_eq!(
        refused(mshv_user_ioeventfd {
            rsvd: [1, 0, 0, 0],
            ..good
        }),
        libc::EINVAL
    );
    assert_eq!(
        refused(mshv_user_ioeventfd { flags: 4, ..good }),
        libc::ENOENT
    );
    let table = |entries: &[[u32; 4]]| {
        let mut words = vec![entries.len() as u32, 0];
        words.extend(entries.iter().flatten());
        let request = 0x4008_b805;
        // SAFETY: the table has the entries that it names.
        let result = unsafe { libc::ioctl(guest.vm.as_raw_fd(), request, words.as_ptr()) };
        if result == 0 {
            0
        } else {
            std::io::Error::last_os_error()
                .raw_os_error()
                .expect("an errno")
        }
    };
    let entry = [3, 0xfee0_0000, 0, 0x40];
    assert_eq!(table(&[entry]), 0);
    assert_eq!(table(&[entry, entry]), libc::EINVAL, "one GSI twice");
    assert_eq!(table(&[[4096, 0xfee0_0000, 0, 0x40]]), libc::EINVAL);
    assert_eq!(
        table(&[[3, 0xfee0_0000, 1, 0x40]]),
        libc::EINVAL,
        "a high address"
    );
    assert_eq!(table(&[]), 0);
}

fn state_buffers() {
    let guest = Guest::new(&[0xf4]);
    let buffer = Buffer::new(8192, 4096).expect("two pages");
    let good = mshv_get_set_vp_state {
        type_: MSHV_VP_STATE_LAPIC as u8,
        buf_sz: 4096,
        buf_ptr: buffer.buf as u64,
        ..Default::default()
    };
    for bad in [
        mshv_get_set_vp_state { type_: 5, ..good },
        mshv_get_set_vp_state {
            rsvd: [0, 1, 0],
            ..good
        },
        mshv_get_set_vp_state { buf_sz: 0, ..good },
        mshv_get_set_vp_state {
            buf_sz: 1024,
            ..good
        },
        mshv_get_set_vp_state {
            buf_ptr: buffer.buf as u64 + 8,
            ..good
        },
    ] {
        let mut state = bad;
        assert_eq!(
            guest.vcpu.get_vp_state_ioctl(&mut state),
            Err(errno(libc::EINVAL)),
            "{bad:x?}"
        );
        assert_eq!(
            guest.vcpu.set_vp_state_ioctl(&bad),
            Err(errno(libc::EINVAL)),
            "{bad:x?}"
        );
    }
    let mut state = good;
    guest
        .vcpu
        .get_vp_state_ioctl(&mut state)
        .expect("the state");
}

fn access_bitmaps() {
    let guest = Guest::new(&[0xf4]);
    guest.vm.enable_dirty_page_tracking().expect("tracking");
    let refused = |base, count, kind, operation, error| {
        assert_eq!(
            guest
                .vm
                .get_gpap_access_bitmap(base, count, kind, operation)
                .map(drop),
            Err(errno(error))
        );
    };
    refused(0, 0, 1, 0, libc::EINVAL);
    refused(0, 1, 2, 0, libc::EINVAL);
    refused(0, 1, 1, 3, libc::EINVAL);
    refused(0x1000, 1, 1, 0, libc::EINVAL);
    refused(15, 2, 1, 0, libc::EINVAL);
    guest
        .vm
        .get_gpap_access_bitmap(0, 16, 0, 0)
        .expect("accessed bits");
}

fn mappings_of_a_vp() {
    let guest = Guest::new(&[0xf4]);
    for (page, error) in [
        (0, libc::ENODEV),
        (1, libc::ENODEV),
        (2, libc::ENODEV),
        (3, libc::EINVAL),
    ] {
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: the kernel chooses the address.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                flags,
                guest.vcpu.as_raw_fd(),
                page * 4096,
            )
        };
        assert_eq!(address, libc::MAP_FAILED);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(error));
    }
}
