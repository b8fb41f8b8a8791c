//! The commands and flags of fleetctl: the one definition that parsing, help, completion and man
//! pages are made of.
//!
//! Old ways of writing flags are brought into this form first, by [`crate::argv`].
use crate::completion;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Heading of the options that every command takes.
const GLOBAL: &str = "Global options";
const UNITS: &str = "Names of units, or paths of unit files; .service is added where no type stands";
const COPIES: &str = "Names of units; web.service@4a1e: the copy on the machine whose ID begins with 4a1e";

/// Steers the systemd units of a cluster from one command line
#[derive(Debug, Parser)]
#[command(
    name = "fleetctl",
    version,
    disable_help_subcommand = true,
    disable_help_flag = true,
    disable_version_flag = true,
    infer_subcommands = false,
    args_override_self = true,
    subcommand_required = true,
    max_term_width = 100,
    after_help = "Commands may be shortened as long as they are unambiguous. Global options can be set in the \
                  environment: FLEETCTL_ENDPOINT for --endpoint, and so on."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) globals: Globals,
}

/// What a list or answer is printed as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Tables and sentences
    #[default]
    Text,
    /// JSON, with the keys of the HTTP API
    Json,
}

/// Flags that go with every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = GLOBAL)]
pub(crate) struct Globals {
    /// Where fleetd answers: unix:///PATH, https://HOST:PORT or http://HOST:PORT; several, separated by commas, are
    /// tried in order
    #[arg(long, global = true, value_name = "URL", default_value = "unix:///var/run/fleet.sock")]
    pub(crate) endpoint: String,
    /// Reach the endpoint through ssh to this host
    #[arg(long, global = true, value_name = "HOST[:PORT]", default_value = "", hide_default_value = true)]
    pub(crate) tunnel: String,
    /// How long one request may take, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value = "3", value_parser = seconds, hide_short_help = true)]
    pub(crate) request_timeout: Duration,
    /// What to print
    #[arg(
        short = 'o',
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "text",
        hide_short_help = true
    )]
    pub(crate) format: Format,
    /// User to log in as with ssh [default: the one that ssh's configuration names, else core]
    #[arg(long, global = true, value_name = "USER", hide_short_help = true)]
    pub(crate) ssh_username: Option<String>,
    /// How long an ssh connection may take to come about, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds, hide_short_help = true)]
    pub(crate) ssh_timeout: Duration,
    /// Whether ssh checks the keys of hosts
    #[arg(long, global = true, value_name = "BOOL", default_value = "true", value_parser = boolean,
          num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set,
          hide_short_help = true)]
    pub(crate) strict_host_key_checking: bool,
    /// Where ssh keeps the keys of hosts
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_KNOWN_HOSTS, hide_short_help = true)]
    pub(crate) known_hosts_file: String,
    /// Authority that has signed the server's certificate, for https; a user token names its own
    #[arg(long, global = true, value_name = "FILE", alias = "etcd-cafile", hide_short_help = true)]
    pub(crate) ca_file: Option<PathBuf>,
    /// User's certificate, for https (user create --cert makes one)
    #[arg(long, global = true, value_name = "FILE", alias = "etcd-certfile", hide_short_help = true)]
    pub(crate) cert_file: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, global = true, value_name = "FILE", alias = "etcd-keyfile", hide_short_help = true)]
    pub(crate) key_file: Option<PathBuf>,
    /// File with a user token, for https (user create prints one); FLEETCTL_TOKEN can hold the token itself
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub(crate) token_file: Option<PathBuf>,
    /// Say on stderr what is asked of the server
    #[arg(long, global = true, hide_short_help = true)]
    pub(crate) debug: bool,
    /// Print help
    #[arg(short = 'h', long, global = true)]
    pub(crate) help: bool,
    /// Print the version
    #[arg(short = 'v', long, global = true, hide_short_help = true)]
    pub(crate) version: bool,
    /// The original's way to reach the cluster; only API is left
    #[arg(long, global = true, default_value = "API", hide = true)]
    pub(crate) driver: String,
    #[arg(long, global = true, default_value = "/_coreos.com/fleet/", hide = true)]
    etcd_key_prefix: String,
    #[arg(long, global = true, hide = true)]
    experimental_api: bool,
}

