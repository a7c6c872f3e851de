//! Random instructions, executed by the emulator and by the real processor, must leave the same state.
//!
//! `EMULATOR_CASES` sets how many (default 300,000), `EMULATOR_SEED` where to start. A failure prints both.

use arch::x86_64::state::SpecialRegisters;
use hypervisor::emulator::{CpuState, ExceptionKind, Options, Outcome, Vendor, emulate};

use iced_x86::{Mnemonic, Register};

use crate::flat::{Flat, Page};
use crate::generate::{self, Case, Layout};
use crate::host::{
    from_state, general, has_what_is_compared, is_amd, mxcsr_mask, setting, to_vectors, user_mode,
    xcr0,
};
use crate::native::{
    CODE, DATA, EXIT_BYTES, End, Processor, Registers, Selectors, TRAMPOLINE, processor,
};
use crate::random::Random;
use crate::segments;
use crate::undefined::{undefined_flags, undefined_result};

/// Instructions that this processor or its kernel may not have. #UD is no difference then.
const MAY_LACK: &[Mnemonic] = &[
    Mnemonic::Serialize,
    Mnemonic::Clflushopt,
    Mnemonic::Clwb,
    Mnemonic::Rdgsbase,
    Mnemonic::Xsavec,
    Mnemonic::Xsavec64,
    Mnemonic::Xsaveopt,
    Mnemonic::Xsaveopt64,
];

