use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn machine() -> MachineId {
    MachineId::parse("0123456789abcdef0123456789abcdef").unwrap()
}

fn identity(authority: &Authority) -> Identity {
    let key = MachineKey::generate().unwrap();
    let public = PublicKey::from_request(&key.request().unwrap()).unwrap();
    let certificate = authority.sign_machine(&public, &machine(), MACHINE_VALIDITY, now()).unwrap();
    Identity::new(authority.root().clone(), certificate, key).unwrap()
}

#[test]
fn a_ca_survives_being_written() {
    let authority = Authority::create(now()).unwrap();
    let read = Authority::from_pem(&authority.root().to_pem(), &authority.key_pem()).unwrap();
    assert_eq!(read.root(), authority.root());
    assert_eq!(read.root().fingerprint(), Fingerprint::of(authority.root().certificate()));
    assert_eq!(authority.root().fingerprint().to_string().len(), 64);
    // What the one has signed, the other takes.
    let identity = identity(&authority);
    assert!(read.root().check(&identity.certificate).is_ok());
}

#[test]
fn keys_and_certificates_that_do_not_belong_together_are_refused() {
    let (one, other) = (Authority::create(now()).unwrap(), Authority::create(now()).unwrap());
    let mixed = Authority::from_pem(&one.root().to_pem(), &other.key_pem());
    assert_eq!(mixed.unwrap_err(), CaError::OtherKey);
    let identity = identity(&one);
    let (certificate, key) = (identity.certificate_pem(), identity.key().to_pem());
    let foreign = Identity::from_pem(&other.root().to_pem(), &certificate, &key).unwrap_err();
    assert_eq!(foreign.to_string(), "not a certificate of fleet: another cluster has signed it");
    let strange =
        Identity::from_pem(&one.root().to_pem(), &certificate, &MachineKey::generate().unwrap().to_pem());
    assert_eq!(strange.unwrap_err(), CaError::OtherKey);
    // A machine's certificate is no CA.
    assert!(Root::from_pem(&certificate).is_err());
    for text in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        assert!(Root::from_pem(text).is_err());
        assert!(Authority::from_pem(text, text).is_err());
        assert!(MachineKey::from_pem(text).is_err());
    }
}

#[test]
fn an_identity_survives_being_written() {
    let authority = Authority::create(now()).unwrap();
    let identity = identity(&authority);
    let read =
        Identity::from_pem(&identity.root().to_pem(), &identity.certificate_pem(), &identity.key().to_pem())
            .unwrap();
    assert_eq!(read.certificate().machine, machine());
    assert_eq!(read.key().id(), identity.key().id());
    assert_eq!(read.certificate().serial, identity.certificate().serial);
}

#[test]
fn a_machines_certificate_says_whose_it_is_and_how_long() {
    let authority = Authority::create(now()).unwrap();
    let identity = identity(&authority);
    let says = identity.certificate();
    assert_eq!(says.machine, machine());
    // Read from the request, from the certificate and of the key: the same ID.
    assert_eq!(says.key.id(), identity.key().id());
    assert_eq!(says.not_before, now() - BACKDATED);
    assert_eq!(says.not_after, now() + MACHINE_VALIDITY);
    assert_eq!(says.renew_at(), says.not_before + (BACKDATED + MACHINE_VALIDITY) * 2 / 3);
    assert_eq!(says.serial.len(), 32);
    let renewed = authority.sign_machine(&says.key, &says.machine, MACHINE_VALIDITY, now() + HOUR).unwrap();
    let renewed = identity.renewed(renewed).unwrap();
    assert_eq!(renewed.certificate().not_after, now() + HOUR + MACHINE_VALIDITY);
    assert_ne!(renewed.certificate().serial, says.serial);
}

#[test]
fn a_renewal_for_another_machine_or_key_is_not_taken() {
    let authority = Authority::create(now()).unwrap();
    let ours = identity(&authority);
    let other = identity(&authority);
    assert_eq!(ours.renewed(other.certificate.clone()).unwrap_err(), CaError::OtherKey);
    let id = MachineId::parse("ffffffffffffffffffffffffffffffff").unwrap();
    let renamed = authority.sign_machine(&ours.certificate().key, &id, MACHINE_VALIDITY, now()).unwrap();
    assert_eq!(ours.renewed(renamed).unwrap_err(), CaError::OtherKey);
}

#[test]
fn nothing_but_the_key_is_taken_of_a_request() {
    let authority = Authority::create(now()).unwrap();
    let key = Secret::generate().unwrap();
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let request = params.serialize_request(&key.0).unwrap();
    let public = PublicKey::from_request(request.der()).unwrap();
    assert_eq!(public.id(), key.id());
    let certificate = authority.sign_machine(&public, &machine(), MACHINE_VALIDITY, now()).unwrap();
    let parsed = parse(&certificate).unwrap();
    assert!(!parsed.is_ca());
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth);
    assert_eq!(MachineCertificate::read(&certificate).unwrap().machine, machine());
}

