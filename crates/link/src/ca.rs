//! The cluster's certificate authority, and the keys and certificates of servers, machines and users.
//!
//! A cluster *is* its CA: [`Root`] is the public part, known to everyone and named by its fingerprint in join tokens;
//! [`Authority`] is the secret part, held by servers only. It signs kinds of certificates that cannot stand in for
//! each other: a server's is for server authentication and names [`SERVER_NAME`]; a machine's and a user's are for client
//! authentication and name the one by the URI `fleet:machine:ID`, the other by `fleet:user:NAME`. What a server shows to another that it connects
//! to is a fourth kind, for client authentication, with the URI `fleet:server:ID`. Of a request only the public key is
//! used; whatever else a request asks for is ignored. All times come in as arguments.
//!
//! A machine is known by its ID *and* the [`KeyId`] of its key, which it keeps: renewing extends the certificate
//! of the same key, so an answer lost on the way locks nobody out.

use crate::tls;
use crate::user::UserName;
use fleet_cluster::model::{MachineId, MachineIdError};
pub use fleet_trust::{Fingerprint, SERVER_NAME};
use fleet_trust::{random, sha256};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::time::{Duration, SystemTime};
use std::{fmt, net::IpAddr, str::FromStr};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

/// How long a machine's certificate is valid. Removing a machine does not wait for that: see [`crate::serve`].
pub const MACHINE_VALIDITY: Duration = Duration::from_secs(30 * DAY);
/// How long a server's certificate is valid; servers sign themselves a new one in time.
pub const SERVER_VALIDITY: Duration = Duration::from_secs(90 * DAY);
/// How long the CA's certificate is valid.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(20 * 365 * DAY);
/// Certificates are valid from that long before they are signed, since clocks differ; at most a quarter of their time.
pub const BACKDATED: Duration = Duration::from_secs(3600);

const DAY: u64 = 86_400;
const MACHINE_URI: &str = "fleet:machine:";
const USER_URI: &str = "fleet:user:";
const SERVER_URI: &str = "fleet:server:";
/// How long the certificate is valid that a server shows to another; it makes one for each connection.
const PEER_VALIDITY: Duration = Duration::from_secs(DAY);

/// What is wrong with a key, a certificate or a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// No PEM text of the kind.
    #[error("no {0} in the PEM text")]
    Pem(&'static str),
    /// A certificate that is none of fleet's.
    #[error("not a certificate of fleet: {0}")]
    Certificate(String),
    /// A key that does not belong to the certificate.
    #[error("the key does not belong to the certificate")]
    OtherKey,
    /// A signing request that can't be used.
    #[error("unusable signing request: {0}")]
    Request(String),
    /// An address that no certificate can name.
    #[error("{0:?} is neither an IP address nor a host name")]
    Name(String),
    /// A time no certificate can name.
    #[error("the clock is set to a time that no certificate can name")]
    Clock,
    /// The machine has no randomness, or the like.
    #[error("unable to make a key or certificate: {0}")]
    Failed(String),
}

fn failed(error: impl fmt::Display) -> CaError {
    CaError::Failed(error.to_string())
}

/// The SHA-256 of a public key (SubjectPublicKeyInfo, DER): what a machine is known by, besides its ID.
/// In text, also for serde: 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId([u8; 32]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = data_encoding::HEXLOWER.decode(text.as_bytes()).ok();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(KeyId)
            .ok_or_else(|| "a key ID is 64 lower-case hexadecimal digits".to_owned())
    }
}

impl serde::Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for KeyId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The public part of a cluster's CA.
#[derive(Clone, PartialEq, Eq)]
pub struct Root {
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

impl Root {
    /// Checks that it is the certificate of a CA.
    pub fn from_der(certificate: CertificateDer<'static>) -> Result<Self, CaError> {
        let parsed = parse(&certificate)?;
        if !parsed.is_ca() {
            return Err(CaError::Certificate("it is not the certificate of a CA".to_owned()));
        }
        let fingerprint = Fingerprint::of(&certificate);
        Ok(Root { certificate, fingerprint })
    }