const RF: u64 = 1 << 16;

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
    layout: Layout,
    selectors: Option<Selectors>,
    options: Options,
    random: Random,
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
        platform.mxcsr_mask = Some(mxcsr_mask());
        processor.fill(&platform.memory[4096..4 * 4096]);
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
            layout: Layout {
                bits: 64,
                cs: 0,
                ds: 0,
                es: 0,
                ss: 0,
                gs: gs_base,
                decoder_options: generate::decoder_options(amd),
            },
            selectors: None,
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
        let case = generate::instruction(&mut self.random, &self.layout)?;
        generate::registers(&mut self.random, &case, &self.layout, &mut self.registers);
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

    /// A plausible header where XSAVE will write or XRSTOR will read, on both sides.
    fn prepare_xsave(&mut self, case: &Case, registers: &Registers) {
        let base = case.instruction.memory_base() as usize;
        let first = [Register::EAX, Register::RAX, Register::AX];
        let index = first
            .iter()
            .map(|register| base.wrapping_sub(*register as usize))
            .find(|index| *index < 16);
        let Some(index) = index else {
            return;
        };
        let segment = self.layout.ds;
        let at = registers.gpr[index]
            .wrapping_add(segment)
            .wrapping_sub(DATA) as usize;
        if !at.is_multiple_of(64) || !(4096..2 * 4096 + 1024).contains(&at) {
            return;
        }
        let compacted = self.random.one_in(2);
        let stored = self.random.below(4) << 1;
        let mut header = [0; 64];
        header[..8].copy_from_slice(&stored.to_le_bytes());
        if compacted {
            let format = stored | self.random.below(4) << 1 | 1 << 63;
            header[8..16].copy_from_slice(&format.to_le_bytes());
        }
        if self.random.one_in(8) {
            header[self.random.below(32) as usize] ^= 1;
        }
        let mxcsr = self.random.next() as u32
            & if self.random.one_in(8) {
                0x1_ffff
            } else {
                0xffff
            };
        for (offset, bytes) in [(24, &mxcsr.to_le_bytes()[..]), (512, &header)] {
            let to = at + offset;
            self.platform.memory[to..to + bytes.len()].copy_from_slice(bytes);
            self.processor.data()[to - 4096..to - 4096 + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn compare(&mut self, case: &Case) -> Verdict {
        let before = self.registers.clone();
        let start = self.layout.rip();
        let cl = before.gpr[1] as u8;
        if undefined_result(&case.instruction, cl) {
            return Verdict::Skipped;
        }
        let mut state = CpuState {
            general: general(&before, start),
            special: self.special,
            interrupt_shadow: 0,
        };
        self.platform.vectors = to_vectors(&before);
        self.platform.outside = false;
        if generate::is_xsave(case.instruction.mnemonic()) {
            self.prepare_xsave(case, &before);
        }
        let backup = self.platform.memory.clone();
        let result = emulate(&mut self.platform, &mut state, &case.bytes, &self.options);
        let next = start + case.bytes.len() as u64;
        let stub = start..next + EXIT_BYTES;
        let rip = state.general.rip;
        let trapping = state.general.rflags & 1 << 8 != 0;
        // The kernel answers calls into this page (vsyscall) itself.
        let vsyscall = rip >> 12 == 0xf_ffff_ffff_f600;
        let trampoline = TRAMPOLINE - self.layout.cs;
        let into_stub = rip != next && rip != start && stub.contains(&rip)
            || (trampoline..trampoline + 16).contains(&rip);
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
        let branch_to_itself = emulated_end == Ending::At(start);
        if branch_to_itself {
            self.platform.memory = backup;
            return Verdict::Skipped;
        }
        let mut native = before.clone();
        let end = self.processor.run(&case.bytes, &mut native, self.selectors);
        let native_end = self.native_ending(end, next);
        let lacking = matches!(native_end, Ending::Exception { vector: 6, .. });
        if lacking && MAY_LACK.contains(&case.instruction.mnemonic()) {
            self.platform.memory = backup;
            return Verdict::Skipped;
        }
        let mask = !undefined_flags(&case.instruction, cl) & !RF;
        // The processor shows what ENTER and PUSHA pushed, and POPA popped, before a fault; the emulator does nothing then.
        let partial = matches!(native_end, Ending::Exception { .. })
            && matches!(
                case.instruction.mnemonic(),
                Mnemonic::Enter
                    | Mnemonic::Pusha
                    | Mnemonic::Pushad
                    | Mnemonic::Popa
                    | Mnemonic::Popad
            );
        if partial {
            native.gpr = before.gpr;
        }
        if partial {
            let data = self.processor.data();
            self.platform.memory[4096..4 * 4096].copy_from_slice(data);
        }
        let same_memory = self.processor.data() == &self.platform.memory[4096..4 * 4096];
        // The processor probes an XSAVE area, and MASKMOVDQU's operand, in parts and in an order of its own: which fault it
        // finds first may differ.
        let faulted = |end| {
            matches!(
                end,
                Ending::Exception {
                    vector: 12..=14,
                    ..
                }
            )
        };
        let mnemonic = case.instruction.mnemonic();
        let in_parts = generate::is_xsave(mnemonic)
            || matches!(mnemonic, Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
        let probed = in_parts && faulted(emulated_end) && faulted(native_end);
        let same = (emulated_end == native_end || probed)
            && self.same_registers(&emulated, &native)
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

    fn native_ending(&self, end: End, next: u64) -> Ending {
        let trap = match end {
            End::Next => return Ending::At(next),
            End::Trapped(trap) => trap,
        };
        match trap.vector {
            // INT3, or the filling behind a branch; both report RIP behind the byte.
            3 if trap.rip != next => Ending::At(trap.rip - 1),
            // The fetch at a branch's target.
            14 if self.is_target(trap.rip, trap.address) => Ending::At(trap.rip),
            vector => Ending::Exception {
                vector: vector as u8,
                error_code: trap.error_code as u32,
                address: if vector == 14 { trap.address } else { 0 },
            },
        }
    }

    /// Whether a page fault is that of a fetch at a branch's target.
    fn is_target(&self, rip: u64, address: u64) -> bool {
        self.layout.cs + rip == address && address != CODE
    }

    /// Outside 64-bit mode only the low halves exist.
    fn same_registers(&self, emulated: &Registers, native: &Registers) -> bool {
        let mask = if self.layout.bits == 64 {
            u64::MAX
        } else {
            0xffff_ffff
        };
        let mut pairs = emulated.gpr.iter().zip(&native.gpr);
        pairs.all(|(e, n)| (e ^ n) & mask == 0)
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

/// Runs a comparison to its end, with `vary` before each case, and reports.
fn run(name: &str, comparison: &mut Comparison<'_>, seed: u64, vary: impl Fn(&mut Comparison<'_>)) {
    let cases = setting("EMULATOR_CASES", 300_000);
    let mut mnemonics = std::collections::BTreeMap::<String, u64>::new();
    let (mut same, mut skipped, mut different) = (0u64, 0u64, Vec::new());
    let started = std::time::Instant::now();
    while same < cases && different.len() < 20 {
        vary(comparison);
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
        "{name}, seed {seed}: {same} instructions compared, {skipped} skipped, {} mnemonics, {:.1} s",
        mnemonics.len(),
        started.elapsed().as_secs_f64()
    );
    if setting("EMULATOR_LIST", 0) != 0 {
        println!("{mnemonics:?}");
    }
    assert!(
        different.is_empty(),
        "{name}, seed {seed}, after {same} equal cases:\n{}",
        different.join("\n")
    );
}

#[test]
fn random_instructions_do_what_the_processor_does() {
    if !has_what_is_compared() {
        println!("skipped: this processor lacks AVX2, BMI, ADX or MOVBE");
        return;
    }
    let seed = setting("EMULATOR_SEED", 1);
    let mut processor = processor();
    let mut comparison = Comparison::new(&mut processor, seed);
    run("64-bit", &mut comparison, seed, |_| {});
}

#[test]
fn so_do_they_in_16_and_32_bit_segments() {
    if !has_what_is_compared() {
        println!("skipped: this processor lacks AVX2, BMI, ADX or MOVBE");
        return;
    }
    let seed = setting("EMULATOR_SEED", 1);
    let mut processor = processor();
    if let Err(error) = segments::install() {
        println!("skipped: no LDT ({error})");
        return;
    }
    let mut comparison = Comparison::new(&mut processor, seed);
    if !segments::work(comparison.processor, &comparison.registers) {
        println!("skipped: this kernel runs no 16- or 32-bit code");
        return;
    }
    run("16- and 32-bit", &mut comparison, seed, |comparison| {
        let chosen = segments::choose(&mut comparison.random);
        comparison.special = chosen.special(user_mode(0));
        comparison.layout = Layout {
            decoder_options: comparison.layout.decoder_options,
            ..chosen.layout()
        };
        comparison.selectors = Some(chosen.selectors());
    });
}
