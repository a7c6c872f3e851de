//! A partition: what MSHV_CREATE_PARTITION makes, and the ioctls of its descriptor.
//!
//! ```text
//!   created ── early properties ──► MSHV_INITIALIZE_PARTITION ──► memory, VPs, intercepts, interrupts ──► released
//! ```
//!
//! The partition goes when its own descriptor and those of all its VPs are closed, and takes all KVM descriptors along.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use kvm_bindings::*;
use mshv_bindings::*;

use crate::cpuid::{self, Features};
use crate::hypercall;
use crate::interrupt::Interrupts;
use crate::kvm::{Kvm, Vm};
use crate::memory::Memory;
use crate::message::Kind;
use crate::shared::SHARED;
use crate::status::{self, Status};
use crate::sys::{self, Answer, note};
use crate::vp::{Timing, Vp, lock};
use crate::xsave::Layout;

/// The driver's limit (drivers/hv/mshv_root.h, MSHV_MAX_VPS).
const MAX_VPS: u32 = 256;

/// Where KVM may put the TSS and the page table it needs for real mode on old Intel processors: below the local APIC's
/// and the flash's addresses, where no memory map of a guest has RAM.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: u64 = 0xfffb_d000;

/// What the host's KVM offers, and how the Microsoft Hypervisor would describe it.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) features: Features,
}

impl Host {
    pub(crate) fn open() -> Answer<Self> {
        let kvm = Kvm::open()?;
        let mut cpuid = kvm.supported_cpuid()?;
        // Older KVMs tell this one feature apart from the table.
        if kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0 {
            let leaves = cpuid.iter_mut().filter(|leaf| leaf.function == 1);
            leaves.for_each(|leaf| leaf.ecx |= 1 << 24);
        }
        let features = Features::of_host(&cpuid);
        Ok(Host {
            kvm,
            cpuid,
            features,
        })
    }
}

/// What only holders of the partition's lock touch (the driver's `pt_mutex`).
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) initialized: bool,
    pub(crate) features: Features,
    /// Properties that are merely kept.
    pub(crate) properties: BTreeMap<u32, u64>,
    /// The partition clock while it is frozen, in nanoseconds.
    pub(crate) frozen_clock: Option<u64>,
}

/// A partition.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) id: u64,
    pub(crate) host: Arc<Host>,
    pub(crate) vm: Vm,
    pub(crate) memory: RwLock<Memory>,
    pub(crate) inner: Mutex<Inner>,
    pub(crate) interrupts: Mutex<Interrupts>,
    vps: Mutex<BTreeMap<u32, Arc<Vp>>>,
    /// Bit 0: reads of unknown MSRs are intercepted, bit 1: writes.
    msr_intercepts: AtomicU32,
    ignore_unknown_msrs: AtomicBool,
    frozen: AtomicBool,
    timing: Arc<Timing>,
}

