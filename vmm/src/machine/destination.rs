//! The machine as the destination of a move: built from a manifest, not running until the commit.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use arch::x86_64::cpu_model::HostOffer;
use hypervisor::HypervisorKind;
use memory::GuestRam;
use migration::{
    DestinationMachine, MachineError, MachineState, Manifest, Refusal, RefusalKind, RunState,
};

use super::Event;
use super::consent::{Ends, refuse};
use super::instance::{BuildError, Instance, Plan};
use crate::config::VmConfig;

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
    untold_boot: Option<String>,
}

/// A machine that has arrived.
pub(crate) struct Arrived {
    pub(super) instance: Arc<Instance>,
    pub(super) run_state: RunState,
    /// Why it cannot be booted again here, if it cannot.
    pub(super) untold_boot: Option<String>,
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
            untold_boot: None,
        }
    }

    /// What arrived, after a move that succeeded.
    pub(super) fn into_arrived(mut self) -> Option<Arrived> {
        let instance = self.instance.take()?;
        Some(Arrived {
            instance,
            run_state: self.run_state,
            untold_boot: self.untold_boot,
        })
    }

    /// The machine's config, as it is here.
    fn config(&mut self, manifest: &Manifest) -> Result<VmConfig, Vec<Refusal>> {
        let mut config = VmConfig::from_peer(manifest.config.as_bytes())
            .map_err(|e| vec![refuse(RefusalKind::Config, e.to_string())])?;
        // Which hypervisor the source's host has says nothing about this one.
        config.hypervisor = self.hypervisor;
        self.untold_boot = self.ends.apply(&mut config)?;
        if manifest.vcpus != config.cpus.max_vcpus {
            return Err(vec![refuse(
                RefusalKind::Config,
                format!(
                    "the manifest has {} vCPUs but its config {}",
                    manifest.vcpus, config.cpus.max_vcpus
                ),
            )]);
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
                BuildError::Memory(_) | BuildError::Addresses { .. } => RefusalKind::Memory,
                BuildError::NotGiven { .. } => RefusalKind::Cpu,
                BuildError::Hypervisor(_) => RefusalKind::Hypervisor,
                _ => RefusalKind::Device,
            };
            refuse(kind, super::error_chain(&error))
        })
    }
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
        let config = self.config(manifest)?;
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
        let lacking = instance.lacking(&manifest.accepted);
        if !lacking.is_empty() {
            instance.stop();
            return Err(lacking
                .into_iter()
                .map(|reason| refuse(RefusalKind::Device, reason))
                .collect());
        }
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
    use std::sync::mpsc;

    use migration::AcceptedFeatures;

    use super::*;

    /// On the host's own hypervisor: what a driver uses and the device here does not offer is a reason at once, not at the restore.
    #[test]
    fn what_a_driver_uses_and_a_device_lacks_is_a_reason() {
        let json = br#"{"payload": {"kernel": "k"}, "memory": {"size": 16777216}, "vsock": {"cid": 3, "socket": "SOCKET"}}"#;
        let folder = tempfile::tempdir().expect("a directory");
        let socket = folder.path().join("vsock");
        let json = String::from_utf8_lossy(json).replace("SOCKET", &socket.to_string_lossy());
        let config = VmConfig::from_json(json.as_bytes()).expect("a config");
        let (events, _inbox) = mpsc::channel();
        let source = Instance::build(Plan::new(config, None), 1, &events).expect("a hypervisor");
        let mut manifest = source.manifest().expect("a config");
        source.stop();
        drop(source);
        assert_eq!(manifest.accepted, [], "no driver has run");
        let ends = || Ends {
            trust_source: true,
            ..Ends::default()
        };
        let mut reserve = |id: &str, features| {
            manifest.accepted = vec![AcceptedFeatures {
                id: id.to_owned(),
                features,
            }];
            let mut machine = MovingIn::new(2, None, false, ends(), events.clone());
            let result = machine.reserve(&manifest).map(drop);
            machine.discard();
            result
        };
        // Version 1 and streams.
        assert_eq!(reserve("vsock", 1 << 32 | 1), Ok(()));
        let reasons = reserve("vsock", 1 << 32 | 1 << 1).expect_err("no such feature");
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert_eq!(reasons[0].kind, RefusalKind::Device);
        for word in ["vsock", "feature bit 1,", "does not offer"] {
            assert!(reasons[0].detail.contains(word), "{reasons:?}");
        }
        assert_eq!(
            reserve("vsock", 0),
            Ok(()),
            "nothing is left of the refused one"
        );
    }
}
