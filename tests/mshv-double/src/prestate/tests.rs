//! Instructions found backwards: flat 16-, 32- and 64-bit code in one region of RAM, devices above it.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::{Found, Machine};
use crate::memory::Memory;

const CODE: u64 = 0x1000;
const RAM: usize = 0x8000;
const DEVICE: u64 = 0x1_0000;

/// RAM with code at [`CODE`] and data at 0x3000.
fn memory(code: &[u8]) -> Memory {
    let mut bytes = vec![0; RAM];
    bytes[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
    bytes[0x3000..0x3008].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    Memory::of_pages(0, Box::leak(bytes.into_boxed_slice()))
}

/// Flat segments, without paging: what the walk of page tables adds is tested in its own place.
fn sregs(bitness: u32) -> kvm_sregs {
    let segment = |l, db| kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        l,
        db,
        ..Default::default()
    };
    kvm_sregs {
        cs: segment(u8::from(bitness == 64), u8::from(bitness == 32)),
        ss: segment(0, u8::from(bitness == 32)),
        efer: if bitness == 64 { 1 << 10 } else { 0 },
        cr0: 1,
        ..Default::default()
    }
}

/// Finds the store that `code`, just executed, made.
fn store(bitness: u32, code: &[u8], now: kvm_regs, gpa: u64, data: &[u8]) -> Option<Found> {
    let (memory, sregs) = (memory(code), sregs(bitness));
    Machine {
        memory: &memory,
        sregs: &sregs,
    }
    .before_store(&now, gpa, data)
}

fn out(code: &[u8], now: kvm_regs, port: u16, size: usize, data: &[u8]) -> Option<Found> {
    let (memory, sregs) = (memory(code), sregs(32));
    Machine {
        memory: &memory,
        sregs: &sregs,
    }
    .before_out(&now, port, size, data)
}

fn after(length: u64) -> kvm_regs {
    kvm_regs {
        rip: CODE + length,
        rsp: 0x7000,
        ..Default::default()
    }
}

#[test]
fn plain_stores_in_every_mode() {
    // mov [edi], eax, in 32- and in 64-bit code (mov [rdi], eax)
    for bitness in [32, 64] {
        let now = kvm_regs {
            rax: 0x1122_3344,
            rdi: DEVICE + 8,
            ..after(2)
        };
        let found = store(
            bitness,
            &[0x89, 0x07],
            now,
            DEVICE + 8,
            &[0x44, 0x33, 0x22, 0x11],
        )
        .expect("found");
        assert_eq!((found.regs.rip, found.gva), (CODE, DEVICE + 8));
        assert_eq!(found.instruction.len(), 2);
    }
    // mov [rip+x], r9 (REX.W)
    let now = kvm_regs { r9: 7, ..after(7) };
    let displacement = (DEVICE - CODE - 7) as u32;
    let mut code = vec![0x4c, 0x89, 0x0d];
    code.extend(displacement.to_le_bytes());
    let found = store(64, &code, now, DEVICE, &[7, 0, 0, 0, 0, 0, 0, 0]).expect("found");
    assert_eq!((found.regs.rip, found.instruction.len()), (CODE, 7));
}

#[test]
fn a_prefix_belongs_to_the_instruction() {
    // mov word [edi], 0x1234 with operand size prefix: the unprefixed form has another size.
    let now = kvm_regs {
        rdi: DEVICE,
        ..after(5)
    };
    let found = store(
        32,
        &[0x66, 0xc7, 0x07, 0x34, 0x12],
        now,
        DEVICE,
        &[0x34, 0x12],
    )
    .expect("found");
    assert_eq!(found.instruction.len(), 5);
    // A redundant DS prefix: both readings do the same, the longer is taken.
    let now = kvm_regs {
        rax: 9,
        rdi: DEVICE,
        ..after(3)
    };
    let found = store(32, &[0x3e, 0x88, 0x07], now, DEVICE, &[9]).expect("found");
    assert_eq!(found.instruction.len(), 3);
}

