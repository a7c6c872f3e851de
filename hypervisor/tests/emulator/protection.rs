//! Segments, privilege and descriptor tables (SDM vol. 3, chapters 3 and 6; vol. 1, section 19.5).

use hypervisor::emulator::{Exception, Outcome, exception_vector as v};

use crate::bench::{BASE, Bench};

const ZF: u64 = 1 << 6;
const IF: u64 = 1 << 9;

#[test]
fn protected_segments_have_types_and_limits() {
    let mut b = Bench::protected();
    b.general().rax = 0xfffc;
    b.general().rcx = 0x1122_3344;
    b.complete(&[0x89, 0x08]); // mov [eax], ecx: the last four bytes
    assert_eq!(b.peek(BASE + 0xfffc, 4), 0x1122_3344);
    b.general().rax = 0xfffd;
    assert_eq!(b.fault(&[0x89, 0x08]), Exception::with_code(v::GP, 0));
    b.general().rax = 0xffff_fffe; // the end wraps past 4 GiB
    assert_eq!(b.fault(&[0x89, 0x08]), Exception::with_code(v::GP, 0));
    b.general().rbp = 0xfffd;
    assert_eq!(b.fault(&[0x89, 0x4d, 0]), Exception::with_code(v::SS, 0));
    b.general().rax = 0x10;
    assert_eq!(b.fault(&[0x64, 0x89, 0x08]), Exception::with_code(v::GP, 0)); // fs is null
    assert_eq!(b.fault(&[0x2e, 0x89, 0x08]), Exception::with_code(v::GP, 0)); // write to code
    b.state.special.ds.access = 0x4091; // read-only
    assert_eq!(b.fault(&[0x89, 0x08]), Exception::with_code(v::GP, 0));
    b.complete(&[0x8b, 0x08]);
    b.state.special.ds.access = 0x4099; // execute-only
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::with_code(v::GP, 0));
}

#[test]
fn expand_down_segments_begin_above_the_limit() {
    let mut b = Bench::protected();
    b.state.special.ds.access = 0x0097; // 16-bit: up to ffffH
    b.state.special.ds.limit = 0x0fff;
    for (offset, inside) in [
        (0xfff, false),
        (0x1000, true),
        (0xfffc, true),
        (0xfffd, false),
        (0x1_0000, false),
    ] {
        b.general().rax = offset;
        if inside {
            b.complete(&[0x8b, 0x08]);
        } else {
            assert_eq!(
                b.fault(&[0x8b, 0x08]),
                Exception::with_code(v::GP, 0),
                "{offset:x}"
            );
        }
    }
    b.state.special.ds.access = 0x4097; // 32-bit: up to 4 GiB
    b.general().rax = 0x1_0000;
    b.complete(&[0x8b, 0x08]);
}

/// Descriptor, selector; what MOV to DS and to SS do in ring 0.
#[test]
fn segment_registers_load_from_the_gdt() {
    const DATA: u64 = 0x00cf_9200_1234_ffff; // base 1234H, 4 GiB, not accessed
    const GP_18: Exception = Exception::with_code(v::GP, 0x18);
    let load = |descriptor: u64, opcode: u8| {
        let mut b = Bench::protected();
        let gdt = b.state.special.gdt.base;
        b.poke(gdt + 0x18, &descriptor.to_le_bytes());
        b.general().rax = 0x18;
        let outcome = b.run(&[0x8e, opcode]);
        (b, outcome)
    };
    let (ds, ss) = (0xd8, 0xd0);
    for opcode in [ds, ss] {
        let (b, outcome) = load(DATA, opcode);
        assert_eq!(outcome, Outcome::Completed);
        let segment = if opcode == ds {
            b.state.special.ds
        } else {
            b.state.special.ss
        };
        assert_eq!((segment.base, segment.limit), (0x1234, u32::MAX));
        assert_eq!(segment.access, 0xc093);
        // The accessed bit is in memory, too.
        assert_eq!(b.peek(b.state.special.gdt.base + 0x18, 8), DATA | 1 << 40);
    }
    let with_access = |access: u64| DATA & !(0xff << 40) | access << 40;
    let cases = [
        (
            0x12,
            Exception::with_code(v::NP, 0x18),
            Exception::with_code(v::SS, 0x18),
        ),
        (0x82, GP_18, GP_18), // a system segment
        (0x98, GP_18, GP_18), // execute-only
    ];
    for (access, in_ds, in_ss) in cases {
        assert_eq!(
            load(with_access(access), ds).1,
            Outcome::Exception(in_ds),
            "{access:x}"
        );
        assert_eq!(
            load(with_access(access), ss).1,
            Outcome::Exception(in_ss),
            "{access:x}"
        );
    }
    for access in [0x9a, 0x90, 0xf2] {
        // Readable code, read-only data, DPL 3: for DS, not for SS.
        assert_eq!(
            load(with_access(access), ds).1,
            Outcome::Completed,
            "{access:x}"
        );
        assert_eq!(
            load(with_access(access), ss).1,
            Outcome::Exception(GP_18),
            "{access:x}"
        );
    }
    let mut b = Bench::protected();
    b.general().rax = 0x80; // beyond the limit
    assert_eq!(b.fault(&[0x8e, 0xd8]), Exception::with_code(v::GP, 0x80));
    b.general().rax = 0x0c; // there is no LDT
    assert_eq!(b.fault(&[0x8e, 0xd8]), Exception::with_code(v::GP, 0x0c));
    b.general().rax = 3; // null
    b.complete(&[0x8e, 0xd8]);
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::with_code(v::GP, 0));
    assert_eq!(b.fault(&[0x8e, 0xd0]), Exception::with_code(v::GP, 0));
    // LSS casts no interrupt shadow.
    b.poke(BASE + 0x100, &[0, 0, 0, 0, 0x18, 0]);
    let gdt = b.state.special.gdt.base;
    b.poke(gdt + 0x18, &DATA.to_le_bytes());
    b.state.special.es = b.state.special.ss;
    b.general().rax = 0x100;
    b.complete(&[0x26, 0x0f, 0xb2, 0x08]); // lss ecx, es:[eax]
    assert_eq!(b.state.special.ss.base, 0x1234);
    assert_eq!(b.state.interrupt_shadow, 0);
    // In 64-bit mode, ring 0 may have a null SS.
    let mut b = Bench::long();
    b.complete(&[0x8e, 0xd0]);
    assert_eq!(b.state.special.ss.access, 1 << 16);
    assert_eq!(b.state.interrupt_shadow, 1);
}