    /// From the text of [`to_pem`](Self::to_pem).
    pub fn from_pem(text: &str) -> Result<Self, CaError> {
        Self::from_der(certificate_from_pem(text)?)
    }

    /// The certificate.
    pub fn to_pem(&self) -> String {
        certificate_to_pem(&self.certificate)
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What join tokens name the cluster by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Whether this CA signed a machine's certificate, and what that says. Its validity in time is not looked at.
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<MachineCertificate, CaError> {
        let root = parse(&self.certificate)?;
        parse(certificate)?
            .verify_signature(Some(root.public_key()))
            .map_err(|_| CaError::Certificate("another cluster has signed it".to_owned()))?;
        MachineCertificate::read(certificate)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({})", self.fingerprint)
    }
}

/// A private key. Its text is wiped from memory when it is dropped; nothing prints it.
struct Secret(KeyPair);

impl Secret {
    fn generate() -> Result<Self, CaError> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Secret).map_err(failed)
    }

    fn from_pem(text: &str) -> Result<Self, CaError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes());
        let der = Zeroizing::new(der.map_err(|_| CaError::Pem("private key"))?);
        // The error is not passed on: it could quote from the key.
        KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256)
            .map(Secret)
            .map_err(|_| CaError::Pem("private key of fleet (ECDSA P-256)"))
    }

    fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    fn copy(&self) -> Result<Self, CaError> {
        let der = Zeroizing::new(self.0.serialize_der());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der.as_slice().into(), &PKCS_ECDSA_P256_SHA256);
        key.map(Secret).map_err(failed)
    }

    fn id(&self) -> KeyId {
        KeyId(sha256(&self.0.subject_public_key_info()))
    }

    fn to_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.0.serialize_der().into())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {}", self.id())
    }
}

/// A cluster's CA. Whoever has it can let machines in and pose as a server.
#[derive(Debug)]
pub struct Authority {
    key: Secret,
    root: Root,
}

