//! TLS errors in words for the user.

use rustls::{CertificateError, Error};

/// What an error of a TLS connection means, in words for the user; `it` is the peer.
pub fn explain(error: &std::io::Error) -> String {
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
            "it does not speak the protocol that is due here (is it fleetd?)".to_owned()
        }
        Error::AlertReceived(alert) => format!("it ended the connection with the TLS alert {alert:?}"),
        Error::PeerIncompatible(problem) => format!("it does not speak TLS as fleet does ({problem:?})"),
        other => format!("TLS: {other}"),
    }
}
