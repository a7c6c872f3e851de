//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// First octet: the address is of a group, not of a station.
const GROUP: u8 = 0x01;
/// First octet: the address is given by whoever runs the network, not by a manufacturer.
const LOCAL: u8 = 0x02;

/// Address of one station: neither of a group nor all zeros. Written `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

/// Why an address is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// It is not written as an address.
    #[error("{0:?} is not six pairs of hexadecimal digits with colons between them")]
    Syntax(String),
    /// It is the address of a group.
    #[error("{0} is the address of a group: the first octet of a station's is even")]
    Group(String),
    /// It is all zeros.
    #[error("an address of zeros is nobody's")]
    Zero,
}

impl MacAddr {
    /// Takes the octets, in the order in which they are sent.
    pub fn new(octets: [u8; 6]) -> Result<Self, MacError> {
        if octets[0] & GROUP != 0 {
            return Err(MacError::Group(Self(octets).to_string()));
        }
        if octets == [0; 6] {
            return Err(MacError::Zero);
        }
        Ok(Self(octets))
    }

    /// A random address of the kind that is given locally.
    pub fn random() -> std::io::Result<Self> {
        let mut octets = [0; 6];
        getrandom::fill(&mut octets)?;
        octets[0] = octets[0] & !GROUP | LOCAL;
        Ok(Self(octets))
    }

    /// In the order in which they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        // A hostile text is cut, so that the message stays readable.
        let syntax = || MacError::Syntax(text.chars().take(32).collect());
        let mut octets = [0; 6];
        let mut pairs = text.split(':');
        for octet in &mut octets {
            let pair = pairs.next().ok_or_else(syntax)?;
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *octet = u8::from_str_radix(pair, 16).map_err(|_| syntax())?;
        }
        if pairs.next().is_some() {
            return Err(syntax());
        }
        Self::new(octets)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_both_ways() {
        let mac: MacAddr = "52:54:00:aB:0c:ff".parse().expect("an address");
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0x0c, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:ab:0c:ff");
        let packed = rmp_serde::to_vec(&mac).expect("bytes");
        assert_eq!(rmp_serde::from_slice::<MacAddr>(&packed).expect("it"), mac);
    }

    #[test]
    fn what_is_no_station_is_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "52:54:00:12:34:+5",
            "52-54-00-12-34-56",
            "52:54:00:12:34:é",
        ] {
            assert_eq!(
                text.parse::<MacAddr>(),
                Err(MacError::Syntax(text.to_owned())),
                "{text}"
            );
        }
        for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert_eq!(
                text.parse::<MacAddr>(),
                Err(MacError::Group(text.to_owned()))
            );
        }
        assert_eq!("00:00:00:00:00:00".parse::<MacAddr>(), Err(MacError::Zero));
    }

    #[test]
    fn random_ones_are_local_and_differ() {
        let (one, other) = (
            MacAddr::random().expect("random"),
            MacAddr::random().expect("random"),
        );
        assert_eq!(one.octets()[0] & 3, LOCAL);
        assert_eq!(MacAddr::new(one.octets()), Ok(one));
        assert_ne!(one, other);
    }
}