impl Authority {
    /// A new one: a new cluster.
    pub fn create(now: SystemTime) -> Result<Self, CaError> {
        let key = Secret::generate()?;
        let mut params = parameters(now, AUTHORITY_VALIDITY)?;
        // Different names of different clusters make for clearer errors than bad signatures.
        let name =
            format!("fleet cluster {}", data_encoding::HEXLOWER.encode(&random::<4>().map_err(failed)?));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key.0).map_err(failed)?;
        let root = Root::from_der(certificate.der().clone())?;
        Ok(Authority { key, root })
    }

    /// From the texts of [`Root::to_pem`] and [`key_pem`](Self::key_pem).
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, CaError> {
        let root = Root::from_pem(certificate)?;
        let key = Secret::from_pem(key)?;
        if key.id() != key_of(&parse(&root.certificate)?) {
            return Err(CaError::OtherKey);
        }
        Ok(Authority { key, root })
    }

    /// The key, to be kept where only servers get at it.
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key.to_pem()
    }

    /// The public part.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// A fresh key and certificate for a server. `addresses` are IP addresses and host names that it can be reached
    /// by; agents do not look at them.
    pub fn sign_server(&self, addresses: &[String], now: SystemTime) -> Result<ServerCertificate, CaError> {
        let key = Secret::generate()?;
        let mut params = parameters(now, SERVER_VALIDITY)?;
        params.distinguished_name.push(DnType::CommonName, SERVER_NAME);
        params.subject_alt_names =
            names([SERVER_NAME].into_iter().chain(addresses.iter().map(String::as_str)))?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = self.sign(&params, &key.0)?;
        Ok(ServerCertificate { chain: vec![certificate, self.root.certificate.clone()], key, signed: now })
    }

    /// A certificate for a machine's key, DER; usually for [`MACHINE_VALIDITY`].
    pub fn sign_machine(
        &self,
        key: &PublicKey,
        machine: &MachineId,
        validity: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, CaError> {
        self.sign_client(&key.0, machine.as_str(), &format!("{MACHINE_URI}{machine}"), validity, now)
    }

    /// A certificate for a user's key, PEM. It says who the user is, and not what the user may do.
    pub fn sign_user(
        &self,
        key: &PublicKey,
        user: &UserName,
        validity: Duration,
        now: SystemTime,
    ) -> Result<String, CaError> {
        let certificate =
            self.sign_client(&key.0, user.as_str(), &format!("{USER_URI}{user}"), validity, now)?;
        Ok(certificate_to_pem(&certificate))
    }

    /// A fresh key and certificate with which a server connects to another, for rustls.
    pub(crate) fn peer(
        &self,
        server: &MachineId,
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CaError> {
        let key = Secret::generate()?;
        let uri = format!("{SERVER_URI}{server}");
        let certificate = self.sign_client(&key.0, server.as_str(), &uri, PEER_VALIDITY, now)?;
        Ok((vec![certificate], key.to_der()))
    }

    fn sign_client(
        &self,
        key: &impl PublicKeyData,
        name: &str,
        uri: &str,
        validity: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, CaError> {
        let mut params = parameters(now, validity)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&params, key)
    }

    fn sign(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, CaError> {
        let issuer = Issuer::from_ca_cert_der(&self.root.certificate, &self.key.0).map_err(failed)?;
        Ok(params.signed_by(key, &issuer).map_err(failed)?.der().clone())
    }
}

/// Whether a server's certificate can have this address or host name.
pub fn can_name(address: &str) -> bool {
    names([address].into_iter()).is_ok()
}

fn names<'a>(addresses: impl Iterator<Item = &'a str>) -> Result<Vec<SanType>, CaError> {
    addresses
        .map(|address| match address.parse::<IpAddr>() {
            Ok(ip) => Ok(SanType::IpAddress(ip)),
            Err(_) => {
                let wrong = || CaError::Name(address.to_owned());
                // Checked by the rules of DNS, which are stricter than those of certificates.
                rustls::pki_types::DnsName::try_from(address).map_err(|_| wrong())?;
                address.try_into().map(SanType::DnsName).map_err(|_| wrong())
            }
        })
        .collect()
}

fn parameters(now: SystemTime, validity: Duration) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    // By less for one of a short time: it would be due to be renewed from its beginning.
    let backdated = BACKDATED.min(validity / 4);
    params.not_before = date(now, |now| now.checked_sub(backdated))?;
    params.not_after = date(now, |now| now.checked_add(validity))?;
    let mut serial = random::<16>().map_err(failed)?;
    // Positive and of full length, as RFC 5280 wants it.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn date(
    now: SystemTime,
    shift: impl FnOnce(SystemTime) -> Option<SystemTime>,
) -> Result<OffsetDateTime, CaError> {
    let seconds = shift(now)
        .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .ok_or(CaError::Clock)?;
    let date = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| CaError::Clock)?;
    // Later years have more digits than a certificate has room for.
    if date.year() > 9999 { Err(CaError::Clock) } else { Ok(date) }
}

/// A server's key and certificate, with the CA's after it, so that who joins can compare that with its token.
#[derive(Debug)]
pub struct ServerCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: Secret,
    signed: SystemTime,
}

impl ServerCertificate {
    /// When to sign the next one.
    pub fn renew_at(&self) -> SystemTime {
        renew_at(self.signed, self.signed + SERVER_VALIDITY)
    }

    /// Whether it will do; not when the next one is due, nor when the clock was put back since: others would find that it is not
    /// valid yet.
    pub fn is_current(&self, now: SystemTime) -> bool {
        (self.signed..self.renew_at()).contains(&now)
    }

    /// For rustls.
    pub(crate) fn certified(&self) -> Result<rustls::sign::CertifiedKey, CaError> {
        rustls::sign::CertifiedKey::from_der(self.chain.clone(), self.key.to_der(), &tls::provider())
            .map_err(failed)
    }
}

/// The public key of a machine or user, taken from a signing request or a certificate.
#[derive(Clone, Debug)]
pub struct PublicKey(SubjectPublicKeyInfo);

