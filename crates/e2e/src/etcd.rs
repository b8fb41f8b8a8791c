//! Clusters whose registry is in etcd: where the end-to-end tests keep it, and an etcd with members in the hosts themselves.

use crate::{Fleet, PATIENCE, until};
use anyhow::{Context, Result, bail};
use fleet_testbed::{Cluster, Etcd, EtcdOptions, Host, Options, bin_dir, etcd_call, etcd_follow};
use serde_json::{Value, json};

/// The variable that says in which layout clusters of tests come up.
const LAYOUT: &str = "FLEET_E2E_LAYOUT";
/// Where a host keeps what its layout says, so that tests may write fleet.conf anew.
const DROP_IN: &str = "/etc/systemd/system/fleetd.service.d/layout.conf";
/// What the keys of fleet's registry begin with.
pub(crate) const ENTRIES: &str = "/_coreos.com/fleet/v3/entries/";
/// How Debian's etcd.service is configured.
const ETCD_ENVIRONMENT: &str = "/etc/default/etcd";
/// Where it keeps its data.
const ETCD_DATA: &str = "/var/lib/etcd/default";

/// Who holds the registry, and who is a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The first machine is the server and keeps the registry itself; the others joined it.
    Embedded,
    /// The first machine is a server on etcd; the others joined it.
    Etcd,
    /// As in fleet 1.0: all machines have the same fleet.conf, with `etcd_servers`; each is a server.
    Classic,
}

impl Layout {
    /// All there are.
    pub const ALL: [Layout; 3] = [Layout::Embedded, Layout::Etcd, Layout::Classic];

    /// The layout asked for: FLEET_E2E_LAYOUT is `embedded` (the default), `etcd` or `classic`.
    pub fn asked_for() -> Result<Layout> {
        match std::env::var(LAYOUT).as_deref() {
            Err(_) | Ok("") => Ok(Layout::Embedded),
            Ok(name) => name.parse().context(LAYOUT),
        }
    }

    /// Starts what the layout needs beside the hosts: an etcd at their gateway's address.
    pub fn prepare(self, cluster: &Cluster) -> Result<Option<Etcd>> {
        if self == Layout::Embedded {
            return Ok(None);
        }
        let options = EtcdOptions { members: 1, tls: None, arguments: Vec::new() };
        Etcd::start_with(options, &[cluster.gateway().parse()?]).map(Some)
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layout::Embedded => "embedded",
            Layout::Etcd => "etcd",
            Layout::Classic => "classic",
        })
    }
}

impl std::str::FromStr for Layout {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Layout> {
        let found = Layout::ALL.into_iter().find(|layout| layout.to_string() == name);
        found.with_context(|| format!("{name:?} is no layout: embedded, etcd or classic"))
    }
}

/// Makes a host a server on this etcd, whatever its fleet.conf says.
pub(crate) fn serve_from(host: &Host, etcd: &Etcd) -> Result<()> {
    host.write(
        DROP_IN,
        format!("[Service]\nEnvironment=FLEET_ETCD_SERVERS={}\n", etcd.endpoints().join(",")),
    )?;
    host.run(["systemctl", "daemon-reload"])?.ok().map(drop)
}

impl Fleet {
    /// How many machines there are.
    pub fn machines(&self) -> Result<usize> {
        Ok(self.ok("list-machines --no-legend")?.lines().count())
    }

    /// The classic layout with everything in the hosts: a member of etcd and a server in each, and the same fleet.conf.
    pub fn classic(name: &str, hosts: usize, conf: &str) -> Result<Fleet> {
        Fleet::on_etcd(name, hosts, 0, conf)
    }

