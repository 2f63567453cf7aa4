//! The local plane: blocks are read where they lie, without the daemon, and put through shared memory.

mod attachment;
mod calls;
mod copy;
mod fork;
mod joined;
mod mapping;
mod put;
mod read;
mod socket;
mod staging;
mod windows;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvstore_plane::caps::HASHES_PER_PROMOTE_MAX;
use kvstore_plane::{Command, Completion, SequenceHash, capabilities};
use kvstore_proto::v1;
use prost::Message;

pub(crate) use attachment::{Attachment, LocalLayout};
pub(crate) use fork::forks;
pub use joined::JoinedBlocks;
pub use read::{LeasedBlock, Leases};
pub use windows::LeaseWindows;

use crate::caps::{BLOCKS_PER_HINT_MAX, BLOCKS_PER_STEP, LEASES_PER_WINDOW_MAX, MISSES_MAX};
use crate::{Client, Error, GetOptions, GetOutcome, GroupRef, PutBlock, PutOptions, PutSlice};
use calls::{Waiting, failure};
use copy::{Copy, copy_all};
use put::{LocalPut, PutInto};
use windows::{Reading, Step};

/// A promoted block that cannot be leased yet is tried again after this long ...
const PROMOTED_PAUSE_FIRST: Duration = Duration::from_micros(50);
/// ... and twice as long each time, up to this: 100 ms in all.
const PROMOTED_PAUSE_MAX: Duration = Duration::from_millis(50);
/// A promotion that finds too many leases in all calls is asked for again after this long ...
const BUSY_PAUSE_FIRST: Duration = Duration::from_millis(1);
/// ... and twice as long each time, up to this: a quarter of a second in all.
const BUSY_PAUSE_MAX: Duration = Duration::from_millis(128);

/// A group, as the local plane names it.
#[derive(Clone)]
pub(crate) struct LocalGroup {
    pub(crate) attachment: Arc<Attachment>,
    layout: u32,
    group: u16,
    /// Of a block, at most.
    block_bytes: u64,
}

/// What names a block: an engine's bytes, checked as they are used, or checked before.
pub(crate) trait Name {
    fn hash(&self) -> Result<SequenceHash, Error>;
}

impl Name for SequenceHash {
    fn hash(&self) -> Result<SequenceHash, Error> {
        Ok(*self)
    }
}

impl Name for Bytes {
    fn hash(&self) -> Result<SequenceHash, Error> {
        sequence_hash(self)
    }
}

fn sequence_hash(bytes: &[u8]) -> Result<SequenceHash, Error> {
    SequenceHash::new(bytes).map_err(|error| Error::Invalid(format!("sequence_hashes: {error}")))
}

pub(crate) fn sequence_hashes(hashes: &[Bytes]) -> Result<Vec<SequenceHash>, Error> {
    hashes.iter().map(|hash| sequence_hash(hash)).collect()
}

impl Attachment {
    /// A call of `kvstore.v1.Blocks` over the rings. `None` where its message, or the answer, is too large for them.
    pub(crate) async fn verb<M: Message + Default>(
        self: &Arc<Self>,
        verb: u16,
        request: &impl Message,
        deadline_ms: u32,
    ) -> Result<Option<M>, Error> {
        let fits = request.encoded_len() + 64 <= self.view().submissions().payload_bytes_max();
        if !fits || !self.can(capabilities::CALL) {
            return Ok(None);
        }
        match self.call(&Command::Call { verb, deadline_ms, request: request.encode_to_vec() }).await? {
            Completion::Response(response) => M::decode(&*response)
                .map(Some)
                .map_err(|error| Error::Other(format!("the daemon's answer cannot be read: {error}"))),
            Completion::Failed { code, .. } if code == tonic::Code::OutOfRange as u32 => Ok(None),
            Completion::Failed { code, message } => Err(failure(code, message)),
            _ => Err(Error::Other("the daemon sent the answer to another command".into())),
        }
    }

