//! MSHV_ROOT_HVCALL: the hypercalls that the driver passes through, and the checks on the way.

use mshv_bindings::*;

use crate::cpuid::{self, Registered};
use crate::gva::{self, Access};
use crate::partition::{Host, Partition};
use crate::property;
use crate::registers::{Bank, Value};
use crate::status::{self, Status};
use crate::sys::{self, Answer, note};

/// The driver's list (`mshv_passthru_hvcalls`).
const PASSED: &[u32] = &[
    HVCALL_GET_PARTITION_PROPERTY,
    HVCALL_GET_PARTITION_PROPERTY_EX,
    HVCALL_SET_PARTITION_PROPERTY,
    HVCALL_INSTALL_INTERCEPT,
    HVCALL_GET_VP_REGISTERS,
    HVCALL_SET_VP_REGISTERS,
    HVCALL_TRANSLATE_VIRTUAL_ADDRESS,
    HVCALL_CLEAR_VIRTUAL_INTERRUPT,
    HVCALL_REGISTER_INTERCEPT_RESULT,
    HVCALL_ASSERT_VIRTUAL_INTERRUPT,
    HVCALL_GET_GPA_PAGES_ACCESS_STATES,
    HVCALL_SIGNAL_EVENT_DIRECT,
    HVCALL_POST_MESSAGE_DIRECT,
    HVCALL_GET_VP_CPUID_VALUES,
];

/// What may be asked about the host itself (`mshv_self_passthru_hvcalls`).
const PASSED_FOR_HOST: &[u32] = &[
    HVCALL_GET_PARTITION_PROPERTY,
    HVCALL_GET_PARTITION_PROPERTY_EX,
];

/// HvCallGetGpaPagesAccessState (TLFS); the bindings leave it out.
const HVCALL_GET_GPA_PAGES_ACCESS_STATES: u32 = 0x00c9;

/// HV_STATUS_INVALID_SYNIC_STATE: the synthetic interrupt controller is not enabled.
const INVALID_SYNIC_STATE: Status = Status(12);

/// A hypercall under way: its input page and what goes back.
struct Call {
    reps: usize,
    input: Vec<u8>,
    output: Option<Vec<u8>>,
    /// Reps done.
    done: usize,
}

impl Call {
    /// The fixed part of the input.
    fn head<T: Copy>(&self) -> Result<T, Status> {
        self.at(0)
    }

    fn at<T: Copy>(&self, offset: usize) -> Result<T, Status> {
        if self.input.len() < offset + size_of::<T>() {
            note!(
                "a hypercall's input has {} bytes; {} are needed",
                self.input.len(),
                offset + size_of::<T>()
            );
            return Err(status::InvalidHypercallInput);
        }
        // SAFETY: the bytes are there, and all structures read are plain data.
        Ok(unsafe { self.input.as_ptr().add(offset).cast::<T>().read_unaligned() })
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) -> Result<(), Status> {
        let Some(output) = &mut self.output else {
            note!("a hypercall has no room for its output");
            return Err(status::InvalidHypercallInput);
        };
        match output.get_mut(offset..offset + bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(status::InvalidHypercallInput),
        }
    }

    /// Simple calls have no reps, rep calls have some.
    fn expect_reps(&self, wanted: bool) -> Result<(), Status> {
        if (self.reps > 0) == wanted {
            Ok(())
        } else {
            note!("a hypercall comes with {} reps", self.reps);
            Err(status::InvalidHypercallInput)
        }
    }
}

