//! The examples of `examples/deploy`, carried out as cloud-init, Ignition and Ansible would, on hosts that have no fleet yet:
//! each brings up a cluster whose machines are there with their addresses and metadata.
//!
//! What is read here is as much of those formats as the examples use; anything else fails.

mod ansible;
mod cloud_config;
mod ignition;

use crate::SLEEP;
use anyhow::{Context, Result, bail, ensure};
use fleet_e2e::{Fleet, until};
use fleet_testbed::{Cluster, Host, Options, bin_dir};
use std::path::Path;
use std::process::Command;
use yaml_rust2::{Yaml, YamlLoader};

/// Where the archive of the programs is on each host, and what stands for that in the examples.
const ARCHIVE: (&str, &str) = ("/root/fleet.tar.gz", "https://example.com/fleet.tar.gz");
/// The addresses in the examples.
const ADDRESSES: [&str; 3] = ["10.0.0.11", "10.0.0.12", "10.0.0.13"];

/// An example's text.
fn example(file: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/deploy").join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The one document of a YAML text.
fn yaml(text: &str) -> Result<Yaml> {
    let documents = YamlLoader::load_from_str(text)?;
    let [document] = <[Yaml; 1]>::try_from(documents).ok().context("not one document")?;
    Ok(document)
}

/// A text within a document, which has to be there.
fn text<'a>(node: &'a Yaml, key: &str) -> Result<&'a str> {
    node[key].as_str().with_context(|| format!("no text {key:?} in {node:?}"))
}

/// The entries of a list; none when it is not there.
fn list<'a>(node: &'a Yaml, key: &str) -> Result<&'a [Yaml]> {
    match &node[key] {
        Yaml::BadValue => Ok(&[]),
        Yaml::Array(entries) => Ok(entries),
        other => bail!("{key:?} is no list: {other:?}"),
    }
}

/// Fails if there is a key that nobody here would look at.
fn only(node: &Yaml, keys: &[&str]) -> Result<()> {
    let known = |key: &Yaml| key.as_str().is_some_and(|key| keys.contains(&key));
    let unknown: Vec<_> = node.as_hash().context("no mapping")?.keys().filter(|key| !known(key)).collect();
    ensure!(unknown.is_empty(), "not understood here: {unknown:?}");
    Ok(())
}

/// A mode, written in octal digits: `0644`.
fn mode(node: &Yaml) -> Result<u32> {
    let digits = match node {
        Yaml::Integer(number) => number.to_string(),
        Yaml::String(text) => text.clone(),
        other => bail!("{other:?} is no mode"),
    };
    u32::from_str_radix(&digits, 8).with_context(|| format!("{digits} is no mode"))
}

/// Puts a file on a host, with its mode.
fn put(host: &Host, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    host.write(path, bytes)?;
    host.run(["chmod".to_owned(), format!("{mode:o}"), path.to_owned()])?.ok().map(drop)
}

/// Three hosts without fleet, and the archive of it on each.
fn hosts(name: &str) -> Result<Fleet> {
    let fleet = Fleet::of(Cluster::up(Options::for_test(name, 3))?);
    let directory = fleet.cluster.dir().join("archive");
    // Laid out as `cargo xtask dist` does it.
    let tree = directory.join("fleet-0.0-linux-test");
    std::fs::create_dir_all(&tree)?;
    fleet_testbed::install(&tree, &bin_dir()?, "")?;
    let archive = directory.join("fleet.tar.gz");
    let mut tar = Command::new("tar");
    tar.args(["--mode=u=rwX,go=rX", "--use-compress-program=gzip -1", "-C"]).arg(&directory);
    let status = tar.arg("-cf").arg(&archive).arg("fleet-0.0-linux-test").status().context("tar")?;
    // 1: the programs are linked, not copied, to other hosts meanwhile, which counts as a change.
    ensure!(matches!(status.code(), Some(0 | 1)), "tar: {status}");
    for host in fleet.cluster.hosts() {
        host.copy_in(&archive, ARCHIVE.0)?;
    }
    Ok(fleet)
}

