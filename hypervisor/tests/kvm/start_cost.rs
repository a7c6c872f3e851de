//! How long each step up to the first guest instruction takes: figures to look at, not assertions.
//!
//! `cargo test --release -p hypervisor --test kvm start_cost -- --ignored --nocapture`

use std::time::Instant;

use backend::guest::{Bus, RAM, Ram, cpuid};
use hypervisor::{Hypervisor as _, VmOptions, kvm::Kvm};

use crate::kvm;

#[test]
#[ignore = "prints figures"]
fn start_cost() {
    if kvm().is_none() {
        return;
    }
    const ROUNDS: usize = 20;
    let steps = [
        "open",
        "supported_cpuid",
        "create_vm",
        "map_memory",
        "create_vcpu",
        "set_cpuid",
        "save",
        "save again",
        "restore",
        "kicked run",
        "drop",
    ];
    let mut times = vec![Vec::new(); steps.len()];
    for _ in 0..ROUNDS {
        let mut mark = Instant::now();
        let mut step = 0;
        let mut lap = || {
            times[step].push(mark.elapsed().as_nanos() / 1000);
            step += 1;
            mark = Instant::now();
        };
        let kvm = Kvm::open().expect("open");
        lap();
        let table = cpuid(&kvm, 0).expect("CPUID");
        lap();
        let vm = kvm
            .create_vm(&VmOptions {
                ioapic_pins: 24,
                hyperv: false,
                apic_timer_hz: None,
            })
            .expect("create a machine");
        lap();
        let ram = Ram::new(RAM);
        // SAFETY: dropped after the machine, below.
        unsafe { vm.map_memory(ram.slot(0, 0)) }.expect("map");
        lap();
        let mut vcpu = vm.create_vcpu(0).expect("create a vCPU");
        lap();
        vcpu.set_cpuid(&table).expect("set CPUID");
        lap();
        let state = vcpu.save_state().expect("save");
        lap();
        vcpu.save_state().expect("save");
        lap();
        vcpu.restore_state(&state).expect("restore");
        lap();
        let bus = Bus::new(&*vcpu);
        bus.kick.kick();
        vcpu.run(&bus).expect("run");
        lap();
        drop((vcpu, vm));
        lap();
        drop(ram);
    }
    for (step, mut times) in steps.iter().zip(times) {
        times.sort_unstable();
        println!(
            "{step:>16}: median {:>6} µs, best {:>6} µs",
            times[ROUNDS / 2],
            times[0]
        );
    }
}
