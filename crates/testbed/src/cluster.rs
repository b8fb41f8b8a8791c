//! A cluster: a bridge with a subnet, hosts on it, and the process that owns it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

use crate::command::outer;
use crate::disk::{self, new_machine_id};
use crate::host::Host;
use crate::state::{BASE, ClusterRecord, ProcessId, cluster_dir, lock, read_record, write_record};
use crate::{cgroup, cleanup, prerequisites};

/// Hosts per cluster: their addresses are .11 to .250.
const MAX_HOSTS: usize = 240;

/// What cluster to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name, `[a-z0-9-]`, at most 40 characters; hosts are called NAME-1, NAME-2, …
    pub name: String,
    /// How many hosts.
    pub hosts: usize,
    /// The first three numbers of its network, such as `172.30.7`; a free one is taken when none.
    pub subnet: Option<String>,
    /// Whether a free network has to be one whose third number is a single digit: for tests that compare tables,
    /// whose layout depends on how long addresses are.
    pub short_subnet: bool,
    /// Machine IDs for the first hosts; the others get random ones.
    pub machine_ids: Vec<String>,
    /// fleet's metadata (`region=eu,disk=ssd`) of the first hosts; used with [`Options::fleet`].
    pub metadata: Vec<String>,
    /// Directory with fleetd and fleetctl, put on the hosts' disks before they boot.
    pub fleet: Option<PathBuf>,
}

impl Options {
    /// A cluster called `name`.
    pub fn new(name: impl Into<String>, hosts: usize) -> Options {
        Options {
            name: name.into(),
            hosts,
            subnet: None,
            short_subnet: false,
            machine_ids: Vec::new(),
            metadata: Vec::new(),
            fleet: None,
        }
    }

    /// A cluster whose name nobody else has: `name`, this process's number and a count.
    pub fn for_test(name: &str, hosts: usize) -> Options {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Options::new(format!("{name}-{}-{count}", std::process::id()), hosts)
    }

    /// With fleet installed from `bin_dir` (see [`bin_dir`](crate::bin_dir)).
    pub fn fleet(mut self, bin_dir: impl Into<PathBuf>) -> Options {
        self.fleet = Some(bin_dir.into());
        self
    }

    /// With metadata for the next host that has none yet.
    pub fn metadata(mut self, metadata: impl Into<String>) -> Options {
        self.metadata.push(metadata.into());
        self
    }

    fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            bail!("{} hosts: a cluster has 1 to {MAX_HOSTS}", self.hosts);
        }
        for id in &self.machine_ids {
            if id.len() != 32 || !id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                bail!("machine ID {id:?}: 32 lower-case hexadecimal digits");
            }
        }
        if let Some(subnet) = &self.subnet {
            let parts: Vec<Result<u8, _>> = subnet.split('.').map(str::parse).collect();
            if parts.len() != 3 || parts.iter().any(Result::is_err) {
                bail!("subnet {subnet:?}: three numbers, such as 172.30.7");
            }
        }
        Ok(())
    }
}

/// Names become directory names, host names and parts of link names.
fn check_name(name: &str) -> Result<()> {
    let plain = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if name.is_empty() || name.len() > 40 || !plain || name.starts_with('-') {
        bail!("cluster name {name:?}: at most 40 of a-z, 0-9 and -, not starting with -");
    }
    Ok(())
}

/// A cluster of hosts. Dropping one that this process made takes it down.
#[derive(Debug)]
pub struct Cluster {
    record: ClusterRecord,
    dir: PathBuf,
    hosts: Vec<Host>,
    owned: bool,
}

impl Cluster {
    /// Makes a cluster and waits until its hosts are ready. First sweeps what processes that are gone
    /// left behind.
    pub fn up(options: Options) -> Result<Cluster> {
        options.check()?;
        prerequisites::check()?;
        prerequisites::lift_limits();
        // From here on an error takes down what stands so far, by drop.
        let mut cluster = Cluster::lay(&options)?;
        cluster.start(&options).with_context(|| format!("cluster {}", options.name))?;
        Ok(cluster)
    }

    /// The cluster called `name`, made by this process or another. Dropping it does nothing.
    pub fn open(name: &str) -> Result<Cluster> {
        check_name(name)?;
        let dir = cluster_dir(name);
        let record: Option<ClusterRecord> = read_record(&dir.join("cluster.json"))?;
        let record = record.with_context(|| format!("there is no cluster {name:?}"))?;
        Ok(Cluster::from_record(record, dir, false))
    }

