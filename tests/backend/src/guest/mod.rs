//! A machine with little memory and one vCPU, and the bus that it talks to.
//!
//! ```text
//!   0x0000 vectors of real mode   0x5000 TSS, I/O bitmap   0x10000 what handlers noted
//!   0x1000 CODE                   0x7100 stack, up to STACK 0x11000 handlers
//!   0x2000 DATA                   0x9000 page tables        0x13000 … 2 MiB: free
//!   0x3000 MORE_DATA              0xe000 IDT
//!   0x4000 GDT                    0xf000 stack of ring 0
//!   0x2000_0000 MMIO, 0x3000_0000 …: nothing is there; all of the first GiB is mapped one to one, and the local APIC
//! ```

mod assemble;
mod bus;
mod handlers;
mod ram;
mod tables;

use std::sync::Arc;

use arch::x86_64::cpuid::{Cpuid, for_vcpu};
use arch::x86_64::state::VcpuState;
use arch::x86_64::topology::Topology;
use hypervisor::{Hypervisor, MemorySlot, Vcpu, VcpuExit, Vm, VmOptions};

pub use assemble::{Code, Idioms, assemble};
pub use bus::{Access, Bus, STOP_PORT};
pub use handlers::Fault;
pub use ram::Ram;
pub use tables::{
    BASED, CODE_BASED, CODE16, CODE32, CODE64, DATA as DATA_SELECTOR, DATA_BASED, DATA16,
    USER_CODE32, USER_CODE64, USER_DATA, loaded, segment,
};

use crate::outcome::{Outcome, ensure, fail};
use crate::watchdog;

/// Bytes of guest memory, from address 0 on.
pub const RAM: u64 = 2 << 20;
/// Where the code lies.
pub const CODE: u64 = 0x1000;
/// Where a guest leaves results.
pub const DATA: u64 = 0x2000;
/// Where a guest finds things.
pub const MORE_DATA: u64 = 0x3000;
/// Top of the stack.
pub const STACK: u64 = 0x8000;
/// Device memory: no slot is there, and the first GiB is mapped.
pub const MMIO: u64 = 0x2000_0000;
/// The local APIC's registers.
pub const APIC: u64 = 0xfee0_0000;

/// RFLAGS.IOPL = 3: ring 3 may use ports. Not every host honours it, nor does every one look at the TSS's bitmap (QEMU's emulator
/// does not, in a nested guest), so that both allow.
pub const IOPL_3: u64 = 0x3000;

/// The machine. Its memory goes last.
pub struct Guest {
    /// vCPU 0.
    pub vcpu: Box<dyn Vcpu>,
    /// What vCPU 0 talks to.
    pub bus: Bus,
    /// The machine that the vCPU is in.
    pub vm: Arc<dyn Vm>,
    /// The slot of the memory.
    pub slot: MemorySlot,
    /// The memory.
    pub ram: Ram,
}

impl Guest {
    /// A machine with memory, tables and handlers, and a vCPU as after reset.
    pub fn new(hypervisor: &dyn Hypervisor) -> Outcome<Self> {
        Self::with_cpuid(hypervisor, &cpuid(hypervisor, 0)?)
    }

    /// The same with another CPUID.
    pub fn with_cpuid(hypervisor: &dyn Hypervisor, cpuid: &Cpuid) -> Outcome<Self> {
        let vm = hypervisor.create_vm(&VmOptions {
            ioapic_pins: 24,
            hyperv: false,
            apic_timer_hz: None,
        })?;
        let ram = Ram::new(RAM);
        tables::write(&ram)?;
        let slot = ram.slot(0, 0);
        // SAFETY: `ram` outlives the machine: it is the last field.
        unsafe { vm.map_memory(slot)? };
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid(cpuid)?;
        let bus = Bus::new(&*vcpu);
        Ok(Self {
            vcpu,
            bus,
            vm,
            slot,
            ram,
        })
    }

    /// A further vCPU, with a bus of its own.
    pub fn add_vcpu(&self, hypervisor: &dyn Hypervisor, id: u32) -> Outcome<(Box<dyn Vcpu>, Bus)> {
        let mut vcpu = self.vm.create_vcpu(id)?;
        vcpu.set_cpuid(&cpuid(hypervisor, id)?)?;
        let bus = Bus::new(&*vcpu);
        Ok((vcpu, bus))
    }

    /// Changes the vCPU's state.
    pub fn change(&mut self, change: impl FnOnce(&mut VcpuState)) -> Outcome {
        let mut state = self.vcpu.save_state()?;
        change(&mut state);
        Ok(self.vcpu.restore_state(&state)?)
    }

    /// Puts code for a mode of `bits` bits at an address.
    pub fn place(&self, bits: u32, at: u64, code: Code<'_>) -> Outcome {
        self.ram.write(at, &assemble(bits, at, code)?);
        Ok(())
    }

    /// 16-bit code, all segments at 0.
    pub fn real(hypervisor: &dyn Hypervisor, code: Code<'_>) -> Outcome<Self> {
        let mut guest = Self::new(hypervisor)?;
        guest.place(16, CODE, code)?;
        guest.enter_real_mode()?;
        Ok(guest)
    }

    /// 32-bit code in protected mode without paging, in flat segments.
    pub fn protected(hypervisor: &dyn Hypervisor, code: Code<'_>) -> Outcome<Self> {
        let mut guest = Self::new(hypervisor)?;
        guest.place(32, CODE, code)?;
        guest.enter_protected_mode(CODE32)?;
        Ok(guest)
    }

