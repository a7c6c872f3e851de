//! A machine with little memory and one vCPU, and the bus that it talks to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::{Segment, VcpuState};
use hypervisor::{ExitBus, Hypervisor, MemorySlot, Vcpu, VcpuExit, VcpuKick, Vm, VmOptions};

/// Bytes of guest memory, from address 0 on.
pub(crate) const RAM: u64 = 2 << 20;
/// Where the code lies.
pub(crate) const CODE: u64 = 0x1000;
/// Where a guest leaves results.
pub(crate) const DATA: u64 = 0x2000;
/// Writing to this port ends [`Guest::run`].
pub(crate) const STOP_PORT: u16 = 0xf4;
/// 64-bit code that writes to [`STOP_PORT`] and goes on behind.
pub(crate) const STOP64: [u8; 6] = [0xba, 0xf4, 0, 0, 0, 0xee];
/// 16-bit code that writes to [`STOP_PORT`] and goes on behind.
pub(crate) const STOP16: [u8; 4] = [0xba, 0xf4, 0, 0xee];
/// An endless loop, in any mode.
pub(crate) const SPIN: [u8; 2] = [0xeb, 0xfe];

/// KVM, or a printed reason why there is none.
pub(crate) fn kvm() -> Option<Box<dyn Hypervisor>> {
    match hypervisor::open_default() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
    }
}

/// Memory of this process that a guest uses.
pub(crate) struct Ram {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is not tied to a thread; accesses are volatile.
unsafe impl Sync for Ram {}
// SAFETY: as above.
unsafe impl Send for Ram {}

impl Ram {
    pub(crate) fn new(len: u64) -> Self {
        let len = len as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self {
            start: start.cast(),
            len,
        }
    }

    pub(crate) fn slot(&self, slot: u32, gpa: u64) -> MemorySlot {
        MemorySlot {
            slot,
            gpa,
            len: self.len as u64,
            hva: self.start as u64,
            read_only: false,
        }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.len);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, as just checked.
            unsafe { self.start.add(at as usize + i).write_volatile(*byte) };
        }
    }

    pub(crate) fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        assert!(at as usize + N <= self.len);
        // SAFETY: inside the mapping, as just checked.
        std::array::from_fn(|i| unsafe { self.start.add(at as usize + i).read_volatile() })
    }

    pub(crate) fn read_u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at))
    }

    pub(crate) fn read_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the machine that used it is gone (see the order of `Guest`'s fields).
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    EndOfInterrupt(u8),
}

/// Notes every access, answers reads from a table, and kicks the vCPU at [`STOP_PORT`] and at an end of interrupt.
pub(crate) struct Bus {
    pub log: Mutex<Vec<Access>>,
    pub answers: Mutex<HashMap<u64, u64>>,
    pub kick: Arc<dyn VcpuKick>,
}

impl Bus {
    pub(crate) fn new(vcpu: &dyn Vcpu) -> Self {
        Self {
            log: Mutex::default(),
            answers: Mutex::default(),
            kick: vcpu.kick_handle(),
        }
    }

    fn note(&self, access: Access) {
        self.log.lock().expect("no panic elsewhere").push(access);
    }

    fn answer(&self, at: u64, data: &mut [u8]) {
        if let Some(value) = self.answers.lock().expect("no panic elsewhere").get(&at) {
            data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        }
    }

    pub(crate) fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.log.lock().expect("no panic elsewhere"))
    }
}

impl ExitBus for Bus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        self.answer(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == STOP_PORT {
            self.kick.kick();
        } else {
            self.note(Access::Out(port, data.to_vec()));
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.note(Access::Read(gpa, data.len()));
        self.answer(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::Write(gpa, data.to_vec()));
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.note(Access::EndOfInterrupt(vector));
        self.kick.kick();
    }
}

/// The machine. Its memory goes last.
pub(crate) struct Guest {
    pub vcpu: Box<dyn Vcpu>,
    pub bus: Bus,
    pub vm: Arc<dyn Vm>,
    pub slot: MemorySlot,
    pub ram: Ram,
}

