//! The servers that an agent was told of, kept in the state directory: after a restart it finds the cluster through any of them, also when those
//! that fleet.conf names are gone.

use crate::identity::write_file;
use anyhow::{Context, Result};
use fleet_link::dial::Address;
use std::path::{Path, PathBuf};
use std::{fs, io};
use tokio::sync::watch;
use tracing::{debug, warn};

/// The file: one address on each line.
const FILE: &str = "servers";
/// More than all addresses take.
const MAX_FILE: u64 = 1 << 20;

/// Those that were known last. What can't be read is no reason not to start: there are those that fleet.conf names.
pub(super) fn recall(state_directory: &Path) -> Vec<Address> {
    let path = state_directory.join(FILE);
    let read = || -> io::Result<String> {
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(fs::File::open(&path)?, MAX_FILE), &mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) => text.lines().filter_map(|line| line.parse().ok()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            warn!("unable to read {}: {error}; going by what fleet.conf says", path.display());
            Vec::new()
        }
    }
}

/// Stores them whenever they change, until no more are told.
pub(super) async fn keep(state_directory: PathBuf, mut servers: watch::Receiver<Vec<Address>>) -> Result<()> {
    while servers.changed().await.is_ok() {
        let known = servers.borrow_and_update().clone();
        debug!("the servers are {known:?}");
        let text: String = known.iter().map(|address| format!("{address}\n")).collect();
        let directory = state_directory.clone();
        let written = tokio::task::spawn_blocking(move || write_file(&directory, FILE, &text)).await;
        if let Err(error) = written.context("storing where the servers are")? {
            warn!("{error:#}; after a restart only those are known that fleet.conf names");
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_told_is_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(recall(directory.path()), []);
        let (told, servers) = watch::channel(Vec::new());
        let keeping = tokio::spawn(keep(directory.path().to_owned(), servers));
        let all = vec![Address::new("10.0.0.1", 4919), Address::new("fd00::1", 5000)];
        told.send_replace(all.clone());
        drop(told);
        keeping.await.unwrap().unwrap();
        assert_eq!(recall(directory.path()), all);
        fs::write(directory.path().join(FILE), "10.0.0.1:4919\nno address!\n").unwrap();
        assert_eq!(recall(directory.path()), all[..1]);
        fs::write(directory.path().join(FILE), b"\xff\xfe").unwrap();
        assert_eq!(recall(directory.path()), []);
    }
}