impl PublicKey {
    /// Takes the key, and nothing else, from a signing request (DER) signed with that key.
    pub fn from_request(request: &[u8]) -> Result<Self, CaError> {
        let wrong = |error: &dyn fmt::Display| CaError::Request(error.to_string());
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|error| wrong(&error))?;
        let key = SubjectPublicKeyInfo::from_der(&request.public_key.subject_public_key_info())
            .map_err(|error| wrong(&error))?;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(wrong(&"fleet uses keys of ECDSA P-256"));
        }
        Ok(PublicKey(key))
    }

    /// The same of a request in PEM, as `openssl req` writes it.
    pub fn from_request_pem(text: &str) -> Result<Self, CaError> {
        let request = CertificateSigningRequestDer::from_pem_slice(text.as_bytes());
        Self::from_request(&request.map_err(|_| CaError::Pem("certificate request"))?)
    }

    /// What it is known by.
    pub fn id(&self) -> KeyId {
        KeyId(sha256(&self.0.subject_public_key_info()))
    }
}

/// Whom a client's certificate is for. Worth something only once the certificate has been verified.
#[derive(Clone, Debug)]
pub enum ClientCertificate {
    /// A machine, which has sessions.
    Machine(MachineCertificate),
    /// A user of the API.
    User(UserCertificate),
    /// Another server, by the ID of its machine.
    Server(MachineId),
}

/// What a user's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserCertificate {
    /// Whose it is.
    pub user: UserName,
    /// The key that it is for.
    pub key: KeyId,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl ClientCertificate {
    /// Reads a certificate, DER.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, CaError> {
        let parsed = parse(certificate)?;
        let uri = uri_of(&parsed)?;
        if let Some(id) = uri.strip_prefix(SERVER_URI) {
            let id = MachineId::parse(id).map_err(|error| CaError::Certificate(error.to_string()))?;
            return Ok(ClientCertificate::Server(id));
        }
        let Some(name) = uri.strip_prefix(USER_URI) else {
            return MachineCertificate::read(certificate).map(ClientCertificate::Machine);
        };
        let user = UserName::parse(name).map_err(|error| CaError::Certificate(error.to_string()))?;
        let not_after = time_of(parsed.validity().not_after)?;
        Ok(ClientCertificate::User(UserCertificate { user, key: key_of(&parsed), not_after }))
    }
}

/// The one name that a client's certificate has.
fn uri_of<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, CaError> {
    let wrong = |problem: &str| CaError::Certificate(problem.to_owned());
    let names = certificate.subject_alternative_name().map_err(|_| wrong("its names can't be read"))?;
    match names.map_or(&[][..], |names| &names.value.general_names) {
        [GeneralName::URI(uri)] => Ok(uri),
        _ => Err(wrong("it names neither a machine nor a user nor a server")),
    }
}

fn time_of(time: x509_parser::time::ASN1Time) -> Result<SystemTime, CaError> {
    let seconds = u64::try_from(time.timestamp()).map_err(|_| CaError::Clock)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(CaError::Clock)
}

/// What a machine's certificate says. Worth something only once the certificate has been verified.
#[derive(Clone, Debug)]
pub struct MachineCertificate {
    /// Whose it is.
    pub machine: MachineId,
    /// Its key.
    pub key: PublicKey,
    /// Hexadecimal digits.
    pub serial: String,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl MachineCertificate {
    /// Reads a certificate, DER.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, CaError> {
        let parsed = parse(certificate)?;
        let wrong = |problem: &str| CaError::Certificate(problem.to_owned());
        let id = uri_of(&parsed)?.strip_prefix(MACHINE_URI);
        let id = id.ok_or_else(|| wrong("it does not name a machine"))?;
        let machine =
            MachineId::parse(id).map_err(|error: MachineIdError| CaError::Certificate(error.to_string()))?;
        let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw)
            .map_err(|_| wrong("its key is none of fleet's"))?;
        Ok(MachineCertificate {
            machine,
            key: PublicKey(key),
            serial: data_encoding::HEXLOWER.encode(parsed.raw_serial()),
            not_before: time_of(parsed.validity().not_before)?,
            not_after: time_of(parsed.validity().not_after)?,
        })
    }

    /// When to ask for the next one.
    pub fn renew_at(&self) -> SystemTime {
        renew_at(self.not_before, self.not_after)
    }
}

