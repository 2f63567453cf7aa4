//! The upload log as the tier has it: written under a lock by those that put, and synced without holding them up.
//!
//! One syncs at a time: what another has written is synced once the sync that began before it was written has ended and one more has,
//! too. So whoever returns from [`Logged::sync`] without having synced anything knows that the disk has all that it wrote.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_plane::SequenceHash;
use parking_lot::{Mutex, MutexGuard};

use super::ObjectTier;
use super::log::{Owed, UploadLog};
use crate::clock::BootTime;
use crate::host::RegisteredLayout;

/// See the head of this file.
pub(super) struct Logged {
    log: Mutex<UploadLog>,
    syncing: Mutex<()>,
    failures: AtomicU64,
}

impl Logged {
    /// Opens or makes the log in `folder`.
    pub fn open(folder: &Path, clock: fn() -> BootTime) -> io::Result<Self> {
        let log = Mutex::new(UploadLog::open(folder, clock)?);
        Ok(Self { log, syncing: Mutex::default(), failures: AtomicU64::new(0) })
    }

    /// The log itself.
    pub fn lock(&self) -> MutexGuard<'_, UploadLog> {
        self.log.lock()
    }

    /// How often it could not be written or synced.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Counts what failed, and says so where it was tried: not with each record that comes while the next try is not due yet.
    fn note(&self, result: io::Result<()>, what_for: &str) {
        if let Err(error) = result {
            self.failures.fetch_add(1, Ordering::Relaxed);
            if error.kind() != io::ErrorKind::WouldBlock {
                tracing::warn!(%error, "the upload log cannot be {what_for}");
            }
        }
    }

    /// All that was written before this call is on the disk. A log that could not be written, or synced, is written anew.
    pub fn sync(&self) -> io::Result<()> {
        self.sync_by(File::sync_data)
    }

    fn sync_by(&self, sync: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
        let _one_at_a_time = self.syncing.lock();
        let unsynced = self.log.lock().take_unsynced()?;
        let Some(file) = unsynced else { return Ok(()) };
        if let Err(error) = sync(&file) {
            // Its pages count as clean now: a second sync would succeed without them.
            self.log.lock().distrust().map_err(|_| error)?;
        }
        Ok(())
    }
}

impl ObjectTier {
    /// A block is to be uploaded. Where the log cannot say so, a restart forgets it.
    pub(super) fn log_added(&self, layout: &RegisteredLayout, owed: Owed) {
        let (Some(logged), Some(namespace)) = (&self.log, self.namespaces.get(layout.namespace.0)) else { return };
        let added = {
            let mut log = logged.lock();
            let number = log.number(namespace, &layout.layout);
            log.add(Owed { layout: number, ..owed })
        };
        logged.note(added, "written; a restart forgets this upload");
    }

    /// Blocks are uploaded, or will not be. Where the log cannot say so, a restart uploads them again.
    pub(super) fn log_done(&self, layout: &RegisteredLayout, group: u16, hashes: impl Iterator<Item = SequenceHash>) {
        let (Some(logged), Some(namespace)) = (&self.log, self.namespaces.get(layout.namespace.0)) else { return };
        let done = {
            let mut log = logged.lock();
            let number = log.number(namespace, &layout.layout);
            // Each, even where the file cannot be written: what is known here is what a new file will say.
            let mut all = Ok(());
            for hash in hashes {
                let one = log.done(number, group, hash);
                all = all.and(one);
            }
            all.and_then(|()| log.compact_if_grown())
        };
        logged.note(done, "written; a restart uploads these blocks again");
    }

    /// What was written to the log is on the disk.
    pub(super) fn sync_log(&self) -> io::Result<()> {
        self.log.as_ref().map_or(Ok(()), Logged::sync)
    }

    pub(super) fn sync_log_or_say(&self) {
        if let Some(logged) = &self.log {
            logged.note(logged.sync(), "synced");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::layout::{BlockKind, DimensionOrder, LayerGroup, Layout, Shard};

    /// A tick took what was to be synced, and synced it; a deletion came meanwhile, found nothing to sync, and was answered before its
    /// record was on the disk.
    #[test]
    fn whoever_finds_another_syncing_waits_for_it() {
        let folder = std::env::temp_dir().join(format!("kvstore-syncs-{}", std::process::id()));
        let logged = Arc::new(Logged::open(&folder, || BootTime(0)).unwrap());
        let group = LayerGroup {
            kind: BlockKind::Attention,
            layers: 1,
            planes: 1,
            heads: 1,
            head_bytes: 16,
            order: DimensionOrder::Opaque,
        };
        let layout = Layout {
            model: b"m".to_vec(),
            weights_digest: vec![],
            dtype: "bytes".into(),
            block_tokens: 1,
            groups: vec![group],
            shard: Shard { index: 0, count: 1 },
            extra: vec![],
        };
        logged.lock().number("default", &layout);
        let (begun, has_begun) = mpsc::channel();
        let (answered, is_answered) = mpsc::channel();
        let slow = std::thread::spawn({
            let logged = Arc::clone(&logged);
            move || {
                let sync = |file: &File| {
                    begun.send(()).unwrap();
                    let early = is_answered.recv_timeout(Duration::from_millis(300));
                    assert!(early.is_err(), "answered while the record was not on the disk");
                    file.sync_data()
                };
                logged.sync_by(sync).unwrap();
            }
        });
        has_begun.recv().unwrap();
        logged.sync().unwrap();
        let _ = answered.send(());
        slow.join().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
