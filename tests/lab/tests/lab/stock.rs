//! Stock Debian kernels under the product on lab hosts: life cycle, and moves within a host and between two.
//!
//! Every body runs over the same matrix: back end × kernel × way in × number of vCPUs, of which the second back end has every
//! kernel and every way in, with one vCPU or two. There is no `/dev/mshv` on a lab host; its double answers, over the host's KVM.

use std::path::PathBuf;

use anyhow::{Context, Result};
use lab::{Cpu, Entry, Host, Kernel, Lab};
use libtest_mimic::Trial;

use crate::trial;

/// One cell of the matrix.
#[derive(Clone, Copy)]
pub(crate) struct Guest {
    pub(crate) back_end: BackEnd,
    pub(crate) kernel: Kernel,
    pub(crate) entry: Entry,
    pub(crate) vcpus: u32,
    /// The CPU model in the config.
    pub(crate) model: &'static str,
}

/// What `on` in guest.sh takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum BackEnd {
    Kvm,
    Mshv,
}

impl BackEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Mshv => "mshv",
        }
    }

    /// The beginning of every script.
    pub(crate) fn prelude(self, vcpus: u32) -> String {
        format!("BACK_END={}; VCPUS={vcpus}; . /lab/guest.sh\n", self.name())
    }
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
        for guest in matrix() {
            trials.push(trial(format!("{name}::{}", guest.name()), move || {
                body(guest)
            }));
        }
    }
    for (name, body) in UNLIKE_BODIES {
        for guest in few(BackEnd::Kvm) {
            let guest = Guest {
                model: "portable",
                ..guest
            };
            trials.push(trial(format!("{name}::{}", guest.name()), move || {
                body(guest)
            }));
        }
    }
    trials.push(trial("move_to_an_unlike_host", move_to_an_unlike_host));
    for back_end in [BackEnd::Kvm, BackEnd::Mshv] {
        trials.push(trial(
            format!("back_end_conformance::{}", back_end.name()),
            move || conforms(back_end),
        ));
    }
    trials
}

const KERNELS: [Kernel; 2] = [Kernel::Debian61, Kernel::Debian612];

/// All guests of KVM, and some of the other back end.
fn matrix() -> Vec<Guest> {
    let mut guests = Vec::new();
    for kernel in KERNELS {
        for entry in [Entry::BzImage, Entry::Pvh] {
            for vcpus in [1, 2] {
                guests.push(Guest {
                    back_end: BackEnd::Kvm,
                    kernel,
                    entry,
                    vcpus,
                    model: "host",
                });
            }
        }
    }
    guests.extend(few(BackEnd::Mshv));
    guests
}

/// Every kernel and every way in, and both numbers of vCPUs.
fn few(back_end: BackEnd) -> Vec<Guest> {
    let ways = [(Entry::BzImage, 1), (Entry::Pvh, 2)];
    KERNELS
        .into_iter()
        .flat_map(|kernel| ways.map(|(entry, vcpus)| (kernel, entry, vcpus)))
        .map(|(kernel, entry, vcpus)| Guest {
            back_end,
            kernel,
            entry,
            vcpus,
            model: "host",
        })
        .collect()
}

/// Bodies in which a guest goes from one back end to the other.
const UNLIKE_BODIES: [Body; 2] = [
    ("move_to_mshv_and_back", move_to_mshv_and_back),
    ("move_to_mshv_on_another_host", move_to_mshv_on_another_host),
];

impl Guest {
    pub(crate) fn name(self) -> String {
        format!(
            "{}-{}-{}-{}vcpu",
            self.back_end.name(),
            self.kernel.series(),
            self.entry.name(),
            self.vcpus
        )
    }

    /// The guest's config. The emulator does not intercept XSETBV, hence `noxsave`.
    fn config(self) -> String {
        self.config_with("", "")
    }

