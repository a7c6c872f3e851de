//! The few KVM ioctls the double is built on, by number (linux/kvm.h), past libc (see [`crate::sys`]).

use std::sync::atomic::AtomicU32;

use kvm_bindings::*;

use crate::shared::SHARED;
use crate::sys::{self, Answer, OwnFd};

const fn io(number: u64) -> u64 {
    0xae << 8 | number
}
const fn iow<T>(number: u64) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}
const fn ior<T>(number: u64) -> u64 {
    2 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}
const fn iowr<T>(number: u64) -> u64 {
    3 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}

/// Declares typed wrappers around ioctls that read or write one structure.
macro_rules! ioctls {
    ($($kind:ident $name:ident($coding:ident, $number:literal) $type:ty;)*) => { $(ioctls!(@$kind $name $coding $number $type);)* };
    (@get $name:ident $coding:ident $number:literal $type:ty) => {
        pub(crate) fn $name(&self) -> Answer<$type> {
            // SAFETY: the structure is plain data, for which zero is valid, and the kernel writes at most its size.
            unsafe {
                let mut value: $type = std::mem::zeroed();
                sys::ioctl(self.fd.0, $coding::<$type>($number), &raw mut value as usize)?;
                Ok(value)
            }
        }
    };
    (@set $name:ident $coding:ident $number:literal $type:ty) => {
        pub(crate) fn $name(&self, value: &$type) -> Answer<()> {
            // SAFETY: the kernel reads the structure's size; addresses inside are vouched for by who made it.
            unsafe { sys::ioctl(self.fd.0, $coding::<$type>($number), &raw const *value as usize) }.map(drop)
        }
    };
}

/// The fixed 4 KiB of `kvm_xsave`, in standard format; all states but AMX's fit.
pub(crate) type XsaveArea = [u32; 1024];

/// `/dev/kvm`.
#[derive(Debug)]
pub(crate) struct Kvm {
    fd: OwnFd,
}

/// The largest CPUID table that is asked for.
const CPUID_ENTRIES: usize = 256;

#[repr(C)]
struct CpuidTable {
    head: kvm_cpuid2,
    entries: [kvm_cpuid_entry2; CPUID_ENTRIES],
}

#[repr(C)]
struct OneMsr {
    head: kvm_msrs,
    entry: kvm_msr_entry,
}

impl Kvm {
    pub(crate) fn open() -> Answer<Self> {
        // SAFETY: the path is a C string.
        let fd = unsafe {
            sys::openat(
                libc::AT_FDCWD,
                c"/dev/kvm".as_ptr(),
                libc::O_RDWR | libc::O_CLOEXEC,
                0,
            )?
        };
        Ok(Kvm { fd: OwnFd(fd) })
    }

    pub(crate) fn create_vm(&self) -> Answer<Vm> {
        // SAFETY: KVM_CREATE_VM takes a number.
        let fd = unsafe { sys::ioctl(self.fd.0, io(0x01), 0)? };
        Ok(Vm { fd: OwnFd(fd) })
    }

    pub(crate) fn check_extension(&self, capability: u32) -> i32 {
        // SAFETY: KVM_CHECK_EXTENSION takes a number.
        unsafe { sys::ioctl(self.fd.0, io(0x03), capability as usize) }.unwrap_or(0)
    }

    pub(crate) fn run_size(&self) -> Answer<usize> {
        // SAFETY: KVM_GET_VCPU_MMAP_SIZE takes nothing.
        unsafe { sys::ioctl(self.fd.0, io(0x04), 0) }.map(|size| size as usize)
    }

    /// KVM_GET_SUPPORTED_CPUID.
    pub(crate) fn supported_cpuid(&self) -> Answer<Vec<kvm_cpuid_entry2>> {
        // SAFETY: the table is plain data with room for the number of entries it names.
        unsafe {
            let mut table: Box<CpuidTable> = Box::new(std::mem::zeroed());
            table.head.nent = CPUID_ENTRIES as u32;
            sys::ioctl(
                self.fd.0,
                iowr::<kvm_cpuid2>(0x05),
                &raw mut *table as usize,
            )?;
            let count = (table.head.nent as usize).min(CPUID_ENTRIES);
            Ok(table.entries[..count].to_vec())
        }
    }
}

/// A virtual machine.
#[derive(Debug)]
pub(crate) struct Vm {
    fd: OwnFd,
}

