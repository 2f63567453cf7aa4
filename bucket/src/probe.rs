//! The probe: what a store is proven to do before anything rests on it.

use bytes::Bytes;
use object_store::path::Path;
use object_store::{PutMode, PutPayload, UpdateVersion};
use tokio::time::Instant;

use super::requests::{Bucket, Trouble};
use super::swap::{Answered, Swap};
use crate::caps;
use crate::retried;

/// What a store does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// What was written can be read at once.
    pub reads_own_writes: bool,
    /// What was written is in the next listing.
    pub lists_own_writes: bool,
    /// A second create of one name is refused.
    pub creates_once: bool,
    /// A PUT that names a version is refused once that has changed.
    pub updates_by_version: bool,
    /// A body that is not the one whose checksum came with it is refused, and nothing is kept of it.
    pub checks_uploads: bool,
}

impl Abilities {
    /// What the store lacks and what that disables, in plain words.
    pub fn lacks(&self) -> Vec<&'static str> {
        let mut lacks = Vec::new();
        if !self.reads_own_writes {
            lacks.push("it does not show writes at once; DURABLE puts are refused, and blocks that other nodes stored may be found late");
        }
        if !self.lists_own_writes {
            lacks.push("its listings leave out what was just written; garbage is not collected, because a collector would not see new pins, and blocks that other nodes stored may be found late");
        }
        if !self.creates_once {
            lacks.push("it overwrites an object instead of refusing a second create; garbage is not collected, because two collectors could run at once");
        }
        if !self.updates_by_version {
            lacks.push("it has no conditional update; kvstore does not need one, because it uses only creates");
        }
        lacks
    }
}

/// Where the objects of probes are, below the root.
const FOLDER: &str = "probe";
/// Bytes of bodies that are swapped on their way: a small one, and one as large as a pack, which a gateway may pass on as it comes where
/// it holds small ones. It is sent three times and read once when the daemon starts, and three copies of it are in memory at most.
const SWAPPED_BYTES: [u64; 2] = [64, caps::PROBE_BYTES];
/// A swapped body whose answer says nothing is sent so often.
const SWAPS_MAX: usize = 3;
/// Requests that say for one size what the store does with a swapped body: such a body twice, and the whole one written and read.
const SWAP_REQUESTS: u32 = 2 * SWAPS_MAX as u32 + 2;
/// Objects of probes that are looked through: daemons that are probing just now, and what killed ones left.
const PROBES_MAX: usize = 4096;

/// Tries a store under names of its own, and cleans up. Fails where the store cannot be reached, or refuses.
pub async fn probe(bucket: &Bucket, root: &Path, name: &str, deadline: Instant) -> Result<Abilities, Trouble> {
    let folder = root.clone().join(FOLDER);
    let location = folder.clone().join(name);
    let created = probe_at(bucket, &folder, &location, name, deadline).await;
    let cleaned = bucket.delete(&location, deadline).await;
    let mut abilities = created?;
    cleaned?;
    abilities.checks_uploads = abilities.creates_once && abilities.reads_own_writes;
    for (bytes, number) in SWAPPED_BYTES.into_iter().zip(1..) {
        if abilities.checks_uploads {
            // A store that never answers such a body has time to be left alone with it.
            let deadline = Instant::now() + bucket.time_of_try(bytes) * SWAP_REQUESTS;
            let location = folder.clone().join(format!("{name}-{number}"));
            let fresh = folder.clone().join(format!("{name}-{number}-again"));
            let refused = refuses_swapped(bucket, [&location, &fresh], bytes, deadline).await;
            let cleaned = [bucket.delete(&location, deadline).await, bucket.delete(&fresh, deadline).await];
            abilities.checks_uploads = refused?;
            cleaned.into_iter().collect::<Result<(), _>>()?;
        }
    }
    Ok(abilities)
}

/// True where the store refuses a body in which a bit flipped after it was signed, keeps nothing of it, takes the whole one, and refuses
/// the other one again, under a fresh name: a refusal that was an accident does not come again.
async fn refuses_swapped(
    bucket: &Bucket,
    [location, fresh]: [&Path; 2],
    bytes: u64,
    deadline: Instant,
) -> Result<bool, Trouble> {
    let sent = Bytes::from(vec![0x5a; bytes as usize]);
    let mut arrives = sent.to_vec();
    if let Some(byte) = arrives.get_mut(bytes as usize / 2) {
        *byte ^= 4;
    }
    let arrives = Bytes::from(arrives);
    if !is_refused(bucket, location, &sent, &arrives, deadline).await {
        return Ok(false);
    }
    // It said no to what arrived, and not to this daemon, to this name or to every request: the same again, whole, is taken. A
    // store that kept what it refused has this name already.
    match retried!(bucket, deadline, bytes, bucket.create(location, sent.clone().into())) {
        Ok(()) => {}
        Err(Trouble::Exists) => return Ok(false),
        Err(trouble) => return Err(trouble),
    }
    let (read, _) = bucket.read(location, 0..bytes, deadline).await?;
    Ok(read == sent && is_refused(bucket, fresh, &sent, &arrives, deadline).await)
}

