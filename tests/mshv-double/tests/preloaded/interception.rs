//! Ports, memory without RAM behind it, MSRs: messages show the state before the instruction.

use libtest_mimic::Trial;
use mshv_bindings::*;

use crate::guest::{CODE, DEVICE, Guest, Ram};
use crate::trial;

const RAX: u32 = hv_register_name_HV_X64_REGISTER_RAX;
const RCX: u32 = hv_register_name_HV_X64_REGISTER_RCX;
const RDX: u32 = hv_register_name_HV_X64_REGISTER_RDX;
const RSI: u32 = hv_register_name_HV_X64_REGISTER_RSI;
const RDI: u32 = hv_register_name_HV_X64_REGISTER_RDI;
const RSP: u32 = hv_register_name_HV_X64_REGISTER_RSP;
const RIP: u32 = hv_register_name_HV_X64_REGISTER_RIP;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("out_of_all_widths", out_of_all_widths),
        trial("in_of_all_widths", in_of_all_widths),
        trial("string_io", string_io),
        trial("stores_of_many_shapes", stores_of_many_shapes),
        trial("loads_of_many_shapes", loads_of_many_shapes),
        trial("a_store_that_crosses_into_a_device_page", crossing),
        trial("a_store_to_read_only_memory", read_only),
        trial("a_wide_store_is_one_message", wide_store),
        trial("a_fetch_from_nowhere", fetch_from_nowhere),
        trial("unknown_msrs", unknown_msrs),
        trial("msr_intercepts", msr_intercepts),
        trial("a_triple_fault", triple_fault),
    ]
}

fn out_of_all_widths() {
    // out dx, al; out dx, ax; out dx, eax; out 0x80, al; out 0x7e, al
    let guest = Guest::new(&[0xee, 0xef, 0x66, 0xef, 0xe6, 0x80, 0xe6, 0x7e]);
    guest.set(&[(RAX, 0x1122_3344), (RDX, 0x3f8)]);
    let mut rip = CODE;
    for (port, size, length) in [
        (0x3f8, 1, 1),
        (0x3f8, 2, 1),
        (0x3f8, 4, 2),
        (0x80, 1, 2),
        (0x7e, 1, 2),
    ] {
        let message = guest.port();
        assert_eq!({ message.port_number }, port);
        assert_eq!({ message.header.rip }, rip);
        assert_eq!(guest.get(RIP), rip);
        assert_eq!({ message.rax }, 0x1122_3344);
        assert_eq!(message.header.intercept_access_type, 1);
        assert_eq!(message.header.instruction_length(), length);
        assert_eq!(message.instruction_byte_count, 16);
        // SAFETY: both members of the union are a byte.
        assert_eq!(unsafe { message.access_info.as_uint8 }, size);
        rip += u64::from(length);
        guest.set(&[(RIP, rip)]);
    }
}

fn in_of_all_widths() {
    // in al, dx; in ax, dx; in eax, dx; out dx, eax
    let guest = Guest::new(&[0xec, 0xed, 0x66, 0xed, 0x66, 0xef]);
    guest.set(&[(RAX, 0x1122_3344), (RDX, 0x70)]);
    for (length, answer) in [(1u64, 0x1122_33aa_u64), (1, 0x1122_bbcc), (2, 0xdead_beef)] {
        let message = guest.port();
        assert_eq!(message.header.intercept_access_type, 0);
        assert_eq!(u64::from(message.header.instruction_length()), length);
        guest.set(&[(RAX, answer), (RIP, message.header.rip + length)]);
    }
    assert_eq!({ guest.port().rax }, 0xdead_beef);
}

