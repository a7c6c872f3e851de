//! Interrupts by request, by event descriptor, their end, start-up of a second VP, and signals to the client.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use mshv_bindings::*;
use mshv_ioctls::{InterruptRequest, IoEventAddress, MshvError, NoDatamatch};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{CODE, DEVICE, Guest, get, set};
use crate::trial;

const RIP: u32 = hv_register_name_HV_X64_REGISTER_RIP;
const VECTOR: u8 = 0x40;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("halt_and_wake_up", halt_and_wake_up),
        trial("end_of_a_level_interrupt", end_of_a_level_interrupt),
        trial("irqfd", irqfd),
        trial("irqfd_with_resample", irqfd_with_resample),
        trial("ioeventfd", ioeventfd),
        trial("start_up_of_a_second_vp", start_up_of_a_second_vp),
        trial("signals", signals),
        trial("registers_of_a_running_vp", registers_of_a_running_vp),
        trial("many_threads_at_once", many_threads),
        trial("frozen_time", frozen_time),
        trial("local_apic_state", local_apic_state),
    ]
}

/// sti; hlt; out 1, al; jmp to hlt. The handler of [`VECTOR`] ends the interrupt through the x2APIC (WRMSR 0x80b), does
/// out 2, al and returns.
fn sleeper() -> Guest {
    let guest = Guest::new(&[0xfb, 0xf4, 0xe6, 0x01, 0xeb, 0xfb]);
    let handler = [
        0x66, 0xb9, 0x0b, 0x08, 0x00, 0x00, // mov ecx, 0x80b
        0x66, 0x31, 0xc0, // xor eax, eax
        0x66, 0x31, 0xd2, // xor edx, edx
        0x0f, 0x30, // wrmsr
        0xe6, 0x02, // out 2, al
        0xcf, // iret
    ];
    guest.ram.write(0x6000, &handler);
    guest
        .ram
        .write(4 * usize::from(VECTOR), &[0x00, 0x60, 0x00, 0x00]);
    // Enabled by hardware and by software, in x2APIC mode, bootstrap processor.
    guest.set(&[(hv_register_name_HV_X64_REGISTER_APIC_BASE, 0xfee0_0d00)]);
    let mut lapic = guest.vcpu.get_lapic().expect("the local APIC");
    lapic.regs[0xf0] = 0xffu8 as _;
    lapic.regs[0xf1] = 1;
    guest.vcpu.set_lapic(&lapic).expect("the local APIC");
    guest
}

pub(crate) fn request(level: bool) -> InterruptRequest {
    InterruptRequest {
        interrupt_type: hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED,
        apic_id: 0,
        vector: u32::from(VECTOR),
        level_triggered: level,
        logical_destination_mode: false,
        long_mode: false,
    }
}

fn skip_out(guest: &Guest, port: u16) {
    let message = guest.port();
    assert_eq!({ message.port_number }, port);
    guest.set(&[(RIP, message.header.rip + 2)]);
}

fn halt_and_wake_up() {
    let guest = sleeper();
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(50));
            guest
                .vm
                .request_virtual_interrupt(&request(false))
                .expect("an interrupt");
        });
        skip_out(&guest, 2);
        assert!(
            started.elapsed() >= Duration::from_millis(50),
            "the halt did not block"
        );
        skip_out(&guest, 1);
    });
    // Pending before the run: no wait.
    guest
        .vm
        .request_virtual_interrupt(&request(false))
        .expect("an interrupt");
    skip_out(&guest, 2);
}

/// Runs the handler: its port access, and an EOI message before the handler has returned (KVM's interpreter may take a
/// few instructions until it reports the end).
fn handle_with_eoi(guest: &Guest) {
    let mut ended = 0;
    loop {
        let message = guest.run();
        #[expect(non_upper_case_globals, reason = "names of the TLFS")]
        match message.header.message_type {
            hv_message_type_HVMSG_X64_APIC_EOI => {
                let eoi = message.to_apic_eoi_info().expect("an EOI message");
                assert_eq!(
                    ({ eoi.vp_index }, { eoi.interrupt_vector }),
                    (0, u32::from(VECTOR))
                );
                ended += 1;
            }
            hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT => {
                let port = message.to_ioport_info().expect("a port message");
                guest.set(&[(RIP, port.header.rip + 2)]);
                if port.port_number == 1 {
                    break;
                }
            }
            kind => panic!("message {kind:#x}"),
        }
    }
    assert_eq!(ended, 1);
}

