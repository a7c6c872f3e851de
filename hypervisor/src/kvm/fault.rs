//! What is known about a guest that cannot go on.

use std::io;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_NMI, KVM_EXIT_NOTIFY,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN, KVM_EXIT_X86_BUS_LOCK,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH,
};

use super::state::registers;
use super::vcpu::{KvmVcpu, RunPage};
use crate::FaultDetails;

impl KvmVcpu {
    /// Details of the exit that the run page holds, with the registers where they can still be read.
    pub(super) fn fault(&self) -> Box<FaultDetails> {
        let (reason, instruction) = match self.page.exit_reason() {
            KVM_EXIT_INTERNAL_ERROR => {
                let error = self.page.internal();
                let used = (error.ndata as usize).min(error.data.len());
                internal_error(error.suberror, &error.data[..used])
            }
            KVM_EXIT_FAIL_ENTRY => {
                let failure = self.page.fail_entry();
                let reason = format!(
                    "the processor refused to enter the guest: hardware reason {:#x} on host CPU {}",
                    failure.hardware_entry_failure_reason, failure.cpu
                );
                (reason, Vec::new())
            }
            KVM_EXIT_SYSTEM_EVENT => {
                let (kind, data) = self.page.system_event();
                let reason = if kind == KVM_SYSTEM_EVENT_CRASH {
                    format!("the guest reports a crash (data {data:#x})")
                } else {
                    format!("unexpected system event {kind} (data {data:#x})")
                };
                (reason, Vec::new())
            }
            other => (
                format!("unexpected KVM exit {other} ({})", exit_name(other)),
                Vec::new(),
            ),
        };
        self.details(reason, instruction)
    }

    /// Details of a KVM_RUN that failed because the memory behind the guest's could not be had.
    pub(super) fn memory_fault(&self, error: &io::Error) -> Box<FaultDetails> {
        let place = if self.page.exit_reason() == KVM_EXIT_MEMORY_FAULT {
            let (gpa, size) = self.page.memory_fault();
            format!(" at guest-physical {gpa:#x} ({size:#x} bytes)")
        } else {
            String::new()
        };
        let cause = if error.raw_os_error() == Some(libc::EHWPOISON) {
            "the host's memory has an uncorrectable error"
        } else {
            "the memory behind the guest's cannot be accessed"
        };
        self.details(format!("{cause}{place}: {error}"), Vec::new())
    }

    fn details(&self, reason: String, instruction: Vec<u8>) -> Box<FaultDetails> {
        Box::new(FaultDetails {
            reason,
            instruction,
            registers: self
                .fd
                .get_regs()
                .ok()
                .map(|regs| registers::general_from_kvm(&regs)),
            special: self
                .fd
                .get_sregs()
                .ok()
                .map(|sregs| registers::special_from_kvm(&sregs)),
        })
    }
}

impl RunPage {
    /// The instruction bytes that KVM could not emulate, as far as it says them; `None` if the exit is something else.
    pub(super) fn failed_emulation(&self) -> Option<Vec<u8>> {
        let error = self.internal();
        let used = (error.ndata as usize).min(error.data.len());
        (error.suberror == KVM_INTERNAL_ERROR_EMULATION)
            .then(|| internal_error(error.suberror, &error.data[..used]).1)
    }
}

/// Reason and instruction bytes of KVM_EXIT_INTERNAL_ERROR, from its data words.
///
/// For a failed emulation word 0 is a set of flags; with INSTRUCTION_BYTES, words 1 and 2 hold a length byte and up to 15 bytes
/// (`struct emulation_failure` in `include/uapi/linux/kvm.h`).
fn internal_error(suberror: u32, data: &[u64]) -> (String, Vec<u8>) {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate this instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM got two exceptions at once while emulating",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM cannot deliver an event to the guest",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for a reason KVM does not know"
        }
        _ => "KVM internal error",
    };
    let mut instruction = Vec::new();
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if let (KVM_INTERNAL_ERROR_EMULATION, [flags, first, second, ..]) = (suberror, data)
        && flags & flag != 0
    {
        let bytes: Vec<u8> = [first, second]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let len = usize::from(bytes[0]).min(bytes.len() - 1);
        instruction.extend_from_slice(&bytes[1..=len]);
    }
    let details = if instruction.is_empty() && !data.is_empty() {
        let words: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
        format!(", data {}", words.join(" "))
    } else {
        String::new()
    };
    (
        format!("{what} (sub-error {suberror}{details})"),
        instruction,
    )
}

/// Name of an exit that is not expected here.
fn exit_name(reason: u32) -> &'static str {
    match reason {
        KVM_EXIT_UNKNOWN => "unknown hardware exit",
        KVM_EXIT_EXCEPTION => "exception",
        KVM_EXIT_HYPERCALL => "hypercall",
        KVM_EXIT_DEBUG => "debug",
        KVM_EXIT_TPR_ACCESS => "TPR access",
        KVM_EXIT_NMI => "NMI",
        KVM_EXIT_X86_RDMSR => "RDMSR",
        KVM_EXIT_X86_WRMSR => "WRMSR",
        KVM_EXIT_X86_BUS_LOCK => "bus lock",
        KVM_EXIT_NOTIFY => "no progress",
        _ => "not known to this build",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_bytes_are_taken_from_the_exit() {
        let first = u64::from_ne_bytes([3, 0xf3, 0x0f, 0xb8, 0, 0, 0, 0]);
        let (reason, bytes) = internal_error(KVM_INTERNAL_ERROR_EMULATION, &[1, first, 0]);
        assert_eq!(bytes, [0xf3, 0x0f, 0xb8]);
        assert!(reason.contains("emulate"), "{reason}");
    }

    #[test]
    fn a_length_out_of_range_is_cut_and_absent_bytes_are_no_error() {
        let (_, bytes) = internal_error(KVM_INTERNAL_ERROR_EMULATION, &[1, u64::MAX, u64::MAX]);
        assert_eq!(bytes.len(), 15);
        let (_, bytes) = internal_error(KVM_INTERNAL_ERROR_EMULATION, &[0, u64::MAX, u64::MAX]);
        assert!(bytes.is_empty());
        let (reason, bytes) = internal_error(KVM_INTERNAL_ERROR_DELIVERY_EV, &[0x80, 0x30]);
        assert!(bytes.is_empty() && reason.contains("0x80 0x30"), "{reason}");
        let (_, bytes) = internal_error(KVM_INTERNAL_ERROR_EMULATION, &[]);
        assert!(bytes.is_empty());
    }
}