/// The checks and copies of `mshv_ioctl_passthru_hvcall`.
///
/// # Safety
///
/// `argument` points to a `mshv_root_hvcall` whose buffers are as large as it says.
unsafe fn pass(
    argument: u64,
    allowed: &[u32],
    locked: bool,
    work: impl FnOnce(u32, &mut Call) -> Result<(), Status>,
) -> Answer<()> {
    // SAFETY: vouched for by the caller.
    let mut args: mshv_root_hvcall = unsafe { sys::copy_from(argument)? };
    let (code, in_size, out_size) = (
        u32::from(args.code),
        usize::from(args.in_sz),
        usize::from(args.out_sz),
    );
    let page = MSHV_HV_PAGE_SIZE as usize;
    if args.status != 0
        || { args.in_ptr } == 0
        || in_size < 8
        || in_size > page
        || args.rsvd != [0; 6]
        || ({ args.out_ptr } != 0 && (out_size == 0 || out_size > page))
    {
        note!("ROOT_HVCALL {code:#x}: sizes, addresses, status or reserved bytes are wrong");
        return Err(libc::EINVAL);
    }
    if !allowed.contains(&code) {
        note!("ROOT_HVCALL {code:#x}: not passed through");
        return Err(libc::EINVAL);
    }
    if code == HVCALL_SET_PARTITION_PROPERTY && !locked {
        note!("ROOT_HVCALL: properties are set on the partition's descriptor only");
        return Err(libc::EINVAL);
    }
    // SAFETY: vouched for by the caller.
    let input =
        unsafe { std::slice::from_raw_parts({ args.in_ptr } as *const u8, in_size) }.to_vec();
    let output = ({ args.out_ptr } != 0).then(|| vec![0; page]);
    let mut call = Call {
        reps: usize::from(args.reps),
        input,
        output,
        done: 0,
    };
    let result = work(code, &mut call);
    args.status = result.map_or_else(|status| status.0, |()| 0);
    args.reps = call.done as u16;
    // SAFETY: vouched for by the caller.
    unsafe {
        sys::copy_to(argument, &args)?;
        if let Some(output) = call.output {
            std::ptr::copy_nonoverlapping(output.as_ptr(), { args.out_ptr } as *mut u8, out_size);
        }
    }
    result.map_err(|status| {
        note!(
            "ROOT_HVCALL {code:#x}: status {:#x} after {} reps",
            status.0,
            call.done
        );
        status.errno()
    })
}

/// MSHV_ROOT_HVCALL on `/dev/mshv`.
///
/// # Safety
///
/// As for [`pass`].
pub(crate) unsafe fn of_host(host: &Host, argument: u64) -> Answer<()> {
    let work = |code, call: &mut Call| {
        get_property(code, call, |property| property::get_host(host, property))
    };
    // SAFETY: vouched for by the caller.
    unsafe { pass(argument, PASSED_FOR_HOST, true, work) }
}

fn get_property(
    code: u32,
    call: &mut Call,
    simple: impl FnOnce(u32) -> Result<u64, Status>,
) -> Result<(), Status> {
    call.expect_reps(false)?;
    if code == HVCALL_GET_PARTITION_PROPERTY {
        let input: hv_input_get_partition_property = call.head()?;
        let value = simple(input.property_code)?;
        call.put(0, &value.to_le_bytes())
    } else {
        let input: hv_input_get_partition_property_ex = call.head()?;
        let value = property::get_extended(input.property_code)?;
        call.put(0, &value)
    }
}

