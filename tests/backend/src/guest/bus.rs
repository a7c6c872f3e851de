//! The devices that a guest talks to: they note everything, and remember what was written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::{ExitBus, Vcpu, VcpuKick};

/// Writing to this port ends [`super::Guest::run`].
pub const STOP_PORT: u16 = 0xf4;

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read of a port, with its size in bytes.
    In(u16, usize),
    /// A write to a port.
    Out(u16, Vec<u8>),
    /// A read of device memory, with its size in bytes.
    Read(u64, usize),
    /// A write to device memory.
    Write(u64, Vec<u8>),
    /// The end of a level-triggered interrupt, by its vector.
    EndOfInterrupt(u8),
}

/// Notes every access, and kicks the vCPU at [`STOP_PORT`] and at an end of interrupt. Ports answer what was set, device memory
/// what was set or last written; the rest is all ones.
pub struct Bus {
    log: Mutex<Vec<Access>>,
    ports: Mutex<HashMap<u16, u32>>,
    memory: Mutex<HashMap<u64, u8>>,
    /// The vCPU that the bus belongs to.
    pub kick: Arc<dyn VcpuKick>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// The bus of a vCPU.
    pub fn new(vcpu: &dyn Vcpu) -> Self {
        Self {
            log: Mutex::default(),
            ports: Mutex::default(),
            memory: Mutex::default(),
            kick: vcpu.kick_handle(),
        }
    }

    /// Makes a port answer with the low bytes of a value.
    pub fn set_port(&self, port: u16, value: u32) {
        lock(&self.ports).insert(port, value);
    }

    /// Makes device memory answer with these bytes.
    pub fn set_memory(&self, gpa: u64, bytes: &[u8]) {
        lock(&self.memory).extend((gpa..).zip(bytes.iter().copied()));
    }

    /// What device memory answers now.
    pub fn memory<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let memory = lock(&self.memory);
        std::array::from_fn(|i| memory.get(&(gpa + i as u64)).copied().unwrap_or(0xff))
    }

    /// What was done since the last call.
    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut lock(&self.log))
    }

    fn note(&self, access: Access) {
        lock(&self.log).push(access);
    }
}

impl ExitBus for Bus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        if let Some(value) = lock(&self.ports).get(&port) {
            data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        }
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
        let memory = lock(&self.memory);
        for (at, byte) in (gpa..).zip(data) {
            if let Some(known) = memory.get(&at) {
                *byte = *known;
            }
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::Write(gpa, data.to_vec()));
        self.set_memory(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.note(Access::EndOfInterrupt(vector));
        self.kick.kick();
    }
}
