//! One vCPU and its run loop.
//!
//! ```text
//!            ┌───────────────────────────────────────────────────────────┐
//!   run ──► kicked? ── no ──► MSHV_RUN_VP ─┬─ message ──► intercept.rs ──┘ (served; registers and RIP are written)
//!              │                           ├─ EINTR ──► Interrupted
//!              └─ yes ──► Interrupted      └─ a message that ends it ──► Halt, Reset, Fault
//! ```
//!
//! A message is served whole before the kick is looked at again, so `Interrupted` means that nothing is half done.

use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::VcpuState;
use mshv_ioctls::{MshvError, VcpuFd};

use super::kick::{KickHandle, Running};
use super::partition::VmShared;
use super::{call, cpuid, registers, state};
use crate::{Error, ExitBus, FaultDetails, Result, Vcpu, VcpuExit, VcpuKick};

/// CPUID.7:EDX.ARCH_CAPABILITIES.
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;

/// A vCPU under the Microsoft hypervisor.
pub(crate) struct MshvVcpu {
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<VmShared>,
    pub(super) id: u32,
    /// CPUID tells the guest of IA32_ARCH_CAPABILITIES.
    pub(super) arch_capabilities: bool,
    kick: Arc<KickHandle>,
    /// The thread that has the kick signal unblocked.
    unblocked: Option<libc::pthread_t>,
}

impl MshvVcpu {
    /// Creates vCPU `id` of a machine.
    pub(crate) fn new(vm: Arc<VmShared>, id: u32) -> Result<Self> {
        let index = u8::try_from(id).map_err(|_| {
            Error::Invalid(format!("vCPU {id} is beyond the 256 that there can be"))
        })?;
        let fd = vm.fd.create_vcpu(index).map_err(call("MSHV_CREATE_VP"))?;
        Ok(Self {
            fd,
            vm,
            id,
            arch_capabilities: false,
            kick: Arc::default(),
            unblocked: None,
        })
    }

    fn run_loop(&self, bus: &dyn ExitBus, running: &Running<'_>) -> Result<VcpuExit> {
        loop {
            if running.take_kick() {
                return Ok(VcpuExit::Interrupted);
            }
            match self.fd.run() {
                Ok(message) => {
                    if let Some(exit) = self.serve(&message, bus)? {
                        return Ok(exit);
                    }
                }
                Err(MshvError::Errno(errno)) => match errno.errno() {
                    libc::EINTR => {
                        running.take_kick();
                        return Ok(VcpuExit::Interrupted);
                    }
                    libc::EAGAIN => {}
                    _ => return Err(call("MSHV_RUN_VP")(MshvError::Errno(errno))),
                },
                Err(error) => return Err(call("MSHV_RUN_VP")(error)),
            }
        }
    }

    /// Details of a guest that cannot go on, with the registers where they can still be read.
    pub(super) fn fault(&self, reason: String, instruction: &[u8]) -> VcpuExit {
        VcpuExit::Fault(Box::new(FaultDetails {
            reason,
            instruction: instruction.to_vec(),
            registers: registers::general(&self.fd).ok(),
            special: registers::special(&self.fd).ok(),
        }))
    }
}

impl Vcpu for MshvVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        cpuid::register(&self.fd, self.id, cpuid, self.vm.host.supported_cpuid()?)?;
        self.arch_capabilities = cpuid
            .get(7, 0)
            .is_some_and(|leaf| leaf.edx & LEAF7_EDX_ARCH_CAPABILITIES != 0);
        Ok(())
    }

    fn cpuid(&self) -> Result<Cpuid> {
        cpuid::enumerate(&self.fd)
    }

    fn tsc_khz(&self) -> Option<u32> {
        super::time::tsc_khz(&self.vm.fd)
    }

    fn run(&mut self, bus: &dyn ExitBus) -> Result<VcpuExit> {
        // SAFETY: always succeeds and touches nothing.
        let this_thread = unsafe { libc::pthread_self() };
        if self.unblocked != Some(this_thread) {
            crate::signal::unblock_on_this_thread()?;
            self.unblocked = Some(this_thread);
        }
        let kick = Arc::clone(&self.kick);
        let running = kick.running()?;
        self.vm.running.enter(&self.vm.fd)?;
        let exit = self.run_loop(bus, &running);
        // The guest's time stops even if the run has failed.
        let left = self.vm.running.leave(&self.vm.fd);
        let exit = exit?;
        left.map(|()| exit)
    }

    fn kick_handle(&self) -> Arc<dyn VcpuKick> {
        Arc::clone(&self.kick) as Arc<dyn VcpuKick>
    }

    fn save_state(&self) -> Result<VcpuState> {
        state::save(self)
    }

    fn restore_state(&mut self, state: &VcpuState) -> Result<()> {
        state::restore(self, state)
    }

    fn notify_paused(&self) -> Result<()> {
        // The guest's time has stood still, so none of its watchdogs has missed anything.
        Ok(())
    }
}
