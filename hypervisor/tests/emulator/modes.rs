//! Real and 64-bit mode, and what the manuals say of instructions there (SDM vol. 2).

use hypervisor::emulator::{
    EmulationError, Exception, ExceptionKind, Outcome, Reason, Vendor, emulate,
    exception_vector as v,
};

use crate::bench::{BASE, Bench, RIP};
use crate::flat::Page;

const CF: u64 = 1;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;

/// DS:0 and SS:0 in real mode.
const DS: u64 = 0x1_0000;
const ES: u64 = 0x2_0000;
const SS: u64 = 0x1_8000;

#[test]
fn real_mode_addresses_are_paragraphs() {
    let mut b = Bench::real();
    b.general().rbx = 0x30;
    b.general().rsi = 0x05;
    b.general().rax = 0x1234_5678;
    // mov [bx+si], ax
    b.complete(&[0x89, 0x00]);
    assert_eq!(b.peek(DS + 0x35, 4), 0x5678);
    // mov es:[bx+si], eax
    b.complete(&[0x26, 0x66, 0x89, 0x00]);
    assert_eq!(b.peek(ES + 0x35, 4), 0x1234_5678);
    // mov ax, [bp+2]: SS by default
    b.general().rbp = 0x100;
    b.poke(SS + 0x102, &[0xcd, 0xab]);
    b.complete(&[0x8b, 0x46, 0x02]);
    assert_eq!(b.state.general.rax, 0x1234_abcd);
    // mov al, [bx+si]: the offset wraps at 64 KiB
    b.general().rbx = 0xffff;
    b.general().rsi = 0x0002;
    b.poke(DS + 1, &[0x77]);
    b.complete(&[0x8a, 0x00]);
    assert_eq!(b.state.general.rax & 0xff, 0x77);
    // mov ax, [ecx*2+4]
    b.general().rcx = 0x40;
    b.poke(DS + 0x84, &[0x11, 0x22]);
    b.complete(&[0x67, 0x8b, 0x04, 0x4d, 4, 0, 0, 0]);
    assert_eq!(b.state.general.rax & 0xffff, 0x2211);
}

#[test]
fn real_mode_limits_fault_without_error_code() {
    let mut b = Bench::real();
    b.general().rbx = 0xffff;
    b.general().rbp = 0xffff;
    b.general().rcx = 0x1_0000;
    assert_eq!(b.fault(&[0x8b, 0x07]), Exception::fault(v::GP)); // mov ax, [bx]
    assert_eq!(b.fault(&[0x8b, 0x46, 0x00]), Exception::fault(v::SS)); // mov ax, [bp]
    assert_eq!(b.fault(&[0x67, 0x8a, 0x01]), Exception::fault(v::GP)); // mov al, [ecx]
    b.complete(&[0x8a, 0x07]); // mov al, [bx] fits
    b.general().rsp = 1;
    assert_eq!(b.fault(&[0x50]), Exception::fault(v::SS)); // push ax
}

#[test]
fn the_stack_is_as_wide_as_its_segment() {
    let mut b = Bench::real();
    b.general().rsp = 0xdead_0000;
    b.general().rax = 0xbeef;
    b.complete(&[0x50]); // push ax: SP wraps, the upper half stays
    assert_eq!(b.state.general.rsp, 0xdead_fffe);
    assert_eq!(b.peek(SS + 0xfffe, 2), 0xbeef);
    b.complete(&[0x5b]); // pop bx
    assert_eq!(b.state.general.rsp, 0xdead_0000);
    assert_eq!(b.state.general.rbx, 0xbeef);
    b.general().rsp = 0x800;
    b.complete(&[0x66, 0x68, 1, 2, 3, 4]); // push dword
    assert_eq!(b.state.general.rsp, 0x7fc);
    assert_eq!(b.peek(SS + 0x7fc, 4), 0x0403_0201);
    b.complete(&[0x1e]); // push ds
    assert_eq!(b.peek(SS + 0x7fa, 2), 0x1000);
}

