//! A registry in etcd: its store, made from fleet.conf; which registry it was, remembered in the state directory; and how it is, told in
//! the log.

use crate::config::EtcdConfig;
use crate::identity::write_file;
use crate::notify::Notifier;
use anyhow::{Context, Result};
use fleet_registry::etcd::{Contact, Identity};
use fleet_registry::{EtcdStore, StoreError};
use serde::{Deserialize, Serialize};
use std::mem::discriminant;
use std::path::{Path, PathBuf};
use std::{fs, io, sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// The file with the [`Identity`] of the registry.
pub(super) const FILE: &str = "etcd.json";
/// How often it is written while the registry changes: it only has to be new enough to notice a backup that was put back.
const REMEMBER: Duration = Duration::from_secs(60);
/// How often it is said that etcd can't be reached.
const COMPLAIN: Duration = Duration::from_secs(60);

/// Makes the store, and begins to look for etcd.
pub(super) fn open(config: &EtcdConfig, state_directory: &Path) -> Result<EtcdStore> {
    open_as(config, recall(state_directory, &config.key_prefix)?)
}

/// The same; `last` is the registry that it has to be.
pub(super) fn open_as(config: &EtcdConfig, last: Option<Identity>) -> Result<EtcdStore> {
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
            compaction: config.compaction,
        },
        last,
    )?;
    Ok(store)
}

/// What is kept of a registry: which it is, and below which prefix.
#[derive(Serialize, Deserialize)]
struct Remembered {
    /// None in files of older versions.
    #[serde(default)]
    prefix: Option<String>,
    #[serde(flatten)]
    identity: Identity,
}

/// What was last known of the registry below a prefix. Another prefix is another registry, on purpose, and not one that was exchanged.
fn recall(state_directory: &Path, prefix: &str) -> Result<Option<Identity>> {
    let path = state_directory.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("unable to read {}", path.display())),
    };
    let remembered: Remembered = serde_json::from_slice(&bytes).with_context(|| {
        format!("{} can't be read; if etcd still has the registry it had, remove that file", path.display())
    })?;
    match remembered.prefix {
        Some(before) if before != prefix => {
            warn!(
                "etcd_key_prefix is {prefix}, and was {before}: that is another registry; units that it does not know are stopped"
            );
            Ok(None)
        }
        _ => Ok(Some(remembered.identity)),
    }
}

/// Keeps in a file which registry this is, as far as it is known, until cancelled.
pub(super) async fn remember(
    store: EtcdStore,
    prefix: String,
    state_directory: PathBuf,
    cancel: CancellationToken,
) -> Result<()> {
    let mut kept: Option<Identity> = None;
    let mut contact = store.contact();
    let mut broken = false;
    loop {
        let identity = store.identity();
        if let Some(known) = identity.clone().filter(|_| identity != kept) {
            let remembered = Remembered { prefix: Some(prefix.clone()), identity: known };
            let text =
                serde_json::to_string(&remembered).context("encoding what is known of the registry")?;
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

/// Tells in the log how etcd is, until cancelled: every change, and what goes on once a minute; and the service manager, whether
/// fleetd has started yet or not.
pub(super) async fn tell(
    mut contact: watch::Receiver<Contact>,
    notifier: Arc<Notifier>,
    cancel: CancellationToken,
) -> Result<()> {
    let mut told = Told::Nothing;
    loop {
        let now = contact.borrow_and_update().clone();
        match now {
            Contact::Trying => {}
            Contact::Held(endpoint) => {
                if !matches!(&told, Told::Held(before) if *before == endpoint) {
                    info!("the registry is in etcd at {endpoint}");
                }
                if matches!(told, Told::Lost(..)) {
                    notifier.status("serving");
                }
                told = Told::Held(endpoint);
            }
            Contact::Lost { since, error: reason } => {
                // The same trouble has many words, of several members in turn.
                let again = matches!(&told, Told::Lost(before, at)
                    if discriminant(before) == discriminant(&reason) && at.elapsed() < COMPLAIN);
                if !again {
                    let seconds = since.elapsed().as_secs();
                    if matches!(reason, StoreError::Damaged(_)) {
                        error!("the registry is refused: {reason}; units go on, and nothing can be changed");
                    } else {
                        warn!(
                            "no registry for {seconds} s: {reason}; units go on, and nothing can be changed until then"
                        );
                    }
                    notifier.status(&format!("no registry: {reason}"));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn another_prefix_is_another_registry() {
        let directory = tempfile::tempdir().unwrap();
        let recalled = |prefix| recall(directory.path(), prefix).unwrap().map(|known| known.revision);
        assert_eq!(recalled("/a/"), None);
        let identity = |more: &str| {
            let text = format!(r#"{{{more}"registry":"r","etcd_cluster":"c","revision":7}}"#);
            fs::write(directory.path().join(FILE), text).unwrap();
        };
        identity(r#""prefix":"/a/","#);
        assert_eq!(recalled("/a/"), Some(7));
        assert_eq!(recalled("/b/"), None);
        // As the version before wrote it.
        identity("");
        assert_eq!(recalled("/b/"), Some(7));
        fs::write(directory.path().join(FILE), "{").unwrap();
        let error = format!("{:#}", recall(directory.path(), "/a/").unwrap_err());
        assert!(error.contains("etcd.json can't be read; if etcd still has the registry it had"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_etcd_that_is_not_there_is_told_once_a_minute() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let lines = || String::from_utf8(std::mem::take(&mut *log.0.lock().unwrap())).unwrap();
        let (contact, seen) = watch::channel(Contact::Trying);
        let cancel = CancellationToken::new();
        let telling = tokio::spawn(tell(seen, Arc::default(), cancel.clone()));
        let second = Duration::from_secs(1);
        tokio::time::sleep(second).await;
        assert_eq!(lines(), "");
        let refused = || StoreError::Unavailable("http://10.0.0.1:2379: connection refused".into());
        let since = Instant::now();
        // Every attempt fails, not each in the same words.
        for attempt in 0..150 {
            let error = if attempt % 2 == 0 { refused() } else { StoreError::Unavailable("reset".into()) };
            contact.send_replace(Contact::Lost { since, error });
            tokio::time::sleep(second).await;
        }
        let told = lines();
        assert_eq!(told.matches("no registry for").count(), 3, "{told}");
        assert!(told.contains("http://10.0.0.1:2379: connection refused"), "{told}");
        assert!(told.contains("no registry for 60 s"), "{told}");
        // Another reason is told at once, and so is the end.
        contact.send_replace(Contact::Lost { since, error: StoreError::Denied("wrong password".into()) });
        tokio::time::sleep(second).await;
        assert!(lines().contains("wrong password"));
        contact.send_replace(Contact::Held("http://10.0.0.1:2379".into()));
        tokio::time::sleep(second * 200).await;
        let told = lines();
        assert!(
            told.contains("the registry is in etcd at http://10.0.0.1:2379") && told.lines().count() == 1,
            "{told}"
        );
        cancel.cancel();
        telling.await.unwrap().unwrap();
    }
}