    /// With devices (JSON, a comma before it) and kernel parameters (a space before them).
    pub(crate) fn config_with(self, devices: &str, parameters: &str) -> String {
        format!(
            r#"{{
                "payload": {{
                    "kernel": "/guest/kernel", "initramfs": "/guest/initramfs",
                    "cmdline": "console=ttyS0 quiet noxsave panic=-1{parameters}"
                }},
                "cpus": {{ "boot_vcpus": {vcpus}, "max_vcpus": {vcpus}, "model": "{model}" }},
                "memory": {{ "size": 268435456 }},
                "serial": {{ "mode": "Tty" }},
                "console": {{ "mode": "Off" }}{devices}
            }}"#,
            vcpus = self.vcpus,
            model = self.model,
        )
    }

    /// With the vCPUs that there may be, besides those at boot.
    pub(crate) fn config_growing(self, max_vcpus: u32) -> String {
        let max = |vcpus: u32| format!("\"max_vcpus\": {vcpus}");
        self.config().replace(&max(self.vcpus), &max(max_vcpus))
    }

    /// A lab host with the product, this guest and its config.
    pub(crate) fn host(self, cpu: Cpu) -> Result<Host> {
        Ok(bare_host(cpu)?
            .name(&self.name())
            .guest(self.kernel, self.entry)
            .data("vm.json", self.config()))
    }
}

/// A lab host with the product only, and with the double of the other back end.
pub(crate) fn bare_host(cpu: Cpu) -> Result<Host> {
    Ok(Lab::host(cpu)
        .program(&built("vmm", "VMM_BIN", "vmm")?, "bin/vmm")
        .program(
            &built("libmshv_double.so", "MSHV_DOUBLE", "mshv-double")?,
            "lib/libmshv_double.so",
        )
        .data("lab/guest.sh", include_bytes!("guest.sh")))
}

/// What this workspace has built, or what a variable says instead.
pub(crate) fn built(file: &str, variable: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release")).join(file),
        PathBuf::from,
    );
    path.canonicalize()
        .with_context(|| format!("no {}: cargo build --release -p {package}", path.display()))
}

/// Runs a script on one host with the guest in it.
pub(crate) fn on_host(guest: Guest, script: &str) -> Result<()> {
    guest
        .host(Cpu::Max)?
        .run(&(guest.back_end.prelude(guest.vcpus) + script))?
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
    between(guest, Cpu::Max, Cpu::Max, guest.back_end)
}

/// From KVM to the Microsoft hypervisor and back, live.
fn move_to_mshv_and_back(guest: Guest) -> Result<()> {
    on_host(
        guest,
        "boot src
         counts src
         on mshv
         receive mid unix:/tmp/there.sock
         move_away src unix:/tmp/there.sock
         goes_on src.out mid
         on kvm
         receive dst unix:/tmp/back.sock
         move_away mid unix:/tmp/back.sock
         cat /tmp/src.out /tmp/mid.out >/tmp/before.out
         goes_on before.out dst
         tell dst 'poweroff -f'
         ends dst 0",
    )
}

fn move_to_mshv_on_another_host(guest: Guest) -> Result<()> {
    between(guest, Cpu::Max, Cpu::Max, BackEnd::Mshv)
}

/// The conformance suite of the back ends, as a program on a lab host.
fn conforms(back_end: BackEnd) -> Result<()> {
    let script = format!("$preload backend --hypervisor {} 2>&1", back_end.name());
    bare_host(Cpu::Max)?
        .name(back_end.name())
        .program(&built("backend", "BACKEND_BIN", "backend")?, "bin/backend")
        .run(&(back_end.prelude(1) + &script))?
        .success()
}

/// From a host that has less to one that has more: what the guest was given, it keeps.
fn move_to_an_unlike_host() -> Result<()> {
    let guest = Guest {
        back_end: BackEnd::Kvm,
        kernel: Kernel::Debian61,
        entry: Entry::BzImage,
        vcpus: 1,
        model: "host",
    };
    between(
        guest,
        Cpu::Custom("max,-rdseed,-adx,-sha-ni".to_owned()),
        Cpu::Max,
        BackEnd::Kvm,
    )
}

fn between(guest: Guest, from: Cpu, to: Cpu, there: BackEnd) -> Result<()> {
    let source = guest.host(from)?.name(&format!("{} source", guest.name()));
    let destination = bare_host(to)?.name(&format!("{} destination", guest.name()));
    let [source, destination] = Lab::pair(source, destination).run(
        &(guest.back_end.prelude(guest.vcpus)
            + "boot src
               counts src
               await listening
               move_away src tcp:$PEER:4600
               share /tmp/src.out src.out
               await fetched"),
        &(there.prelude(guest.vcpus)
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
