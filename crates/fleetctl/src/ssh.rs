//! ssh, through the user's own OpenSSH with its configuration and agent: logging in to machines
//! (golden/12-ssh.txt), and the tunnel that `--tunnel` asks for.
use crate::cli::{DEFAULT_KNOWN_HOSTS, Globals, Ssh};
use crate::context::{Context, is_global, words};
use anyhow::Result;
use fleet_api::client::{ByteStream, Connecting, Connector, Endpoint, Error};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// ssh's own exit code for its own failures.
const SSH_FAILED: i32 = 255;

/// Where a search led.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// At this address; empty when it is not known.
    At(String),
    /// Nowhere: why.
    Nowhere(String),
    /// The server could not be asked.
    Unasked(Error),
}

pub(crate) async fn run(context: &Context, args: Ssh) -> Result<i32> {
    if !args.unit.is_empty() && !args.machine.is_empty() {
        eprintln!("Both machine and unit flags provided, please specify only one.");
        return Ok(1);
    }
    let mut words = args.words.as_slice();
    let place = if !args.machine.is_empty() {
        by_machine(context, &args.machine).await
    } else if !args.unit.is_empty() {
        by_unit(context, &args.unit).await
    } else if let [target, rest @ ..] = words {
        words = rest;
        by_either(context, target).await
    } else {
        Place::Nowhere("one machine or unit must be provided".to_owned())
    };
    let address = match place {
        Place::At(address) if address.is_empty() => {
            eprintln!("Could not determine address of machine.");
            return Ok(1);
        }
        Place::At(address) => address,
        Place::Nowhere(why) => {
            eprintln!("Unable to proceed: {why}");
            return Ok(1);
        }
        Place::Unasked(error) => return Ok(context.fail("Unable to proceed: ", &error, "")),
    };
    if let [first, rest @ ..] = words
        && first == "--"
    {
        words = rest;
    }
    login(context, &args, &address, words).await
}

/// Runs ssh in the foreground and passes its exit code on.
async fn login(context: &Context, args: &Ssh, address: &str, words: &[String]) -> Result<i32> {
    let globals = &context.globals;
    let mut ssh = command(globals);
    ssh.arg("-p").arg(args.ssh_port.to_string());
    if args.forward_agent {
        ssh.arg("-A");
    }
    if !globals.tunnel.is_empty() {
        ssh.arg("-o").arg(format!("ProxyCommand={}", proxy_command(globals)));
    }
    ssh.arg("--").arg(address).args(words);
    // Ctrl-C is for what runs on the machine; ssh deals with it.
    let _interrupts = signal(SignalKind::interrupt())?;
    let status = match ssh.status().await {
        Ok(status) => status,
        Err(error) => {
            eprintln!("Failed building SSH client: {}", not_started(&error));
            return Ok(1);
        }
    };
    let code = exit_code(status);
    if code == SSH_FAILED {
        let user = &globals.ssh_username;
        eprintln!(
            "ssh ended with 255: it could not log in as {user}@{address} (--ssh-username, --ssh-port), or what ran \
             there ended so."
        );
    }
    Ok(code)
}

async fn by_machine(context: &Context, prefix: &str) -> Place {
    let machines = match context.client.machines().await {
        Ok(machines) => machines,
        Err(error) => return Place::Unasked(error),
    };
    let mut fitting = machines.iter().filter(|machine| machine.id.starts_with(prefix));
    match (fitting.next(), fitting.next()) {
        (Some(machine), None) => Place::At(machine.primary_ip.clone()),
        (None, _) => Place::Nowhere("machine does not exist".to_owned()),
        (Some(_), Some(_)) => Place::Nowhere("found more than one machine".to_owned()),
    }
}

async fn by_unit(context: &Context, argument: &str) -> Place {
    let name = fleet_unit::name::from_argument(argument);
    match context.client.unit(&name).await {
        Err(error) => Place::Unasked(error),
        Ok(None) => Place::Nowhere("unit does not exist".to_owned()),
        Ok(Some(unit)) if is_global(&unit) => Place::Nowhere("global units unsupported".to_owned()),
        Ok(Some(unit)) => {
            let machines = context.machines().await;
            let machine = machines.get(&unit.machine_id);
            Place::At(machine.map(|machine| machine.primary_ip.clone()).unwrap_or_default())
        }
    }
}

