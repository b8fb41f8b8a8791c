//! The options ssh is called with. What a flag says goes before the user's ssh configuration; where no flag is given the
//! configuration decides, and only where it has nothing to say, the original's defaults do: user `core`, and keys of hosts
//! in `~/.fleetctl/known_hosts` besides those that ssh knows anyway.
use crate::cli::{DEFAULT_KNOWN_HOSTS, Globals};
use std::process::Stdio;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

/// The user where nothing else is said, as in the original.
const DEFAULT_USER: &str = "core";

/// How ssh reads a configuration of which this is the last part, so that what stands before it counts first.
const WITH_DEFAULTS: &str = "Include ~/.ssh/config\nInclude /etc/ssh/ssh_config\nHost *\nUser core\n";

/// What the ssh configuration says of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Configured {
    user: String,
    known_hosts: String,
}

impl Default for Configured {
    fn default() -> Self {
        Configured { user: DEFAULT_USER.to_owned(), known_hosts: "~/.ssh/known_hosts".to_owned() }
    }
}

/// Asks ssh what the configuration says of a host. Where it cannot tell, the real call will say what is wrong.
pub(super) async fn configured(globals: &Globals, host: &str, port: Option<&str>) -> Configured {
    let mut ssh = Command::new("ssh");
    ssh.args(["-G", "-F", "/dev/stdin"]).args(port_options(port)).arg("--").arg(host);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let asked = async {
        let mut child = ssh.spawn().ok()?;
        child.stdin.take()?.write_all(WITH_DEFAULTS.as_bytes()).await.ok()?;
        let output = child.wait_with_output().await.ok()?;
        output.status.success().then(|| read(&String::from_utf8_lossy(&output.stdout)))
    };
    timeout(globals.ssh_timeout, asked).await.ok().flatten().unwrap_or_default()
}

/// Reads what `ssh -G` prints: names in lower case with their values, line by line.
fn read(text: &str) -> Configured {
    let value = |name: &str| {
        let mut values = text.lines().filter_map(|line| line.split_once(' ')).filter(|(key, _)| *key == name);
        values.next().map(|(_, value)| value.to_owned())
    };
    let default = Configured::default();
    Configured {
        user: value("user").unwrap_or(default.user),
        known_hosts: value("userknownhostsfile").unwrap_or(default.known_hosts),
    }
}

/// The user to log in as.
pub(super) fn user(globals: &Globals, configured: &Configured) -> String {
    globals.ssh_username.clone().unwrap_or_else(|| configured.user.clone())
}

/// The options for a host, without its port.
pub(super) fn options(globals: &Globals, configured: &Configured) -> Vec<String> {
    let seconds = globals.ssh_timeout.as_secs_f64().ceil().max(1.0);
    let mut options = vec!["-l".to_owned(), user(globals, configured)];
    let mut set = |option: String| options.extend(["-o".to_owned(), option]);
    set(format!("ConnectTimeout={seconds}"));
    if !globals.strict_host_key_checking {
        set("StrictHostKeyChecking=no".to_owned());
        set("UserKnownHostsFile=/dev/null".to_owned());
        set("LogLevel=ERROR".to_owned());
    } else if globals.known_hosts_file == DEFAULT_KNOWN_HOSTS {
        prepare_known_hosts();
        // ssh writes new keys into the first.
        set(format!("UserKnownHostsFile={DEFAULT_KNOWN_HOSTS} {}", configured.known_hosts));
    } else {
        set(format!("UserKnownHostsFile=\"{}\"", globals.known_hosts_file));
    }
    options
}

/// The option for a port, if one is given.
pub(super) fn port_options(port: Option<&str>) -> Vec<String> {
    port.map(|port| vec!["-p".to_owned(), port.to_owned()]).unwrap_or_default()
}

/// ssh makes no directory for its file.
fn prepare_known_hosts() {
    use std::os::unix::fs::DirBuilderExt;
    let Some(home) = std::env::home_dir() else { return };
    // Where it cannot be made, ssh says so when it has a key to write.
    let _ = std::fs::DirBuilder::new().mode(0o700).create(home.join(".fleetctl"));
}

/// How ssh reaches a machine through the host of `--tunnel`.
pub(super) fn proxy_command(globals: &Globals, configured: &Configured) -> String {
    let (host, port) = host_and_port(&globals.tunnel);
    let mut words = options(globals, configured);
    words.extend(port_options(port));
    // ssh puts values for what begins with a percent sign.
    let words: Vec<String> = words.iter().map(|word| quoted(&word.replace('%', "%%"))).collect();
    format!("ssh {} -W '[%h]:%p' -- {}", words.join(" "), quoted(&host.replace('%', "%%")))
}

/// A word for a shell.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address.
pub(super) fn host_and_port(text: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, rest.strip_prefix(':'));
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn globals(line: &[&str]) -> Globals {
        use clap::Parser;
        crate::cli::Cli::parse_from([&["fleetctl", "version"], line].concat()).globals
    }

    #[test]
    fn options_follow_the_flags() {
        let options = |line: &[&str]| super::options(&globals(line), &Configured::default()).join(" ");
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
    fn without_flags_the_configuration_decides() {
        let configured =
            read("host box\nuser astro\nport 22\nuserknownhostsfile /k1 /k2\nglobalknownhostsfile /k3\n");
        assert_eq!(
            options(&globals(&[]), &configured).join(" "),
            "-l astro -o ConnectTimeout=10 -o UserKnownHostsFile=~/.fleetctl/known_hosts /k1 /k2"
        );
        assert_eq!(user(&globals(&["--ssh-username=elroy"]), &configured), "elroy");
        assert_eq!(read(""), Configured::default());
    }

    #[test]
    fn a_machine_behind_the_tunnel() {
        let globals = globals(&["--strict-host-key-checking=false", "--tunnel=bastion:7"]);
        let configured = Configured { user: "a%b c".to_owned(), ..Configured::default() };
        assert_eq!(
            proxy_command(&globals, &configured),
            "ssh -l 'a%%b c' -o ConnectTimeout=10 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             -o LogLevel=ERROR -p 7 -W '[%h]:%p' -- bastion"
        );
    }

    #[test]
    fn hosts_and_ports() {
        assert_eq!(host_and_port("box"), ("box", None));
        assert_eq!(host_and_port("box:7"), ("box", Some("7")));
        assert_eq!(host_and_port("[fd00::1]:7"), ("fd00::1", Some("7")));
        assert_eq!(host_and_port("[fd00::1]"), ("fd00::1", None));
        assert_eq!(host_and_port("fd00::1"), ("fd00::1", None));
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quoted("/run/fleet.sock"), "/run/fleet.sock");
        assert_eq!(quoted("a b'c"), r"'a b'\''c'");
        assert_eq!(quoted("$(x)"), "'$(x)'");
        assert_eq!(quoted("~/x"), "'~/x'");
    }
}