    /// Takes down the cluster called `name`, whoever made it and whatever state it is in.
    pub fn remove(name: &str) -> Result<()> {
        check_name(name)?;
        if !cluster_dir(name).exists() {
            bail!("there is no cluster {name:?}");
        }
        remove(name)
    }

    /// Whether the process that owns the cluster still runs; false for one that stands by itself.
    pub fn has_living_owner(&self) -> bool {
        self.record.owner.is_some_and(ProcessId::is_alive)
    }

    fn from_record(record: ClusterRecord, dir: PathBuf, owned: bool) -> Cluster {
        let hosts = (0..record.machine_ids.len()).map(|i| Host::new(&record, &dir, i)).collect();
        Cluster { record, dir, hosts, owned }
    }

    /// Takes a name and a subnet, under the lock.
    fn lay(options: &Options) -> Result<Cluster> {
        // Before the lock: the signal thread takes them in this order too.
        let _making = cleanup::making();
        let _lock = lock()?;
        sweep()?;
        let dir = cluster_dir(&options.name);
        if dir.exists() {
            bail!("there is a cluster {0:?} already; end it with `fleet-testbed down {0}`", options.name);
        }
        let subnet = match &options.subnet {
            Some(subnet) => subnet.clone(),
            None => free_subnet(options.short_subnet)?,
        };
        let mut machine_ids = options.machine_ids.clone();
        while machine_ids.len() < options.hosts {
            machine_ids.push(new_machine_id()?);
        }
        machine_ids.truncate(options.hosts);
        let record = ClusterRecord {
            name: options.name.clone(),
            bridge: format!("ft{}", subnet.replace('.', "-")),
            subnet,
            machine_ids,
            owner: Some(ProcessId::current()?),
        };
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let cluster = Cluster::from_record(record, dir, true);
        cleanup::register(&options.name)?;
        write_record(&cluster.dir.join("cluster.json"), &cluster.record)?;
        // Made under the lock, so that the next search for a free subnet sees it.
        let ClusterRecord { bridge, subnet, .. } = &cluster.record;
        outer(&["ip", "link", "add", bridge, "type", "bridge"])?;
        outer(&["ip", "addr", "add", &format!("{subnet}.1/24"), "dev", bridge])?;
        outer(&["ip", "link", "set", bridge, "up"])?;
        // Nothing that hosts send leaves this machine, even where it forwards packets for others.
        let forwarding = format!("/proc/sys/net/ipv4/conf/{bridge}/forwarding");
        fs::write(&forwarding, "0").with_context(|| format!("cannot write {forwarding}"))?;
        Ok(cluster)
    }

    fn start(&mut self, options: &Options) -> Result<()> {
        let table: String = self.hosts.iter().map(|h| format!("{} {}\n", h.ip(), h.name())).collect();
        for (i, host) in self.hosts.iter().enumerate() {
            host.create(&table)?;
            if let Some(bin_dir) = &options.fleet {
                let metadata = options.metadata.get(i).map_or("", String::as_str);
                crate::fleet::install(&host.disk().upper(), bin_dir, metadata)?;
            }
        }
        for host in &self.hosts {
            host.power_on()?;
        }
        for host in &self.hosts {
            host.wait_ready()?;
            if options.fleet.is_some() {
                crate::fleet::after_install(host)?;
            }
        }
        Ok(())
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// The cluster's directory on this machine.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// This machine's address on the bridge.
    pub fn gateway(&self) -> String {
        format!("{}.1", self.record.subnet)
    }

    /// Host number `index`, counted from 0.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// All hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Lets the cluster stand when this process ends; `fleet-testbed down NAME` or
    /// [`Cluster::down`] of a later [`Cluster::open`] ends it.
    pub fn keep(mut self) -> Result<()> {
        self.disown()
    }

    fn disown(&mut self) -> Result<()> {
        self.record.owner = None;
        write_record(&self.dir.join("cluster.json"), &self.record)?;
        self.owned = false;
        cleanup::unregister(&self.record.name);
        Ok(())
    }

    /// Takes the cluster down and removes all that was made for it.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        let result = self.take_down();
        cleanup::unregister(&self.record.name);
        result
    }