fn string_io() {
    // cld; rep outsb; rep insw (to es:di, RAM here); out dx, al
    let guest = Guest::new(&[0xfc, 0xf3, 0x6e, 0xf3, 0x6d, 0xee]);
    guest.ram.write(0x3000, b"abc");
    guest.set(&[(RSI, 0x3000), (RCX, 3), (RDX, 0x21)]);
    let message = guest.port();
    // SAFETY: both members of the union are a byte.
    assert_eq!(unsafe { message.access_info.as_uint8 }, 1 | 1 << 3 | 1 << 4);
    assert_eq!({ message.header.rip }, CODE + 1);
    assert_eq!({ message.rsi }, 0x3000);
    assert_eq!({ message.rcx }, 3);
    assert_eq!((guest.get(RSI), guest.get(RCX)), (0x3000, 3));
    // One element done by the client, then the guest again: the rest is intercepted.
    guest.set(&[(RSI, 0x3001), (RCX, 2)]);
    let message = guest.port();
    assert_eq!(({ message.rsi }, { message.rcx }), (0x3001, 2));
    // All done by the client.
    guest.set(&[(RSI, 0x3003), (RCX, 0), (RIP, CODE + 3)]);
    let es = hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_ES,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                limit: 0xffff,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes: 0x93 },
                ..Default::default()
            },
        },
        ..Default::default()
    };
    guest.vcpu.set_reg(&[es]).expect("ES");
    guest.set(&[(RDI, 0x4000), (RCX, 5), (RIP, CODE + 3)]);
    let message = guest.port();
    assert_eq!(message.header.intercept_access_type, 0);
    // SAFETY: both members of the union are a byte.
    assert_eq!(unsafe { message.access_info.as_uint8 }, 2 | 1 << 3 | 1 << 4);
    assert_eq!(({ message.rdi }, { message.rcx }), (0x4000, 5));
    assert_eq!(
        (guest.get(RDI), guest.get(RCX), guest.get(RIP)),
        (0x4000, 5, CODE + 3)
    );
    guest.set(&[(RDI, 0x400a), (RCX, 0), (RIP, CODE + 5)]);
    assert_eq!({ guest.port().header.rip }, CODE + 5);
}

/// A store: its code, what it needs, and where it goes.
struct Store {
    code: &'static [u8],
    registers: &'static [(u32, u64)],
    gpa: u64,
}

fn stores_of_many_shapes() {
    let stores = [
        // mov es:[di], al
        Store {
            code: &[0x26, 0x88, 0x05],
            registers: &[(RAX, 0x5a), (RDI, 0x10)],
            gpa: DEVICE + 0x10,
        },
        // mov es:[di], ax
        Store {
            code: &[0x26, 0x89, 0x05],
            registers: &[(RAX, 0x1234), (RDI, 0x10)],
            gpa: DEVICE + 0x10,
        },
        // mov dword es:[di+8], 0x12345678
        Store {
            code: &[0x26, 0x66, 0xc7, 0x45, 0x08, 0x78, 0x56, 0x34, 0x12],
            registers: &[(RDI, 0x20)],
            gpa: DEVICE + 0x28,
        },
        // mov es:[0x30], al (moffs)
        Store {
            code: &[0x26, 0xa2, 0x30, 0x00],
            registers: &[(RAX, 1)],
            gpa: DEVICE + 0x30,
        },
        // stosb; stosw; stosd
        Store {
            code: &[0xaa],
            registers: &[(RAX, 7), (RDI, 0x40)],
            gpa: DEVICE + 0x40,
        },
        Store {
            code: &[0xab],
            registers: &[(RAX, 7), (RDI, 0x40)],
            gpa: DEVICE + 0x40,
        },
        Store {
            code: &[0x66, 0xab],
            registers: &[(RAX, 7), (RDI, 0x40)],
            gpa: DEVICE + 0x40,
        },
        // rep stosd
        Store {
            code: &[0xf3, 0x66, 0xab],
            registers: &[(RAX, 7), (RDI, 0x40), (RCX, 4)],
            gpa: DEVICE + 0x40,
        },
        // movsw from RAM
        Store {
            code: &[0xa5],
            registers: &[(RSI, 0x3000), (RDI, 0x50)],
            gpa: DEVICE + 0x50,
        },
        // rep movsb from RAM
        Store {
            code: &[0xf3, 0xa4],
            registers: &[(RSI, 0x3000), (RDI, 0x50), (RCX, 1)],
            gpa: DEVICE + 0x50,
        },
        // mov es:[di], ds
        Store {
            code: &[0x26, 0x8c, 0x1d],
            registers: &[(RDI, 0x60)],
            gpa: DEVICE + 0x60,
        },
        // setz es:[di]
        Store {
            code: &[0x26, 0x0f, 0x94, 0x05],
            registers: &[(RDI, 0x70)],
            gpa: DEVICE + 0x70,
        },
        // pop word es:[di]
        Store {
            code: &[0x26, 0x8f, 0x05],
            registers: &[(RDI, 0x80), (RSP, 0x3000)],
            gpa: DEVICE + 0x80,
        },
        // movnti es:[di], eax
        Store {
            code: &[0x26, 0x0f, 0xc3, 0x05],
            registers: &[(RDI, 0x90), (RAX, 3)],
            gpa: DEVICE + 0x90,
        },
    ];
    for store in stores {
        let mut code = store.code.to_vec();
        code.push(0xf4);
        let guest = Guest::new(&code);
        guest.ram.write(0x3000, &[0xa1, 0xb2, 0xc3, 0xd4]);
        guest.set(store.registers);
        let names = [RAX, RCX, RDX, RSI, RDI, RSP, RIP];
        let before = names.map(|name| guest.get(name));
        let message = guest.memory();
        assert_eq!(
            { message.guest_physical_address },
            store.gpa,
            "{:x?}",
            store.code
        );
        assert_eq!(message.header.intercept_access_type, 1, "{:x?}", store.code);
        assert_eq!({ message.header.rip }, CODE, "{:x?}", store.code);
        assert!(
            message.instruction_bytes.starts_with(store.code),
            "{:x?}",
            store.code
        );
        // SAFETY: both members of the union are a byte.
        let info = unsafe { message.memory_access_info.as_uint8 };
        assert_eq!(info & 3, 3, "{:x?}", store.code);
        assert_eq!(
            { message.guest_virtual_address },
            store.gpa,
            "{:x?}",
            store.code
        );
        assert_eq!(
            names.map(|name| guest.get(name)),
            before,
            "{:x?}",
            store.code
        );
    }
    stack_stores();
}

