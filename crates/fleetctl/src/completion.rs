//! Completion in shells: the script that a shell reads calls fleetctl itself, which knows its commands and flags, and asks the
//! cluster for units and machines.
//!
//! The cluster is the one that the environment names (FLEETCTL_ENDPOINT and so on). It gets a second to answer, and what goes
//! wrong is not said: somebody is typing.
use crate::argv::{self, Invocation};
use crate::cli::{self, Cli};
use crate::context::{Context, print};
use anyhow::{Context as _, Result};
use clap::Parser;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter};
use clap_complete::env::{CompleteEnv, Shells};
use std::ffi::OsStr;
use std::time::Duration;

/// The variable by which the script says that words are to be completed, and for which shell.
const VARIABLE: &str = "FLEETCTL_COMPLETE";
/// For how long the cluster may keep somebody waiting who types.
const PATIENCE: Duration = Duration::from_secs(1);

/// The script that a shell is to read.
pub(crate) fn script(shell: clap_complete::Shell) -> Result<i32> {
    let shell = shell.to_string();
    let shells = Shells::builtins();
    let shell = shells.completer(&shell).with_context(|| format!("there is no completion for {shell}"))?;
    let mut script = Vec::new();
    shell.write_registration(VARIABLE, "fleetctl", "fleetctl", "fleetctl", &mut script)?;
    print(&script)?;
    Ok(0)
}

/// Completes words and ends, if the shell asks for that. To be called before anything is printed.
pub(crate) fn answer() {
    CompleteEnv::with_factory(cli::definition).var(VARIABLE).complete();
}

/// For units that the cluster knows.
pub(crate) fn units() -> ArgValueCompleter {
    ArgValueCompleter::new(known_units)
}

/// For units that the cluster knows, and files.
pub(crate) fn units_and_files() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let mut all = known_units(current);
        all.extend(PathCompleter::file().complete(current));
        all
    })
}

/// For machines, by their IDs.
pub(crate) fn machines() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let machines = ask(async |context| context.client.machines().await.unwrap_or_default());
        let named = machines.unwrap_or_default().into_iter().map(|machine| {
            let address = Some(machine.primary_ip.into()).filter(|_| !machine.id.is_empty());
            CompletionCandidate::new(machine.id).help(address)
        });
        named.filter(|it| begins(it.get_value(), current)).collect()
    })
}

fn known_units(current: &OsStr) -> Vec<CompletionCandidate> {
    let units = ask(async |context| context.client.units().await.unwrap_or_default()).unwrap_or_default();
    let named = units.into_iter().map(|unit| CompletionCandidate::new(unit.name));
    named.filter(|it| begins(it.get_value(), current)).collect()
}

fn begins(name: &OsStr, current: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(current.as_encoded_bytes())
}

/// Asks the cluster. Not through ssh: that could ask for a password.
fn ask<T>(question: impl AsyncFnOnce(Context) -> T) -> Option<T> {
    let variable = |name: &str| std::env::var(name).ok();
    let words = ["list-units".to_owned()];
    let Ok(Invocation::Run(line)) = argv::normalise(&cli::definition(), &words, variable, |_| {}) else {
        return None;
    };
    let mut globals = Cli::try_parse_from(line).ok()?.globals;
    if !globals.tunnel.is_empty() {
        return None;
    }
    globals.request_timeout = globals.request_timeout.min(PATIENCE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(async {
        let context = Context::new(globals).ok()?;
        tokio::time::timeout(PATIENCE, question(context)).await.ok()
    })
}
