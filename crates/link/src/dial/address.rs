//! Where a server is: `10.0.0.1`, `10.0.0.1:4919`, `node1.example.com`, `[fd00::1]:4919`, `fd00::1`.

use crate::DEFAULT_PORT;
use std::{fmt, net::Ipv6Addr, str::FromStr};

/// A host and a port.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Address {
    host: String,
    port: u16,
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not the address of a server: {problem} (HOST or HOST:PORT, as in 10.0.0.1:{DEFAULT_PORT})"
)]
pub struct AddressError {
    text: String,
    problem: &'static str,
}

impl Address {
    /// A host, which may be an IP address of any kind, and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Address { host: host.into(), port }
    }

    /// Host and port, as lookups take them.
    pub(super) fn parts(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = |problem| AddressError { text: text.chars().take(300).collect(), problem };
        if text.contains("://") {
            return Err(wrong("it has no scheme"));
        }
        if text.parse::<Ipv6Addr>().is_ok() {
            return Ok(Address { host: text.to_owned(), port: DEFAULT_PORT });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => {
                let port = port.parse::<u16>().ok().filter(|port| *port > 0);
                (host, port.ok_or_else(|| wrong("its port is no number from 1 to 65535"))?)
            }
            None => (text, DEFAULT_PORT),
        };
        if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            inner.parse::<Ipv6Addr>().map_err(|_| wrong("in brackets stands an IPv6 address"))?;
            return Ok(Address { host: inner.to_owned(), port });
        }
        if host.is_empty() || host.len() > 253 {
            return Err(wrong("it has no host"));
        }
        if !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
            return Err(wrong("its host has a character that no host name has"));
        }
        Ok(Address { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            return write!(f, "[{}]:{}", self.host, self.port);
        }
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        for (text, means) in [
            ("10.0.0.1", "10.0.0.1:4919"),
            ("10.0.0.1:77", "10.0.0.1:77"),
            ("node1.example.com", "node1.example.com:4919"),
            ("localhost:1", "localhost:1"),
            ("fd00::1", "[fd00::1]:4919"),
            ("[fd00::1]:65535", "[fd00::1]:65535"),
            ("[fd00::1]", ""),
            ("https://10.0.0.1", ""),
            ("10.0.0.1:", ""),
            ("10.0.0.1:0", ""),
            ("10.0.0.1:65536", ""),
            (":4919", ""),
            ("", ""),
            ("two words", ""),
            ("[no]:1", ""),
        ] {
            let read = text.parse::<Address>().map(|address| address.to_string());
            assert_eq!(read.unwrap_or_default(), means, "{text}");
        }
    }
}
