//! What a vCPU reaches when it leaves the guest: the buses, and the IOAPIC's end of interrupt.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use devices::{Bus, Ioapic, IoapicRoute, MsiSink};
use hypervisor::{ExitBus, GsiRoute, Msi, Vm};

/// How often each kind of access was served.
#[derive(Default)]
struct Counts {
    pio_reads: AtomicU64,
    pio_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    end_of_interrupts: AtomicU64,
}

/// The machine's buses.
pub(super) struct MachineBus {
    pio: Bus,
    mmio: Arc<Bus>,
    ioapic: Arc<Ioapic>,
    counts: Counts,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl MachineBus {
    pub(super) fn new(pio: Bus, mmio: Arc<Bus>, ioapic: Arc<Ioapic>) -> Self {
        Self {
            pio,
            mmio,
            ioapic,
            counts: Counts::default(),
        }
    }

    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        let c = &self.counts;
        [
            ("pio_reads", &c.pio_reads),
            ("pio_writes", &c.pio_writes),
            ("mmio_reads", &c.mmio_reads),
            ("mmio_writes", &c.mmio_writes),
            ("end_of_interrupts", &c.end_of_interrupts),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.load(Ordering::Relaxed)))
        .collect()
    }
}

impl ExitBus for MachineBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        count(&self.counts.pio_reads);
        self.pio.read(u64::from(port), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        count(&self.counts.pio_writes);
        self.pio.write(u64::from(port), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        count(&self.counts.mmio_reads);
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        count(&self.counts.mmio_writes);
        self.mmio.write(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        count(&self.counts.end_of_interrupts);
        self.ioapic.end_of_interrupt(vector);
    }
}

/// Takes the IOAPIC's messages and routes to the hypervisor.
pub(super) struct IrqSink {
    vm: Arc<dyn Vm>,
    routes: Mutex<BTreeMap<u32, IoapicRoute>>,
}

impl IrqSink {
    pub(super) fn new(vm: Arc<dyn Vm>) -> Self {
        Self {
            vm,
            routes: Mutex::new(BTreeMap::new()),
        }
    }

    fn routes(&self) -> MutexGuard<'_, BTreeMap<u32, IoapicRoute>> {
        self.routes
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl MsiSink for IrqSink {
    fn send(&self, address: u64, data: u32) {
        if let Err(error) = self.vm.signal_msi(Msi { address, data }) {
            tracing::warn!(%error, address, data, "an interrupt was not delivered");
        }
    }

    fn route_changed(&self, pin: u32, route: Option<IoapicRoute>) {
        let mut routes = self.routes();
        match route {
            Some(route) => routes.insert(pin, route),
            None => routes.remove(&pin),
        };
        let table: Vec<GsiRoute> = routes
            .iter()
            .map(|(&gsi, route)| GsiRoute {
                gsi,
                msi: Msi {
                    address: route.address,
                    data: route.data,
                },
            })
            .collect();
        if let Err(error) = self.vm.set_gsi_routes(&table) {
            tracing::error!(%error, pin, "the interrupt route was not set; level-triggered interrupts may stop");
        }
    }
}
