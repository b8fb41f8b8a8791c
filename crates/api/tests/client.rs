//! The client against a real socket: what goes over the wire, what errors say, what is kept.
#![allow(clippy::unwrap_used)]
use fleet_api::client::{
    ByteStream, Client, Connecting, Connector, Credentials, Endpoint, Error, EventQuery, JournalQuery,
    Options, StateFilter, Tls,
};
use fleet_api::events::Event;
use fleet_api::types::{JoinToken, JoinTokenRequest, Member, Unit, UnitOption};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpSocket;

/// What the server got: one line per request, and its body.
type Log = Arc<Mutex<Vec<(String, String)>>>;

/// What the server does after having written.
enum Then {
    Keep,
    Close,
}

/// A server on 127.0.0.1 that answers what `answer` says (a whole HTTP answer) to the line of each
/// request; returns its address, what was asked, and how many connections were made.
async fn server(
    answer: impl Fn(&str) -> (String, Then) + Send + Sync + 'static,
) -> (String, Log, Arc<Mutex<usize>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (log, connections) = (Log::default(), Arc::new(Mutex::new(0)));
    let (log2, connections2, answer) = (log.clone(), connections.clone(), Arc::new(answer));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            *connections2.lock().unwrap() += 1;
            tokio::spawn(converse(stream, log2.clone(), answer.clone()));
        }
    });
    (address, log, connections)
}

async fn converse<F: Fn(&str) -> (String, Then)>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    log: Log,
    answer: Arc<F>,
) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if stream.read_line(&mut request).await.unwrap_or(0) == 0 {
            return;
        }
        let (mut length, mut revision) = (0, String::new());
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("fleet-min-revision:") {
                revision = format!(" from revision {}", value.trim());
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        let request = request.trim().trim_end_matches(" HTTP/1.1").to_owned() + &revision;
        log.lock().unwrap().push((request.clone(), String::from_utf8(body).unwrap()));
        let (text, then) = answer(&request);
        stream.write_all(text.as_bytes()).await.unwrap();
        if let Then::Close = then {
            return;
        }
    }
}

fn json(status: &str, body: &str) -> (String, Then) {
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    (text, Then::Keep)
}

