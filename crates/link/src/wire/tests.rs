use super::*;
use bytes::Bytes;
use proptest::prelude::*;
use prost::Message;

fn name() -> impl Strategy<Value = UnitName> {
    "[a-zA-Z0-9:_.\\\\-]{1,40}(@[a-z0-9]{0,10})?\\.service"
        .prop_filter_map("a name", |name| UnitName::parse(&name).ok())
}

fn machine_id() -> impl Strategy<Value = MachineId> {
    "[0-9a-f]{32}".prop_map(|id| MachineId::parse(&id).unwrap())
}

fn file() -> impl Strategy<Value = UnitFile> {
    "(# \\PC{0,20}\n)?\\[Service\\]\nExecStart=/bin/[a-z]{1,9}\n( ?\n)?(Environment=[a-z]{1,5}\r\n)?"
        .prop_map(|text| UnitFile::parse(&text).unwrap())
}

fn instruction() -> impl Strategy<Value = Instruction> {
    let hold = (file(), prop_oneof![Just(DesiredState::Loaded), Just(DesiredState::Launched)])
        .prop_map(|(file, state)| Instruction::Hold(Wanted { file, state }));
    prop_oneof![4 => hold, 1 => Just(Instruction::Leave), 1 => (1..=u64::MAX).prop_map(Instruction::Release)]
}

fn report() -> impl Strategy<Value = UnitReport> {
    let state =
        prop_oneof![Just(DesiredState::Inactive), Just(DesiredState::Loaded), Just(DesiredState::Launched)];
    let words = ["[a-z-]{0,20}", "[a-z-]{1,20}", "[a-z0-9-]{1,64}"];
    let problem = prop::option::of("[^\\p{Cc}]{0,100}\n?");
    (state, any::<[u8; 20]>(), words, problem).prop_map(|(current, hash, [load, active, sub], problem)| {
        UnitReport { current, hash: Hash(hash), systemd: SystemdState { load, active, sub }, problem }
    })
}

fn part<T: std::fmt::Debug + 'static>(
    value: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Part<T>> {
    let entries = prop::collection::vec((name(), prop::option::of(value)), 0..6);
    (any::<[bool; 3]>(), entries).prop_map(|([snapshot, first, last], entries)| Part {
        snapshot,
        first,
        last,
        entries,
    })
}

fn hello() -> impl Strategy<Value = Hello> {
    let text = "[^\\p{Cc}]{0,30}";
    (machine_id(), text, prop::collection::btree_map(text, text, 0..5), "[0-9a-z.-]{0,20}").prop_map(
        |(id, public_ip, metadata, version)| {
            let machine = Machine { public_ip, metadata, version, ..Machine::default() };
            Hello { id, machine }
        },
    )
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..100).prop_map(Bytes::from);
    prop_oneof![
        bytes().prop_map(Chunk::Out),
        bytes().prop_map(Chunk::Err),
        any::<i32>().prop_map(Chunk::Exit),
        "[^\\p{Cc}]{0,50}".prop_map(Chunk::Failed),
    ]
}

fn address() -> impl Strategy<Value = Address> {
    (prop_oneof!["[a-z][a-z0-9.-]{0,20}", Just("fd00::1".to_owned())], 1u16..)
        .prop_map(|(host, port)| Address::new(host, port))
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        name().prop_map(Ask::Status),
        (name(), any::<u32>(), any::<bool>(), "[a-z-]{0,20}")
            .prop_map(|(unit, lines, follow, output)| Ask::Journal { unit, lines, follow, output }),
    ]
}

fn up() -> impl Strategy<Value = Up> {
    prop_oneof![
        (hello(), any::<[u32; 2]>()).prop_map(|(hello, [oldest, newest])| Up::Hello {
            hello,
            oldest,
            newest
        }),
        part(report()).prop_map(Up::Reports),
        prop::collection::vec((name(), any::<u64>()), 0..6).prop_map(Up::Released),
        (any::<u64>(), any::<bool>()).prop_map(|(number, leaving)| Up::Beat { number, leaving }),
        (any::<u64>(), prop::option::of(chunk())).prop_map(|(number, piece)| Up::Answer { number, piece }),
        any::<u64>().prop_map(Up::Probed),
    ]
}

