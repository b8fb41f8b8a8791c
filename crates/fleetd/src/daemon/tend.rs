//! `fleetd registry`: what is done with a registry while its server is stopped.

use super::{etcd, moved};
use crate::config::{Config, EtcdConfig, RegistryCommand};
use crate::identity::write_file;
use crate::server::transfer::{self, Archive, MAX_FILE};
use anyhow::{Context, Result, bail};
use fleet_registry::{EmbeddedStore, Store, embedded};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What etcd is given for an answer at the least. A server that is impatient asks again; here it would be the end of the command.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name for standard input and output.
const STANDARD: &str = "-";

pub(super) fn run(command: &RegistryCommand, config: &Config) -> Result<()> {
    let at = |directory: &Option<PathBuf>| {
        let configured = || config.state_directory.clone();
        directory.clone().unwrap_or_else(configured)
    };
    match command {
        RegistryCommand::Check { directory } => {
            let report = embedded::check(&at(directory))?;
            println!("{report}");
            if !report.is_sound() {
                bail!("the registry is damaged; `fleetd registry repair` saves what can be saved");
            }
        }
        RegistryCommand::Repair { directory } => println!("{}", embedded::repair(&at(directory))?),
        RegistryCommand::Export { file } => with_registry(config, Work::Export(file))?,
        RegistryCommand::Import { file, replace } => {
            let text = read(file)?;
            let archive = transfer::read(&text).with_context(|| shown(file))?;
            with_registry(config, Work::Import(archive, *replace))?;
        }
    }
    Ok(())
}

enum Work<'a> {
    Export(&'a Path),
    Import(Archive, bool),
}

/// Does it with the registry that the configuration names.
fn with_registry(config: &Config, work: Work<'_>) -> Result<()> {
    if !config.join.is_empty() {
        bail!("this machine is an agent (join is set): its servers have the registry");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if !config.embedded_registry() {
            let request_timeout = config.etcd.request_timeout.max(PATIENCE);
            let patient = EtcdConfig { request_timeout, ..config.etcd.clone() };
            let store = match &work {
                Work::Export(_) => etcd::open(&patient, &config.state_directory)?,
                // Which one was there before does not matter to what it is to become.
                Work::Import(..) => etcd::open_as(&patient, None)?,
            };
            return work.with(&store).await;
        }
        if matches!(work, Work::Export(_)) && !embedded::exists(&config.state_directory) {
            bail!("there is no registry in {}", config.state_directory.display());
        }
        let imports = matches!(work, Work::Import(..));
        let store = EmbeddedStore::open(&config.state_directory)?;
        let done = work.with(&store).await;
        store.close().await;
        done?;
        if imports { moved::to_own(&config.state_directory) } else { Ok(()) }
    })
}

impl Work<'_> {
    async fn with<S: Store>(self, store: &S) -> Result<()> {
        match self {
            Work::Export(file) => {
                let (archive, wrong) = transfer::export(store).await?;
                for line in wrong {
                    eprintln!("{line}; it is in the file as it is, and can't be imported");
                }
                write(file, &archive.to_text())?;
                eprintln!(
                    "Exported {} records, the key of the cluster's CA among them: whoever reads this has the cluster",
                    archive.records.len()
                );
            }
            Work::Import(archive, replace) => {
                let done = transfer::import(store, &archive, replace).await?;
                eprintln!(
                    "The registry has the {} records of the file ({} changed)",
                    done.records, done.changed
                );
            }
        }
        Ok(())
    }
}

fn shown(file: &Path) -> String {
    if file == Path::new(STANDARD) { "standard input".to_owned() } else { file.display().to_string() }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more tells that it is too large.
    let limit = u64::try_from(MAX_FILE).unwrap_or(u64::MAX).saturating_add(1);
    let read = match file == Path::new(STANDARD) {
        true => std::io::stdin().lock().take(limit).read_to_end(&mut bytes),
        false => std::fs::File::open(file).and_then(|file| file.take(limit).read_to_end(&mut bytes)),
    };
    read.with_context(|| format!("unable to read {}", shown(file)))?;
    Ok(bytes)
}

fn write(file: &Path, text: &str) -> Result<()> {
    if file == Path::new(STANDARD) {
        let mut out = std::io::stdout().lock();
        return out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("unable to write");
    }
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is no name for a file", file.display()))?;
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    write_file(directory, name, text)
}
