//! The lines that the guest programs write to their serial port.

use std::error::Error;
use std::fmt;
use std::str::FromStr;

/// What a memory guest counted since its start. All zero is a guest that lost nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryErrors {
    /// Pages without the write that they must hold, and writes missing in page and count alike.
    pub lost: u64,
    /// Pages that mix versions or hold foreign bytes.
    pub torn: u64,
    /// Whole pages in an older version.
    pub stale: u64,
}

impl MemoryErrors {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.lost
            .saturating_add(self.torn)
            .saturating_add(self.stale)
    }
}

/// What a CPU guest counted since its start. All zero is a guest that kept its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuErrors {
    /// Changed x87 registers or control word.
    pub fpu: u64,
    /// Changed XMM registers or MXCSR.
    pub sse: u64,
    /// Changed upper halves of YMM registers.
    pub avx: u64,
    /// Changed ZMM or mask registers.
    pub avx512: u64,
    /// Changed general registers.
    pub gpr: u64,
    /// Changed FS or GS bases.
    pub seg: u64,
    /// Changed debug registers.
    pub dr: u64,
    /// Steps back of the TSC.
    pub tsc_back: u64,
    /// Steps back of the guest's clock.
    pub clock_back: u64,
    /// Sum of all as the guest gives it.
    pub errors: u64,
}

/// What a block guest counted since its start. Without errors and damage it has read what it must.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Whole passes over the disk.
    pub passes: u64,
    /// Requests answered.
    pub requests: u64,
    /// Requests without success, or with less than the block.
    pub errors: u64,
    /// Passes whose checksum is not that of the first.
    pub damaged: u64,
}

/// One parsed line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Report {
    /// `memory: ready`: the working set is filled.
    MemoryReady {
        /// Pages of the working set.
        pages: u64,
        /// vCPUs at work.
        cpus: u32,
        /// Pages that are dirtied again and again.
        hot: u64,
        /// How long the fill took by the guest's clock.
        fill_ms: u64,
    },
    /// `memory: report`: figures so far.
    MemoryReport {
        /// Time since `ready` by the guest's clock.
        t_ms: u64,
        /// Page writes, the fill included.
        writes: u64,
        /// Pages checked.
        verified: u64,
        /// Damage found.
        errors: MemoryErrors,
        /// Whole walks over the working set.
        passes: u64,
    },
    /// `memory: verdict`: every page was just checked.
    MemoryVerdict {
        /// Pages of the working set.
        pages: u64,
        /// Page writes, the fill included.
        writes: u64,
        /// Damage found since the start.
        errors: MemoryErrors,
        /// The guest's own conclusion.
        ok: bool,
    },
    /// `memory: damage`: one damaged page in detail.
    MemoryDamage {
        /// The whole line.
        text: String,
    },
    /// `cpu: ready`: all vCPUs run their checks.
    CpuReady {
        /// vCPUs at work.
        cpus: u32,
        /// XCR0, which says what state is checked; 0 without XSAVE.
        xcr0: u64,
        /// Whether the time comes from a KVM clock (else from the TSC).
        kvmclock: bool,
    },
    /// `cpu: report`: figures so far.
    CpuReport {
        /// Time since `ready` by the guest's clock.
        t_ms: u64,
        /// Rounds of checks, over all vCPUs.
        rounds: u64,
        /// What was wrong.
        errors: CpuErrors,
        /// Timer interrupts, over all vCPUs.
        ticks: u64,
        /// Longest time that any vCPU saw no timer interrupt.
        max_gap_ms: u64,
    },
    /// `cpu: verdict`: like a report, after every vCPU went round once more.
    CpuVerdict {
        /// Rounds of checks, over all vCPUs.
        rounds: u64,
        /// What was wrong.
        errors: CpuErrors,
        /// Timer interrupts, over all vCPUs.
        ticks: u64,
        /// Longest time that any vCPU saw no timer interrupt.
        max_gap_ms: u64,
        /// The guest's own conclusion.
        ok: bool,
    },
    /// `block: ready`: the disk is set up.
    BlockReady {
        /// 4 KiB blocks of the disk.
        blocks: u64,
        /// Queues in use.
        queues: u16,
        /// Requests under way in each.
        depth: u16,
        /// Whether event indices were agreed on.
        event_idx: bool,
    },
    /// `block: result`: a measurement.
    BlockResult {
        /// Requests done in it.
        requests: u64,
        /// Requests that failed, since the guest's start.
        errors: u64,
        /// How long it took by the guest's clock.
        elapsed_ns: u64,
        /// Mean time of a request.
        latency_ns: u64,
        /// Notifications sent.
        notified: u64,
    },
    /// `block: report`: figures so far.
    BlockReport {
        /// Time since `ready` by the guest's clock.
        t_ms: u64,
        /// What was read.
        counts: BlockCounts,
    },
    /// `block: verdict`: the whole disk was just read.
    BlockVerdict {
        /// What was read.
        counts: BlockCounts,
        /// Of the first pass: [`crate::disk_checksum`].
        checksum: u64,
        /// The guest's own conclusion.
        ok: bool,
    },
    /// `guest: exception`: a vCPU took an exception and stopped.
    Exception {
        /// Vector.
        vector: u64,
        /// Error code, 0 where there is none.
        code: u64,
        /// RIP.
        rip: u64,
        /// CR2.
        cr2: u64,
    },
    /// Any other `guest:` line: a complaint of the run time.
    Complaint {
        /// The text behind `guest: `.
        text: String,
    },
}