impl Vm {
    ioctls! {
        set set_memory(iow, 0x46) kvm_userspace_memory_region;
        set set_identity_map(iow, 0x48) u64;
        set enable_cap(iow, 0xa3) kvm_enable_cap;
        set set_msr_filter(iow, 0xc6) kvm_msr_filter;
        set irqfd(iow, 0x76) kvm_irqfd;
        set ioeventfd(iow, 0x79) kvm_ioeventfd;
        get clock(ior, 0x7c) kvm_clock_data;
        set set_clock(iow, 0x7b) kvm_clock_data;
        set get_dirty_log(iow, 0x42) kvm_dirty_log;
    }

    pub(crate) fn set_tss_address(&self, address: u64) -> Answer<()> {
        // SAFETY: KVM_SET_TSS_ADDR takes a number.
        unsafe { sys::ioctl(self.fd.0, io(0x47), address as usize) }.map(drop)
    }

    /// KVM_SIGNAL_MSI: how many local APICs took it.
    pub(crate) fn signal_msi(&self, msi: &kvm_msi) -> Answer {
        // SAFETY: the kernel reads the structure.
        unsafe { sys::ioctl(self.fd.0, iow::<kvm_msi>(0xa5), &raw const *msi as usize) }
    }

    pub(crate) fn create_vcpu(&self, id: u32, run_size: usize, shares: bool) -> Answer<Vcpu> {
        // SAFETY: KVM_CREATE_VCPU takes a number.
        let fd = OwnFd(unsafe { sys::ioctl(self.fd.0, io(0x41), id as usize)? });
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of the size that KVM names; it is released with the vCPU.
        let run = unsafe {
            sys::mmap(
                std::ptr::null_mut(),
                run_size,
                protection,
                libc::MAP_SHARED,
                fd.0,
                0,
            )?
        }
        .cast::<kvm_run>();
        if shares {
            // SAFETY: the page was just mapped, and nobody else knows it.
            unsafe { (*run).kvm_valid_regs = u64::from(SHARED) };
        }
        Ok(Vcpu {
            fd,
            run,
            run_size,
            shares,
            fresh: AtomicU32::new(0),
        })
    }

    /// KVM_SET_GSI_ROUTING.
    pub(crate) fn set_routing(&self, routes: &[kvm_irq_routing_entry]) -> Answer<()> {
        let head = kvm_irq_routing {
            nr: routes.len() as u32,
            flags: 0,
            ..Default::default()
        };
        let mut table = vec![0u8; size_of::<kvm_irq_routing>() + size_of_val(routes)];
        // SAFETY: the buffer has room for the head and for all entries; both are plain data, written unaligned.
        unsafe {
            table
                .as_mut_ptr()
                .cast::<kvm_irq_routing>()
                .write_unaligned(head);
            let entries = table.as_mut_ptr().add(size_of::<kvm_irq_routing>());
            std::ptr::copy_nonoverlapping(
                routes.as_ptr().cast::<u8>(),
                entries,
                size_of_val(routes),
            );
            sys::ioctl(
                self.fd.0,
                iow::<kvm_irq_routing>(0x6a),
                table.as_ptr() as usize,
            )
            .map(drop)
        }
    }
}

/// A virtual CPU and the page that it shares with KVM.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: OwnFd,
    run: *mut kvm_run,
    run_size: usize,
    /// Whether registers are shared through the page, and which of those in it are up to date (see [`crate::shared`]).
    pub(crate) shares: bool,
    pub(crate) fresh: AtomicU32,
}

// SAFETY: the shared page is touched under the VP's lock only, except `immediate_exit`, which is written atomically.
unsafe impl Send for Vcpu {}
// SAFETY: as above.
unsafe impl Sync for Vcpu {}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and goes with its owner.
        unsafe { sys::munmap(self.run.cast(), self.run_size) };
    }
}

