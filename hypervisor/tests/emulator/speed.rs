//! How many instructions a second the emulator executes, decoding included.

use std::time::Instant;

use arch::x86_64::state::GeneralRegisters;
use hypervisor::emulator::{CpuState, Options, Outcome, emulate};

use crate::flat::{Flat, Page};
use crate::host::user_mode;

const BASE: u64 = 0x10_0000;

/// Moves, arithmetic and strings on memory, as a driver or a kernel has them.
const MIX: &[&[u8]] = &[
    // mov [rdi], eax; mov eax, [rsi + 0x10]; mov rbx, [rsi + rcx*8]; mov byte ptr [rdi + 3], 7
    &[0x89, 0x07],
    &[0x8b, 0x46, 0x10],
    &[0x48, 0x8b, 0x1c, 0xce],
    &[0xc6, 0x47, 0x03, 0x07],
    // movzx eax, word ptr [rsi]; add [rdi], ebx; or dword ptr [rdi + 8], 0x100; cmp [rsi], rdx
    &[0x0f, 0xb7, 0x06],
    &[0x01, 0x1f],
    &[0x81, 0x4f, 0x08, 0x00, 0x01, 0x00, 0x00],
    &[0x48, 0x39, 0x16],
    // lock xadd [rdi], eax; test byte ptr [rsi], 1; movsq; stosd; lodsb; shl dword ptr [rdi], 3
    &[0xf0, 0x0f, 0xc1, 0x07],
    &[0xf6, 0x06, 0x01],
    &[0x48, 0xa5],
    &[0xab],
    &[0xac],
    &[0xc1, 0x27, 0x03],
];

/// Instructions per second over the mix, for at least `seconds`.
fn rate(seconds: f64) -> f64 {
    let mut platform = Flat::new(BASE, &[Page::ReadWrite; 4]);
    let start = CpuState {
        general: GeneralRegisters {
            rsi: BASE + 0x100,
            rdi: BASE + 0x1100,
            rsp: BASE + 0x2000,
            rcx: 5,
            rflags: 0x202,
            rip: 0x40_0000,
            ..GeneralRegisters::default()
        },
        special: user_mode(0),
        interrupt_shadow: 0,
    };
    let options = Options::default();
    let started = Instant::now();
    let mut done = 0u64;
    loop {
        for _ in 0..1000 {
            let mut state = start;
            for instruction in MIX {
                let outcome = emulate(&mut platform, &mut state, instruction, &options);
                assert!(matches!(outcome, Ok(Outcome::Completed)));
            }
            done += MIX.len() as u64;
        }
        let elapsed = started.elapsed().as_secs_f64();
        if elapsed > seconds {
            return done as f64 / elapsed;
        }
    }
}

/// Elements per second of REP MOVSD over a page border.
fn string_rate(seconds: f64) -> f64 {
    let mut platform = Flat::new(BASE, &[Page::ReadWrite; 4]);
    let options = Options::default();
    let started = Instant::now();
    let mut done = 0u64;
    loop {
        let mut state = CpuState {
            general: GeneralRegisters {
                rsi: BASE + 0x100,
                rdi: BASE + 0x1800,
                rcx: 1000,
                rflags: 0x202,
                rip: 0x40_0000,
                ..GeneralRegisters::default()
            },
            special: user_mode(0),
            interrupt_shadow: 0,
        };
        let outcome = emulate(&mut platform, &mut state, &[0xf3, 0xa5], &options);
        assert!(matches!(outcome, Ok(Outcome::Completed)));
        done += 1000;
        let elapsed = started.elapsed().as_secs_f64();
        if elapsed > seconds {
            return done as f64 / elapsed;
        }
    }
}

#[test]
#[ignore = "a measurement: cargo test -p hypervisor --release --test emulator -- --ignored --nocapture speed"]
fn speed() {
    println!("{:.2} million instructions a second", rate(3.0) / 1e6);
    println!(
        "{:.2} million elements of REP MOVSD a second",
        string_rate(1.0) / 1e6
    );
}
