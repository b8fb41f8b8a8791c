//! `fleet-testbed`: clusters of real systemd hosts from the command line. Hosts are numbered from 1.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use fleet_testbed::{Cluster, Host, Options, list};

/// Clusters of real systemd hosts on one machine, made of systemd-nspawn and an overlay of this
/// machine's own root. Needs root.
#[derive(Parser)]
#[command(name = "fleet-testbed", version)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make cluster NAME with N hosts; it stands until `down`, or with --hold until this command ends
    Up {
        name: String,
        #[arg(default_value_t = 1)]
        n: usize,
        /// First three numbers of the network; a free one is found unless given
        #[arg(long)]
        subnet: Option<String>,
        /// Install fleetd and fleetctl from this directory, with the package's files
        #[arg(long, value_name = "DIR")]
        fleet: Option<PathBuf>,
        /// fleet's metadata of a host, such as region=eu,disk=ssd; once per host, in order
        #[arg(long)]
        metadata: Vec<String>,
        /// Stay, and take the cluster down at Ctrl-C or SIGTERM
        #[arg(long)]
        hold: bool,
    },
    /// Run a command in host I; its exit code is passed on
    Exec {
        name: String,
        i: usize,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Open a login shell in host I
    Shell {
        name: String,
        #[arg(default_value_t = 1)]
        i: usize,
    },
    /// Cut the power of host I
    Kill { name: String, i: usize },
    /// Boot host I, with the disk it had
    Boot { name: String, i: usize },
    /// Shut host I down cleanly and boot it again
    Reboot { name: String, i: usize },
    /// Pull the network cable of host I
    Cut { name: String, i: usize },
    /// Plug the network cable of host I in again
    Join { name: String, i: usize },
    /// Start sshd in host I; prints the path of the private key for root and core
    Sshd { name: String, i: usize },
    /// Start Docker in host I, with a registry mirror on the bridge that has busybox
    Docker { name: String, i: usize },
    /// List the hosts of a cluster, or all clusters
    Info { name: Option<String> },
    /// Take a cluster down and remove all that was made for it
    Down {
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// Every cluster that does not belong to a running process
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fleet-testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up { name, n, subnet, fleet, metadata, hold } => {
            let start = Instant::now();
            let cluster = Cluster::up(Options { subnet, fleet, metadata, ..Options::new(name, n) })?;
            info(&cluster);
            eprintln!("{n} up in {:.1} s", start.elapsed().as_secs_f64());
            if hold {
                // A signal ends the process, and the cluster with it.
                loop {
                    std::thread::park();
                }
            }
            cluster.keep()?;
        }
        Verb::Exec { name, i, command } => return with(&name, i, |host| Err(host.exec(command)))?,
        Verb::Shell { name, i } => {
            let status = with(&name, i, Host::shell)?;
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        Verb::Kill { name, i } => with(&name, i, Host::kill)?,
        Verb::Boot { name, i } => with(&name, i, Host::boot)?,
        Verb::Reboot { name, i } => with(&name, i, Host::reboot)?,
        Verb::Cut { name, i } => with(&name, i, Host::cut)?,
        Verb::Join { name, i } => with(&name, i, Host::join)?,
        Verb::Sshd { name, i } => println!("{}", with(&name, i, Host::start_sshd)?.display()),
        Verb::Docker { name, i } => {
            let mirror = Cluster::open(&name)?.start_mirror()?;
            with(&name, i, |host| host.start_docker(&mirror))?;
        }
        Verb::Info { name: Some(name) } => info(&Cluster::open(&name)?),
        Verb::Info { name: None } => {
            for name in list()? {
                match Cluster::open(&name) {
                    Ok(cluster) => info(&cluster),
                    Err(error) => eprintln!("{error:#}"),
                }
            }
        }
        Verb::Down { name: Some(name), .. } => Cluster::remove(&name)?,
        Verb::Down { name: None, .. } => {
            for name in list()? {
                // One that cannot be read belongs to nobody.
                if Cluster::open(&name).is_ok_and(|cluster| cluster.has_living_owner()) {
                    eprintln!("{name} belongs to a running process, left alone");
                } else {
                    Cluster::remove(&name)?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Does something with host `i`, counted from 1.
fn with<T>(name: &str, i: usize, act: impl FnOnce(&Host) -> Result<T>) -> Result<T> {
    fleet_testbed::check_prerequisites()?;
    let cluster = Cluster::open(name)?;
    let count = cluster.hosts().len();
    if !(1..=count).contains(&i) {
        bail!("cluster {name} has hosts 1 to {count}, not {i}");
    }
    act(cluster.host(i - 1)).with_context(|| format!("host {i} of {name}"))
}

fn info(cluster: &Cluster) {
    for host in cluster.hosts() {
        let power = if host.is_up() { "up" } else { "down" };
        println!("{}\t{}\t{}\t{power}", host.name(), host.ip(), host.machine_id());
    }
}
