//! How accesses reach the platform: widths, page crossings, LOCK forms, and what a fault leaves undone.

use hypervisor::emulator::{Exception, Outcome, exception_vector as v};

use crate::bench::{BASE, Bench};
use crate::flat::{Page, Seen};

const PAGE: u64 = 4096;
const DF: u64 = 1 << 10;

#[test]
fn one_access_is_one_access_of_the_same_width() {
    let mut b = Bench::long();
    b.general().rax = BASE;
    b.general().rbx = 0x1122_3344_5566_7788;
    let bytes = |n: usize| 0x1122_3344_5566_7788u64.to_le_bytes()[..n].to_vec();
    let cases: &[(&[u8], Vec<Seen>)] = &[
        (&[0x88, 0x18], vec![Seen::Write(BASE, bytes(1))]),
        (&[0x66, 0x89, 0x18], vec![Seen::Write(BASE, bytes(2))]),
        (&[0x89, 0x18], vec![Seen::Write(BASE, bytes(4))]),
        (&[0x48, 0x89, 0x18], vec![Seen::Write(BASE, bytes(8))]),
        (&[0x48, 0x8b, 0x08], vec![Seen::Read(BASE, 8)]),
        (&[0x0f, 0xb6, 0x08], vec![Seen::Read(BASE, 1)]),
        (&[0x0f, 0x28, 0x00], vec![Seen::Read(BASE, 16)]),
        (&[0xc5, 0xfe, 0x6f, 0x00], vec![Seen::Read(BASE, 32)]),
        (&[0xc5, 0xf8, 0x10, 0x00], vec![Seen::Read(BASE, 16)]),
        (&[0xf3, 0x0f, 0x10, 0x00], vec![Seen::Read(BASE, 4)]),
        // A LOCK form reads, then exchanges; so does XCHG.
        (
            &[0xf0, 0x48, 0x0f, 0xba, 0x28, 0],
            vec![Seen::Read(BASE, 8), Seen::CompareExchange(BASE, 8)],
        ),
        (
            &[0x87, 0x18],
            vec![Seen::Read(BASE, 4), Seen::CompareExchange(BASE, 4)],
        ),
        // NOP with a memory operand, and LEA, touch nothing.
        (&[0x0f, 0x1f, 0x00], vec![]),
        (&[0x48, 0x8d, 0x08], vec![]),
    ];
    for (code, seen) in cases {
        b.complete(code);
        assert_eq!(b.log(), seen, "{code:02x?}");
        b.general().rbx = 0x1122_3344_5566_7788;
    }
}

#[test]
fn an_access_over_a_page_border_is_two() {
    let mut b = Bench::long();
    b.general().rax = BASE + PAGE - 3;
    b.general().rbx = 0x1122_3344_5566_7788;
    b.complete(&[0x48, 0x89, 0x18]);
    let expected = vec![
        Seen::Write(BASE + PAGE - 3, vec![0x88, 0x77, 0x66]),
        Seen::Write(BASE + PAGE, vec![0x55, 0x44, 0x33, 0x22, 0x11]),
    ];
    assert_eq!(b.log(), &expected);
    b.general().rcx = 0;
    b.complete(&[0x48, 0x8b, 0x08]);
    assert_eq!(b.state.general.rcx, 0x1122_3344_5566_7788);
    assert_eq!(
        b.log(),
        &[Seen::Read(BASE + PAGE - 3, 3), Seen::Read(BASE + PAGE, 5)]
    );
    // A split lock is done in halves, and still adds.
    b.complete(&[0xf0, 0x48, 0x01, 0x18]);
    assert_eq!(b.peek(BASE + PAGE - 3, 8), 0x2244_6688_aacc_ef10);
}

#[test]
fn a_fault_on_the_second_page_writes_nothing_to_the_first() {
    let mut b = Bench::long();
    b.platform.pages[1] = Page::ReadOnly;
    b.general().rax = BASE + PAGE - 3;
    b.general().rbx = u64::MAX;
    let fault = Exception::page_fault(3, BASE + PAGE);
    for code in [
        &[0x48, 0x89, 0x18][..],   // mov [rax], rbx
        &[0x48, 0x01, 0x18],       // add
        &[0xf0, 0x48, 0x01, 0x18], // lock add
        &[0x48, 0x87, 0x18],       // xchg
        &[0x48, 0x0f, 0xc1, 0x18], // xadd
        &[0x0f, 0x11, 0x00],       // movups
        &[0x48, 0x0f, 0xb1, 0x18], // cmpxchg
        &[0x8f, 0x00],             // pop [rax]
    ] {
        assert_eq!(b.fault(code), fault, "{code:02x?}");
        let touched = b.log().iter().any(
            |seen| !matches!(seen, Seen::Read(at, _) if *at >= BASE + 0x800 && *at < BASE + 0x808),
        );
        assert!(!touched, "{code:02x?} touched memory before its fault");
    }
    // A read-modify-write of a read-only page faults as a write, before it reads.
    b.general().rax = BASE + PAGE;
    assert_eq!(
        b.fault(&[0x01, 0x18]),
        Exception::page_fault(3, BASE + PAGE)
    );
    assert!(b.log().is_empty());
}

