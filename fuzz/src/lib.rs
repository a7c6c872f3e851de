//! Fuzz targets: guests that write nonsense into rings, BARs and configuration space, and whatever else comes from those who may mean harm.
//!
//! ```text
//!   cargo fuzz run --sanitizer none block          for hours, by whoever changes a device
//!   cargo xtask test fuzz                          all inputs in corpus/, then some seconds of each target
//!     │
//!     fuzz_targets/NAME.rs ─► Target::run ─┬─ pci, transport, block, net, console, rng, balloon, vsock ─► machine
//!                                          ├─ serial, ioapic, legacy ────────────────────────────────► registers
//!                                          ├─ states: saved states of every device                     states
//!                                          └─ wire: the protocol of moves, snapshots                   wire
//! ```
//!
//! An input is a row of things that guest and host do ([`input`]); the same input always leads to the same calls, for queues have no
//! threads here (the feature `fuzzing` of `devices`). What must hold, besides that nothing panics:
//!
//! - Nothing overflows unnoticed: the targets are built with overflow checks and debug assertions.
//! - Guest memory is not left: it lies between pages whose access ends the process ([`ram`]).
//! - Nothing takes for ever (libFuzzer's `-timeout`) or allocates without bound ([`limits`]).
//! - Whatever a guest has brought about can be saved, restored, and is the same then.
//! - After it all a reset makes every device usable: well-formed requests succeed.
//!
//! `corpus/NAME/seed-*` is a well-formed session or a state of an earlier build, from where the search begins: [`seeds`] writes those that
//! are not there yet. An input that has found something is kept beside them as `found-*`, and has a test of its own where the fault was.

pub mod input;
pub mod limits;
pub mod machine;
pub mod queue;
pub mod ram;
pub mod registers;
#[cfg(test)]
mod seeds;
pub mod states;
pub mod subjects;
pub mod wire;

use std::sync::Once;

use machine::Machine;

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Three functions on a bus: configuration space, BARs over each other, MSI-X, slots.
    Pci,
    /// The virtio transport and its queues, with a device that only copies.
    Transport,
    /// A disk.
    Block,
    /// A network device.
    Net,
    /// A console.
    Console,
    /// Randomness.
    Rng,
    /// A balloon.
    Balloon,
    /// Streams.
    Vsock,
    /// A serial port.
    Serial,
    /// The I/O APIC.
    Ioapic,
    /// The clock, the keyboard controller, power and hotplug registers, pvpanic.
    Legacy,
    /// Saved states.
    States,
    /// Moves and snapshots.
    Wire,
}

impl Target {
    /// Runs an input; returns how many requests devices have finished in it. Panics if something is wrong.
    pub fn run(self, data: &[u8]) -> u64 {
        prepare();
        let devices = match self {
            Self::Pci => {
                let ram = ram::fresh();
                let all = vec![subjects::echo(), subjects::rng(), subjects::balloon(&ram)];
                return Machine::on(ram, all).run(data);
            }
            Self::Balloon => {
                let ram = ram::fresh();
                let balloon = subjects::balloon(&ram);
                return Machine::on(ram, vec![balloon]).run(data);
            }
            Self::Block => {
                let (read_only, data) = match data.split_first() {
                    Some((first, rest)) => (first & 1 != 0, rest),
                    None => (false, data),
                };
                return Machine::new(vec![subjects::block(read_only)]).run(data);
            }
            Self::Transport => subjects::echo(),
            Self::Net => subjects::net(),
            Self::Console => subjects::console(),
            Self::Rng => subjects::rng(),
            Self::Vsock => subjects::vsock(),
            Self::Serial => return registers::run(registers::SerialPort::default(), data),
            Self::Ioapic => return registers::run(registers::Apic::default(), data),
            Self::Legacy => return registers::run(registers::Small::default(), data),
            Self::States => return states::run(data),
            Self::Wire => return wire::run(data),
        };
        Machine::new(vec![devices]).run(data)
    }
}

/// One processor: with more, a disk's thread would look for work for a while before it sleeps, and cost the search its speed.
fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut one = rustix::thread::CpuSet::new();
        one.set(rustix::thread::sched_getcpu());
        // Without it all is as right, and slower.
        let _ = rustix::thread::sched_setaffinity(None, &one);
    });
}