async fn by_either(context: &Context, lookup: &str) -> Place {
    if lookup.is_empty() {
        return Place::Nowhere("could not find matching unit or machine".to_owned());
    }
    choose(lookup, by_machine(context, lookup).await, by_unit(context, lookup).await)
}

/// What a word means that may be the beginning of a machine's ID or the name of a unit.
fn choose(lookup: &str, machine: Place, unit: Place) -> Place {
    let known = |place: &Place| matches!(place, Place::At(address) if !address.is_empty());
    match (known(&machine), known(&unit)) {
        (true, true) => Place::Nowhere(format!(
            "ambiguous argument, both machine and unit found for `{lookup}`.\n\
             Please use flag `-m` or `-u` to refine the search"
        )),
        (true, false) => machine,
        (false, true) => unit,
        (false, false) => {
            if let Place::Unasked(error) = machine {
                eprintln!("{error}");
            }
            Place::Nowhere("could not find matching unit or machine".to_owned())
        }
    }
}

/// ssh with what all uses of it have in common.
fn command(globals: &Globals) -> Command {
    let mut ssh = Command::new("ssh");
    ssh.args(options(globals));
    ssh
}

/// The options that follow from the flags. What no flag is given for is left to the user's own
/// ssh configuration.
fn options(globals: &Globals) -> Vec<String> {
    let seconds = globals.ssh_timeout.as_secs_f64().ceil().max(1.0);
    let mut options = vec![
        "-l".to_owned(),
        globals.ssh_username.clone(),
        "-o".to_owned(),
        format!("ConnectTimeout={seconds}"),
        "-o".to_owned(),
    ];
    if !globals.strict_host_key_checking {
        options.push("StrictHostKeyChecking=no".to_owned());
        options.extend(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"].map(str::to_owned));
    } else if globals.known_hosts_file == DEFAULT_KNOWN_HOSTS {
        prepare_known_hosts();
        options.push(format!("UserKnownHostsFile={DEFAULT_KNOWN_HOSTS} ~/.ssh/known_hosts"));
    } else {
        options.push(format!("UserKnownHostsFile=\"{}\"", globals.known_hosts_file));
    }
    options
}

/// ssh writes new keys into the first file, but makes no directory for it.
fn prepare_known_hosts() {
    use std::os::unix::fs::DirBuilderExt;
    let Some(home) = std::env::home_dir() else { return };
    // Where it cannot be made, ssh says so when it has a key to write.
    let _ = std::fs::DirBuilder::new().mode(0o700).create(home.join(".fleetctl"));
}

/// How ssh reaches a machine through the host of `--tunnel`.
fn proxy_command(globals: &Globals) -> String {
    let (host, port) = host_and_port(&globals.tunnel);
    let mut words = vec!["ssh".to_owned()];
    words.extend(options(globals).iter().map(|option| quoted(option)));
    words.extend(["-p".to_owned(), port.to_owned(), "-W".to_owned(), "%h:%p".to_owned(), quoted(host)]);
    words.join(" ")
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@~%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address.
fn host_and_port(text: &str) -> (&str, &str) {
    if let Some((host, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, rest.strip_prefix(':').unwrap_or("22"));
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, port),
        _ => (text, "22"),
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn not_started(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "ssh is not installed here (package openssh-client)".to_owned(),
        _ => format!("ssh cannot be started: {}", words(error)),
    }
}

/// Connections to the server through ssh: `fleetctl fd-forward` on the other end for a unix
/// socket, a forwarded port for TCP.
pub(crate) struct Tunnel {
    arguments: Vec<String>,
}

impl Tunnel {
    pub(crate) fn new(globals: &Globals, endpoint: &Endpoint) -> Result<Self, String> {
        let (host, port) = host_and_port(&globals.tunnel);
        let mut arguments = options(globals);
        arguments.extend(["-p", port, "-T"].map(str::to_owned));
        match endpoint {
            Endpoint::Unix { path } => {
                let path = quoted(&path.to_string_lossy());
                arguments.extend(["--".to_owned(), host.to_owned(), format!("fleetctl fd-forward {path}")]);
            }
            Endpoint::Http { host: target, port, .. } => {
                let target = if target.contains(':') { format!("[{target}]") } else { target.clone() };
                arguments.extend([
                    "-W".to_owned(),
                    format!("{target}:{port}"),
                    "--".to_owned(),
                    host.to_owned(),
                ]);
            }
            Endpoint::Other { scheme, .. } => return Err(format!("unsupported protocol scheme {scheme:?}")),
        }
        Ok(Tunnel { arguments })
    }
}

impl Connector for Tunnel {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(async {
            let mut child = Command::new("ssh")
                .args(&self.arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(|error| format!("failed initializing SSH client: {}", not_started(&error)))?;
            let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
                return Err("failed initializing SSH client: ssh has no stdin".to_owned());
            };
            let stream = tokio::io::join(stdout, stdin);
            Ok(Box::new(Tunnelled { stream, _ssh: child }) as Box<dyn ByteStream>)
        })
    }
}

/// The stream of a running ssh, which ends with it.
struct Tunnelled {
    stream: tokio::io::Join<tokio::process::ChildStdout, tokio::process::ChildStdin>,
    _ssh: Child,
}

mod io {
    //! Reading and writing goes to the stream.
    use super::Tunnelled;
    use std::io::Result;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    impl AsyncRead for Tunnelled {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<Result<()>> {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Tunnelled {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
            Pin::new(&mut self.stream).poll_write(cx, buf)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
            Pin::new(&mut self.stream).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn globals(line: &[&str]) -> Globals {
        use clap::Parser;
        crate::cli::Cli::parse_from([&["fleetctl", "version"], line].concat()).globals
    }

    fn at(address: &str) -> Place {
        Place::At(address.to_owned())
    }

    fn nowhere() -> Place {
        Place::Nowhere("does not exist".to_owned())
    }

    /// golden/12-ssh.txt
    #[test]
    fn machine_or_unit() {
        assert_eq!(choose("c93", at("1"), nowhere()), at("1"));
        assert_eq!(choose("c93", nowhere(), at("2")), at("2"));
        let unclear = "could not find matching unit or machine";
        assert_eq!(choose("c93", nowhere(), nowhere()), Place::Nowhere(unclear.to_owned()));
        // A unit that is on no machine.
        assert_eq!(choose("c93", nowhere(), at("")), Place::Nowhere(unclear.to_owned()));
        let Place::Nowhere(text) = choose("c93", at("1"), at("2")) else { panic!("ambiguous") };
        assert!(text.starts_with("ambiguous argument, both machine and unit found for `c93`.\nPlease use"));
    }

    #[test]
    fn options_follow_the_flags() {
        let options = |line: &[&str]| super::options(&globals(line)).join(" ");
        assert_eq!(
            options(&["--known-hosts-file=/k h", "--ssh-timeout=0.2", "--ssh-username=elroy"]),
            "-l elroy -o ConnectTimeout=1 -o UserKnownHostsFile=\"/k h\""
        );
        assert_eq!(
            options(&["--strict-host-key-checking=false"]),
            "-l core -o ConnectTimeout=10 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        );
    }

    #[test]
    fn tunnels() {
        let arguments = |tunnel: &str, endpoint: &str| {
            let globals = globals(&["--strict-host-key-checking=false", "--tunnel", tunnel]);
            let tunnel = Tunnel::new(&globals, &Endpoint::parse(endpoint).unwrap()).unwrap();
            tunnel.arguments[9..].join(" ")
        };
        assert_eq!(
            arguments("10.0.0.1", "unix:///run/fleet.sock"),
            "LogLevel=ERROR -p 22 -T -- 10.0.0.1 fleetctl fd-forward /run/fleet.sock"
        );
        assert_eq!(
            arguments("[fd00::1]:2222", "http://127.0.0.1:49153"),
            "LogLevel=ERROR -p 2222 -T -W 127.0.0.1:49153 -- fd00::1"
        );
        assert_eq!(host_and_port("fd00::1"), ("fd00::1", "22"));
        let globals = globals(&["--strict-host-key-checking=false", "--tunnel=bastion:7"]);
        let proxy = proxy_command(&globals);
        assert!(proxy.starts_with("ssh -l core ") && proxy.ends_with(" -p 7 -W %h:%p bastion"), "{proxy}");
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quoted("/run/fleet.sock"), "/run/fleet.sock");
        assert_eq!(quoted("a b'c"), r"'a b'\''c'");
        assert_eq!(quoted("$(x)"), "'$(x)'");
    }

    #[test]
    fn a_signal_is_an_exit_code() {
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_code(ExitStatus::from_raw(42 << 8)), 42);
    }
}