/// Pushes and calls with the stack on the device.
fn stack_stores() {
    // push ax; call +0; call cx: with SS at the device.
    for (code, registers) in [
        (&[0x50][..], &[(RAX, 0x77)][..]),
        (&[0x66, 0x50], &[(RAX, 0x77)]),
        (&[0x6a, 0x05], &[]),
        (&[0x06], &[]),
        (&[0xe8, 0x10, 0x00], &[]),
        (&[0xff, 0xd1], &[(RCX, CODE + 0x40)]),
    ] {
        let guest = Guest::new(code);
        let ss = hv_register_assoc {
            name: hv_register_name_HV_X64_REGISTER_SS,
            value: hv_register_value {
                segment: hv_x64_segment_register {
                    base: DEVICE,
                    limit: 0xffff,
                    selector: (DEVICE >> 4) as u16,
                    __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes: 0x93 },
                },
            },
            ..Default::default()
        };
        guest.vcpu.set_reg(&[ss]).expect("SS");
        guest.set(&[registers, &[(RSP, 0x100)]].concat());
        let message = guest.memory();
        let size = if code[0] == 0x66 { 4 } else { 2 };
        assert_eq!(
            { message.guest_physical_address },
            DEVICE + 0x100 - size,
            "{code:x?}"
        );
        assert_eq!(
            ({ message.header.rip }, guest.get(RIP), guest.get(RSP)),
            (CODE, CODE, 0x100),
            "{code:x?}"
        );
    }
}

fn loads_of_many_shapes() {
    for code in [
        &[0x26, 0x8a, 0x05][..],         // mov al, es:[di]
        &[0x26, 0x8b, 0x05],             // mov ax, es:[di]
        &[0x26, 0x66, 0x8b, 0x05],       // mov eax, es:[di]
        &[0x26, 0x0f, 0xb6, 0x05],       // movzx ax, byte es:[di]
        &[0x26, 0x00, 0x05],             // add es:[di], al
        &[0xf0, 0x26, 0x09, 0x05],       // lock or es:[di], ax
        &[0x26, 0x87, 0x05],             // xchg es:[di], ax
        &[0xf0, 0x26, 0x0f, 0xb1, 0x0d], // lock cmpxchg es:[di], cx
        &[0x26, 0xff, 0x05],             // inc word es:[di]
        &[0x26, 0xff, 0x35],             // push word es:[di]
        &[0x26, 0x39, 0x05],             // cmp es:[di], ax
        &[0xae],                         // scasb
        &[0xf3, 0xae],                   // repe scasb
        &[0x26, 0xff, 0x25],             // jmp word es:[di]
        &[0x26, 0xff, 0x15],             // call word es:[di]
    ] {
        let guest = Guest::new(code);
        guest.set(&[(RDI, 0x20), (RAX, 0x1234), (RCX, 9)]);
        let names = [
            RAX,
            RCX,
            RDX,
            RSI,
            RDI,
            RSP,
            RIP,
            hv_register_name_HV_X64_REGISTER_RFLAGS,
        ];
        let before = names.map(|name| guest.get(name));
        let message = guest.memory();
        assert_eq!(
            { message.guest_physical_address },
            DEVICE + 0x20,
            "{code:x?}"
        );
        assert_eq!(message.header.intercept_access_type, 0, "{code:x?}");
        assert_eq!(
            { message.guest_virtual_address },
            DEVICE + 0x20,
            "{code:x?}"
        );
        assert!(message.instruction_bytes.starts_with(code), "{code:x?}");
        assert_eq!(names.map(|name| guest.get(name)), before, "{code:x?}");
        // The client skips the instruction; nothing of it may be left in KVM.
        guest.ram.write(0x5000, &[0xe6, 0x42]);
        guest.set(&[(RIP, 0x5000)]);
        let after = guest.port();
        assert_eq!(
            ({ after.header.rip }, { after.rax }),
            (0x5000, 0x1234),
            "{code:x?}"
        );
    }
}

