//! What the end-to-end tests share: a booted host with fleet on it, fleetctl, the API over its socket, and waiting for
//! something to become true.

mod etcd;
pub mod history;
mod http;
mod ledger;
mod running;
pub mod torture;

pub use etcd::{Layout, Members, base64, from_base64};
pub use http::{Answer, Http};
pub use ledger::{Change, Command, Ledger, unit_says};
pub use running::{RECORDED, Run, Running};

use anyhow::{Context, Result, bail};
use fleet_testbed::{Cluster, Etcd, Host, Options, Output, bin_dir};
use std::time::{Duration, Instant};

/// How long a test waits for something that should happen at once: long, since test machines can be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Hosts with fleet on them. The first one is (also) a server.
#[derive(Debug)]
pub struct Fleet {
    /// The hosts.
    pub cluster: Cluster,
    /// Beside the hosts, if the registry is in it.
    etcd: Option<Etcd>,
    /// How many hosts are servers: the first ones.
    servers: usize,
}

impl Fleet {
    /// Boots a host and starts fleet on it, in the [`Layout`] asked for.
    pub fn up(name: &str) -> Result<Fleet> {
        let fleet = Fleet::installed(name)?;
        fleet.host().start_fleet()?;
        until("the machine is there", || Ok(fleet.machines()? == 1))?;
        Ok(fleet)
    }

    /// Boots a host with fleet installed, and not started.
    pub fn installed(name: &str) -> Result<Fleet> {
        let fleet = Fleet::boot(Layout::asked_for()?, name, 1)?;
        if let Some(etcd) = &fleet.etcd {
            etcd::serve_from(fleet.host(), etcd)?;
        }
        Ok(fleet)
    }

    /// The same with the registry that fleetd keeps itself, for tests that are about that.
    pub fn installed_embedded(name: &str) -> Result<Fleet> {
        Fleet::boot(Layout::Embedded, name, 1)
    }

    /// Boots hosts for a layout, with fleet installed.
    fn boot(layout: Layout, name: &str, hosts: usize) -> Result<Fleet> {
        let cluster = Cluster::up(Options::for_test(name, hosts).fleet(bin_dir()?))?;
        let etcd = layout.prepare(&cluster)?;
        let servers = if layout == Layout::Classic { hosts } else { 1 };
        Ok(Fleet { cluster, etcd, servers })
    }

    /// Hosts that a test makes a cluster of by itself, with the first as a server.
    pub fn of(cluster: Cluster) -> Fleet {
        Fleet { cluster, etcd: None, servers: 1 }
    }

    /// The first host.
    pub fn host(&self) -> &Host {
        self.cluster.host(0)
    }

    /// Runs fleetctl in /root with these words, split at blanks.
    pub fn ctl(&self, words: &str) -> Result<Output> {
        self.ctl_on(0, words)
    }

    /// The same on any host; it has to be a server.
    pub fn ctl_on(&self, host: usize, words: &str) -> Result<Output> {
        let argv = std::iter::once("fleetctl").chain(words.split_whitespace());
        self.cluster.host(host).command(argv).deadline(Duration::from_secs(180)).run()
    }

    /// Runs fleetctl, which must succeed, and returns its standard output.
    pub fn ok(&self, words: &str) -> Result<String> {
        Ok(self.ctl(words)?.ok()?.stdout)
    }

    /// Writes a unit file into /root.
    pub fn file(&self, name: &str, text: &str) -> Result<()> {
        self.host().write(format!("/root/{name}"), text)
    }

    /// Writes a unit file and starts it.
    pub fn start(&self, name: &str, text: &str) -> Result<()> {
        self.file(name, text)?;
        self.ok(&format!("start {name}")).map(drop)
    }

    /// A property of a unit, from the host's systemd.
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        let out = self.host().run(["systemctl", "show", "--value", "-p", property, unit])?.ok()?;
        Ok(out.stdout.trim().to_owned())
    }

    /// The main process of a unit, which must be there.
    pub fn main_pid(&self, unit: &str) -> Result<u32> {
        let pid: u32 = self.property(unit, "MainPID")?.parse()?;
        if pid == 0 {
            bail!("{unit} has no main process");
        }
        Ok(pid)
    }

    /// The one line that `list-units` has for a unit: active and sub state.
    pub fn state(&self, unit: &str) -> Result<Option<String>> {
        let list = self.ok("list-units --no-legend --fields=unit,active,sub")?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(unit));
        Ok(line.map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")))
    }

    /// Restarts or kills the first host's fleetd with `how`, and waits until it serves again and its machine is there.
    pub fn disturb(&self, how: &str) -> Result<()> {
        self.host().sh(how)?.ok()?;
        let id = self.host().machine_id();
        until("fleetd serves again", || {
            let machines = self.ctl("list-machines --no-legend --full --fields=machine")?;
            Ok(machines.success() && machines.stdout.lines().any(|line| line == id))
        })
    }

    /// The API of the host's fleetd.
    pub fn http(&self) -> Result<Http> {
        self.http_on(0)
    }

    /// The same on any host.
    pub fn http_on(&self, host: usize) -> Result<Http> {
        Ok(Http::new(self.cluster.host(host).root_path("/run/fleet.sock")?))
    }

    /// `ID.../ADDRESS`, as tables show the machine.
    pub fn machine(&self) -> String {
        format!("{}.../{}", &self.host().machine_id()[..8], self.host().ip())
    }
}

