//! Files that only one process holds at a time: the kernel gives them back when that process ends, in whatever way.

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Why a lock was not taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Somebody else holds this file.
    Held(PathBuf),
    /// This step failed.
    System(&'static str, Errno),
}

/// Takes the lock that stands beside a path: the file of its name and `.lock`. It is held until the returned file is closed, and stays, empty.
pub(crate) fn beside(path: &Path) -> Result<OwnedFd, LockError> {
    // Without a slash at the end, which would make the name one in that directory.
    let mut name: OsString = path.components().collect::<PathBuf>().into();
    name.push(".lock");
    let name = PathBuf::from(name);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(&name, flags, Mode::from_raw_mode(0o600))
        .map_err(|errno| LockError::System("open the lock file beside it", errno))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(LockError::Held(name)),
        Err(errno) => Err(LockError::System("lock the file beside it", errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let units = directory.path().join("units/");
        let held = beside(&units).unwrap();
        let lock = directory.path().join("units.lock");
        assert!(lock.exists());
        assert!(
            matches!(beside(&directory.path().join("units")), Err(LockError::Held(path)) if path == lock)
        );
        drop(held);
        beside(&units).unwrap();
    }
}
