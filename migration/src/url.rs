//! Where a move goes: `tcp:HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MoveUrl {
    /// `tcp:HOST:PORT`; an IPv6 address stands in brackets.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets a listener choose.
        port: u16,
    },
    /// `unix:PATH`.
    Unix {
        /// Path of the socket.
        path: PathBuf,
    },
}

/// A text that is no [`MoveUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{url}\" is no migration URL: {reason}; write tcp:HOST:PORT, for example tcp:192.0.2.7:4444 or tcp:[::1]:4444, or unix:PATH"
)]
pub struct UrlError {
    url: String,
    reason: &'static str,
}

/// Longest path of a unix socket, without its terminating zero (unix(7)).
const UNIX_PATH_MAX: usize = 107;

impl FromStr for MoveUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        let refuse = |reason| {
            Err(UrlError {
                url: url.to_owned(),
                reason,
            })
        };
        if let Some(path) = url.strip_prefix("unix:") {
            return match path {
                "" => refuse("the path is empty"),
                path if path.len() > UNIX_PATH_MAX => {
                    refuse("the path of a unix socket has at most 107 bytes")
                }
                path if path.contains('\0') => refuse("the path contains a zero byte"),
                path => Ok(Self::Unix { path: path.into() }),
            };
        }
        let Some(address) = url.strip_prefix("tcp:") else {
            return refuse("it begins with neither tcp: nor unix:");
        };
        // `tcp://HOST:PORT` is a common slip and cannot mean anything else.
        let address = address.strip_prefix("//").unwrap_or(address);
        let Some((host, port)) = address.rsplit_once(':') else {
            return refuse("the port is missing");
        };
        let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(Some(host)) => host,
            Some(None) => return refuse("the closing bracket is missing"),
            None if host.contains(':') => return refuse("an IPv6 address must stand in brackets"),
            None => host,
        };
        if host.is_empty() {
            return refuse("the host is missing");
        }
        match port.parse() {
            Ok(port) => Ok(Self::Tcp {
                host: host.to_owned(),
                port,
            }),
            Err(_) => refuse("the port is no number from 0 to 65535"),
        }
    }
}

impl fmt::Display for MoveUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for MoveUrl {
    type Error = UrlError;

    fn try_from(url: String) -> Result<Self, UrlError> {
        url.parse()
    }
}

impl From<MoveUrl> for String {
    fn from(url: MoveUrl) -> Self {
        url.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_survive_a_round_trip() {
        for url in [
            "tcp:127.0.0.1:4444",
            "tcp:host.example:0",
            "tcp:[::1]:65535",
            "unix:/run/a b",
            "unix:rel:ative",
        ] {
            let parsed: MoveUrl = url.parse().expect(url);
            assert_eq!(parsed.to_string(), url);
        }
        let slip: MoveUrl = "tcp://a:1".parse().expect("accepted");
        assert_eq!(slip.to_string(), "tcp:a:1");
    }

    #[test]
    fn bad_urls_say_what_is_wrong() {
        for (url, reason) in [
            ("", "neither"),
            ("http:x", "neither"),
            ("tcp:", "port is missing"),
            ("tcp:host", "port is missing"),
            ("tcp::1", "host is missing"),
            ("tcp:h:", "no number"),
            ("tcp:h:70000", "no number"),
            ("tcp:::1:5", "brackets"),
            ("tcp:[::1:5", "closing bracket"),
            ("unix:", "empty"),
            ("unix:a\0b", "zero byte"),
        ] {
            let error = url.parse::<MoveUrl>().expect_err(url).to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(
            format!("unix:{}", "x".repeat(108))
                .parse::<MoveUrl>()
                .is_err()
        );
    }
}
