//! A vCPU's state, out of one machine and into another.

use arch::x86_64::state::{Activity, Bytes, Msr, PendingException, StateElement, VcpuState};
use hypervisor::{Error, Hypervisor, Vcpu};

use crate::guest::{Bus, CODE, DATA, Guest, STOP64, code, cpuid, kvm};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;

/// One element in a form that can be compared, without what time changes by itself.
fn element(state: &VcpuState, element: StateElement) -> String {
    match element {
        StateElement::TscFrequency => format!("{:?}", state.tsc_khz),
        StateElement::Special => format!("{:x?}", state.special),
        StateElement::General => format!("{:x?}", state.general),
        StateElement::Xcrs => format!("{:x?}", state.xcrs),
        StateElement::Xsave => format!("{:x?}", state.xsave),
        StateElement::Debug => format!("{:x?}", state.debug),
        StateElement::Lapic => format!("{:x?}", state.lapic),
        StateElement::Msrs => {
            let still: Vec<_> = state
                .msrs
                .iter()
                .filter(|msr| msr.index != IA32_TSC)
                .collect();
            format!("{still:x?}")
        }
        StateElement::Events => format!("{:x?}", state.events),
        StateElement::Activity => format!("{:?}", state.activity),
        StateElement::Nested => format!("{:x?}", state.nested),
    }
}

fn assert_same(a: &VcpuState, b: &VcpuState) {
    for which in StateElement::ALL {
        assert_eq!(element(a, which), element(b, which), "{}", which.name());
    }
}

fn msr(state: &VcpuState, index: u32) -> Option<u64> {
    state
        .msrs
        .iter()
        .find(|msr| msr.index == index)
        .map(|msr| msr.value)
}

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    match state.msrs.iter_mut().find(|msr| msr.index == index) {
        Some(msr) => msr.value = value,
        None => state.msrs.push(Msr { index, value }),
    }
}

/// Gives every element a value that no reset leaves.
fn make_unusual(state: &mut VcpuState) {
    let g = &mut state.general;
    for (n, register) in [
        &mut g.rax, &mut g.rbx, &mut g.rcx, &mut g.rdx, &mut g.rsi, &mut g.rdi, &mut g.rbp,
        &mut g.r8, &mut g.r15,
    ]
    .into_iter()
    .enumerate()
    {
        *register = 0x1111_2222_3333_4444u64.wrapping_mul(n as u64 + 3);
    }
    state.special.cr2 = 0x7fff_1234_5678;
    state.special.gdt = arch::x86_64::state::DescriptorTable {
        base: 0x5000,
        limit: 0x37,
    };
    state.special.idt = arch::x86_64::state::DescriptorTable {
        base: 0x6000,
        limit: 0x1ff,
    };
    state.special.fs.base = 0x1234_5000;
    let debug = state.debug.as_mut().expect("debug registers");
    (debug.db, debug.dr7) = ([0x1000, 0x2000, 0x3000, 0x4000], 0x400);
    let area = &mut state.xsave.as_mut().expect("an XSAVE area").0;
    area[..2].copy_from_slice(&0x27fu16.to_le_bytes()); // FCW
    area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes()); // MXCSR
    area[160..416].copy_from_slice(&std::array::from_fn::<u8, 256, _>(|i| i as u8 ^ 0x5a)); // XMM0–15
    area[512] = 0b11;
    let lapic = &mut state.lapic.as_mut().expect("a local APIC").registers.0;
    lapic[0xf0..0xf2].copy_from_slice(&0x1abu16.to_le_bytes()); // SVR: on, vector 0xab
    lapic[0x80] = 0x20; // TPR
    state.special.cr8 = 2; // the same register, seen from the processor
    lapic[0x320..0x324].copy_from_slice(&0x1_00ecu32.to_le_bytes()); // LVT timer: masked, vector 0xec
    lapic[0x212] = 0x04; // IRR: vector 50 is requested
    for (index, value) in [
        (0x174, 0x10),
        (0x175, 0xffff_8000_0000_1000),
        (0x277, 0x0007_0406_0007_0406),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0102, 0xffff_8880_1234_0000),
        (IA32_TSC_ADJUST, 0x77),
        (0x2ff, 0xc06),
        (0x4b56_4d01, 0x7000 | 1),
    ] {
        set_msr(state, index, value);
    }
    state.events.nmi_masked = true;
    state.events.nmi_pending = true;
    state.events.exception = Some(PendingException {
        vector: 14,
        error_code: Some(2),
        payload: Some(0xdead_f000),
        injected: false,
    });
    state.activity = Activity::Halted;
}

