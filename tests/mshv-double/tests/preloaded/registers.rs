//! Registers by name, floating point and extended state, CPUID results.

use libtest_mimic::Trial;
use mshv_bindings::*;

use crate::guest::{Guest, get, set};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "every_register_keeps_its_value",
            every_register_keeps_its_value,
        ),
        trial("read_only_registers", read_only_registers),
        trial("segments_and_tables", segments_and_tables),
        trial("vector_registers", vector_registers),
        trial("xsave_state", xsave_state),
        trial("other_state_pages", other_state_pages),
        trial("cpuid_results", cpuid_results),
        trial("the_guest_sees_cpuid_results", the_guest_sees_cpuid_results),
        trial("host_properties", host_properties),
    ]
}

/// A name and a value that the register can take.
fn settable() -> Vec<(u32, u64)> {
    let mut list = vec![
        (hv_register_name_HV_X64_REGISTER_RIP, 0x1234),
        (hv_register_name_HV_X64_REGISTER_RFLAGS, 0x202),
        (hv_register_name_HV_X64_REGISTER_CR0, 0x6000_0010),
        (hv_register_name_HV_X64_REGISTER_CR2, 0x1000_2000),
        (hv_register_name_HV_X64_REGISTER_CR3, 0x3000),
        (hv_register_name_HV_X64_REGISTER_CR4, 0x20),
        (hv_register_name_HV_X64_REGISTER_CR8, 5),
        (
            hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR0,
            0x6000_0010,
        ),
        (hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR3, 0x4000),
        (hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR4, 0x20),
        (hv_register_name_HV_X64_REGISTER_INTERMEDIATE_CR8, 4),
        (hv_register_name_HV_X64_REGISTER_XFEM, 3),
        (hv_register_name_HV_X64_REGISTER_EFER, 0x100),
        (hv_register_name_HV_X64_REGISTER_APIC_BASE, 0xfee0_0900),
        (hv_register_name_HV_X64_REGISTER_DR0, 0x10),
        (hv_register_name_HV_X64_REGISTER_DR1, 0x20),
        (hv_register_name_HV_X64_REGISTER_DR2, 0x30),
        (hv_register_name_HV_X64_REGISTER_DR3, 0x40),
        (hv_register_name_HV_X64_REGISTER_DR6, 0xffff_0ff1),
        (hv_register_name_HV_X64_REGISTER_DR7, 0x401),
        (
            hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE,
            0x7fff_0000_1000,
        ),
        (hv_register_name_HV_X64_REGISTER_PAT, 0x0007_0406_0007_0406),
        (hv_register_name_HV_X64_REGISTER_SYSENTER_CS, 8),
        (hv_register_name_HV_X64_REGISTER_SYSENTER_EIP, 0x1111),
        (hv_register_name_HV_X64_REGISTER_SYSENTER_ESP, 0x2222),
        (hv_register_name_HV_X64_REGISTER_STAR, 0x0010_0008_0000_0000),
        (hv_register_name_HV_X64_REGISTER_LSTAR, 0x7fff_0000_2000),
        (hv_register_name_HV_X64_REGISTER_CSTAR, 0x7fff_0000_3000),
        (hv_register_name_HV_X64_REGISTER_SFMASK, 0x300),
        (hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE, 0xc06),
        (
            hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX64K00000,
            0x0606_0606_0606_0606,
        ),
        (
            hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16K80000,
            0x0606_0606_0606_0606,
        ),
        (hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16KA0000, 0),
        (hv_register_name_HV_X64_REGISTER_TSC_AUX, 7),
        (hv_register_name_HV_X64_REGISTER_TSC_ADJUST, 0x1000),
        (hv_register_name_HV_X64_REGISTER_MSR_IA32_MISC_ENABLE, 1),
        (hv_register_name_HV_X64_REGISTER_DEBUG_CTL, 0),
        (
            hv_register_name_HV_REGISTER_GUEST_OS_ID,
            0x8100_0006_0001_0000,
        ),
        (hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND, 1),
        (hv_register_name_HV_REGISTER_INTERCEPT_SUSPEND, 1),
        (hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE, 2),
        (
            hv_register_name_HV_REGISTER_PENDING_INTERRUPTION,
            1 | 0x31 << 16,
        ),
        (hv_register_name_HV_REGISTER_INTERRUPT_STATE, 1),
        (hv_register_name_HV_REGISTER_PENDING_EVENT0, 1 | 6 << 16),
        (hv_register_name_HV_REGISTER_PENDING_EVENT1, 0),
        (hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS, 2),
        (hv_register_name_HV_REGISTER_SINT0, 0x1_0000),
        (hv_register_name_HV_REGISTER_SINT15, 0x1_0000),
        (hv_register_name_HV_REGISTER_SCONTROL, 1),
        (hv_register_name_HV_REGISTER_SIEFP, 0x5001),
        (hv_register_name_HV_REGISTER_SIMP, 0x6001),
        (hv_register_name_HV_REGISTER_STIMER0_CONFIG, 0x3_0001),
        (hv_register_name_HV_REGISTER_STIMER3_COUNT, 99),
        (hv_register_name_HV_REGISTER_GUEST_CRASH_P0, 0xdead),
    ];
    let general = hv_register_name_HV_X64_REGISTER_RAX..=hv_register_name_HV_X64_REGISTER_R15;
    list.extend(general.map(|name| (name, 0x1122_3344_5566_0000 | u64::from(name))));
    for index in 0..8 {
        list.push((
            hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASE0 + index,
            0x10_0006,
        ));
        list.push((
            hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASK0 + index,
            0xff_fff0_0800,
        ));
        list.push((
            hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KC0000 + index,
            0x0505_0505_0505_0505,
        ));
    }
    list
}