/// MSHV_ROOT_HVCALL on a partition's or a VP's descriptor; `locked` tells which.
///
/// # Safety
///
/// As for [`pass`].
pub(crate) unsafe fn of_partition(
    partition: &Partition,
    locked: bool,
    argument: u64,
) -> Answer<()> {
    let work = |code, call: &mut Call| match code {
        HVCALL_GET_PARTITION_PROPERTY | HVCALL_GET_PARTITION_PROPERTY_EX => {
            get_property(code, call, |property| property::get(partition, property))
        }
        HVCALL_SET_PARTITION_PROPERTY => {
            call.expect_reps(false)?;
            let input: hv_input_set_partition_property = call.head()?;
            property::set(partition, input.property_code, input.property_value)
        }
        HVCALL_INSTALL_INTERCEPT => install_intercept(partition, call),
        HVCALL_GET_VP_REGISTERS => get_registers(partition, call),
        HVCALL_SET_VP_REGISTERS => set_registers(partition, call),
        HVCALL_TRANSLATE_VIRTUAL_ADDRESS => translate(partition, call),
        HVCALL_REGISTER_INTERCEPT_RESULT => register_result(partition, call),
        HVCALL_GET_VP_CPUID_VALUES => cpuid_values(partition, call),
        HVCALL_ASSERT_VIRTUAL_INTERRUPT => {
            call.expect_reps(false)?;
            let input = call.head()?;
            crate::vp::lock(&partition.interrupts).assert(&partition.vm, &input)
        }
        // Takes back an external interrupt that nobody acknowledged; the double never holds one.
        HVCALL_CLEAR_VIRTUAL_INTERRUPT => call.expect_reps(false),
        HVCALL_GET_GPA_PAGES_ACCESS_STATES => access_states(partition, call),
        // No guest of the double has a synthetic interrupt controller.
        _ => Err(INVALID_SYNIC_STATE),
    };
    // SAFETY: vouched for by the caller.
    unsafe { pass(argument, PASSED, locked, work) }
}

fn install_intercept(partition: &Partition, call: &Call) -> Result<(), Status> {
    call.expect_reps(false)?;
    let input: hv_input_install_intercept = call.head()?;
    let (kind, access) = (input.intercept_type, input.access_type);
    #[expect(non_upper_case_globals, reason = "names of the TLFS")]
    match kind {
        hv_intercept_type_HV_INTERCEPT_TYPE_X64_MSR if access & !3 == 0 => {
            partition.set_msr_intercepts(access);
            Ok(())
        }
        // Ports without a handler in the hypervisor are intercepted for partitions of this kind anyway.
        hv_intercept_type_HV_INTERCEPT_TYPE_X64_IO_PORT if access & !3 == 0 => Ok(()),
        _ => {
            note!(
                "INSTALL_INTERCEPT: type {kind}, access {access:#x} is unknown or cannot be had through KVM"
            );
            Err(status::InvalidParameter)
        }
    }
}

/// Checks what both register calls begin with; returns the VP's index.
fn register_head(call: &Call) -> Result<u32, Status> {
    call.expect_reps(true)?;
    let input: hv_input_get_vp_registers_head = call.head()?;
    if input.vtl != 0 || input.reserved != [0; 3] {
        note!("VP registers: a VTL is named, or reserved fields are not zero");
        return Err(status::InvalidParameter);
    }
    Ok(input.vp_index)
}

/// `hv_input_get_vp_registers` and `hv_input_set_vp_registers` without their lists.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct hv_input_get_vp_registers_head {
    partition_id: u64,
    vp_index: u32,
    vtl: u8,
    reserved: [u8; 3],
}

fn get_registers(partition: &Partition, call: &mut Call) -> Result<(), Status> {
    let vp = partition.vp(register_head(call)?)?;
    vp.visit(|state| {
        let mut bank = Bank::new(&vp.vcpu);
        for index in 0..call.reps {
            let name: u32 = call.at(size_of::<hv_input_get_vp_registers_head>() + 4 * index)?;
            let Value([low, high]) = bank.get(state, name)?;
            call.put(
                16 * index,
                &[low.to_le_bytes(), high.to_le_bytes()].concat(),
            )?;
            call.done += 1;
        }
        Ok(())
    })
}

