//! The end of a process by SIGINT, SIGTERM or SIGHUP takes its clusters with it.
//!
//! The first cluster that a process owns starts a thread that waits for these signals, takes down
//! what is registered then, and lets the signal do what it would have done.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static OWNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// Held for reading while something is made, for ever for writing once a signal has come: nothing
/// new appears behind the back of the thread that takes down.
static MAKING: RwLock<()> = RwLock::new(());
static WATCHER: OnceLock<Result<(), String>> = OnceLock::new();

/// Puts a cluster under the care of the signal thread.
pub(crate) fn register(name: &str) -> Result<()> {
    let started = WATCHER.get_or_init(|| watch().map_err(|error| format!("{error:#}")));
    started.clone().map_err(anyhow::Error::msg)?;
    owned().insert(name.to_owned());
    Ok(())
}

/// Takes a cluster out of the care of the signal thread.
pub(crate) fn unregister(name: &str) {
    owned().remove(name);
}

/// To be held while processes are started or mounts made.
pub(crate) fn making() -> RwLockReadGuard<'static, ()> {
    MAKING.read().unwrap_or_else(PoisonError::into_inner)
}

fn owned() -> MutexGuard<'static, BTreeSet<String>> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
    std::thread::Builder::new()
        .name("testbed-signals".into())
        .spawn(move || {
            let Some(signal) = signals.forever().next() else { return };
            let _nothing_new = MAKING.write().unwrap_or_else(PoisonError::into_inner);
            let names: Vec<String> = owned().iter().cloned().collect();
            for name in names {
                if let Err(error) = crate::cluster::remove(&name) {
                    eprintln!("fleet-testbed: {name}: {error:#}");
                }
            }
            // Does not return for these signals.
            if signal_hook::low_level::emulate_default_handler(signal).is_err() {
                std::process::exit(128 + signal);
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}
