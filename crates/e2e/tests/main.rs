//! End-to-end tests: the real programs on real systemd hosts. They need root and the packages that
//! `cargo xtask test` installs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod api;
mod attack;
mod bad_input;
mod cluster;
mod deploy;
mod disturbance;
mod documentation;
mod durability;
mod etcd;
mod faults;
mod history;
mod isolation;
mod leaving;
mod life;
mod logs;
mod moving;
mod options;
mod original;
mod placement;
mod purge;
mod recorded;
mod reload;
mod servers;
mod sessions;
mod torture;
mod tunnel;
mod tutorial;
mod unprivileged;
mod upgrading;
mod users;

/// A service that runs until it is stopped.
pub(crate) const SLEEP: &str = "[Service]\nExecStart=/bin/sleep infinity\n";
