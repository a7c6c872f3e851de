//! Random instructions, executed by the emulator and by the real processor, must leave the same state.
//!
//! `EMULATOR_CASES` sets how many (default 300,000), `EMULATOR_SEED` where to start. A failure prints both.

use arch::x86_64::state::{DescriptorTable, GeneralRegisters, Segment, SpecialRegisters};
use hypervisor::emulator::{
    CpuState, ExceptionKind, Options, Outcome, VectorRegisters, Vendor, emulate,
};

use iced_x86::Mnemonic;

use crate::flat::{Flat, Page};
use crate::generate::{self, Case};
use crate::native::{CODE, DATA, EXIT_BYTES, End, Processor, Registers, processor};
use crate::random::Random;
use crate::undefined::{undefined_flags, undefined_result};

/// Instructions that this processor or its kernel may not have. #UD is no difference then.
const MAY_LACK: &[Mnemonic] = &[
    Mnemonic::Serialize,
    Mnemonic::Clflushopt,
    Mnemonic::Clwb,
    Mnemonic::Rdgsbase,
];

const RF: u64 = 1 << 16;

pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.replace('_', "").parse().ok())
        .unwrap_or(default)
}

fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    leaf.ebx == u32::from_le_bytes(*b"Auth")
}

/// Whether the processor has every instruction set that the emulator covers.
fn has_what_is_compared() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2")
        && has!("sse4.2")
        && has!("popcnt")
        && has!("lzcnt")
        && has!("bmi1")
        && has!("bmi2")
        && has!("adx")
        && has!("movbe")
        && has!("cmpxchg16b")
}

/// The processor's XCR0: VEX instructions ask for it.
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: XGETBV of register 0 reads; a processor without it has no AVX, which these tests need anyway.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// The state that Linux gives a 64-bit process.
pub(crate) fn user_mode(gs_base: u64) -> SpecialRegisters {
    let flat = |selector: u16, access: u32| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    };
    let null = Segment {
        access: 1 << 16,
        ..Segment::default()
    };
    SpecialRegisters {
        cs: flat(0x33, 0xa0fb),
        ss: flat(0x2b, 0xc0f3),
        ds: null,
        es: null,
        fs: null,
        gs: Segment {
            base: gs_base,
            ..null
        },
        gdt: DescriptorTable::default(),
        // PE, MP, ET, NE, WP, AM, PG.
        cr0: 0x8005_0033,
        // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
        cr4: 0x5_0620,
        // LME, LMA, NXE, SCE.
        efer: 0xd01,
        ..SpecialRegisters::default()
    }
}

pub(crate) fn general(registers: &Registers, rip: u64) -> GeneralRegisters {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = registers.gpr;
    GeneralRegisters {
        rax,
        rbx,
        rcx,
        rdx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags: registers.flags,
    }
}

fn to_vectors(registers: &Registers) -> VectorRegisters {
    let mut vectors = VectorRegisters {
        mxcsr: registers.mxcsr,
        ..VectorRegisters::default()
    };
    let mut upper = [0; 16];
    for (index, ymm) in registers.ymm.iter().enumerate() {
        vectors.xmm[index] = u128::from_le_bytes(ymm[..16].try_into().expect("16 bytes"));
        upper[index] = u128::from_le_bytes(ymm[16..].try_into().expect("16 bytes"));
    }
    vectors.upper = Some(upper);
    vectors
}

fn from_state(state: &CpuState, vectors: &VectorRegisters) -> Registers {
    let g = &state.general;
    let mut ymm = [[0; 32]; 16];
    for (index, register) in ymm.iter_mut().enumerate() {
        register[..16].copy_from_slice(&vectors.xmm[index].to_le_bytes());
        let upper = vectors.upper.map_or(0, |upper| upper[index]);
        register[16..].copy_from_slice(&upper.to_le_bytes());
    }
    Registers {
        ymm,
        gpr: [
            g.rax, g.rcx, g.rdx, g.rbx, g.rsp, g.rbp, g.rsi, g.rdi, g.r8, g.r9, g.r10, g.r11,
            g.r12, g.r13, g.r14, g.r15,
        ],
        flags: g.rflags,
        mxcsr: vectors.mxcsr,
    }
}

/// How an instruction ended, as both sides can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    At(u64),
    Exception {
        vector: u8,
        error_code: u32,
        address: u64,
    },
}

/// What became of a case.
enum Verdict {
    Same,
    /// It cannot be compared: outside the data pages, into the stub's code, or undefined.
    Skipped,
    Different(String),
}

