//! Where a server is: the `--endpoint` of fleetctl.
use std::path::PathBuf;

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `unix:///run/fleet.sock` or `file:///run/fleet.sock`
    Unix {
        /// The socket.
        path: PathBuf,
    },
    /// `http://host:port/base` or `https://host:port/base`
    Http {
        /// Whether it is https.
        secure: bool,
        /// Host name or address, IPv6 without brackets.
        host: String,
        /// TCP port.
        port: u16,
        /// The endpoint as written, without a slash at its end.
        url: String,
        /// The path of the endpoint, without a slash at its end; empty in nearly every case.
        base: String,
    },
    /// A scheme that nothing here speaks. As in the original, only a request fails on it.
    Other {
        /// The scheme.
        scheme: String,
        /// The endpoint as written, without a slash at its end.
        url: String,
    },
}

/// Why a text is no endpoint. The texts are the original's (golden/02-globals.txt).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum EndpointError {
    #[error("URL scheme undefined")]
    NoScheme,
    #[error("parse {0:?}: first path segment in URL cannot contain colon")]
    Colon(String),
    #[error("parse {0:?}: missing protocol scheme")]
    MissingScheme(String),
    #[error("unable to connect to host {host:?} with scheme {scheme:?}")]
    HostOfSocket { host: String, scheme: String },
    #[error("parse {url:?}: invalid port {port:?} after host")]
    Port { url: String, port: String },
    #[error("{0:?} names no host")]
    NoHost(String),
    #[error("{0:?} names no socket")]
    NoSocket(String),
}

impl std::fmt::Display for Endpoint {
    /// As it is written.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Endpoint::Unix { path } => write!(f, "unix://{}", path.display()),
            Endpoint::Http { url, .. } | Endpoint::Other { url, .. } => f.write_str(url),
        }
    }
}

impl Endpoint {
    /// Reads one endpoint.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let (scheme, rest) = split_scheme(text)?;
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => ("", rest),
        };
        let url = text.trim_end_matches('/').to_owned();
        match scheme.as_str() {
            "unix" | "file" if !authority.is_empty() => {
                Err(EndpointError::HostOfSocket { host: authority.to_owned(), scheme })
            }
            "unix" | "file" if path.is_empty() => Err(EndpointError::NoSocket(text.to_owned())),
            "unix" | "file" => Ok(Endpoint::Unix { path: path.into() }),
            "http" | "https" => {
                let secure = scheme == "https";
                let (host, port) = split_port(text, authority, if secure { 443 } else { 80 })?;
                let base = path.trim_end_matches('/').to_owned();
                Ok(Endpoint::Http { secure, host, port, url, base })
            }
            _ => Ok(Endpoint::Other { scheme, url }),
        }
    }

    /// The URL of a path such as `/fleet/v1/units`, as error texts name it: requests through a
    /// socket go to the made-up host `domain-sock`, as the original's.
    pub fn url_of(&self, path: &str) -> String {
        match self {
            Endpoint::Unix { .. } => format!("http://domain-sock{path}"),
            Endpoint::Http { url, .. } | Endpoint::Other { url, .. } => format!("{url}{path}"),
        }
    }

    /// Whether it is https.
    pub fn is_secure(&self) -> bool {
        matches!(self, Endpoint::Http { secure: true, .. })
    }

    /// What the `Host` header says.
    pub(super) fn host_header(&self) -> String {
        match self {
            Endpoint::Http { host, port, .. } if host.contains(':') => format!("[{host}]:{port}"),
            Endpoint::Http { host, port, .. } => format!("{host}:{port}"),
            _ => "domain-sock".to_owned(),
        }
    }

    /// What the paths of requests begin with.
    pub(super) fn base(&self) -> &str {
        match self {
            Endpoint::Http { base, .. } => base,
            _ => "",
        }
    }
}

