//! Sessions in a bucket: where what lies, and the requests for it.
//!
//! ```text
//! <root>/logs/<log>/<20 digits>                         an entry of a log: entry.rs
//! <root>/sessions/<namespace>/<id>/<20 digits>          who owns a session from this epoch on: owner.rs
//! <root>/collector/                                     the collector's lease
//! <root>/probe/                                         what proofs left behind
//! ```
//!
//! All of it is created and never written over. A listing is always of a whole folder: one that is resumed after a key is not sound on every
//! server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvstore_bucket::{Bucket, ObjectUrl, Trouble, measure, probe};
use object_store::path::Path;
use tokio::time::Instant;

use super::error::SessionError;
use super::name::Name;
use crate::caps;
use crate::store::{STALL, StoreError, boot_time};

/// Below the prefix of the URL.
const ROOT: &str = "sessions/v1";
/// How often a create is tried that is refused, though nothing is there: two writers at once.
const CONFLICTS_MAX: u32 = 8;

/// What a create came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Created {
    /// It is there.
    New,
    /// This is there instead.
    There(Bytes),
}

/// See the head of this file.
#[derive(Clone)]
pub struct Store {
    pub(super) bucket: Arc<Bucket>,
    root: Path,
    /// It keeps bodies that are not those that were sent: what was written is read back.
    reads_back: Arc<AtomicBool>,
    is_proven: Arc<AtomicBool>,
}

impl Store {
    /// Opens a store by its URL; asks nothing of it.
    pub fn open(url: &ObjectUrl) -> Result<Self, SessionError> {
        let opened = url.open().map_err(StoreError::from)?;
        let root = opened.prefix.parts().chain(Path::from(ROOT).parts()).collect();
        Ok(Self { root, ..Self::of(opened.store) })
    }

    /// The same, of a store that is open.
    pub fn of(store: Arc<dyn object_store::ObjectStore>) -> Self {
        let bucket = Arc::new(Bucket::new(store, STALL, boot_time));
        Self { bucket, root: Path::from(ROOT), reads_back: Arc::default(), is_proven: Arc::default() }
    }

    /// The same, of a store that is known to do what sessions rest on: nothing is proven, and nothing is read back.
    pub fn of_proven(store: Arc<dyn object_store::ObjectStore>) -> Self {
        Self { is_proven: Arc::new(AtomicBool::new(true)), ..Self::of(store) }
    }

    /// Proves the store, unless that has been done.
    pub(super) async fn prove_once(&self, name: &str) -> Result<(), SessionError> {
        if self.is_proven.load(Ordering::Relaxed) { Ok(()) } else { self.prove(name).await }
    }

    /// Proves that the store does what sessions rest on. `name`: nobody else's. The first writer does it; what keeps damaged uploads has
    /// everything read back from then on.
    pub async fn prove(&self, name: &str) -> Result<(), SessionError> {
        let failed = || SessionError::request("the object store was asked what it can do");
        let abilities = probe(&self.bucket, &self.root, name, self.deadline()).await.map_err(failed())?;
        for (does, lack) in [
            (abilities.reads_own_writes, "it does not show writes at once"),
            (abilities.lists_own_writes, "its listings leave out what was just written"),
            (abilities.creates_once, "it overwrites an object instead of refusing a second create"),
        ] {
            if !does {
                return Err(StoreError::Unable(lack.into()).into());
            }
        }
        self.reads_back.store(!abilities.checks_uploads, Ordering::Relaxed);
        measure(&self.bucket, &self.root, &format!("{name}-time"), self.deadline()).await.map_err(failed())?;
        self.is_proven.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn at(&self, below: &str) -> Path {
        self.root.parts().chain(Path::from(below).parts()).collect()
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(caps::REQUEST_MS)
    }

    pub(super) fn collector(&self) -> Path {
        self.at("collector")
    }

    pub(super) fn logs(&self) -> Path {
        self.at("logs")
    }

    pub(super) fn log(&self, log: &str) -> Path {
        self.at(&format!("logs/{log}"))
    }

    pub(super) fn entry(&self, log: &str, number: u64) -> Path {
        self.at(&format!("logs/{log}/{number:020}"))
    }

    pub(super) fn sessions(&self, namespace: Option<&str>) -> Path {
        namespace.map_or_else(|| self.at("sessions"), |namespace| self.at(&format!("sessions/{namespace}")))
    }

    pub(super) fn epochs(&self, name: &Name) -> Path {
        self.at(&format!("sessions/{}/{}", name.namespace, name.id))
    }

    pub(super) fn epoch(&self, name: &Name, epoch: u64) -> Path {
        self.at(&format!("sessions/{}/{}/{epoch:020}", name.namespace, name.id))
    }

    /// Parts of an object's name below the root.
    pub(super) fn below(&self, location: &Path) -> Vec<String> {
        location.parts().skip(self.root.parts().count()).map(|part| part.as_ref().to_owned()).collect()
    }

    /// Creates an object, or says what is there, which may be an own try whose answer was lost. Where the store is not known to refuse what
    /// came to it damaged, the object is read back, and is [`Created::There`] if it is another one.
    pub(super) async fn create(&self, at: &Path, body: &Bytes, bytes_max: u64) -> Result<Created, Trouble> {
        for conflicts in 1.. {
            let created = self.create_once(at, body).await;
            match created {
                Ok(()) if !self.reads_back.load(Ordering::Relaxed) => return Ok(Created::New),
                Ok(()) | Err(Trouble::Exists) => {}
                Err(trouble) => return Err(trouble),
            }
            // A conflict of two writers says the same as an object that is there.
            match self.bucket.read_all(at, bytes_max, self.deadline()).await {
                Ok((there, _)) if created.is_ok() && there == body => return Ok(Created::New),
                Ok((there, _)) => return Ok(Created::There(there)),
                Err(Trouble::NotFound) if conflicts < CONFLICTS_MAX => {
                    tokio::time::sleep(self.bucket.backoff(conflicts)).await;
                }
                Err(trouble) => return Err(trouble),
            }
        }
        Err(Trouble::NotFound)
    }

    /// Creates a small object, unless something is there, which is not read: whether it is an own try whose answer was lost is for the caller to
    /// find out. Where the store is not known to refuse what came to it damaged, the object is read back, and what is damaged is there.
    pub(super) async fn create_unless(&self, at: &Path, body: &Bytes) -> Result<bool, Trouble> {
        match self.create_once(at, body).await {
            Ok(()) if !self.reads_back.load(Ordering::Relaxed) => Ok(true),
            Ok(()) => {
                let read = self.bucket.read_all(at, caps::ENTRY_BYTES_MAX, self.deadline()).await;
                read.map(|(there, _)| there == body)
            }
            Err(Trouble::Exists) => Ok(false),
            Err(trouble) => Err(trouble),
        }
    }

    async fn create_once(&self, at: &Path, body: &Bytes) -> Result<(), Trouble> {
        let mut tries = self.bucket.tries(self.deadline(), body.len() as u64);
        loop {
            let until = tries.begin()?;
            let answer = tokio::time::timeout_at(until, self.bucket.create(at, body.clone().into())).await;
            if let Some(answer) = tries.end(answer).await {
                return answer;
            }
        }
    }
}
