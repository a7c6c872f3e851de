//! What an input means: a row of things that a guest and its host do.
//!
//! Each is a byte that says which, then its fields, little endian. What is missing at the end of an input is zero, so that every input means
//! something; seeds are written by [`Op::write`].

/// Takes fields off an input.
pub struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    /// Whether there is more.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, fewer at the end.
    pub fn take(&mut self, len: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// A number of one byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Of two.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Of four.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Of eight.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Bytes behind their number.
    pub fn bytes(&mut self) -> Vec<u8> {
        let len = self.u8();
        self.take(len.into()).to_vec()
    }
}

/// A buffer of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// That the device reads, with these bytes in it.
    Readable(Vec<u8>),
    /// That the device writes, so long.
    Writable(u32),
}

/// Declares the operations with their fields once: type, decoding and encoding.
macro_rules! ops {
    ($($(#[$doc:meta])* $number:literal $name:ident { $($field:ident: $kind:ident),* })*) => {
        /// Something that a guest or its host does. `slot` is one of the functions that there are.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Op {
            $($(#[$doc])* #[allow(missing_docs)] $name { $($field: ops!(@type $kind)),* },)*
        }

        impl Op {
            const COUNT: u8 = [$($number),*].len() as u8;

            /// The next of an input.
            pub fn read(input: &mut Reader<'_>) -> Self {
                match input.u8() % Self::COUNT {
                    $($number => Self::$name { $($field: ops!(@read input $kind)),* },)*
                    _ => Self::Step { how: 1 },
                }
            }

            /// Adds it to an input.
            pub fn write(&self, into: &mut Vec<u8>) {
                match self {
                    $(Self::$name { $($field),* } => {
                        into.push($number);
                        $(ops!(@write into $field $kind);)*
                    })*
                }
            }
        }
    };
    (@type bytes) => { Vec<u8> };
    (@type parts) => { Vec<Part> };
    (@type flips) => { Vec<(u16, u8)> };
    (@type $number:ident) => { $number };
    (@read $input:ident parts) => { read_parts($input) };
    (@read $input:ident flips) => { (0..$input.u8() % 8).map(|_| ($input.u16(), $input.u8())).collect() };
    (@read $input:ident $kind:ident) => { $input.$kind() };
    (@write $into:ident $field:ident bytes) => { $into.push($field.len() as u8); $into.extend($field) };
    (@write $into:ident $field:ident parts) => { write_parts($field, $into) };
    (@write $into:ident $field:ident flips) => {
        $into.push($field.len() as u8);
        for (at, bits) in $field {
            $into.extend(at.to_le_bytes());
            $into.push(*bits);
        }
    };
    (@write $into:ident $field:ident $number:ident) => { $into.extend($field.to_le_bytes()) };
}

ops! {
    /// Reads PCI configuration space at an offset in the ECAM window.
    0 ConfigRead { at: u32, len: u8 }
    /// Writes it.
    1 ConfigWrite { at: u32, data: bytes }
    /// Reads within a function's BAR, wherever that is now.
    2 BarRead { slot: u8, at: u16, len: u8 }
    /// Writes there.
    3 BarWrite { slot: u8, at: u16, data: bytes }
    /// Writes RAM; with bit 31 the region above 4 GiB.
    4 Ram { at: u32, data: bytes }
    /// Writes a descriptor into a queue's usual table.
    5 Descriptor { slot: u8, queue: u8, index: u16, gpa: u64, len: u32, flags: u16, next: u16 }
    /// Makes any number available.
    6 Available { slot: u8, queue: u8, head: u16 }
    /// Notifies.
    7 Notify { slot: u8, queue: u8 }
    /// What a driver does up to DRIVER_OK, with those of these features that are offered.
    8 SetUp { slot: u8, features: u64 }
    /// Makes a chain available as a driver does, by an indirect table if bit 0 is set, and notifies.
    9 Chain { slot: u8, queue: u8, how: u8, parts: parts }
    /// Lets the device work: so many times, at most 7; with bit 7 as if the time of all that waits were over.
    10 Step { how: u8 }
    /// Something happens at the host's end.
    11 Host { slot: u8, kind: u8, data: bytes }
    /// The machine stops the device, or lets it go on.
    12 Pause { slot: u8, on: u8 }
    /// Saves the device and restores it, with these bits turned over: none must be refused if there are none.
    13 Restore { slot: u8, flips: flips }
    /// Resets the device.
    14 Reset { slot: u8 }
    /// Resets a queue.
    15 ResetQueue { slot: u8, queue: u8 }
    /// The machine is reset.
    16 PowerOn { slot: u8 }
    /// Takes a function out of its slot, or puts it back.
    17 Slot { slot: u8, present: u8 }
    /// Reads anywhere outside RAM.
    18 MmioRead { gpa: u64, len: u8 }
    /// Writes there.
    19 MmioWrite { gpa: u64, data: bytes }
}

fn read_parts(input: &mut Reader<'_>) -> Vec<Part> {
    let count = input.u8() % 9;
    let part = |_| match input.u8() & 1 {
        0 => Part::Readable(input.bytes()),
        _ => Part::Writable(input.u32()),
    };
    (0..count).map(part).collect()
}

fn write_parts(parts: &[Part], into: &mut Vec<u8>) {
    into.push(parts.len() as u8);
    for part in parts {
        match part {
            Part::Readable(bytes) => {
                into.extend([0, bytes.len() as u8]);
                into.extend(bytes);
            }
            Part::Writable(len) => {
                into.push(1);
                into.extend(len.to_le_bytes());
            }
        }
    }
}

/// An input of these operations.
pub fn encode(ops: &[Op]) -> Vec<u8> {
    let mut bytes = Vec::new();
    ops.iter().for_each(|op| op.write(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_read_as_they_were_written() {
        let parts = vec![Part::Readable(vec![1, 2]), Part::Writable(70_000)];
        let ops = [
            Op::ConfigWrite {
                at: 0x8004,
                data: vec![6, 0],
            },
            Op::Chain {
                slot: 0,
                queue: 1,
                how: 1,
                parts,
            },
            Op::Restore {
                slot: 0,
                flips: vec![(300, 1)],
            },
            Op::MmioRead {
                gpa: 1 << 40,
                len: 8,
            },
        ];
        let bytes = encode(&ops);
        let mut input = Reader(&bytes);
        for op in ops {
            assert_eq!(Op::read(&mut input), op);
        }
        assert!(input.is_empty());
    }
}
