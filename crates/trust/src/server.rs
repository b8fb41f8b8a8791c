//! Which servers a client trusts.
//!
//! A client knows the cluster by the fingerprint of its CA, which tokens carry: it takes the CA that the server sends along if it
//! has that fingerprint, and then servers that this CA has signed for [`SERVER_NAME`]. Or it has the certificates of CAs: then it takes
//! servers signed by one of them, for [`SERVER_NAME`] or for the name that was dialed.

use crate::{Fingerprint, SERVER_NAME, provider};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::sync::{Arc, OnceLock};

/// The name that a server's certificate is checked for.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a constant that is a DNS name")
}

/// A store of these CAs.
pub fn trusting(roots: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(Arc::new(store))
}

/// The CA that a server has shown.
pub type Found = Arc<OnceLock<CertificateDer<'static>>>;

#[derive(Debug)]
enum Roots {
    Pinned(Fingerprint, Found),
    Given(Arc<WebPkiServerVerifier>),
}

/// Decides which servers are trusted.
#[derive(Debug)]
pub struct Servers(Roots);

impl Servers {
    /// Those of the cluster whose CA has this fingerprint. The CA's certificate will be in the second value, once a
    /// server has shown it.
    pub fn of_cluster(fingerprint: Fingerprint) -> (Self, Found) {
        let found = Found::default();
        (Servers(Roots::Pinned(fingerprint, found.clone())), found)
    }

    /// Those that one of these CAs has signed.
    ///
    /// # Errors
    /// When there is none, or one of them is no CA's certificate.
    pub fn signed_by(roots: &[CertificateDer<'static>]) -> Result<Self, Error> {
        Ok(Servers(Roots::Given(verifier(roots)?)))
    }
}

fn verifier(roots: &[CertificateDer<'static>]) -> Result<Arc<WebPkiServerVerifier>, Error> {
    WebPkiServerVerifier::builder_with_provider(trusting(roots)?, provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        dialed: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let name = server_name();
        match &self.0 {
            Roots::Pinned(expected, found) => {
                let unknown = || Error::InvalidCertificate(CertificateError::UnknownIssuer);
                let mut sent = intermediates.iter().filter(|sent| Fingerprint::of(sent) == *expected);
                let root = sent.next().ok_or_else(unknown)?.clone().into_owned();
                let verifier = verifier(std::slice::from_ref(&root)).map_err(|_| unknown())?;
                let verified = verifier.verify_server_cert(end_entity, &[], &name, ocsp, now)?;
                // One that is there already is the same.
                let _ = found.set(root);
                Ok(verified)
            }
            Roots::Given(verifier) => {
                let misnamed = |error: &Error| {
                    matches!(
                        error,
                        Error::InvalidCertificate(
                            CertificateError::NotValidForName
                                | CertificateError::NotValidForNameContext { .. }
                        )
                    )
                };
                match verifier.verify_server_cert(end_entity, intermediates, &name, ocsp, now) {
                    Err(error) if misnamed(&error) => {
                        verifier.verify_server_cert(end_entity, intermediates, dialed, ocsp, now)
                    }
                    other => other,
                }
            }
        }
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
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