    /// 64-bit code in ring 0.
    pub fn long(hypervisor: &dyn Hypervisor, code: Code<'_>) -> Outcome<Self> {
        Self::in_ring(hypervisor, 0, code)
    }

    /// 64-bit code in ring 3.
    pub fn user(hypervisor: &dyn Hypervisor, code: Code<'_>) -> Outcome<Self> {
        Self::in_ring(hypervisor, 3, code)
    }

    /// 64-bit code in a ring, 0 or 3.
    pub fn in_ring(hypervisor: &dyn Hypervisor, ring: u16, code: Code<'_>) -> Outcome<Self> {
        let mut guest = Self::new(hypervisor)?;
        guest.place(64, CODE, code)?;
        guest.enter_long_mode(ring)?;
        Ok(guest)
    }

    /// Puts the vCPU into real mode, all segments at 0.
    pub fn enter_real_mode(&mut self) -> Outcome {
        self.change(|state| {
            let s = &mut state.special;
            for segment in [&mut s.cs, &mut s.ds, &mut s.es, &mut s.ss] {
                (segment.selector, segment.base) = (0, 0);
            }
            start(state);
        })
    }

    /// Puts the vCPU into protected mode without paging, with this code segment and flat data.
    pub fn enter_protected_mode(&mut self, code: u16) -> Outcome {
        self.change(|state| {
            tables::enter_protected_mode(&mut state.special, code);
            start(state);
        })
    }

    /// Puts the vCPU into long mode.
    pub fn enter_long_mode(&mut self, ring: u16) -> Outcome {
        self.change(|state| {
            tables::enter_long_mode(&mut state.special, ring);
            start(state);
            if ring == 3 {
                state.general.rflags |= IOPL_3;
            }
        })
    }

    /// Maps a 2 MiB page of guest-virtual addresses below 2 GiB to another place. A page that was mapped must not have been used.
    pub fn map_2m(&self, virtual_address: u64, gpa: u64) {
        tables::map_2m(&self.ram, virtual_address, gpa);
    }

    /// Gives a vector of long mode a handler of its own.
    pub fn handle(&self, vector: u8, handler: u64) {
        tables::gate(&self.ram, vector, handler);
    }

    /// Forbids a port to ring 3.
    pub fn deny_port(&self, port: u16) {
        tables::deny_port(&self.ram, port);
    }

    /// Software-enables the local APIC, with spurious vector 0xff (SDM vol. 3, section 11.9).
    pub fn enable_apic(&mut self) -> Outcome {
        let mut state = self.vcpu.save_state()?;
        let Some(lapic) = &mut state.lapic else {
            return fail("the state has no local APIC");
        };
        lapic.registers.0[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
        Ok(self.vcpu.restore_state(&state)?)
    }

    /// Runs until something happens.
    pub fn exit(&mut self) -> Outcome<VcpuExit> {
        watchdog::run(&mut *self.vcpu, &self.bus)
    }

    /// Runs until the guest writes to [`STOP_PORT`], or until a kick.
    pub fn run(&mut self) -> Outcome {
        self.until_stop()?;
        if handlers::faults(&self.ram) != 0 {
            return fail(format!(
                "an exception in the guest: {:x?}",
                handlers::take_fault(&self.ram)
            ));
        }
        Ok(())
    }

    /// Runs until the guest suffers an exception. A further run returns from its handler.
    pub fn run_to_fault(&mut self) -> Outcome<Fault> {
        self.until_stop()?;
        self.fault()
    }

    /// The exception that the guest's handler has noted.
    pub fn fault(&self) -> Outcome<Fault> {
        ensure!(
            handlers::faults(&self.ram) == 1,
            "the guest stopped without an exception: {}",
            watchdog::place(&*self.vcpu)
        );
        Ok(handlers::take_fault(&self.ram))
    }

    fn until_stop(&mut self) -> Outcome {
        match self.exit()? {
            VcpuExit::Interrupted => Ok(()),
            VcpuExit::Fault(details) => fail(format!("the guest cannot go on: {details}")),
            other => fail(format!("{other:?}, {}", watchdog::place(&*self.vcpu))),
        }
    }

    /// Makes the handler of exceptions return to another place.
    pub fn resume_at(&self, rip: u64) {
        handlers::resume_at(&self.ram, rip);
    }

    /// Makes the handler of exceptions return with other flags.
    pub fn resume_with_flags(&self, rflags: u64) {
        handlers::resume_with_flags(&self.ram, rflags);
    }

    /// Whether the handler of interrupts in long mode stops after each.
    pub fn stop_at_interrupts(&self, stop: bool) {
        handlers::stop_at_interrupts(&self.ram, stop);
    }

    /// How often the handler of interrupts saw a vector (32 to 255, or 2: NMI).
    pub fn interrupts(&self, vector: u8) -> u64 {
        handlers::count(&self.ram, vector)
    }
}

/// At the first instruction, interrupts off.
fn start(state: &mut VcpuState) {
    (state.general.rip, state.general.rsp, state.general.rflags) = (CODE, STACK, 2);
}

/// What vCPU `id` of two is shown: all that the host supports.
pub fn cpuid(hypervisor: &dyn Hypervisor, id: u32) -> Outcome<Cpuid> {
    Ok(for_vcpu(
        &hypervisor.supported_cpuid()?,
        &Topology::flat(2),
        id,
    ))
}