#[test]
fn what_does_not_agree_is_not_taken() {
    let now = kvm_regs {
        rax: 0x1122_3344,
        rdi: DEVICE,
        ..after(2)
    };
    let code = [0x89, 0x07];
    assert!(
        store(32, &code, now, DEVICE, &[0x44, 0x33]).is_none(),
        "size"
    );
    assert!(
        store(32, &code, now, DEVICE + 4, &[0x44, 0x33, 0x22, 0x11]).is_none(),
        "address"
    );
    assert!(
        store(32, &code, now, DEVICE, &[0x45, 0x33, 0x22, 0x11]).is_none(),
        "data"
    );
    // mov eax, [edi] is no store.
    assert!(
        store(32, &[0x8b, 0x07], now, DEVICE, &[0x44, 0x33, 0x22, 0x11]).is_none(),
        "a load"
    );
}

#[test]
fn string_stores_step_back() {
    // stosd, forwards: rdi has moved on.
    let now = kvm_regs {
        rax: 5,
        rdi: DEVICE + 4,
        ..after(1)
    };
    let found = store(32, &[0xab], now, DEVICE, &[5, 0, 0, 0]).expect("found");
    assert_eq!((found.regs.rip, found.regs.rdi), (CODE, DEVICE));
    // stosb, backwards.
    let now = kvm_regs {
        rax: 5,
        rdi: DEVICE - 1,
        rflags: 1 << 10,
        ..after(1)
    };
    let found = store(32, &[0xaa], now, DEVICE, &[5]).expect("found");
    assert_eq!(found.regs.rdi, DEVICE);
    // rep stosd in the middle: RIP is still at the instruction.
    let now = kvm_regs {
        rax: 5,
        rdi: DEVICE + 8,
        rcx: 3,
        ..after(0)
    };
    let found = store(32, &[0xf3, 0xab], now, DEVICE + 4, &[5, 0, 0, 0]).expect("found");
    assert_eq!(
        (found.regs.rip, found.regs.rdi, found.regs.rcx),
        (CODE, DEVICE + 4, 4)
    );
    // rep stosd, the last iteration, with RIP past it.
    let now = kvm_regs {
        rax: 5,
        rdi: DEVICE + 8,
        rcx: 0,
        ..after(2)
    };
    let found = store(32, &[0xf3, 0xab], now, DEVICE + 4, &[5, 0, 0, 0]).expect("found");
    assert_eq!((found.regs.rip, found.regs.rcx), (CODE, 1));
    // movsq from RAM.
    let now = kvm_regs {
        rsi: 0x3008,
        rdi: DEVICE + 8,
        ..after(2)
    };
    let found = store(64, &[0x48, 0xa5], now, DEVICE, &[1, 2, 3, 4, 5, 6, 7, 8]).expect("found");
    assert_eq!((found.regs.rsi, found.regs.rdi), (0x3000, DEVICE));
    assert!(
        store(64, &[0x48, 0xa5], now, DEVICE, &[1, 2, 3, 4, 5, 6, 7, 9]).is_none(),
        "other data"
    );
}

#[test]
fn sixteen_bit_counters_wrap_in_sixteen_bits() {
    let now = kvm_regs {
        rax: 5,
        rdi: 0xaaaa_0000,
        rcx: 0xbbbb_ffff,
        ..after(0)
    };
    let mut sregs = sregs(16);
    sregs.es.base = DEVICE;
    let memory = memory(&[0xf3, 0xaa]);
    let machine = Machine {
        memory: &memory,
        sregs: &sregs,
    };
    let found = machine
        .before_store(&now, DEVICE + 0xffff, &[5])
        .expect("found");
    assert_eq!((found.regs.rdi, found.regs.rcx), (0xaaaa_ffff, 0xbbbb_0000));
}

#[test]
fn pushes_and_calls_give_the_stack_back() {
    // push rax
    let now = kvm_regs {
        rax: 0x77,
        rsp: DEVICE + 0xf8,
        ..after(1)
    };
    let found = store(
        64,
        &[0x50],
        now,
        DEVICE + 0xf8,
        &[0x77, 0, 0, 0, 0, 0, 0, 0],
    )
    .expect("found");
    assert_eq!((found.regs.rip, found.regs.rsp), (CODE, DEVICE + 0x100));
    // call +0x20: RIP is at the target, the data is the return address.
    let now = kvm_regs {
        rsp: DEVICE + 0xf8,
        ..after(0x25)
    };
    let data = (CODE + 5).to_le_bytes();
    let found = store(64, &[0xe8, 0x20, 0, 0, 0], now, DEVICE + 0xf8, &data).expect("found");
    assert_eq!((found.regs.rip, found.regs.rsp), (CODE, DEVICE + 0x100));
    // call rbx
    let now = kvm_regs {
        rsp: DEVICE + 0xf8,
        rbx: 0x5000,
        rip: 0x5000,
        ..Default::default()
    };
    let data = (CODE + 2).to_le_bytes();
    let found = store(64, &[0xff, 0xd3], now, DEVICE + 0xf8, &data).expect("found");
    assert_eq!((found.regs.rip, found.regs.rsp), (CODE, DEVICE + 0x100));
}

