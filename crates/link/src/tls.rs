//! TLS as fleet uses it, for both sides: version 1.3 only, HTTP/2 only, no resumption, one provider of cryptography.
//!
//! Sessions are never resumed: a resumed session would not look at the peer's certificate again.
//!
//! Three rules for who is trusted:
//! - A machine trusts a server whose certificate is signed by the cluster's CA for [`SERVER_NAME`].
//! - A machine that joins knows only the fingerprint in its token: it takes the CA that the server sends along if it has
//!   that fingerprint, and then the first rule holds ([`joining`]).
//! - A server takes connections without a certificate (they can only join), and those with a machine's certificate of its
//!   own CA. An *expired* one is let through the handshake, since a machine that was off for long has to renew it; that
//!   it is good for nothing else, [`crate::serve`] sees to.

use crate::ca::{Fingerprint, Identity, MachineCertificate, Root, SERVER_NAME};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

/// The one provider of cryptography: ring. Nothing relies on a default of the process.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    PROVIDER.clone()
}

const H2: &[u8] = b"h2";

/// The name that a server's certificate is checked for.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a constant that is a DNS name")
}

fn trusting(root: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone())?;
    Ok(Arc::new(roots))
}

/// For a server; `resolver` has its certificate of the moment.
pub(crate) fn server(root: &Root, resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, Error> {
    let machines = WebPkiClientVerifier::builder_with_provider(trusting(root.certificate())?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Machines { machines }))
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// For a machine of the cluster.
pub(crate) fn member(identity: &Identity) -> Result<ClientConfig, Error> {
    let (chain, key) = identity.tls();
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(trusting(identity.root().certificate())?);
    Ok(finish(builder.with_client_auth_cert(chain, key)?))
}

/// The CA that a server has shown.
pub(crate) type Found = Arc<Mutex<Option<Root>>>;

/// For a machine that joins, and where the CA will be that its server turned out to have.
pub(crate) fn joining(expected: Fingerprint) -> Result<(ClientConfig, Found), Error> {
    let found = Found::default();
    let pinned =
        Pinned { expected, found: found.clone(), algorithms: provider().signature_verification_algorithms };
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    Ok((finish(config), found))
}

fn finish(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![H2.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

/// Takes the one CA with the expected fingerprint, and servers that it has signed.
#[derive(Debug)]
struct Pinned {
    expected: Fingerprint,
    found: Found,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let unknown = || Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let mut sent = intermediates.iter().filter(|sent| Fingerprint::of(sent) == self.expected);
        let root = sent.next().ok_or_else(unknown)?.clone().into_owned();
        let root = Root::from_der(root).map_err(|_| unknown())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(trusting(root.certificate())?, provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verified = verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(root);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("fleet speaks TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Takes the machines of the cluster, also with a certificate that has expired.
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
        let expired = |error: &Error| {
            matches!(
                error,
                Error::InvalidCertificate(
                    CertificateError::Expired | CertificateError::ExpiredContext { .. }
                )
            )
        };
        match self.machines.verify_client_cert(end_entity, intermediates, now) {
            Err(error) if expired(&error) => {
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

/// What an error of a TLS connection means, in words for the user; `it` is the peer.
pub(crate) fn explain(error: &std::io::Error) -> String {
    use rustls::AlertDescription as Alert;
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                "it closed the connection during the TLS handshake".to_owned()
            }
            _ => error.to_string(),
        };
    };
    match tls {
        Error::InvalidMessage(_) => "it does not speak TLS; is it http where https is due?".to_owned(),
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not of this cluster".to_owned()
        }
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "its certificate is not valid yet; are the clocks of both machines right?".to_owned(),
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has expired; are the clocks of both machines right?".to_owned()
        }
        Error::InvalidCertificate(problem) => format!("its certificate is none for this purpose ({problem})"),
        Error::AlertReceived(Alert::UnknownCA | Alert::DecryptError | Alert::BadCertificate) => {
            "it does not take our certificate; are both of the same cluster?".to_owned()
        }
        Error::AlertReceived(Alert::CertificateExpired) => {
            "it takes our certificate for expired or not valid yet; are the clocks of both machines right?"
                .to_owned()
        }
        Error::AlertReceived(Alert::NoApplicationProtocol) | Error::NoApplicationProtocol => {
            "it does not speak HTTP/2".to_owned()
        }
        Error::AlertReceived(alert) => format!("it ended the connection with the TLS alert {alert:?}"),
        Error::PeerIncompatible(problem) => format!("it does not speak TLS as fleet does ({problem:?})"),
        other => format!("TLS: {other}"),
    }
}
