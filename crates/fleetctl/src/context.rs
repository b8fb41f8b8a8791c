//! What every command has at hand: the client, the flags, the way to print, the machines.
use crate::cli::{Format, Globals};
use crate::ssh;
use anyhow::Result;
use fleet_api::client::{
    Client, Connector, Credentials, CredentialsError, Endpoint, EndpointError, Error, Options, Tls,
};
use fleet_api::types::{Machine, Unit};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The exit code of a command line that makes no sense. (The original's was mostly 0.)
pub(crate) const MISUSE: i32 = 2;

/// The exit code after Ctrl-C, as shells have it.
pub(crate) const INTERRUPTED: i32 = 130;

/// Machines by ID.
pub(crate) type Machines = BTreeMap<String, Machine>;

/// What every command has at hand.
pub(crate) struct Context {
    pub(crate) client: Arc<Client>,
    pub(crate) globals: Globals,
    machines: Mutex<Option<Arc<Machines>>>,
    /// Machines that were mentioned when they were not among those known.
    unknown: Mutex<BTreeSet<String>>,
    /// With `-o json`: what has been said so far, printed at the end.
    said: Mutex<Vec<Value>>,
}

impl Context {
    /// Makes the client. The error is the original's `Unable to initialize client: …`.
    pub(crate) fn new(globals: Globals) -> Result<Self, String> {
        match globals.driver.as_str() {
            "API" => {}
            "etcd" => {
                return Err(
                    "driver \"etcd\" is no longer there: fleetctl asks fleetd, give its --endpoint".into()
                );
            }
            other => return Err(format!("unrecognized driver {other:?}")),
        }
        let files = [&globals.ca_file, &globals.cert_file, &globals.key_file, &globals.token_file];
        for file in files.into_iter().flatten() {
            std::fs::File::open(file).map_err(|e| format!("open {}: {}", file.display(), words(&e)))?;
        }
        let endpoints: Result<Vec<Endpoint>, _> =
            globals.endpoint.split(',').map(|text| Endpoint::parse(text.trim())).collect();
        let endpoints = endpoints.map_err(|error| error.to_string())?;
        let mut options = Options {
            request_timeout: globals.request_timeout,
            connect_timeout: globals.request_timeout,
            ..Options::default()
        };
        if globals.debug {
            options.trace = Some(Arc::new(|line| eprintln!("DEBUG: {line}")));
        }
        if !globals.tunnel.is_empty() {
            // The first answer waits for ssh to log in.
            options.request_timeout += globals.ssh_timeout;
            options.at_once = ssh::AT_ONCE;
        } else if endpoints.len() > 1 {
            // One that swallows packets must not use up the patience for the others.
            options.connect_timeout /= 2;
        }
        if endpoints.iter().any(Endpoint::is_secure) {
            options.tls = Some(tls(&globals)?);
        }
        let client = client(&globals, endpoints, options)?;
        Ok(Context {
            client: Arc::new(client),
            globals,
            machines: Mutex::default(),
            unknown: Mutex::default(),
            said: Mutex::default(),
        })
    }

    /// Whether JSON is to be printed.
    pub(crate) fn json(&self) -> bool {
        self.globals.format == Format::Json
    }

    /// The machines, as they were when they were asked for; none when the server does not tell.
    pub(crate) async fn machines(&self) -> Arc<Machines> {
        let known = lock(&self.machines).clone();
        match known {
            Some(machines) => machines,
            None => self.ask_machines().await,
        }
    }

    async fn ask_machines(&self) -> Arc<Machines> {
        let machines = self.client.machines().await.unwrap_or_default();
        let machines = machines.into_iter().map(|machine| (machine.id.clone(), machine)).collect();
        let machines = Arc::new(machines);
        *lock(&self.machines) = Some(Arc::clone(&machines));
        machines
    }

    /// A machine as people read it: `14ffe4c3.../10.132.249.212`. One that is not known may have
    /// come while the command waited: the machines are asked for anew, once for each.
    pub(crate) async fn legend(&self, id: &str) -> String {
        let mut machines = self.machines().await;
        if !id.is_empty() && !machines.contains_key(id) && lock(&self.unknown).insert(id.to_owned()) {
            machines = self.ask_machines().await;
        }
        legend(id, machines.get(id).map(|it| it.primary_ip.as_str()).unwrap_or_default(), false)
    }

    /// Says on stdout how far a unit has come: `Unit hello.service loaded on 14ffe4c3.../10.0.0.1`.
    pub(crate) async fn say_unit(&self, name: &str, state: &str, machine_id: &str) -> Result<()> {
        if self.json() {
            let mut said = json!({"name": name, "currentState": state});
            if !machine_id.is_empty() {
                said["machineID"] = machine_id.into();
            }
            self.remember(said);
            return Ok(());
        }
        // Global units have no current state; the original's line then ends in a blank.
        let mut line = format!("Unit {name} {state}");
        if !machine_id.is_empty() {
            line.push_str(&format!(" on {}", self.legend(machine_id).await));
        }
        print_line(&line)
    }

    /// Says on stdout that something was set off that is not waited for.
    pub(crate) fn say_triggered(&self, name: &str, global: bool, verb: &str) -> Result<()> {
        if self.json() {
            self.remember(json!({"name": name, "triggered": verb}));
            return Ok(());
        }
        print_line(&format!("Triggered {}unit {name} {verb}", if global { "global " } else { "" }))
    }

    /// Says a line on stdout that has no place in JSON.
    pub(crate) fn say(&self, line: &str) -> Result<()> {
        if self.json() { Ok(()) } else { print_line(line) }
    }

    /// Adds to what `-o json` prints at the end.
    pub(crate) fn remember(&self, value: Value) {
        lock(&self.said).push(value);
    }

    /// Prints what was remembered, for commands that act and were asked for JSON.
    pub(crate) fn finish(&self) -> Result<()> {
        let said = std::mem::take(&mut *lock(&self.said));
        if self.json() { print_json(&Value::Array(said)) } else { Ok(()) }
    }

    /// Tells of a failed request on stderr, after the words that the original has for the
    /// situation, and gives the exit code 1.
    pub(crate) fn fail(&self, before: &str, error: &Error, after: &str) -> i32 {
        eprintln!("{before}{error}{after}");
        self.hint(error);
        1
    }

    /// As [`fail`](Self::fail), of a request for what servers before fleet 2 do not know.
    pub(crate) fn fail_at(&self, before: &str, error: &Error, what: &str) -> i32 {
        if error.is_unknown_resource() {
            eprintln!("{before}this server knows no {what}; it is older than fleet 2.");
            return 1;
        }
        self.fail(before, error, "")
    }

    /// Where nobody answered: says what to look at.
    pub(crate) fn hint(&self, error: &Error) {
        if !error.is_no_answer() {
            return;
        }
        if !self.globals.tunnel.is_empty() {
            // ssh itself has said what is wrong.
            let reason = error.reason();
            if reason.starts_with("ssh to ") && !reason.contains(" ended with ") {
                return;
            }
            eprintln!("Is fleetd running on {}, and fleetctl installed there?", self.globals.tunnel);
            return;
        }
        let mut endpoints = self.client.endpoints();
        let (Some(endpoint), None) = (endpoints.next(), endpoints.next()) else {
            eprintln!("Is fleetd running at one of the endpoints (--endpoint), and do they lead to servers?");
            return;
        };
        match endpoint {
            Endpoint::Unix { path } if error.to_string().contains("permission denied") => {
                eprintln!("Only root and the group fleet may use {}.", path.display());
            }
            Endpoint::Unix { path } => eprintln!(
                "Is fleetd running here (systemctl status fleetd)? It listens on {}; --endpoint names another place.",
                path.display()
            ),
            Endpoint::Http { secure: true, .. } => {
                eprintln!("Is fleetd running there as a server, with listen= set (port 4919)?");
            }
            Endpoint::Http { .. } | Endpoint::Other { .. } => {
                eprintln!("Is fleetd running there, and does it listen on this address (--endpoint)?");
            }
        }
    }
}

/// The client of all endpoints, each through a tunnel of its own if one is asked for.
fn client(globals: &Globals, endpoints: Vec<Endpoint>, mut options: Options) -> Result<Client, String> {
    let mut connectors = Vec::new();
    for endpoint in &endpoints {
        let tunnel: Option<Arc<dyn Connector>> = match globals.tunnel.as_str() {
            "" => None,
            _ => Some(Arc::new(ssh::Tunnel::new(globals, endpoint)?)),
        };
        connectors.push(tunnel);
    }
    let mut all = endpoints.into_iter().zip(connectors);
    let (first, connector) = all.next().ok_or_else(|| EndpointError::NoScheme.to_string())?;
    options.connector = connector;
    Ok(all.fold(Client::new(first, options), |client, (endpoint, connector)| client.or(endpoint, connector)))
}

/// The variable that may hold a user token; no flag does, since others can read command lines.
const TOKEN: &str = "FLEETCTL_TOKEN";

/// What https needs.
fn tls(globals: &Globals) -> Result<Tls, String> {
    let read = |file: &Option<PathBuf>| {
        let text = file.as_ref().map(|file| {
            std::fs::read_to_string(file).map_err(|e| format!("read {}: {}", file.display(), words(&e)))
        });
        text.transpose()
    };
    let token = match read(&globals.token_file)? {
        Some(token) => Some(token),
        None => std::env::var(TOKEN).ok().filter(|token| !token.is_empty()),
    };
    let (ca, certificate, key) =
        (read(&globals.ca_file)?, read(&globals.cert_file)?, read(&globals.key_file)?);
    let certificate = match (&certificate, &key) {
        (Some(certificate), Some(key)) => Some((certificate.as_str(), key.as_str())),
        (None, None) => None,
        _ => return Err("--cert-file and --key-file belong together".to_owned()),
    };
    let credentials = Credentials { ca: ca.as_deref(), token: token.as_deref(), certificate };
    Tls::new(credentials).map_err(|error| match error {
        CredentialsError::Nobody => format!("{error} (--token-file, {TOKEN}, or --ca-file)"),
        other => other.to_string(),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine as people read it: `14ffe4c3.../10.132.249.212`; with its whole ID if `full`.
pub(crate) fn legend(id: &str, ip: &str, full: bool) -> String {
    let shown = if full { id.to_owned() } else { format!("{}...", id.chars().take(8).collect::<String>()) };
    if ip.is_empty() { shown } else { format!("{shown}/{ip}") }
}

/// Whether a unit is to run on every machine that fits.
pub(crate) fn is_global(unit: &Unit) -> bool {
    let Ok(name) = fleet_unit::UnitName::parse(&unit.name) else { return false };
    let Ok(file) = fleet_api::client::file_of_options(&unit.options) else { return false };
    fleet_unit::Requirements::of(&name, &file).is_ok_and(|requirements| requirements.global)
}

/// An error of the system in the form of the original: `no such file or directory`.
pub(crate) fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// Prints a line on stdout. Unlike `println!` it does not panic when nobody reads.
pub(crate) fn print_line(line: &str) -> Result<()> {
    print(format!("{line}\n").as_bytes())
}

/// Prints on stdout at once.
pub(crate) fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

/// Prints JSON on stdout.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print_line(&serde_json::to_string_pretty(value)?)
}

/// Where the command is used wrongly: says so and gives the exit code for it.
pub(crate) fn misused(text: &str) -> Result<i32> {
    eprintln!("{text}");
    Ok(MISUSE)
}

/// The names that arguments stand for, each once, in order.
pub(crate) fn names(arguments: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for argument in arguments {
        let name = fleet_unit::name::from_argument(argument);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