    /// Registers a layout with this attachment's daemon, and keeps its number.
    pub(crate) async fn register(
        self: &Arc<Self>,
        layout: v1::Layout,
        deadline_ms: u32,
    ) -> Result<v1::RegisterLayoutResponse, Error> {
        let request = v1::RegisterLayoutRequest { layout: Some(layout) };
        let verb = kvstore_plane::verbs::REGISTER_LAYOUT;
        let response: v1::RegisterLayoutResponse = self
            .verb(verb, &request, deadline_ms)
            .await?
            .ok_or_else(|| Error::Invalid("layout: it is larger than a command may be".into()))?;
        let known = LocalLayout { ordinal: response.ordinal, block_bytes: response.block_bytes.as_slice().into() };
        self.layouts.rcu(|layouts| {
            let mut layouts = attachment::LocalLayouts::clone(layouts);
            layouts.insert(response.layout_digest.clone(), known.clone());
            layouts
        });
        Ok(response)
    }
}

impl Client {
    pub(crate) fn deadline_ms(&self) -> u32 {
        self.deadline().as_millis().clamp(1, 600_000) as u32
    }

    /// The group on the local plane, where it was used there before: never waits.
    fn local_group_now(&self, group: &GroupRef) -> Option<LocalGroup> {
        let attachment = self.attached()?;
        let layouts = attachment.layouts.load();
        let layout = layouts.get(&group.layout_digest)?;
        // A group that the layout has not is refused by the daemon, over gRPC.
        let (ordinal, block_bytes) = (layout.ordinal, *layout.block_bytes.get(group.group as usize)?);
        drop(layouts);
        Some(LocalGroup { attachment, layout: ordinal, group: group.group as u16, block_bytes })
    }

    /// The group on the local plane; `None` where its calls go over gRPC.
    pub(crate) async fn local_group(&self, group: &GroupRef) -> Result<Option<LocalGroup>, Error> {
        if let Some(local) = self.local_group_now(group) {
            return Ok(Some(local));
        }
        let Some(attachment) = self.attached_for_calls()? else { return Ok(None) };
        let layout = self.shared.layouts.load().get(&group.layout_digest).cloned();
        match layout {
            // Registered by another client, under a digest that this one was given: gRPC takes digests.
            None if self.shared.plane == crate::Plane::Local => Err(Error::NotFound(
                "this client has not registered the layout, which the local plane needs; register it first".into(),
            )),
            None => Ok(None),
            Some(layout) => {
                attachment.register(layout, self.deadline_ms()).await?;
                Ok(self.local_group_now(group))
            }
        }
    }

    /// Leases the leading blocks of a prefix that are in memory now: fewer than asked where one is not. Never waits, and never
    /// asks the daemon. `None` where the local plane is not attached, or the group was not used on it before: see
    /// [`Self::leases`], which has the same bound.
    pub fn leases_now(&self, group: &GroupRef, hashes: &[Bytes]) -> Option<Result<Leases, Error>> {
        let local = self.local_group_now(group)?;
        Some(fit_the_page(hashes.len()).and_then(|()| local.attachment.lease_run(local.layout, local.group, hashes)))
    }

    /// Reads whole blocks into buffers, where all of them are in memory now: without waiting, and without asking the daemon.
    /// `None` where one is not, and [`Self::get_into`] may do better.
    pub fn get_into_now(
        &self,
        group: &GroupRef,
        hashes: &[Bytes],
        buffers: &mut [&mut [u8]],
    ) -> Option<Result<usize, Error>> {
        if buffers.len() != hashes.len() || hashes.len() > BLOCKS_PER_STEP {
            return None;
        }
        let leases = self.leases_now(group, hashes)?.ok()?;
        (leases.len() == hashes.len()).then(|| copy_out(&leases, buffers, 0))
    }

