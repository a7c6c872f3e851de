//! Configuration space of a function: type 0 header and capabilities (PCI Local Bus Specification 3.0, chapter 6).

use super::BarRange;

/// Bytes that are kept. The extended space above them reads as zeros: no capability is there.
const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: memory space.
const MEMORY: u16 = 1 << 1;
/// Command register: what can be set. Memory space, bus master, INTx off.
const WRITABLE_COMMAND: u16 = MEMORY | 1 << 2 | 1 << 10;
/// Status register: there are capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// What a function says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A 32-bit memory BAR that is not prefetchable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5.
    pub number: u8,
    /// Its length in bytes: a power of two from 16 to 2 GiB.
    pub len: u32,
}

/// The bytes, and which bits of them a guest can set.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    bars: Vec<Bar>,
    last_capability: usize,
    end: usize,
}

impl ConfigSpace {
    /// A function with these BARs, at no address yet.
    pub fn new(identity: Identity, bars: &[Bar]) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            bars: bars.to_vec(),
            last_capability: 0,
            end: FIRST_CAPABILITY,
        };
        let [class, subclass, interface] = identity.class;
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &WRITABLE_COMMAND.to_le_bytes());
        // The interrupt line is the guest's to write, though there is none.
        space.allow(0x3c, &[0xff]);
        for bar in bars {
            let at = BARS + usize::from(bar.number) * 4;
            space.allow(at, &(!(bar.len - 1)).to_le_bytes());
        }
        space
    }

    /// Adds a capability: its ID, and what follows ID and next pointer, with the bits of that which a guest can set. Returns its offset,
    /// or none when there is no more room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > LEN {
            return None;
        }
        let pointer = match self.last_capability {
            0 => CAPABILITIES,
            last => last + 1,
        };
        self.bytes[pointer] = at as u8;
        self.put(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, &writable[..writable.len().min(body.len())]);
        (self.last_capability, self.end) = (at, end);
        Some(at as u16)
    }

    /// Fills `data` from `offset`; zeros where nothing is.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Sets those bits that a guest can set.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (new, at) in data.iter().zip(usize::from(offset)..) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// The BARs that answer now.
    pub fn bar_ranges(&self) -> Vec<BarRange> {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        if command & MEMORY == 0 {
            return Vec::new();
        }
        let address = |bar: &Bar| {
            let at = BARS + usize::from(bar.number) * 4;
            let bytes = [0, 1, 2, 3].map(|byte| self.bytes[at + byte]);
            u32::from_le_bytes(bytes)
        };
        self.bars
            .iter()
            .map(|bar| BarRange {
                bar: bar.number,
                gpa: u64::from(address(bar)),
                len: u64::from(bar.len),
            })
            .collect()
    }

    /// The BARs there are.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Gives a BAR an address, as firmware does.
    pub fn set_bar(&mut self, number: u8, gpa: u32) {
        self.write(
            (BARS + usize::from(number.min(5)) * 4) as u16,
            &gpa.to_le_bytes(),
        );
    }

    /// What a guest can have set, and all else.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what a guest had set, from the bytes of another one with the same layout; false if their length is another one.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() == LEN;
        if fits {
            self.write(0, bytes);
        }
        fits
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x42,
        };
        ConfigSpace::new(
            identity,
            &[Bar {
                number: 0,
                len: 0x8000,
            }],
        )
    }

    fn word(space: &ConfigSpace, at: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_is_sized_and_moved() {
        let mut space = space();
        assert_eq!(word(&space, 0), 0x1042_1af4);
        assert_eq!(word(&space, 8), 0x0180_0001);
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(word(&space, 0x10), !0x7fff);
        space.set_bar(0, 0xc001_8000);
        assert!(space.bar_ranges().is_empty(), "decoding is off");
        space.write(4, &[0xff, 0xff]);
        assert_eq!(word(&space, 4) as u16, WRITABLE_COMMAND);
        let range = BarRange {
            bar: 0,
            gpa: 0xc001_8000,
            len: 0x8000,
        };
        assert_eq!(space.bar_ranges(), [range]);
        // BAR 1 is not there.
        space.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!(word(&space, 0x14), 0);
    }

    #[test]
    fn capabilities_are_linked_and_end() {
        let mut space = space();
        assert_eq!(word(&space, 4) >> 16, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[]).expect("room");
        let second = space
            .add_capability(0x11, &[4, 5], &[0, 0x80])
            .expect("room");
        assert_eq!(word(&space, 4) >> 16, u32::from(HAS_CAPABILITIES));
        assert_eq!(word(&space, 0x34), u32::from(first));
        assert_eq!(word(&space, first) as u16, u16::from(second as u8) << 8 | 9);
        space.write(second, &[0xff; 4]);
        assert_eq!(word(&space, second), 0x8504_0011);
        assert!(
            std::iter::repeat_with(|| space.add_capability(9, &[0; 14], &[]))
                .take(20)
                .any(|at| at.is_none())
        );
    }

    #[test]
    fn any_access_anywhere() {
        let mut space = space();
        for offset in (0..0x1000).step_by(3) {
            space.write(offset, &[0xff; 4]);
            space.read(offset, &mut [0; 8]);
        }
        let mut other = self::space();
        assert!(other.restore(space.bytes()));
        assert_eq!(other.bytes(), space.bytes());
        assert!(!other.restore(&[0; 64]));
    }
}