fn crossing() {
    // mov es:[di], eax, with ES such that the last two bytes lie on the device.
    let guest = Guest::new(&[0x26, 0x66, 0x89, 0x05, 0xf4]);
    let es = hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_ES,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                base: 0xf000,
                limit: 0xffff,
                selector: 0xf00,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes: 0x93 },
            },
        },
        ..Default::default()
    };
    guest.vcpu.set_reg(&[es]).expect("ES");
    guest.set(&[(RAX, 0x1122_3344), (RDI, 0x1fff)]);
    // Both bytes of the boundary are devices: one store in two pages of them.
    let message = guest.memory();
    assert_eq!({ message.guest_physical_address }, 0x1_0fff);
    assert_eq!({ message.header.rip }, CODE);
    // From RAM into the device.
    guest.set(&[(RDI, 0xffe)]);
    let message = guest.memory();
    assert_eq!({ message.guest_physical_address }, 0x1_0000);
    assert_eq!({ message.header.rip }, CODE);
    // A load across.
    guest.ram.write(CODE as usize, &[0x26, 0x66, 0x8b, 0x05]);
    let message = guest.memory();
    assert_eq!({ message.guest_physical_address }, 0x1_0000);
    assert_eq!(
        ({ message.header.rip }, guest.get(RAX)),
        (CODE, 0x1122_3344)
    );
}

fn wide_store() {
    // movups es:[di], xmm1; out 1, al
    let guest = Guest::new(&[0x26, 0x0f, 0x11, 0x0d, 0xe6, 0x01]);
    guest.set(&[
        (hv_register_name_HV_X64_REGISTER_CR4, 0x200),
        (hv_register_name_HV_X64_REGISTER_XMM1, 0x1122_3344_5566_7788),
    ]);
    // Inside one page, and across two.
    for offset in [0x10, 0xffc] {
        guest.set(&[(RDI, offset), (RIP, CODE)]);
        let message = guest.memory();
        assert_eq!({ message.guest_physical_address }, DEVICE + offset);
        assert_eq!(({ message.header.rip }, guest.get(RIP)), (CODE, CODE));
        guest.set(&[(RIP, CODE + 4)]);
        assert_eq!({ guest.port().port_number }, 1);
    }
    // movups xmm1, es:[di]: nothing made up stays in the register.
    guest.ram.write(CODE as usize, &[0x26, 0x0f, 0x10, 0x0d]);
    guest.set(&[(RDI, 0x10), (RIP, CODE)]);
    let message = guest.memory();
    assert_eq!(message.header.intercept_access_type, 0);
    assert_eq!(
        guest.get(hv_register_name_HV_X64_REGISTER_XMM1),
        0x1122_3344_5566_7788
    );
}

fn read_only() {
    // mov es:[di], al; mov al, es:[di]; out 1, al
    let guest = Guest::new(&[0x26, 0x88, 0x05, 0x26, 0x8a, 0x05, 0xe6, 0x01]);
    let rom = Ram::new(0x1000);
    rom.write(0x20, &[0x99]);
    let region = rom.region(DEVICE >> 12, false);
    guest.vm.map_user_memory(region).expect("read-only memory");
    guest.set(&[(RDI, 0x20), (RAX, 5)]);
    let message = guest.run();
    assert_eq!(
        { message.header.message_type },
        hv_message_type_HVMSG_GPA_INTERCEPT
    );
    let message = message.to_memory_info().expect("a memory message");
    assert_eq!({ message.guest_physical_address }, DEVICE + 0x20);
    assert_eq!(message.header.intercept_access_type, 1);
    guest.set(&[(RIP, CODE + 3)]);
    assert_eq!(guest.port().rax as u8, 0x99);
    guest.vm.unmap_user_memory(region).expect("unmapped");
}