fn every_register_keeps_its_value() {
    for (name, value) in settable() {
        let guest = Guest::new(&[0xf4]);
        guest.set(&[(name, value)]);
        assert_eq!(guest.get(name), value, "register {name:#x}");
        // All the others stand where they stood.
        assert_eq!(
            guest.get(hv_register_name_HV_X64_REGISTER_SYSENTER_ESP) == 0x2222,
            value == 0x2222,
            "{name:#x}"
        );
    }
    let guest = Guest::new(&[0xf4]);
    // The TSC runs.
    guest.set(&[(hv_register_name_HV_X64_REGISTER_TSC, 1 << 50)]);
    let now = guest.get(hv_register_name_HV_X64_REGISTER_TSC);
    assert!((1 << 50..(1 << 50) + (1 << 40)).contains(&now), "{now:#x}");
}

fn read_only_registers() {
    let guest = Guest::new(&[0xf4]);
    assert_eq!(guest.get(hv_register_name_HV_REGISTER_VP_INDEX), 0);
    assert_eq!(
        guest.get(hv_register_name_HV_X64_REGISTER_INITIAL_APIC_ID),
        0
    );
    assert_ne!(guest.get(hv_register_name_HV_X64_REGISTER_MSR_MTRR_CAP), 0);
    let times = [0, 1].map(|_| guest.get(hv_register_name_HV_REGISTER_TIME_REF_COUNT));
    assert!(times[0] <= times[1]);
    for name in [
        hv_register_name_HV_REGISTER_VP_INDEX,
        hv_register_name_HV_REGISTER_HYPERVISOR_VERSION,
    ] {
        assert!(
            set(&guest.vcpu, &[(name, 1)]).is_err(),
            "register {name:#x}"
        );
    }
}

fn segments_and_tables() {
    let guest = Guest::new(&[0xf4]);
    let names = [
        (hv_register_name_HV_X64_REGISTER_ES, 0xc093),
        (hv_register_name_HV_X64_REGISTER_CS, 0xa09b),
        (hv_register_name_HV_X64_REGISTER_SS, 0xc093),
        (hv_register_name_HV_X64_REGISTER_DS, 0xd093),
        (hv_register_name_HV_X64_REGISTER_FS, 0xc0f3),
        (hv_register_name_HV_X64_REGISTER_GS, 0xc093),
        (hv_register_name_HV_X64_REGISTER_LDTR, 0x82),
        (hv_register_name_HV_X64_REGISTER_TR, 0x8b),
    ];
    for (name, attributes) in names {
        let value = hv_register_value {
            segment: hv_x64_segment_register {
                base: 0x1000,
                limit: 0xf_ffff,
                selector: 0x18,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
            },
        };
        guest
            .vcpu
            .set_reg(&[hv_register_assoc {
                name,
                value,
                ..Default::default()
            }])
            .expect("a segment");
        // SAFETY: every member of the union is plain data.
        let expected = unsafe { value.reg128 };
        assert_eq!(
            get(&guest.vcpu, name),
            [expected.low_part, expected.high_part],
            "register {name:#x}"
        );
    }
    for name in [
        hv_register_name_HV_X64_REGISTER_GDTR,
        hv_register_name_HV_X64_REGISTER_IDTR,
    ] {
        let mut assoc = hv_register_assoc {
            name,
            ..Default::default()
        };
        assoc.value.table = hv_x64_table_register {
            pad: [0; 3],
            limit: 0x7f,
            base: 0xffff_8000_0000_1000,
        };
        guest.vcpu.set_reg(&[assoc]).expect("a table");
        assert_eq!(get(&guest.vcpu, name), [0x7f << 48, 0xffff_8000_0000_1000]);
    }
}