fn end_of_a_level_interrupt() {
    let guest = sleeper();
    for _ in 0..3 {
        guest
            .vm
            .request_virtual_interrupt(&request(true))
            .expect("an interrupt");
        handle_with_eoi(&guest);
        // To the beginning, where the interrupt cannot come before the halt.
        guest.set(&[(RIP, CODE), (hv_register_name_HV_X64_REGISTER_RFLAGS, 2)]);
    }
    // The end of an edge is not told, also of a vector that was level-triggered before.
    guest
        .vm
        .request_virtual_interrupt(&request(false))
        .expect("an interrupt");
    skip_out(&guest, 2);
    skip_out(&guest, 1);
}

fn route(guest: &Guest, gsi: u32, data: u32) {
    // The table's head, and one entry after it.
    #[repr(C)]
    struct Table {
        head: mshv_user_irq_table,
        entry: mshv_user_irq_entry,
    }
    let table = Table {
        head: mshv_user_irq_table {
            nr: 1,
            ..Default::default()
        },
        entry: mshv_user_irq_entry {
            gsi,
            address_lo: 0xfee0_0000,
            address_hi: 0,
            data,
        },
    };
    guest.vm.set_msi_routing(&table.head).expect("a route");
}

fn irqfd() {
    let guest = sleeper();
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    route(&guest, 9, u32::from(VECTOR));
    guest.vm.register_irqfd(&event, 9).expect("an irqfd");
    event.write(1).expect("a signal");
    skip_out(&guest, 2);
    skip_out(&guest, 1);
    // The same descriptor cannot serve twice.
    assert!(guest.vm.register_irqfd(&event, 10).is_err());
    guest.vm.unregister_irqfd(&event, 9).expect("gone");
    event.write(1).expect("a signal");
    assert_eq!(event.read().expect("nobody took it"), 1);
    guest.vm.register_irqfd(&event, 9).expect("an irqfd again");
}

fn irqfd_with_resample() {
    let guest = sleeper();
    let (event, resample) = (
        EventFd::new(EFD_NONBLOCK).expect("an event"),
        EventFd::new(EFD_NONBLOCK).expect("an event"),
    );
    // Only a GSI that equals its vector is resampled by the driver.
    let gsi = u32::from(VECTOR);
    route(&guest, gsi, u32::from(VECTOR));
    assert!(
        guest
            .vm
            .register_irqfd_with_resample(&event, &resample, gsi)
            .is_err(),
        "edge-triggered"
    );
    route(&guest, gsi, u32::from(VECTOR) | 1 << 15);
    guest
        .vm
        .register_irqfd_with_resample(&event, &resample, gsi)
        .expect("an irqfd");
    event.write(1).expect("a signal");
    skip_out(&guest, 2);
    skip_out(&guest, 1);
    assert_eq!(resample.read().expect("resampled"), 1);
}

fn ioeventfd() {
    // mov es:[di], al; out 1, al
    let guest = Guest::new(&[0x26, 0x88, 0x05, 0xe6, 0x01]);
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    let address = IoEventAddress::Mmio(DEVICE + 0x10);
    guest
        .vm
        .register_ioevent(&event, &address, NoDatamatch)
        .expect("an ioeventfd");
    assert!(
        guest
            .vm
            .register_ioevent(&event, &address, NoDatamatch)
            .is_err(),
        "twice"
    );
    guest.set(&[(hv_register_name_HV_X64_REGISTER_RDI, 0x10)]);
    skip_out(&guest, 1);
    assert_eq!(event.read().expect("signalled"), 1);
    guest
        .vm
        .unregister_ioevent(&event, &address, NoDatamatch)
        .expect("gone");
    guest.set(&[(RIP, CODE)]);
    assert_eq!({ guest.memory().guest_physical_address }, DEVICE + 0x10);
}

