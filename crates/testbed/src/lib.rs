//! Clusters of real systemd hosts on one machine.
//!
//! A host is a systemd-nspawn container booted from an overlay of this machine's own root: its own
//! systemd as PID 1, machine ID, journal, D-Bus, network namespace and address on a bridge, and a
//! disk that survives a power cut. Three are up in about a second. The end-to-end tests, the demo
//! and the benchmarks stand on this crate; `fleet-testbed` is the same for people.
//!
//! ```no_run
//! use fleet_testbed::{Cluster, Options};
//!
//! let cluster = Cluster::up(Options::for_test("example", 2))?;
//! let host = cluster.host(0);
//! assert_eq!(host.run(["hostname"])?.stdout.trim(), host.name());
//! host.kill()?; // the power goes
//! host.boot()?; // and comes back, same disk
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! What stands on this machine for a cluster: a directory under [`BASE`], an overlay mount per host,
//! a bridge and one veth per host, cgroup directories, and the processes of the hosts. All of it
//! goes when the [`Cluster`] is dropped (also by a panic) and on SIGINT, SIGTERM and SIGHUP. What a
//! SIGKILL leaves, the next [`Cluster::up`] of any process sweeps away: each cluster names its owner.
//!
//! | module | job |
//! |---|---|
//! | [`Cluster`] | bridge, subnet, owner, up and down |
//! | [`Host`] | one host: power, cable, files |
//! | [`Command`] | commands inside a host, with deadlines |
//! | `disk` | what differs between a host's disk and this machine's root |
//! | `fleet` | fleet's programs and package files on a host |
//! | `sshd`, `docker` | servers that tests and the demo use inside hosts |
//! | [`Etcd`] | a real etcd on this machine's loopback, for tests |
//! | `cgroup` | control groups, and the processes in them |
//! | `state` | the records under [`BASE`], process identity, the lock |
//! | `cleanup` | signals |

mod cgroup;
mod cleanup;
mod cluster;
mod command;
mod disk;
mod docker;
mod etcd;
mod fleet;
mod host;
mod prerequisites;
mod sshd;
mod state;

pub use cluster::{Cluster, Options, list};
pub use command::{Command, DEFAULT_DEADLINE, Output, Running};
pub use docker::Mirror;
pub use etcd::{Etcd, EtcdOptions, EtcdTls, etcd_call, etcd_follow};
pub use fleet::{bin_dir, install, packaging_dir};
pub use host::Host;
pub use prerequisites::check as check_prerequisites;
pub use rustix::process::Signal;
pub use state::BASE;