fn vector_registers() {
    let guest = Guest::new(&[0xf4]);
    let mut names: Vec<u32> =
        (hv_register_name_HV_X64_REGISTER_XMM0..=hv_register_name_HV_X64_REGISTER_XMM15).collect();
    names.extend(
        hv_register_name_HV_X64_REGISTER_FP_MMX0..=hv_register_name_HV_X64_REGISTER_FP_MMX7,
    );
    let value = |name: u32| hv_u128 {
        low_part: u64::from(name) << 32 | 7,
        high_part: u64::from(name),
    };
    let assocs: Vec<_> = names
        .iter()
        .map(|name| hv_register_assoc {
            name: *name,
            value: hv_register_value {
                reg128: value(*name),
            },
            ..Default::default()
        })
        .collect();
    guest.vcpu.set_reg(&assocs).expect("vectors");
    for name in names {
        let hv_u128 {
            low_part,
            high_part,
        } = value(name);
        let [low, high] = get(&guest.vcpu, name);
        // An x87 register has 80 bits.
        let mask = if name < hv_register_name_HV_X64_REGISTER_FP_MMX0 {
            u64::MAX
        } else {
            0xffff
        };
        assert_eq!(
            (low, high & mask),
            (low_part, high_part & mask),
            "register {name:#x}"
        );
    }
    let mut fpu = guest.vcpu.get_fpu().expect("the FPU");
    assert_eq!(fpu.mxcsr, 0x1f80);
    fpu.fcw = 0x27f;
    fpu.mxcsr = 0x1fa0;
    guest.vcpu.set_fpu(&fpu).expect("the FPU");
    let back = guest.vcpu.get_fpu().expect("the FPU");
    assert_eq!((back.fcw, back.mxcsr), (0x27f, 0x1fa0));
}

fn xsave_state() {
    let guest = Guest::new(&[0xf4]);
    let name = hv_register_name_HV_X64_REGISTER_XMM3;
    guest.set(&[(name, 0x1234_5678)]);
    let mut state = guest.vcpu.get_xsave().expect("the image");
    let word = |state: &XSave, at: usize| {
        u64::from_le_bytes(std::array::from_fn(|byte| state.buffer[at + byte]))
    };
    assert_eq!(word(&state, 520) >> 63, 1, "compacted");
    assert_eq!(word(&state, 160 + 48), 0x1234_5678);
    let states = hv_partition_property_code_HV_PARTITION_PROPERTY_XSAVE_STATES;
    let states = guest.vm.get_partition_property(states).expect("a property");
    assert_eq!(word(&state, 520) & !(1 << 63), states);
    if states & 4 != 0 {
        // The upper half of YMM1, the first component after the header.
        state.buffer[576 + 16..576 + 32].fill(0xab);
        state.buffer[512] |= 6;
    }
    state.buffer[160 + 48] = 0x99;
    guest.vcpu.set_xsave(&state).expect("the image");
    assert_eq!(guest.get(name), 0x1234_5699);
    let back = guest.vcpu.get_xsave().expect("the image");
    assert_eq!(back.buffer[512..832], state.buffer[512..832]);
    // Not compacted: refused.
    state.buffer[527] = 0;
    assert!(guest.vcpu.set_xsave(&state).is_err());
}

fn other_state_pages() {
    let guest = Guest::new(&[0xf4]);
    for kind in [
        MSHV_VP_STATE_SIMP,
        MSHV_VP_STATE_SIEFP,
        MSHV_VP_STATE_SYNTHETIC_TIMERS,
    ] {
        let buffer = Buffer::new(4096, 4096).expect("a page");
        let bytes = |buffer: &Buffer| {
            // SAFETY: the buffer is 4096 bytes.
            unsafe { std::slice::from_raw_parts_mut(buffer.buf, 4096) }
        };
        bytes(&buffer).fill(0);
        bytes(&buffer)[..4].copy_from_slice(&[1, 2, 3, kind as u8]);
        let mut state = mshv_get_set_vp_state {
            type_: kind as u8,
            buf_sz: 4096,
            buf_ptr: buffer.buf as u64,
            ..Default::default()
        };
        guest.vcpu.set_vp_state_ioctl(&state).expect("the state");
        bytes(&buffer).fill(0xee);
        state.buf_sz = 4096;
        guest
            .vcpu
            .get_vp_state_ioctl(&mut state)
            .expect("the state");
        assert_eq!(bytes(&buffer)[..4], [1, 2, 3, kind as u8]);
        assert_eq!(
            { state.buf_sz },
            if kind == MSHV_VP_STATE_SYNTHETIC_TIMERS {
                200
            } else {
                4096
            }
        );
    }
}