fn set_registers(partition: &Partition, call: &mut Call) -> Result<(), Status> {
    #[repr(C, packed)]
    #[derive(Clone, Copy)]
    struct Assoc {
        name: u32,
        reserved1: u32,
        reserved2: u64,
        value: [u64; 2],
    }
    const { assert!(size_of::<Assoc>() == size_of::<hv_register_assoc>()) };
    let vp = partition.vp(register_head(call)?)?;
    vp.visit(|state| {
        let mut bank = Bank::new(&vp.vcpu);
        let mut result = Ok(());
        for index in 0..call.reps {
            let one = (|| {
                let at = size_of::<hv_input_get_vp_registers_head>() + size_of::<Assoc>() * index;
                let assoc: Assoc = call.at(at)?;
                if assoc.reserved1 != 0 || { assoc.reserved2 } != 0 {
                    note!("VP registers: reserved fields of element {index} are not zero");
                    return Err(status::InvalidParameter);
                }
                bank.set(state, assoc.name, Value(assoc.value))
            })();
            if one.is_err() {
                result = one;
                break;
            }
            call.done += 1;
        }
        if let Err(refused) = bank.flush() {
            call.done = 0;
            return Err(refused);
        }
        result
    })
}

fn translate(partition: &Partition, call: &mut Call) -> Result<(), Status> {
    call.expect_reps(false)?;
    let input: hv_input_translate_virtual_address = call.head()?;
    let (flags, page) = (input.control_flags, input.gva_page);
    let known = HV_TRANSLATE_GVA_VALIDATE_READ
        | HV_TRANSLATE_GVA_VALIDATE_WRITE
        | HV_TRANSLATE_GVA_VALIDATE_EXECUTE
        | HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT
        | HV_TRANSLATE_GVA_SET_PAGE_TABLE_BITS
        | HV_TRANSLATE_GVA_TLB_FLUSH_INHIBIT
        | HV_TRANSLATE_GVA_SUPERVISOR_ACCESS
        | HV_TRANSLATE_GVA_USER_ACCESS
        | HV_TRANSLATE_GVA_ENFORCE_SMAP
        | HV_TRANSLATE_GVA_OVERRIDE_SMAP
        | HV_TRANSLATE_GVA_SHADOW_STACK;
    if flags & !u64::from(known) != 0 || page >> 52 != 0 {
        note!("TRANSLATE_VIRTUAL_ADDRESS: unknown flags {flags:#x}, or page {page:#x}");
        return Err(status::InvalidParameter);
    }
    let has = |flag: u32| flags & u64::from(flag) != 0;
    let vp = partition.vp(input.vp_index)?;
    let sregs = vp
        .visit(|_| vp.vcpu.sregs())
        .map_err(|_| status::OperationFailed)?;
    let user = match (
        has(HV_TRANSLATE_GVA_USER_ACCESS),
        has(HV_TRANSLATE_GVA_SUPERVISOR_ACCESS),
    ) {
        (true, false) => true,
        (false, true) => false,
        _ => sregs.ss.dpl == 3,
    };
    let access = Access {
        write: has(HV_TRANSLATE_GVA_VALIDATE_WRITE),
        execute: has(HV_TRANSLATE_GVA_VALIDATE_EXECUTE),
        user,
        exempt: has(HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT),
    };
    let memory = partition
        .memory
        .read()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let (code, gpa_page) = match gva::translate(&memory, &sregs, page << 12, access) {
        Ok(gpa) => match memory.region(gpa >> 12) {
            None => (
                hv_translate_gva_result_code_HV_TRANSLATE_GVA_GPA_UNMAPPED,
                gpa >> 12,
            ),
            Some(region) if access.write && !region.writable => (
                hv_translate_gva_result_code_HV_TRANSLATE_GVA_GPA_NO_WRITE_ACCESS,
                gpa >> 12,
            ),
            Some(_) => (
                hv_translate_gva_result_code_HV_TRANSLATE_GVA_SUCCESS,
                gpa >> 12,
            ),
        },
        Err(code) => (code, 0),
    };
    call.put(0, &u64::from(code).to_le_bytes())?;
    call.put(8, &gpa_page.to_le_bytes())
}