/// Why a line is no [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// Something else than a guest program wrote it.
    NotAReport,
    /// It begins like a report, but this field is missing.
    Missing {
        /// Name of the field.
        field: &'static str,
        /// The line.
        line: String,
    },
    /// It begins like a report, but this field is not what it must be.
    Malformed {
        /// Name of the field.
        field: &'static str,
        /// The line.
        line: String,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseError::NotAReport => write!(f, "the line is not a guest program's report"),
            ParseError::Missing { field, line } => {
                write!(
                    f,
                    "the report lacks `{field}` (cut off on the serial port?): {line}"
                )
            }
            ParseError::Malformed { field, line } => {
                write!(f, "the report's `{field}` is malformed: {line}")
            }
        }
    }
}

impl Error for ParseError {}

/// The `key=value` words of one line.
struct Fields<'a> {
    line: &'a str,
    rest: &'a str,
}

impl Fields<'_> {
    fn get<T: FromStr>(&self, field: &'static str) -> Result<T, ParseError> {
        let text = self
            .rest
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(field)?.strip_prefix('='))
            .ok_or_else(|| ParseError::Missing {
                field,
                line: self.line.to_owned(),
            })?;
        text.parse().map_err(|_| self.malformed(field))
    }

    fn malformed(&self, field: &'static str) -> ParseError {
        ParseError::Malformed {
            field,
            line: self.line.to_owned(),
        }
    }

    fn hex(&self, field: &'static str, at: usize) -> Result<u64, ParseError> {
        let word =
            self.rest
                .split_ascii_whitespace()
                .nth(at)
                .ok_or_else(|| ParseError::Missing {
                    field,
                    line: self.line.to_owned(),
                })?;
        u64::from_str_radix(word, 16).map_err(|_| self.malformed(field))
    }

    /// The conclusion at the end of a verdict.
    fn conclusion(&self) -> Result<bool, ParseError> {
        match self.rest.split_ascii_whitespace().last() {
            Some("ok") => Ok(true),
            Some("damaged") => Ok(false),
            _ => Err(self.malformed("conclusion")),
        }
    }

    fn memory_errors(&self) -> Result<MemoryErrors, ParseError> {
        Ok(MemoryErrors {
            lost: self.get("lost")?,
            torn: self.get("torn")?,
            stale: self.get("stale")?,
        })
    }

    fn block_counts(&self) -> Result<BlockCounts, ParseError> {
        Ok(BlockCounts {
            passes: self.get("passes")?,
            requests: self.get("requests")?,
            errors: self.get("errors")?,
            damaged: self.get("damaged")?,
        })
    }

    fn cpu_errors(&self) -> Result<CpuErrors, ParseError> {
        Ok(CpuErrors {
            fpu: self.get("fpu")?,
            sse: self.get("sse")?,
            avx: self.get("avx")?,
            avx512: self.get("avx512")?,
            gpr: self.get("gpr")?,
            seg: self.get("seg")?,
            dr: self.get("dr")?,
            tsc_back: self.get("tsc_back")?,
            clock_back: self.get("clock_back")?,
            errors: self.get("errors")?,
        })
    }
}