    /// Leases the leading blocks of a prefix, to be read where they lie; what is in a lower tier alone is brought into memory
    /// first. Fewer blocks than asked where one is nowhere, or on its way. Needs the local plane. Blocks stay as they are until
    /// the leases are dropped.
    ///
    /// A process can hold leases on 8,192 blocks. More in one call are [`Error::Invalid`]: read them with
    /// [`Self::lease_windows`]. Where other leases of this process leave no room, it is [`Error::Busy`].
    pub async fn leases(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<Leases, Error> {
        fit_the_page(hashes.len())?;
        let local = self.local_group_for_leases(group).await?;
        let mut leases = local.lease_run(&[])?;
        let window = hashes.len().max(1);
        let mut reading = Reading::new(local, sequence_hashes(hashes)?, window, self.deadline_ms());
        self.within(async {
            loop {
                match reading.step().await? {
                    Step::Blocks(more) => leases.join(more),
                    Step::Missing(promoted) => break promoted.check(reading.done()),
                    Step::PageFull => break Err(page_full()),
                    Step::Elsewhere | Step::Whole => break Ok(()),
                }
            }
        })
        .await?;
        Ok(leases)
    }

    /// The group on the local plane, for what only the local plane can do.
    async fn local_group_for_leases(&self, group: &GroupRef) -> Result<LocalGroup, Error> {
        let unsupported =
            || Error::Unsupported("leases need the local plane; connect to a Unix socket of this node".into());
        self.local_group(group).await?.ok_or_else(unsupported)
    }

    /// How many leading blocks of a prefix are in memory, as far as the local plane tells; `None` without it.
    pub(crate) fn resident_now(&self, group: &GroupRef, hashes: &[Bytes]) -> Option<Result<usize, Error>> {
        let local = self.local_group_now(group)?;
        let hashes = sequence_hashes(hashes);
        Some(hashes.map(|hashes| local.attachment.resident_run(local.layout, local.group, &hashes)))
    }

    /// Says that blocks of a prefix will be read soon: they are brought into memory when nothing else is to be done. Worth
    /// nothing, and nothing lost, without the local plane. Of a long prefix, the first 2,048 blocks are hinted: a read brings
    /// the others ahead of need by itself, and [`Self::prefetch`] brings all.
    pub fn hint(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<(), Error> {
        let Some(local) = self.local_group_now(group) else { return Ok(()) };
        let hashes = hashes.get(..hashes.len().min(BLOCKS_PER_HINT_MAX)).unwrap_or_default();
        for hashes in sequence_hashes(hashes)?.chunks(HASHES_PER_PROMOTE_MAX) {
            let command = Command::Hint { layout: local.layout, group: local.group, hashes: hashes.to_vec() };
            local.attachment.submit_if_room(u64::MAX, &command);
        }
        Ok(())
    }
}

/// What a read over the local plane came to.
pub(crate) enum LocalRead<T> {
    /// This.
    Done(T),
    /// This much of it, and gRPC can read the rest: the daemon has blocks in memory that this process cannot map, for lack of
    /// descriptors perhaps; or other leases of this process fill its page; or many blocks are missing.
    Partly(T),
}

/// What a promotion came to.
pub(crate) struct Promoted {
    /// Leading blocks that are in memory.
    pub(crate) ready: usize,
    next: v1::GetStatus,
}

impl Promoted {
    /// Pinned data that cannot be read is an error, not a miss.
    fn check(&self, at: usize) -> Result<(), Error> {
        match self.next {
            v1::GetStatus::DataLoss => Err(data_loss(at)),
            _ => Ok(()),
        }
    }

    fn outcome(&self) -> GetOutcome {
        match self.next {
            v1::GetStatus::InFlight | v1::GetStatus::Hit => GetOutcome::InFlight,
            v1::GetStatus::DataLoss => GetOutcome::DataLoss,
            _ => GetOutcome::Miss,
        }
    }
}

/// The error for a pinned block that is lost.
pub(crate) fn data_loss(at: usize) -> Error {
    Error::DataLoss(format!("block {at} is pinned, but can no longer be read from any tier"))
}

/// The daemon keeps what it promoted until this is dropped.
pub(crate) struct Kept {
    attachment: Arc<Attachment>,
    tag: u64,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.attachment.is_live() {
            self.attachment.submit_if_room(self.tag, &Command::Release);
        }
    }
}

impl LocalGroup {
    pub(crate) fn lease_run(&self, hashes: &[SequenceHash]) -> Result<Leases, Error> {
        self.attachment.lease_run(self.layout, self.group, hashes)
    }

    /// How many leading blocks are in memory: a look.
    fn resident_run(&self, hashes: &[SequenceHash]) -> usize {
        self.attachment.resident_run(self.layout, self.group, hashes)
    }