fn fetch_from_nowhere() {
    // jmp far to DEVICE:0x20
    let guest = Guest::new(&[0xea, 0x20, 0x00, 0x00, (DEVICE >> 12) as u8]);
    guest
        .ram
        .write(CODE as usize + 3, &((DEVICE >> 4) as u16).to_le_bytes());
    let message = guest.memory();
    assert_eq!({ message.guest_physical_address }, DEVICE + 0x20);
    assert_eq!(
        u32::from(message.header.intercept_access_type),
        HV_INTERCEPT_ACCESS_EXECUTE
    );
    assert_eq!(message.instruction_byte_count, 0);
    assert_eq!(guest.get(RIP), 0x20);
}

/// rdmsr of an MSR that nobody has; out 1, al; with a handler of #GP that does out 2, al.
fn msr_guest() -> Guest {
    let guest = Guest::new(&[0x0f, 0x32, 0xe6, 0x01, 0x0f, 0x30, 0xe6, 0x03]);
    guest.ram.write(0x6000, &[0xe6, 0x02, 0xf4]);
    guest.ram.write(13 * 4, &[0x00, 0x60, 0x00, 0x00]);
    guest.set(&[(RCX, 0x0005_1234), (RAX, 0x77), (RDX, 0x88)]);
    guest
}

fn unknown_msrs() {
    let action = hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION;
    let guest = msr_guest();
    assert_eq!({ guest.port().port_number }, 2);
    let guest = msr_guest();
    guest
        .vm
        .set_partition_property(action, 1)
        .expect("a property");
    let message = guest.port();
    assert_eq!(({ message.port_number }, { message.rax }), (1, 0));
    assert!(guest.vm.set_partition_property(action, 2).is_err());
    // KVM's own MSRs do not exist: reading the clock's is ignored as any other.
    let guest = msr_guest();
    guest.set(&[(RCX, 0x4b56_4d01)]);
    assert_eq!({ guest.port().port_number }, 2);
}

fn msr_intercepts() {
    let guest = msr_guest();
    let intercept = mshv_install_intercept {
        access_type_mask: HV_INTERCEPT_ACCESS_MASK_READ | HV_INTERCEPT_ACCESS_MASK_WRITE,
        intercept_type: hv_intercept_type_HV_INTERCEPT_TYPE_X64_MSR,
        intercept_parameter: hv_intercept_parameters { as_uint64: 0 },
    };
    guest.vm.install_intercept(intercept).expect("an intercept");
    let message = guest.run();
    assert_eq!(
        { message.header.message_type },
        hv_message_type_HVMSG_X64_MSR_INTERCEPT
    );
    let message = message.to_msr_info().expect("an MSR message");
    assert_eq!(
        ({ message.msr_number }, message.header.intercept_access_type),
        (0x0005_1234, 0)
    );
    assert_eq!(
        ({ message.header.rip }, message.header.instruction_length()),
        (CODE, 2)
    );
    guest.set(&[(RAX, 0x11), (RDX, 0x22), (RIP, CODE + 2)]);
    assert_eq!({ guest.port().rax }, 0x11);
    guest.set(&[(RIP, CODE + 4)]);
    let message = guest.run().to_msr_info().expect("an MSR message");
    assert_eq!(
        (
            { message.rax },
            { message.rdx },
            message.header.intercept_access_type
        ),
        (0x11, 0x22, 1)
    );
    guest.set(&[(RIP, CODE + 6)]);
    assert_eq!({ guest.port().port_number }, 3);
}

fn triple_fault() {
    // ud2, in protected mode, with an empty IDT
    let guest = Guest::new(&[0x0f, 0x0b]);
    let flat = |name, attributes| hv_register_assoc {
        name,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                base: 0,
                limit: u32::MAX,
                selector: 8,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
            },
        },
        ..Default::default()
    };
    let mut idt = hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_IDTR,
        ..Default::default()
    };
    idt.value.table = hv_x64_table_register {
        pad: [0; 3],
        limit: 0,
        base: 0,
    };
    let cs = flat(hv_register_name_HV_X64_REGISTER_CS, 0xc09b);
    let ss = flat(hv_register_name_HV_X64_REGISTER_SS, 0xc093);
    guest.vcpu.set_reg(&[cs, ss, idt]).expect("segments");
    guest.set(&[(hv_register_name_HV_X64_REGISTER_CR0, 0x11)]);
    let message = guest.run();
    assert_eq!(
        { message.header.message_type },
        hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION
    );
}