#[test]
fn a_request_that_its_key_has_not_signed_is_refused() {
    let request = MachineKey::generate().unwrap().request().unwrap();
    for at in [0, request.len() / 2, request.len() - 1] {
        let mut damaged = request.clone();
        damaged[at] ^= 1;
        assert!(PublicKey::from_request(&damaged).is_err(), "byte {at}");
    }
    assert!(PublicKey::from_request(&request[..request.len() - 1]).is_err());
    let rsa = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let other_kind = CertificateParams::default().serialize_request(&rsa).unwrap();
    assert!(matches!(PublicKey::from_request(other_kind.der()), Err(CaError::Request(_))));
}

#[test]
fn a_server_is_no_machine() {
    let authority = Authority::create(now()).unwrap();
    let addresses = ["10.0.0.1", "fd00::1", "node1.example.com"].map(str::to_owned);
    let server = authority.sign_server(&addresses, now()).unwrap();
    assert!(MachineCertificate::read(&server.chain[0]).is_err());
    assert_eq!(&server.chain[1], authority.root().certificate());
    assert!(server.certified().is_ok());
    assert_eq!(server.renew_at(), now() + SERVER_VALIDITY * 2 / 3);
    assert!(server.is_current(now()) && server.is_current(now() + HOUR));
    assert!(
        !server.is_current(server.renew_at()) && !server.is_current(now() - HOUR),
        "the clock was put back"
    );
    for wrong in ["not a name", "", "a..b", "*"] {
        assert_eq!(
            authority.sign_server(&[wrong.to_owned()], now()).unwrap_err(),
            CaError::Name(wrong.to_owned())
        );
    }
}

#[test]
fn a_clock_far_off_is_an_error() {
    let year_10000 = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_800);
    for now in [SystemTime::UNIX_EPOCH, year_10000] {
        assert_eq!(Authority::create(now).unwrap_err(), CaError::Clock);
    }
}

#[test]
fn renewal_is_due_after_two_thirds() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    assert_eq!(renew_at(at(0), at(90)), at(60));
    // Nonsense means now, not never.
    assert_eq!(renew_at(at(90), at(0)), at(90));
}

#[test]
fn nothing_prints_a_key() {
    let authority = Authority::create(now()).unwrap();
    let identity = identity(&authority);
    let server = authority.sign_server(&[], now()).unwrap();
    let printed = format!("{authority:?} {identity:?} {server:?}");
    for pem in [authority.key_pem(), identity.key().to_pem(), server.key.to_pem()] {
        let body = pem.lines().nth(1).unwrap();
        assert!(!printed.contains(body));
        let der = data_encoding::HEXLOWER.encode(&data_encoding::BASE64.decode(body.as_bytes()).unwrap());
        assert!(!printed.contains(&der[40..]));
    }
}

#[test]
fn a_users_certificate_is_no_machines_and_the_other_way_round() {
    let authority = Authority::create(now()).unwrap();
    let key = MachineKey::generate().unwrap();
    let public = PublicKey::from_request(&key.request().unwrap()).unwrap();
    let name = UserName::parse("ann").unwrap();
    let pem = authority.sign_user(&public, &name, 2 * HOUR, now()).unwrap();
    let user = certificate_from_pem(&pem).unwrap();
    match ClientCertificate::read(&user).unwrap() {
        ClientCertificate::User(says) => {
            assert_eq!((says.user, says.key, says.not_after), (name, key.id(), now() + 2 * HOUR));
        }
        other => panic!("{other:?}"),
    }
    assert!(MachineCertificate::read(&user).is_err());
    assert!(Identity::from_pem(&authority.root().to_pem(), &pem, &key.to_pem()).is_err());
    let machine = authority.sign_machine(&public, &machine(), MACHINE_VALIDITY, now()).unwrap();
    assert!(matches!(ClientCertificate::read(&machine).unwrap(), ClientCertificate::Machine(_)));
    let server = authority.sign_server(&[], now()).unwrap();
    assert!(ClientCertificate::read(&server.chain[0]).is_err());
}

/// As `openssl req` makes them, with much that is not asked for.
#[test]
fn a_request_in_pem_gives_its_key() {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::new(vec!["server.fleet.internal".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "root");
    let text = params.serialize_request(&key).unwrap().pem().unwrap();
    let public = PublicKey::from_request_pem(&text).unwrap();
    assert_eq!(public.id(), KeyId(sha256(&key.subject_public_key_info())));
    assert_eq!(PublicKey::from_request_pem("x").unwrap_err(), CaError::Pem("certificate request"));
}