impl Partition {
    /// MSHV_CREATE_PARTITION, with the checks of `mshv_ioctl_process_pt_flags`.
    ///
    /// # Safety
    ///
    /// `argument` points to the structure that its flags tell.
    pub(crate) unsafe fn create(host: Arc<Host>, argument: u64) -> Answer<Self> {
        // SAFETY: both versions begin with the first one.
        let first: mshv_create_partition = unsafe { sys::copy_from(argument)? };
        if first.pt_flags >> MSHV_PT_BIT_COUNT != 0
            || first.pt_isolation != u64::from(MSHV_PT_ISOLATION_NONE)
        {
            note!("CREATE_PARTITION: unknown flags or isolation: {first:x?}");
            return Err(libc::EINVAL);
        }
        let mut disabled = Features {
            processor: [0; 2],
            xsave: 0,
            synthetic: 0,
            x2apic: false,
        };
        if first.pt_flags >> MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES & 1 != 0 {
            // SAFETY: the flag says that it is the second version.
            let second: mshv_create_partition_v2 = unsafe { sys::copy_from(argument)? };
            let mshv_create_partition_v2 {
                pt_num_cpu_fbanks,
                pt_rsvd,
                pt_cpu_fbanks,
                pt_rsvd1,
                pt_disabled_xsave,
                ..
            } = second;
            if u32::from(pt_num_cpu_fbanks) != MSHV_NUM_CPU_FEATURES_BANKS
                || pt_rsvd != [0; 6]
                || pt_rsvd1 != [0; 2]
            {
                note!(
                    "CREATE_PARTITION: the number of banks is not 2, or reserved fields are not zero"
                );
                return Err(libc::EINVAL);
            }
            disabled.processor = pt_cpu_fbanks;
            disabled.xsave = pt_disabled_xsave;
        }
        if first.pt_flags >> MSHV_PT_BIT_LAPIC & 1 == 0 {
            eprintln!("mshv-double: a partition without local APICs is not supported");
            return Err(libc::EOPNOTSUPP);
        }
        let vm = host.kvm.create_vm()?;
        vm.set_identity_map(&IDENTITY_MAP)?;
        vm.set_tss_address(TSS)?;
        let enable = |cap: u32, argument: u64| {
            vm.enable_cap(&kvm_enable_cap {
                cap,
                args: [argument, 0, 0, 0],
                ..Default::default()
            })
        };
        enable(KVM_CAP_SPLIT_IRQCHIP, u64::from(crate::interrupt::PINS))?;
        enable(
            KVM_CAP_X2APIC_API,
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK),
        )?;
        // The hypervisor's local APIC timers run at 200 MHz, KVM's at 1 GHz if it cannot be told otherwise. A guest must be able to learn
        // which it is, so this is done only where KVM has the frequency registers.
        let adjustable = host.kvm.check_extension(KVM_CAP_X86_APIC_BUS_CYCLES_NS) > 0
            && host.kvm.check_extension(KVM_CAP_SYS_HYPERV_CPUID) > 0;
        let apic_timer_hz = if adjustable {
            enable(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 5)?;
            200_000_000
        } else {
            1_000_000_000
        };
        // Without it KVM cannot tell a pending exception from one that is being delivered.
        enable(KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
        enable(
            KVM_CAP_X86_USER_SPACE_MSR,
            u64::from(
                KVM_MSR_EXIT_REASON_UNKNOWN
                    | KVM_MSR_EXIT_REASON_INVAL
                    | KVM_MSR_EXIT_REASON_FILTER,
            ),
        )?;
        hide_kvm_msrs(&vm)?;
        // An OUT to port 0x7e would be retired before its exit.
        if host.kvm.check_extension(KVM_CAP_DISABLE_QUIRKS) > 0 {
            enable(
                KVM_CAP_DISABLE_QUIRKS,
                u64::from(KVM_X86_QUIRK_OUT_7E_INC_RIP),
            )?;
        }
        let features = Features {
            processor: [0, 1].map(|bank| host.features.processor[bank] & !disabled.processor[bank]),
            xsave: host.features.xsave & !disabled.xsave,
            synthetic: 0,
            x2apic: first.pt_flags >> MSHV_PT_BIT_X2APIC & 1 != 0,
        };
        static NEXT_ID: AtomicU64 = AtomicU64::new(2);
        Ok(Partition {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            host,
            vm,
            memory: RwLock::default(),
            inner: Mutex::new(Inner {
                initialized: false,
                features,
                properties: BTreeMap::new(),
                frozen_clock: None,
            }),
            interrupts: Mutex::default(),
            vps: Mutex::default(),
            msr_intercepts: AtomicU32::new(0),
            ignore_unknown_msrs: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            timing: Arc::new(Timing {
                tsc_written: AtomicBool::new(false),
                apic_timer_hz,
            }),
        })
    }

    /// An ioctl of the partition's descriptor. MSHV_CREATE_VP is not among them: it makes a descriptor.
    ///
    /// # Safety
    ///
    /// `argument` is what the request demands.
    pub(crate) unsafe fn ioctl(&self, request: u64, argument: u64) -> Answer {
        // SAFETY: the requests name the type of their argument, and `copy_from` demands no more than the caller promised.
        unsafe {
            match request {
                requests::INITIALIZE_PARTITION => {
                    lock(&self.inner).initialized = true;
                    Ok(())
                }
                requests::SET_GUEST_MEMORY => {
                    let region = sys::copy_from(argument)?;
                    self.require_initialized("SET_GUEST_MEMORY")?;
                    let mut memory = self
                        .memory
                        .write()
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                    memory.set(&self.vm, &region)
                }
                requests::IRQFD => {
                    lock(&self.interrupts).irqfd(&self.vm, &sys::copy_from(argument)?)
                }
                requests::IOEVENTFD => {
                    lock(&self.interrupts).ioeventfd(&self.vm, &sys::copy_from(argument)?)
                }
                requests::SET_MSI_ROUTING => {
                    let head: [u32; 2] = sys::copy_from(argument)?;
                    let mut entries = Vec::new();
                    if head[0] as usize > crate::interrupt::MAX_GSIS || head[1] != 0 {
                        note!(
                            "SET_MSI_ROUTING: too many entries, or the reserved field is not zero"
                        );
                        return Err(libc::EINVAL);
                    }
                    for index in 0..u64::from(head[0]) {
                        let size = size_of::<mshv_user_irq_entry>() as u64;
                        entries.push(sys::copy_from::<mshv_user_irq_entry>(
                            argument + 8 + index * size,
                        )?);
                    }
                    lock(&self.interrupts).set_msi_routing(&self.vm, &entries)
                }
                requests::GET_GPAP_ACCESS_BITMAP => self.access_bitmap(&sys::copy_from(argument)?),
                requests::ROOT_HVCALL => hypercall::of_partition(self, true, argument),
                _ => {
                    note!("partition: unknown ioctl {request:#x}");
                    Err(libc::ENOTTY)
                }
            }
            .map(|()| 0)
        }
    }