/// The default of `--known-hosts-file`.
pub(crate) const DEFAULT_KNOWN_HOSTS: &str = "~/.fleetctl/known_hosts";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the machines of the cluster
    ListMachines(ListMachines),
    /// Hand unit files over to the cluster, without placing or starting them
    Submit(Submit),
    /// List the units the cluster knows: what is wanted of them, how far they are, and where
    ListUnitFiles(ListUnitFiles),
    /// Print the file of a unit, as it was submitted
    Cat(OneUnit),
    /// Place units on machines, so that systemd there knows them, without starting them
    #[command(
        long_about = "Place units on machines, so that systemd there knows them, without starting them.\n\n\
        Units that the cluster does not know are submitted first, from the files given or, for instances of a \
        template, from the template. A unit that is started is stopped and stays placed."
    )]
    Load(Bring),
    /// List what systemd says of the units, on every machine
    ListUnits(ListUnits),
    /// Start units, submitting and placing them first where needed
    #[command(long_about = "Start units, submitting and placing them first where needed.\n\n\
        Waits until systemd has started each of them, and says so. If one fails to start, or no machine can take \
        it, says why and exits with 1. Global units are not waited for.")]
    Start(Bring),
    /// Stop units and start them again, one after the other
    Restart(Restart),
    /// Show what systemctl status says of units, on their machines
    #[command(long_about = "Show what systemctl status says of units, on their machines.\n\n\
        Global units are shown on every machine that has them, unless one is chosen. Exits as the first systemctl \
        that did not exit with 0.")]
    Status(Status),
    /// Show the last lines that units have logged
    #[command(long_about = "Show the last lines that units have logged.\n\n\
        Those of several units, or of a Global unit on several machines, are shown as one, by time, with the \
        machine and the unit in front of each line; times are those of this machine's time zone.")]
    Journal(Journal),
    /// Log in to a machine, or to the machine a unit is on, or run a command there
    #[command(override_usage = "fleetctl ssh [OPTIONS] {MACHINE|UNIT} [COMMAND]...\n       \
                                fleetctl ssh [OPTIONS] {--machine MACHINE|--unit UNIT} [COMMAND]...")]
    Ssh(Ssh),
    /// Stop units; they stay placed and can be started again
    Stop(Take),
    /// Take units off their machines, stopping them; the cluster still knows them
    Unload(Take),
    /// Stop units, take them off their machines, and forget them
    Destroy(Take),
    /// Say why units are not what they should be
    Explain(Explain),
    /// Make, list and revoke the tokens with which machines join the cluster
    #[command(subcommand)]
    JoinToken(JoinToken),
    /// List machines, edit their metadata, drain them, remove them from the cluster
    #[command(subcommand)]
    Machine(Machine),
    /// List the servers of the cluster, which of them leads, and how their registry is
    Servers(Servers),
    /// Export and import the registry, and accept one in etcd that was exchanged
    #[command(subcommand)]
    Registry(Registry),
    /// Make, list, change and remove the users who may use the API over https
    #[command(subcommand)]
    User(User),
    /// Deprecated: signed units are no longer supported
    #[command(hide = true)]
    Verify(Ignored),
    /// Print the version
    Version(Ignored),
    /// Print help, of a command or of all
    Help {
        /// The command
        command: Option<String>,
    },
    /// Connect stdin and stdout with a unix socket (--tunnel uses this on the other end)
    #[command(hide = true)]
    FdForward {
        /// The socket
        #[arg(value_name = "SOCKET")]
        socket: Vec<String>,
    },
    /// Print the script that completes fleetctl commands in a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        directory: PathBuf,
    },
}

/// Commands that the original does not have. Its own keep the short forms they have always had.
pub(crate) const ADDED: [&str; 8] =
    ["completion", "explain", "join-token", "machine", "man", "registry", "servers", "user"];