#[test]
fn pusha_and_popa_keep_sp_out() {
    for (prefix, bytes) in [(None, 2u64), (Some(0x66), 4)] {
        let mut b = Bench::real();
        let g = b.general();
        (g.rax, g.rcx, g.rdx, g.rbx) = (1, 2, 3, 4);
        (g.rbp, g.rsi, g.rdi) = (6, 7, 8);
        let code = |opcode| {
            [prefix, Some(opcode)]
                .into_iter()
                .flatten()
                .collect::<Vec<u8>>()
        };
        b.complete(&code(0x60));
        let top = 0x800 - 8 * bytes;
        assert_eq!(b.state.general.rsp, top);
        for (slot, value) in [8, 7, 6, 0x800, 4, 3, 2, 1].into_iter().enumerate() {
            assert_eq!(
                b.peek(SS + top + slot as u64 * bytes, bytes as usize),
                value
            );
        }
        // What POPA finds for SP does not matter.
        b.poke(SS + top + 3 * bytes, &[0xff, 0xff]);
        let before = b.state.general;
        b.general().rax = 0;
        b.general().rdi = 0;
        b.complete(&code(0x61));
        let after = b.state.general;
        assert_eq!(after.rsp, 0x800);
        assert_eq!(
            (after.rax, after.rdi, after.rbx),
            (before.rax, before.rdi, before.rbx)
        );
    }
}

#[test]
fn segment_loads_in_real_mode_shift_the_selector() {
    let mut b = Bench::real();
    b.general().rax = 0x1234;
    b.complete(&[0x8e, 0xd8]); // mov ds, ax
    assert_eq!(b.state.special.ds.base, 0x1_2340);
    assert_eq!(b.state.special.ds.selector, 0x1234);
    assert_eq!(b.state.special.ds.limit, 0xffff);
    assert_eq!(b.state.interrupt_shadow, 0);
    b.general().rax = 0x1800;
    b.complete(&[0x8e, 0xd0]); // mov ss, ax
    assert_eq!(b.state.interrupt_shadow, 1);
    b.poke(0x1_8000 + 0x900, &[0x34, 0x12, 0x00, 0x19]);
    b.general().rbp = 0x900;
    b.complete(&[0xc4, 0x5e, 0x00]); // les bx, [bp]
    assert_eq!(b.state.general.rbx, 0x1234);
    assert_eq!(b.state.special.es.base, 0x1_9000);
    assert_eq!(b.state.interrupt_shadow, 0);
    assert_eq!(b.fault(&[0x8e, 0xc8]), Exception::fault(v::UD)); // mov cs, ax
}

/// AL, AH, flags before; opcode; AX and CF, AF, ZF after (SDM vol. 2, DAA to AAD).
#[test]
fn decimal_adjustments() {
    let cases: &[(u64, u64, &[u8], u64, u64)] = &[
        (0x00ae, AF, &[0x27], 0x0014, CF | AF), // daa: 79 + 35 = 114
        (0x0047, CF, &[0x2f], 0x00e7, CF),      // das: 35 - 47 borrows
        (0x009a, 0, &[0x27], 0x0000, CF | AF | ZF),
        (0x010b, 0, &[0x37], 0x0201, CF | AF),  // aaa
        (0x01fe, AF, &[0x3f], 0x0008, CF | AF), // aas
        (0x003f, 0, &[0xd4, 10], 0x0603, 0),    // aam
        (0x0603, 0, &[0xd5, 10], 0x003f, 0),    // aad
    ];
    for &(ax, flags, bytes, result, status) in cases {
        let mut b = Bench::real();
        b.general().rax = ax;
        b.general().rflags |= flags;
        b.complete(bytes);
        assert_eq!(b.state.general.rax, result, "{bytes:02x?} of {ax:x}");
        let mask = if bytes.len() == 1 { CF | AF } else { ZF };
        assert_eq!(
            b.state.general.rflags & mask,
            status & mask,
            "{bytes:02x?} of {ax:x}"
        );
    }
    let mut b = Bench::real();
    assert_eq!(b.fault(&[0xd4, 0]), Exception::fault(v::DE));
}

#[test]
fn branches_in_16_bits() {
    let mut b = Bench::real();
    assert_eq!(b.run(&[0xe9, 0xfe, 0xfe]), Outcome::Completed); // jmp -0x102
    assert_eq!(b.state.general.rip, 1);
    assert_eq!(b.run(&[0xeb, 0xfc]), Outcome::Completed); // jmp -4: wraps in 16 bits
    assert_eq!(b.state.general.rip, 0xffff);
    b.general().rip = RIP;
    assert_eq!(
        b.run(&[0x66, 0xe9, 0, 0, 1, 0]),
        Outcome::Exception(Exception::fault(v::GP))
    );
    b.general().rcx = 0x1_0001;
    assert_eq!(b.run(&[0xe2, 0x10]), Outcome::Completed); // loop: CX becomes 0
    assert_eq!(b.state.general.rcx, 0x1_0000);
    assert_eq!(b.state.general.rip, RIP + 2);
    assert_eq!(b.run(&[0xe3, 0x10]), Outcome::Completed); // jcxz
    assert_eq!(b.state.general.rip, RIP + 0x14);
    assert_eq!(b.run(&[0xe8, 0x10, 0]), Outcome::Completed); // call
    assert_eq!(b.peek(SS + 0x7fe, 2), RIP + 0x17);
    assert_eq!(b.run(&[0xc2, 4, 0]), Outcome::Completed); // ret 4
    assert_eq!(
        (b.state.general.rip, b.state.general.rsp),
        (RIP + 0x17, 0x804)
    );
}

