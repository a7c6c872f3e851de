//! Doubles for what a device is handed.

use std::mem;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::interrupt::{InterruptLine, IoapicRoute, MsiSink};
use crate::power::{AcpiPowerConfig, PowerRequest, PowerSink};

/// The layout that the machine uses.
pub(crate) const POWER_CONFIG: AcpiPowerConfig = AcpiPowerConfig {
    sleep_control: 0,
    sleep_status: 1,
    reset: 2,
    event: 4,
    reset_value: 1,
    s5_sleep_type: 5,
};

/// Remembers power requests.
#[derive(Default)]
pub(crate) struct PowerLog(Mutex<Vec<PowerRequest>>);

impl PowerLog {
    pub(crate) fn take(&self) -> Vec<PowerRequest> {
        mem::take(&mut self.0.lock().expect("no panic"))
    }
}

impl PowerSink for PowerLog {
    fn request(&self, request: PowerRequest) {
        self.0.lock().expect("no panic").push(request);
    }
}

/// Counts pulses.
#[derive(Default)]
pub(crate) struct LineLog(AtomicU64);

impl LineLog {
    pub(crate) fn pulses(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl InterruptLine for LineLog {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn set_level(&self, _high: bool) {}
}

/// Remembers messages and routes.
#[derive(Default)]
pub(crate) struct MsiLog {
    messages: Mutex<Vec<(u64, u32)>>,
    routes: Mutex<Vec<(u32, Option<IoapicRoute>)>>,
}

impl MsiLog {
    pub(crate) fn messages(&self) -> Vec<(u64, u32)> {
        mem::take(&mut self.messages.lock().expect("no panic"))
    }

    pub(crate) fn routes(&self) -> Vec<(u32, Option<IoapicRoute>)> {
        mem::take(&mut self.routes.lock().expect("no panic"))
    }
}

impl MsiSink for MsiLog {
    fn send(&self, address: u64, data: u32) {
        self.messages
            .lock()
            .expect("no panic")
            .push((address, data));
    }
    fn route_changed(&self, pin: u32, route: Option<IoapicRoute>) {
        self.routes.lock().expect("no panic").push((pin, route));
    }
}
