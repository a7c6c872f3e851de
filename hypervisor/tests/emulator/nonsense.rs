//! Any bytes in any state, in every mode: no panic, no endless loop, no access over a page border, and nothing changed
//! by what did not happen.
//!
//! `EMULATOR_NONSENSE` sets how many (default 500,000).

use arch::x86_64::state::{GeneralRegisters, Segment, SpecialRegisters};
use hypervisor::emulator::{
    Access, CpuState, Exception, Options, Outcome, Platform, PlatformError, TranslateFailure,
    VectorRegisters, Vendor, XsaveComponent, emulate,
};

use crate::host::setting;
use crate::random::Random;

/// A platform that answers anything, and sometimes fails.
struct Whim {
    random: Random,
    accesses: u64,
    failures: bool,
}

impl Whim {
    fn answer(&mut self, gpa: u64, bytes: usize) -> Result<(), PlatformError> {
        assert!(
            gpa % 4096 + bytes as u64 <= 4096,
            "an access crosses a page"
        );
        assert!((1..=4096).contains(&bytes), "an access of {bytes} bytes");
        self.accesses += 1;
        if self.failures && self.random.one_in(50) {
            return Err("a whim".into());
        }
        Ok(())
    }
}

impl Platform for Whim {
    fn translate(&mut self, gva: u64, _: Access) -> Result<u64, TranslateFailure> {
        self.accesses += 1;
        match self.random.below(if self.failures { 12 } else { 1 << 20 }) {
            0 => Err(TranslateFailure::Exception(Exception::page_fault(0, gva))),
            1 => Err(TranslateFailure::Platform("a whim".into())),
            _ => Ok(self.random.next() << 12 | gva & 0xfff),
        }
    }

    fn read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), PlatformError> {
        self.answer(gpa, data.len())?;
        self.random.fill(data);
        Ok(())
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), PlatformError> {
        self.answer(gpa, data.len())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<bool, PlatformError> {
        assert_eq!(expected.len(), new.len());
        assert!(matches!(new.len(), 1 | 2 | 4 | 8 | 16));
        self.answer(gpa, new.len())?;
        Ok(self.random.one_in(2))
    }

    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> Result<(), PlatformError> {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.answer(0, data.len())
    }

    fn pio_write(&mut self, _: u16, data: &[u8]) -> Result<(), PlatformError> {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.answer(0, data.len())
    }

    fn vectors(&mut self) -> Result<VectorRegisters, PlatformError> {
        Ok(VectorRegisters {
            upper: self.random.one_in(2).then_some([1; 16]),
            xmm: [self.random.next().into(); 16],
            ..VectorRegisters::default()
        })
    }

    fn set_vectors(&mut self, _: &VectorRegisters) -> Result<(), PlatformError> {
        Ok(())
    }

    fn xcr0(&mut self) -> Result<u64, PlatformError> {
        Ok(self.random.next() & 7)
    }

    fn xsave_area(&mut self) -> Result<Option<Vec<u8>>, PlatformError> {
        let bytes = [0, 100, 576, 832, 1 << 13][self.random.below(5) as usize];
        let mut area = vec![0; bytes];
        self.random.fill(&mut area);
        Ok(self.random.one_in(2).then_some(area))
    }

    fn set_xsave_area(&mut self, _: &[u8]) -> Result<(), PlatformError> {
        Ok(())
    }

    fn xsave_component(&mut self, _: u32) -> Option<XsaveComponent> {
        let mut value = || self.random.interesting() as u32 & 0x8000_0fff;
        Some(XsaveComponent {
            offset: value(),
            bytes: value(),
            aligned: self.random.one_in(2),
        })
    }
}

fn segment(random: &mut Random) -> Segment {
    Segment {
        selector: random.next() as u16,
        base: random.interesting(),
        limit: random.interesting() as u32,
        access: random.next() as u32 & 0x1_f0ff,
    }
}

