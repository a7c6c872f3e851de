//! Feature bits (section 5.1.3) and what they mean for a TAP interface.

use super::tap::TapOffloads;

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const GUEST_UFO: u64 = 1 << 10;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const HOST_UFO: u64 = 1 << 14;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const CTRL_RX: u64 = 1 << 18;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;

/// Packets larger than the MTU that the driver takes.
const LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
/// What a driver may switch by VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
pub(super) const GUEST_OFFLOADS: u64 = LARGE | GUEST_CSUM | GUEST_ECN;

/// What whoever moves the packets must be able to do: offloads, and packets over several buffers.
pub(crate) const CARRIED: u64 = CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | GUEST_UFO
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | HOST_UFO
    | MRG_RXBUF
    | GUEST_USO4
    | GUEST_USO6
    | HOST_USO;

/// What a device offers whoever moves its packets.
pub(super) fn of_control(mtu: bool, several_pairs: bool) -> u64 {
    let mut features = MAC | STATUS | CTRL_VQ | CTRL_RX | GUEST_ANNOUNCE | CTRL_MAC_ADDR;
    for (has, bits) in [(mtu, MTU), (several_pairs, MQ)] {
        if has {
            features |= bits;
        }
    }
    features
}

/// Which work the guest may leave to the host, and the host to the guest, as far as the interface can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// TCP segmentation.
    pub tso: bool,
    /// UDP fragmentation and segmentation.
    pub ufo: bool,
    /// Checksums, without which there is nothing of the others.
    pub csum: bool,
}

impl Default for Offloads {
    fn default() -> Self {
        Self {
            tso: true,
            ufo: true,
            csum: true,
        }
    }
}

impl Offloads {
    /// The feature bits that a device does not offer.
    fn without(self) -> u64 {
        let checksums = CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS;
        let tcp = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
        let udp = GUEST_UFO | HOST_UFO | GUEST_USO4 | GUEST_USO6 | HOST_USO;
        let off = |on: bool, bits| if on && self.csum { 0 } else { bits };
        off(true, checksums) | off(self.tso, tcp) | off(self.ufo, udp)
    }
}

/// What a device offers on such an interface.
pub(super) fn offered(
    offloads: TapOffloads,
    wanted: Offloads,
    mtu: bool,
    several_pairs: bool,
) -> u64 {
    let mut features = CSUM
        | GUEST_CSUM
        | CTRL_GUEST_OFFLOADS
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | CTRL_RX
        | GUEST_ANNOUNCE
        | CTRL_MAC_ADDR;
    for (has, bits) in [
        (offloads.ufo, GUEST_UFO | HOST_UFO),
        (offloads.uso, GUEST_USO4 | GUEST_USO6 | HOST_USO),
        (mtu, MTU),
        (several_pairs, MQ),
    ] {
        if has {
            features |= bits;
        }
    }
    features & !wanted.without()
}

/// What the specification calls a bit.
pub(crate) fn name(bit: u32) -> Option<&'static str> {
    const NAMES: [(u64, &str); 23] = [
        (CSUM, "VIRTIO_NET_F_CSUM"),
        (GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
        (CTRL_GUEST_OFFLOADS, "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS"),
        (MTU, "VIRTIO_NET_F_MTU"),
        (MAC, "VIRTIO_NET_F_MAC"),
        (GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
        (GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
        (GUEST_ECN, "VIRTIO_NET_F_GUEST_ECN"),
        (GUEST_UFO, "VIRTIO_NET_F_GUEST_UFO"),
        (HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
        (HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
        (HOST_ECN, "VIRTIO_NET_F_HOST_ECN"),
        (HOST_UFO, "VIRTIO_NET_F_HOST_UFO"),
        (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
        (STATUS, "VIRTIO_NET_F_STATUS"),
        (CTRL_VQ, "VIRTIO_NET_F_CTRL_VQ"),
        (CTRL_RX, "VIRTIO_NET_F_CTRL_RX"),
        (GUEST_ANNOUNCE, "VIRTIO_NET_F_GUEST_ANNOUNCE"),
        (MQ, "VIRTIO_NET_F_MQ"),
        (CTRL_MAC_ADDR, "VIRTIO_NET_F_CTRL_MAC_ADDR"),
        (GUEST_USO4, "VIRTIO_NET_F_GUEST_USO4"),
        (GUEST_USO6, "VIRTIO_NET_F_GUEST_USO6"),
        (HOST_USO, "VIRTIO_NET_F_HOST_USO"),
    ];
    let wanted = 1_u64.checked_shl(bit)?;
    NAMES
        .iter()
        .find(|(each, _)| *each == wanted)
        .map(|(_, name)| *name)
}

/// Whether packets larger than the MTU may come in.
pub(super) fn large_packets(guest_offloads: u64) -> bool {
    guest_offloads & LARGE != 0
}

/// The TUNSETOFFLOAD flags for these bits. The system refuses one without those that it builds on: large packets need checksums, ECN needs
/// TCP, and UDP data goes for both versions of IP or none.
pub(super) fn tap_flags(guest_offloads: u64) -> u32 {
    let has = |bits| guest_offloads & bits == bits;
    if !has(GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (bits, flag) in [
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
        (GUEST_UFO, libc::TUN_F_UFO),
        (GUEST_USO4 | GUEST_USO6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        if has(bits) {
            flags |= flag;
        }
    }
    if has(GUEST_ECN) && flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0 {
        flags |= libc::TUN_F_TSO_ECN;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_switched_off_is_not_offered() {
        let all = TapOffloads {
            ufo: true,
            uso: true,
        };
        let off = |tso, ufo, csum| {
            let everything = offered(all, Offloads::default(), true, true);
            everything & !offered(all, Offloads { tso, ufo, csum }, true, true)
        };
        let tcp = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
        let udp = GUEST_UFO | HOST_UFO | GUEST_USO4 | GUEST_USO6 | HOST_USO;
        assert_eq!(off(true, true, true), 0);
        assert_eq!(off(false, true, true), tcp);
        assert_eq!(off(true, false, true), udp);
        assert_eq!(
            off(true, true, false),
            tcp | udp | CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS
        );
    }

    #[test]
    fn flags_that_build_on_others_come_with_them() {
        assert_eq!(tap_flags(GUEST_TSO4 | GUEST_ECN | GUEST_UFO), 0);
        assert_eq!(tap_flags(GUEST_CSUM | GUEST_ECN), libc::TUN_F_CSUM);
        assert_eq!(tap_flags(GUEST_CSUM | GUEST_USO4), libc::TUN_F_CSUM);
        assert_eq!(tap_flags(GUEST_OFFLOADS), 0x7f);
        assert_eq!(
            tap_flags(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN),
            libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN
        );
    }
}