#[derive(Args, Debug)]
pub(crate) struct Servers {
    /// Do not print the line with the names of the columns
    #[arg(long)]
    pub(crate) no_legend: bool,
    /// Do not shorten IDs of machines
    #[arg(short = 'l', long)]
    pub(crate) full: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Registry {
    /// Take the registry in etcd as it is, after it was emptied, exchanged, or put back from a backup
    #[command(
        long_about = "Take the registry in etcd as it is, after it was emptied, exchanged, or put back from a backup.\n\n\
        Servers notice that, and change nothing until an operator has looked. From then on what the registry has is what is wanted: \
        units that it does not know are stopped."
    )]
    Accept(AcceptRegistry),
    /// Write all that lasts in the registry to a file: a backup
    #[command(
        long_about = "Write all that lasts in the registry to a file: a backup, and the way from one registry to another.\n\n\
        Units, desired states and places, what was said of machines, members, users, join tokens, and the cluster's CA with its key: \
        whoever reads the file has the cluster. Only its owner can read it. Takes the role admin."
    )]
    Export(ExportRegistry),
    /// Make an empty registry what a file says that was exported
    #[command(long_about = "Make the registry what a file says that was exported.\n\n\
        The registry has to be empty, or what the file says already. An import that was cut off is completed by repeating it; until \
        then nothing is decided, and no machine is told anything. Then all servers begin anew. Takes the role admin. On a server that \
        is stopped: fleetd registry import.")]
    Import(ImportRegistry),
}