/// True where the answer to a body that was swapped may be to the body. Another one is none, and it is sent again.
async fn is_refused(bucket: &Bucket, location: &Path, sent: &Bytes, arrives: &Bytes, deadline: Instant) -> bool {
    for tries in 1..=SWAPS_MAX as u32 {
        let swap = Swap::new(PutPayload::from(arrives.clone()));
        let until = deadline.min(Instant::now() + bucket.time_of_try(sent.len() as u64));
        let put = bucket.create_swapped(location, sent.clone().into(), swap.clone());
        if let Ok(Ok(())) = tokio::time::timeout_at(until, put).await {
            return false;
        }
        match swap.answered() {
            // So stores answer to a body that is not what was signed, and to some accidents, too.
            Answered::Status(400 | 422) => return true,
            // The name, the load, the clock, or somebody on the way: the body has no part in it.
            Answered::Status(_) | Answered::No | Answered::NoHttp => {}
        }
        tokio::time::sleep(bucket.backoff(tries)).await;
    }
    false
}

/// How late it is there: a small object is written, asked for, and deleted.
pub async fn measure(bucket: &Bucket, root: &Path, name: &str, deadline: Instant) -> Result<(), Trouble> {
    let location = root.clone().join(FOLDER).join(name);
    let began = bucket.now();
    let written = create(bucket, &location, name, deadline).await;
    let ended = bucket.now();
    let looked = match written {
        Ok(()) => bucket.head(&location, deadline).await,
        Err(trouble) => Err(trouble),
    };
    let cleaned = bucket.delete(&location, deadline).await;
    bucket.clock.note(began, ended, looked?.last_modified.timestamp_millis());
    cleaned
}

async fn create(bucket: &Bucket, location: &Path, text: &str, deadline: Instant) -> Result<(), Trouble> {
    let body = || PutPayload::from(text.to_owned());
    match retried!(bucket, deadline, 0, bucket.create(location, body())) {
        // An own try whose answer was lost.
        Ok(()) | Err(Trouble::Exists) => Ok(()),
        // A store without creates: it may still serve reads.
        Err(Trouble::Unsupported(_)) => {
            retried!(bucket, deadline, 0, bucket.put(location, body(), PutMode::Overwrite)).map(drop)
        }
        Err(trouble) => Err(trouble),
    }
}

async fn probe_at(
    bucket: &Bucket,
    folder: &Path,
    location: &Path,
    text: &str,
    deadline: Instant,
) -> Result<Abilities, Trouble> {
    let body = || PutPayload::from(text.to_owned());
    let bytes = text.len() as u64;
    let began = bucket.now();
    create(bucket, location, text, deadline).await?;
    let ended = bucket.now();
    let mut abilities = Abilities::default();
    let mut version = UpdateVersion { e_tag: None, version: None };
    match bucket.read(location, 0..bytes, deadline).await {
        Ok((read, meta)) => {
            abilities.reads_own_writes = read == text.as_bytes();
            bucket.clock.note(began, ended, meta.last_modified.timestamp_millis());
            version = UpdateVersion { e_tag: meta.e_tag, version: meta.version };
        }
        Err(Trouble::NotFound) => {}
        Err(trouble) => return Err(trouble),
    }
    let listed = bucket.list(folder, PROBES_MAX, deadline).await?;
    abilities.lists_own_writes = listed.iter().any(|object| object.location == *location);
    let again = retried!(bucket, deadline, 0, bucket.create(location, body()));
    abilities.creates_once = matches!(again, Err(Trouble::Exists));
    let update = async |text: &str| {
        let mode = PutMode::Update(version.clone());
        let payload = PutPayload::from(text.to_owned());
        retried!(bucket, deadline, 0, bucket.put(location, payload.clone(), mode.clone()))
    };
    if update("changed").await.is_ok() {
        abilities.updates_by_version = matches!(update("changed again").await, Err(Trouble::Exists));
    }
    Ok(abilities)
}