#[test]
fn every_element_travels() {
    let Some(kvm) = kvm() else { return };
    let mut a = Guest::long_mode(&*kvm, &[0xf4]);
    a.change(make_unusual);
    let saved = a.vcpu.save_state().expect("save");
    // What was set is what is there, element by element, where the test knows it.
    assert_eq!(saved.general.rbx, 0x1111_2222_3333_4444u64.wrapping_mul(4));
    assert_eq!(
        saved.debug.expect("debug registers").db,
        [0x1000, 0x2000, 0x3000, 0x4000]
    );
    assert_eq!(saved.xsave.as_ref().expect("an XSAVE area").0[160], 0x5a);
    assert_eq!(
        saved.lapic.as_ref().expect("a local APIC").registers.0[0x320],
        0xec
    );
    assert_eq!(msr(&saved, 0xc000_0082), Some(0xffff_ffff_8100_0000));
    assert_eq!(
        (saved.events.nmi_pending, saved.activity),
        (true, Activity::Halted)
    );
    assert!(
        saved
            .msrs
            .windows(2)
            .all(|pair| pair[0].index < pair[1].index),
        "sorted"
    );
    let mut b = Guest::long_mode(&*kvm, &[0xf4]);
    b.vcpu.restore_state(&saved).expect("restore");
    let again = b.vcpu.save_state().expect("save");
    assert_same(&saved, &again);
    assert!(
        msr(&again, IA32_TSC) >= msr(&saved, IA32_TSC),
        "the TSC does not go back"
    );
    // And once more over itself.
    b.vcpu.restore_state(&again).expect("restore");
    assert_same(&again, &b.vcpu.save_state().expect("save"));
}

#[test]
fn a_guest_goes_on_where_it_was() {
    let Some(kvm) = kvm() else { return };
    // inc rbx; mov [0x2000], rbx; stop; jmp back
    let program = code(&[
        &[0x48, 0xff, 0xc3, 0x48, 0x89, 0x1c, 0x25, 0, 0x20, 0, 0],
        &STOP64,
        &[0xeb, 0xed],
    ]);
    let mut a = Guest::long_mode(&*kvm, &program);
    for _ in 0..5 {
        a.run();
    }
    let saved = a.vcpu.save_state().expect("save");
    assert_eq!(saved.general.rbx, 5);
    let mut b = Guest::long_mode(&*kvm, &program);
    b.vcpu.restore_state(&saved).expect("restore");
    for _ in 0..5 {
        b.run();
    }
    assert_eq!(b.ram.read_u64(DATA), 10);
    assert!(
        (CODE..CODE + program.len() as u64)
            .contains(&b.vcpu.save_state().expect("save").general.rip)
    );
}

