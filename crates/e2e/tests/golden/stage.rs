//! The cluster that the transcripts were recorded on, with our fleet: machines gold-1 to gold-3 with the same machine IDs
//! and metadata, the API also on TCP 49153; and a machine outside of it.
//!
//! With the embedded registry gold-1 is the server. Where the original was asked on another machine, fleetctl there is told
//! to ask gold-1, and port 49153 of the others leads to gold-1. In the classic layout each of them is a server, as it was.

use crate::transcript::{Answer, Case, Exit, Place, Step};
use anyhow::{Context, Result};
use fleet_e2e::Layout;
use fleet_testbed::{Cluster, Etcd, Host, Options, bin_dir};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

const MACHINE_IDS: [&str; 3] = [
    "4a1e0c2fb7d94e6c8f3a51d2c07e9b11",
    "4a1e77d0a52c4b1f9e8d60b3f4c1a222",
    "c93b5f08e1ad47d2b6740e9f8a2d3c33",
];
/// Where commands are typed and unit files are.
const DIRECTORY: &str = "/root/u";
const CONFIGURATION: &str = "/etc/fleet/fleet.conf";
/// Another fleetctl to type the commands with, such as the original's.
const FLEETCTL: &str = "FLEET_GOLDEN_FLEETCTL";
/// The network of the recordings.
const NETWORK: &str = "172.30.7.";
/// The port of the etcd of the recordings, and of ours.
const ETCD_PORTS: [&str; 2] = [":22379", ":2379"];
/// Of a command that has no time limit of its own.
const LIMIT: Duration = Duration::from_secs(120);

/// What every script can use: curl as it was recorded; `fresh`, after which nothing is left of units and files.
const PRELUDE: &str = "curl() { command curl -sS \"$@\"; }\n\
    fresh() { fleetctl list-unit-files --no-legend --fields=unit | xargs -r -d '\\n' fleetctl destroy -- > /dev/null && rm -rf /root/u/*; }\n";

/// How many stages there are at once: fewer than networks with addresses as short as the recorded ones, of which there are ten.
const AT_ONCE: usize = 8;

/// Room for one of the stages; it is given back when this is dropped.
struct Room;

static ROOM: (Mutex<usize>, Condvar) = (Mutex::new(AT_ONCE), Condvar::new());

impl Room {
    /// Waits for it as long as others have it.
    fn take() -> Room {
        let free = ROOM.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = ROOM.1.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Room
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        *ROOM.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        ROOM.1.notify_one();
    }
}

/// The hosts.
pub(crate) struct Stage {
    cluster: Cluster,
    /// Where the registry is, if not on gold-1.
    etcd: Option<Etcd>,
    layout: Layout,
    /// Given back last.
    _room: Room,
}

impl Stage {
    /// Boots the hosts and makes them a cluster.
    pub(crate) fn up(outside: bool) -> Result<Stage> {
        let room = Room::take();
        let mut options = Options::for_test("golden", if outside { 4 } else { 3 }).fleet(bin_dir()?);
        options.short_subnet = true;
        options.machine_ids = MACHINE_IDS.map(str::to_owned).into();
        let (layout, cluster) = (Layout::asked_for()?, Cluster::up(options)?);
        let etcd = layout.prepare(&cluster)?;
        let stage = Stage { cluster, etcd, layout, _room: room };
        for host in stage.cluster.hosts() {
            host.sh(&format!(
                "mkdir -p {DIRECTORY}; sed -i -E 's/ golden-.*-([1-4])$/& gold-\\1/' /etc/hosts"
            ))?
            .ok()?;
        }
        let first = stage.cluster.host(0);
        let metadata = ["metadata=\"region=eu,disk=ssd\"\n", "metadata=\"region=eu,disk=hdd\"\n", ""];
        for (index, (host, metadata)) in stage.cluster.hosts().iter().zip(metadata).enumerate() {
            host.write(CONFIGURATION, metadata)?;
            if index == 0 || stage.classic() {
                stage.serve(host)?;
            } else {
                stage.join(host)?;
            }
        }
        fleet_e2e::until("all machines are there", || {
            Ok(first.run(["fleetctl", "list-machines", "--no-legend"])?.stdout.lines().count() == 3)
        })?;
        if let Some(fleetctl) = std::env::var_os(FLEETCTL) {
            for host in stage.cluster.hosts() {
                host.copy_in(&fleetctl, "/usr/bin/fleetctl")?;
            }
        }
        Ok(stage)
    }

    /// In which layout it is.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether each machine is a server.
    fn classic(&self) -> bool {
        self.layout == Layout::Classic
    }

    /// Makes a host a server that answers on port 49153, too.
    fn serve(&self, host: &Host) -> Result<()> {
        let registry = match &self.etcd {
            Some(etcd) => format!(" FLEET_ETCD_SERVERS={}", etcd.endpoint(0)),
            None => String::new(),
        };
        host.write(
            "/etc/systemd/system/fleetd.service.d/stage.conf",
            format!("[Service]\nEnvironment=FLEET_LISTEN=*{registry}\n"),
        )?;
        host.write("/etc/systemd/system/fleetd.socket.d/tcp.conf", "[Socket]\nListenStream=49153\n")?;
        start(host)
    }

