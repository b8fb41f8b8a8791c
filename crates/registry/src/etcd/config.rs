//! Where etcd is and how it is spoken to: what is configured, checked once and made ready for use.

use super::layout::Layout;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::fmt;
use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::codegen::http::Uri;

/// The port of an endpoint that names none: that of etcd's clients.
const PORT: u16 = 2379;
/// Where systems keep the authorities they trust: Debian and its kin, Red Hat and its kin.
const SYSTEM_ROOTS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// For how long etcd keeps its history unless somebody says otherwise.
const COMPACTION: Duration = Duration::from_secs(3600);

/// Where etcd is reached, and how. Its `Debug` shows no secret.
#[derive(Clone)]
pub struct EtcdConfig {
    /// Members: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub endpoints: Vec<String>,
    /// What every key starts with. A slash is put at both ends where there is none.
    pub prefix: String,
    /// The authorities that sign the members' certificates, PEM; without it those the system trusts.
    pub ca: Option<Vec<u8>>,
    /// The client's certificate with its chain, PEM; goes with `key`.
    pub certificate: Option<Vec<u8>>,
    /// The key of `certificate`, PEM.
    pub key: Option<Vec<u8>>,
    /// The user, where etcd has authentication enabled; goes with `password`.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// How long a call may take.
    pub request_timeout: Duration,
    /// For how long etcd is to keep its history at the least, for watches that were interrupted; none: that is left to etcd.
    pub compaction: Option<Duration>,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        EtcdConfig {
            endpoints: Vec::new(),
            prefix: "/_coreos.com/fleet/".to_owned(),
            ca: None,
            certificate: None,
            key: None,
            username: None,
            password: None,
            request_timeout: Duration::from_secs(1),
            compaction: Some(COMPACTION),
        }
    }
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("username", &self.username)
            .field("request_timeout", &self.request_timeout)
            .finish_non_exhaustive()
    }
}

/// What is wrong with a configuration, by the name its key has in fleet.conf.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct EtcdConfigError {
    /// The key in fleet.conf.
    pub key: &'static str,
    /// What is wrong with its value.
    pub reason: String,
}

fn wrong(key: &'static str) -> impl Fn(String) -> EtcdConfigError {
    move |reason| EtcdConfigError { key, reason }
}

/// A configuration that was checked.
pub(super) struct Settings {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) layout: Layout,
    /// There when an endpoint is `https`.
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) login: Option<Login>,
    pub(super) timeout: Duration,
    pub(super) compaction: Option<Duration>,
}

/// A user and the password.
pub(super) struct Login {
    pub(super) name: String,
    pub(super) password: String,
}

/// One member's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// As configured, for messages.
    pub(super) url: String,
    pub(super) tls: bool,
    /// A name or an address, an IPv6 address without its brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Endpoint {
    fn parse(url: &str) -> Result<Self, String> {
        let no_url = || format!("{url:?} is no URL of the form http://HOST:PORT");
        // It could hold a password.
        if url.contains('@') {
            return Err("a user name goes to etcd_username, not into a URL".to_owned());
        }
        let uri: Uri = url.parse().map_err(|_| no_url())?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(no_url()),
        };
        let plain = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let host = uri.host().filter(|host| plain && !host.is_empty()).ok_or_else(no_url)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) if address.parse::<Ipv6Addr>().is_err() => return Err(no_url()),
            Some(address) => address.to_owned(),
            None => host.to_owned(),
        };
        ServerName::try_from(host.as_str()).map_err(|_| no_url())?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Endpoint { url, tls, host, port: uri.port_u16().unwrap_or(PORT) })
    }
}

impl Settings {
    pub(super) fn new(config: EtcdConfig) -> Result<Self, EtcdConfigError> {
        let endpoints: Result<Vec<_>, _> = config.endpoints.iter().map(|url| Endpoint::parse(url)).collect();
        let endpoints = endpoints.map_err(wrong("etcd_servers"))?;
        if endpoints.is_empty() {
            return Err(wrong("etcd_servers")("there is none".to_owned()));
        }
        let tls = endpoints.iter().any(|e| e.tls).then(|| tls(&config)).transpose()?;
        let login = match (config.username, config.password) {
            (None, None) => None,
            (Some(name), Some(password)) => Some(Login { name, password }),
            (Some(_), None) => return Err(wrong("etcd_username")("etcd_password is missing".to_owned())),
            (None, Some(_)) => return Err(wrong("etcd_password")("etcd_username is missing".to_owned())),
        };
        let layout = Layout::new(&config.prefix);
        let EtcdConfig { request_timeout: timeout, compaction, .. } = config;
        Ok(Settings { endpoints, layout, tls, login, timeout, compaction })
    }
}