#[test]
fn exchanges_give_the_register_back() {
    // xchg [edi], eax with read-only memory that held 3: eax is 3 now, 9 was stored.
    let now = kvm_regs {
        rax: 3,
        rdi: DEVICE,
        ..after(2)
    };
    let found = store(32, &[0x87, 0x07], now, DEVICE, &[9, 0, 0, 0]).expect("found");
    assert_eq!(found.regs.rax, 9);
    // xadd [edi], eax: memory held 3, eax held 6.
    let now = kvm_regs {
        rax: 3,
        rdi: DEVICE,
        ..after(3)
    };
    let found = store(32, &[0x0f, 0xc1, 0x07], now, DEVICE, &[9, 0, 0, 0]).expect("found");
    assert_eq!(found.regs.rax, 6);
}

#[test]
fn wide_and_crossing_stores() {
    // movups [rdi], xmm0
    let now = kvm_regs {
        rdi: DEVICE,
        ..after(3)
    };
    let found = store(64, &[0x0f, 0x11, 0x07], now, DEVICE, &[1; 16]).expect("found");
    assert_eq!(found.regs.rip, CODE);
    // mov [rdi], rax, three bytes in RAM and five on the device right above it.
    let now = kvm_regs {
        rax: 0x0807_0605_0403_0201,
        rdi: RAM as u64 - 3,
        ..after(3)
    };
    let found = store(64, &[0x48, 0x89, 0x07], now, RAM as u64, &[4, 5, 6, 7, 8]).expect("found");
    assert_eq!((found.regs.rip, found.gva), (CODE, RAM as u64));
}

#[test]
fn port_writes() {
    // out dx, al; out 0x80, eax; rep outsb
    let now = kvm_regs {
        rax: 0x1122_3344,
        rdx: 0x3f8,
        ..after(1)
    };
    assert_eq!(
        out(&[0xee], now, 0x3f8, 1, &[0x44])
            .expect("found")
            .regs
            .rip,
        CODE
    );
    assert!(out(&[0xee], now, 0x3f9, 1, &[0x44]).is_none(), "port");
    assert!(out(&[0xee], now, 0x3f8, 1, &[0x45]).is_none(), "data");
    let now = kvm_regs {
        rax: 0x1122_3344,
        ..after(2)
    };
    assert_eq!(
        out(&[0xe7, 0x80], now, 0x80, 4, &[0x44, 0x33, 0x22, 0x11])
            .expect("found")
            .regs
            .rip,
        CODE
    );
    let now = kvm_regs {
        rdx: 0x3f8,
        rsi: 0x3002,
        rcx: 6,
        ..after(0)
    };
    let found = out(&[0xf3, 0x6e], now, 0x3f8, 1, &[2]).expect("found");
    assert_eq!(
        (found.regs.rip, found.regs.rsi, found.regs.rcx),
        (CODE, 0x3001, 7)
    );
    assert!(
        out(&[0xf3, 0x6e], now, 0x3f8, 1, &[3]).is_none(),
        "not what lies there"
    );
}

#[test]
fn an_operand_is_found_by_its_address() {
    let (memory, sregs) = (memory(&[0x8b, 0x47, 0x04]), sregs(32));
    let machine = Machine {
        memory: &memory,
        sregs: &sregs,
    };
    let regs = kvm_regs {
        rdi: DEVICE,
        ..after(0)
    };
    // mov eax, [edi+4]
    let instruction = machine.decode(CODE).expect("it decodes");
    assert_eq!(
        machine.reaches(&instruction, &regs, DEVICE + 4),
        Some(DEVICE + 4)
    );
    assert_eq!(machine.reaches(&instruction, &regs, DEVICE + 8), None);
}
