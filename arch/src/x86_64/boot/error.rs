//! Why a guest could not be loaded.

/// Why a guest could not be loaded. Addresses and lengths are guest-physical and in bytes.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is no kernel at all.
    #[error(
        "not a kernel: neither an ELF with a PVH note nor a bzImage; give a vmlinux built with CONFIG_PVH=y, or a bzImage (vmlinuz)"
    )]
    NotAKernel,
    /// An ELF that cannot be entered.
    #[error(
        "the kernel is an ELF without a PVH note (XEN_ELFNOTE_PHYS32_ENTRY); rebuild it with CONFIG_PVH=y, or give its bzImage"
    )]
    NoPvhNote,
    /// An ELF for something else.
    #[error(
        "the kernel is an ELF file, but its {field} is {found:#x} instead of {expected:#x}; a 64-bit x86 executable is needed"
    )]
    ElfUnsupported {
        /// Field of the ELF header.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it would have to be.
        expected: u64,
    },
    /// A table or segment of the file reaches past its end.
    #[error(
        "the kernel file is truncated: {what} needs bytes {start:#x}..{end:#x}, the file has {len:#x}"
    )]
    Truncated {
        /// Which part.
        what: &'static str,
        /// First byte it needs.
        start: u64,
        /// End of what it needs, saturating.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// A size in the file is beyond anything sensible.
    #[error("the kernel file is malformed: {what} is {found}, at most {max} is accepted")]
    Excessive {
        /// Which part.
        what: &'static str,
        /// Its size.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// The PVH note does not hold an address.
    #[error("the kernel's PVH note is malformed: its descriptor has {0} bytes, 4 or 8 are needed")]
    PvhNoteSize(u32),
    /// The kernel starts outside of itself.
    #[error(
        "the kernel's entry point {0:#x} is in none of its segments; the file is damaged or not meant for PVH"
    )]
    EntryOutsideSegments(u64),
    /// An ELF whose segment is larger in the file than in memory.
    #[error(
        "the kernel's segment at {gpa:#x} has {file_size:#x} bytes in the file, but only {memory_size:#x} in memory"
    )]
    SegmentSizes {
        /// Where it goes.
        gpa: u64,
        /// Bytes in the file.
        file_size: u64,
        /// Bytes in memory.
        memory_size: u64,
    },
    /// Two segments want the same memory.
    #[error("the kernel's segments overlap at {0:#x}; the file is damaged")]
    SegmentsOverlap(u64),
    /// The kernel needs memory that is not there, or that the boot structures take.
    #[error(
        "the kernel needs memory {start:#x}..{end:#x}, but may use {low:#x}..{high:#x} only; if that is too little, give the guest more memory"
    )]
    KernelOutsideRam {
        /// First byte it needs.
        start: u64,
        /// End of what it needs, saturating.
        end: u64,
        /// First byte it may use.
        low: u64,
        /// End of what it may use.
        high: u64,
    },
    /// A bzImage of before Linux 3.8.
    #[error("the bzImage speaks boot protocol {major}.{minor:02}, 2.12 (Linux 3.8) or later is needed", major = .0 >> 8, minor = .0 & 0xff)]
    BzImageTooOld(u16),
    /// A bzImage without the 64-bit entry point.
    #[error("the bzImage has no 64-bit entry point (XLF_KERNEL_64); give a 64-bit kernel")]
    BzImageNot64Bit,
    /// A bzImage with nothing in it, or a zImage.
    #[error("the bzImage is malformed: {0}")]
    BzImageMalformed(&'static str),
    /// The command line does not fit.
    #[error("the command line has {len} bytes, at most {max} are possible; shorten it")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// The most the kernel takes.
        max: usize,
    },
    /// The command line would be cut short.
    #[error("the command line contains a zero byte; remove it")]
    CmdlineZero,
    /// A file without content.
    #[error("the initramfs is empty; give another file, or none")]
    InitramfsEmpty,
    /// The initramfs does not fit.
    #[error(
        "the initramfs has {size} bytes, but only {room} are left beside the kernel; give the guest more memory"
    )]
    InitramfsTooBig {
        /// Its size.
        size: u64,
        /// What there is.
        room: u64,
    },
    /// A RAM range that cannot be.
    #[error(
        "guest RAM {gpa:#x}+{len:#x} is not possible: ranges are page aligned, not empty, apart from each other and from the hole below 4 GiB"
    )]
    RamRange {
        /// Its address.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// Not enough RAM where everything starts.
    #[error(
        "the guest has {0:#x} bytes of RAM from address 0; at least 0x200000 (2 MiB) are needed"
    )]
    TooLittleRam(u64),
    /// More ranges than a kernel can be told.
    #[error("the guest's RAM has {0} ranges, more than a kernel can be told of")]
    TooManyRanges(usize),
    /// Something larger than this process could address.
    #[error("{what} has {len} bytes, more than can be addressed")]
    TooBig {
        /// What it is.
        what: &'static str,
        /// Its length.
        len: u64,
    },
    /// A file cannot be read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Guest memory cannot be filled: it is not there, or the file became shorter while it was read.
    #[error("cannot load {what} to guest address {gpa:#x}: {source}")]
    Memory {
        /// What was being loaded.
        what: &'static str,
        /// Where to.
        gpa: u64,
        /// The reason.
        source: vm_memory::GuestMemoryError,
    },
}
