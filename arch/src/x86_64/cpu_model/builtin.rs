//! Models that every build knows.
//!
//! The levels of the psABI (System V ABI, AMD64 supplement, section 3.1.1, "Processor architecture") promise a compiler's instruction
//! sets; what an operating system needs beside them (paging, APIC, MSRs) is in the first. They say nothing of a vendor.
//!
//! The generations are servers as their makers sold them, with current microcode: the features that a guest can have (no VMX, SVM,
//! performance monitoring, enclaves) and that moves carry; without TSX, which microcode has taken away; with the controls
//! against speculation, so that guests are not left without. None promises a TSC frequency (`constant_tsc`): a
//! guest is told of one only when that is asked for.
//!
//! Sources: CPUID dumps of such machines (`tests/cpu/dumps`), SDM vol. 2A (CPUID) and vol. 4 (IA32_ARCH_CAPABILITIES), APM vol. 3,
//! appendix E, and the processor programming references of families 17h, 19h and 1Ah.
//!
//! A version is never changed once it is released: a change makes a new one. A name without a version is the newest.

use crate::x86_64::cpuid::Interface;

/// A model in the table.
pub(super) struct Builtin {
    pub name: &'static str,
    pub version: u32,
    pub description: &'static str,
    /// Name of the model it adds to. None: [`Start`].
    pub base: Option<&'static str>,
    pub start: Start,
    pub interface: Interface,
    pub vendor: Option<&'static str>,
    /// Family, model, stepping.
    pub signature: Option<(u32, u32, u32)>,
    pub brand: Option<&'static str>,
    pub physical_bits: Option<u32>,
    pub features: &'static [&'static str],
    /// Bits of IA32_ARCH_CAPABILITIES that are 1; all others are 0.
    pub arch_capabilities: Option<u64>,
}

/// What a model without a base starts from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Everything that the host has.
    Host,
    /// Nothing.
    Nothing,
}

const NOTHING: Builtin = Builtin {
    name: "none",
    version: 1,
    description: "no feature at all: something to start a model of your own from",
    base: None,
    start: Start::Nothing,
    interface: Interface::Host,
    vendor: None,
    signature: None,
    brand: None,
    physical_bits: None,
    features: &[],
    arch_capabilities: None,
};

const HOST: Builtin = Builtin {
    name: "host",
    description: "what this host and its hypervisor offer",
    start: Start::Host,
    ..NOTHING
};

const INTEL: Builtin = Builtin {
    vendor: Some("GenuineIntel"),
    ..NOTHING
};

const AMD: Builtin = Builtin {
    vendor: Some("AuthenticAMD"),
    ..NOTHING
};