#[test]
fn ring_3_may_not() {
    let mut b = Bench::protected_user();
    let gp = Exception::with_code(v::GP, 0);
    for bytes in [&[0xfa][..], &[0xfb], &[0xf4]] {
        assert_eq!(b.fault(bytes), gp, "{bytes:02x?}");
    }
    assert_eq!(b.fault(&[0x0f, 0x01, 0xca]), Exception::fault(v::UD)); // clac
    // popfd: IF and IOPL stay, silently.
    b.general().rsp = 0x700;
    b.poke(BASE + 0x700, &0xffff_ffffu32.to_le_bytes());
    b.complete(&[0x9d]);
    assert_eq!(b.state.general.rflags, 0x24_4dd7);
    // IOPL 3 makes CLI and STI legal.
    b.general().rflags = 0x3002;
    b.complete(&[0xfb]);
    assert_eq!(b.state.general.rflags & IF, IF);
    assert_eq!(b.state.interrupt_shadow, 2);
    b.complete(&[0xfb]);
    assert_eq!(b.state.interrupt_shadow, 0);
}

#[test]
fn misaligned_accesses_of_ring_3_fault_if_asked_for() {
    let mut b = Bench::protected_user();
    b.general().rax = 0x101;
    b.complete(&[0x8b, 0x08]);
    b.general().rflags |= 1 << 18;
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::with_code(v::AC, 0));
    b.complete(&[0x8a, 0x08]);
    b.state.special.cr0 &= !(1 << 18);
    b.complete(&[0x8b, 0x08]);
    b.state.special.cr0 |= 1 << 18;
    b.state.special.ss.access &= !0x60;
    b.complete(&[0x8b, 0x08]);
}

#[test]
fn the_io_bitmap_is_checked_if_asked_for() {
    let mut b = Bench::protected_user();
    let tss = BASE + 0x2000;
    b.state.special.tr.base = tss;
    b.state.special.tr.limit = 0x68 + 8;
    b.state.special.tr.access = 0x8b;
    b.poke(tss + 102, &[0x68, 0]);
    // Ports 8 to 15 but 12 are forbidden.
    b.poke(tss + 0x68, &[0, 0xef, 0]);
    b.options.check_io_permission = true;
    let gp = Exception::with_code(v::GP, 0);
    for (port, bytes, allowed) in [
        (0u64, &[0xec][..], true), // in al, dx
        (12, &[0xec], true),
        (12, &[0x66, 0xed], false), // in ax, dx reaches 13
        (7, &[0x66, 0xed], false),
        (4, &[0xed], true),
        (5, &[0xed], false),
        (16, &[0xed], true),
        (0x48, &[0xec], false), // beyond the map
        (12, &[0x6c], true),    // insb
        (13, &[0x6c], false),
        (13, &[0x6e], false), // outsb
    ] {
        b.general().rdx = port;
        if allowed {
            b.complete(bytes);
        } else {
            assert_eq!(b.fault(bytes), gp, "{bytes:02x?} at {port:x}");
        }
    }
    b.general().rdx = 13;
    b.general().rflags |= 0x3000;
    b.complete(&[0xec]);
    b.general().rflags &= !0x3000;
    b.options.check_io_permission = false;
    b.complete(&[0xec]);
}