#[derive(Args, Debug)]
pub(crate) struct ExportRegistry {
    /// The file, or - for standard output
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct ImportRegistry {
    /// The file, or - for standard input
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Take away what the registry has and the file does not say: units that it does not know are stopped
    #[arg(long)]
    pub(crate) replace: bool,
}

#[derive(Args, Debug)]
pub(crate) struct AcceptRegistry {
    /// Do it; without this only what it means is said
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JoinToken {
    /// Make a token and print it
    #[command(long_about = "Make a token and print it.\n\n\
        On the machine that is to join, fleetd is given the token with the address of a server (join and \
        join_token in fleet.conf). It needs the token only once. The token is a secret, and shown only now.")]
    Create(CreateJoinToken),
    /// List the tokens that there are, without their secrets
    List(ListJoinTokens),
    /// Revoke tokens; machines that joined with them stay
    Revoke(RevokeJoinTokens),
}

#[derive(Args, Debug)]
pub(crate) struct CreateJoinToken {
    /// How long it is good for, such as 30m or 24h [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = ttl)]
    pub(crate) ttl: Option<String>,
    /// How many machines may join with it [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) uses: Option<u32>,
}

#[derive(Args, Debug)]
pub(crate) struct ListJoinTokens {
    /// Do not print the line with the names of the columns
    #[arg(long)]
    pub(crate) no_legend: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RevokeJoinTokens {
    /// IDs of tokens, as join-token list shows them
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Machine {
    /// List the machines that joined, and those that are there
    #[command(long_about = "List the machines that joined, and those that are there.\n\n\
        JOINED is when a machine joined with a token; servers need none. STATE is up; lost: its connection is \
        gone, and its units are placed elsewhere when agent_ttl is over; gone: that has happened; joining: it \
        is connected, and not yet taken into account; or removed: it has not yet stopped its units. Beside up \
        stands cordoned, if it takes no new units, or draining, if its units are to move away.")]
    List(ListMembers),
    /// Remove machines from the cluster: their credentials are revoked, their units go elsewhere
    #[command(
        long_about = "Remove machines from the cluster: their credentials are revoked, their units go elsewhere.\n\n\
        A removed machine stops its units, then they are placed elsewhere; its metadata edits are forgotten. If it \
        is out of reach its units are placed elsewhere, and it stops them when it comes back. To join again it needs \
        a new token."
    )]
    Remove(RemoveMachines),
    /// Let machines take no new units; what is there stays
    Cordon(MarkMachines),
    /// Let machines take new units again; this ends a drain, too
    Uncordon(MarkMachines),
    /// Move the units of a machine to others
    #[command(long_about = "Move the units of a machine to others.\n\n\
        A few at a time, units are stopped there and then started elsewhere. Says of each where it went. Units that \
        fit nowhere else stay and run on: they are listed with the reasons, and the command exits with 1. Global \
        units stay. The machine takes no new units until it is uncordoned, also when the command ends before.")]
    Drain(DrainMachine),
    /// Edit the metadata of a machine; units whose requirements it breaks go elsewhere
    #[command(override_usage = "fleetctl machine metadata [OPTIONS] MACHINE {KEY=VALUE|KEY-}...")]
    Metadata(EditMetadata),
}

#[derive(Args, Debug)]
pub(crate) struct ListMembers {
    #[command(flatten)]
    pub(crate) table: Table,
}

#[derive(Args, Debug)]
pub(crate) struct MarkMachines {
    /// IDs of machines, or what they begin with
    #[arg(value_name = "MACHINE", add = completion::machines())]
    pub(crate) machines: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct DrainMachine {
    /// Stop waiting after this long, such as 90s or 5m, list what is left, and exit with 1
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// Do not wait
    #[arg(long)]
    pub(crate) no_block: bool,
    /// The machine, by its ID or what that begins with
    #[arg(value_name = "MACHINE", add = completion::machines(), required = true)]
    pub(crate) machine: String,
}

#[derive(Args, Debug)]
pub(crate) struct RemoveMachines {
    /// IDs of machines, or what they begin with
    #[arg(value_name = "MACHINE", add = completion::machines())]
    pub(crate) machines: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct EditMetadata {
    /// The machine, by the beginning of its ID; then KEY=VALUE to set, KEY- to remove
    #[arg(value_name = "ARGUMENT")]
    pub(crate) words: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Make a user and print the user's token
    #[command(long_about = "Make a user and print the user's token.\n\n\
        With the token (--token-file, FLEETCTL_TOKEN) fleetctl reaches a server's listen= port over https from anywhere. The token is a \
        secret, and shown only now. It names the cluster, so that nothing else is needed. With --cert a certificate is \
        made, too: its key is made here and stays here.\n\n\
        A viewer reads everything but secrets; an operator also changes units and what is said of machines; an admin also \
        says who belongs to the cluster: machines, join tokens, users.")]
    Create(CreateUser),
    /// List the users that there are, without their tokens
    List(ListUsers),
    /// Give a user another role, from the next request on
    Role {
        /// The user
        #[arg(value_name = "NAME")]
        name: String,
        /// What the user may do from now on
        #[arg(value_name = "ROLE")]
        role: Role,
    },
    /// Remove users: their tokens and certificates are worth nothing at once
    Remove {
        /// The users
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
}

/// What a user may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Reads everything but secrets
    Viewer,
    /// Also changes units and what is said of machines
    Operator,
    /// Also says who belongs to the cluster
    Admin,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        })
    }
}

#[derive(Args, Debug)]
pub(crate) struct CreateUser {
    /// The user: 1 to 64 letters, digits, '.', '_' and '-'
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// What the user may do
    #[arg(long, value_name = "ROLE")]
    pub(crate) role: Role,
    /// How long the user has access, such as 24h [default: 8760h, a year]
    #[arg(long, value_name = "DURATION", value_parser = ttl)]
    pub(crate) ttl: Option<String>,
    /// Make a certificate, too, and write key.pem, cert.pem and ca.pem into this directory
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) cert: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct ListUsers {
    /// Do not print the line with the names of the columns
    #[arg(long)]
    pub(crate) no_legend: bool,
}

/// Arguments that the original ignores, and so do we.
#[derive(Args, Debug)]
pub(crate) struct Ignored {
    #[arg(hide = true)]
    ignored: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Table {
    /// Do not shorten IDs and hashes
    #[arg(short = 'l', long)]
    pub(crate) full: bool,
    /// Do not print the line with the names of the columns
    #[arg(long)]
    pub(crate) no_legend: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ListMachines {
    /// Columns: machine, ip, metadata, state
    #[arg(long, value_name = "COLUMNS", default_value = "machine,ip,metadata")]
    pub(crate) fields: String,
    #[command(flatten)]
    pub(crate) table: Table,
    #[command(flatten)]
    ignored: Ignored,
}

#[derive(Args, Debug)]
pub(crate) struct ListUnits {
    /// Columns: unit, machine, load, active, sub, hash
    #[arg(long, value_name = "COLUMNS", default_value = "unit,machine,active,sub")]
    pub(crate) fields: String,
    #[command(flatten)]
    pub(crate) table: Table,
    #[command(flatten)]
    ignored: Ignored,
}

#[derive(Args, Debug)]
pub(crate) struct ListUnitFiles {
    /// Columns: unit, hash, dstate, state, target, tmachine, global, desc, reason [default:
    /// unit,hash,dstate,state,tmachine]
    #[arg(long, value_name = "COLUMNS")]
    pub(crate) fields: Option<String>,
    #[command(flatten)]
    pub(crate) table: Table,
    #[command(flatten)]
    ignored: Ignored,
}

#[derive(Args, Debug)]
pub(crate) struct OneUnit {
    /// The unit
    #[arg(value_name = "UNIT", add = completion::units())]
    pub(crate) unit: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Replace {
    /// Replace units that the cluster knows under these names with another file
    #[arg(long)]
    pub(crate) replace: bool,
    #[arg(long, hide = true)]
    sign: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Submit {
    #[command(flatten)]
    pub(crate) replace: Replace,
    #[arg(value_name = "UNIT", help = UNITS, add = completion::units_and_files())]
    pub(crate) units: Vec<String>,
}

/// How long to wait.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Give up after N tries of 2 seconds each; 0: no limit
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        allow_negative_numbers = true,
        hide_default_value = true
    )]
    pub(crate) block_attempts: i64,
    /// Give up after this long, such as 90s or 5m; 0: never [default: 30s for a unit that no
    /// machine can take, no limit for one that systemd is working on]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct Bring {
    #[command(flatten)]
    pub(crate) replace: Replace,
    /// Do not wait
    #[arg(long)]
    pub(crate) no_block: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[arg(value_name = "UNIT", help = UNITS, add = completion::units_and_files())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Take {
    /// Do not wait
    #[arg(long)]
    pub(crate) no_block: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[arg(value_name = "UNIT", help = "Names of units; .service is added where no type stands", add = completion::units())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Restart {
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[arg(value_name = "UNIT", help = UNITS, add = completion::units())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Status {
    /// The original's way to the machine; the answer comes through the API, unless the server is the original's
    #[arg(long, value_name = "PORT", hide = true)]
    pub(crate) ssh_port: Option<u16>,
    /// The machine whose copy to show, by the beginning of its ID
    #[arg(long, value_name = "MACHINE", default_value = "", hide_default_value = true)]
    pub(crate) machine: String,
    #[arg(value_name = "UNIT[@MACHINE]", help = COPIES, add = completion::units())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Explain {
    #[arg(value_name = "UNIT", help = "Names of units; .service is added where no type stands", add = completion::units())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Journal {
    /// How many of the last lines to show
    #[arg(short = 'n', long, value_name = "N", default_value = "10", allow_negative_numbers = true)]
    pub(crate) lines: i64,
    /// Go on with new lines as they come
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// Form of the lines, as for journalctl: short, cat, json, …
    #[arg(long, value_name = "FORM", default_value = "short")]
    pub(crate) output: String,
    /// The original's way to read the journal as root; fleetd does that anyway, unless it is the original's
    #[arg(long, hide = true)]
    pub(crate) sudo: bool,
    #[arg(long, value_name = "PORT", hide = true)]
    pub(crate) ssh_port: Option<u16>,
    /// The machine whose copy to show, by the beginning of its ID
    #[arg(long, value_name = "MACHINE", default_value = "", hide_default_value = true)]
    pub(crate) machine: String,
    #[arg(value_name = "UNIT[@MACHINE]", help = COPIES, add = completion::units())]
    pub(crate) units: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Ssh {
    /// The machine, by the beginning of its ID
    #[arg(short = 'm', long, default_value = "", hide_default_value = true)]
    pub(crate) machine: String,
    /// The unit whose machine it is to be
    #[arg(short = 'u', long, default_value = "", hide_default_value = true)]
    pub(crate) unit: String,
    /// Let the machine use the ssh agent of this one
    #[arg(short = 'A', long)]
    pub(crate) forward_agent: bool,
    /// TCP port of ssh [default: the one that ssh's configuration names, else 22]
    #[arg(long, value_name = "PORT")]
    pub(crate) ssh_port: Option<u16>,
    /// The machine or unit, then a command and its arguments
    #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) words: Vec<String>,
}

/// The definition, for help, completion and man pages.
pub(crate) fn definition() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}

fn boolean(text: &str) -> Result<bool, String> {
    crate::values::boolean(text).ok_or_else(|| crate::values::no_boolean(text))
}

fn duration(text: &str) -> Result<Duration, String> {
    crate::values::duration(text).ok_or_else(|| "a duration is expected, such as 90s, 1m30s or 0".to_owned())
}

/// A duration above 0, left as it is written: the server reads the same form.
fn ttl(text: &str) -> Result<String, String> {
    match fleet_api::duration::parse(text) {
        Ok(Duration::ZERO) => Err("a duration above 0 is expected".to_owned()),
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}: a duration is expected, such as 24h or 1h30m")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = crate::values::decimal(text)?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|d| !d.is_zero())
        .ok_or_else(|| "a number of seconds above 0 is expected".to_owned())
}

#[cfg(test)]
mod tests;