/// Waits until something is true.
pub fn until(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until_within(PATIENCE, what, holds)
}

/// The same for what takes its time.
pub fn until_within(patience: Duration, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        let last = holds();
        match last {
            Ok(true) => return Ok(()),
            other if Instant::now() > end => {
                other.with_context(|| format!("waiting: {what}"))?;
                bail!("not within {} s: {what}", patience.as_secs());
            }
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Several hosts: the first is the server and the others joined it, unless another [`Layout`] is asked for.
impl Fleet {
    /// Boots hosts and makes them one cluster, with these lines in every fleet.conf.
    pub fn join_all(name: &str, hosts: usize, conf: &str) -> Result<Fleet> {
        Fleet::join_first(name, hosts, &vec![conf; hosts])
    }

    /// Boots hosts and makes the first of them one cluster, with these lines in the fleet.conf of each. fleet is only installed on the
    /// others.
    pub fn join_first(name: &str, hosts: usize, conf: &[&str]) -> Result<Fleet> {
        Fleet::join_in(Layout::asked_for()?, name, hosts, conf)
    }

    /// [`Fleet::join_all`] in a layout with one server, for tests that are about joining.
    pub fn join_one_server(name: &str, hosts: usize, conf: &str) -> Result<Fleet> {
        Fleet::join_first_one_server(name, hosts, &vec![conf; hosts])
    }

    /// [`Fleet::join_first`] in a layout with one server.
    pub fn join_first_one_server(name: &str, hosts: usize, conf: &[&str]) -> Result<Fleet> {
        let layout = match Layout::asked_for()? {
            Layout::Classic => Layout::Etcd,
            other => other,
        };
        Fleet::join_in(layout, name, hosts, conf)
    }

    /// [`Fleet::join_all`] with the registry that fleetd keeps itself, for tests that are about that.
    pub fn join_embedded(name: &str, hosts: usize, conf: &str) -> Result<Fleet> {
        Fleet::join_in(Layout::Embedded, name, hosts, &vec![conf; hosts])
    }

    fn join_in(layout: Layout, name: &str, hosts: usize, conf: &[&str]) -> Result<Fleet> {
        let fleet = Fleet::boot(layout, name, hosts)?;
        fleet.host().write("/etc/fleet/fleet.conf", format!("listen=\"*\"\n{}\n", conf[0]))?;
        if let Some(etcd) = &fleet.etcd {
            etcd::serve_from(fleet.host(), etcd)?;
        }
        fleet.host().start_fleet()?;
        let token = fleet.token("{}")?;
        for (host, conf) in fleet.cluster.hosts().iter().zip(conf).skip(1) {
            fleet.join(host, &token, conf)?;
            host.start_fleet()?;
        }
        until("all machines are there", || Ok(fleet.machines()? == conf.len()))?;
        Ok(fleet)
    }

    /// A join token.
    pub fn token(&self, terms: &str) -> Result<String> {
        let answer = self.http()?.json("POST", "/fleet/v1/join-tokens", terms)?;
        let made: serde_json::Value = serde_json::from_str(&answer.body).context(answer.body)?;
        made["token"].as_str().map(str::to_owned).context("no token in the answer")
    }

    /// Configures a host to join the servers with a token; where every machine is a server, to be one.
    pub fn join(&self, host: &Host, token: &str, conf: &str) -> Result<()> {
        if let Some(etcd) = self.etcd.as_ref().filter(|_| self.servers == self.cluster.hosts().len()) {
            host.write("/etc/fleet/fleet.conf", format!("{conf}\n"))?;
            return etcd::serve_from(host, etcd);
        }
        host.write("/etc/fleet/join-token", format!("{token}\n"))?;
        let servers: Vec<&str> = self.cluster.hosts()[..self.servers].iter().map(Host::ip).collect();
        let join =
            format!("join=\"{}\"\njoin_token_file=\"/etc/fleet/join-token\"\n{conf}\n", servers.join(","));
        host.write("/etc/fleet/fleet.conf", join)
    }

    /// On which hosts systemd runs a unit, by index.
    pub fn copies(&self, unit: &str) -> Result<Vec<usize>> {
        let mut copies = Vec::new();
        for (index, host) in self.cluster.hosts().iter().enumerate() {
            if host.is_up() && host.run(["systemctl", "is-active", unit])?.stdout.trim() == "active" {
                copies.push(index);
            }
        }
        Ok(copies)
    }

    /// The main processes of all units with this prefix on a host.
    pub fn pids(&self, host: usize, prefix: &str) -> Result<String> {
        let script = format!(
            "for u in $(systemctl list-units --plain --no-legend --state=active '{prefix}*' | cut -d' ' -f1); do echo $u $(systemctl show --value -p MainPID $u); done"
        );
        Ok(self.cluster.host(host).sh(&script)?.ok()?.stdout)
    }
}