/// The scheme in lower case, and what follows its colon; by the rules of Go's `url.Parse`.
fn split_scheme(text: &str) -> Result<(String, &str), EndpointError> {
    for (at, c) in text.char_indices() {
        match c {
            'a'..='z' | 'A'..='Z' => {}
            '0'..='9' | '+' | '-' | '.' if at > 0 => {}
            ':' if at == 0 => return Err(EndpointError::MissingScheme(text.to_owned())),
            ':' => return Ok((text[..at].to_ascii_lowercase(), &text[at + 1..])),
            _ => break,
        }
    }
    let first = text.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(EndpointError::Colon(text.to_owned()));
    }
    Err(EndpointError::NoScheme)
}

/// Host and port of an authority, with the usual port where none stands.
fn split_port(url: &str, authority: &str, usual: u16) -> Result<(String, u16), EndpointError> {
    let authority = authority.rsplit('@').next().unwrap_or(authority);
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, rest)) => (host, rest),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if host.is_empty() {
        return Err(EndpointError::NoHost(url.to_owned()));
    }
    let number = match port.strip_prefix(':') {
        None if port.is_empty() => Ok(usual),
        Some("") => Ok(usual),
        Some(digits) => digits.parse().map_err(|_| ()),
        None => Err(()),
    };
    match number {
        Ok(number) => Ok((host.to_owned(), number)),
        Err(()) => Err(EndpointError::Port { url: url.to_owned(), port: port.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Endpoint::parse(text).expect_err("should be refused").to_string()
    }

    #[test]
    fn sockets() {
        for text in ["unix:///var/run/fleet.sock", "file:///var/run/fleet.sock"] {
            let endpoint = Endpoint::parse(text).unwrap();
            assert_eq!(endpoint, Endpoint::Unix { path: "/var/run/fleet.sock".into() });
            assert_eq!(endpoint.url_of("/fleet/v1/units"), "http://domain-sock/fleet/v1/units");
        }
    }

    #[test]
    fn https() {
        let it = Endpoint::parse("https://10.0.0.1:4919").unwrap();
        assert!(it.is_secure());
        assert_eq!(it.url_of("/x"), "https://10.0.0.1:4919/x");
        assert_eq!(Endpoint::parse("https://a").unwrap().host_header(), "a:443");
        assert!(!Endpoint::parse("http://a").unwrap().is_secure());
    }

    #[test]
    fn http() {
        let it = Endpoint::parse("http://172.30.7.11:49153/").unwrap();
        assert_eq!(it.url_of("/x"), "http://172.30.7.11:49153/x");
        assert_eq!((it.base(), it.host_header().as_str()), ("", "172.30.7.11:49153"));
        let it = Endpoint::parse("http://gold-2/sub").unwrap();
        assert_eq!((it.base(), it.host_header().as_str()), ("/sub", "gold-2:80"));
        let it = Endpoint::parse("http://[::1]:7").unwrap();
        assert!(matches!(&it, Endpoint::Http { host, port: 7, .. } if host == "::1"), "{it:?}");
        assert_eq!(it.host_header(), "[::1]:7");
    }

    /// The texts of golden/02-globals.txt.
    #[test]
    fn refusals() {
        assert_eq!(refused("nonsense"), "URL scheme undefined");
        assert_eq!(refused(""), "URL scheme undefined");
        assert_eq!(refused("/var/run/fleet.sock"), "URL scheme undefined");
        assert_eq!(
            refused("unix://var/run/fleet.sock"),
            r#"unable to connect to host "var" with scheme "unix""#
        );
        assert_eq!(
            refused("172.30.7.11:49153"),
            r#"parse "172.30.7.11:49153": first path segment in URL cannot contain colon"#
        );
        assert!(refused("http://a:bogus").contains("invalid port \":bogus\""));
        assert!(refused("http://a:66000").contains("invalid port"));
        assert!(refused("http://").contains("names no host"));
        assert!(refused("unix://").contains("names no socket"));
    }

    #[test]
    fn other_schemes_fail_only_when_asked() {
        let it = Endpoint::parse("ftp://gold-2:49153").unwrap();
        assert_eq!(it.url_of("/fleet/v1/machines"), "ftp://gold-2:49153/fleet/v1/machines");
    }
}
