//! The machine as the destination of a move: built from a manifest, not running until the commit.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use arch::x86_64::cpu_model::HostOffer;
use hypervisor::HypervisorKind;
use memory::GuestRam;
use migration::{
    DestinationMachine, MachineError, MachineState, Manifest, Refusal, RefusalKind, RunState,
};

use super::Event;
use super::instance::{BuildError, Instance, Plan};
use crate::config::{SerialConfig, SerialMode, VmConfig};

/// A machine on its way in.
pub(super) struct MovingIn {
    machine: u64,
    hypervisor: Option<HypervisorKind>,
    /// A TSC of another frequency is better than no guest.
    tsc_may_change: bool,
    /// It gets one.
    tsc_changes: bool,
    ends: Ends,
    events: Sender<Event>,
    instance: Option<Arc<Instance>>,
    run_state: RunState,
}

/// Where the guest's devices lead at this host.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) serial: Option<SerialConfig>,
    pub(super) console: Option<SerialConfig>,
    pub(super) vsock: Option<PathBuf>,
    pub(super) disks: BTreeMap<String, PathBuf>,
    pub(super) taps: BTreeMap<String, String>,
    pub(super) trust_source: bool,
}

impl Ends {
    /// Whoever connects must not choose which files and interfaces of this host are used, unless the operator lets it.
    fn apply(&self, config: &mut VmConfig) -> Result<(), Refusal> {
        let untold = |what: &str, id: &str, option: &str| {
            let detail = format!(
                "{what} {id} leads to a file or interface of the source's host: say where it leads at the destination ({option}), or \
                 that the source may say it (`--trust-source`)"
            );
            refuse(RefusalKind::Device, detail)
        };
        for disk in &mut config.disks {
            let id = disk.id.clone().unwrap_or_default();
            match self.disks.get(&id) {
                Some(path) => disk.path.clone_from(path),
                None if self.trust_source => {}
                None => return Err(untold("disk", &id, "`vmm receive --disk ID=PATH`")),
            }
        }
        for net in &mut config.net {
            let id = net.id.clone().unwrap_or_default();
            match self.taps.get(&id) {
                // Its addresses are this host's: who chooses them can draw the host's traffic to the guest.
                Some(_)
                    if !self.trust_source
                        && (net.ip.is_some() || net.mask.is_some() || net.host_mac.is_some()) =>
                {
                    let detail = format!(
                        "network interface {id} gives addresses to the host's end: say that the source may do so (`--trust-source`), or \
                         leave `ip`, `mask` and `host_mac` out of its config and set the interface up at each host"
                    );
                    return Err(refuse(RefusalKind::Device, detail));
                }
                Some(tap) => net.tap = Some(tap.clone()),
                None if self.trust_source => {}
                // A new interface without a name harms nobody.
                None if net.tap.is_none() && net.ip.is_none() => {}
                None => {
                    return Err(untold(
                        "network interface",
                        &id,
                        "`vmm receive --tap ID=NAME`",
                    ));
                }
            }
        }
        if let Some(vsock) = &mut config.vsock {
            match &self.vsock {
                Some(path) => vsock.socket.clone_from(path),
                None if self.trust_source => {}
                None => {
                    return Err(untold(
                        "vsock",
                        &vsock.socket.display().to_string(),
                        "`vmm receive --vsock PATH`",
                    ));
                }
            }
        }
        if config.rng.src != crate::config::urandom() && !self.trust_source {
            return Err(untold(
                "the source of random numbers",
                &config.rng.src.display().to_string(),
                "there is no option for it",
            ));
        }
        Ok(())
    }
}

/// A machine that has arrived.
pub(crate) struct Arrived {
    pub(super) instance: Arc<Instance>,
    pub(super) run_state: RunState,
}

impl MovingIn {
    pub(super) fn new(
        machine: u64,
        hypervisor: Option<HypervisorKind>,
        tsc_may_change: bool,
        ends: Ends,
        events: Sender<Event>,
    ) -> Self {
        Self {
            machine,
            hypervisor,
            tsc_may_change,
            tsc_changes: false,
            ends,
            events,
            instance: None,
            run_state: RunState::Paused,
        }
    }

    /// What arrived, after a move that succeeded.
    pub(super) fn into_arrived(mut self) -> Option<Arrived> {
        let instance = self.instance.take()?;
        Some(Arrived {
            instance,
            run_state: self.run_state,
        })
    }

    /// The machine's config, as it is here.
    fn config(&self, manifest: &Manifest) -> Result<VmConfig, Refusal> {
        let mut config = VmConfig::from_peer(manifest.config.as_bytes())
            .map_err(|e| refuse(RefusalKind::Config, e.to_string()))?;
        // Which hypervisor the source's host has says nothing about this one.
        config.hypervisor = self.hypervisor;
        let here = [
            (
                "serial port",
                "serial",
                &mut config.serial,
                &self.ends.serial,
            ),
            (
                "console",
                "console",
                &mut config.console,
                &self.ends.console,
            ),
        ];
        for (what, option, end, wanted) in here {
            match wanted {
                // A device cannot come or go with a move, as a serial port can.
                Some(wanted)
                    if option == "console"
                        && (wanted.mode == SerialMode::Off) != (end.mode == SerialMode::Off) =>
                {
                    let detail =
                        "the guest has a console where none is wanted here, or the other way round"
                            .to_owned();
                    return Err(refuse(RefusalKind::Device, detail));
                }
                Some(wanted) => end.clone_from(wanted),
                // Whoever connects must not choose which files of this host are made or written.
                None if matches!(end.mode, SerialMode::File | SerialMode::Socket)
                    && !self.ends.trust_source =>
                {
                    return Err(refuse(
                        RefusalKind::Device,
                        format!(
                            "the guest's {what} leads to a file or socket of the source's host: say where it leads at the \
                             destination (`vmm receive --{option} …`, or `{option}` in vm.receive-migration)"
                        ),
                    ));
                }
                None => {}
            }
        }
        self.ends.apply(&mut config)?;
        if manifest.vcpus != config.cpus.boot_vcpus {
            return Err(refuse(
                RefusalKind::Config,
                format!(
                    "the manifest has {} vCPUs but its config {}",
                    manifest.vcpus, config.cpus.boot_vcpus
                ),
            ));
        }
        Ok(config)
    }