impl Report {
    /// Parses one line of serial output. White space around it and the start mark
    /// ([`crate::FIRST_BYTE`]) before it do not matter.
    ///
    /// # Errors
    /// [`ParseError::NotAReport`] for other text; the others for a line that begins like a report
    /// and is damaged.
    pub fn parse(line: &str) -> Result<Report, ParseError> {
        let line = line.trim().trim_start_matches('!');
        let (source, text) = line.split_once(": ").ok_or(ParseError::NotAReport)?;
        let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
        let fields = Fields { line, rest };
        Ok(match (source, kind) {
            ("memory", "ready") => Report::MemoryReady {
                pages: fields.get("pages")?,
                cpus: fields.get("cpus")?,
                hot: fields.get("hot")?,
                fill_ms: fields.get("fill_ms")?,
            },
            ("memory", "report") => Report::MemoryReport {
                t_ms: fields.get("t_ms")?,
                writes: fields.get("writes")?,
                verified: fields.get("verified")?,
                errors: fields.memory_errors()?,
                passes: fields.get("passes")?,
            },
            ("memory", "verdict") => Report::MemoryVerdict {
                pages: fields.get("pages")?,
                writes: fields.get("writes")?,
                errors: fields.memory_errors()?,
                ok: fields.conclusion()?,
            },
            ("memory", "damage") => Report::MemoryDamage {
                text: line.to_owned(),
            },
            ("cpu", "ready") => Report::CpuReady {
                cpus: fields.get("cpus")?,
                xcr0: fields.get("xcr0")?,
                kvmclock: fields.get::<u8>("kvmclock")? != 0,
            },
            ("cpu", "report") => Report::CpuReport {
                t_ms: fields.get("t_ms")?,
                rounds: fields.get("rounds")?,
                errors: fields.cpu_errors()?,
                ticks: fields.get("ticks")?,
                max_gap_ms: fields.get("max_gap_ms")?,
            },
            ("cpu", "verdict") => Report::CpuVerdict {
                rounds: fields.get("rounds")?,
                errors: fields.cpu_errors()?,
                ticks: fields.get("ticks")?,
                max_gap_ms: fields.get("max_gap_ms")?,
                ok: fields.conclusion()?,
            },
            ("block", "ready") => Report::BlockReady {
                blocks: fields.get("blocks")?,
                queues: fields.get("queues")?,
                depth: fields.get("depth")?,
                event_idx: fields.get::<u8>("event_idx")? != 0,
            },
            ("block", "result") => Report::BlockResult {
                requests: fields.get("requests")?,
                errors: fields.get("errors")?,
                elapsed_ns: fields.get("elapsed_ns")?,
                latency_ns: fields.get("latency_ns")?,
                notified: fields.get("notified")?,
            },
            ("block", "report") => Report::BlockReport {
                t_ms: fields.get("t_ms")?,
                counts: fields.block_counts()?,
            },
            ("block", "verdict") => Report::BlockVerdict {
                counts: fields.block_counts()?,
                checksum: fields.get("checksum")?,
                ok: fields.conclusion()?,
            },
            ("guest", "exception") => Report::Exception {
                vector: fields.hex("vector", 0)?,
                code: fields.hex("error code", 1)?,
                rip: fields.hex("rip", 2)?,
                cr2: fields.hex("cr2", 3)?,
            },
            ("guest", _) => Report::Complaint {
                text: text.to_owned(),
            },
            _ => return Err(ParseError::NotAReport),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lines_are_understood() {
        assert_eq!(
            Report::parse("!memory: ready pages=131072 cpus=2 hot=4096 fill_ms=80\r\n"),
            Ok(Report::MemoryReady {
                pages: 131_072,
                cpus: 2,
                hot: 4096,
                fill_ms: 80
            })
        );
        assert_eq!(
            Report::parse(
                "memory: report t_ms=1000 writes=7 verified=8 lost=1 torn=2 stale=3 passes=4"
            ),
            Ok(Report::MemoryReport {
                t_ms: 1000,
                writes: 7,
                verified: 8,
                errors: MemoryErrors {
                    lost: 1,
                    torn: 2,
                    stale: 3
                },
                passes: 4,
            })
        );
        for (word, ok) in [("ok", true), ("damaged", false)] {
            let line = format!("memory: verdict pages=5 writes=6 lost=0 torn=0 stale=0 {word}");
            let Ok(Report::MemoryVerdict {
                pages: 5,
                writes: 6,
                errors,
                ok: found,
            }) = Report::parse(&line)
            else {
                panic!("not a verdict: {line}");
            };
            assert_eq!((errors.total(), found), (0, ok));
        }
    }

    #[test]
    fn block_lines_are_understood() {
        assert_eq!(
            Report::parse("!block: ready blocks=65536 queues=4 depth=32 event_idx=1"),
            Ok(Report::BlockReady {
                blocks: 65536,
                queues: 4,
                depth: 32,
                event_idx: true
            })
        );
        assert_eq!(
            Report::parse("block: result requests=1 errors=2 elapsed_ns=3 latency_ns=4 notified=5"),
            Ok(Report::BlockResult {
                requests: 1,
                errors: 2,
                elapsed_ns: 3,
                latency_ns: 4,
                notified: 5
            })
        );
        let counts = BlockCounts {
            passes: 1,
            requests: 2,
            errors: 3,
            damaged: 4,
        };
        let text = "passes=1 requests=2 errors=3 damaged=4";
        assert_eq!(
            Report::parse(&format!("block: report t_ms=5 {text}")),
            Ok(Report::BlockReport { t_ms: 5, counts })
        );
        assert_eq!(
            Report::parse(&format!("block: verdict {text} checksum=6 damaged")),
            Ok(Report::BlockVerdict {
                counts,
                checksum: 6,
                ok: false
            })
        );
    }

    #[test]
    fn cpu_lines_are_understood() {
        let errors = "fpu=1 sse=2 avx=3 avx512=4 gpr=5 seg=6 dr=7 tsc_back=8 clock_back=9 ticks=10 max_gap_ms=11 errors=45";
        let expected = CpuErrors {
            fpu: 1,
            sse: 2,
            avx: 3,
            avx512: 4,
            gpr: 5,
            seg: 6,
            dr: 7,
            tsc_back: 8,
            clock_back: 9,
            errors: 45,
        };
        assert_eq!(
            Report::parse(&format!("cpu: report t_ms=12 rounds=13 {errors}")),
            Ok(Report::CpuReport {
                t_ms: 12,
                rounds: 13,
                errors: expected,
                ticks: 10,
                max_gap_ms: 11
            })
        );
        assert_eq!(
            Report::parse(&format!("cpu: verdict rounds=13 {errors} damaged")),
            Ok(Report::CpuVerdict {
                rounds: 13,
                errors: expected,
                ticks: 10,
                max_gap_ms: 11,
                ok: false
            })
        );
    }

    #[test]
    fn complaints_of_the_run_time_are_understood() {
        assert_eq!(
            Report::parse(
                "guest: exception 000000000000000e 0000000000000006 0000000000101234 0000000000000008"
            ),
            Ok(Report::Exception {
                vector: 14,
                code: 6,
                rip: 0x10_1234,
                cr2: 8
            })
        );
        assert_eq!(
            Report::parse("guest: cpu 1 apic_id=1 did not start"),
            Ok(Report::Complaint {
                text: "cpu 1 apic_id=1 did not start".to_owned()
            })
        );
    }

    #[test]
    fn other_text_and_damaged_lines_are_told_apart() {
        for line in ["", "!", "hello", "Linux: version", "memory: nothing"] {
            assert_eq!(Report::parse(line), Err(ParseError::NotAReport), "{line:?}");
        }
        assert!(matches!(
            Report::parse("memory: ready pages=1 cpus=1 hot=1"),
            Err(ParseError::Missing {
                field: "fill_ms",
                ..
            })
        ));
        assert!(matches!(
            Report::parse("memory: ready pages=x cpus=1 hot=1 fill_ms=1"),
            Err(ParseError::Malformed { field: "pages", .. })
        ));
        assert!(matches!(
            Report::parse("memory: verdict pages=5 writes=6 lost=0 torn=0 stale=0"),
            Err(ParseError::Malformed {
                field: "conclusion",
                ..
            })
        ));
        assert!(matches!(
            Report::parse("guest: exception 6"),
            Err(ParseError::Missing {
                field: "error code",
                ..
            })
        ));
    }
}