impl Guest {
    /// A machine with memory and a vCPU as after reset.
    pub(crate) fn new(kvm: &dyn Hypervisor) -> Self {
        let vm = kvm
            .create_vm(&VmOptions {
                ioapic_pins: 24,
                hyperv: false,
            })
            .expect("create a machine");
        let ram = Ram::new(RAM);
        let slot = ram.slot(0, 0);
        // SAFETY: `ram` outlives the machine: it is the last field.
        unsafe { vm.map_memory(slot) }.expect("map memory");
        let mut vcpu = vm.create_vcpu(0).expect("create a vCPU");
        vcpu.set_cpuid(&cpuid(kvm)).expect("set CPUID");
        let bus = Bus::new(&*vcpu);
        Self {
            vcpu,
            bus,
            vm,
            slot,
            ram,
        }
    }

    /// Changes the vCPU's state.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut VcpuState)) {
        let mut state = self.vcpu.save_state().expect("save");
        change(&mut state);
        self.vcpu.restore_state(&state).expect("restore");
    }

    /// 16-bit code, all segments at 0.
    pub(crate) fn real_mode(kvm: &dyn Hypervisor, code: &[u8]) -> Self {
        let mut guest = Self::new(kvm);
        guest.ram.write(CODE, code);
        guest.change(|state| {
            let s = &mut state.special;
            for segment in [&mut s.cs, &mut s.ds, &mut s.es, &mut s.ss] {
                (segment.selector, segment.base) = (0, 0);
            }
            (state.general.rip, state.general.rsp, state.general.rflags) = (CODE, 0x8000, 2);
        });
        guest
    }

    /// 64-bit code in ring 0; the first GiB is mapped one to one.
    pub(crate) fn long_mode(kvm: &dyn Hypervisor, code: &[u8]) -> Self {
        let mut guest = Self::new(kvm);
        guest.ram.write(CODE, code);
        guest.enter_long_mode(0);
        guest
    }

    /// 64-bit code in ring 3.
    pub(crate) fn user_mode(kvm: &dyn Hypervisor, code: &[u8]) -> Self {
        let mut guest = Self::new(kvm);
        guest.ram.write(CODE, code);
        guest.enter_long_mode(3);
        guest
    }

    fn enter_long_mode(&mut self, ring: u16) {
        // Present, writable, user, accessed, dirty: the processor never needs to write to the tables.
        const TABLE: u64 = 0x67;
        const PAGE_2M: u64 = 0xe7;
        self.ram.write(0x9000, &(0xa000 | TABLE).to_le_bytes());
        self.ram.write(0xa000, &(0xb000 | TABLE).to_le_bytes());
        for index in 0..512u64 {
            self.ram
                .write(0xb000 + index * 8, &(index << 21 | PAGE_2M).to_le_bytes());
        }
        self.change(|state| {
            let dpl = u32::from(ring) << 5;
            let segment = |selector: u16, access: u32| Segment {
                selector,
                base: 0,
                limit: u32::MAX,
                access,
            };
            let s = &mut state.special;
            s.cs = segment(8 | ring, 0xa09b | dpl);
            let data = segment(16 | ring, 0xc093 | dpl);
            (s.ds, s.es, s.ss, s.fs, s.gs) = (data, data, data, data, data);
            s.tr = Segment {
                selector: 24,
                base: 0,
                limit: 0x67,
                access: 0x8b,
            };
            (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0031, 0x9000, 0x20, 0x500);
            (state.general.rip, state.general.rsp, state.general.rflags) = (CODE, 0x8000, 2);
        });
    }

    /// Runs until the guest writes to [`STOP_PORT`].
    pub(crate) fn run(&mut self) {
        let exit = self.vcpu.run(&self.bus).expect("run");
        assert!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
    }
}

/// What the guest is shown: all that the host supports, with APIC id 0.
pub(crate) fn cpuid(kvm: &dyn Hypervisor) -> Cpuid {
    let mut cpuid = kvm.supported_cpuid().expect("supported CPUID");
    for entry in &mut cpuid.entries {
        match entry.leaf {
            1 => entry.ebx &= 0x00ff_ffff,
            0xb | 0x1f => entry.edx = 0,
            _ => {}
        }
    }
    cpuid
}

/// Joins pieces of code.
pub(crate) fn code(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}