impl Vcpu {
    ioctls! {
        get fetch_regs(ior, 0x81) kvm_regs;
        set store_regs(iow, 0x82) kvm_regs;
        get fetch_sregs(ior, 0x83) kvm_sregs;
        set store_sregs(iow, 0x84) kvm_sregs;
        get xsave(ior, 0xa4) XsaveArea;
        set set_xsave(iow, 0xa5) XsaveArea;
        get xcrs(ior, 0xa6) kvm_xcrs;
        set set_xcrs(iow, 0xa7) kvm_xcrs;
        get debug_regs(ior, 0xa1) kvm_debugregs;
        set set_debug_regs(iow, 0xa2) kvm_debugregs;
        get fetch_events(ior, 0x9f) kvm_vcpu_events;
        set store_events(iow, 0xa0) kvm_vcpu_events;
        get mp_state(ior, 0x98) kvm_mp_state;
        set store_mp_state(iow, 0x99) kvm_mp_state;
        get lapic(ior, 0x8e) kvm_lapic_state;
        set store_lapic(iow, 0x8f) kvm_lapic_state;
    }

    /// KVM_GET_TSC_KHZ.
    pub(crate) fn tsc_khz(&self) -> Answer {
        // SAFETY: the ioctl takes nothing.
        unsafe { sys::ioctl(self.fd.0, io(0xa3), 0) }
    }

    pub(crate) fn msr(&self, index: u32) -> Answer<u64> {
        let mut one = OneMsr {
            head: kvm_msrs {
                nmsrs: 1,
                ..Default::default()
            },
            entry: kvm_msr_entry {
                index,
                ..Default::default()
            },
        };
        // SAFETY: the structure has room for the one entry that it names.
        match unsafe { sys::ioctl(self.fd.0, iowr::<kvm_msrs>(0x88), &raw mut one as usize)? } {
            1 => Ok(one.entry.data),
            _ => Err(libc::EINVAL),
        }
    }

    pub(crate) fn set_msr(&self, index: u32, data: u64) -> Answer<()> {
        let one = OneMsr {
            head: kvm_msrs {
                nmsrs: 1,
                ..Default::default()
            },
            entry: kvm_msr_entry {
                index,
                data,
                ..Default::default()
            },
        };
        // Some are parts of special registers.
        self.settle()?;
        // SAFETY: the structure has room for the one entry that it names.
        match unsafe { sys::ioctl(self.fd.0, iow::<kvm_msrs>(0x89), &raw const one as usize)? } {
            1 => Ok(()),
            _ => Err(libc::EINVAL),
        }
    }

    /// KVM_SET_CPUID2.
    pub(crate) fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Answer<()> {
        self.settle()?;
        // SAFETY: the table is plain data with room for the number of entries it names.
        unsafe {
            let mut table: Box<CpuidTable> = Box::new(std::mem::zeroed());
            let count = entries.len().min(CPUID_ENTRIES);
            table.entries[..count].copy_from_slice(&entries[..count]);
            table.head.nent = count as u32;
            sys::ioctl(
                self.fd.0,
                iow::<kvm_cpuid2>(0x90),
                &raw const *table as usize,
            )
            .map(drop)
        }
    }

    /// KVM_SET_SIGNAL_MASK: the signals that stay blocked inside KVM_RUN.
    pub(crate) fn set_signal_mask(&self, mask: u64) -> Answer<()> {
        #[repr(C)]
        struct Mask {
            length: u32,
            set: [u8; 8],
        }
        let mask = Mask {
            length: 8,
            set: mask.to_ne_bytes(),
        };
        // SAFETY: the kernel reads the length and as many bytes.
        unsafe {
            sys::ioctl(
                self.fd.0,
                iow::<kvm_signal_mask>(0x8b),
                &raw const mask as usize,
            )
        }
        .map(drop)
    }

    /// KVM_RUN, up to an exit.
    pub(crate) fn enter(&self) -> Answer {
        // SAFETY: the ioctl takes nothing; the guest's memory is mapped as the partition says.
        let result = unsafe { sys::ioctl(self.fd.0, io(0x80), 0) };
        // Without an exit, the vCPU may be one that waits for its start-up IPI.
        self.set_fresh(if result.is_ok() { SHARED } else { 0 });
        result
    }

    /// KVM_RUN, to complete the access of the exit just seen; EINTR tells that there is no more of it.
    pub(crate) fn complete(&self) -> Answer {
        // SAFETY: as in `enter`.
        let result = unsafe { sys::ioctl(self.fd.0, io(0x80), 0) };
        self.set_fresh(SHARED);
        result
    }

    /// The page shared with KVM.
    pub(crate) fn run_page(&self) -> *mut kvm_run {
        self.run
    }

