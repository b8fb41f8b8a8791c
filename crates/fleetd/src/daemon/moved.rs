//! Whether the registry that the configuration names is the one to go by.
//!
//! A server that is given another registry than before (an embedded one, then etcd, or back) would find one there that is empty, or as
//! it was long ago, and would make its machines do what that says: stop what runs. So it goes by a registry of the other kind
//! only after the contents were brought there, which `fleetd registry import` does and notes.

use super::etcd::FILE;
use anyhow::{Context, Result, bail};
use fleet_registry::records::UNITS;
use fleet_registry::{EmbeddedStore, EtcdStore, Store, embedded};
use std::{fs, io, path::Path, time::Duration};
use tracing::debug;

/// How long to wait before asking etcd again.
const RETRY: Duration = Duration::from_millis(500);

/// What to do, as docs/UPGRADING.md says.
const HOW: &str = "see docs/UPGRADING.md";

/// Checks, before the embedded registry is opened, that this server's registry was not in etcd the last time.
pub(super) fn check_own(state_directory: &Path) -> Result<()> {
    let path = state_directory.join(FILE);
    if !path.exists() {
        return Ok(());
    }
    bail!(
        "this server's registry was in etcd until now, and etcd_servers is not set any more: bring it here first (fleetd registry \
         export, with etcd_servers, then fleetd registry import --replace, without; {HOW}), or remove {} to go on with what the \
         embedded registry has, which may be old",
        path.display()
    );
}

/// Checks, before a registry in etcd is gone by for the first time, that it is not empty where the embedded one has units. Waits for etcd.
pub(super) async fn check_etcd(store: &EtcdStore, state_directory: &Path) -> Result<()> {
    if state_directory.join(FILE).exists() || !embedded::exists(state_directory) {
        return Ok(());
    }
    loop {
        match store.range(UNITS).await {
            Ok(units) if !units.entries.is_empty() => return Ok(()),
            Ok(_) => break,
            Err(error) => {
                // How etcd is is told elsewhere.
                debug!("waiting for etcd, to see whether the registry was brought there: {error}");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
    let own = EmbeddedStore::open(state_directory).context("looking into the embedded registry")?;
    let units = own.range(UNITS).await?.entries.len();
    own.close().await;
    if units == 0 {
        return Ok(());
    }
    bail!(
        "the registry in etcd is empty, and the embedded one that this server had until now has {units} units: bring them there first \
         (fleetd registry export, without etcd_servers, then fleetd registry import, with; {HOW}), or move everything named registry.* \
         out of {} to begin with none",
        state_directory.display()
    );
}

/// Notes that this server's registry is the embedded one from now on.
pub(super) fn to_own(state_directory: &Path) -> Result<()> {
    let path = state_directory.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unable to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