struct Comparison<'a> {
    processor: &'a mut Processor,
    platform: Flat,
    special: SpecialRegisters,
    options: Options,
    random: Random,
    decoder_options: u32,
    registers: Registers,
}

impl<'a> Comparison<'a> {
    fn new(processor: &'a mut Processor, seed: u64) -> Self {
        let gs_base = 0x1357_9000;
        processor.attach(gs_base);
        let mut random = Random::new(seed);
        let mut platform = Flat::new(
            DATA,
            &[
                Page::Absent,
                Page::ReadWrite,
                Page::ReadWrite,
                Page::ReadOnly,
                Page::Absent,
            ],
        );
        random.fill(&mut platform.memory);
        platform.xcr0 = xcr0();
        processor
            .data()
            .copy_from_slice(&platform.memory[4096..4 * 4096]);
        processor.protect_last_page();
        let amd = is_amd();
        Self {
            special: user_mode(gs_base),
            processor,
            platform,
            options: Options {
                vendor: if amd { Vendor::Amd } else { Vendor::Intel },
                max_iterations: 100_000,
                ..Options::default()
            },
            decoder_options: generate::decoder_options(amd),
            random,
            registers: Registers {
                ymm: [[0; 32]; 16],
                gpr: [0; 16],
                flags: 0,
                mxcsr: 0x1f80,
            },
        }
    }

    /// One random instruction.
    fn step(&mut self) -> Option<(Case, Verdict)> {
        let case = generate::instruction(&mut self.random, self.decoder_options)?;
        let gs_base = self.processor.gs_base;
        generate::registers(&mut self.random, &case, gs_base, &mut self.registers);
        self.freshen();
        let verdict = self.compare(&case);
        Some((case, verdict))
    }

    /// New contents somewhere on the writable pages, on both sides. TF must not be popped from there.
    fn freshen(&mut self) {
        let at = 4096 + self.random.below(2 * 4096 - 64) as usize;
        let mut bytes = [0; 64];
        self.random.fill(&mut bytes);
        if self.random.one_in(2) {
            bytes[8..40].fill(0);
        }
        self.platform.memory[at..at + 64].copy_from_slice(&bytes);
        self.processor.data()[at - 4096..at - 4096 + 64].copy_from_slice(&bytes);
    }

    fn compare(&mut self, case: &Case) -> Verdict {
        let before = self.registers.clone();
        let cl = before.gpr[1] as u8;
        if undefined_result(&case.instruction, cl) {
            return Verdict::Skipped;
        }
        let mut state = CpuState {
            general: general(&before, CODE),
            special: self.special,
            interrupt_shadow: 0,
        };
        self.platform.vectors = to_vectors(&before);
        self.platform.outside = false;
        let backup = self.platform.memory.clone();
        let result = emulate(&mut self.platform, &mut state, &case.bytes, &self.options);
        let next = CODE + case.bytes.len() as u64;
        let stub = CODE..next + EXIT_BYTES;
        let rip = state.general.rip;
        let trapping = state.general.rflags & 1 << 8 != 0;
        // The kernel answers calls into this page (vsyscall) itself.
        let vsyscall = rip >> 12 == 0xf_ffff_ffff_f600;
        let into_stub = rip != next && rip != CODE && stub.contains(&rip);
        let outcome = match result {
            Ok(outcome) if !self.platform.outside && !trapping && !into_stub && !vsyscall => {
                outcome
            }
            // Not to be run natively: it would touch what is not ours.
            _ => {
                self.platform.memory = backup;
                return Verdict::Skipped;
            }
        };
        let emulated_end = match outcome {
            Outcome::Completed => Ending::At(rip),
            Outcome::Exception(exception) if exception.kind != ExceptionKind::Trap => {
                Ending::Exception {
                    vector: exception.vector,
                    error_code: exception.error_code.unwrap_or(0),
                    address: exception.payload.unwrap_or(0),
                }
            }
            other => return Verdict::Different(format!("unexpected outcome {other:?}")),
        };
        let emulated = from_state(&state, &self.platform.vectors);
        let branch_to_itself = emulated_end == Ending::At(CODE);
        if branch_to_itself {
            self.platform.memory = backup;
            return Verdict::Skipped;
        }
        let mut native = before.clone();
        let end = self.processor.run(&case.bytes, &mut native);
        let native_end = native_ending(end, next);
        let lacking = matches!(native_end, Ending::Exception { vector: 6, .. });
        if lacking && MAY_LACK.contains(&case.instruction.mnemonic()) {
            self.platform.memory = backup;
            return Verdict::Skipped;
        }
        let mask = !undefined_flags(&case.instruction, cl) & !RF;
        // ENTER's pushes are visible on the processor even where a later one faults; the emulator writes none then.
        let partial = case.instruction.mnemonic() == Mnemonic::Enter
            && matches!(native_end, Ending::Exception { .. });
        if partial {
            let data = self.processor.data();
            self.platform.memory[4096..4 * 4096].copy_from_slice(data);
        }
        let same_memory = self.processor.data() == &self.platform.memory[4096..4 * 4096];
        let same = emulated_end == native_end
            && emulated.gpr == native.gpr
            && emulated.ymm == native.ymm
            && emulated.mxcsr == native.mxcsr
            && (emulated.flags ^ native.flags) & mask == 0
            && same_memory;
        if same {
            return Verdict::Same;
        }
        let message = describe(
            case,
            &before,
            &emulated,
            &native,
            emulated_end,
            native_end,
            mask,
            same_memory,
        );
        // Go on with equal memory.
        let data = self.processor.data();
        self.platform.memory[4096..4 * 4096].copy_from_slice(data);
        Verdict::Different(message)
    }
}

