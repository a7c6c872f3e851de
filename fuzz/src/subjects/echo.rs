//! A device that copies what it reads to what it writes: for what the transport and the queues do by themselves.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use devices::virtio::{DeviceType, QueueError, QueueHandler, VirtioDevice, Virtqueue, Worker};

use super::Subject;
use crate::machine::{Driver, Host};

/// Most bytes that are copied at once.
const MOST: u64 = 4096;

struct Echo;

impl QueueHandler for Echo {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let memory = queue.memory().clone();
        queue.disable_notification()?;
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                queue.signal()?;
                if queue.enable_notification()? {
                    continue;
                }
                return Ok(());
            };
            let mut bytes = vec![0; chain.readable.len().min(MOST) as usize];
            chain.readable.read(&memory, 0, &mut bytes)?;
            let written = queue.write(&chain.writable, 0, &bytes)?;
            // The host's addresses are there for a look only.
            let mut vectors = Vec::new();
            chain.writable.iovecs(&memory, &mut vectors)?;
            let len: usize = vectors.iter().map(|vector| vector.iov_len).sum();
            assert_eq!(len as u64, chain.writable.len());
            queue.written(&chain.writable, written as u64);
            queue.complete(chain.head, written as u32)?;
        }
        queue.signal()?;
        queue.kick().write(1)?;
        Ok(())
    }
}

#[derive(Default)]
struct Device(Mutex<BTreeMap<u16, Worker<Echo>>>);

impl VirtioDevice for Device {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "echo",
            id: 42,
            pci_class: [0xff, 0, 0],
        }
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let worker = Worker::start("echo", Echo, queue)?;
        self.0.lock().expect("no panic").insert(index, worker);
        Ok(())
    }
    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.0.lock().expect("no panic").remove(&index)?;
        worker.stop().map(|(_, queue)| queue)
    }
}

struct Nobody;

impl Host for Nobody {
    fn event(&mut self, _kind: u8, _data: &[u8]) {}
    fn check(&mut self, driver: &mut Driver<'_>) {
        for queue in [0, 1] {
            let (written, len) = driver.request(queue, &[b"abc", b"def"], &[4, 4]);
            assert_eq!((&written[..6], len), (&b"abcdef"[..], 6));
        }
    }
}

/// The device.
pub fn echo() -> Subject {
    (Arc::new(Device::default()), Box::new(Nobody))
}
