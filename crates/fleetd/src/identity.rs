//! What makes this machine one of a cluster: its key and certificate and the cluster's CA, kept in the state directory; and joining, to get
//! them.
//!
//! The key is made here and never leaves the machine. It is stored before the machine joins, so that a join whose answer got lost is repeated
//! with the same key, which the server knows then.

use crate::config::Config;
use anyhow::{Context, Result, bail};
use fleet_cluster::model::MachineId;
use fleet_link::{KeepAlive, ca::Identity, ca::MachineKey, dial, token::Token};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io, sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use zeroize::Zeroizing;

/// How long to wait before trying to join again, doubled up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A token is one line.
const MAX_TOKEN_FILE: u64 = 4096;

/// Writes a file that only its owner can read, in a directory that is made if need be; it is there whole or not at all.
pub(crate) fn write_file(directory: &Path, name: &str, text: &str) -> Result<()> {
    let path = directory.join(name);
    let write = || -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let new = directory.join(format!(".{name}.new"));
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        fs::File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("unable to write {}", path.display()))
}

/// The files of an identity.
#[derive(Clone, Debug)]
pub struct IdentityFiles {
    directory: PathBuf,
}

impl IdentityFiles {
    /// Those in a state directory.
    pub fn new(state_directory: &Path) -> Self {
        IdentityFiles { directory: state_directory.join("identity") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn read(&self, name: &str) -> Result<Option<Zeroizing<String>>> {
        match fs::read_to_string(self.path(name)) {
            Ok(text) => Ok(Some(Zeroizing::new(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("unable to read {}", self.path(name).display())),
        }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        write_file(&self.directory, name, text)
    }

    /// The identity, if the machine has joined.
    pub fn load(&self) -> Result<Option<Identity>> {
        let (root, certificate, key) =
            (self.read("ca.pem")?, self.read("machine.pem")?, self.read("machine.key")?);
        let (Some(root), Some(certificate), Some(key)) = (root, certificate, key) else { return Ok(None) };
        let identity = Identity::from_pem(&root, &certificate, &key).with_context(|| {
            format!(
                "the identity in {} can't be used; remove that directory to join anew with a token",
                self.directory.display()
            )
        })?;
        Ok(Some(identity))
    }

    fn store(&self, identity: &Identity) -> Result<()> {
        self.write("ca.pem", &identity.root().to_pem())?;
        self.write("machine.pem", &identity.certificate_pem())
    }

    fn key(&self) -> Result<MachineKey> {
        if let Some(text) = self.read("machine.key")? {
            return MachineKey::from_pem(&text)
                .with_context(|| format!("{} can't be used", self.path("machine.key").display()));
        }
        let key = MachineKey::generate().context("unable to make a key")?;
        self.write("machine.key", &key.to_pem())?;
        Ok(key)
    }

    /// Stores each renewed certificate, until no more come.
    pub async fn keep_stored(self, mut renewed: watch::Receiver<Arc<Identity>>) {
        while renewed.changed().await.is_ok() {
            let identity = renewed.borrow_and_update().clone();
            match self.store(&identity) {
                Ok(()) => info!("stored this machine's renewed certificate"),
                Err(error) => warn!("{error:#}; after a restart the certificate is renewed again"),
            }
        }
    }
}

fn token(config: &Config) -> Result<Token> {
    let text = match (&config.join_token, &config.join_token_file) {
        (Some(token), _) => Zeroizing::new(token.expose().to_owned()),
        (None, Some(file)) => {
            let read = || -> io::Result<String> {
                let mut text = String::new();
                io::Read::read_to_string(
                    &mut io::Read::take(fs::File::open(file)?, MAX_TOKEN_FILE),
                    &mut text,
                )?;
                Ok(text)
            };
            Zeroizing::new(read().with_context(|| format!("unable to read {}", file.display()))?)
        }
        (None, None) => bail!(
            "this machine has not joined yet: set join_token (fleetctl join-token create, on a server, makes one)"
        ),
    };
    Token::parse(text.trim()).context("join_token")
}

/// The identity of this machine: what it has from before, or what joining gives it.
pub async fn obtain(
    config: &Config,
    machine: &MachineId,
    cancel: &CancellationToken,
) -> Result<Option<Identity>> {
    let files = IdentityFiles::new(&config.state_directory);
    if let Some(identity) = files.load()? {
        if identity.certificate().machine != *machine {
            bail!(
                "this machine joined as {}, but its ID is {machine} now; remove {} to join anew",
                identity.certificate().machine,
                files.directory.display()
            );
        }
        return Ok(Some(identity));
    }
    let token = token(config)?;
    let mut pause = RETRY.0;
    loop {
        let joined = tokio::select! {
            () = cancel.cancelled() => return Ok(None),
            joined = dial::join(&config.join, &token, machine, files.key()?, KeepAlive::default()) => joined,
        };
        match joined {
            Ok(identity) => {
                files.store(&identity)?;
                info!("joined the cluster {}", identity.root().fingerprint());
                return Ok(Some(identity));
            }
            Err(error) if error.is_refusal() => return Err(error).context("unable to join"),
            Err(error) => warn!("unable to join: {error}; trying again in {} s", pause.as_secs()),
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(None),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(RETRY.1);
    }
}
