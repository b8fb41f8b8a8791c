//! A registry in etcd: its store, made from fleet.conf; which registry it was, remembered in the state directory; and how it is, told in
//! the log.

use crate::config::EtcdConfig;
use crate::identity::write_file;
use anyhow::{Context, Result};
use fleet_registry::etcd::{Contact, Identity};
use fleet_registry::{EtcdStore, StoreError};
use std::path::{Path, PathBuf};
use std::{fs, io, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// The file with the [`Identity`] of the registry.
const FILE: &str = "etcd.json";
/// How often it is written while the registry changes: it only has to be new enough to notice a backup that was put back.
const REMEMBER: Duration = Duration::from_secs(60);
/// How often it is said that etcd can't be reached.
const COMPLAIN: Duration = Duration::from_secs(60);

/// Makes the store, and begins to look for etcd.
pub(super) fn open(config: &EtcdConfig, state_directory: &Path) -> Result<EtcdStore> {
    let read = |key: &str, path: &Option<PathBuf>| -> Result<Option<Vec<u8>>> {
        let Some(path) = path else { return Ok(None) };
        let bytes = fs::read(path).with_context(|| format!("{key}: unable to read {}", path.display()))?;
        Ok(Some(bytes))
    };
    let (username, password) = match &config.login {
        Some((name, password)) => (Some(name.clone()), Some(password.expose().to_owned())),
        None => (None, None),
    };
    let store = EtcdStore::new(
        fleet_registry::EtcdConfig {
            endpoints: config.servers.clone(),
            prefix: config.key_prefix.clone(),
            ca: read("etcd_cafile", &config.ca_file)?,
            certificate: read("etcd_certfile", &config.cert_file)?,
            key: read("etcd_keyfile", &config.key_file)?,
            username,
            password,
            request_timeout: config.request_timeout,
        },
        recall(state_directory)?,
    )?;
    Ok(store)
}

/// What was last known of the registry.
fn recall(state_directory: &Path) -> Result<Option<Identity>> {
    let path = state_directory.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("unable to read {}", path.display())),
    };
    let identity = serde_json::from_slice(&bytes).with_context(|| {
        format!("{} can't be read; if etcd still has the registry it had, remove that file", path.display())
    })?;
    Ok(Some(identity))
}

/// Keeps in a file which registry this is, as far as it is known, until cancelled.
pub(super) async fn remember(
    store: EtcdStore,
    state_directory: PathBuf,
    cancel: CancellationToken,
) -> Result<()> {
    let mut kept: Option<Identity> = None;
    let mut contact = store.contact();
    let mut broken = false;
    loop {
        let identity = store.identity();
        if identity.is_some() && identity != kept {
            let text = serde_json::to_string(&identity).context("encoding what is known of the registry")?;
            let directory = state_directory.clone();
            match tokio::task::spawn_blocking(move || write_file(&directory, FILE, &text)).await? {
                Ok(()) => {
                    kept = identity;
                    broken = false;
                }
                Err(error) if !broken => {
                    warn!("{error:#}; a registry that is exchanged would not be noticed after a restart");
                    broken = true;
                }
                Err(_) => {}
            }
        }
        if cancel.is_cancelled() {
            return Ok(());
        }
        // The first time as soon as there is something to remember, then now and then, and once at the end.
        let first = kept.is_none();
        tokio::select! {
            () = cancel.cancelled() => {}
            changed = contact.changed(), if first => changed.context("the store ended")?,
            () = tokio::time::sleep(REMEMBER), if !first => {}
        }
    }
}

/// What was told of etcd last.
#[derive(PartialEq)]
enum Told {
    Nothing,
    Held(String),
    /// With what, and when.
    Lost(StoreError, Instant),
}

/// Tells in the log how etcd is, until cancelled: every change, and what goes on once a minute.
pub(super) async fn tell(store: EtcdStore, cancel: CancellationToken) -> Result<()> {
    let mut contact = store.contact();
    let mut told = Told::Nothing;
    loop {
        let now = contact.borrow_and_update().clone();
        match now {
            Contact::Trying => {}
            Contact::Held(endpoint) => {
                if !matches!(&told, Told::Held(before) if *before == endpoint) {
                    info!("the registry is in etcd at {endpoint}");
                }
                told = Told::Held(endpoint);
            }
            Contact::Lost { since, error: reason } => {
                let again =
                    matches!(&told, Told::Lost(before, at) if *before == reason && at.elapsed() < COMPLAIN);
                if !again {
                    let seconds = since.elapsed().as_secs();
                    if matches!(reason, StoreError::Damaged(_)) {
                        error!("the registry is refused: {reason}; units go on, and nothing can be changed");
                    } else {
                        warn!(
                            "no registry for {seconds} s: {reason}; units go on, and nothing can be changed until then"
                        );
                    }
                    told = Told::Lost(reason, Instant::now());
                }
            }
        }
        let repeat = match &told {
            Told::Lost(_, at) => Some(*at + COMPLAIN),
            Told::Nothing | Told::Held(_) => None,
        };
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            changed = contact.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            () = tokio::time::sleep_until(repeat.unwrap_or_else(Instant::now)), if repeat.is_some() => {}
        }
    }
}