/// A certificate is renewed after two thirds of its time, which leaves a third for servers out of reach.
pub fn renew_at(not_before: SystemTime, not_after: SystemTime) -> SystemTime {
    not_before + not_after.duration_since(not_before).unwrap_or_default() * 2 / 3
}

/// A machine's private key. It is made on the machine and never leaves it.
#[derive(Debug)]
pub struct MachineKey(Secret);

impl MachineKey {
    /// A new one.
    pub fn generate() -> Result<Self, CaError> {
        Secret::generate().map(MachineKey)
    }

    /// From the text of [`to_pem`](Self::to_pem).
    pub fn from_pem(text: &str) -> Result<Self, CaError> {
        Secret::from_pem(text).map(MachineKey)
    }

    /// To be kept where only root reads it.
    pub fn to_pem(&self) -> Zeroizing<String> {
        self.0.to_pem()
    }

    /// What its public part is known by.
    pub fn id(&self) -> KeyId {
        self.0.id()
    }

    /// A signing request, DER: proves that the key is ours.
    pub fn request(&self) -> Result<Vec<u8>, CaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.remove(DnType::CommonName);
        Ok(params.serialize_request(&self.0.0).map_err(failed)?.der().to_vec())
    }

    fn to_der(&self) -> PrivateKeyDer<'static> {
        self.0.to_der()
    }
}

/// What makes a machine one of the cluster: its key, its certificate, and the cluster's CA.
#[derive(Debug)]
pub struct Identity {
    root: Root,
    certificate: CertificateDer<'static>,
    says: MachineCertificate,
    key: MachineKey,
}

impl Identity {
    /// Checks that the certificate is of that CA and for that key.
    pub fn new(root: Root, certificate: CertificateDer<'static>, key: MachineKey) -> Result<Self, CaError> {
        let says = root.check(&certificate)?;
        if says.key.id() != key.id() {
            return Err(CaError::OtherKey);
        }
        Ok(Identity { root, certificate, says, key })
    }

    /// From the texts of [`Root::to_pem`], [`certificate_pem`](Self::certificate_pem) and [`MachineKey::to_pem`], as they were
    /// stored; checks that they belong together. Expired certificates are taken: they can be renewed.
    pub fn from_pem(root: &str, certificate: &str, key: &str) -> Result<Self, CaError> {
        Self::new(Root::from_pem(root)?, certificate_from_pem(certificate)?, MachineKey::from_pem(key)?)
    }

    /// The certificate. It is no secret.
    pub fn certificate_pem(&self) -> String {
        certificate_to_pem(&self.certificate)
    }

    /// The cluster's CA.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The machine's key.
    pub fn key(&self) -> &MachineKey {
        &self.key
    }

    /// What the certificate says.
    pub fn certificate(&self) -> &MachineCertificate {
        &self.says
    }

    /// The same with a fresh certificate.
    pub(crate) fn renewed(&self, certificate: CertificateDer<'static>) -> Result<Self, CaError> {
        let says = self.root.check(&certificate)?;
        if says.key.id() != self.key.id() || says.machine != self.says.machine {
            return Err(CaError::OtherKey);
        }
        Ok(Identity { root: self.root.clone(), certificate, says, key: MachineKey(self.key.0.copy()?) })
    }

    /// For rustls.
    pub(crate) fn tls(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.certificate.clone()], self.key.to_der())
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CaError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(CaError::Certificate("it can't be read".to_owned())),
    }
}

fn key_of(certificate: &X509Certificate<'_>) -> KeyId {
    KeyId(sha256(certificate.public_key().raw))
}

fn certificate_from_pem(text: &str) -> Result<CertificateDer<'static>, CaError> {
    CertificateDer::from_pem_slice(text.as_bytes()).map_err(|_| CaError::Pem("certificate"))
}

/// PEM of RFC 7468: lines of 64 characters.
fn certificate_to_pem(certificate: &CertificateDer<'_>) -> String {
    let encoded = data_encoding::BASE64.encode(certificate);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

#[cfg(test)]
mod tests;
