//! Why a store can't be opened, checked or repaired, in words that say what to do.
use std::{fmt, io, path::PathBuf, time::Duration};

/// Why the store can't be opened; Display says what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum OpenError {
    /// The system refuses something.
    #[error("can't {action} {}: {}", path.display(), io_text(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// Another process, or another part of this one, holds it open.
    #[error(
        "the registry {} is in use by another fleetd: stop that one first, or give this one a directory of its own",
        file.display()
    )]
    InUse { file: PathBuf },
    /// There is nothing to check or repair.
    #[error("there is no registry in {}", directory.display())]
    None { directory: PathBuf },
    /// There was a registry, and it is gone.
    #[error("{}", missing(directory, *backup))]
    Missing { directory: PathBuf, backup: Option<Duration> },
    /// The file is not what fleet wrote.
    #[error("the registry {} is damaged: {reason}; run `fleetd registry repair {}`",
        directory.join("registry.redb").display(), directory.display())]
    Damaged { directory: PathBuf, reason: String },
    /// A newer fleetd wrote it.
    #[error(
        "the registry {} has format {found}, and this fleetd knows formats up to {known}: run the newer fleetd that wrote it",
        file.display()
    )]
    NewerFormat { file: PathBuf, found: u32, known: u32 },
    /// Nothing can be made of what is there.
    #[error(
        "the registry {} can't be repaired: {reason}; put back a copy of the file, or, to begin anew with an \
         empty registry, move everything named registry.* out of {}",
        directory.join("registry.redb").display(), directory.display()
    )]
    Unrepairable { directory: PathBuf, reason: String },
}

impl OpenError {
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| OpenError::Io { action, path, source }
    }
}

fn missing(directory: &std::path::Path, backup: Option<Duration>) -> String {
    let (shown, file) = (directory.display(), directory.join("registry.redb"));
    let restore = match backup {
        Some(age) => {
            format!("run `fleetd registry repair {shown}` to restore the backup, which is {} old", Age(age))
        }
        None => "there is no backup to restore".to_owned(),
    };
    format!(
        "the registry {} is missing, though there was one: put the file back, or {restore}; to begin anew with \
         an empty registry, remove registry.made and registry.backup from {shown}",
        file.display()
    )
}

/// What an I/O error means to the user.
pub(super) fn io_text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("disk full: free some space ({error})")
        }
        _ => error.to_string(),
    }
}

/// A duration as people say it: `3 h`, `12 min`.
pub(super) struct Age(pub(super) Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            s @ 0..=119 => write!(f, "{s} s"),
            s @ 120..=7199 => write!(f, "{} min", s / 60),
            s @ 7200..=172_799 => write!(f, "{} h", s / 3600),
            s => write!(f, "{} days", s / 86_400),
        }
    }
}