    /// Starts to have blocks brought into memory.
    async fn promote(&self, hashes: &[SequenceHash], ticket: u128, deadline_ms: u32) -> Result<Promoting, Error> {
        let waiting = self.attachment.wait_for(1);
        let (layout, group) = (self.layout, self.group);
        let command = Command::Promote { layout, group, deadline_ms, ticket, hashes: hashes.to_vec() };
        self.attachment.submit(waiting.first(), &command).await?;
        let kept = Kept { attachment: Arc::clone(&self.attachment), tag: waiting.first() };
        Ok(Promoting { waiting, kept })
    }

    /// Has blocks brought into memory. Where calls have too many leases, it waits a moment for some to end.
    async fn promote_patiently(
        &self,
        hashes: &[SequenceHash],
        ticket: u128,
        deadline_ms: u32,
    ) -> Result<(Promoted, Kept), Error> {
        let mut pause = BUSY_PAUSE_FIRST;
        loop {
            match self.promote(hashes, ticket, deadline_ms).await?.ended(hashes.len()).await {
                Err(Error::Busy(_)) if pause <= BUSY_PAUSE_MAX => tokio::time::sleep(pause).await,
                ended => return ended,
            }
            pause *= 2;
        }
    }

    /// Leases blocks that were promoted just now. The slab that they came into may be so new that its announcement is still
    /// on its way: that is waited for. Fewer where a block has left again, or its slab cannot be mapped here.
    async fn lease_promoted(&self, hashes: &[SequenceHash]) -> Result<Leases, Error> {
        let mut pause = PROMOTED_PAUSE_FIRST;
        loop {
            let leases = self.lease_run(hashes)?;
            if !leases.is_empty() || hashes.is_empty() || pause > PROMOTED_PAUSE_MAX {
                return Ok(leases);
            }
            tokio::time::sleep(pause).await;
            self.attachment.receive();
            pause *= 2;
        }
    }

    /// Reads whole blocks into buffers; how many leading ones were read.
    pub(crate) async fn get_into(
        self,
        hashes: Vec<SequenceHash>,
        buffers: &mut [&mut [u8]],
        deadline_ms: u32,
    ) -> Result<LocalRead<usize>, Error> {
        let mut reading = Reading::new(self, hashes, BLOCKS_PER_STEP, deadline_ms);
        loop {
            match reading.step().await? {
                Step::Blocks(leases) => {
                    let first = reading.done() - leases.len();
                    copy_out(&leases, buffers.get_mut(first..).unwrap_or_default(), first)?;
                }
                Step::Missing(promoted) => {
                    promoted.check(reading.done())?;
                    return Ok(LocalRead::Done(reading.done()));
                }
                Step::Elsewhere | Step::PageFull => return Ok(LocalRead::Partly(reading.done())),
                Step::Whole => return Ok(LocalRead::Done(reading.done())),
            }
        }
    }

    /// The outcome of each block. Hits are leased, up to a bound, and copied beyond it: a result that is kept takes at most half
    /// of the process's leases.
    pub(crate) async fn get(
        self,
        hashes: Vec<SequenceHash>,
        options: &GetOptions,
        ticket: u128,
        deadline_ms: u32,
    ) -> Result<LocalRead<Vec<GetOutcome>>, Error> {
        let mut outcomes = Vec::with_capacity(hashes.len());
        if ticket != 0 {
            // Redeems it: an error where its time is over.
            let first = hashes.get(..1).unwrap_or_default();
            drop(self.promote_patiently(first, ticket, deadline_ms).await?);
        }
        let attachment = Arc::clone(&self.attachment);
        let mut reading = Reading::new(self, hashes, BLOCKS_PER_STEP, deadline_ms);
        let mut misses = 0;
        loop {
            match reading.step().await? {
                Step::Blocks(leases) if attachment.leased() <= LEASES_PER_WINDOW_MAX => {
                    outcomes.extend(leases.into_blocks().into_iter().map(hit));
                }
                Step::Blocks(leases) => outcomes.extend(leases.iter().map(Bytes::copy_from_slice).map(GetOutcome::Hit)),
                Step::Missing(promoted) => {
                    outcomes.push(promoted.outcome());
                    if options.leading_run {
                        return Ok(LocalRead::Done(outcomes));
                    }
                    misses += 1;
                    if reading.skip() && misses > MISSES_MAX {
                        return Ok(LocalRead::Partly(outcomes));
                    }
                }
                Step::Elsewhere | Step::PageFull => return Ok(LocalRead::Partly(outcomes)),
                Step::Whole => return Ok(LocalRead::Done(outcomes)),
            }
        }
    }

