//! Stock Debian kernels under the product on lab hosts: life cycle, and moves within a host and between two.
//!
//! Every body runs over the same matrix: kernel × way in × number of vCPUs.

use std::path::PathBuf;

use anyhow::{Context, Result};
use lab::{Cpu, Entry, Host, Kernel, Lab};
use libtest_mimic::Trial;

use crate::trial;

/// One cell of the matrix.
#[derive(Clone, Copy)]
struct Guest {
    kernel: Kernel,
    entry: Entry,
    vcpus: u32,
}

/// A test's short body and its name.
type Body = (&'static str, fn(Guest) -> Result<()>);

const BODIES: [Body; 4] = [
    ("shell_reboot_shutdown", shell_reboot_shutdown),
    ("power_button", power_button),
    ("move_within_a_host", move_within_a_host),
    ("move_between_hosts", move_between_hosts),
];

/// Every test with a stock guest.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, body) in BODIES {
        for kernel in [Kernel::Debian61, Kernel::Debian612] {
            for entry in [Entry::BzImage, Entry::Pvh] {
                for vcpus in [1, 2] {
                    let guest = Guest {
                        kernel,
                        entry,
                        vcpus,
                    };
                    trials.push(trial(format!("{name}::{}", guest.name()), move || {
                        body(guest)
                    }));
                }
            }
        }
    }
    trials.push(trial("move_to_an_unlike_host", move_to_an_unlike_host));
    trials
}

impl Guest {
    fn name(self) -> String {
        format!(
            "{}-{}-{}vcpu",
            self.kernel.series(),
            self.entry.name(),
            self.vcpus
        )
    }

    /// The guest's config. The emulator does not intercept XSETBV, hence `noxsave`.
    fn config(self) -> String {
        format!(
            r#"{{
                "payload": {{
                    "kernel": "/guest/kernel", "initramfs": "/guest/initramfs",
                    "cmdline": "console=ttyS0 quiet noxsave panic=-1"
                }},
                "cpus": {{ "boot_vcpus": {vcpus}, "max_vcpus": {vcpus} }},
                "memory": {{ "size": 268435456 }},
                "serial": {{ "mode": "Tty" }},
                "console": {{ "mode": "Off" }}
            }}"#,
            vcpus = self.vcpus
        )
    }

    /// A lab host with the product, this guest and its config.
    fn host(self, cpu: Cpu) -> Result<Host> {
        Ok(bare_host(cpu)?
            .name(&self.name())
            .guest(self.kernel, self.entry)
            .data("vm.json", self.config()))
    }
}

/// A lab host with the product only.
fn bare_host(cpu: Cpu) -> Result<Host> {
    let vmm = std::env::var_os("VMM_BIN").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../target/release/vmm"
            ))
        },
        PathBuf::from,
    );
    let vmm = vmm
        .canonicalize()
        .with_context(|| format!("no {}: cargo build --release -p vmm", vmm.display()))?;
    Ok(Lab::host(cpu)
        .program(&vmm, "bin/vmm")
        .data("lab/guest.sh", include_bytes!("guest.sh")))
}

/// Runs a script on one host with the guest in it.
fn on_host(guest: Guest, script: &str) -> Result<()> {
    guest
        .host(Cpu::Max)?
        .run(&format!(". /lab/guest.sh; VCPUS={}\n{script}", guest.vcpus))?
        .success()
}

fn shell_reboot_shutdown(guest: Guest) -> Result<()> {
    on_host(
        guest,
        "boot vm
         shell_works vm
         tell vm 'reboot -f'
         expect vm GUEST-UP 2
         shell_works vm
         tell vm 'poweroff -f'
         ends vm 0",
    )
}

fn power_button(guest: Guest) -> Result<()> {
    on_host(
        guest,
        "boot vm
         expect vm POWER-BUTTON-READY
         vmm ctl --api-socket /tmp/vm.sock power-button >/tmp/ctl.out 2>&1 || fail 'the power button'
         expect vm POWER-BUTTON-PRESSED
         ends vm 0",
    )
}

fn move_within_a_host(guest: Guest) -> Result<()> {
    on_host(
        guest,
        "boot src
         counts src
         receive dst unix:/tmp/move.sock
         move_away src unix:/tmp/move.sock
         goes_on src.out dst
         tell dst 'poweroff -f'
         ends dst 0",
    )
}

fn move_between_hosts(guest: Guest) -> Result<()> {
    between(guest, Cpu::Max, Cpu::Max)
}

/// From a host that has less to one that has more: what the guest was given, it keeps.
fn move_to_an_unlike_host() -> Result<()> {
    let guest = Guest {
        kernel: Kernel::Debian61,
        entry: Entry::BzImage,
        vcpus: 1,
    };
    between(
        guest,
        Cpu::Custom("max,-rdseed,-adx,-sha-ni".to_owned()),
        Cpu::Max,
    )
}

fn between(guest: Guest, from: Cpu, to: Cpu) -> Result<()> {
    let source = guest.host(from)?.name(&format!("{} source", guest.name()));
    let destination = bare_host(to)?.name(&format!("{} destination", guest.name()));
    let prelude = format!(". /lab/guest.sh; VCPUS={}\n", guest.vcpus);
    let [source, destination] = Lab::pair(source, destination).run(
        &(prelude.clone()
            + "boot src
               counts src
               await listening
               move_away src tcp:$PEER:4600
               share /tmp/src.out src.out
               await fetched"),
        &(prelude
            + "receive dst tcp:0.0.0.0:4600
               signal listening
               await src.out /tmp/src.log
               signal fetched
               goes_on src.log dst
               tell dst 'poweroff -f'
               ends dst 0"),
    )?;
    source.success()?;
    destination.success()
}
