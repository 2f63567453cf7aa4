//! Snapshots in a bucket: where what lies, and every request for it.
//!
//! ```text
//! <root>/chunks/<aa>/<digest>          a chunk: codec.rs
//! <root>/snap/<id>/rank-<00000>        a rank's manifest
//! <root>/snap/<id>/COMMIT              the snapshot; what has none is no snapshot
//! <root>/names/<name>/<20 digits>      what a name means from that number on; the highest counts
//! <root>/intents/<id>                  a save that has begun
//! <root>/collector/                    the collector's lease
//! ```
//!
//! All of it is created and never written over. A store that cannot refuse a second create, or does not list what was just written, is
//! refused: there two could own one name, and a collection could miss a save.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kvstore_bucket::{Abilities, BootTime, Bucket, ObjectUrl, OpenStoreError, Trouble, measure, probe, standing};
use object_store::path::Path;
use object_store::{ObjectMeta, PutMode};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::caps;
use crate::codec::{self, Damage, FOOTER_BYTES};
use crate::digest::Digest;
use crate::manifest::{Commit, Extent, File, Rank, RankName, Refused, is_id};
use crate::near::Near;

/// Below the prefix of the URL.
const ROOT: &str = "snapshots/v1";
/// How long a request may bring nothing.
pub(crate) const STALL: Duration = Duration::from_secs(10);
/// How often a create is tried that is refused, though nothing is there: two writers at once.
const CONFLICTS_MAX: u32 = 8;

/// Why something of a store cannot be had, or was not done.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Its URL.
    #[error(transparent)]
    Open(#[from] OpenStoreError),
    /// A request.
    #[error("{what}: {cause}")]
    Request {
        /// What it was for.
        what: String,
        /// Why it failed.
        cause: Trouble,
    },
    /// An object that a snapshot needs: the store answers, and does not have it as it was written.
    #[error("{what}: {cause}")]
    Lost {
        /// What it was read for.
        what: String,
        /// What is there.
        cause: Trouble,
    },
    /// It lacks what snapshots rest on.
    #[error("the object store cannot hold snapshots: {0}")]
    Unable(String),
    /// A manifest.
    #[error("{what} cannot be used: {cause}")]
    Manifest {
        /// Of what.
        what: String,
        /// Why.
        cause: Refused,
    },
    /// A chunk.
    #[error("the chunk {name} is damaged: {cause}")]
    Chunk {
        /// Which.
        name: Digest,
        /// How.
        cause: Damage,
    },
    /// An object that does not have the digest by which it is named.
    #[error("{0} does not have the digest that the snapshot's commit names")]
    Digest(String),
    /// There is none.
    #[error("there is no snapshot {0:?}; `kvstore snapshot ls` shows what there is")]
    NoSuch(String),
    /// Several begin so.
    #[error("{0:?} is the beginning of several snapshots' ids; use more digits")]
    Ambiguous(String),
    /// A name that cannot be one.
    #[error("{0:?} cannot be a name: use 1 to 128 letters, digits, '.', '_' and '-', not 32 hexadecimal digits")]
    Name(String),
    /// There are too many.
    #[error("there are more than {most} {what} in the store, which is more than this build lists")]
    TooMany {
        /// What.
        what: &'static str,
        /// How many are listed.
        most: usize,
    },
    /// A collection is under way.
    #[error("a collection of garbage is under way for up to {0} more s; try again after that")]
    Collecting(u64),
    /// The commit's request failed, and may arrive later.
    #[error(
        "the commit was written: {cause}; it may have been, or be yet: look for {id} with `kvstore snapshot ls`. Collections wait for a day"
    )]
    MayAppear {
        /// The snapshot.
        id: String,
        /// How it failed.
        cause: Trouble,
    },
    /// The program ends.
    #[error("a chunk was not encoded: {0}")]
    Stopped(String),
    /// It says no time.
    #[error(
        "the object store does not say when objects were written, so what was left behind cannot be told from what is being written"
    )]
    NoTime,
}

impl StoreError {
    /// Whether the store did not answer, so that what it has is not known.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Request { cause: Trouble::Failed(_) | Trouble::Away(_), .. })
    }
}

