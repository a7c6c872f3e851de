//! Ring 0 services: UD2 with a magic number, answered by `boot.s`.

use core::arch::asm;

/// Numbers of the services, in the order of the table `services` in `boot.s`.
#[repr(u64)]
enum Service {
    Idle,
    LapicRead,
    LapicWrite,
    SendIpi,
    ReadMsr,
    WriteMsr,
    Cpuid,
    WriteDebug,
    ReadDebug,
    ReadTsc,
    TripleFault,
    Halt,
}

/// In r11, it tells a service call from a real invalid opcode.
const MAGIC: u64 = 0x5e2f_1ce0;

/// Local APIC registers (Intel SDM 3A, table 11-1), as offsets of the xAPIC page.
pub mod lapic {
    /// Divide configuration of the timer; 0b1011 divides by 1.
    pub const DIVIDE: u32 = 0x3e0;
    /// Local vector table entry of the timer; bit 17 makes it periodic.
    pub const LVT_TIMER: u32 = 0x320;
    /// Initial count; writing it starts the timer, 0 stops it.
    pub const INITIAL_COUNT: u32 = 0x380;
    /// Current count.
    pub const CURRENT_COUNT: u32 = 0x390;
    /// Ticks of the timer at divide 1: KVM and QEMU both clock it with 1 GHz (`APIC_BUS_CYCLE_NS`).
    pub const HZ: u64 = 1_000_000_000;
    /// Vector of the timer in `boot.s`.
    pub const TIMER_VECTOR: u32 = 0x20;
}

/// # Safety
/// The arguments must be what the service expects; pointers must be valid for it.
unsafe fn call(service: Service, a: u64, b: u64) -> u64 {
    let result;
    // SAFETY: the gate saves all but rax, rcx and rdx, and runs on a stack of its own.
    unsafe {
        asm!("ud2", inout("rax") service as u64 => result, in("rdi") a, in("rsi") b, in("r11") MAGIC,
            out("rcx") _, out("rdx") _);
    }
    result
}

/// Stops this CPU until its next interrupt. The periodic timer must run, or it sleeps for ever.
pub fn idle() {
    // SAFETY: no arguments.
    unsafe { call(Service::Idle, 0, 0) };
}

/// Reads a local APIC register.
pub fn lapic_read(register: u32) -> u64 {
    // SAFETY: any offset in the page may be read.
    unsafe { call(Service::LapicRead, u64::from(register), 0) }
}

/// Writes a local APIC register of this CPU.
pub fn lapic_write(register: u32, value: u32) {
    // SAFETY: the callers write registers of `lapic` only.
    unsafe { call(Service::LapicWrite, u64::from(register), u64::from(value)) };
}

/// Sends an interrupt command to the CPU with this APIC id.
pub fn send_ipi(apic_id: u32, command: u32) {
    // SAFETY: INIT and SIPI to a stopped CPU; the trampoline is in place (smp.rs).
    unsafe { call(Service::SendIpi, u64::from(apic_id), u64::from(command)) };
}

/// Reads an MSR; one that does not exist ends the guest with exception 13.
pub fn read_msr(index: u32) -> u64 {
    // SAFETY: reading has no side effect on memory.
    unsafe { call(Service::ReadMsr, u64::from(index), 0) }
}

/// Writes an MSR of this CPU.
///
/// # Safety
/// The MSR must not change how this program's memory is seen.
pub unsafe fn write_msr(index: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe { call(Service::WriteMsr, u64::from(index), value) };
}

/// CPUID as the VMM gave it: eax, ebx, ecx, edx. (On a software KVM the instruction in ring 3 shows
/// the host's values.)
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut out = [0u32; 4];
    let leaf = u64::from(leaf) | (u64::from(subleaf) << 32);
    // SAFETY: `out` takes the four values.
    unsafe { call(Service::Cpuid, leaf, out.as_mut_ptr() as u64) };
    out
}

/// Debug registers: DR0–DR3, DR6, DR7.
pub type DebugRegisters = [u64; 6];

/// Loads the debug registers of this CPU.
pub fn write_debug(values: &DebugRegisters) {
    // SAFETY: `values` is read only; the program sets breakpoints on addresses it never touches.
    unsafe { call(Service::WriteDebug, values.as_ptr() as u64, 0) };
}

/// Reads the debug registers of this CPU.
pub fn read_debug() -> DebugRegisters {
    let mut out = [0u64; 6];
    // SAFETY: `out` takes the six values.
    unsafe { call(Service::ReadDebug, out.as_mut_ptr() as u64, 0) };
    out
}

/// RDTSC in ring 0, where an interpreting KVM answers it.
pub fn read_tsc() -> u64 {
    // SAFETY: no arguments.
    unsafe { call(Service::ReadTsc, 0, 0) }
}

/// Resets the machine by a triple fault.
pub fn triple_fault() -> ! {
    // SAFETY: does not return.
    unsafe { call(Service::TripleFault, 0, 0) };
    halt()
}

/// Stops this CPU for good, interrupts off.
pub fn halt() -> ! {
    loop {
        // SAFETY: no arguments.
        unsafe { call(Service::Halt, 0, 0) };
    }
}

/// Lets the timer of this CPU tick every `period_ms` (1 to 4000).
pub fn start_ticks(period_ms: u64) {
    let count = (lapic::HZ / 1000) * period_ms.clamp(1, 4000);
    lapic_write(lapic::DIVIDE, 0b1011);
    lapic_write(lapic::LVT_TIMER, lapic::TIMER_VECTOR | (1 << 17));
    lapic_write(lapic::INITIAL_COUNT, count as u32);
}