#[test]
fn bound_checks_both_ends() {
    let mut b = Bench::real();
    b.poke(DS + 0x40, &[0xfe, 0xff, 5, 0]); // -2 to 5
    for (index, inside) in [(0xfffe, true), (5, true), (0xfffd, false), (6, false)] {
        b.general().rax = index;
        if inside {
            b.complete(&[0x62, 0x06, 0x40, 0]);
        } else {
            assert_eq!(b.fault(&[0x62, 0x06, 0x40, 0]), Exception::fault(v::BR));
        }
    }
}

#[test]
fn addresses_in_64_bits() {
    let mut b = Bench::long();
    b.state.special.fs.base = BASE;
    b.general().rax = 0x8000_0000_0000;
    b.general().rbp = 0x8000_0000_0000;
    b.general().rcx = 0x55;
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::with_code(v::GP, 0));
    assert_eq!(b.fault(&[0x8b, 0x4d, 0]), Exception::with_code(v::SS, 0));
    b.general().rax = 0x7fff_ffff_fffd; // the end is not canonical
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::with_code(v::GP, 0));
    b.state.special.cr4 |= 1 << 12; // LA57: it is
    let outside = Exception::page_fault(0, 0x7fff_ffff_fffd);
    assert_eq!(b.fault(&[0x8b, 0x08]), outside);
    // mov fs:[0x20], ecx; mov [rip - …], ecx; mov [eax + …], ecx cuts the address
    b.complete(&[0x64, 0x89, 0x0c, 0x25, 0x20, 0, 0, 0]);
    assert_eq!(b.peek(BASE + 0x20, 4), 0x55);
    b.general().rip = BASE + 0x1000;
    b.complete(&[0x89, 0x0d, 0xfa, 0xff, 0xff, 0xff]);
    assert_eq!(b.peek(BASE + 0x1000, 4), 0x55);
    b.general().rax = 0xffff_ffff_0001_0040;
    b.complete(&[0x67, 0x89, 0x08]);
    assert_eq!(b.peek(BASE + 0x40, 4), 0x55);
    // A limit means nothing here.
    b.state.special.ds.limit = 0;
    b.complete(&[0x67, 0x89, 0x08]);
}

#[test]
fn software_interrupts_report_the_instruction_behind_them() {
    let mut b = Bench::long();
    let cases = [
        (
            &[0xcc][..],
            v::BP,
            ExceptionKind::SoftwareException { length: 1 },
        ),
        (
            &[0xcd, 0x80],
            0x80,
            ExceptionKind::SoftwareInterrupt { length: 2 },
        ),
        (
            &[0xf1],
            v::DB,
            ExceptionKind::PrivilegedSoftwareException { length: 1 },
        ),
    ];
    for (bytes, vector, kind) in cases {
        let rip = b.state.general.rip;
        let expected = Exception {
            kind,
            ..Exception::fault(vector)
        };
        assert_eq!(b.run(bytes), Outcome::Exception(expected));
        assert_eq!(b.state.general.rip, rip + bytes.len() as u64);
    }
    assert_eq!(b.fault(&[0x0f, 0x0b]), Exception::fault(v::UD));
    let mut b = Bench::real();
    b.complete(&[0xce]); // into, without OF
    b.general().rflags |= 1 << 11;
    let Outcome::Exception(exception) = b.run(&[0xce]) else {
        panic!("INTO with OF");
    };
    assert_eq!(exception.vector, v::OF);
}

#[test]
fn halt_and_single_step() {
    let mut b = Bench::long();
    assert_eq!(b.run(&[0xf4]), Outcome::Halted);
    assert_eq!(b.state.general.rip, RIP + 1);
    let trap = Outcome::Exception(Exception {
        payload: Some(1 << 14),
        kind: ExceptionKind::Trap,
        ..Exception::fault(v::DB)
    });
    b.general().rflags |= 1 << 8;
    assert_eq!(b.run(&[0x90]), trap);
    assert_eq!(b.state.general.rip, RIP + 2);
    // A POPF that sets TF is not itself followed by a trap.
    b.general().rflags = 2;
    b.poke(BASE + 0x800, &0x102u64.to_le_bytes());
    b.complete(&[0x9d]);
    assert_eq!(b.state.general.rflags & 0x100, 0x100);
    // RF ends with the instruction.
    b.general().rflags = 2 | 1 << 16;
    b.complete(&[0x90]);
    assert_eq!(b.state.general.rflags, 2);
}