/// What a name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The snapshot's id; none: the name was taken away.
    pub id: Option<String>,
}

/// A name, and what it meant and means: the newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameHistory {
    /// The name.
    pub name: String,
    /// Numbers and meanings.
    pub meanings: Vec<(u64, Named)>,
}

impl NameHistory {
    /// What it means now.
    pub fn now(&self) -> Option<&str> {
        self.meanings.first()?.1.id.as_deref()
    }
}

/// What there is under a chunk's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum There {
    Nothing,
    /// A chunk of the right length.
    Chunk,
    /// Something else: it was cut, or overwritten.
    Damaged,
}

/// See the head of this file.
#[derive(Clone)]
pub struct Store {
    pub(crate) bucket: Arc<Bucket>,
    root: Path,
    /// It keeps bodies that are not those that were sent: what was written is read back.
    reads_back: Arc<AtomicBool>,
    /// Where chunks are looked for first, the nearest last.
    nears: Vec<Arc<dyn Near>>,
    /// The folder that it is, if it is one.
    pub(crate) folder: Option<PathBuf>,
    /// On a disk of this machine: nothing is on its way to it.
    is_local_disk: bool,
}

/// Milliseconds since boot, sleep included.
pub(crate) fn boot_time() -> BootTime {
    let time = clock_gettime(ClockId::Boottime);
    BootTime(time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
}

/// Random digits for what nobody else names.
pub(crate) fn new_id() -> Result<String, StoreError> {
    let mut bytes = [0_u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match got {
        Ok(16) => Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
        _ => Err(StoreError::Unable("this machine gives no random numbers".into())),
    }
}

fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(is_plain) && !is_id(name) && name != "." && name != ".."
}

impl Store {
    /// Opens a store by its URL; asks nothing of it.
    pub fn open(url: &ObjectUrl) -> Result<Self, StoreError> {
        let opened = url.open()?;
        let root = opened.prefix.parts().chain(Path::from(ROOT).parts()).collect();
        let folder = url.folder().map(|folder| folder.join(ROOT));
        Ok(Self { root, folder, is_local_disk: url.is_local_disk(), ..Self::of(opened.store) })
    }

    /// The same, of a store that is open.
    pub fn of(store: Arc<dyn object_store::ObjectStore>) -> Self {
        let bucket = Arc::new(Bucket::new(store, STALL, boot_time));
        Self {
            bucket,
            root: Path::from(ROOT),
            reads_back: Arc::default(),
            nears: Vec::new(),
            folder: None,
            is_local_disk: false,
        }
    }

    fn at(&self, below: &str) -> Path {
        self.root.parts().chain(Path::from(below).parts()).collect()
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(caps::REQUEST_MS)
    }

    pub(crate) fn collector(&self) -> Path {
        self.at("collector")
    }

    fn failed(what: impl Into<String>) -> impl FnOnce(Trouble) -> StoreError {
        move |cause| StoreError::Request { what: what.into(), cause }
    }

    /// The same, of what a snapshot needs: it cannot be had later, either, where it is gone, cut, or too long.
    fn unread(what: impl Into<String>) -> impl FnOnce(Trouble) -> StoreError {
        |cause| match cause {
            Trouble::NotFound | Trouble::Cut { .. } | Trouble::Unsupported(_) => {
                StoreError::Lost { what: what.into(), cause }
            }
            cause => Self::failed(what)(cause),
        }
    }

    /// Proves that the store does what snapshots rest on, and learns its time. `name`: nobody else's.
    pub async fn prove(&self, name: &str) -> Result<(), StoreError> {
        let failed = || Self::failed("the object store was asked what it can do");
        let abilities: Abilities = probe(&self.bucket, &self.root, name, self.deadline()).await.map_err(failed())?;
        for (does, lack) in [
            (abilities.reads_own_writes, "it does not show writes at once"),
            (abilities.lists_own_writes, "its listings leave out what was just written"),
            (abilities.creates_once, "it overwrites an object instead of refusing a second create"),
        ] {
            if !does {
                return Err(StoreError::Unable(lack.into()));
            }
        }
        self.reads_back.store(!(abilities.checks_uploads || self.is_local_disk), Ordering::Relaxed);
        measure(&self.bucket, &self.root, &format!("{name}-time"), self.deadline()).await.map_err(failed())
    }

    /// Creates an object; false where there is one.
    async fn create(&self, at: &Path, body: Bytes) -> Result<bool, Trouble> {
        self.create_or_doubt(at, body, &mut false).await
    }

    /// The same. `may_arrive`: whether a try of it failed in a way that lets it arrive later.
    async fn create_or_doubt(&self, at: &Path, body: Bytes, may_arrive: &mut bool) -> Result<bool, Trouble> {
        for conflicts in 1.. {
            match self.create_once(at, &body, may_arrive).await {
                // A conflict of two writers says the same as an object that is there.
                Err(Trouble::Exists) => match self.bucket.head(at, self.deadline()).await {
                    Ok(_) => return Ok(false),
                    Err(Trouble::NotFound) if conflicts < CONFLICTS_MAX => {
                        tokio::time::sleep(self.bucket.backoff(conflicts)).await;
                    }
                    Err(trouble) => return Err(trouble),
                },
                other => return other.map(|()| true),
            }
        }
        Ok(false)
    }

    async fn create_once(&self, at: &Path, body: &Bytes, may_arrive: &mut bool) -> Result<(), Trouble> {
        let mut tries = self.bucket.tries(self.deadline(), body.len() as u64);
        loop {
            let until = tries.begin()?;
            let answer = tokio::time::timeout_at(until, self.bucket.create(at, body.clone().into())).await;
            // What a folder says has ended; what nobody waits for any more has not.
            *may_arrive |= match &answer {
                Ok(Err(Trouble::Failed(_) | Trouble::Away(_) | Trouble::Damaged(_))) => self.folder.is_none(),
                Ok(_) => false,
                Err(_) => true,
            };
            if let Some(answer) = tries.end(answer).await {
                return answer;
            }
        }
    }

    fn chunk_at(&self, name: Digest) -> Path {
        let name = name.to_string();
        self.at(&format!("chunks/{}/{name}", name.get(..2).unwrap_or_default()))
    }

    /// What there is under a chunk's name; it has so many bytes. Its end is read, and not all of it.
    pub(crate) async fn look_at_chunk(&self, name: Digest, bytes: u64) -> Result<There, StoreError> {
        let at = self.chunk_at(name);
        let meta = match self.bucket.head(&at, self.deadline()).await {
            Ok(meta) => meta,
            Err(Trouble::NotFound) => return Ok(There::Nothing),
            Err(trouble) => return Err(Self::failed(format!("the chunk {name} was looked for"))(trouble)),
        };
        let Some(from) = meta.size.checked_sub(FOOTER_BYTES as u64) else { return Ok(There::Damaged) };
        let end = self.bucket.read(&at, from..meta.size, self.deadline()).await;
        let (end, _) = end.map_err(Self::failed(format!("the end of the chunk {name} was read")))?;
        let is_it = codec::plain_bytes(&end, meta.size) == Some(bytes);
        Ok(if is_it { There::Chunk } else { There::Damaged })
    }

    /// Writes a chunk; false where it was there.
    pub(crate) async fn write_chunk(&self, name: Digest, stored: Bytes) -> Result<bool, StoreError> {
        let created = self.create(&self.chunk_at(name), stored).await;
        let created = created.map_err(Self::failed(format!("the chunk {name} was written")))?;
        self.read_back(name).await?;
        Ok(created)
    }

    /// Reads a chunk that was just written, where the store is not known to refuse what came to it damaged.
    async fn read_back(&self, name: Digest) -> Result<(), StoreError> {
        if self.reads_back.load(Ordering::Relaxed) {
            self.read_chunk(name).await?;
        }
        Ok(())
    }

    /// Writes a chunk where there is something else under its name.
    pub(crate) async fn mend_chunk(&self, name: Digest, stored: Bytes) -> Result<(), StoreError> {
        let (at, mut tries) = (self.chunk_at(name), self.bucket.tries(self.deadline(), stored.len() as u64));
        let failed = || Self::failed(format!("the damaged chunk {name} was written anew"));
        loop {
            let until = tries.begin().map_err(failed())?;
            let put = self.bucket.put(&at, stored.clone().into(), PutMode::Overwrite);
            if let Some(answer) = tries.end(tokio::time::timeout_at(until, put).await).await {
                answer.map_err(failed())?;
                return self.read_back(name).await;
            }
        }
    }

    /// The same store, whose chunks are first looked for in a place that is nearer than all before.
    pub fn with_near(mut self, near: Arc<dyn Near>) -> Self {
        self.nears.push(near);
        self
    }

    /// A chunk's bytes, verified, and how many of them came from the store: those of a chunk that is near do not.
    pub async fn read_extent(&self, extent: Extent) -> Result<(Bytes, u64), StoreError> {
        let Extent { chunk: name, bytes } = extent;
        for near in self.nears.iter().rev() {
            let Some(plain) = near.chunk(name, bytes).await else { continue };
            let checked = tokio::task::spawn_blocking(move || (Digest::of(&plain) == name).then_some(plain)).await;
            match checked {
                Ok(Some(plain)) if plain.len() as u64 == bytes => return Ok((plain, 0)),
                // It is damaged there: others have it, too.
                _ => near.damaged(name, bytes).await,
            }
        }
        let (plain, moved) = self.read_chunk(name).await?;
        if plain.len() as u64 != bytes {
            return Err(StoreError::Chunk { name, cause: Damage::Bytes });
        }
        Ok((plain, moved))
    }

    /// A chunk's bytes, verified, and how many came from the store.
    pub(crate) async fn read_chunk(&self, name: Digest) -> Result<(Bytes, u64), StoreError> {
        let most = (caps::CHUNK_BYTES + FOOTER_BYTES) as u64;
        let read = self.bucket.read_all(&self.chunk_at(name), most, self.deadline()).await;
        let (stored, _) = read.map_err(Self::unread(format!("the chunk {name} was read")))?;
        let moved = stored.len() as u64;
        // It may be decompressed, and it is hashed: milliseconds.
        let decoded = tokio::task::spawn_blocking(move || codec::decode(&stored, name)).await;
        let plain = decoded.unwrap_or(Err(Damage::Bytes)).map_err(|cause| StoreError::Chunk { name, cause })?;
        Ok((plain, moved))
    }

    /// Says that a save has begun, and that no collection is under way: whichever of the two comes second sees the other.
    pub(crate) async fn begin_save(&self, id: &str) -> Result<(), StoreError> {
        let at = self.at(&format!("intents/{id}"));
        self.create(&at, Bytes::from_static(b"{}")).await.map_err(Self::failed("the save's intent was written"))?;
        let found = standing(&self.bucket, &self.collector(), self.deadline()).await;
        let held = found.map_err(Self::failed("the collector's lease was read"))?;
        let left_ms = match held {
            Some(held) => held.left_ms(&self.bucket).ok_or(StoreError::NoTime)?,
            None => 0,
        };
        if left_ms > 0 {
            self.end_save(id).await;
            return Err(StoreError::Collecting(left_ms / 1000 + 1));
        }
        Ok(())
    }

    /// It is over, either way. Where this fails, collections wait for a day.
    pub(crate) async fn end_save(&self, id: &str) {
        let _ = self.bucket.delete(&self.at(&format!("intents/{id}")), self.deadline()).await;
    }

    /// Saves that may be under way.
    pub(crate) async fn saves(&self) -> Result<Vec<ObjectMeta>, StoreError> {
        let listed = self.bucket.list(&self.at("intents"), caps::SNAPSHOTS_MAX, self.deadline()).await;
        listed.map_err(Self::failed("saves were listed"))
    }

    pub(crate) async fn write_rank(&self, id: &str, rank: &Rank) -> Result<RankName, StoreError> {
        let what = format!("the manifest of rank {}", rank.rank);
        let body = rank.encode().map_err(|cause| StoreError::Manifest { what: what.clone(), cause })?;
        let name = RankName { rank: rank.rank, bytes: body.len() as u64, digest: Digest::of(&body) };
        self.write_rank_body(id, rank.rank, body.into()).await?;
        Ok(name)
    }

    /// Writes a rank's manifest as it is stored.
    pub(crate) async fn write_rank_body(&self, id: &str, rank: u32, body: Bytes) -> Result<(), StoreError> {
        let at = self.at(&format!("snap/{id}/rank-{rank:05}"));
        let created = self.create(&at, body).await;
        created.map(drop).map_err(Self::failed(format!("the manifest of rank {rank} was written")))
    }

    /// A rank's manifest, verified and checked.
    pub async fn rank(&self, id: &str, name: RankName) -> Result<Rank, StoreError> {
        Ok(self.rank_with_body(id, name).await?.0)
    }

    /// The same, and its bytes as they are stored.
    pub(crate) async fn rank_with_body(&self, id: &str, name: RankName) -> Result<(Rank, Bytes), StoreError> {
        let what = format!("the manifest of rank {} of the snapshot {id}", name.rank);
        let at = self.at(&format!("snap/{id}/rank-{:05}", name.rank));
        let read = self.bucket.read_all(&at, caps::MANIFEST_BYTES_MAX, self.deadline()).await;
        let (body, _) = read.map_err(Self::unread(format!("{what} was read")))?;
        if Digest::of(&body) != name.digest {
            return Err(StoreError::Digest(what));
        }
        let rank = Rank::decode(&body).map_err(|cause| StoreError::Manifest { what, cause })?;
        Ok((rank, body))
    }

    /// All files of a snapshot, of all its ranks. One that two ranks have is refused: they would be written over each other. So is a
    /// commit that says another sum of them: room is made by what it says.
    pub async fn files(&self, commit: &Commit) -> Result<Vec<File>, StoreError> {
        let refused =
            |why: String| StoreError::Manifest { what: format!("the snapshot {}", commit.id), cause: Refused(why) };
        let (mut files, mut paths) = (Vec::new(), HashSet::new());
        let (mut bytes, mut tensors) = (0_u64, 0);
        for name in &commit.ranks.0 {
            for file in self.rank(&commit.id, *name).await?.files.0 {
                if !paths.insert(file.path.clone()) {
                    return Err(refused(format!("it has the file {:?} twice", file.path)));
                }
                bytes = bytes.saturating_add(file.bytes);
                tensors += file.tensors.0.len() as u64;
                files.push(file);
            }
        }
        let (said, found) = (commit.totals, (files.len() as u64, bytes, tensors));
        if (said.files, said.bytes, said.tensors) != found {
            return Err(refused(format!(
                "it says {} files of {} bytes with {} tensors, and has {} of {} with {}",
                said.files, said.bytes, said.tensors, found.0, found.1, found.2
            )));
        }
        Ok(files)
    }

    /// Writes a snapshot's commit: from then on it is there.
    pub(crate) async fn commit(&self, commit: &Commit) -> Result<(), StoreError> {
        let what = || "the commit".to_owned();
        let body = commit.encode().map_err(|cause| StoreError::Manifest { what: what(), cause })?;
        // What nobody could read again is no snapshot.
        Commit::decode(&body).map_err(|cause| StoreError::Manifest { what: what(), cause })?;
        self.commit_body(&commit.id, body.into()).await
    }

    /// Writes a snapshot's commit as it is stored.
    pub(crate) async fn commit_body(&self, id: &str, body: Bytes) -> Result<(), StoreError> {
        let at = self.at(&format!("snap/{id}/COMMIT"));
        // Whoever else writes below this id writes the same: one that is there is our own, whose answer was lost, or that of another copy.
        let mut may_arrive = false;
        let created = self.create_or_doubt(&at, body, &mut may_arrive).await;
        created.map(drop).map_err(|cause| match may_arrive {
            true => StoreError::MayAppear { id: id.to_owned(), cause },
            false => Self::failed("the commit was written")(cause),
        })
    }

    /// A snapshot, by its id.
    pub async fn snapshot(&self, id: &str) -> Result<Commit, StoreError> {
        Ok(self.snapshot_with_body(id).await?.0)
    }

    /// The same, and its commit's bytes as they are stored.
    pub(crate) async fn snapshot_with_body(&self, id: &str) -> Result<(Commit, Bytes), StoreError> {
        let at = self.at(&format!("snap/{id}/COMMIT"));
        match self.bucket.read_all(&at, caps::RECORD_BYTES_MAX, self.deadline()).await {
            Ok((body, _)) => {
                let what = format!("the snapshot {id}");
                let commit =
                    Commit::decode(&body).map_err(|cause| StoreError::Manifest { what: what.clone(), cause })?;
                if commit.id == id { Ok((commit, body)) } else { Err(StoreError::Digest(what)) }
            }
            Err(Trouble::NotFound) => Err(StoreError::NoSuch(id.to_owned())),
            Err(trouble) => Err(Self::failed(format!("the snapshot {id} was read"))(trouble)),
        }
    }

    /// Ids of all snapshots that are committed; with what is listed of others, which may be under way or left behind.
    pub(crate) async fn ids(&self) -> Result<(Vec<String>, Vec<ObjectMeta>), StoreError> {
        let most = caps::SNAPSHOTS_MAX * 8;
        let listed = self.bucket.list(&self.at("snap"), most, self.deadline()).await;
        let listed = listed.map_err(Self::failed("snapshots were listed"))?;
        if listed.len() == most {
            return Err(StoreError::TooMany { what: "objects of snapshots", most });
        }
        let id_of = |meta: &ObjectMeta| {
            meta.location.parts().nth(self.root.parts().count() + 1).map(|part| part.as_ref().to_owned())
        };
        let is_commit = |meta: &&ObjectMeta| meta.location.filename() == Some("COMMIT");
        let ids: Vec<String> = listed.iter().filter(is_commit).filter_map(id_of).filter(|id| is_id(id)).collect();
        let others = listed.into_iter().filter(|meta| id_of(meta).is_none_or(|id| !ids.contains(&id))).collect();
        Ok((ids, others))
    }

    /// All names.
    pub async fn names(&self) -> Result<Vec<NameHistory>, StoreError> {
        let most = caps::SNAPSHOTS_MAX * 8;
        let listed = self.bucket.list(&self.at("names"), most, self.deadline()).await;
        let listed = listed.map_err(Self::failed("names were listed"))?;
        if listed.len() == most {
            return Err(StoreError::TooMany { what: "names", most });
        }
        let mut found: std::collections::BTreeMap<String, Vec<u64>> = Default::default();
        for meta in listed {
            let mut parts = meta.location.parts().skip(self.root.parts().count() + 1);
            let (name, number) = (parts.next(), parts.next());
            if let (Some(name), Some(number)) = (name, number.and_then(|number| number.as_ref().parse().ok())) {
                found.entry(name.as_ref().to_owned()).or_default().push(number);
            }
        }
        let each = found.into_iter().map(|(name, numbers)| self.history(name, numbers));
        futures::stream::iter(each).buffered(caps::COMMITS_AT_ONCE).try_collect().await
    }

    async fn history(&self, name: String, mut numbers: Vec<u64>) -> Result<NameHistory, StoreError> {
        numbers.sort_unstable_by(|one, other| other.cmp(one));
        let mut meanings = Vec::new();
        for number in numbers {
            meanings.push((number, self.meaning(&name, number).await?));
        }
        Ok(NameHistory { name, meanings })
    }

    fn name(&self, name: &str, number: u64) -> Path {
        self.at(&format!("names/{name}/{number:020}"))
    }

    async fn meaning(&self, name: &str, number: u64) -> Result<Named, StoreError> {
        let read = self.bucket.read_all(&self.name(name, number), caps::RECORD_BYTES_MAX, self.deadline()).await;
        let what = || format!("what the name {name:?} means was read");
        let (body, _) = read.map_err(Self::failed(what()))?;
        let named: Named = serde_json::from_slice(&body).map_err(|error| StoreError::Manifest {
            what: format!("the name {name:?}"),
            cause: Refused(error.to_string()),
        })?;
        match &named.id {
            Some(id) if !is_id(id) => Err(StoreError::Manifest {
                what: format!("the name {name:?}"),
                cause: Refused(format!("it means {id:?}")),
            }),
            _ => Ok(named),
        }
    }

    async fn highest(&self, name: &str) -> Result<Option<u64>, StoreError> {
        let listed = self.bucket.list(&self.at(&format!("names/{name}")), caps::SNAPSHOTS_MAX, self.deadline()).await;
        let listed = listed.map_err(Self::failed(format!("the name {name:?} was looked for")))?;
        Ok(listed.iter().filter_map(|meta| meta.location.filename()?.parse().ok()).max())
    }

    /// Lets a name mean a snapshot, or nothing any more.
    pub async fn let_mean(&self, name: &str, id: Option<&str>) -> Result<(), StoreError> {
        check_name(name)?;
        let body = serde_json::to_vec(&Named { id: id.map(str::to_owned) }).unwrap_or_default();
        for _ in 0..caps::SNAPSHOTS_MAX {
            let next = self.highest(name).await?.map_or(1, |number| number + 1);
            let created = self.create(&self.name(name, next), body.clone().into()).await;
            if created.map_err(Self::failed(format!("the name {name:?} was written")))? {
                return Ok(());
            }
        }
        Err(StoreError::TooMany { what: "writers of one name", most: caps::SNAPSHOTS_MAX })
    }

    /// The id of a snapshot, by its name, its id, or the first digits of that, at least six.
    pub async fn resolve(&self, asked: &str) -> Result<String, StoreError> {
        Ok(self.resolve_named(asked).await?.0)
    }

    /// The same, and whether it was a name that was asked for.
    pub async fn resolve_named(&self, asked: &str) -> Result<(String, bool), StoreError> {
        if is_id(asked) {
            return Ok((asked.to_owned(), false));
        }
        check_name(asked)?;
        if let Some(number) = self.highest(asked).await?
            && let Some(id) = self.meaning(asked, number).await?.id
        {
            return Ok((id, true));
        }
        let is_beginning = asked.len() >= 6 && asked.bytes().all(|byte| byte.is_ascii_hexdigit());
        let found = if is_beginning { self.ids().await?.0 } else { Vec::new() };
        let mut found = found.into_iter().filter(|id| id.starts_with(asked));
        match (found.next(), found.next()) {
            (Some(id), None) => Ok((id, false)),
            (None, _) => Err(StoreError::NoSuch(asked.to_owned())),
            (Some(_), Some(_)) => Err(StoreError::Ambiguous(asked.to_owned())),
        }
    }

    /// All snapshots, the newest first. Those that cannot be read come with why.
    pub async fn list(&self) -> Result<Vec<Result<Commit, (String, StoreError)>>, StoreError> {
        let (ids, _) = self.ids().await?;
        let each = ids.into_iter().map(|id| async move { (self.snapshot(&id).await, id) });
        let mut answers = futures::stream::iter(each).buffer_unordered(caps::COMMITS_AT_ONCE);
        let mut all = Vec::new();
        while let Some((answer, id)) = answers.next().await {
            match answer {
                // It was removed meanwhile.
                Err(StoreError::NoSuch(_)) => {}
                Ok(commit) => all.push(Ok(commit)),
                Err(error) => all.push(Err((id, error))),
            }
        }
        all.sort_by_key(|one| one.as_ref().map_or(i64::MAX, |commit| -commit.created_ms));
        Ok(all)
    }

    /// Removes a snapshot: it is no snapshot any more. What it held goes with the next collection.
    pub async fn remove(&self, id: &str) -> Result<(), StoreError> {
        let at = self.at(&format!("snap/{id}/COMMIT"));
        self.bucket.delete(&at, self.deadline()).await.map_err(Self::failed(format!("the snapshot {id} was removed")))
    }

    pub(crate) fn chunks(&self) -> Path {
        self.at("chunks")
    }

    /// The chunk that an object below [`Self::chunks`] is.
    pub(crate) fn chunk_of(meta: &ObjectMeta) -> Option<Digest> {
        meta.location.filename()?.parse().ok()
    }
}

/// Refuses what cannot be a name.
pub fn check_name(name: &str) -> Result<(), StoreError> {
    if is_name(name) { Ok(()) } else { Err(StoreError::Name(name.to_owned())) }
}