fn register_result(partition: &Partition, call: &Call) -> Result<(), Status> {
    call.expect_reps(false)?;
    let input: hv_input_register_intercept_result = call.head()?;
    let kind = input.intercept_type;
    if kind != hv_intercept_type_HV_INTERCEPT_TYPE_X64_CPUID {
        note!("REGISTER_INTERCEPT_RESULT: only CPUID results are supported, not type {kind}");
        return Err(status::InvalidParameter);
    }
    // SAFETY: the type says which member of the union it is, and all are plain data.
    let hv_register_x64_cpuid_result_parameters { input: key, result } =
        unsafe { input.parameters.cpuid };
    if key.subleaf_specific > 1 || key.always_override > 1 || { key.padding } != 0 {
        note!("REGISTER_INTERCEPT_RESULT: flags or padding are wrong");
        return Err(status::InvalidParameter);
    }
    let registered = Registered {
        leaf: key.eax,
        subleaf: (key.subleaf_specific != 0).then_some(key.ecx),
        always: key.always_override != 0,
        values: [result.eax, result.ebx, result.ecx, result.edx],
        masks: [
            result.eax_mask,
            result.ebx_mask,
            result.ecx_mask,
            result.edx_mask,
        ],
    };
    let vp = partition.vp(input.vp_index)?;
    vp.visit(|state| {
        if state.ran {
            note!(
                "REGISTER_INTERCEPT_RESULT: VP {} has run; KVM keeps its CPUID",
                vp.index
            );
            return Err(status::OperationDenied);
        }
        state.register(registered);
        vp.vcpu.set_cpuid(&state.cpuid(true)).map_err(|error| {
            note!("REGISTER_INTERCEPT_RESULT: KVM refuses the table: errno {error}");
            status::InvalidParameter
        })
    })
}

fn cpuid_values(partition: &Partition, call: &mut Call) -> Result<(), Status> {
    #[repr(C, packed)]
    #[derive(Clone, Copy)]
    struct Head {
        partition_id: u64,
        vp_index: u32,
        flags: u32,
        reserved: [u32; 2],
    }
    call.expect_reps(true)?;
    let head: Head = call.head()?;
    if head.flags >> 2 != 0 || { head.reserved } != [0; 2] {
        note!("GET_VP_CPUID_VALUES: unknown flags, or reserved fields are not zero");
        return Err(status::InvalidParameter);
    }
    let vp = partition.vp(head.vp_index)?;
    let table = vp.visit(|state| state.cpuid(head.flags & 2 != 0));
    for index in 0..call.reps {
        let leaf: hv_cpuid_leaf_info =
            call.at(size_of::<Head>() + size_of::<hv_cpuid_leaf_info>() * index)?;
        let found = cpuid::find(&table, leaf.eax, leaf.ecx);
        let values = found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        call.put(16 * index, &values.map(u32::to_le_bytes).concat())?;
        call.done += 1;
    }
    Ok(())
}

fn access_states(partition: &Partition, call: &mut Call) -> Result<(), Status> {
    #[repr(C, packed)]
    #[derive(Clone, Copy)]
    struct Head {
        partition_id: u64,
        /// Bit 0 clears accessed, 1 sets accessed, 2 clears dirty, 3 sets dirty.
        flags: u64,
        page: u64,
    }
    call.expect_reps(true)?;
    let head: Head = call.head()?;
    let flags = head.flags;
    if flags >> 4 != 0 || flags & 3 == 3 || flags & 12 == 12 {
        return Err(status::InvalidParameter);
    }
    let change = match flags & 12 {
        4 => Some(false),
        8 => Some(true),
        _ => None,
    };
    let mut states = vec![1u8; call.reps];
    let mut memory = partition
        .memory
        .write()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let count = call.reps as u64;
    memory.dirty(&partition.vm, head.page, count, change, |page, dirty| {
        if dirty {
            states[page as usize] |= 2;
        }
    })?;
    call.put(0, &states)?;
    call.done = call.reps;
    Ok(())
}
