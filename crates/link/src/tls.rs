//! TLS as fleet uses it, for both sides: version 1.3 only, HTTP/2 for sessions, no resumption, one provider of cryptography.
//!
//! Sessions are never resumed: a resumed session would not look at the peer's certificate again.
//!
//! Three rules for who is trusted:
//! - A machine trusts a server whose certificate is signed by the cluster's CA for [`SERVER_NAME`].
//! - A machine that joins knows only the fingerprint in its token: it takes the CA that the server sends along if it has
//!   that fingerprint, and then the first rule holds ([`joining`]).
//! - A server takes connections without a certificate (they can only join, or show a token to the API), and those with a
//!   machine's, user's or server's certificate of its own CA. An *expired* one of a machine is let through the handshake, since a machine that was off for long has to renew it; that
//!   it is good for nothing else, [`crate::serve`] sees to.

use crate::ca::{Identity, MachineCertificate, Root};
use fleet_trust::Fingerprint;
pub(crate) use fleet_trust::server::{Found, server_name};
use fleet_trust::server::{Servers, trusting};
pub(crate) use fleet_trust::{explain, provider};
use rustls::client::Resumption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const H2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// For a server; `resolver` has its certificate of the moment.
///
/// With guests, whoever speaks HTTP/1.1 as well as HTTP/2 (curl offers both) gets the former, which is the API; agents
/// offer HTTP/2 only.
pub(crate) fn server(
    root: &Root,
    resolver: Arc<dyn ResolvesServerCert>,
    guests: bool,
) -> Result<ServerConfig, Error> {
    let machines = WebPkiClientVerifier::builder_with_provider(
        trusting(std::slice::from_ref(root.certificate()))?,
        provider(),
    )
    .allow_unauthenticated()
    .build()
    .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Machines { machines }))
        .with_cert_resolver(resolver);
    config.alpn_protocols = if guests { vec![HTTP1.to_vec(), H2.to_vec()] } else { vec![H2.to_vec()] };
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// For a machine of the cluster.
pub(crate) fn member(identity: &Identity) -> Result<ClientConfig, Error> {
    peer(identity.root(), identity.tls())
}

/// For a server that connects to another.
pub(crate) fn peer(
    root: &Root,
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(trusting(std::slice::from_ref(root.certificate()))?);
    Ok(finish(builder.with_client_auth_cert(chain, key)?))
}

/// For a machine that joins, and where the CA will be that its server turned out to have.
pub(crate) fn joining(expected: Fingerprint) -> Result<(ClientConfig, Found), Error> {
    let (servers, found) = Servers::of_cluster(expected);
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(servers))
        .with_no_client_auth();
    Ok((finish(config), found))
}

fn finish(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![H2.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

/// Takes the machines of the cluster, also with a certificate that has expired, or was signed when the clock was ahead.
#[derive(Debug)]
struct Machines {
    machines: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for Machines {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.machines.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let untimely = |error: &Error| {
            matches!(
                error,
                Error::InvalidCertificate(
                    CertificateError::Expired
                        | CertificateError::ExpiredContext { .. }
                        | CertificateError::NotValidYet
                        | CertificateError::NotValidYetContext { .. }
                )
            )
        };
        match self.machines.verify_client_cert(end_entity, intermediates, now) {
            Err(error) if untimely(&error) => {
                // Everything else about it has to be right, as of its last second.
                let Ok(says) = MachineCertificate::read(end_entity) else { return Err(error) };
                let last = says.not_after.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                let last = UnixTime::since_unix_epoch(last.saturating_sub(Duration::from_secs(1)));
                self.machines.verify_client_cert(end_entity, intermediates, last)
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.machines.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.machines.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.machines.supported_verify_schemes()
    }

    fn offer_client_auth(&self) -> bool {
        self.machines.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.machines.client_auth_mandatory()
    }
}
