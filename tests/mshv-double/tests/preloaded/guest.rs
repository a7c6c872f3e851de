//! A small real-mode guest with some RAM, and what a client does to run it.

use mshv_bindings::*;
use mshv_ioctls::{Mshv, MshvError, VcpuFd, VmFd, VmType, set_bits};

/// Bytes of RAM from guest physical 0.
pub(crate) const RAM: usize = 0x1_0000;
/// Where code starts.
pub(crate) const CODE: u64 = 0x1000;
/// The first address above RAM that a real-mode segment register reaches.
pub(crate) const DEVICE: u64 = 0x2_0000;

/// Pages of the client that the guest sees.
pub(crate) struct Ram {
    pub(crate) address: *mut u8,
    pub(crate) size: usize,
}

// SAFETY: the pages are only read and written as bytes, by trials that do so one at a time.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub(crate) fn new(size: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        Ram {
            address: address.cast(),
            size,
        }
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        // SAFETY: checked to lie inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) };
    }

    pub(crate) fn read(&self, at: usize, length: usize) -> Vec<u8> {
        assert!(at + length <= self.size);
        // SAFETY: checked to lie inside the mapping.
        unsafe { std::slice::from_raw_parts(self.address.add(at), length) }.to_vec()
    }

    pub(crate) fn region(&self, first_pfn: u64, writable: bool) -> mshv_user_mem_region {
        let mut flags = set_bits!(u8, MSHV_SET_MEM_BIT_EXECUTABLE);
        if writable {
            flags |= set_bits!(u8, MSHV_SET_MEM_BIT_WRITABLE);
        }
        mshv_user_mem_region {
            size: self.size as u64,
            guest_pfn: first_pfn,
            userspace_addr: self.address as u64,
            flags,
            ..Default::default()
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; the guest goes before its RAM.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}

/// A partition with one VP and RAM. Fields are dropped in this order.
pub(crate) struct Guest {
    pub(crate) vcpu: VcpuFd,
    pub(crate) vm: VmFd,
    pub(crate) ram: Ram,
}

/// A partition that is initialized, without memory or VPs.
pub(crate) fn partition() -> VmFd {
    let hv = Mshv::new().expect("/dev/mshv opens");
    let vm = hv.create_vm_with_type(VmType::Normal).expect("a partition");
    vm.initialize().expect("initialize");
    vm
}

impl Guest {
    /// A guest whose VP is about to run `code` in real mode at [`CODE`], with ES at [`DEVICE`], DS 0, and a stack.
    pub(crate) fn new(code: &[u8]) -> Self {
        let vm = partition();
        let ram = Ram::new(RAM);
        ram.write(CODE as usize, code);
        vm.map_user_memory(ram.region(0, true)).expect("memory");
        let vcpu = vm.create_vcpu(0).expect("a VP");
        let guest = Guest { vcpu, vm, ram };
        let segment = |selector: u16| hv_register_value {
            segment: hv_x64_segment_register {
                base: u64::from(selector) << 4,
                limit: 0xffff,
                selector,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes: 0x93 },
            },
        };
        let mut cs = segment(0);
        // SAFETY: the member just written.
        unsafe { cs.segment.__bindgen_anon_1.attributes = 0x9b };
        let assoc = |name, value| hv_register_assoc {
            name,
            value,
            ..Default::default()
        };
        guest
            .vcpu
            .set_reg(&[
                assoc(hv_register_name_HV_X64_REGISTER_CS, cs),
                assoc(hv_register_name_HV_X64_REGISTER_DS, segment(0)),
                assoc(hv_register_name_HV_X64_REGISTER_SS, segment(0)),
                assoc(
                    hv_register_name_HV_X64_REGISTER_ES,
                    segment((DEVICE >> 4) as u16),
                ),
            ])
            .expect("segments");
        guest.set(&[
            (hv_register_name_HV_X64_REGISTER_RIP, CODE),
            (hv_register_name_HV_X64_REGISTER_RSP, 0x8000),
            (hv_register_name_HV_X64_REGISTER_RFLAGS, 2),
        ]);
        guest
    }

    pub(crate) fn set(&self, registers: &[(u32, u64)]) {
        set(&self.vcpu, registers).expect("registers are set");
    }

    pub(crate) fn get(&self, name: u32) -> u64 {
        get(&self.vcpu, name)[0]
    }

    pub(crate) fn run(&self) -> hv_message {
        self.vcpu.run().expect("a message")
    }

    /// Runs to the next port access.
    pub(crate) fn port(&self) -> hv_x64_io_port_intercept_message {
        let message = self.run();
        let kind = message.header.message_type;
        assert_eq!(
            kind, hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT,
            "message {kind:#x}"
        );
        message.to_ioport_info().expect("a port message")
    }

    /// Runs to the next access outside RAM.
    pub(crate) fn memory(&self) -> hv_x64_memory_intercept_message {
        let message = self.run();
        let kind = message.header.message_type;
        assert_eq!(
            kind, hv_message_type_HVMSG_UNMAPPED_GPA,
            "message {kind:#x}"
        );
        message.to_memory_info().expect("a memory message")
    }
}

pub(crate) fn set(vcpu: &VcpuFd, registers: &[(u32, u64)]) -> Result<(), MshvError> {
    let assocs: Vec<_> = registers
        .iter()
        .map(|(name, value)| hv_register_assoc {
            name: *name,
            value: hv_register_value {
                reg128: hv_u128 {
                    low_part: *value,
                    high_part: 0,
                },
            },
            ..Default::default()
        })
        .collect();
    vcpu.set_reg(&assocs)
}

pub(crate) fn get(vcpu: &VcpuFd, name: u32) -> [u64; 2] {
    let mut assoc = [hv_register_assoc {
        name,
        ..Default::default()
    }];
    vcpu.get_reg(&mut assoc).expect("a register");
    // SAFETY: every register is at most 128 plain bits.
    let value = unsafe { assoc[0].value.reg128 };
    [value.low_part, value.high_part]
}