fn empty(status: &str) -> (String, Then) {
    (format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"), Then::Keep)
}

fn client(endpoint: &str) -> Client {
    Client::new(Endpoint::parse(endpoint).unwrap(), Options::default())
}

fn requests(log: &Log) -> Vec<String> {
    log.lock().unwrap().iter().map(|(line, _)| line.clone()).collect()
}

#[tokio::test]
async fn pages_are_followed_on_one_connection() {
    let (address, log, connections) = server(|request| match request {
        "GET /fleet/v1/units" => json("200 OK", r#"{"nextPageToken":"t/1","units":[{"name":"a.service"}]}"#),
        "GET /fleet/v1/units?nextPageToken=t%2F1" => json("200 OK", r#"{"units":[{"name":"b.service"}]}"#),
        "GET /fleet/v1/state?unitName=a%5Cx2db.service&machineID=m" => json("200 OK", "{}"),
        other => panic!("{other}"),
    })
    .await;
    let client = client(&address);
    let names: Vec<_> = client.units().await.unwrap().into_iter().map(|unit| unit.name).collect();
    assert_eq!(names, ["a.service", "b.service"]);
    let filter = StateFilter { unit: Some("a\\x2db.service".into()), machine: Some("m".into()) };
    assert_eq!(client.states(&filter).await.unwrap(), []);
    assert_eq!(requests(&log).len(), 3);
    assert_eq!(*connections.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_unit_is_missing_only_if_no_server_has_it() {
    let (address, log, _) = server(|request| match request {
        "GET /fleet/v1/servers" => {
            json("200 OK", r#"{"servers":[{"revision":7},{"revision":9},{"problem":"?"}]}"#)
        }
        "GET /fleet/v1/servers from revision 9" => json("200 OK", r#"{"servers":[{"revision":9}]}"#),
        "GET /fleet/v1/units/late.service from revision 9" => json("200 OK", r#"{"name":"late.service"}"#),
        _ => json("404 Not Found", r#"{"error":{"code":404,"message":"unit does not exist"}}"#),
    })
    .await;
    let client = client(&address);
    let found = client.find_units(&["late.service".to_owned()]).await.unwrap();
    assert_eq!(found.len(), 1);
    // When nobody knows more it is not asked for again.
    let before = requests(&log).len();
    assert_eq!(client.find_units(&["none.service".to_owned()]).await.unwrap(), []);
    assert_eq!(requests(&log).len(), before + 2);
}

#[tokio::test]
async fn pages_that_turn_in_a_circle_are_an_error() {
    let (address, ..) =
        server(|_| json("200 OK", r#"{"nextPageToken":"t","units":[{"name":"a.service"}]}"#)).await;
    let error = client(&address).units().await.unwrap_err().to_string();
    assert!(error.contains("do not end"), "{error}");
}

#[tokio::test]
async fn units_are_put_got_and_deleted() {
    let (address, log, _) = server(|request| match request {
        "PUT /fleet/v1/units/a.service" => empty("201 Created"),
        "PUT /fleet/v1/units/b.service" => empty("204 No Content"),
        "GET /fleet/v1/units/a.service" => json("200 OK", r#"{"name":"a.service","currentState":"loaded"}"#),
        "DELETE /fleet/v1/units/a.service" => empty("204 No Content"),
        _ => json("404 Not Found", r#"{"error":{"code":404,"message":"unit does not exist"}}"#),
    })
    .await;
    let client = client(&address);
    let option =
        UnitOption { section: "Service".into(), name: "ExecStart".into(), value: "/bin/true".into() };
    let unit = Unit {
        name: "a.service".into(),
        desired_state: "launched".into(),
        options: vec![option],
        file: "[Service]\nExecStart=/bin/true\n".into(),
        ..Default::default()
    };
    assert!(client.put_unit(&unit).await.unwrap());
    assert_eq!(
        log.lock().unwrap()[0].1,
        r#"{"desiredState":"launched","file":"[Service]\nExecStart=/bin/true\n","name":"a.service","options":[{"name":"ExecStart","section":"Service","value":"/bin/true"}]}"#
    );
    assert!(!client.put_unit(&Unit { name: "b.service".into(), ..Default::default() }).await.unwrap());
    assert_eq!(client.unit("a.service").await.unwrap().unwrap().current_state, "loaded");
    assert_eq!(client.unit("b.service").await.unwrap(), None);
    assert!(client.delete_unit("a.service").await.unwrap());
    assert!(!client.delete_unit("b.service").await.unwrap());
    let refused =
        client.put_unit(&Unit { name: "c.service".into(), ..Default::default() }).await.unwrap_err();
    assert_eq!(refused.to_string(), "googleapi: Error 404: unit does not exist");
}

#[tokio::test]
async fn join_tokens_are_made_listed_and_revoked() {
    let (address, log, _) = server(|request| match request {
        "POST /fleet/v1/join-tokens" => json(
            "201 Created",
            r#"{"id":"a1","token":"fleet1-s3cret","expires":1795300000,"usesLeft":1}"#,
        ),
        "GET /fleet/v1/join-tokens" => json(
            "200 OK",
            r#"{"joinTokens":[{"id":"a1","created":1795200000,"expires":1795300000,"usesLeft":1},{"id":"b2","created":1,"expires":2}]}"#,
        ),
        "DELETE /fleet/v1/join-tokens/a1" => empty("204 No Content"),
        "DELETE /fleet/v1/join-tokens/no%2Fne" => {
            json("404 Not Found", r#"{"error":{"code":404,"message":"join token does not exist"}}"#)
        }
        other => panic!("{other}"),
    })
    .await;
    let client = client(&address);
    let request = JoinTokenRequest { ttl: Some("1h30m".into()), uses: Some(1) };
    let made = client.create_join_token(&request).await.unwrap();
    assert_eq!(
        (made.token.as_str(), made.expires, made.uses_left),
        ("fleet1-s3cret", 1_795_300_000, Some(1))
    );
    let shown = format!("{made:?}");
    assert!(shown.contains("a1") && !shown.contains("s3cret"), "{shown}");
    client.create_join_token(&JoinTokenRequest::default()).await.unwrap();
    let bodies: Vec<String> = log.lock().unwrap().iter().map(|(_, body)| body.clone()).collect();
    assert_eq!(bodies, [r#"{"ttl":"1h30m","uses":1}"#, "{}"]);
    assert_eq!(
        client.join_tokens().await.unwrap(),
        [
            JoinToken { id: "a1".into(), created: 1_795_200_000, expires: 1_795_300_000, uses_left: Some(1) },
            JoinToken { id: "b2".into(), created: 1, expires: 2, uses_left: None },
        ]
    );
    assert!(client.delete_join_token("a1").await.unwrap());
    assert!(!client.delete_join_token("no/ne").await.unwrap());
}

#[tokio::test]
async fn members_are_listed_and_removed() {
    let (address, ..) = server(|request| match request {
        "GET /fleet/v1/members" => {
            json("200 OK", r#"{"members":[{"machineID":"m1","joined":1795300000,"connected":true}]}"#)
        }
        "DELETE /fleet/v1/machines/m1" => empty("204 No Content"),
        "DELETE /fleet/v1/machines/m2" => {
            json("404 Not Found", r#"{"error":{"code":404,"message":"machine is no member"}}"#)
        }
        // A server that does not know the resource.
        "DELETE /fleet/v1/machines/old" => json("404 Not Found", r#"{"error":{"code":404,"message":""}}"#),
        other => panic!("{other}"),
    })
    .await;
    let client = client(&address);
    let member = Member { machine_id: "m1".into(), joined: 1_795_300_000, connected: true, removed: false };
    assert_eq!(client.members().await.unwrap(), [member]);
    assert!(client.delete_machine("m1").await.unwrap());
    assert!(!client.delete_machine("m2").await.unwrap());
    assert!(client.delete_machine("old").await.unwrap_err().is_unknown_resource());
}

/// A token that was made, but whose answer was lost, is not made again unasked.
#[tokio::test]
async fn only_what_can_be_done_twice_is_tried_again() {
    let (address, log, _) = server(|request| match request {
        "GET /fleet/v1/machines" => json("200 OK", "{}"),
        _ => (String::new(), Then::Close),
    })
    .await;
    let client = client(&address);
    client.machines().await.unwrap();
    let error = client.create_join_token(&JoinTokenRequest::default()).await.unwrap_err().to_string();
    assert!(error.starts_with("Post \"http") && error.ends_with(": EOF"), "{error}");
    client.machines().await.unwrap();
    client.delete_join_token("a").await.unwrap_err();
    let tries = |line: &str| requests(&log).iter().filter(|request| *request == line).count();
    assert_eq!(tries("POST /fleet/v1/join-tokens"), 1);
    assert_eq!(tries("DELETE /fleet/v1/join-tokens/a"), 2);
}

/// Its first connections are closed before anything was heard on them.
struct ClosedAtFirst {
    closed: usize,
    made: Arc<Mutex<usize>>,
}

impl Connector for ClosedAtFirst {
    fn connect(&self) -> Connecting<'_> {
        let (near, far) = tokio::io::duplex(4096);
        let mut made = self.made.lock().unwrap();
        *made += 1;
        if *made > self.closed {
            tokio::spawn(converse(far, Log::default(), Arc::new(|_: &str| json("200 OK", "{}"))));
        }
        Box::pin(std::future::ready(Ok(Box::new(near) as Box<dyn ByteStream>)))
    }
}

/// A server that begins again closes also what it has just accepted.
#[tokio::test]
async fn a_new_connection_closed_before_the_request_is_replaced_once() {
    for (closed, works) in [(1, true), (2, false)] {
        let made = Arc::default();
        let connector = ClosedAtFirst { closed, made: Arc::clone(&made) };
        let endpoint = Endpoint::parse("http://server").unwrap();
        let options = Options { connector: Some(Arc::new(connector)), ..Options::default() };
        let client = Client::new(endpoint, options);
        // Whatever the method: nothing was sent.
        let token = client.create_join_token(&JoinTokenRequest::default()).await;
        assert_eq!((token.is_ok(), *made.lock().unwrap()), (works, 2), "{token:?}");
    }
}

/// The server closes kept connections when it likes.
#[tokio::test]
async fn a_connection_closed_meanwhile_is_replaced() {
    let (address, _, connections) = server(|_| (json("200 OK", "{}").0, Then::Close)).await;
    let client = client(&address);
    for _ in 0..5 {
        assert_eq!(client.machines().await.unwrap(), []);
    }
    assert_eq!(*connections.lock().unwrap(), 5);
}

#[tokio::test]
async fn what_is_not_there_is_said_in_the_originals_words() {
    let error = client("unix:///nonexistent.sock").machines().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Get \"http://domain-sock/fleet/v1/machines?alt=json\": dial unix /nonexistent.sock: connect: no such file or directory"
    );
    assert!(error.is_no_answer());
    let (_socket, dead) = dead();
    let address = dead.trim_start_matches("http://");
    let error = client(&dead).machines().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "Get \"http://{address}/fleet/v1/machines?alt=json\": dial tcp {address}: connect: connection refused"
        )
    );
    let error = client("ftp://gold-2:49153").machines().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Get \"ftp://gold-2:49153/fleet/v1/machines?alt=json\": unsupported protocol scheme \"ftp\""
    );
    let error = client("unix:///nonexistent.sock").find_units(&["x.service".into()]).await.unwrap_err();
    assert!(error.to_string().starts_with("Get \"http://domain-sock/fleet/v1/units?alt=json\": "), "{error}");
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (address, ..) = server(|_| (String::new(), Then::Keep)).await;
    let options = Options { request_timeout: Duration::from_millis(50), ..Default::default() };
    let client = Client::new(Endpoint::parse(&address).unwrap(), options);
    let error = client.machines().await.unwrap_err();
    assert!(error.to_string().ends_with("no answer within 0.05 s"), "{error}");
}

#[tokio::test]
async fn many_requests_share_the_connections_they_may_have() {
    let (address, log, connections) = server(|request| {
        let name = request.rsplit('/').next().unwrap();
        json("200 OK", &format!(r#"{{"name":"{name}"}}"#))
    })
    .await;
    let options = Options { at_once: 3, ..Default::default() };
    let client = Client::new(Endpoint::parse(&address).unwrap(), options);
    let names: Vec<String> = (0..40).map(|number| format!("u{number}.service")).collect();
    let units = client.find_units(&names).await.unwrap();
    assert_eq!(units.iter().map(|unit| unit.name.clone()).collect::<Vec<_>>(), names);
    assert_eq!((requests(&log).len(), *connections.lock().unwrap()), (40, 3));
}

#[tokio::test]
async fn a_cut_answer_is_an_error() {
    let (address, ..) =
        server(|_| ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{".into(), Then::Close)).await;
    let error = client(&address).machines().await.unwrap_err();
    assert!(error.is_no_answer() && error.to_string().contains("connection lost"), "{error}");
    let (address, ..) = server(|_| (String::new(), Then::Close)).await;
    assert!(client(&address).machines().await.unwrap_err().to_string().ends_with(": EOF"));
}

#[tokio::test]
async fn an_answer_without_end_is_refused() {
    let (address, ..) = server(|_| {
        let body = "x".repeat(100 << 10);
        (format!("HTTP/1.1 500 No\r\nContent-Length: {}\r\n\r\n{body}", body.len()), Then::Close)
    })
    .await;
    let error = client(&address).machines().await.unwrap_err().to_string();
    assert!(error.contains("larger than 64 KiB"), "{error}");
}

/// The original's server knows none of the added resources.
#[tokio::test]
async fn an_old_server_gives_the_file_in_normal_form() {
    let (address, ..) = server(|request| match request {
        "GET /fleet/v1/units/a.service" => json(
            "200 OK",
            r#"{"name":"a.service","options":[{"section":"Service","name":"ExecStart","value":"/bin/true"}]}"#,
        ),
        _ => json("404 Not Found", r#"{"error":{"code":404,"message":""}}"#),
    })
    .await;
    let client = client(&address);
    let file = client.unit_file("a.service").await.unwrap().unwrap();
    assert_eq!(file, "[Service]\nExecStart=/bin/true\n");
    assert_eq!(client.unit_file("b.service").await.unwrap(), None);
    assert!(client.explain("a.service").await.unwrap_err().is_unknown_resource());
    let Err(error) = client.events(&EventQuery::default()).await else { panic!("there are no events") };
    assert!(error.is_unknown_resource());
}

#[tokio::test]
async fn status_and_journal_bring_exit_codes() {
    let (address, ..) = server(|request| match request {
        "GET /fleet/v1/units/a.service/status?machine=m1" => (
            "HTTP/1.1 200 OK\r\nFleet-Exit-Code: 3\r\nFleet-Machine: m1\r\nContent-Length: 3\r\n\r\nbad"
                .into(),
            Then::Keep,
        ),
        "GET /fleet/v1/units/a.service/journal?lines=2&follow=1&output=cat&machine=m1" => (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Fleet-Exit-Code\r\n\r\n\
             2\r\nhi\r\n2\r\n!\n\r\n0\r\nFleet-Exit-Code: 7\r\n\r\n"
                .into(),
            Then::Keep,
        ),
        "GET /fleet/v1/units/a.service/journal?lines=-1&output=short" => {
            let body = r#"{"error":{"code":400,"message":"journalctl: invalid option -- '1'"}}"#;
            let head = "HTTP/1.1 400 Bad Request\r\nFleet-Exit-Code: 1\r\nContent-Length";
            (format!("{head}: {}\r\n\r\n{body}", body.len()), Then::Keep)
        }
        other => panic!("{other}"),
    })
    .await;
    let client = client(&address);
    let status = client.status("a.service", Some("m1")).await.unwrap();
    assert_eq!((status.exit_code, &status.text[..]), (3, &b"bad"[..]));
    assert_eq!(status.machine_id.as_deref(), Some("m1"));
    let query = JournalQuery { lines: 2, follow: true, output: "cat".into(), machine: Some("m1".into()) };
    let mut journal = client.journal("a.service", &query).await.unwrap();
    let mut text = Vec::new();
    while let Some(piece) = journal.next().await.unwrap() {
        text.extend_from_slice(&piece);
    }
    assert_eq!((&text[..], journal.exit_code()), (&b"hi!\n"[..], Some(7)));
    let query = JournalQuery { lines: -1, follow: false, output: "short".into(), machine: None };
    match client.journal("a.service", &query).await {
        Err(Error::Refused { code: 400, message, exit_code: Some(1) }) => {
            assert_eq!(message, "journalctl: invalid option -- '1'");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("journalctl failed"),
    }
}

#[tokio::test]
async fn a_journal_that_broke_off_is_told_from_one_that_ended() {
    let (address, ..) = server(|request| {
        let trailer = match request {
            "GET /fleet/v1/units/a.service/journal?lines=1&output=cat" => {
                "Fleet-Error: the connection to machine m1 was lost\r\n"
            }
            _ => "",
        };
        let head =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Fleet-Exit-Code, Fleet-Error\r\n\r\n";
        (format!("{head}3\r\nhi\n\r\n0\r\n{trailer}\r\n"), Then::Keep)
    })
    .await;
    let client = client(&address);
    let query = JournalQuery { lines: 1, follow: false, output: "cat".into(), machine: None };
    for (unit, reason) in
        [("a.service", "the connection to machine m1 was lost"), ("b.service", "the server has ended it")]
    {
        let mut journal = client.journal(unit, &query).await.unwrap();
        assert_eq!(journal.next().await.unwrap().as_deref(), Some(&b"hi\n"[..]));
        let error = journal.next().await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[tokio::test]
async fn events_come_with_their_ids() {
    let (address, log, _) = server(|_| {
        let body = "id: 5\nevent: machineGone\ndata: {\"kind\":\"machineGone\",\"id\":\"m\"}\n\n\
                    : heartbeat\n\nevent: news\ndata: {\"kind\":\"news\"}\n\n\
                    id: 6\nevent: ready\ndata: {\"kind\":\"ready\"}\n\n";
        (format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{body}"), Then::Close)
    })
    .await;
    let query = EventQuery {
        units: vec!["a.service".into(), "b@1.service".into()],
        machines: false,
        snapshot: true,
        since: Some("4".into()),
    };
    let mut events = client(&address).events(&query).await.unwrap();
    assert_eq!(
        events.next().await.unwrap(),
        Some(("5".to_owned(), Event::MachineGone { id: "m".to_owned() }))
    );
    assert_eq!(events.next().await.unwrap(), Some(("6".to_owned(), Event::Ready)));
    assert_eq!(events.next().await.unwrap(), None);
    assert_eq!(
        requests(&log),
        ["GET /fleet/v1/events?snapshot=1&since=4&unitName=a.service&unitName=b@1.service"]
    );
}

/// An address where nobody listens, nor can listen as long as the socket is kept, which is bound to it.
fn dead() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = format!("http://{}", socket.local_addr().unwrap());
    (socket, address)
}

fn of_several(endpoints: &[&str]) -> Client {
    let mut endpoints = endpoints.iter().map(|text| Endpoint::parse(text).unwrap());
    let first = Client::new(endpoints.next().unwrap(), Options::default());
    endpoints.fold(first, |client, endpoint| client.or(endpoint, None))
}

fn agent_only() -> (String, Then) {
    let body = r#"{"error":{"code":503,"message":"an agent only"}}"#;
    let head = "HTTP/1.1 503 X\r\nFleet-Role: agent\r\n";
    (format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()), Then::Keep)
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_none() {
    let (_socket, dead) = dead();
    let (agent, agent_log, _) = server(|_| agent_only()).await;
    let (good, log, _) = server(|_| json("200 OK", "{}")).await;
    let client = of_several(&[&dead, &agent, &good]);
    assert_eq!(client.units().await.unwrap(), []);
    assert_eq!(client.machines().await.unwrap(), []);
    assert_eq!(requests(&log), ["GET /fleet/v1/units", "GET /fleet/v1/machines"]);
    // The one that answered is asked first from then on.
    assert_eq!(requests(&agent_log).len(), 1);
    // Also what may not be repeated: neither has done anything with it.
    let (good, log, _) = server(|_| json("201 Created", r#"{"id":"a1"}"#)).await;
    let client = of_several(&[&dead, &agent, &good]);
    assert_eq!(client.create_join_token(&JoinTokenRequest::default()).await.unwrap().id, "a1");
    assert_eq!(requests(&log), ["POST /fleet/v1/join-tokens"]);
}

#[tokio::test]
async fn a_refusal_is_an_answer() {
    for status in ["401 X", "403 X", "404 X", "503 X"] {
        let (first, ..) = server(move |_| json(status, r#"{"error":{"code":0,"message":"no"}}"#)).await;
        let (second, log, _) = server(|_| json("200 OK", "{}")).await;
        let error = of_several(&[&first, &second]).units().await.unwrap_err();
        assert_eq!(error.to_string(), format!("googleapi: Error {}: no", &status[..3]));
        assert!(requests(&log).is_empty(), "{status}");
    }
}

#[tokio::test]
async fn when_nobody_answers_everybody_is_named() {
    let ((_socket, dead), (agent, ..)) = (dead(), server(|_| agent_only()).await);
    let error = of_several(&[&dead, &agent, "unix:///nonexistent.sock"]).units().await.unwrap_err();
    let address = dead.trim_start_matches("http://");
    assert!(error.is_no_answer());
    assert_eq!(
        error.to_string(),
        format!(
            "Get \"/fleet/v1/units?alt=json\": no server answers ({dead}: dial tcp {address}: connect: connection refused; \
             {agent}: googleapi: Error 503: an agent only; \
             unix:///nonexistent.sock: dial unix /nonexistent.sock: connect: no such file or directory)"
        )
    );
    // A single one is told of as always.
    let error = client(&agent).units().await.unwrap_err();
    assert_eq!(error.to_string(), "googleapi: Error 503: an agent only");
}

/// The server takes a request and dies.
#[tokio::test]
async fn what_may_have_been_done_is_repeated_only_if_that_does_no_harm() {
    let (dying, first, _) = server(|_| (String::new(), Then::Close)).await;
    let (good, second, _) = server(|request| match request.split(' ').next().unwrap() {
        "GET" => json("200 OK", "{}"),
        "PATCH" | "PUT" => empty("204 No Content"),
        // The first server had deleted it.
        "DELETE" => json("404 Not Found", r#"{"error":{"code":404,"message":"unit does not exist"}}"#),
        other => panic!("{other} is repeated"),
    })
    .await;
    let client = || of_several(&[&dying, &good]);
    assert_eq!(client().units().await.unwrap(), []);
    assert!(!client().put_unit(&Unit { name: "a.service".into(), ..Default::default() }).await.unwrap());
    client().patch_machines(&[]).await.unwrap();
    assert!(client().delete_unit("a.service").await.unwrap(), "it was deleted by this very request");
    assert_eq!((requests(&first).len(), requests(&second).len()), (4, 4));
    let error = client().create_join_token(&JoinTokenRequest::default()).await.unwrap_err();
    assert!(error.is_no_answer(), "{error}");
    assert_eq!((requests(&first).len(), requests(&second).len()), (5, 4));
    // Nothing was tried before: nobody else can have deleted it.
    assert!(!of_several(&[&good, &dying]).delete_unit("a.service").await.unwrap());
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let (good, ..) = server(|_| json("200 OK", "{}")).await;
    // The other one has to keep to it, on a busy machine, too.
    let options = Options { request_timeout: Duration::from_secs(2), ..Options::default() };
    let client =
        Client::new(Endpoint::parse(&address).unwrap(), options).or(Endpoint::parse(&good).unwrap(), None);
    assert_eq!(client.units().await.unwrap(), []);
}

#[tokio::test]
async fn event_streams_move_on() {
    let ready = |id: u32| format!("id: {id}\nevent: ready\ndata: {{\"kind\":\"ready\"}}\n\n");
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
    let (first, log, _) = server(move |_| (format!("{head}{}", ready(1)), Then::Close)).await;
    let (second, ..) = server(move |_| (format!("{head}{}", ready(2)), Then::Close)).await;
    let client = of_several(&[&first, &second]);
    let mut stream = client.events(&EventQuery::default()).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), Some(("1".to_owned(), Event::Ready)));
    assert_eq!(stream.next().await.unwrap(), None);
    assert_eq!(requests(&log).len(), 1);
    let (_socket, dead) = dead();
    let client = of_several(&[&dead, &second]);
    let mut stream = client.events(&EventQuery::default()).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), Some(("2".to_owned(), Event::Ready)));
}

#[tokio::test]
async fn no_token_goes_over_plain_http() {
    let heads: Arc<Mutex<String>> = Arc::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = heads.clone();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = vec![0; 4096];
        let count = stream.read(&mut bytes).await.unwrap();
        seen.lock().unwrap().push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        stream.write_all(json("200 OK", "{}").0.as_bytes()).await.unwrap();
    });
    use fleet_trust::{Fingerprint, token};
    let token = token::Token::generate(Fingerprint([1; 32])).unwrap().to_text(token::Kind::User);
    let tls = Tls::new(Credentials { token: Some(&token), ..Default::default() }).unwrap();
    let options = Options { tls: Some(tls), ..Options::default() };
    Client::new(Endpoint::parse(&address).unwrap(), options).units().await.unwrap();
    let head = heads.lock().unwrap().to_lowercase();
    assert!(head.starts_with("get /fleet/v1/units") && !head.contains("authorization"), "{head}");
}

/// An answer of a server that knows this revision.
fn at(revision: u64, (text, then): (String, Then)) -> (String, Then) {
    (text.replacen("\r\n", &format!("\r\nFleet-Revision: {revision}\r\n"), 1), then)
}

#[tokio::test]
async fn what_was_written_is_read_through_any_server() {
    // The first takes the write and is gone; the next has not come so far, the last has.
    let (first, ..) = server(|request| match request {
        "PUT /fleet/v1/units/a.service" => at(7, empty("201 Created")),
        _ => (String::new(), Then::Close),
    })
    .await;
    let behind = r#"{"error":{"code":503,"message":"this server is behind"}}"#;
    let (second, asked, _) = server(move |_| at(5, json("503 Service Unavailable", behind))).await;
    let (third, ..) = server(|request| match request {
        "GET /fleet/v1/units/a.service from revision 7" => {
            at(8, json("200 OK", r#"{"name":"a.service","currentState":"loaded"}"#))
        }
        "GET /fleet/v1/events?unitName=a.service from revision 8" => {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
            let event = "id: 12\nevent: ready\ndata: {\"kind\":\"ready\"}\n\n";
            (format!("{head}{event}"), Then::Close)
        }
        "GET /fleet/v1/servers from revision 12" => at(12, json("200 OK", "{}")),
        "POST /fleet/v1/registry/accept from revision 12" => at(3, empty("204 No Content")),
        "GET /fleet/v1/servers" => at(3, json("200 OK", "{}")),
        other => panic!("{other}"),
    })
    .await;
    let endpoint = |url: &str| Endpoint::parse(url).unwrap();
    let client = client(&first).or(endpoint(&second), None).or(endpoint(&third), None);
    let unit = Unit { name: "a.service".into(), desired_state: "launched".into(), ..Unit::default() };
    client.put_unit(&unit).await.unwrap();
    assert_eq!(client.unit("a.service").await.unwrap().unwrap().current_state, "loaded");
    assert_eq!(requests(&asked), ["GET /fleet/v1/units/a.service from revision 7"]);
    // So does what an event told.
    let query = EventQuery { units: vec!["a.service".into()], ..EventQuery::default() };
    let mut events = client.events(&query).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().1, Event::Ready);
    client.servers().await.unwrap();
    // After this the registry may be another one.
    client.accept_registry().await.unwrap();
    client.servers().await.unwrap();
}

#[tokio::test]
async fn the_only_server_may_be_behind_and_says_so() {
    let behind = r#"{"error":{"code":503,"message":"this server is behind: it knows revision 5"}}"#;
    let (address, ..) = server(move |request| match request {
        "GET /fleet/v1/units/a.service from revision 7" => at(5, json("503 Service Unavailable", behind)),
        _ => at(7, json("200 OK", "{}")),
    })
    .await;
    let client = client(&address);
    client.servers().await.unwrap();
    let error = client.unit("a.service").await.unwrap_err().to_string();
    assert_eq!(error, "googleapi: Error 503: this server is behind: it knows revision 5");
}