fn down() -> impl Strategy<Value = Down> {
    prop_oneof![
        (OLDEST_PROTOCOL..=NEWEST_PROTOCOL).prop_map(|protocol| Down::Welcome { protocol }),
        part(instruction()).prop_map(Down::Units),
        any::<[u64; 2]>().prop_map(|[number, ms]| Down::Held { number, ttl: Duration::from_millis(ms) }),
        (any::<u64>(), any::<u32>(), ask()).prop_map(|(number, credit, ask)| Down::Request {
            number,
            credit,
            ask
        }),
        (any::<u64>(), any::<u32>()).prop_map(|(number, pieces)| Down::Credit { number, pieces }),
        any::<u64>().prop_map(Down::Cancel),
        any::<u64>().prop_map(Down::Probe),
        prop::collection::vec(address(), 0..5).prop_map(Down::Servers),
    ]
}

/// Changes one byte.
fn damage(bytes: &mut [u8], at: &prop::sample::Index, to: u8) {
    if !bytes.is_empty() {
        bytes[at.index(bytes.len())] = to;
    }
}

proptest! {
    #[test]
    fn what_an_agent_sends_arrives(message in up()) {
        let bytes = message.clone().encode().encode_to_vec();
        prop_assert_eq!(Up::decode(pb::FromAgent::decode(&bytes[..]).unwrap()), Ok(message));
    }

    #[test]
    fn what_a_server_sends_arrives(message in down()) {
        let bytes = message.clone().encode().encode_to_vec();
        prop_assert_eq!(Down::decode(pb::ToAgent::decode(&bytes[..]).unwrap()), Ok(message));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = pb::FromAgent::decode(&bytes[..]).map(Up::decode);
        let _ = pb::ToAgent::decode(&bytes[..]).map(Down::decode);
        let _ = pb::JoinRequest::decode(&bytes[..]);
    }

    /// A newer version may add fields, to a message and to what is in it.
    #[test]
    fn fields_that_are_not_known_are_ignored(up in up(), down in down(), field in 100u32..1000, value in any::<u64>()) {
        let mut unknown = Vec::new();
        prost::encoding::uint64::encode(field, &value, &mut unknown);
        let bytes = [up.clone().encode().encode_to_vec(), unknown.clone()].concat();
        prop_assert_eq!(Up::decode(pb::FromAgent::decode(&bytes[..]).unwrap()), Ok(up));
        let bytes = [down.clone().encode().encode_to_vec(), unknown.clone()].concat();
        prop_assert_eq!(Down::decode(pb::ToAgent::decode(&bytes[..]).unwrap()), Ok(down));
        let entry = pb::UnitEntry { name: "a.service".to_owned(), release: 7, ..Default::default() };
        let bytes = [entry.encode_to_vec(), unknown].concat();
        prop_assert_eq!(pb::UnitEntry::decode(&bytes[..]), Ok(entry));
    }

    /// Valid messages with a byte changed come further into the decoding than random ones.
    #[test]
    fn no_damaged_message_panics(up in up(), down in down(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = up.encode().encode_to_vec();
        damage(&mut bytes, &at, byte);
        if let Ok(Ok(up)) = pb::FromAgent::decode(&bytes[..]).map(Up::decode) {
            // What is taken is valid: it can be sent again.
            prop_assert_eq!(Up::decode(up.clone().encode()), Ok(up));
        }
        let mut bytes = down.encode().encode_to_vec();
        damage(&mut bytes, &at, byte);
        if let Ok(Ok(down)) = pb::ToAgent::decode(&bytes[..]).map(Down::decode) {
            prop_assert_eq!(Down::decode(down.clone().encode()), Ok(down));
        }
    }

    /// Whatever an agent ran into, its report can be sent.
    #[test]
    fn any_problem_can_be_reported(problem in "\\PC{0,50}[\\x00-\\x1f]{0,5}\\PC{0,2000}", report in report(), name in name()) {
        let report = UnitReport { problem: Some(problem.clone()), ..report };
        let entries = vec![(name, Some(report))];
        let message = Up::Reports(Part { snapshot: false, first: false, last: false, entries });
        let Ok(Up::Reports(part)) = Up::decode(message.encode()) else { panic!("refused") };
        let told = part.entries[0].1.as_ref().unwrap().problem.as_ref().unwrap();
        prop_assert!(told.len() <= MAX_TEXT && told.chars().count() <= problem.chars().count());
    }

    #[test]
    fn chunks_are_cut_and_nothing_is_lost(length in 0usize..4 * MAX_PIECE) {
        let bytes: Bytes = (0..length).map(|at| (at / 251) as u8).collect::<Vec<_>>().into();
        let mut back = Vec::new();
        for piece in pieces(Chunk::Err(bytes.clone())) {
            let Chunk::Err(piece) = piece else { panic!("of another kind") };
            prop_assert!(piece.len() <= MAX_PIECE);
            back.extend_from_slice(&piece);
        }
        prop_assert_eq!(bytes, back);
    }
}

fn entry(name: &str, report: Option<pb::Report>) -> pb::FromAgent {
    pb::FromAgent {
        body: Some(pb::from_agent::Body::Reports(pb::Reports {
            kind: pb::Kind::Changes.into(),
            entries: vec![
                pb::ReportEntry { name: "good.service".to_owned(), report: None },
                pb::ReportEntry { name: name.to_owned(), report },
            ],
            ..Default::default()
        })),
    }
}

fn good() -> pb::Report {
    pb::Report {
        current: pb::State::Launched.into(),
        hash: vec![1; 20],
        load: "loaded".to_owned(),
        active: "active".to_owned(),
        sub: "running".to_owned(),
        problem: None,
    }
}

#[test]
fn an_error_names_the_field() {
    let says = |message| Up::decode(message).unwrap_err().to_string();
    assert!(Up::decode(entry("hello.service", Some(good()))).is_ok());
    assert_eq!(
        says(entry("no/name.service", None)),
        "reports.entries[1].name: invalid character '/' in unit name"
    );
    let report = pb::Report { hash: vec![1; 19], ..good() };
    assert_eq!(
        says(entry("a.service", Some(report))),
        "reports.entries[1].report.hash: 19 bytes instead of 20"
    );
    let report = pb::Report { current: 7, ..good() };
    assert_eq!(says(entry("a.service", Some(report))), "reports.entries[1].report.current: unknown value 7");
    for sub in ["two words", "\u{1b}[2J", "ä", &"x".repeat(65)] {
        let report = pb::Report { sub: sub.to_owned(), ..good() };
        assert_eq!(
            says(entry("a.service", Some(report))),
            "reports.entries[1].report.sub: not a word of systemd"
        );
    }
    let report = pb::Report { problem: Some("\u{1b}[2J".to_owned()), ..good() };
    assert_eq!(
        says(entry("a.service", Some(report))),
        "reports.entries[1].report.problem: has control characters"
    );
    assert_eq!(says(pb::FromAgent { body: None }), "body: of no known kind");
    let hello = pb::Hello { machine: "me".to_owned(), ..Default::default() };
    assert_eq!(
        says(pb::FromAgent { body: Some(pb::from_agent::Body::Hello(hello)) }),
        "hello.machine: \"me\" is not a machine ID (32 hexadecimal digits)"
    );
}

#[test]
fn a_server_can_not_ask_for_what_makes_no_sense() {
    let units = |state, file: &str| pb::ToAgent {
        body: Some(pb::to_agent::Body::Units(pb::Units {
            kind: pb::Kind::Changes.into(),
            entries: vec![pb::UnitEntry {
                name: "a.service".to_owned(),
                wanted: Some(pb::Wanted { file: file.to_owned(), state }),
                leave: false,
                release: 0,
            }],
            ..Default::default()
        })),
    };
    let says = |message| Down::decode(message).unwrap_err().to_string();
    assert!(says(units(pb::State::Inactive.into(), "")).starts_with("units.entries[0].wanted.state: "));
    assert!(says(units(9, "")).starts_with("units.entries[0].wanted.state: unknown value 9"));
    assert!(
        says(units(pb::State::Launched.into(), "[Service]\0"))
            .starts_with("units.entries[0].wanted.file: unit a.service")
    );
    let journal =
        pb::Journal { unit: "a.service".to_owned(), output: "--root=/".to_owned(), ..Default::default() };
    let request = pb::Request { ask: Some(pb::request::Ask::Journal(journal)), ..Default::default() };
    let message = pb::ToAgent { body: Some(pb::to_agent::Body::Request(request)) };
    assert_eq!(says(message), "request.journal.output: not a word of systemd");
    let welcome = pb::Welcome { protocol: NEWEST_PROTOCOL + 1 };
    let message = pb::ToAgent { body: Some(pb::to_agent::Body::Welcome(welcome)) };
    assert_eq!(says(message), format!("welcome.protocol: {} is none of ours", NEWEST_PROTOCOL + 1));
}

#[test]
fn the_newest_common_protocol_is_used() {
    assert_eq!(agree(OLDEST_PROTOCOL, NEWEST_PROTOCOL), Ok(NEWEST_PROTOCOL));
    assert_eq!(agree(NEWEST_PROTOCOL, NEWEST_PROTOCOL + 1), Ok(NEWEST_PROTOCOL));
    assert!(agree(NEWEST_PROTOCOL + 1, NEWEST_PROTOCOL + 2).is_err());
    assert!(agree(0, OLDEST_PROTOCOL - 1).is_err());
    // Nonsense is no agreement.
    assert!(agree(u32::MAX, 0).is_err());
}

#[test]
fn the_largest_unit_fits_into_a_message() {
    let file =
        UnitFile::parse(&format!("[Service]\n{}", "# filling it up\n".repeat((MAX_FILE - 10) / 16))).unwrap();
    assert!(file.text().len() > MAX_FILE - 32);
    let units: std::collections::BTreeMap<_, _> = (0..3)
        .map(|n| {
            (
                UnitName::parse(&format!("{n}.service")).unwrap(),
                Instruction::Hold(Wanted { file: file.clone(), state: DesiredState::Loaded }),
            )
        })
        .collect();
    let mut parts = crate::pending::Parts::of(crate::pending::Update::Snapshot(units));
    loop {
        let (part, last) = parts.next(PART_DOWN, instruction_size);
        assert!(Down::Units(part).encode().encoded_len() <= MAX_DOWN);
        if last {
            break;
        }
    }
    assert!(UnitFile::parse(&"#".repeat(MAX_FILE + 1)).is_err(), "fleet_unit allows larger files now");
}

#[test]
fn a_join_request_does_not_print_its_secret() {
    let request = pb::JoinRequest { secret: vec![0xab; 24], request: vec![0xab; 9], ..Default::default() };
    assert!(!format!("{request:?}").contains("171"));
}

#[test]
fn addresses_of_servers_are_checked() {
    let servers = |addresses: Vec<String>| {
        let body = pb::to_agent::Body::Servers(pb::Servers { addresses });
        Down::decode(pb::ToAgent { body: Some(body) }).map_err(|error| error.to_string())
    };
    assert_eq!(servers(vec!["10.0.0.1".into()]), Ok(Down::Servers(vec![Address::new("10.0.0.1", 4919)])));
    let error = servers(vec!["10.0.0.1:0".into()]).unwrap_err();
    assert!(error.starts_with("servers.addresses: \"10.0.0.1:0\" is not the address of a server"), "{error}");
    let error = servers(vec!["a".into(); MAX_SERVERS + 1]).unwrap_err();
    assert_eq!(error, "servers.addresses: more than 1024");
}

#[test]
fn questions_to_other_servers_are_checked() {
    use peer::{decode_news, decode_peer_ask, encode_news, encode_peer_ask, news_in_parts};
    let machine = MachineId::parse(&"4".repeat(32)).unwrap();
    let ask = Ask::Status(UnitName::parse("a.service").unwrap());
    let message = encode_peer_ask(&machine, ask.clone());
    assert_eq!(decode_peer_ask(message.clone()), Ok((machine, ask)));
    let says = |message| decode_peer_ask(message).unwrap_err().to_string();
    let wrong = pb::PeerAsk { machine: "x".into(), ..message.clone() };
    assert_eq!(says(wrong), "machine: \"x\" is not a machine ID (32 hexadecimal digits)");
    assert_eq!(says(pb::PeerAsk { request: None, ..message.clone() }), "request: missing");
    let empty = pb::Request { ask: None, ..Default::default() };
    assert_eq!(says(pb::PeerAsk { request: Some(empty), ..message }), "request.ask: of no known kind");

    use crate::peer::{News, Notice};
    use fleet_cluster::engine::Delay;
    let delay = |n: usize| {
        let why = [None, Some(Delay::Grace), Some(Delay::Isolation), Some(Delay::MassLoss)][n % 4];
        (UnitName::parse(&format!("u{n}.service")).unwrap(), why)
    };
    let notice = Notice { id: "massLoss".into(), since: 7, text: "many".into() };
    let news = News {
        anew: true,
        notices: vec![notice],
        over: vec!["other".into()],
        delays: (0..5000).map(delay).collect(),
    };
    let parts = news_in_parts(news.clone());
    assert_eq!(parts.len(), 3);
    assert!(parts.iter().skip(1).all(|part| !part.anew && part.notices.is_empty()));
    let told = parts.into_iter().map(|part| decode_news(encode_news(part)).unwrap());
    let whole = told.reduce(|mut all, part| {
        all.delays.extend(part.delays);
        all
    });
    assert_eq!(whole, Some(news));
    assert_eq!(news_in_parts(News::default()), [News::default()]);
    // A reason that only a newer leader knows.
    let newer =
        pb::News { delays: vec![pb::Delayed { unit: "a.service".into(), why: 99 }], ..Default::default() };
    assert_eq!(decode_news(newer).unwrap().delays[0].1, None);
    let harmful = pb::Notice { text: "a\u{1b}[2J".into(), ..Default::default() };
    assert!(decode_news(pb::News { notices: vec![harmful], ..Default::default() }).is_err());
}