/// An example as the one who deploys would fill it in for a machine.
fn filled(fleet: &Fleet, index: usize, token: &str, example: &str) -> Result<String> {
    let hosts = fleet.cluster.hosts();
    let mut text = example.replace(ARCHIVE.1, &format!("file://{}", ARCHIVE.0));
    for (address, host) in ADDRESSES.iter().zip(hosts) {
        text = text.replace(address, host.ip());
    }
    let (name, ip) = (format!("m{}", index + 1), hosts[index].ip());
    for (word, value) in
        [("SELF_NAME", name.as_str()), ("SELF_IP", ip), ("SERVER_IP", hosts[0].ip()), ("JOIN_TOKEN", token)]
    {
        text = text.replace(word, value);
    }
    let left = ["SELF_", "SERVER_", "_IP", "_TOKEN\""].iter().find(|word| text.contains(*word));
    ensure!(left.is_none(), "{left:?} is left in {text}");
    Ok(text)
}

/// Waits until all three machines are there, with the metadata of the examples, and tries the cluster.
fn is_there(fleet: &Fleet, metadata: [&str; 3]) -> Result<()> {
    let hosts = fleet.cluster.hosts();
    until("all machines are there as they were described", || {
        let list = fleet.ctl("list-machines --no-legend --full")?.stdout;
        let line =
            |(host, metadata): (&Host, &&str)| format!("{}\t{}\t{metadata}", host.machine_id(), host.ip());
        Ok(list.lines().count() == 3 && hosts.iter().zip(&metadata).all(|it| list.contains(&line(it))))
    })?;
    for (unit, metadata) in ["first.service", "second.service", "third.service"].iter().zip(metadata) {
        let wanted: String = metadata.split(',').map(|pair| format!("MachineMetadata={pair}\n")).collect();
        fleet.start(unit, &format!("{SLEEP}[X-Fleet]\n{wanted}"))?;
        let copies = fleet.copies(unit)?;
        let [host] = copies[..] else { bail!("{unit} runs on {copies:?}") };
        ensure!(hosts[host].is_up());
    }
    // It goes on after a reboot, without anybody's doing.
    hosts[1].reboot()?;
    until("a machine comes back by itself", || {
        Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 3
            && hosts[1].run(["systemctl", "is-active", "fleetd.service"])?.stdout == "active\n")
    })
}

/// The metadata of the examples with one server.
const JOINED: [&str; 3] = ["region=eu,role=server", "region=eu,role=worker", "region=eu,role=worker"];
/// The metadata of the examples with etcd.
const ON_ETCD: [&str; 3] = ["name=m1,region=eu", "name=m2,region=eu", "name=m3,region=eu"];

/// A cluster of a server and machines that join: `machine` configures one of them by an example.
fn with_one_server(
    name: &str,
    examples: [&str; 2],
    machine: impl Fn(&Host, &str) -> Result<()>,
) -> Result<()> {
    let fleet = hosts(name)?;
    machine(fleet.host(), &filled(&fleet, 0, "", &example(examples[0])?)?)?;
    let token = || fleet.host().run(["fleetctl", "join-token", "create"])?.ok();
    until("the server is there", || Ok(token().is_ok()))?;
    let token = token()?.stdout.lines().next().unwrap_or_default().to_owned();
    for index in [1, 2] {
        machine(fleet.cluster.host(index), &filled(&fleet, index, &token, &example(examples[1])?)?)?;
    }
    is_there(&fleet, JOINED)
}

/// A cluster in which every machine is a server, on an etcd that the examples bring up, too.
fn with_etcd(name: &str, file: &str, machine: impl Fn(&Host, &str) -> Result<()> + Sync) -> Result<()> {
    let fleet = hosts(name)?;
    let text = example(file)?;
    // All at once: an etcd begins when it has found the others.
    let texts: Vec<String> = (0..3).map(|index| filled(&fleet, index, "", &text)).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let (machine, mut all) = (&machine, Vec::new());
        for (host, text) in fleet.cluster.hosts().iter().zip(&texts) {
            all.push(scope.spawn(move || machine(host, text)));
        }
        all.into_iter().try_for_each(|one| one.join().expect("no panic"))
    })?;
    is_there(&fleet, ON_ETCD)
}