fn entry(function: u32, index: u32, values: [u32; 4]) -> hv_cpuid_entry {
    let [eax, ebx, ecx, edx] = values;
    hv_cpuid_entry {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn cpuid_results() {
    let guest = Guest::new(&[0xf4]);
    let second = guest.vm.create_vcpu(1).expect("a VP");
    let look = |leaf, subleaf| {
        guest
            .vcpu
            .get_cpuid_values(leaf, subleaf, 0, 0)
            .expect("values")
    };
    assert_eq!(look(0x4000_0000, 0)[1], u32::from_le_bytes(*b"Micr"));
    assert_eq!(look(1, 0)[1] >> 24, 0);
    assert_eq!(
        second.get_cpuid_values(1, 0, 0, 0).expect("values")[1] >> 24,
        1
    );
    // With masks that equal the values, bits are added.
    let before = look(0x8000_0002, 0);
    let name = entry(0x8000_0002, 0, [0x4141_4141, 0, 0, 0]);
    guest
        .vcpu
        .register_intercept_result_cpuid_entry(&name, Some(1), None)
        .expect("a result");
    assert_eq!(look(0x8000_0002, 0)[0], before[0] | 0x4141_4141);
    assert_eq!(look(0x8000_0002, 0)[1..], before[1..]);
    assert_eq!(
        second
            .get_cpuid_values(0x8000_0002, 0, 0, 0)
            .expect("values"),
        before,
        "one VP only"
    );
    // A subleaf that the hypervisor has not.
    let topology = entry(0x1f, 5, [1, 2, 3, 4]);
    guest
        .vcpu
        .register_intercept_result_cpuid_entry(&topology, Some(1), Some(1))
        .expect("a result");
    assert_eq!(look(0x1f, 5), [1, 2, 3, 4]);
    assert_eq!(look(0x1f, 6), [0; 4]);
}

fn the_guest_sees_cpuid_results() {
    // mov eax, 0x80000003; cpuid; out 1, eax
    let guest = Guest::new(&[0x66, 0xb8, 3, 0, 0, 0x80, 0x0f, 0xa2, 0x66, 0xe7, 0x01]);
    let input = hv_input_register_intercept_result {
        vp_index: 0,
        intercept_type: hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID,
        parameters: hv_register_intercept_result_parameters {
            cpuid: hv_register_x64_cpuid_result_parameters {
                input: hv_register_x64_cpuid_result_parameters__bindgen_ty_1 {
                    eax: 0x8000_0003,
                    always_override: 1,
                    ..Default::default()
                },
                result: hv_register_x64_cpuid_result_parameters__bindgen_ty_2 {
                    eax: 0x6b6f_6f6c,
                    eax_mask: u32::MAX,
                    ..Default::default()
                },
            },
        },
        ..Default::default()
    };
    let mut args = make_args!(HVCALL_REGISTER_INTERCEPT_RESULT, input);
    guest.vm.hvcall(&mut args).expect("a result");
    assert_eq!({ guest.port().rax }, 0x6b6f_6f6c);
}

fn host_properties() {
    let hv = mshv_ioctls::Mshv::new().expect("/dev/mshv opens");
    let get = |code| hv.get_host_partition_property(code).expect("a property");
    assert_ne!(
        get(hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0),
        0
    );
    let width = get(hv_partition_property_code_HV_PARTITION_PROPERTY_PHYSICAL_ADDRESS_WIDTH);
    assert!((36..=52).contains(&width), "{width}");
    assert!(get(hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_VENDOR) <= 2);
    let guest = Guest::new(&[0xf4]);
    let hertz = hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_CLOCK_FREQUENCY;
    assert!(guest.vm.get_partition_property(hertz).expect("a property") > 100_000_000);
    assert!(!guest.vm.get_msr_index_list().expect("a list").is_empty());
}