    fn require_initialized(&self, what: &str) -> Answer<()> {
        if lock(&self.inner).initialized {
            Ok(())
        } else {
            note!("{what}: the partition is not initialized");
            Err(status::InvalidPartitionState.errno())
        }
    }

    /// MSHV_CREATE_VP, but for the descriptor.
    ///
    /// # Safety
    ///
    /// `argument` points to a `mshv_create_vp`.
    pub(crate) unsafe fn create_vp(&self, argument: u64) -> Answer<Arc<Vp>> {
        // SAFETY: vouched for by the caller.
        let asked: mshv_create_vp = unsafe { sys::copy_from(argument)? };
        let index = asked.vp_index;
        if index >= MAX_VPS {
            note!("CREATE_VP: index {index} is not below {MAX_VPS}");
            return Err(libc::EINVAL);
        }
        let mut vps = lock(&self.vps);
        if vps.contains_key(&index) {
            note!("CREATE_VP: VP {index} exists");
            return Err(libc::EEXIST);
        }
        self.require_initialized("CREATE_VP")?;
        let features = lock(&self.inner).features;
        let kvm = &self.host.kvm;
        let shares = kvm.check_extension(KVM_CAP_SYNC_REGS) as u32 & SHARED == SHARED;
        let vcpu = self.vm.create_vcpu(index, kvm.run_size()?, shares)?;
        let base = cpuid::base(&self.host.cpuid, &features, index);
        vcpu.set_cpuid(&base)?;
        // KVM draws its map of APIC identifiers before a new vCPU is in its list; setting a state redraws it.
        vcpu.set_lapic(&vcpu.lapic()?)?;
        let vp = Arc::new(Vp::new(index, vcpu, base, Arc::clone(&self.timing)));
        vps.insert(index, Arc::clone(&vp));
        Ok(vp)
    }

    pub(crate) fn vp(&self, index: u32) -> Result<Arc<Vp>, Status> {
        lock(&self.vps).get(&index).cloned().ok_or_else(|| {
            note!("there is no VP {index}");
            status::InvalidVpIndex
        })
    }