#[test]
fn a_push_of_memory_checks_the_stack_before_it_reads() {
    let mut b = Bench::long();
    b.platform.pages[0] = Page::Absent;
    b.general().rsp = BASE + 0x10;
    b.general().rax = BASE + PAGE;
    b.fault(&[0xff, 0x30]);
    // The read of a device cannot be taken back, so its order is the processor's: source first.
    assert_eq!(b.log(), &[Seen::Read(BASE + PAGE, 8)]);
}

#[test]
fn rep_movs_keeps_what_it_has_done_before_a_fault() {
    let mut b = Bench::long();
    b.platform.pages[2] = Page::Absent;
    b.poke(BASE, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let g = b.general();
    (g.rsi, g.rdi, g.rcx) = (BASE, BASE + 2 * PAGE - 5, 8);
    let outcome = b.run(&[0xf3, 0xa4]);
    let fault = Exception::page_fault(2, BASE + 2 * PAGE);
    assert_eq!(outcome, Outcome::Exception(fault));
    let g = b.state.general;
    assert_eq!((g.rsi, g.rdi, g.rcx), (BASE + 5, BASE + 2 * PAGE, 3));
    assert_eq!(g.rip, crate::bench::RIP);
    assert_eq!(b.peek(BASE + 2 * PAGE - 5, 5), 0x05_0403_0201);
    // The page arrives; the same instruction goes on.
    b.platform.pages[2] = Page::ReadWrite;
    b.complete(&[0xf3, 0xa4]);
    assert_eq!(b.peek(BASE + 2 * PAGE - 5, 8), 0x0807_0605_0403_0201);
    assert_eq!(b.state.general.rcx, 0);
}

#[test]
fn rep_is_bounded_per_call() {
    let mut b = Bench::long();
    b.options.max_iterations = 10;
    let g = b.general();
    (g.rdi, g.rcx, g.rax) = (BASE, 25, 0xaa);
    for left in [15, 5] {
        assert_eq!(b.run(&[0xf3, 0xaa]), Outcome::Repeating);
        assert_eq!(b.state.general.rcx, left);
        assert_eq!(b.state.general.rip, crate::bench::RIP);
    }
    b.complete(&[0xf3, 0xaa]);
    assert_eq!((b.state.general.rcx, b.state.general.rdi), (0, BASE + 25));
    // With TF, each iteration is a step.
    let g = b.general();
    (g.rcx, g.rflags) = (2, 0x102);
    for left in [1, 0] {
        let Outcome::Exception(exception) = b.run(&[0xf3, 0xaa]) else {
            panic!("no trap");
        };
        assert_eq!((exception.vector, b.state.general.rcx), (v::DB, left));
    }
}

#[test]
fn strings_go_backwards_and_stop_where_they_should() {
    let mut b = Bench::long();
    b.poke(BASE + 0x100, b"hello\0world");
    let g = b.general();
    (g.rdi, g.rcx, g.rax) = (BASE + 0x100, u64::MAX, 0);
    b.complete(&[0xf2, 0xae]); // repne scasb: strlen
    assert_eq!(!b.state.general.rcx - 1, 5);
    b.poke(BASE + 0x200, b"help!");
    let g = b.general();
    (g.rsi, g.rdi, g.rcx) = (BASE + 0x100, BASE + 0x200, 5);
    b.complete(&[0xf3, 0xa6]); // repe cmpsb: 'l' against 'p'
    assert_eq!(
        (b.state.general.rcx, b.state.general.rflags & 0x41),
        (1, 0x01)
    );
    // std; rep movsd over a page border
    let g = b.general();
    (g.rsi, g.rdi, g.rcx) = (BASE + PAGE + 2, BASE + 3 * PAGE, 3);
    g.rflags |= DF;
    b.poke(BASE + PAGE - 6, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    b.complete(&[0xf3, 0xa5]);
    assert_eq!(b.peek(BASE + 3 * PAGE - 8, 8), 0x0807_0605_0403_0201);
    assert_eq!(b.peek(BASE + 3 * PAGE, 4), 0x0c0b_0a09);
    // A count of 0 touches nothing.
    b.general().rcx = 0;
    b.general().rsi = 1;
    b.complete(&[0xf3, 0xa5]);
}

#[test]
fn string_io_moves_elements_between_ports_and_memory() {
    let mut b = Bench::long();
    let g = b.general();
    (g.rdi, g.rcx, g.rdx) = (BASE + PAGE - 3, 3, 0x1f0);
    b.complete(&[0x66, 0xf3, 0x6d]); // rep insw, the second element over a page border
    assert_eq!(b.peek(BASE + PAGE - 3, 6), 0x4321_4321_4321);
    assert_eq!(
        b.log()
            .iter()
            .filter(|seen| **seen == Seen::PioRead(0x1f0, 2))
            .count(),
        3
    );
    let g = b.general();
    (g.rsi, g.rcx) = (BASE + 0x40, 2);
    b.poke(BASE + 0x40, &[1, 2, 3, 4, 5, 6, 7, 8]);
    b.complete(&[0xf3, 0x6f]); // rep outsd
    assert_eq!(
        b.log(),
        &[
            Seen::Read(BASE + 0x40, 4),
            Seen::PioWrite(0x1f0, vec![1, 2, 3, 4]),
            Seen::Read(BASE + 0x44, 4),
            Seen::PioWrite(0x1f0, vec![5, 6, 7, 8]),
        ]
    );
    // The destination is checked before the port is read.
    b.platform.pages[0] = Page::ReadOnly;
    b.general().rdi = BASE;
    b.fault(&[0x6c]);
    assert!(b.log().is_empty());
    // in eax, 0x80; out dx, al
    b.complete(&[0xe5, 0x80]);
    assert_eq!(b.state.general.rax, 0x8765_4321);
    b.complete(&[0xee]);
    assert_eq!(b.log(), &[Seen::PioWrite(0x1f0, vec![0x21])]);
}

#[test]
fn sixteen_bit_strings_wrap() {
    let mut b = Bench::real();
    let g = b.general();
    (g.rsi, g.rdi, g.rcx) = (0xdead_ffff, 0x10, 0xbeef_0002);
    b.poke(BASE + 0xffff, &[0xaa]);
    b.poke(BASE, &[0xbb]);
    b.complete(&[0xf3, 0xa4]);
    assert_eq!(b.peek(0x2_0010, 2), 0xbbaa);
    let g = b.state.general;
    assert_eq!((g.rsi, g.rdi, g.rcx), (0xdead_0001, 0x12, 0xbeef_0000));
}

#[test]
fn a_platform_failure_leaves_the_registers() {
    let mut b = Bench::long();
    // A page that translates, but has no memory behind it.
    b.platform.pages.push(Page::ReadWrite);
    b.general().rax = BASE + 32 * PAGE;
    let before = b.state;
    let error =
        hypervisor::emulator::emulate(&mut b.platform, &mut b.state, &[0x8b, 0x18], &b.options)
            .expect_err("there is no memory");
    assert_eq!(
        error.to_string(),
        "cannot emulate Mov (bytes 8b 18): the platform failed: no such memory"
    );
    assert_eq!(b.state, before);
}

#[test]
fn fxsave_and_fxrstor_move_sse_state() {
    let mut b = Bench::long();
    b.general().rax = BASE + 0x200;
    let fxsave: &[u8] = &[0x48, 0x0f, 0xae, 0x00];
    let fxrstor: &[u8] = &[0x48, 0x0f, 0xae, 0x08];
    // Only where the platform offers the state.
    let refused = hypervisor::emulator::emulate(&mut b.platform, &mut b.state, fxsave, &b.options);
    assert!(refused.is_err());
    b.platform.mxcsr_mask = Some(0xffff);
    b.platform.vectors.xmm[3] = 0x1122_3344;
    b.complete(fxsave);
    assert_eq!(b.peek(BASE + 0x200, 2), 0x37f);
    assert_eq!(b.peek(BASE + 0x218, 8), 0xffff_0000_1f80);
    assert_eq!(b.peek(BASE + 0x200 + 160 + 48, 8), 0x1122_3344);
    b.poke(BASE + 0x200 + 160, &[0x77]);
    b.complete(fxrstor);
    assert_eq!(b.platform.vectors.xmm[0], 0x77);
    b.poke(BASE + 0x21a, &[1]); // a bit of MXCSR that does not exist
    assert_eq!(b.fault(fxrstor), Exception::with_code(v::GP, 0));
    b.general().rax += 8;
    assert_eq!(b.fault(fxsave), Exception::with_code(v::GP, 0));
    b.state.special.cr0 |= 1 << 3;
    assert_eq!(b.fault(fxsave), Exception::fault(v::NM));
}

#[test]
fn wait_raises_what_is_pending() {
    let wait: &[u8] = &[0x9b];
    let mut b = Bench::long();
    b.platform.mxcsr_mask = Some(0xffff);
    b.state.special.cr0 |= 1 << 5;
    b.complete(wait);
    b.platform.x87_status = 1 << 7;
    assert_eq!(b.fault(wait), Exception::fault(v::MF));
    b.state.special.cr0 &= !(1 << 5);
    let outside = hypervisor::emulator::emulate(&mut b.platform, &mut b.state, wait, &b.options);
    assert!(outside.is_err(), "nobody takes the pin's interrupt");
    b.state.special.cr0 |= 1 << 1 | 1 << 3;
    assert_eq!(b.fault(wait), Exception::fault(v::NM));
}

#[test]
fn xsaves_compacts_and_xrstors_expands() {
    let mut b = Bench::long();
    b.platform.mxcsr_mask = Some(0xffff);
    b.platform.vectors.upper = Some([5; 16]);
    let g = b.general();
    (g.rdi, g.rax, g.rdx) = (BASE + 0x200, u64::MAX, u64::MAX);
    let xsaves: &[u8] = &[0x48, 0x0f, 0xc7, 0x2f];
    let xrstors: &[u8] = &[0x48, 0x0f, 0xc7, 0x1f];
    b.poke(BASE + 0x200, &[0xee; 0x200]);
    b.complete(xsaves);
    // AVX only: x87 and SSE are in their initial state, and not written.
    assert_eq!(b.peek(BASE + 0x400, 8), 4);
    assert_eq!(b.peek(BASE + 0x408, 8), 1 << 63 | 7);
    assert_eq!(b.peek(BASE + 0x440, 8), 5);
    assert_eq!(b.peek(BASE + 0x200, 8), 0xeeee_eeee_eeee_eeee);
    let saved = b.platform.vectors.clone();
    b.platform.vectors.xmm[1] = 9;
    b.platform.vectors.upper = Some([6; 16]);
    b.complete(xrstors);
    assert_eq!(b.platform.vectors, saved);
    // XRSTORS takes only the compacted format, XRSTOR both; reserved bits are #GP.
    b.poke(BASE + 0x40f, &[0]);
    assert_eq!(b.fault(xrstors), Exception::with_code(v::GP, 0));
    b.poke(BASE + 0x408, &[0])
        .poke(BASE + 0x218, &[0x80, 0x1f, 0, 0]);
    b.complete(&[0x48, 0x0f, 0xae, 0x2f]);
    b.poke(BASE + 0x400, &[8]);
    assert_eq!(
        b.fault(&[0x48, 0x0f, 0xae, 0x2f]),
        Exception::with_code(v::GP, 0)
    );
    b.state.special.ss.access |= 0x60;
    assert_eq!(b.fault(xsaves), Exception::with_code(v::GP, 0));
    b.state.special.cr4 &= !(1 << 18);
    assert_eq!(b.fault(xsaves), Exception::fault(v::UD));
}

#[test]
fn xsave_clears_what_is_no_longer_in_use() {
    let mut b = Bench::long();
    b.platform.mxcsr_mask = Some(0xffff);
    let g = b.general();
    (g.rdi, g.rax, g.rdx) = (BASE + 0x200, 4, 0);
    // SSE is not asked for, so its bit stays; AVX is, and is all zero.
    b.poke(BASE + 0x400, &[6]);
    b.poke(BASE + 0x440, &[0xee; 0x100]);
    b.complete(&[0x48, 0x0f, 0xae, 0x27]);
    assert_eq!(b.peek(BASE + 0x400, 8), 2);
    assert_eq!(b.peek(BASE + 0x440, 8), 0);
}

#[test]
fn linear_addresses_wrap_at_4_gib() {
    let mut b = Bench::protected();
    b.platform.base = 0xffff_f000;
    b.platform.pages = vec![Page::ReadWrite];
    b.state.special.ds.base = 0xffff_ff00;
    b.state.special.ds.limit = 0xffff;
    b.general().rax = 0xfe;
    // mov ecx, [eax]: the second half is at 0.
    assert_eq!(b.fault(&[0x8b, 0x08]), Exception::page_fault(0, 0));
    b.general().rax = 0x100;
    assert_eq!(b.fault(&[0x8a, 0x08]), Exception::page_fault(0, 0));
    b.general().rax = 0xff;
    b.complete(&[0x8a, 0x08]);
}