fn start_up_of_a_second_vp() {
    let guest = sleeper();
    let second = guest.vm.create_vcpu(1).expect("a second VP");
    assert_eq!(
        get(
            &second,
            hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE
        )[0],
        1
    );
    // At 0x7000: out 7, al
    guest.ram.write(0x7000, &[0xe6, 0x07]);
    let message = thread::scope(|scope| {
        let runner = scope.spawn(|| second.run().expect("a message"));
        sleep(Duration::from_millis(20));
        for (kind, vector) in [
            (hv_interrupt_type_HV_X64_INTERRUPT_TYPE_INIT, 0),
            (hv_interrupt_type_HV_X64_INTERRUPT_TYPE_SIPI, 7),
        ] {
            let request = InterruptRequest {
                interrupt_type: kind,
                apic_id: 1,
                vector,
                ..request(false)
            };
            guest
                .vm
                .request_virtual_interrupt(&request)
                .expect("an IPI");
        }
        runner.join().expect("the second VP runs")
    });
    let message = message.to_ioport_info().expect("a port message");
    assert_eq!(
        ({ message.port_number }, { message.header.vp_index }),
        (7, 1)
    );
    assert_eq!(
        get(
            &second,
            hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE
        )[0],
        0
    );
}

extern "C" fn nothing(_: i32) {}

fn signals() {
    // SAFETY: the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    // cli; hlt, which never ends, and jmp $, which is never still.
    for code in [&[0xfa, 0xf4][..], &[0xeb, 0xfe]] {
        let guest = Arc::new(Guest::new(code));
        let finished = Arc::new(AtomicBool::new(false));
        let runner = {
            let (guest, finished) = (Arc::clone(&guest), Arc::clone(&finished));
            thread::spawn(move || {
                for _ in 0..100 {
                    assert_eq!(
                        guest.vcpu.run().map(drop),
                        Err(MshvError::from(libc::EINTR))
                    );
                    assert_eq!(guest.get(hv_register_name_HV_REGISTER_EXPLICIT_SUSPEND), 1);
                }
                finished.store(true, Ordering::SeqCst);
            })
        };
        // Fired at any moment of the ioctl, no signal gets lost: each ends a run sooner or later.
        while !finished.load(Ordering::SeqCst) {
            // SAFETY: the thread has not been joined.
            unsafe { libc::pthread_kill(runner.as_pthread_t(), libc::SIGUSR1) };
            sleep(Duration::from_micros(200));
        }
        runner.join().expect("it returned with EINTR each time");
    }
}

fn registers_of_a_running_vp() {
    let guest = sleeper();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                match guest.vcpu.run() {
                    Ok(message) => {
                        let kind = message.header.message_type;
                        assert_eq!(
                            kind, hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT,
                            "message {kind:#x}"
                        );
                        let port = message.to_ioport_info().expect("a port message");
                        set(&guest.vcpu, &[(RIP, port.header.rip + 2)]).expect("RIP");
                    }
                    Err(error) => assert_eq!(error, MshvError::from(libc::EINTR)),
                }
            }
        });
        for round in 0..50 {
            guest
                .vm
                .register_deliverabilty_notifications(0, round << 2)
                .expect("set while it runs");
        }
        done.store(true, Ordering::SeqCst);
        guest
            .vm
            .request_virtual_interrupt(&request(false))
            .expect("an interrupt");
        guest
            .vm
            .register_deliverabilty_notifications(0, 4)
            .expect("set while it runs");
    });
    assert_eq!(
        guest.get(hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS),
        4
    );
}