#[test]
fn missing_bytes_are_fetched() {
    // mov dword ptr [rip - 10 - 0x100], 0x44332211, in three pieces over two pages
    let code = [0xc7, 0x05, 0xf6, 0xfe, 0xff, 0xff, 0x11, 0x22, 0x33, 0x44];
    for known in 0..code.len() {
        let mut b = Bench::long();
        let rip = BASE + 0x2000 - 3;
        b.poke(rip, &code);
        b.general().rip = rip;
        assert_eq!(b.run(&code[..known]), Outcome::Completed);
        assert_eq!(b.peek(rip - 0x100, 4), 0x4433_2211);
        assert_eq!(b.state.general.rip, rip + 10);
    }
    let mut b = Bench::long();
    b.platform.pages[2] = Page::Absent;
    b.general().rip = BASE + 0x2000 - 3;
    let fault = b.fault(&code[..3]);
    assert_eq!(fault, Exception::page_fault(0, BASE + 0x2000));
    // Prefixes without end.
    assert_eq!(b.fault(&[0x66; 15]), Exception::with_code(v::GP, 0));
}

fn error(b: &mut Bench, bytes: &[u8]) -> EmulationError {
    emulate(&mut b.platform, &mut b.state, bytes, &b.options).expect_err("no such semantics")
}

#[test]
fn what_is_not_known_is_named() {
    let mut b = Bench::long();
    let unsupported = error(&mut b, &[0x0f, 0xa2, 0x90]); // cpuid
    assert!(matches!(unsupported.reason, Reason::Unsupported));
    let message = unsupported.to_string();
    assert_eq!(
        message,
        "cannot emulate Cpuid (bytes 0f a2): the emulator does not know it"
    );
    let undecodable = error(&mut b, &[0x06, 0x90]); // push es
    assert!(matches!(undecodable.reason, Reason::Undecodable));
    // Far branches, control registers, MMX.
    for bytes in [
        &[0xff, 0x28][..],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x6f, 0xc1],
        &[0x0f, 0x7e, 0xc0],
        &[0xcf],
    ] {
        assert!(
            matches!(error(&mut b, bytes).reason, Reason::Unsupported),
            "{bytes:02x?}"
        );
    }
    // LOCK where it may not be is #UD.
    for bytes in [
        &[0xf0, 0x8b, 0x00][..],
        &[0xf0, 0x01, 0xc0],
        &[0xf0, 0x39, 0x00],
    ] {
        assert_eq!(b.fault(bytes), Exception::fault(v::UD), "{bytes:02x?}");
    }
}

#[test]
fn vector_instructions_need_their_enables() {
    let movaps: &[u8] = &[0x0f, 0x28, 0xc1];
    let vmovaps: &[u8] = &[0xc5, 0xf8, 0x28, 0xc1];
    let mut b = Bench::long();
    b.complete(movaps).complete(vmovaps);
    b.state.special.cr0 |= 1 << 3;
    assert_eq!(b.fault(movaps), Exception::fault(v::NM));
    assert_eq!(b.fault(vmovaps), Exception::fault(v::NM));
    b.state.special.cr0 |= 1 << 2;
    assert_eq!(b.fault(movaps), Exception::fault(v::UD));
    let mut b = Bench::long();
    b.platform.xcr0 = 3;
    assert_eq!(b.fault(vmovaps), Exception::fault(v::UD));
    let mut b = Bench::long();
    b.state.special.cr4 = 0x20;
    assert_eq!(b.fault(movaps), Exception::fault(v::UD));
    assert_eq!(b.fault(vmovaps), Exception::fault(v::UD));
    let mut b = Bench::long();
    b.platform.vectors.upper = None;
    b.complete(movaps);
    assert_eq!(b.fault(vmovaps), Exception::fault(v::UD));
    // movaps xmm0, [rax], misaligned
    b.general().rax = BASE + 8;
    assert_eq!(b.fault(&[0x0f, 0x28, 0x00]), Exception::with_code(v::GP, 0));
}

#[test]
fn amd_obeys_the_operand_size_of_branches() {
    for (vendor, bytes, target) in [
        (Vendor::Intel, &[0x66, 0xe9, 0x10, 0, 0, 0][..], 0x4_0116),
        (Vendor::Amd, &[0x66, 0xe9, 0x10, 0], 0x0114),
    ] {
        let mut b = Bench::long();
        b.options.vendor = vendor;
        b.general().rip = 0x4_0100;
        assert_eq!(b.run(bytes), Outcome::Completed);
        assert_eq!(b.state.general.rip, target);
    }
}