/// TLS 1.2 too: the etcd 3.4 that its own project built speaks nothing newer.
fn tls(config: &EtcdConfig) -> Result<Arc<ClientConfig>, EtcdConfigError> {
    let mut roots = RootCertStore::empty();
    match &config.ca {
        Some(pem) => {
            for certificate in certificates(pem, "etcd_cafile")? {
                roots.add(certificate).map_err(|e| wrong("etcd_cafile")(e.to_string()))?;
            }
        }
        None => {
            let found = SYSTEM_ROOTS.iter().find_map(|path| std::fs::read(Path::new(path)).ok());
            let pem = found.ok_or_else(|| {
                wrong("etcd_cafile")(
                    "needed for https: this system has no list of trusted authorities".into(),
                )
            })?;
            // A system's list may have some that rustls does not take.
            roots.add_parsable_certificates(certificates(&pem, "etcd_cafile")?);
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| wrong("etcd_servers")(e.to_string()))?
        .with_root_certificates(roots);
    let mut tls = match (&config.certificate, &config.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate, "etcd_certfile")?;
            let key =
                PrivateKeyDer::from_pem_slice(key).map_err(|e| wrong("etcd_keyfile")(pem_problem(&e)))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| {
                wrong("etcd_keyfile")(format!("it does not go with the certificate of etcd_certfile: {e}"))
            })?
        }
        (Some(_), None) => return Err(wrong("etcd_certfile")("etcd_keyfile is missing".to_owned())),
        (None, Some(_)) => return Err(wrong("etcd_keyfile")("etcd_certfile is missing".to_owned())),
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}

fn certificates(pem: &[u8], key: &'static str) -> Result<Vec<CertificateDer<'static>>, EtcdConfigError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|e| wrong(key)(pem_problem(&e)))?;
    if found.is_empty() {
        return Err(wrong(key)("there is no certificate in PEM form in it".to_owned()));
    }
    Ok(found)
}

/// What is wrong with a PEM file, without its contents.
fn pem_problem(error: &rustls::pki_types::pem::Error) -> String {
    use rustls::pki_types::pem::Error;
    match error {
        Error::NoItemsFound => "there is nothing of the kind in PEM form in it".to_owned(),
        _ => "it is no valid PEM".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(config: EtcdConfig) -> String {
        Settings::new(config).err().unwrap().to_string()
    }

    fn one(url: &str) -> EtcdConfig {
        EtcdConfig { endpoints: vec![url.to_owned()], ..EtcdConfig::default() }
    }

    #[test]
    fn endpoints_are_urls() {
        let settings = Settings::new(EtcdConfig {
            endpoints: ["http://one", "http://[::1]:4001/"].map(str::to_owned).to_vec(),
            ..EtcdConfig::default()
        });
        let endpoints = settings.unwrap().endpoints;
        assert_eq!((endpoints[0].host.as_str(), endpoints[0].port), ("one", 2379));
        assert_eq!((endpoints[1].host.as_str(), endpoints[1].port), ("::1", 4001));
        assert_eq!(endpoints[1].to_string(), "http://[::1]:4001");
        for bad in
            ["", "x:2379", "ftp://x", "http://", "http://a b", "http://x/path", "http://x?y", "http://[x]"]
        {
            let message = error(one(bad));
            assert!(message.contains("is no URL of the form http://HOST:PORT"), "{message}");
        }
        assert!(!error(one("http://root:hunter2@x")).contains("hunter2"));
        assert_eq!(error(EtcdConfig::default()), "etcd_servers: there is none");
    }

    #[test]
    fn what_belongs_together_comes_together() {
        let text = || Some("x".to_owned());
        let pem = || Some(b"x".to_vec());
        let config = one("http://x");
        assert_eq!(
            error(EtcdConfig { username: text(), ..config.clone() }),
            "etcd_username: etcd_password is missing"
        );
        assert_eq!(
            error(EtcdConfig { password: text(), ..config }),
            "etcd_password: etcd_username is missing"
        );
        let config = one("https://x");
        assert_eq!(
            error(EtcdConfig { ca: pem(), ..config.clone() }),
            "etcd_cafile: there is no certificate in PEM form in it"
        );
        let ca = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
        let certificate = || Some(ca.cert.pem().into_bytes());
        let config = EtcdConfig { ca: certificate(), ..config };
        assert_eq!(
            error(EtcdConfig { key: pem(), ..config.clone() }),
            "etcd_keyfile: etcd_certfile is missing"
        );
        let config = EtcdConfig { certificate: certificate(), ..config };
        assert_eq!(error(config.clone()), "etcd_certfile: etcd_keyfile is missing");
        assert_eq!(
            error(EtcdConfig { key: pem(), ..config.clone() }),
            "etcd_keyfile: there is nothing of the kind in PEM form in it"
        );
        let key = Some(other.signing_key.serialize_pem().into_bytes());
        let message = error(EtcdConfig { key, ..config.clone() });
        assert!(message.starts_with("etcd_keyfile: it does not go with the certificate"), "{message}");
        let key = Some(ca.signing_key.serialize_pem().into_bytes());
        assert!(Settings::new(EtcdConfig { key, ..config }).is_ok());
    }

    #[test]
    fn secrets_are_not_shown() {
        let config =
            EtcdConfig { password: Some("hunter2".into()), key: Some(b"hunter2".into()), ..one("http://x") };
        let shown = format!("{config:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("104, 117"), "{shown}");
    }
}