    fn build(&self, config: VmConfig, manifest: &Manifest) -> Result<Instance, Refusal> {
        let mut contract = manifest.cpu.clone();
        if self.tsc_changes {
            contract.tsc_khz = None;
        }
        let plan = Plan::arriving(config, contract);
        let ranges = plan
            .ram_ranges()
            .map_err(|e| refuse(RefusalKind::Memory, e.to_string()))?;
        if ranges != manifest.memory {
            return Err(refuse(
                RefusalKind::Memory,
                "the guest's memory layout differs from the one this version makes of its config"
                    .into(),
            ));
        }
        Instance::build(plan, self.machine, &self.events).map_err(|error| {
            let kind = match &error {
                BuildError::Config(_) => RefusalKind::Config,
                BuildError::Memory(_) => RefusalKind::Memory,
                BuildError::NotGiven { .. } => RefusalKind::Cpu,
                BuildError::Hypervisor(_) => RefusalKind::Hypervisor,
                _ => RefusalKind::Device,
            };
            refuse(kind, super::error_chain(&error))
        })
    }
}

fn refuse(kind: RefusalKind, detail: String) -> Refusal {
    Refusal { kind, detail }
}

impl MovingIn {
    /// Why this host cannot be what the guest was told that its processor is; nothing if it can.
    fn cpu_refusals(
        &mut self,
        config: &VmConfig,
        manifest: &Manifest,
    ) -> hypervisor::Result<Vec<Refusal>> {
        let hypervisor = super::instance::open_hypervisor(config.hypervisor)?;
        let timer = hypervisor.apic_timer()?;
        let contract = &manifest.cpu;
        let offer = HostOffer {
            cpuid: crate::cpu::offered(&*hypervisor, contract.interface())?,
            feature_msrs: hypervisor.feature_msrs()?,
            msrs: hypervisor.msr_indices()?,
            tsc_khz: hypervisor.tsc_khz()?,
            tsc_scaling: hypervisor.capabilities().tsc_scaling,
            tsc_may_change: self.tsc_may_change,
            apic_timer_hz: timer.map(|timer| timer.hz),
            apic_timer_adjustable: timer.is_some_and(|timer| timer.adjustable),
            same_hypervisor: manifest.hypervisor == hypervisor.kind().name(),
        };
        self.tsc_changes = contract.tsc_change(&offer).is_some();
        Ok(contract
            .refusals(&offer)
            .into_iter()
            .map(|reason| refuse(RefusalKind::Cpu, reason))
            .collect())
    }
}

impl DestinationMachine for MovingIn {
    fn reserve(&mut self, manifest: &Manifest) -> Result<Arc<GuestRam>, Vec<Refusal>> {
        let config = self.config(manifest).map_err(|refusal| vec![refusal])?;
        let refusals = self.cpu_refusals(&config, manifest).map_err(|error| {
            vec![Refusal {
                kind: RefusalKind::Hypervisor,
                detail: super::error_chain(&error),
            }]
        })?;
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let instance = self
            .build(config, manifest)
            .map_err(|refusal| vec![refusal])?;
        let instance = Arc::new(instance);
        let ram = Arc::clone(instance.ram());
        self.instance = Some(instance);
        Ok(ram)
    }

    fn restore(&mut self, mut state: MachineState) -> Result<(), MachineError> {
        let instance = self
            .instance
            .as_ref()
            .ok_or("no machine has been reserved")?;
        if self.tsc_changes {
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.tsc_khz = None);
        }
        let run_state = state.run_state;
        instance.restore(state)?;
        self.run_state = run_state;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        let instance = self
            .instance
            .as_ref()
            .ok_or("no machine has been reserved")?;
        if self.run_state == RunState::Running {
            instance.resume();
        }
        instance.announce();
        Ok(())
    }

    fn discard(&mut self) {
        if let Some(instance) = self.instance.take() {
            instance.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_chooses_no_addresses_of_this_host() {
        for (keys, taken) in [
            ("", true),
            (r#", "mtu": 1400"#, true),
            (r#", "ip": "8.8.8.8", "mask": "128.0.0.0""#, false),
            (r#", "host_mac": "52:54:00:12:34:56""#, false),
        ] {
            let json = format!(
                r#"{{"payload": {{"kernel": "k"}}, "net": [{{"id": "nic", "tap": "theirs"{keys}}}]}}"#
            );
            let mut config = VmConfig::from_peer(json.as_bytes()).expect("a config");
            let mut ends = Ends::default();
            assert!(
                ends.apply(&mut config).is_err(),
                "no word of where it leads"
            );
            ends.taps.insert("nic".to_owned(), "tap0".to_owned());
            assert_eq!(ends.apply(&mut config).is_ok(), taken, "{keys}");
            ends.trust_source = true;
            ends.apply(&mut config).expect("trusted");
            assert_eq!(config.net[0].tap.as_deref(), Some("tap0"));
        }
    }
}