/// Four VPs do port and memory accesses while other threads change memory, send interrupts and look at registers.
fn many_threads() {
    const VPS: u8 = 4;
    const ROUNDS: u64 = 300;
    let guest = Guest::new(&[0xf4]);
    // out dx, al; mov es:[di], al
    guest.ram.write(0x5000, &[0xee, 0x26, 0x88, 0x05]);
    let others: Vec<_> = (1..VPS)
        .map(|index| guest.vm.create_vcpu(index).expect("a VP"))
        .collect();
    let vcpus: Vec<_> = std::iter::once(&guest.vcpu).chain(&others).collect();
    let segment = |name, selector: u16, attributes| hv_register_assoc {
        name,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                base: u64::from(selector) << 4,
                limit: 0xffff,
                selector,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
            },
        },
        ..Default::default()
    };
    let working = std::sync::atomic::AtomicUsize::new(vcpus.len());
    thread::scope(|scope| {
        for (index, vcpu) in vcpus.iter().copied().enumerate() {
            let working = &working;
            scope.spawn(move || {
                vcpu.set_reg(&[
                    segment(hv_register_name_HV_X64_REGISTER_CS, 0, 0x9b),
                    segment(
                        hv_register_name_HV_X64_REGISTER_ES,
                        (DEVICE >> 4) as u16,
                        0x93,
                    ),
                ])
                .expect("segments");
                let activity = hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE;
                set(
                    vcpu,
                    &[(activity, 0), (hv_register_name_HV_X64_REGISTER_RFLAGS, 2)],
                )
                .expect("runnable");
                let run = || loop {
                    match vcpu.run() {
                        Ok(message) => return message,
                        Err(error) => assert_eq!(error, MshvError::from(libc::EINTR)),
                    }
                };
                for round in 0..ROUNDS {
                    let offset = round % 0x1000;
                    set(
                        vcpu,
                        &[
                            (RIP, 0x5000),
                            (hv_register_name_HV_X64_REGISTER_RDX, 0x100 + index as u64),
                            (hv_register_name_HV_X64_REGISTER_RDI, offset),
                        ],
                    )
                    .expect("registers");
                    let port = run().to_ioport_info().expect("a port message");
                    assert_eq!({ port.port_number }, 0x100 + index as u16);
                    assert_eq!({ port.header.vp_index }, index as u32);
                    set(vcpu, &[(RIP, 0x5001)]).expect("RIP");
                    let store = run().to_memory_info().expect("a memory message");
                    assert_eq!({ store.guest_physical_address }, DEVICE + offset);
                }
                working.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let (working, vm) = (&working, &guest.vm);
        scope.spawn(move || {
            let extra = crate::guest::Ram::new(0x1000);
            while working.load(Ordering::SeqCst) > 0 {
                vm.map_user_memory(extra.region(0x1000, true))
                    .expect("memory");
                vm.unmap_user_memory(extra.region(0x1000, true))
                    .expect("unmapped");
            }
        });
        scope.spawn(move || {
            let mut round = 0;
            while working.load(Ordering::SeqCst) > 0 {
                let target = round % u32::from(VPS);
                let request = InterruptRequest {
                    apic_id: u64::from(target),
                    ..request(false)
                };
                vm.request_virtual_interrupt(&request)
                    .expect("an interrupt");
                vm.register_deliverabilty_notifications(target, 0)
                    .expect("set while it runs");
                round += 1;
                sleep(Duration::from_micros(100));
            }
        });
    });
}

fn frozen_time() {
    let guest = Guest::new(&[0xe6, 0x01]);
    let freeze = hv_partition_property_code_HV_PARTITION_PROPERTY_TIME_FREEZE;
    let time = hv_partition_property_code_HV_PARTITION_PROPERTY_REFERENCE_TIME;
    guest.vm.set_partition_property(freeze, 1).expect("frozen");
    guest
        .vm
        .set_partition_property(time, 123_456_789)
        .expect("a time");
    thread::scope(|scope| {
        let runner = scope.spawn(|| guest.port());
        sleep(Duration::from_millis(30));
        assert!(!runner.is_finished(), "it ran while frozen");
        assert_eq!(
            guest.vm.get_partition_property(time).expect("a time"),
            123_456_789
        );
        guest.vm.set_partition_property(freeze, 0).expect("thawed");
        runner.join().expect("it ran");
    });
    let now = guest.vm.get_partition_property(time).expect("a time");
    assert!((123_456_789..133_456_789).contains(&now), "{now}");
}

fn local_apic_state() {
    let guest = sleeper();
    let mut lapic = guest.vcpu.get_lapic().expect("the local APIC");
    // LVT timer: masked, periodic, vector 0x31; divider 11; error vector.
    for (at, value) in [
        (0x320, 0x0003_0031u32),
        (0x3e0, 0xb),
        (0x370, 0x0001_0033),
        (0x80, 0),
    ] {
        for (byte, value) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[at + byte] = value as _;
        }
    }
    guest.vcpu.set_lapic(&lapic).expect("the local APIC");
    let back = guest.vcpu.get_lapic().expect("the local APIC");
    for at in [0x20, 0x30, 0xf0, 0x320, 0x350, 0x360, 0x370, 0x3e0] {
        assert_eq!(
            back.regs[at..at + 4],
            lapic.regs[at..at + 4],
            "register {at:#x}"
        );
    }
}