    pub(crate) async fn put(
        &self,
        blocks: &[PutBlock],
        options: PutOptions,
        deadline_ms: u32,
    ) -> Result<Option<Vec<v1::PutResult>>, Error> {
        let bytes: Vec<&[u8]> = blocks.iter().map(|block| &*block.bytes).collect();
        let slice = |(block, bytes)| {
            let PutBlock { hash, parent, .. }: &PutBlock = block;
            PutSlice { hash, parent: parent.as_deref(), parts: std::slice::from_ref(bytes) }
        };
        let blocks: Vec<PutSlice<'_>> = blocks.iter().zip(&bytes).map(slice).collect();
        self.put_from(&blocks, options, deadline_ms).await
    }

    /// Stores blocks from wherever their bytes are. `None`: the local plane cannot take them now.
    pub(crate) async fn put_from(
        &self,
        blocks: &[PutSlice<'_>],
        options: PutOptions,
        deadline_ms: u32,
    ) -> Result<Option<Vec<v1::PutResult>>, Error> {
        let blocks = blocks
            .iter()
            .map(|block| {
                let parent = block.parent.map(sequence_hash).transpose()?;
                Ok(LocalPut::new(sequence_hash(block.hash)?, parent, block.parts))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let known = matches!(options.level, v1::Level::Unspecified | v1::Level::Memory | v1::Level::Local);
        let can = self.attachment.can(capabilities::PUT) && put::can_put(&blocks);
        if blocks.is_empty() || !known || !can {
            return Ok(None);
        }
        if !self.attachment.wait_for_staging().await {
            self.attachment.staging.forget_refusal();
            return Ok(None);
        }
        let into = PutInto {
            layout: self.layout,
            group: self.group,
            local: options.level == v1::Level::Local,
            upload: options.upload,
            more_follows: options.more_follows,
            deadline_ms,
        };
        self.attachment.put(into, &blocks).await.map(Some)
    }
}

/// A promotion under way. Dropped, what it brought may leave again.
pub(crate) struct Promoting {
    waiting: Waiting,
    kept: Kept,
}

impl Promoting {
    /// What it came to, and what keeps the blocks until they are leased; of `count` blocks.
    async fn ended(self, count: usize) -> Result<(Promoted, Kept), Error> {
        match self.waiting.next().await?.1 {
            Completion::Promoted { ready, next } => {
                let next = v1::GetStatus::try_from(next as i32).unwrap_or(v1::GetStatus::Miss);
                Ok((Promoted { ready: (ready as usize).min(count), next }, self.kept))
            }
            Completion::Failed { code, message } => Err(failure(code, message)),
            _ => Err(Error::Other("the daemon sent the answer to another command".into())),
        }
    }
}

/// Refuses what no lease page has room for: waiting would not help.
fn fit_the_page(blocks: usize) -> Result<(), Error> {
    let most = kvstore_plane::caps::LEASES_PER_CLIENT;
    if blocks <= most {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{blocks} blocks were asked for, but a process can hold leases on at most {most} blocks; read them in windows, with lease_windows, or copy them, with get_into"
    )))
}

/// The error where other leases of this process take all words.
fn page_full() -> Error {
    Error::Busy(format!(
        "this process holds leases on {} blocks, which is the most it may hold; drop some of them",
        kvstore_plane::caps::LEASES_PER_CLIENT
    ))
}

fn hit(block: LeasedBlock) -> GetOutcome {
    GetOutcome::Hit(Bytes::from_owner(block))
}

/// Copies leased blocks into the buffers from block `first` on.
fn copy_out(leases: &Leases, buffers: &mut [&mut [u8]], first: usize) -> Result<usize, Error> {
    let mut copies = Vec::with_capacity(leases.len());
    for ((at, from), to) in (first..).zip(leases.iter()).zip(buffers) {
        if from.len() != to.len() {
            let problem = format!("block {at} has {} bytes, and its buffer has {}", from.len(), to.len());
            return Err(Error::Invalid(problem));
        }
        copies.push(Copy { from, to });
    }
    copy_all(&mut copies);
    Ok(copies.len())
}