    /// Makes a host join gold-1, to which its port 49153 leads.
    fn join(&self, host: &Host) -> Result<()> {
        let token = self.cluster.host(0).run(["fleetctl", "join-token", "create"])?.ok()?.stdout;
        host.write("/etc/fleet/join-token", token.lines().next().unwrap_or_default())?;
        host.write(
            "/etc/systemd/system/fleetd.service.d/stage.conf",
            "[Service]\nEnvironment=FLEET_JOIN=gold-1 FLEET_JOIN_TOKEN_FILE=/etc/fleet/join-token\n",
        )?;
        host.write("/etc/systemd/system/api.socket", "[Socket]\nListenStream=49153\n")?;
        host.write(
            "/etc/systemd/system/api.service",
            "[Service]\nExecStart=/lib/systemd/systemd-socket-proxyd gold-1:49153\n",
        )?;
        start(host)?;
        host.sh("systemctl start api.socket")?.ok().map(drop)
    }

    /// sshd on all hosts, and an agent with a key for root on the first and the one outside.
    pub(crate) fn with_ssh(self) -> Result<Stage> {
        for host in self.cluster.hosts() {
            let key = std::fs::read(host.start_sshd()?).context("the cluster's key")?;
            host.write("/root/key", key)?;
            host.sh(
                "chmod 600 /root/key && ssh-agent -a /run/agent.sock > /dev/null && SSH_AUTH_SOCK=/run/agent.sock ssh-add -q /root/key && rm /root/key && \
                 usermod -aG fleet core",
            )?
            .ok()?;
        }
        Ok(self)
    }

    /// A recorded text with the addresses of this cluster.
    fn here(&self, text: &str) -> String {
        let gateway = self.cluster.gateway();
        let network = gateway.strip_suffix('1').unwrap_or(&gateway);
        let text = text.replace(NETWORK, network);
        let [recorded, ours] = ETCD_PORTS;
        if self.etcd.is_some() { text.replace(recorded, ours) } else { text }
    }

    fn host(&self, place: Place) -> &Host {
        match place {
            Place::Machine(index) => self.cluster.host(index),
            Place::Outside => self.cluster.host(3),
        }
    }

    /// Does what comes before a command.
    pub(crate) fn prepare(&self, case: &Case) -> Result<()> {
        for step in &case.before {
            match step {
                Step::File { name, text } if name == CONFIGURATION => {
                    self.configure(self.host(case.place), text, &case.environment)?;
                }
                Step::File { name, text } => {
                    let path = std::path::Path::new(DIRECTORY).join(name);
                    self.host(Place::Machine(0)).write(&path, text)?;
                    if case.place == Place::Outside {
                        self.host(Place::Outside).write(&path, text)?;
                    }
                }
                Step::Setup { place, script } => {
                    self.shell(*place, script).deadline(LIMIT).run()?.ok()?;
                }
            }
        }
        Ok(())
    }

    /// Restarts fleetd with another fleet.conf and environment. That it does not start with it may be what is recorded.
    fn configure(&self, host: &Host, text: &str, environment: &[String]) -> Result<()> {
        // So that it is not started again with half of what is new.
        host.sh("systemctl stop fleetd.service")?.ok()?;
        host.write(CONFIGURATION, self.here(text))?;
        let variables: String = environment
            .iter()
            .filter_map(|variable| match variable.strip_suffix(" not set)") {
                Some(unset) if self.classic() => {
                    Some(format!("UnsetEnvironment={}\n", unset.trim_start_matches('(')))
                }
                _ if variable.starts_with('(') => None,
                _ => Some(format!("Environment={}\n", self.here(variable))),
            })
            .collect();
        // After that of the stage.
        let file = "/etc/systemd/system/fleetd.service.d/x-recorded.conf";
        host.write(file, format!("[Service]\n{variables}"))?;
        host.sh("systemctl daemon-reload; systemctl start fleetd.service || true")?.ok()?;
        Ok(())
    }

    fn shell(&self, place: Place, script: &str) -> fleet_testbed::Command {
        let script = format!("{PRELUDE}{}\n", self.here(script));
        let command = self.host(place).command_in(DIRECTORY, ["/bin/bash", "-c", &script]);
        let command = command.env("SSH_AUTH_SOCK", "/run/agent.sock");
        match place {
            // A machine that joined does not serve the API itself.
            Place::Machine(1 | 2) if !self.classic() => {
                command.env("FLEETCTL_ENDPOINT", "http://gold-1:49153")
            }
            _ => command,
        }
    }

    /// Destroys the unit that a command is about, by its last word.
    pub(crate) fn destroy(&self, case: &Case) -> Result<()> {
        let unit = case.command.rsplit(' ').next().unwrap_or_default();
        self.shell(case.place, &format!("fleetctl destroy {unit}")).deadline(LIMIT).run()?.ok().map(drop)
    }

    /// Runs a command and returns its answer as it is. A command that is expected to run on is given that time.
    pub(crate) fn run(&self, case: &Case, expected: Exit) -> Result<Answer> {
        let mut script = case.command.clone();
        let running = match expected {
            Exit::Running(seconds) => {
                script = format!("timeout --foreground {seconds} {script}");
                Some(seconds)
            }
            Exit::Code(_) => None,
        };
        let mut command = self.shell(case.place, &script).deadline(LIMIT);
        for (name, value) in case.environment.iter().filter_map(|variable| variable.split_once('=')) {
            command = command.env(name, value);
        }
        if !case.stdin.is_empty() {
            command = command.stdin(format!("{}\n", case.stdin));
        }
        let output = command.run().with_context(|| format!("$ {}", case.command))?;
        let exit = match (running, output.code()) {
            (Some(seconds), 124) => Exit::Running(seconds),
            (_, code) => Exit::Code(code),
        };
        Ok(Answer { stdout: output.stdout, stderr: output.stderr, exit })
    }
}

fn start(host: &Host) -> Result<()> {
    host.sh("systemctl daemon-reload")?.ok()?;
    host.start_fleet()
}