fn refusal(vcpu: &mut dyn Vcpu, state: &VcpuState) -> (&'static str, String) {
    match vcpu.restore_state(state) {
        Err(Error::StateRefused {
            vcpu: 0,
            element,
            reason,
        }) => (element, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_the_host_cannot_take_is_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&*kvm, &[0xf4]);
    let good = guest.vcpu.save_state().expect("save");

    let mut state = good.clone();
    set_msr(&mut state, 0x1234_5678, 0);
    guest
        .vcpu
        .restore_state(&state)
        .expect("a register that is not here and was zero is skipped");
    set_msr(&mut state, 0x1234_5678, 1);
    let (element, reason) = refusal(&mut *guest.vcpu, &state);
    assert_eq!(element, "msrs");
    assert!(reason.contains("0x12345678"), "{reason}");

    let mut state = good.clone();
    set_msr(&mut state, 0xc000_0082, 1 << 62); // IA32_LSTAR takes canonical addresses only
    let (element, reason) = refusal(&mut *guest.vcpu, &state);
    assert!(
        element == "msrs" && reason.contains("0xc0000082"),
        "{reason}"
    );

    let mut state = good.clone();
    state.xsave.as_mut().expect("an XSAVE area").0[519] = 0x40; // component 62
    let (element, reason) = refusal(&mut *guest.vcpu, &state);
    assert!(element == "xsave" && reason.contains("62"), "{reason}");

    let mut state = good.clone();
    state.lapic.as_mut().expect("a local APIC").registers = Bytes(vec![0; 7]);
    assert_eq!(refusal(&mut *guest.vcpu, &state).0, "lapic");

    let mut state = good.clone();
    state.special.cr0 = 0x8000_0000; // paging without protection
    assert_eq!(refusal(&mut *guest.vcpu, &state).0, "special_registers");

    let mut state = good.clone();
    state.nested = Some(arch::x86_64::state::NestedState {
        format: arch::x86_64::state::NestedFormat::KvmVmx,
        data: Bytes(vec![1; 9]),
    });
    assert_eq!(refusal(&mut *guest.vcpu, &state).0, "nested_state");

    if !kvm.capabilities().tsc_scaling {
        let mut state = good.clone();
        state.tsc_khz = state.tsc_khz.map(|khz| khz / 2);
        assert_eq!(refusal(&mut *guest.vcpu, &state).0, "tsc_frequency");
        state.tsc_khz = good.tsc_khz.map(|khz| khz + khz / 10_000);
        guest
            .vcpu
            .restore_state(&state)
            .expect("100 ppm are within tolerance");
    }

    let other = VcpuState {
        id: 3,
        ..good.clone()
    };
    assert!(matches!(
        guest.vcpu.restore_state(&other),
        Err(Error::Invalid(_))
    ));
    guest
        .vcpu
        .restore_state(&good)
        .expect("the good state still goes in");
}

#[test]
fn xsave_areas_of_other_sizes_are_taken() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&*kvm, &[0xf4]);
    guest.change(make_unusual);
    let saved = guest.vcpu.save_state().expect("save");
    let area = saved.xsave.clone().expect("an XSAVE area").0;
    for len in [832, area.len() + 4096] {
        let mut state = saved.clone();
        let mut other = area.clone();
        other.resize(len, 0);
        other[512..520].copy_from_slice(&3u64.to_le_bytes());
        state.xsave = Some(Bytes(other));
        guest.vcpu.restore_state(&state).expect("restore");
        let now = guest
            .vcpu
            .save_state()
            .expect("save")
            .xsave
            .expect("an XSAVE area")
            .0;
        assert_eq!(
            (now.len(), &now[160..416]),
            (area.len(), &area[160..416]),
            "{len}"
        );
    }
}

#[test]
fn time_stamp_counters_are_in_step_after_a_restore() {
    let Some(kvm) = kvm() else { return };
    let pair = |kvm: &dyn Hypervisor| {
        let first = Guest::long_mode(kvm, &[0xf4]);
        let mut second = first.vm.create_vcpu(1).expect("create vCPU 1");
        second.set_cpuid(&cpuid(kvm)).expect("set CPUID");
        (first, second)
    };
    let (a0, a1) = pair(&*kvm);
    let saved = [
        a0.vcpu.save_state().expect("save"),
        a1.save_state().expect("save"),
    ];
    // As a move would: some time passes.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (mut b0, mut b1) = pair(&*kvm);
    b0.vcpu.restore_state(&saved[0]).expect("restore");
    b1.restore_state(&saved[1]).expect("restore");
    let tsc = |vcpu: &dyn Vcpu| msr(&vcpu.save_state().expect("save"), IA32_TSC).expect("a TSC");
    for _ in 0..20 {
        let (first, second, third) = (tsc(&*b0.vcpu), tsc(&*b1), tsc(&*b0.vcpu));
        assert!(
            first <= second && second <= third,
            "{first} {second} {third}"
        );
    }
    assert!(tsc(&*b0.vcpu) > msr(&saved[0], IA32_TSC).expect("a TSC"));
}

#[test]
fn a_vcpu_after_reset_waits_or_runs() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&*kvm);
    let boot = guest.vcpu.save_state().expect("save");
    assert_eq!((boot.id, boot.activity), (0, Activity::Running));
    assert_eq!(
        (boot.general.rip, boot.special.cs.base),
        (0xfff0, 0xffff_0000),
        "the reset vector"
    );
    let other = guest.vm.create_vcpu(1).expect("create vCPU 1");
    let _bus = Bus::new(&*other);
    let state = other.save_state().expect("save");
    assert_eq!((state.id, state.activity), (1, Activity::Uninitialized));
    assert!(state.nested.is_none());
}
