//! What a collector is about to delete, said in the bucket, so that no pin rests on it.
//!
//! A collector and a daemon that pins each write first and look second. The collector writes a mark that names the packs of its
//! next batch, then looks for references that came since it looked last, then deletes. A pin writes its reference, then looks for
//! marks. So one of them sees the other: the collector spares what is referred to, or the pin waits until the batch is over and
//! looks whether its packs are still there. `docs/design/object.md` has the argument.
//!
//! A mark counts while its collector has the lease, whose epoch is in the mark's name. What a killed one left counts no longer than
//! its lease.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::Pack;
use crate::bucket::{Trouble, retried, standing};

/// Bytes of a mark at most: 256 names of 1,024 bytes, as JSON.
const MARK_BYTES_MAX: u64 = 1 << 20;
/// Marks that are looked through: one, and what collectors left that were killed, or unsure. Where there are as many, all is doomed.
const MARKS_MAX: usize = 4096;
/// How often a pin looks again.
const POLL: Duration = Duration::from_millis(50);
/// Packs that are asked for at once.
const HEADS_AT_ONCE: usize = 16;

#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
struct Mark {
    version: u32,
    /// Whole names.
    packs: Vec<String>,
}

impl ObjectTier {
    pub(super) fn collector_folder(&self) -> Path {
        self.names.root().clone().join("collector")
    }

    fn marks_folder(&self) -> Path {
        self.names.root().clone().join("doomed")
    }

    /// Says that these packs are about to go. The mark's name.
    pub(super) async fn doom(&self, epoch: u64, batch: u64, packs: &[ObjectMeta]) -> Result<Path, Trouble> {
        let deadline = Instant::now() + self.bucket.stall() * 4;
        let location = self.marks_folder().join(format!("{epoch:020}-{batch:010}"));
        let mark = Mark { version: 1, packs: packs.iter().map(|pack| pack.location.to_string()).collect() };
        let body = serde_json::to_vec(&mark).map_err(|error| Trouble::Failed(error.to_string()))?;
        let payload = || PutPayload::from(body.clone());
        match retried!(self.bucket, deadline, body.len() as u64, self.bucket.create(&location, payload())) {
            // Nobody else has this epoch: an own try whose answer was lost.
            Ok(()) | Err(Trouble::Exists) => Ok(location),
            Err(trouble) => Err(trouble),
        }
    }

    /// Deletes what collectors before this epoch left.
    pub(super) async fn forget_doomed_before(&self, epoch: u64) -> Result<(), Trouble> {
        let deadline = Instant::now() + self.bucket.stall() * 4;
        for object in self.bucket.list(&self.marks_folder(), MARKS_MAX, deadline).await? {
            if epoch_of(&object.location).is_none_or(|of| of < epoch) {
                self.bucket.delete(&object.location, deadline).await?;
            }
        }
        Ok(())
    }

    /// Waits until no collector is about to delete any of these packs, and looks whether all are still there. Those that are not
    /// are forgotten.
    pub(super) async fn until_spared(&self, packs: &[Arc<Pack>], deadline: Instant) -> Result<(), Trouble> {
        let names: HashSet<&str> = packs.iter().map(|pack| pack.location.as_ref()).collect();
        while self.is_doomed(&names, deadline).await? {
            if Instant::now() + POLL >= deadline {
                return Err(Trouble::Failed("a collector is deleting objects with these blocks".into()));
            }
            tokio::time::sleep(POLL).await;
        }
        // No collector has taken what is young.
        let old = packs.iter().filter(|pack| !self.is_young(pack.written_ms));
        let looks = old.map(async |pack| match self.bucket.head(&pack.location, deadline).await {
            Ok(meta) if meta.size == pack.bytes => Ok(true),
            Ok(_) | Err(Trouble::NotFound) => {
                self.state.lock().directory.remove(pack);
                Ok(false)
            }
            Err(trouble) => Err(trouble),
        });
        let looks: Vec<_> = looks.collect();
        let there: Vec<bool> = futures::stream::iter(looks).buffer_unordered(HEADS_AT_ONCE).try_collect().await?;
        if there.into_iter().all(|there| there) { Ok(()) } else { Err(Trouble::NotFound) }
    }

    async fn is_doomed(&self, names: &HashSet<&str>, deadline: Instant) -> Result<bool, Trouble> {
        let marks = self.bucket.list(&self.marks_folder(), MARKS_MAX, deadline).await?;
        if marks.is_empty() {
            return Ok(false);
        }
        // The newest may be among those that are left out.
        if marks.len() >= MARKS_MAX {
            return Ok(true);
        }
        let lease = standing(&self.bucket, &self.collector_folder(), deadline).await?;
        // Where it is not known how late it is there, none is over.
        let Some(lease) = lease.filter(|lease| lease.left_ms(&self.bucket).is_none_or(|left| left > 0)) else {
            return Ok(false);
        };
        for mark in marks.iter().filter(|mark| epoch_of(&mark.location).is_none_or(|epoch| epoch >= lease.epoch)) {
            let bytes = match self.bucket.read_all(&mark.location, MARK_BYTES_MAX, deadline).await {
                // That batch is over.
                Err(Trouble::NotFound) => continue,
                read => read?.0,
            };
            // One that cannot be read may mean any pack.
            let named = serde_json::from_slice::<Mark>(&bytes).ok().filter(|mark| mark.version == 1);
            if named.is_none_or(|mark| mark.packs.iter().any(|pack| names.contains(pack.as_str()))) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn epoch_of(mark: &Path) -> Option<u64> {
    mark.filename()?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Daemons of other versions read these.
    #[test]
    fn a_mark_is_written_as_the_design_says() {
        let text = r#"{"version":1,"packs":["p/v1/ns=a/00/0/1f/2f","p/v1/ns=a/00/0/1f/2f.1"]}"#;
        let packs = vec!["p/v1/ns=a/00/0/1f/2f".to_owned(), "p/v1/ns=a/00/0/1f/2f.1".to_owned()];
        let mark = Mark { version: 1, packs };
        assert_eq!(serde_json::from_str::<Mark>(text).unwrap(), mark);
        assert_eq!(serde_json::to_string(&mark).unwrap(), text);
        assert_eq!(epoch_of(&Path::from("p/v1/doomed/00000000000000000007-0000000012")), Some(7));
    }
}
