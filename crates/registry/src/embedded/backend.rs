//! What redb writes through: the file, watched for errors, and a read-only stand-in for it.
use super::error::io_text;
use redb::{BackendError, StorageBackend};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::Bound,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// What went wrong with the file since it was opened. redb tells only that something did, not whether
/// it was a sync.
#[derive(Debug, Default)]
pub(super) struct Health {
    sync_failed: AtomicBool,
    reason: Mutex<Option<String>>,
    #[cfg(test)]
    pub(super) faults: faults::Faults,
}

impl Health {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The first error since [`forget`](Self::forget).
    pub(super) fn reason(&self) -> Option<String> {
        self.lock().clone()
    }
    /// Whether a sync failed: what the kernel holds of the file may then never reach the disk.
    pub(super) fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }
    /// A new beginning.
    pub(super) fn forget(&self) {
        self.sync_failed.store(false, Ordering::Release);
        *self.lock() = None;
    }
    fn note<T>(&self, result: io::Result<T>, sync: bool) -> io::Result<T> {
        if let Err(e) = &result {
            if sync {
                self.sync_failed.store(true, Ordering::Release);
            }
            self.lock().get_or_insert_with(|| io_text(e));
        }
        result
    }
}

/// The file, with its errors noted in a [`Health`].
#[derive(Debug)]
pub(super) struct Watched {
    file: File,
    health: Arc<Health>,
}

impl Watched {
    pub(super) fn new(file: File, health: Arc<Health>) -> Self {
        Watched { file, health }
    }
}

// It has no locks for redb: they are taken before redb sees the file (see `disk`).
impl StorageBackend for Watched {
    fn len(&self) -> io::Result<u64> {
        self.health.note(self.file.metadata().map(|m| m.len()), false)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.health.note(self.file.read_exact_at(out, offset), false)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.health.note(self.health.faults.hit(&faults::Call::SetLen(len)), false)?;
        self.health.note(self.file.set_len(len), false)
    }
    fn sync_data(&self) -> io::Result<()> {
        #[cfg(test)]
        self.health.note(self.health.faults.hit(&faults::Call::Sync), true)?;
        self.health.note(self.file.sync_data(), true)
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.health.note(self.health.faults.hit(&faults::Call::Write(offset, data)), false)?;
        self.health.note(self.file.write_all_at(data, offset), false)
    }
}

const BLOCK: usize = 4096;

/// A file that is only read: what redb writes stays in memory. Serves to look into a file that may be
/// damaged without changing it.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    length: u64,
    /// Bytes of the file behind this are gone, even where it grew again.
    shortest: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

impl Overlay {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Overlay {
            file,
            written: Mutex::new(Written { length, shortest: length, blocks: BTreeMap::new() }),
        })
    }

    /// Takes a file that was not closed cleanly as if it had been, with the last or, when `previous`,
    /// the last but one of the two states redb keeps. Only for salvaging, where every record is checked.
    pub(super) fn pretend_closed(&self, previous: bool) -> io::Result<()> {
        // Of redb's file header, byte 9: bit 0 tells the newer of the two states, bit 1 that the file
        // was not closed, bit 2 that states were written in two phases, so that the newer is whole.
        const FLAGS: u64 = 9;
        let mut flags = [0];
        self.read(FLAGS, &mut flags)?;
        flags[0] = (flags[0] & !0b10) | 0b100;
        if previous {
            flags[0] ^= 1;
        }
        self.write(FLAGS, &flags)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn base(&self, file: &File, block: u64) -> io::Result<Box<[u8; BLOCK]>> {
        let mut data = Box::new([0; BLOCK]);
        let start = block * BLOCK as u64;
        let there = self.shortest.saturating_sub(start).min(BLOCK as u64) as usize;
        file.read_exact_at(&mut data[..there], start)?;
        Ok(data)
    }
}

/// The pieces of a byte range, by block: block, offset in it, offset in the range, length.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let at = offset + done as u64;
            let within = (at % BLOCK as u64) as usize;
            let piece = (BLOCK - within).min(length - done);
            let item = (at / BLOCK as u64, within, done, piece);
            done += piece;
            item
        })
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().length)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (block, within, at, length) in pieces(offset, out.len()) {
            let out = &mut out[at..at + length];
            match written.blocks.get(&block) {
                Some(data) => out.copy_from_slice(&data[within..within + length]),
                None => {
                    let data = written.base(&self.file, block)?;
                    out.copy_from_slice(&data[within..within + length]);
                }
            }
        }
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.lock();
        if len < written.length {
            written.blocks.split_off(&len.div_ceil(BLOCK as u64));
            let (block, within) = (len / BLOCK as u64, (len % BLOCK as u64) as usize);
            if let Some(data) = written.blocks.get_mut(&block) {
                data[within..].fill(0);
            }
        }
        written.length = len;
        written.shortest = written.shortest.min(len);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.lock();
        for (block, within, at, length) in pieces(offset, data.len()) {
            if !written.blocks.contains_key(&block) {
                let base = written.base(&self.file, block)?;
                written.blocks.insert(block, base);
            }
            if let Some(block) = written.blocks.get_mut(&block) {
                block[within..within + length].copy_from_slice(&data[at..at + length]);
            }
        }
        written.length = written.length.max(offset + data.len() as u64);
        Ok(())
    }
    // The caller holds the locks; redb asks for some when several handles may read.
    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }
    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }
    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// Makes the file fail on purpose, and remembers what was done to it.
#[cfg(test)]
pub(super) mod faults {
    use std::{io, sync::Mutex};

    /// A call that changes the file.
    pub(crate) enum Call<'a> {
        Write(u64, &'a [u8]),
        SetLen(u64),
        Sync,
    }

    /// A call as it was made.
    #[derive(Clone, Debug)]
    pub(crate) enum Made {
        Write(u64, Vec<u8>),
        SetLen(u64),
        Sync,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Kind {
        /// Writes and changes of the length.
        Write,
        Sync,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Faults {
        fail: Mutex<Option<(Kind, u64, io::ErrorKind)>>,
        record: Mutex<Option<Vec<Made>>>,
    }

    impl Faults {
        /// After `good` more calls of this kind all fail.
        pub(crate) fn fail(&self, kind: Kind, good: u64, error: io::ErrorKind) {
            *self.fail.lock().unwrap() = Some((kind, good, error));
        }
        pub(crate) fn heal(&self) {
            *self.fail.lock().unwrap() = None;
        }
        /// From now on all calls are remembered.
        pub(crate) fn record(&self) {
            *self.record.lock().unwrap() = Some(Vec::new());
        }
        /// How many calls have been remembered.
        pub(crate) fn recorded(&self) -> usize {
            self.record.lock().unwrap().as_ref().unwrap().len()
        }
        pub(crate) fn take_record(&self) -> Vec<Made> {
            self.record.lock().unwrap().take().unwrap()
        }
        pub(super) fn hit(&self, call: &Call<'_>) -> io::Result<()> {
            let kind = if matches!(call, Call::Sync) { Kind::Sync } else { Kind::Write };
            match &mut *self.fail.lock().unwrap() {
                Some((k, 0, error)) if *k == kind => return Err((*error).into()),
                Some((k, good, _)) if *k == kind => *good -= 1,
                _ => {}
            }
            if let Some(record) = &mut *self.record.lock().unwrap() {
                record.push(match call {
                    Call::Write(offset, data) => Made::Write(*offset, data.to_vec()),
                    Call::SetLen(length) => Made::SetLen(*length),
                    Call::Sync => Made::Sync,
                });
            }
            Ok(())
        }
    }
}