#[test]
fn virtual_8086_mode_asks_for_iopl_3() {
    let mut b = Bench::virtual_8086();
    let gp = Exception::with_code(v::GP, 0);
    for bytes in [&[0x9c][..], &[0x9d], &[0xfa], &[0xcd, 0x21]] {
        assert_eq!(b.fault(bytes), gp, "{bytes:02x?}");
    }
    b.general().rbx = 0x30;
    b.complete(&[0x88, 0x07]); // mov [bx], al
    b.general().rflags |= 0x3000;
    b.complete(&[0x9c]); // pushf
    b.general().rax = 0x1234;
    b.complete(&[0x8e, 0xd8]); // mov ds, ax
    assert_eq!(b.state.special.ds.base, 0x1_2340);
}

#[test]
fn descriptor_tables_can_be_stored() {
    let mut b = Bench::long();
    b.state.special.idt.base = 0xffff_8000_1234_5678;
    b.state.special.idt.limit = 0xfff;
    b.state.special.tr.selector = 0x40;
    b.general().rax = BASE + 0x100;
    b.complete(&[0x0f, 0x01, 0x08]); // sidt [rax]
    assert_eq!(b.peek(BASE + 0x100, 2), 0xfff);
    assert_eq!(b.peek(BASE + 0x102, 8), 0xffff_8000_1234_5678);
    b.complete(&[0x0f, 0x00, 0xc9]); // str ecx
    assert_eq!(b.state.general.rcx, 0x40);
    b.complete(&[0x48, 0x0f, 0x01, 0xe1]); // smsw rcx
    assert_eq!(b.state.general.rcx, b.state.special.cr0);
    // UMIP keeps ring 3 from it.
    b.state.special.cr4 |= 1 << 11;
    b.complete(&[0x0f, 0x01, 0x08]);
    b.state.special.ss.access |= 0x60;
    for bytes in [
        &[0x0f, 0x01, 0x08][..],
        &[0x0f, 0x01, 0xe1],
        &[0x0f, 0x00, 0xc9],
    ] {
        assert_eq!(
            b.fault(bytes),
            Exception::with_code(v::GP, 0),
            "{bytes:02x?}"
        );
    }
    let mut b = Bench::real();
    assert_eq!(b.fault(&[0x0f, 0x00, 0xc8]), Exception::fault(v::UD)); // str ax
    b.complete(&[0x0f, 0x01, 0x07]); // sgdt [bx]: six bytes
}

/// Access byte of the descriptor; whether LAR, LSL, VERR, VERW find it usable in ring 0 (SDM vol. 2).
#[test]
fn selectors_can_be_examined() {
    let rows = [
        (0x92u64, true, true, true, true),  // writable data
        (0x90, true, true, true, false),    // read-only data
        (0x98, true, true, false, false),   // execute-only code
        (0x9a, true, true, true, false),    // readable code
        (0x82, true, true, false, false),   // LDT
        (0x89, true, true, false, false),   // TSS
        (0x8c, true, false, false, false),  // call gate
        (0x8e, false, false, false, false), // interrupt gate
    ];
    for (access, lar, lsl, verr, verw) in rows {
        let mut b = Bench::protected();
        let gdt = b.state.special.gdt.base;
        let descriptor = 0x00c0_0000_0000_0012 | access << 40;
        b.poke(gdt + 0x18, &descriptor.to_le_bytes());
        b.general().rax = 0x18;
        for (bytes, usable) in [
            (&[0x0f, 0x02, 0xc8][..], lar), // lar ecx, eax
            (&[0x0f, 0x03, 0xd0], lsl),     // lsl edx, eax
            (&[0x0f, 0x00, 0xe0], verr),
            (&[0x0f, 0x00, 0xe8], verw),
        ] {
            b.complete(bytes);
            assert_eq!(
                b.state.general.rflags & ZF != 0,
                usable,
                "{access:x} {bytes:02x?}"
            );
        }
        assert_eq!(
            b.state.general.rcx,
            if lar { 0xc0_0000 | access << 8 } else { 0 }
        );
        assert_eq!(b.state.general.rdx, if lsl { 0x1_2fff } else { 0 });
    }
    let mut b = Bench::protected();
    b.general().rax = 0x7ff8; // beyond the table
    b.general().rflags |= ZF;
    b.complete(&[0x0f, 0x00, 0xe8]);
    assert_eq!(b.state.general.rflags & ZF, 0);
}

#[test]
fn segment_bases_can_be_read_and_written() {
    let mut b = Bench::long();
    b.general().rax = 0xffff_8000_0000_1000;
    b.complete(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]); // wrfsbase rax
    assert_eq!(b.state.special.fs.base, 0xffff_8000_0000_1000);
    b.complete(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]); // wrgsbase rax
    b.complete(&[0xf3, 0x0f, 0xae, 0xc9]); // rdgsbase ecx
    assert_eq!(b.state.general.rcx, 0x1000);
    b.general().rax = 1 << 47;
    assert_eq!(
        b.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]),
        Exception::with_code(v::GP, 0)
    );
    b.state.special.cr4 &= !(1 << 16);
    assert_eq!(
        b.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
        Exception::fault(v::UD)
    );
}