    /// A cluster without a single point of failure: so many hosts with a member of etcd and a server in each, and so many
    /// machines that joined them.
    pub fn on_etcd(name: &str, servers: usize, agents: usize, conf: &str) -> Result<Fleet> {
        let cluster = Cluster::up(Options::for_test(name, servers + agents).fleet(bin_dir()?))?;
        let fleet = Fleet { cluster, etcd: None, servers };
        let members = fleet.members();
        members.configure("new", servers)?;
        members.boot_all()?;
        for host in &fleet.cluster.hosts()[..servers] {
            host.write("/etc/fleet/fleet.conf", format!("etcd_servers={}\n{conf}\n", members.quoted()))?;
        }
        // All at once, as at the first boot of a cluster.
        for host in &fleet.cluster.hosts()[..servers] {
            host.run(["systemctl", "enable", "fleetd.socket", "fleetd.service"])?.ok()?;
            host.run(["systemctl", "start", "--no-block", "fleetd.service"])?.ok()?;
        }
        for host in &fleet.cluster.hosts()[..servers] {
            host.start_fleet()?;
        }
        if agents > 0 {
            let token = fleet.token("{}")?;
            for host in &fleet.cluster.hosts()[servers..] {
                fleet.join(host, &token, conf)?;
                host.start_fleet()?;
            }
        }
        for host in 0..servers {
            until(&format!("server {host} has all machines"), || {
                let list = fleet.ctl_on(host, "list-machines --no-legend")?;
                Ok(list.success() && list.stdout.lines().count() == servers + agents)
            })?;
        }
        Ok(fleet)
    }