    /// Makes the next [`Self::enter`] return with EINTR as soon as pending work is completed, or lets it run.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the page is mapped for as long as `self` lives; the byte is only ever accessed atomically.
        let flag =
            unsafe { std::sync::atomic::AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) };
        flag.store(u8::from(on), std::sync::atomic::Ordering::SeqCst);
    }

    /// Why the last [`Self::enter`] came back.
    pub(crate) fn exit(&self) -> Exit {
        // SAFETY: the page is mapped and the caller holds the VP, so KVM does not write it now; which member of the
        // union is valid is told by the exit reason.
        unsafe {
            let run = &*self.run;
            match run.exit_reason {
                KVM_EXIT_IO => {
                    let io = run.__bindgen_anon_1.io;
                    let size = usize::from(io.size);
                    let offset = (io.data_offset as usize).min(self.run_size);
                    let length = (size * io.count as usize).min(self.run_size - offset);
                    let data =
                        std::slice::from_raw_parts(self.run.cast::<u8>().add(offset), length)
                            .to_vec();
                    Exit::Io {
                        out: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                        size,
                        port: io.port,
                        data,
                    }
                }
                KVM_EXIT_MMIO => {
                    let mmio = run.__bindgen_anon_1.mmio;
                    let data = mmio.data[..(mmio.len as usize).min(8)].to_vec();
                    Exit::Mmio {
                        write: mmio.is_write != 0,
                        gpa: mmio.phys_addr,
                        data,
                    }
                }
                KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                    let msr = run.__bindgen_anon_1.msr;
                    let unknown = msr.reason != KVM_MSR_EXIT_REASON_INVAL;
                    match run.exit_reason {
                        KVM_EXIT_X86_RDMSR => Exit::ReadMsr {
                            index: msr.index,
                            unknown,
                        },
                        _ => Exit::WriteMsr {
                            index: msr.index,
                            unknown,
                        },
                    }
                }
                KVM_EXIT_IOAPIC_EOI => Exit::Eoi(run.__bindgen_anon_1.eoi.vector),
                KVM_EXIT_SHUTDOWN => Exit::Shutdown,
                KVM_EXIT_IRQ_WINDOW_OPEN => Exit::InterruptWindow,
                KVM_EXIT_HLT => Exit::Halt,
                KVM_EXIT_INTR => Exit::Interrupted,
                other => Exit::Other(other, run.__bindgen_anon_1.internal.suberror),
            }
        }
    }

    /// Fills the answer of the exit just seen: zeroes for an access, success or a fault for an MSR.
    pub(crate) fn answer(&self, fault: bool) {
        // SAFETY: as in `exit`.
        unsafe {
            let run = &mut *self.run;
            match run.exit_reason {
                KVM_EXIT_MMIO => run.__bindgen_anon_1.mmio.data = [0; 8],
                KVM_EXIT_IO => {
                    let io = run.__bindgen_anon_1.io;
                    if u32::from(io.direction) == KVM_EXIT_IO_IN {
                        let offset = (io.data_offset as usize).min(self.run_size);
                        let length =
                            (usize::from(io.size) * io.count as usize).min(self.run_size - offset);
                        std::ptr::write_bytes(self.run.cast::<u8>().add(offset), 0, length);
                    }
                }
                KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                    run.__bindgen_anon_1.msr.error = u8::from(fault);
                    if run.exit_reason == KVM_EXIT_X86_RDMSR {
                        run.__bindgen_anon_1.msr.data = 0;
                    }
                }
                _ => {}
            }
        }
    }

    /// Asks for an exit as soon as the guest can take an external interrupt, or takes the wish back.
    pub(crate) fn request_interrupt_window(&self, on: bool) {
        // SAFETY: as in `exit`.
        unsafe { (*self.run).request_interrupt_window = u8::from(on) };
    }
}

/// A KVM exit, reduced to what becomes a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Io {
        out: bool,
        size: usize,
        port: u16,
        data: Vec<u8>,
    },
    Mmio {
        write: bool,
        gpa: u64,
        data: Vec<u8>,
    },
    ReadMsr {
        index: u32,
        unknown: bool,
    },
    WriteMsr {
        index: u32,
        unknown: bool,
    },
    Eoi(u8),
    Shutdown,
    InterruptWindow,
    Halt,
    Interrupted,
    Other(u32, u32),
}