/// Every model. A base stands before what adds to it.
pub(super) const MODELS: [Builtin; 18] = [
    NOTHING,
    HOST,
    Builtin {
        name: "portable",
        description: "what this host offers, without what only one hypervisor has: such a guest moves between KVM and the \
                      Microsoft hypervisor, and tells the time by a clock of both",
        interface: Interface::Hyperv,
        ..HOST
    },
    Builtin {
        name: "bare",
        description: "like `portable`, without any hypervisor's interface",
        interface: Interface::None,
        ..HOST
    },
    Builtin {
        name: "x86-64",
        description: "the psABI's baseline, and what an operating system needs with it",
        features: &[
            "fpu", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge",
            "mca", "cmov", "pat", "pse36", "clflush", "mmx", "fxsr", "sse", "sse2", "x2apic",
            "syscall", "nx", "lm",
        ],
        ..NOTHING
    },
    Builtin {
        name: "x86-64-v2",
        description: "the psABI's second level: SSE4.2 and POPCNT (Nehalem, Jaguar)",
        base: Some("x86-64"),
        features: &[
            "sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm",
        ],
        ..NOTHING
    },
    Builtin {
        name: "x86-64-v3",
        description: "the psABI's third level: AVX2, BMI and FMA (Haswell, Excavator)",
        base: Some("x86-64-v2"),
        features: &[
            "xsave", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe",
        ],
        ..NOTHING
    },
    Builtin {
        name: "x86-64-v4",
        description: "the psABI's fourth level: AVX-512 (Skylake servers, Zen 4)",
        base: Some("x86-64-v3"),
        features: &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
        ..NOTHING
    },
    Builtin {
        name: "Broadwell-Server",
        description: "Intel Xeon E5 v4 and E7 v4 (2016)",
        base: Some("x86-64-v3"),
        signature: Some((6, 79, 1)),
        brand: Some("Intel Xeon E5 v4 (Broadwell)"),
        physical_bits: Some(46),
        features: &[
            "vme",
            "pclmulqdq",
            "pcid",
            "tsc_deadline_timer",
            "aes",
            "rdrand",
            "fsgsbase",
            "smep",
            "erms",
            "invpcid",
            "rdseed",
            "adx",
            "smap",
            "3dnowprefetch",
            "pdpe1gb",
            "rdtscp",
            "xsaveopt",
            "arat",
            "tsc_adjust",
            "spec_ctrl",
            "ssbd",
            "md_clear",
        ],
        ..INTEL
    },
    Builtin {
        name: "Skylake-Server",
        description: "Intel Xeon Scalable, 1st generation (2017)",
        base: Some("Broadwell-Server"),
        signature: Some((6, 85, 4)),
        brand: Some("Intel Xeon Scalable 1st gen. (Skylake)"),
        physical_bits: Some(46),
        features: &[
            "avx512f",
            "avx512bw",
            "avx512cd",
            "avx512dq",
            "avx512vl",
            "clflushopt",
            "clwb",
            "pku",
            "xsavec",
            "xgetbv1",
        ],
        ..INTEL
    },
    Builtin {
        name: "Cascadelake-Server",
        description: "Intel Xeon Scalable, 2nd generation (2019)",
        base: Some("Skylake-Server"),
        signature: Some((6, 85, 7)),
        brand: Some("Intel Xeon Scalable 2nd gen. (Cascade Lake)"),
        physical_bits: Some(46),
        features: &["avx512_vnni", "arch_capabilities"],
        // RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, MDS_NO.
        arch_capabilities: Some(0x2b),
        ..INTEL
    },
    Builtin {
        name: "Icelake-Server",
        description: "Intel Xeon Scalable, 3rd generation (2021)",
        base: Some("Cascadelake-Server"),
        signature: Some((6, 106, 6)),
        brand: Some("Intel Xeon Scalable 3rd gen. (Ice Lake)"),
        physical_bits: Some(52),
        features: &[
            "avx512ifma",
            "avx512vbmi",
            "avx512_vbmi2",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "gfni",
            "vaes",
            "vpclmulqdq",
            "sha_ni",
            "rdpid",
            "umip",
            "la57",
            "fsrm",
            "wbnoinvd",
            "stibp",
            "xsaves",
        ],
        // As before, and PSCHANGE_MC_NO, TAA_NO.
        arch_capabilities: Some(0x16b),
        ..INTEL
    },
    Builtin {
        name: "SapphireRapids-Server",
        description: "Intel Xeon Scalable, 4th generation (2023)",
        base: Some("Icelake-Server"),
        signature: Some((6, 143, 8)),
        brand: Some("Intel Xeon Scalable 4th gen. (Sapphire Rapids)"),
        physical_bits: Some(52),
        features: &[
            "avx_vnni",
            "avx512_bf16",
            "avx512_fp16",
            "amx_tile",
            "amx_bf16",
            "amx_int8",
            "xfd",
            "serialize",
            "movdiri",
            "movdir64b",
            "fzrm",
            "fsrs",
            "fsrc",
        ],
        // As before, and SBDR_SSDP_NO, FBSDP_NO, PSDP_NO.
        arch_capabilities: Some(0xe16b),
        ..INTEL
    },
    Builtin {
        name: "EPYC",
        description: "AMD EPYC 7001, Naples, Zen (2017)",
        base: Some("x86-64-v3"),
        signature: Some((23, 1, 2)),
        brand: Some("AMD EPYC 7001 (Naples)"),
        physical_bits: Some(48),
        features: &[
            "vme",
            "pclmulqdq",
            "aes",
            "rdrand",
            "fsgsbase",
            "smep",
            "rdseed",
            "adx",
            "smap",
            "clflushopt",
            "sha_ni",
            "xsaveopt",
            "xsavec",
            "xgetbv1",
            "arat",
            "cr8_legacy",
            "sse4a",
            "misalignsse",
            "3dnowprefetch",
            "osvw",
            "mmxext",
            "fxsr_opt",
            "pdpe1gb",
            "rdtscp",
            "ibpb",
        ],
        ..AMD
    },
    Builtin {
        name: "EPYC-Rome",
        description: "AMD EPYC 7002, Rome, Zen 2 (2019)",
        base: Some("EPYC"),
        signature: Some((23, 49, 0)),
        brand: Some("AMD EPYC 7002 (Rome)"),
        physical_bits: Some(48),
        features: &[
            "clwb",
            "rdpid",
            "umip",
            "wbnoinvd",
            "clzero",
            "xsaveerptr",
            "amd_stibp",
        ],
        ..AMD
    },
    Builtin {
        name: "EPYC-Milan",
        description: "AMD EPYC 7003, Milan, Zen 3 (2021)",
        base: Some("EPYC-Rome"),
        signature: Some((25, 1, 1)),
        brand: Some("AMD EPYC 7003 (Milan)"),
        physical_bits: Some(48),
        features: &[
            "pcid",
            "invpcid",
            "erms",
            "fsrm",
            "pku",
            "vaes",
            "vpclmulqdq",
            "xsaves",
            "amd_ibrs",
            "amd_ssbd",
        ],
        ..AMD
    },
    Builtin {
        name: "EPYC-Genoa",
        description: "AMD EPYC 9004, Genoa, Zen 4 (2022)",
        base: Some("EPYC-Milan"),
        signature: Some((25, 17, 1)),
        brand: Some("AMD EPYC 9004 (Genoa)"),
        physical_bits: Some(52),
        features: &[
            "avx512f",
            "avx512bw",
            "avx512cd",
            "avx512dq",
            "avx512vl",
            "avx512ifma",
            "avx512vbmi",
            "avx512_vbmi2",
            "avx512_vnni",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "avx512_bf16",
            "gfni",
            "la57",
        ],
        ..AMD
    },
    Builtin {
        name: "EPYC-Turin",
        description: "AMD EPYC 9005, Turin, Zen 5 (2024)",
        base: Some("EPYC-Genoa"),
        signature: Some((26, 2, 1)),
        brand: Some("AMD EPYC 9005 (Turin)"),
        physical_bits: Some(52),
        features: &["avx_vnni", "avx512_vp2intersect", "movdiri", "movdir64b"],
        ..AMD
    },
];
