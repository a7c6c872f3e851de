//! Memory of this process that a guest uses.

use hypervisor::MemorySlot;

/// Memory of this process that a guest uses.
pub struct Ram {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is not tied to a thread; accesses are volatile.
unsafe impl Sync for Ram {}
// SAFETY: as above.
unsafe impl Send for Ram {}

impl Ram {
    /// `len` bytes of zeros.
    pub fn new(len: u64) -> Self {
        let len = len as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self {
            start: start.cast(),
            len,
        }
    }

    /// All of it as slot number `slot` at a guest-physical address.
    pub fn slot(&self, slot: u32, gpa: u64) -> MemorySlot {
        MemorySlot {
            slot,
            gpa,
            len: self.len as u64,
            hva: self.start as u64,
            read_only: false,
        }
    }

    /// Writes bytes from offset `at` on.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.len);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, as just checked.
            unsafe { self.start.add(at as usize + i).write_volatile(*byte) };
        }
    }

    /// Writes a little-endian quadword.
    pub fn write_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Becomes the same as other memory of the same length.
    pub fn copy(&self, from: &Self) {
        assert_eq!(self.len, from.len);
        // SAFETY: two mappings of this length; neither guest runs.
        unsafe { std::ptr::copy_nonoverlapping(from.start, self.start, self.len) };
    }

    /// Reads bytes from offset `at` on.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        assert!(at as usize + N <= self.len);
        // SAFETY: inside the mapping, as just checked.
        std::array::from_fn(|i| unsafe { self.start.add(at as usize + i).read_volatile() })
    }

    /// Reads `N` little-endian quadwords.
    pub fn quads<const N: usize>(&self, at: u64) -> [u64; N] {
        std::array::from_fn(|i| self.read_u64(at + 8 * i as u64))
    }

    /// Reads a little-endian quadword.
    pub fn read_u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at))
    }

    /// Reads a little-endian doubleword.
    pub fn read_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the machine that used it is gone (see the order of `Guest`'s fields).
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
