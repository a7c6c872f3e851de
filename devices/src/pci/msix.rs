//! MSI-X: the table, the pending bits and the capability's control (PCI Local Bus Specification 3.0, section 6.8.2).
//!
//! ```text
//!   trigger(vector) ─┬─ enabled, nothing masked ──► MsiSink::send(address, data of the entry)
//!                    └─ masked ──► pending ── unmasked ──► send
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::MsiSink;

/// Message control: MSI-X enable.
const ENABLE: u16 = 1 << 15;
/// Message control: function mask.
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY_LEN: u64 = 16;
/// Vector control: masked. All other bits are reserved.
const MASKED: u32 = 1;

/// The saved type; see [`crate::state::saved`] for its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MsixState {
    /// The table, four words an entry.
    pub table: Vec<[u32; 4]>,
    /// Numbers of the pending vectors.
    pub pending: Vec<u16>,
    /// Message control.
    pub control: u16,
}

struct Inner {
    table: Vec<[u32; 4]>,
    pending: Vec<bool>,
    control: u16,
}

/// A function's MSI-X.
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    inner: Mutex<Inner>,
}

impl Msix {
    /// With so many vectors, all masked.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        Self {
            sink,
            inner: Mutex::new(Inner {
                table: vec![[0, 0, 0, MASKED]; usize::from(vectors)],
                pending: vec![false; usize::from(vectors)],
                control: 0,
            }),
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.lock().table.len() as u16
    }

    /// Sends a vector's message, now or once it is unmasked. A vector that is not there does nothing.
    pub fn trigger(&self, vector: u16) {
        let mut inner = self.lock();
        let number = usize::from(vector);
        if number >= inner.table.len() || inner.control & ENABLE == 0 {
            return;
        }
        if inner.control & FUNCTION_MASK != 0 || inner.table[number][3] & MASKED != 0 {
            inner.pending[number] = true;
            return;
        }
        let entry = inner.table[number];
        drop(inner);
        self.send(entry);
    }

    /// The guest has written the capability's message control.
    pub fn set_control(&self, control: u16) {
        let mut inner = self.lock();
        inner.control = control & (ENABLE | FUNCTION_MASK);
        self.send_unmasked(inner);
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let word = inner
                .table
                .get((at / ENTRY_LEN) as usize)
                .map_or(0, |entry| entry[(at % ENTRY_LEN / 4) as usize]);
            *byte = word.to_le_bytes()[(at % 4) as usize];
        }
    }

    /// Writes the table: whole words, as the specification wants; anything else does nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        let mut inner = self.lock();
        for (word, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let field = (at % ENTRY_LEN / 4) as usize;
            if let Some(entry) = inner.table.get_mut((at / ENTRY_LEN) as usize) {
                entry[field] = if field == 3 { value & MASKED } else { value };
            }
        }
        self.send_unmasked(inner);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| inner.pending.get(first.saturating_add(*bit)) == Some(&true))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// The state to save.
    pub fn save(&self) -> MsixState {
        let inner = self.lock();
        let numbers = 0..inner.pending.len() as u16;
        MsixState {
            table: inner.table.clone(),
            pending: numbers
                .filter(|number| inner.pending[usize::from(*number)])
                .collect(),
            control: inner.control,
        }
    }

    /// Takes a state over; false, and nothing has happened, if it belongs to another table. Nothing is sent.
    pub fn restore(&self, state: &MsixState) -> bool {
        let mut inner = self.lock();
        let vectors = inner.table.len();
        let fits = state.table.len() == vectors
            && state
                .pending
                .iter()
                .all(|number| usize::from(*number) < vectors);
        if fits {
            inner.table.clone_from(&state.table);
            inner.pending.fill(false);
            for number in &state.pending {
                inner.pending[usize::from(*number)] = true;
            }
            inner.control = state.control & (ENABLE | FUNCTION_MASK);
        }
        fits
    }

    /// As after power-on.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.table.fill([0, 0, 0, MASKED]);
        inner.pending.fill(false);
        inner.control = 0;
    }

    fn send_unmasked(&self, mut inner: MutexGuard<'_, Inner>) {
        if inner.control & ENABLE == 0 || inner.control & FUNCTION_MASK != 0 {
            return;
        }
        let mut ready = Vec::new();
        for number in 0..inner.table.len() {
            if inner.pending[number] && inner.table[number][3] & MASKED == 0 {
                inner.pending[number] = false;
                ready.push(inner.table[number]);
            }
        }
        drop(inner);
        for entry in ready {
            self.send(entry);
        }
    }

    fn send(&self, [low, high, data, _]: [u32; 4]) {
        self.sink.send(u64::from(high) << 32 | u64::from(low), data);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoapicRoute;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);

    impl MsiSink for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().expect("no panic").push((address, data));
        }
        fn route_changed(&self, _pin: u32, _route: Option<IoapicRoute>) {}
    }

    fn write_entry(msix: &Msix, number: u64, words: [u32; 4]) {
        for (word, at) in words.into_iter().zip((number * 16..).step_by(4)) {
            msix.write_table(at, &word.to_le_bytes());
        }
    }

    #[test]
    fn masked_vectors_wait() {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(3, sent.clone());
        write_entry(&msix, 1, [0xfee0_1000, 7, 0x41, 0]);
        msix.trigger(1);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.trigger(1);
        msix.trigger(2);
        msix.trigger(900);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b110);
        let saved = msix.save();
        assert!(sent.0.lock().expect("no panic").is_empty());
        msix.set_control(ENABLE);
        assert_eq!(*sent.0.lock().expect("no panic"), [(0x7_fee0_1000, 0x41)]);
        msix.trigger(1);
        write_entry(&msix, 2, [0xfee0_2000, 0, 0x42, 0xffff_fffe]);
        assert_eq!(sent.0.lock().expect("no panic").len(), 3);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
        let other = Msix::new(3, sent.clone());
        assert!(other.restore(&saved));
        assert_eq!(other.save(), saved);
        assert!(!Msix::new(2, sent).restore(&saved));
    }

    #[test]
    fn any_access_anywhere() {
        let msix = Msix::new(2, Arc::new(Sent::default()));
        for offset in [0, 1, 3, 4, 28, 31, 32, 4096, u64::MAX - 8] {
            for len in [1, 2, 4, 8] {
                msix.write_table(offset, &vec![0xff; len]);
                msix.read_table(offset, &mut vec![0; len]);
                msix.read_pending(offset, &mut vec![0; len]);
            }
        }
        msix.reset();
        assert_eq!(msix.save().table, [[0, 0, 0, 1]; 2]);
    }
}