fn native_ending(end: End, next: u64) -> Ending {
    let trap = match end {
        End::Next => return Ending::At(next),
        End::Trapped(trap) => trap,
    };
    match trap.vector {
        // INT3, or the filling behind a branch; both report RIP behind the byte.
        3 if trap.rip != next => Ending::At(trap.rip - 1),
        // The fetch at a branch's target.
        14 if trap.rip == trap.address && trap.rip != CODE => Ending::At(trap.rip),
        vector => Ending::Exception {
            vector: vector as u8,
            error_code: trap.error_code as u32,
            address: if vector == 14 { trap.address } else { 0 },
        },
    }
}

#[expect(clippy::too_many_arguments, reason = "it prints them all")]
fn describe(
    case: &Case,
    before: &Registers,
    emulated: &Registers,
    native: &Registers,
    emulated_end: Ending,
    native_end: Ending,
    mask: u64,
    same_memory: bool,
) -> String {
    use std::fmt::Write;
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let mut text = format!(
        "{:?} {:02x?}\n  emulated {emulated_end:x?}\n  native   {native_end:x?}\n",
        case.instruction.code(),
        case.bytes
    );
    for (index, name) in NAMES.iter().enumerate() {
        let (b, e, n) = (before.gpr[index], emulated.gpr[index], native.gpr[index]);
        let mark = if e == n { ' ' } else { '!' };
        let _ = writeln!(
            text,
            " {mark}{name:4} {b:016x} emulated {e:016x} native {n:016x}"
        );
    }
    let (b, e, n) = (before.flags, emulated.flags, native.flags);
    let different = (e ^ n) & mask;
    let _ = writeln!(
        text,
        "  flags {b:x} emulated {e:x} native {n:x}, different {different:x}"
    );
    for index in 0..16 {
        if emulated.ymm[index] != native.ymm[index] {
            let _ = writeln!(
                text,
                " !ymm{index} {:02x?}\n   emulated {:02x?}\n   native   {:02x?}",
                before.ymm[index], emulated.ymm[index], native.ymm[index]
            );
        }
    }
    if !same_memory {
        text.push_str(" !memory differs\n");
    }
    text
}

#[test]
fn random_instructions_do_what_the_processor_does() {
    if !has_what_is_compared() {
        println!("skipped: this processor lacks AVX2, BMI, ADX or MOVBE");
        return;
    }
    let cases = setting("EMULATOR_CASES", 300_000);
    let seed = setting("EMULATOR_SEED", 1);
    let mut processor = processor();
    let mut comparison = Comparison::new(&mut processor, seed);
    let mut mnemonics = std::collections::BTreeMap::<String, u64>::new();
    let (mut same, mut skipped, mut different) = (0u64, 0u64, Vec::new());
    let started = std::time::Instant::now();
    while same < cases && different.len() < 20 {
        let Some((case, verdict)) = comparison.step() else {
            continue;
        };
        match verdict {
            Verdict::Same => {
                same += 1;
                let name = format!("{:?}", case.instruction.mnemonic());
                *mnemonics.entry(name).or_default() += 1;
            }
            Verdict::Skipped => skipped += 1,
            Verdict::Different(message) => different.push(message),
        }
    }
    println!(
        "seed {seed}: {same} instructions compared, {skipped} skipped, {} mnemonics, {:.1} s",
        mnemonics.len(),
        started.elapsed().as_secs_f64()
    );
    if setting("EMULATOR_LIST", 0) != 0 {
        println!("{mnemonics:?}");
    }
    assert!(
        different.is_empty(),
        "seed {seed}, after {same} equal cases:\n{}",
        different.join("\n")
    );
}
