//! Port and MMIO accesses of every width.

use crate::guest::{Access, DATA, Guest, SPIN, STOP16, STOP64, code, kvm};

#[test]
fn ports_of_all_widths() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(
        &*kvm,
        &code(&[
            &[0xba, 0x10, 0x00],                                     // mov dx, 0x10
            &[0x66, 0xb8, 0x44, 0x33, 0x22, 0x11],                   // mov eax, 0x11223344
            &[0xee, 0xef, 0x66, 0xef],                               // out dx, al; ax; eax
            &[0x66, 0x31, 0xc0, 0xec, 0x66, 0xa3, 0x00, 0x20], // xor eax, eax; in al, dx; mov [0x2000], eax
            &[0x66, 0x31, 0xc0, 0xed, 0x66, 0xa3, 0x04, 0x20], // … in ax, dx; mov [0x2004], eax
            &[0x66, 0x31, 0xc0, 0x66, 0xed, 0x66, 0xa3, 0x08, 0x20], // … in eax, dx; mov [0x2008], eax
            &[0xba, 0x11, 0x00, 0x66, 0xed, 0x66, 0xa3, 0x0c, 0x20], // mov dx, 0x11; in eax, dx; mov [0x200c], eax
            &STOP16,
            &SPIN,
        ]),
    );
    guest.bus.answers.lock().unwrap().insert(0x10, 0xa1a2_a3a4);
    guest.run();
    assert_eq!(
        guest.bus.take(),
        [
            Access::Out(0x10, vec![0x44]),
            Access::Out(0x10, vec![0x44, 0x33]),
            Access::Out(0x10, vec![0x44, 0x33, 0x22, 0x11]),
            Access::In(0x10, 1),
            Access::In(0x10, 2),
            Access::In(0x10, 4),
            Access::In(0x11, 4),
        ]
    );
    let words = [0, 4, 8, 12].map(|offset| guest.ram.read_u32(DATA + offset));
    assert_eq!(
        words,
        [0xa4, 0xa3a4, 0xa1a2_a3a4, u32::MAX],
        "an unclaimed port reads all ones"
    );
}

#[test]
fn string_instructions_make_one_access_an_element() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(
        &*kvm,
        &code(&[
            &[0xfc, 0xba, 0x20, 0x00],       // cld; mov dx, 0x20
            &[0xbe, 0x00, 0x30, 0xb9, 5, 0], // mov si, 0x3000; mov cx, 5
            &[0xf3, 0x6e],                   // rep outsb
            &[0xb9, 3, 0, 0xf3, 0x6f],       // mov cx, 3; rep outsw
            &[0xb9, 2, 0, 0x66, 0xf3, 0x6f], // mov cx, 2; rep outsd
            &[0xbf, 0x00, 0x20, 0xb9, 4, 0], // mov di, 0x2000; mov cx, 4
            &[0xf3, 0x6d],                   // rep insw
            &STOP16,
            &SPIN,
        ]),
    );
    let bytes: Vec<u8> = (1..=19).collect();
    guest.ram.write(0x3000, &bytes);
    guest.bus.answers.lock().unwrap().insert(0x20, 0xbeef);
    guest.run();
    let written: Vec<_> = guest
        .bus
        .take()
        .into_iter()
        .filter_map(|access| match access {
            Access::Out(0x20, data) => Some(data),
            _ => None,
        })
        .collect();
    let widths: Vec<_> = written.iter().map(Vec::len).collect();
    assert_eq!(widths, [1, 1, 1, 1, 1, 2, 2, 2, 4, 4]);
    assert_eq!(written.concat(), bytes);
    assert_eq!(guest.ram.read_u64(DATA), 0xbeef_beef_beef_beef);
}

#[test]
fn mmio_of_all_widths() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(
        &*kvm,
        &code(&[
            &[0xbf, 0x00, 0x00, 0x00, 0x30],       // mov edi, 0x3000_0000
            &[0x48, 0xb8, 8, 7, 6, 5, 4, 3, 2, 1], // mov rax, 0x0102030405060708
            &[0x88, 0x07, 0x66, 0x89, 0x07, 0x89, 0x07, 0x48, 0x89, 0x07], // mov [rdi], al; ax; eax; rax
            &[0x0f, 0xb6, 0x0f, 0x48, 0x89, 0x0c, 0x25, 0x00, 0x20, 0, 0], // movzx ecx, byte [rdi]; mov [0x2000], rcx
            &[0x0f, 0xb7, 0x0f, 0x48, 0x89, 0x0c, 0x25, 0x08, 0x20, 0, 0], // movzx ecx, word [rdi]; …
            &[0x8b, 0x0f, 0x48, 0x89, 0x0c, 0x25, 0x10, 0x20, 0, 0],       // mov ecx, [rdi]; …
            &[0x48, 0x8b, 0x0f, 0x48, 0x89, 0x0c, 0x25, 0x18, 0x20, 0, 0], // mov rcx, [rdi]; …
            &[
                0x48, 0x8b, 0x4f, 0x08, 0x48, 0x89, 0x0c, 0x25, 0x20, 0x20, 0, 0,
            ], // mov rcx, [rdi + 8]; …
            &STOP64,
            &SPIN,
        ]),
    );
    const AT: u64 = 0x3000_0000;
    let value = 0xf1f2_f3f4_f5f6_f7f8u64;
    guest.bus.answers.lock().unwrap().insert(AT, value);
    guest.run();
    let bytes = [8, 7, 6, 5, 4, 3, 2, 1];
    assert_eq!(
        guest.bus.take(),
        [
            Access::Write(AT, bytes[..1].to_vec()),
            Access::Write(AT, bytes[..2].to_vec()),
            Access::Write(AT, bytes[..4].to_vec()),
            Access::Write(AT, bytes.to_vec()),
            Access::Read(AT, 1),
            Access::Read(AT, 2),
            Access::Read(AT, 4),
            Access::Read(AT, 8),
            Access::Read(AT + 8, 8),
        ]
    );
    let read = [0, 8, 16, 24, 32].map(|offset| guest.ram.read_u64(DATA + offset));
    assert_eq!(
        read,
        [
            value & 0xff,
            value & 0xffff,
            value & 0xffff_ffff,
            value,
            u64::MAX
        ]
    );
}

#[test]
fn an_access_that_was_being_served_when_the_kick_came_is_complete() {
    let Some(kvm) = kvm() else { return };
    // in eax, dx at a port whose read handler kicks: the state saved after `run` must hold the value and the next RIP.
    let mut guest = Guest::real_mode(&*kvm, &code(&[&[0xba, 0x10, 0x00], &[0x66, 0xed], &SPIN]));
    struct KickingBus<'a>(&'a crate::guest::Bus);
    impl hypervisor::ExitBus for KickingBus<'_> {
        fn pio_read(&self, _port: u16, data: &mut [u8]) {
            data.copy_from_slice(&[1, 2, 3, 4]);
            self.0.kick.kick();
        }
        fn pio_write(&self, _port: u16, _data: &[u8]) {}
        fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
        fn end_of_interrupt(&self, _vector: u8) {}
    }
    let exit = guest.vcpu.run(&KickingBus(&guest.bus)).expect("run");
    assert!(
        matches!(exit, hypervisor::VcpuExit::Interrupted),
        "{exit:?}"
    );
    let general = guest.vcpu.save_state().expect("save").general;
    assert_eq!(
        (general.rax, general.rip),
        (0x0403_0201, crate::guest::CODE + 5)
    );
}