fn state(random: &mut Random) -> CpuState {
    let mut value = || random.interesting();
    let general = GeneralRegisters {
        rax: value(),
        rbx: value(),
        rcx: value(),
        rdx: value(),
        rsi: value(),
        rdi: value(),
        rsp: value(),
        rbp: value(),
        r8: value(),
        r9: value(),
        r10: value(),
        r11: value(),
        r12: value(),
        r13: value(),
        r14: value(),
        r15: value(),
        rip: value(),
        rflags: value(),
    };
    let mut special = SpecialRegisters {
        cs: segment(random),
        ds: segment(random),
        es: segment(random),
        fs: segment(random),
        gs: segment(random),
        ss: segment(random),
        tr: segment(random),
        ldt: segment(random),
        cr0: random.next(),
        cr4: random.next(),
        efer: random.next(),
        ..SpecialRegisters::default()
    };
    special.gdt.base = random.interesting();
    special.gdt.limit = random.next() as u16;
    // Half of the states are plausible enough that instructions succeed.
    if random.one_in(2) {
        for segment in [
            &mut special.cs,
            &mut special.ds,
            &mut special.es,
            &mut special.ss,
        ] {
            segment.limit = u32::MAX;
            segment.access = segment.access & 0x6060 | 0x93;
        }
        special.cs.access |= 8;
        special.cr0 &= !0xc;
        special.cr4 |= 0x4_0200;
    }
    CpuState {
        general,
        special,
        interrupt_shadow: random.byte() & 3,
    }
}

#[test]
fn nonsense_does_no_harm() {
    let cases = setting("EMULATOR_NONSENSE", 500_000);
    let seed = setting("EMULATOR_SEED", 1);
    let mut random = Random::new(seed);
    let mut platform = Whim {
        random: Random::new(seed + 1),
        accesses: 0,
        failures: false,
    };
    let mut outcomes = [0u64; 5];
    for _ in 0..cases {
        let mut bytes = [0; 15];
        random.fill(&mut bytes);
        // Prefixes are rare in random bytes, and so are string instructions.
        if random.one_in(3) {
            let prefixes = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x64, 0x48];
            bytes[0] = prefixes[random.below(8) as usize];
            if random.one_in(3) {
                bytes[1] = 0xa4 + random.byte() % 12;
            }
            // FXSAVE, XSAVE and their relatives.
            if random.one_in(3) {
                bytes[1] = 0x0f;
                bytes[2] = if random.one_in(2) { 0xae } else { 0xc7 };
            }
        }
        let before = state(&mut random);
        let mut after = before;
        platform.failures = random.one_in(2);
        platform.accesses = 0;
        let options = Options {
            vendor: if random.one_in(2) {
                Vendor::Amd
            } else {
                Vendor::Intel
            },
            check_io_permission: random.one_in(2),
            max_iterations: random.below(40) as u32,
        };
        let known = random.below(16) as usize;
        let result = emulate(&mut platform, &mut after, &bytes[..known], &options);
        assert!(
            platform.accesses < 600,
            "{bytes:02x?}: {} accesses",
            platform.accesses
        );
        let repeated = bytes.iter().any(|byte| matches!(byte, 0xf2 | 0xf3));
        let kind = match result {
            Ok(Outcome::Completed) => 0,
            Ok(Outcome::Repeating) => 1,
            Ok(Outcome::Halted) => 2,
            Ok(Outcome::Exception(exception)) => {
                if exception.kind == hypervisor::emulator::ExceptionKind::Fault
                    && !repeated
                    && known == 15
                {
                    assert_eq!(after, before, "{bytes:02x?}");
                }
                3
            }
            Err(error) => {
                if !repeated && known == 15 {
                    assert_eq!(after, before, "{bytes:02x?}: {error}");
                }
                4
            }
        };
        outcomes[kind] += 1;
    }
    println!("seed {seed}: completed, repeating, halted, exception, error: {outcomes:?}");
    assert!(outcomes.iter().all(|&count| count > 0), "{outcomes:?}");
}