    /// MSHV_GET_GPAP_ACCESS_BITMAP, with the checks of `mshv_partition_ioctl_get_gpap_access_bitmap`.
    ///
    /// # Safety
    ///
    /// The bitmap's address is good for a bit per page.
    unsafe fn access_bitmap(&self, asked: &mshv_gpap_access_bitmap) -> Answer<()> {
        let (kind, operation) = (u32::from(asked.access_type), u32::from(asked.access_op));
        if kind >= MSHV_GPAP_ACCESS_TYPE_COUNT
            || operation >= MSHV_GPAP_ACCESS_OP_COUNT
            || asked.rsvd != [0; 6]
            || asked.page_count == 0
            || asked.bitmap_ptr == 0
        {
            note!(
                "GET_GPAP_ACCESS_BITMAP: type, operation, count, address or reserved bytes are wrong: {asked:x?}"
            );
            return Err(libc::EINVAL);
        }
        // The driver hands the count on as 32 bits and allocates a byte a page.
        let count = u32::try_from(asked.page_count).map_err(|_| libc::ENOMEM)?;
        let change = match operation {
            MSHV_GPAP_ACCESS_OP_CLEAR => Some(false),
            MSHV_GPAP_ACCESS_OP_SET => Some(true),
            _ => None,
        };
        let mut bitmap = vec![0u8; count.div_ceil(8) as usize];
        let mut memory = self
            .memory
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let everything = kind == MSHV_GPAP_ACCESS_TYPE_ACCESSED;
        // KVM keeps no accessed bits; every page counts as accessed, always. Not accessed would imply not dirty.
        let change = if everything && change == Some(true) {
            None
        } else {
            change
        };
        memory
            .dirty(
                &self.vm,
                asked.gpap_base,
                u64::from(count),
                change,
                |page, dirty| {
                    if dirty || everything {
                        bitmap[(page / 8) as usize] |= 1 << (page % 8);
                    }
                },
            )
            .map_err(Status::errno)?;
        // SAFETY: vouched for by the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bitmap.as_ptr(),
                asked.bitmap_ptr as *mut u8,
                bitmap.len(),
            );
        };
        Ok(())
    }

    pub(crate) fn intercepts_msr(&self, kind: Kind) -> bool {
        self.msr_intercepts.load(Ordering::Relaxed) >> (kind as u32) & 1 != 0
    }

    pub(crate) fn set_msr_intercepts(&self, mask: u32) {
        self.msr_intercepts.store(mask, Ordering::Relaxed);
    }

    pub(crate) fn ignores_unknown_msrs(&self) -> bool {
        self.ignore_unknown_msrs.load(Ordering::Relaxed)
    }

    pub(crate) fn set_ignores_unknown_msrs(&self, ignore: bool) {
        self.ignore_unknown_msrs.store(ignore, Ordering::Relaxed);
    }

    pub(crate) fn frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    pub(crate) fn set_frozen(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Relaxed);
        if frozen {
            let vps: Vec<_> = lock(&self.vps).values().cloned().collect();
            // Nobody is in the guest when this returns.
            vps.iter().for_each(|vp| vp.visit(|_| ()));
        }
    }

    /// An end of interrupt of a level-triggered vector; true if the driver keeps it to itself.
    pub(crate) fn acknowledge(&self, vector: u8) -> bool {
        lock(&self.interrupts).acknowledge(vector)
    }

    /// How extended states lie in MSHV_VP_STATE_XSAVE.
    pub(crate) fn xsave_layout(&self) -> Layout {
        Layout::new(&self.host.cpuid, lock(&self.inner).features.xsave_states())
    }
}

/// Makes KVM's own MSRs (asm/kvm_para.h) unknown to guests, which do not run on KVM as far as they can tell.
fn hide_kvm_msrs(vm: &Vm) -> Answer<()> {
    // A clear bit denies; KVM reads whole words of 64.
    let mut denied = [0u8; 8];
    let mut filter = kvm_msr_filter {
        flags: KVM_MSR_FILTER_DEFAULT_ALLOW,
        ..Default::default()
    };
    for (range, (base, nmsrs)) in filter.ranges.iter_mut().zip([(0x11, 2), (0x4b56_4d00, 9)]) {
        *range = kvm_msr_filter_range {
            flags: KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
            nmsrs,
            base,
            bitmap: denied.as_mut_ptr(),
        };
    }
    vm.set_msr_filter(&filter)
}

/// Ioctl numbers (include/uapi/linux/mshv.h).
pub(crate) mod requests {
    use mshv_bindings::*;

    const fn number(direction: u64, number: u64, size: usize) -> u64 {
        direction << 30 | (size as u64) << 16 | (MSHV_IOCTL as u64) << 8 | number
    }

    pub(crate) const CREATE_PARTITION: u64 = number(1, 0, size_of::<mshv_create_partition>());
    pub(crate) const INITIALIZE_PARTITION: u64 = number(0, 0, 0);
    pub(crate) const CREATE_VP: u64 = number(1, 1, size_of::<mshv_create_vp>());
    pub(crate) const SET_GUEST_MEMORY: u64 = number(1, 2, size_of::<mshv_user_mem_region>());
    pub(crate) const IRQFD: u64 = number(1, 3, size_of::<mshv_user_irqfd>());
    pub(crate) const IOEVENTFD: u64 = number(1, 4, size_of::<mshv_user_ioeventfd>());
    pub(crate) const SET_MSI_ROUTING: u64 = number(1, 5, size_of::<mshv_user_irq_table>());
    pub(crate) const GET_GPAP_ACCESS_BITMAP: u64 =
        number(3, 6, size_of::<mshv_gpap_access_bitmap>());
    pub(crate) const ROOT_HVCALL: u64 = number(3, 7, size_of::<mshv_root_hvcall>());
    pub(crate) const RUN_VP: u64 = number(2, 0, size_of::<mshv_run_vp>());
    pub(crate) const GET_VP_STATE: u64 = number(3, 1, size_of::<mshv_get_set_vp_state>());
    pub(crate) const SET_VP_STATE: u64 = number(3, 2, size_of::<mshv_get_set_vp_state>());
}