    fn take_down(&self) -> Result<()> {
        remove(&self.record.name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        let name = self.record.name.clone();
        if std::thread::panicking() && std::env::var_os("FLEET_TESTBED_KEEP").is_some_and(|v| v == "1") {
            match self.disown() {
                Ok(()) => eprintln!("fleet-testbed: kept {name}; end it with `fleet-testbed down {name}`"),
                Err(error) => eprintln!("fleet-testbed: {name}: {error:#}"),
            }
            return;
        }
        if let Err(error) = self.take_down() {
            eprintln!("fleet-testbed: {name} is not down: {error:#}");
        }
        cleanup::unregister(&name);
    }
}

/// Removes all that stands for the cluster called `name`, from what is on record alone; whatever is
/// gone already is fine.
pub(crate) fn remove(name: &str) -> Result<()> {
    // Half a cluster must not be seen by a sweep, which would take it for a ruin.
    let _lock = lock()?;
    remove_locked(name)
}

fn remove_locked(name: &str) -> Result<()> {
    check_name(name)?;
    let dir = cluster_dir(name);
    // A damaged record must not keep the rest from going.
    let record: Option<ClusterRecord> = read_record(&dir.join("cluster.json")).unwrap_or(None);
    cgroup::remove(&format!("{name}-mirror"))?;
    if let Some(record) = record {
        let bridge = record.bridge.clone();
        let cluster = Cluster::from_record(record, dir.clone(), false);
        for host in &cluster.hosts {
            host.kill()?;
            host.disk().unmount()?;
        }
        if Path::new("/sys/class/net").join(&bridge).exists() {
            outer(&["ip", "link", "del", &bridge])?;
        }
    } else {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let file = entry.file_name();
            let Some(number) = file.to_str().and_then(|f| f.strip_prefix('n')) else { continue };
            cgroup::remove(&format!("{name}-{number}"))?;
            disk::Disk::at(&entry.path()).unmount()?;
        }
    }
    disk::remove_tree(&dir)
}

/// Names of the clusters on this machine.
pub fn list() -> Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(BASE) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
        Err(error) => return Err(error).with_context(|| format!("cannot list {BASE}")),
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if check_name(&name).is_ok() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes clusters whose owner is gone. To be called with the lock held.
fn sweep() -> Result<()> {
    for name in list()? {
        let record = read_record::<ClusterRecord>(&cluster_dir(&name).join("cluster.json"));
        let orphan = match record {
            Ok(Some(record)) => record.owner.is_some_and(|owner| !owner.is_alive()),
            // Its maker held the lock until the record stood: without one it is a ruin.
            Ok(None) => true,
            // It may be in use, by another version; and who wants it gone can name it.
            Err(error) => {
                eprintln!(
                    "fleet-testbed: {name} is left as it is: {error:#} (`fleet-testbed down {name}` ends it)"
                );
                false
            }
        };
        if orphan {
            remove_locked(&name).with_context(|| format!("cannot remove what is left of cluster {name}"))?;
        }
    }
    Ok(())
}

/// A /24 of 172.30.0.0/16 that neither a cluster nor this machine uses.
fn free_subnet(short: bool) -> Result<String> {
    let mut used = BTreeSet::new();
    for name in list()? {
        if let Ok(Some(record)) = read_record::<ClusterRecord>(&cluster_dir(&name).join("cluster.json")) {
            used.insert(record.subnet);
        }
    }
    let addresses =
        outer(&["ip", "-4", "-o", "addr"])? + &outer(&["ip", "-4", "route", "show", "table", "all"])?;
    // From the middle: the low ones are what people type.
    let numbers: Vec<u8> = if short { (0..10).collect() } else { (100..=255).chain(10..100).collect() };
    let subnets = numbers.into_iter().map(|x| format!("172.30.{x}"));
    let mut free = subnets.filter(|s| !used.contains(s) && !addresses.contains(&format!(" {s}.")));
    free.next().context("no free network in 172.30.0.0/16: end some clusters with `fleet-testbed down`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked() {
        let bad = |change: fn(&mut Options)| {
            let mut options = Options::new("a", 1);
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(bad(|o| o.name = "../x".into()).contains("cluster name"));
        assert!(bad(|o| o.name = "-x".into()).contains("cluster name"));
        assert!(bad(|o| o.name = String::new()).contains("cluster name"));
        assert!(bad(|o| o.hosts = 0).contains("1 to 240"));
        assert!(bad(|o| o.subnet = Some("172.30".into())).contains("subnet"));
        assert!(bad(|o| o.subnet = Some("172.30.256".into())).contains("subnet"));
        assert!(bad(|o| o.machine_ids.push("ABC".into())).contains("machine ID"));
        Options::for_test("engine", 3).check().unwrap();
    }

    #[test]
    fn test_names_differ() {
        assert_ne!(Options::for_test("a", 1).name, Options::for_test("a", 1).name);
    }
}
