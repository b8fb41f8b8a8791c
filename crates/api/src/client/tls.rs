//! https: which servers are trusted, and what is shown to them.
//!
//! A user token names the cluster by the fingerprint of its CA, so it needs no file of the CA; without a token, such a file says whom to
//! trust. Nobody is trusted without either. A token goes to servers of its own cluster only, and never over plain http.

use super::transport::ByteStream;
use fleet_trust::server::Servers;
use fleet_trust::token::{Kind, Token, TokenTextError};
use fleet_trust::{Fingerprint, provider};
use http::HeaderValue;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::fmt;
use std::sync::Arc;
use tokio_rustls::TlsConnector;

/// What a client of https endpoints has, as texts.
#[derive(Clone, Copy, Default)]
pub struct Credentials<'a> {
    /// Certificates of CAs, PEM.
    pub ca: Option<&'a str>,
    /// A user token.
    pub token: Option<&'a str>,
    /// A certificate with those between it and the CA, and its key, PEM.
    pub certificate: Option<(&'a str, &'a str)>,
}

/// Why credentials can't be used. None of the texts quotes a token or key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum CredentialsError {
    #[error("the file of the CA has no certificate that can be used{0}")]
    Ca(String),
    #[error("{0}")]
    Token(#[from] TokenTextError),
    #[error(
        "the token is of the cluster whose CA has the fingerprint {0}, and the file of the CA has another"
    )]
    OtherCluster(Fingerprint),
    #[error("the certificate file has no certificate in it")]
    Certificate,
    #[error("the key file has no private key in it")]
    Key,
    #[error("the certificate and its key can't be used: {0}")]
    Pair(String),
    #[error("https needs to know whom to trust: a user token or the file of a CA")]
    Nobody,
}

/// How to talk to https endpoints.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    authorization: Option<HeaderValue>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// With these credentials.
    pub fn new(credentials: Credentials<'_>) -> Result<Self, CredentialsError> {
        let roots = credentials.ca.map(roots).transpose()?;
        let token = credentials.token.map(|text| Token::parse(Kind::User, text)).transpose()?;
        let servers = match (&token, roots) {
            (Some(token), Some(roots)) if roots.iter().all(|root| Fingerprint::of(root) != token.root) => {
                return Err(CredentialsError::OtherCluster(token.root));
            }
            (Some(token), _) => Servers::of_cluster(token.root).0,
            (None, Some(roots)) => {
                Servers::signed_by(&roots).map_err(|error| CredentialsError::Ca(format!(" ({error})")))?
            }
            (None, None) => return Err(CredentialsError::Nobody),
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| CredentialsError::Pair(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers));
        let mut config = match credentials.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let (chain, key) = (chain(certificate)?, private_key(key)?);
                let paired = builder.with_client_auth_cert(chain, key);
                paired.map_err(|error| CredentialsError::Pair(error.to_string()))?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A resumed session would not look at the server's certificate again.
        config.resumption = Resumption::disabled();
        let authorization = token.map(|token| {
            // A token is letters, digits and dashes.
            let mut value = HeaderValue::from_str(&format!("Bearer {}", *token.to_text(Kind::User)))
                .expect("a token is printable ASCII");
            value.set_sensitive(true);
            value
        });
        Ok(Tls { config: Arc::new(config), authorization })
    }

    /// The `Authorization` header of requests, if there is a token.
    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// Begins TLS on a stream to a host.
    pub(super) async fn begin(
        &self,
        host: &str,
        stream: Box<dyn ByteStream>,
    ) -> Result<Box<dyn ByteStream>, String> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is no host name"))?;
        match TlsConnector::from(self.config.clone()).connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(format!("tls: {}", fleet_trust::explain(&error))),
        }
    }
}

fn certificates(text: &str) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    all.ok().filter(|all| !all.is_empty())
}

fn roots(text: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    certificates(text).ok_or_else(|| CredentialsError::Ca(String::new()))
}

fn chain(text: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    certificates(text).ok_or(CredentialsError::Certificate)
}

fn private_key(text: &str) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    // The error is not passed on: it could quote from the key.
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| CredentialsError::Key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(credentials: Credentials<'_>) -> CredentialsError {
        Tls::new(credentials).expect_err("should be refused")
    }

    #[test]
    fn unusable_credentials_are_told_without_secrets() {
        let token = Token::generate(Fingerprint([3; 32])).unwrap().to_text(Kind::User);
        assert!(
            Tls::new(Credentials { token: Some(&format!("{}\n", *token)), ..Default::default() }).is_ok()
        );
        assert_eq!(refused(Credentials::default()), CredentialsError::Nobody);
        let certificate = Some(("c", "k"));
        assert_eq!(refused(Credentials { certificate, ..Default::default() }), CredentialsError::Nobody);
        let with_token = |certificate| Credentials { token: Some(&token), certificate, ca: None };
        assert_eq!(refused(with_token(certificate)), CredentialsError::Certificate);
        assert!(matches!(
            refused(Credentials { ca: Some("x"), ..Default::default() }),
            CredentialsError::Ca(_)
        ));
        let cut = &token[..60];
        let error = refused(Credentials { token: Some(cut), ..Default::default() }).to_string();
        assert!(error.contains("copied whole") && !error.contains(&token[20..40]), "{error}");
    }
}