    /// The members of etcd in the hosts, for clusters that have them.
    pub fn members(&self) -> Members<'_> {
        Members { hosts: &self.cluster.hosts()[..self.servers] }
    }

    /// Which hosts have servers: the first ones.
    pub fn servers(&self) -> std::ops::Range<usize> {
        0..self.servers
    }

    /// The server that leads, by the index of its host, as one server knows; none while nobody does.
    pub fn leader_by(&self, server: usize) -> Result<Option<usize>> {
        let list = self.ctl_on(server, "--format=json servers")?;
        // The exit code is about the members of etcd, some of which tests take away.
        let list: Value = serde_json::from_str(&list.stdout).with_context(|| format!("{list:?}"))?;
        let servers = list["servers"].as_array().context("no servers")?;
        let leader = servers.iter().find(|server| server["leader"] == true);
        let index = |id: &Value| self.cluster.hosts().iter().position(|host| host.machine_id() == id);
        Ok(leader.and_then(|server| index(&server["machineID"])))
    }

    /// Waits until some server leads, and tells its host.
    pub fn leader(&self) -> Result<usize> {
        let mut leader = None;
        until("a server leads", || {
            for server in self.servers() {
                if let Ok(Some(found)) = self.leader_by(server) {
                    leader = Some(found);
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        leader.context("a leader")
    }
}

/// The members of an etcd that run in hosts as Debian's etcd.service, at the hosts' addresses.
#[derive(Clone, Copy, Debug)]
pub struct Members<'a> {
    hosts: &'a [Host],
}

impl<'a> Members<'a> {
    /// Starts an etcd with a member in each of these hosts.
    pub fn start(hosts: &'a [Host]) -> Result<Members<'a>> {
        let members = Members { hosts };
        members.configure("new", hosts.len())?;
        members.boot_all()?;
        Ok(members)
    }
}

impl Members<'_> {
    /// The URL for clients of one member.
    pub fn endpoint(&self, member: usize) -> String {
        format!("http://{}:2379", self.hosts[member].ip())
    }

    /// All of them as a list of fleet.conf.
    pub fn quoted(&self) -> String {
        let all: Vec<String> = (0..self.hosts.len()).map(|n| format!("\"{}\"", self.endpoint(n))).collect();
        format!("[{}]", all.join(", "))
    }

    /// Writes the configuration of the members; `count` of them are known to each other.
    fn configure(&self, state: &str, count: usize) -> Result<()> {
        let cluster: Vec<_> = self.hosts[..count]
            .iter()
            .map(|host| format!("{}=http://{}:2380", host.name(), host.ip()))
            .collect();
        for (index, host) in self.hosts.iter().enumerate() {
            let (name, ip, clients) = (host.name(), host.ip(), self.endpoint(index));
            host.write(
                ETCD_ENVIRONMENT,
                format!(
                    "ETCD_NAME={name}\nETCD_LISTEN_PEER_URLS=http://{ip}:2380\nETCD_INITIAL_ADVERTISE_PEER_URLS=http://{ip}:2380\n\
                     ETCD_LISTEN_CLIENT_URLS={clients}\nETCD_ADVERTISE_CLIENT_URLS={clients}\nETCD_INITIAL_CLUSTER={}\n\
                     ETCD_INITIAL_CLUSTER_STATE={state}\nETCD_HEARTBEAT_INTERVAL=100\nETCD_ELECTION_TIMEOUT=1000\n\
                     ETCD_LOGGER=zap\n",
                    cluster.join(",")
                ),
            )?;
            // Dead is dead until the test says otherwise; and it waits for the others as long as it takes.
            host.write(
                "/etc/systemd/system/etcd.service.d/test.conf",
                "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=no\nTimeoutStartSec=infinity\n",
            )?;
            host.run(["systemctl", "daemon-reload"])?.ok()?;
        }
        Ok(())
    }

    /// Starts members that do not run, without waiting for them: one without a quorum never serves.
    pub fn launch(&self, members: &[usize]) -> Result<()> {
        for member in members {
            self.hosts[*member].run(["systemctl", "start", "--no-block", "etcd.service"])?.ok()?;
        }
        Ok(())
    }

    /// Waits until a member serves.
    pub fn wait(&self, member: usize) -> Result<()> {
        let host = &self.hosts[member];
        let up = until("etcd serves", || Ok(host.run(["systemctl", "is-active", "etcd.service"])?.success()));
        up.with_context(|| {
            let log = host.run(["journalctl", "-u", "etcd.service", "-n", "30", "--no-pager", "-o", "cat"]);
            format!("{}: {}", host.name(), log.map(|log| log.stdout).unwrap_or_default())
        })
    }

    /// Starts members and waits until they serve.
    pub fn boot(&self, members: &[usize]) -> Result<()> {
        self.launch(members)?;
        members.iter().try_for_each(|member| self.wait(*member))
    }

    /// All members.
    pub fn all(&self) -> Vec<usize> {
        (0..self.hosts.len()).collect()
    }

    /// Starts all members that do not run, and waits until all serve.
    pub fn boot_all(&self) -> Result<()> {
        self.boot(&self.all())
    }

    /// Sends a signal to a member: KILL, STOP, CONT.
    pub fn signal(&self, member: usize, signal: &str) -> Result<()> {
        self.hosts[member]
            .run(["systemctl", "kill", "--kill-who=main", "-s", signal, "etcd.service"])?
            .ok()
            .map(drop)
    }

    /// Cuts a member off from the others and from everybody who uses it, and nothing else on its machine.
    pub fn cut(&self, member: usize) -> Result<()> {
        self.firewall(member, "-I")
    }

    /// Lets a member that was cut off back in.
    pub fn join(&self, member: usize) -> Result<()> {
        self.firewall(member, "-D")
    }

    fn firewall(&self, member: usize, what: &str) -> Result<()> {
        // Its own ports, and what it asks of the others; not what its machine's fleetd asks of the others.
        let rules = [
            "INPUT -p tcp --dport 2379:2380",
            "OUTPUT -p tcp --sport 2379:2380",
            "OUTPUT -p tcp --dport 2380",
            "INPUT -p tcp --sport 2380",
        ];
        let rules = rules.map(|rule| format!("iptables {what} {rule} -j DROP"));
        self.hosts[member].sh(&rules.join(" && "))?.ok().map(drop)
    }

    /// Kills members, and waits until they are gone.
    pub fn kill(&self, members: &[usize]) -> Result<()> {
        members.iter().try_for_each(|member| self.signal(*member, "KILL"))?;
        for member in members {
            until("etcd is dead", || {
                Ok(!self.hosts[*member].run(["systemctl", "is-active", "etcd.service"])?.success())
            })?;
        }
        Ok(())
    }

    /// Takes a member's data away and lets it join the others anew, as an administrator would whose disk broke.
    pub fn replace(&self, member: usize) -> Result<()> {
        self.kill(&[member])?;
        let host = &self.hosts[member];
        host.run(["rm", "-rf", ETCD_DATA])?.ok()?;
        let other = (member + 1) % self.hosts.len();
        let list = self.call(other, "cluster/member/list", &json!({}))?;
        let lost = list["members"].as_array().into_iter().flatten().find(|it| it["name"] == host.name());
        let lost = &lost.with_context(|| format!("{} is no member: {list}", host.name()))?["ID"];
        self.call(other, "cluster/member/remove", &json!({"ID": lost}))?;
        self.call(other, "cluster/member/add", &json!({"peerURLs": [format!("http://{}:2380", host.ip())]}))?;
        host.run(["sed", "-i", "s/CLUSTER_STATE=new/CLUSTER_STATE=existing/", ETCD_ENVIRONMENT])?.ok()?;
        self.boot(&[member])
    }

    /// Takes the data of all members away: what comes up is another, empty etcd.
    pub fn wipe(&self) -> Result<()> {
        self.kill(&self.all())?;
        for host in self.hosts {
            host.run(["rm", "-rf", ETCD_DATA])?.ok()?;
        }
        self.boot_all()
    }

    /// Keeps a copy of the data of all members, which have to be dead, or puts the copy back.
    pub fn copy_data(&self, back: bool) -> Result<()> {
        let copy = format!("{ETCD_DATA}.copy");
        let (from, to) = if back { (copy.as_str(), ETCD_DATA) } else { (ETCD_DATA, copy.as_str()) };
        for host in self.hosts {
            host.sh(&format!("rm -rf {to} && cp -a {from} {to}"))?.ok()?;
        }
        Ok(())
    }

    /// Calls etcd's API v3 at a member, as JSON: keys and values are base64.
    pub fn call(&self, member: usize, path: &str, body: &Value) -> Result<Value> {
        etcd_call(self.hosts[member].ip().parse()?, path, body, None, PATIENCE)
    }

    /// The same for a call that is answered by a stream; `each` says whether it wants more.
    pub fn follow(
        &self,
        member: usize,
        path: &str,
        body: &Value,
        each: impl FnMut(&Value) -> Result<bool>,
    ) -> Result<()> {
        etcd_follow(self.hosts[member].ip().parse()?, path, body, PATIENCE, each)
    }

    /// The record under a key of fleet's registry, and the revision at which it was written.
    pub fn get(&self, member: usize, key: &str) -> Result<Option<(Value, String)>> {
        let answer =
            self.call(member, "kv/range", &json!({"key": base64(format!("{ENTRIES}{key}").as_bytes())}))?;
        let Some(kv) = answer["kvs"].get(0) else { return Ok(None) };
        let text = from_base64(kv["value"].as_str().unwrap_or_default())?;
        let record = serde_json::from_slice(&text).with_context(|| format!("{key}: {answer}"))?;
        Ok(Some((record, kv["mod_revision"].as_str().unwrap_or_default().to_owned())))
    }

    /// The member that leads the others.
    pub fn leader(&self) -> Result<usize> {
        let mut leader = None;
        until("etcd has a leader", || {
            for member in self.all() {
                let Ok(status) = self.call(member, "maintenance/status", &json!({})) else { continue };
                if status["leader"] == status["header"]["member_id"] {
                    leader = Some(member);
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        leader.context("a leader")
    }

    /// Puts a value under a key of fleet's registry, as somebody with etcdctl would.
    pub fn put_by_hand(&self, key: &str, value: &str) -> Result<()> {
        let key = format!("{ENTRIES}{key}");
        let body = json!({"key": base64(key.as_bytes()), "value": base64(value.as_bytes())});
        self.call(0, "kv/put", &body).map(drop)
    }
}

/// Base64 as etcd's JSON wants it.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut number = 0u32;
        for index in 0..3 {
            number = number << 8 | u32::from(chunk.get(index).copied().unwrap_or(0));
        }
        for index in 0..4 {
            let digit = DIGITS[(number >> (18 - 6 * index) & 63) as usize];
            text.push(if index <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// The other way round; an error for what is no base64.
pub fn from_base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut number, mut bits) = (0u32, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("no base64: {text}"),
        };
        number = number << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((number >> bits & 0xff) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_both_ways() {
        for (text, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(text.as_bytes()), coded);
            assert_eq!(from_base64(coded).ok().as_deref(), Some(text.as_bytes()));
        }
        assert!(from_base64("a b").is_err());
    }
}
