//! Proofs: what an acknowledgement of DURABLE rests on, where the block is in the bucket already.
//!
//! A listing says that an object has a name and a length. That is no proof: its bytes may be damaged, or another's. This daemon has
//! proof of a pack where it wrote the pack and confirmed it, or read all of it and found every frame to be what its name says. With
//! the proof it keeps what the store said of the object then (length, e-tag, version, time); while a HEAD says the same, the proof
//! holds. It is kept in memory, so that a daemon that starts anew proves anew. Bytes that rot in the store without a change of
//! what it says of them are not seen by this; the checksums see them when they are read.
//!
//! Blocks of one pack are offered together. Those that come while it is being proven wait for the next round, which begins after
//! they came: what was deleted before a put began is not acknowledged to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvstore_transfer::frame::FrameHeader;
use object_store::ObjectMeta;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::{Pack, Packed};
use super::pack::{Footer, PackedBlock};
use super::upload::{Offer, Offered};
use crate::block::padded;
use crate::bucket::{Trouble, retried};
use crate::caps;
use crate::host::RegisteredLayout;

/// What a store says of an object, as one number: another one where any of it changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp(u64);

impl Stamp {
    /// Of this object.
    pub fn of(meta: &ObjectMeta) -> Self {
        let ObjectMeta { size, last_modified, e_tag, version, .. } = meta;
        // Listings say the time to the millisecond, HEAD requests to the second.
        let text = format!("{size} {} {e_tag:?} {version:?}", last_modified.timestamp());
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }
}

/// What this daemon knows of a pack's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    /// Nothing: it was listed.
    None,
    /// They are right, while the store says this of the object.
    Sound(Stamp),
    /// Some are damaged.
    Damaged,
}

/// Whether an acknowledgement may rest on a pack.
enum Rest {
    Yes,
    /// It is damaged, gone, another's, or may soon be collected: the blocks are written again.
    No,
    /// The store does not say.
    Unknown,
}

/// A block that is acknowledged once the pack that has it is proven.
pub(super) struct Resting {
    offer: Offer,
    told: oneshot::Sender<bool>,
    _leased: Counted,
}

/// Bytes that are leased until this goes.
struct Counted {
    bytes: u64,
    count: Arc<AtomicU64>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl ObjectTier {
    /// Acknowledges a block that is known to be in `pack`, once that is proven; else uploads it.
    pub(super) fn rest_on(self: &Arc<Self>, pack: Arc<Pack>, offer: Offer) -> oneshot::Receiver<bool> {
        let (told, waiting) = oneshot::channel();
        let bytes = offer.block.len() as u64;
        self.leased_bytes.fetch_add(bytes, Ordering::AcqRel);
        let leased = Counted { bytes, count: Arc::clone(&self.leased_bytes) };
        // Whoever proves it keeps the pack, so that no other gets its place in memory.
        let key = Arc::as_ptr(&pack) as usize;
        let resting = Resting { offer, told, _leased: leased };
        let mut proving = self.proving.lock();
        match proving.get_mut(&key) {
            Some(round) => round.push(resting),
            None => {
                proving.insert(key, vec![resting]);
                let tier = Arc::clone(self);
                self.runtime.spawn(async move { tier.prove_rounds(&pack, key).await });
            }
        }
        waiting
    }

    async fn prove_rounds(self: &Arc<Self>, pack: &Arc<Pack>, key: usize) {
        loop {
            let round = {
                let mut proving = self.proving.lock();
                let round = proving.get_mut(&key).map(std::mem::take).unwrap_or_default();
                if round.is_empty() {
                    proving.remove(&key);
                }
                round
            };
            let Some(first) = round.first() else { return };
            let (layout, group) = (Arc::clone(&first.offer.layout), first.offer.group);
            let deadline = Instant::now() + self.write_time(pack.bytes);
            match self.may_rest_on(pack, &layout, group, deadline).await {
                Rest::Yes => round.into_iter().for_each(|resting| _ = resting.told.send(true)),
                Rest::Unknown => round.into_iter().for_each(|resting| _ = resting.told.send(false)),
                Rest::No => self.upload_resting(round),
            }
            self.uploaded.notify_waiters();
        }
    }

    fn upload_resting(self: &Arc<Self>, round: Vec<Resting>) {
        let limits = *self.limits.lock();
        let take = |resting: Resting| {
            let Resting { offer, told, .. } = resting;
            let digest = self.digest(&offer.layout, offer.group, &offer.hash);
            match self.take(offer, digest, &limits) {
                Offered::Accepted(Some(waiting)) => Some((told, waiting)),
                // Whoever waits is told so by the channel's end.
                Offered::Accepted(None) | Offered::Full => None,
            }
        };
        let taken: Vec<_> = round.into_iter().filter_map(take).collect();
        self.flush();
        self.runtime.spawn(async move {
            for (told, waiting) in taken {
                let _ = told.send(waiting.await == Ok(true));
            }
        });
    }

    async fn may_rest_on(
        &self,
        pack: &Arc<Pack>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        deadline: Instant,
    ) -> Rest {
        if let Err(trouble) = self.measure_if_old(deadline).await {
            tracing::debug!(%trouble, "the store's time cannot be measured");
            return Rest::Unknown;
        }
        let meta = match self.bucket.head(&pack.location, deadline).await {
            Ok(meta) => meta,
            Err(Trouble::NotFound) => {
                self.state.lock().directory.remove(pack);
                return Rest::No;
            }
            Err(_) => return Rest::Unknown,
        };
        if meta.size != pack.bytes {
            self.state.lock().directory.remove(pack);
            return Rest::No;
        }
        if !self.is_young(meta.last_modified.timestamp_millis()) {
            return Rest::No;
        }
        match pack.proof() {
            Proof::Sound(stamp) if stamp == Stamp::of(&meta) => return Rest::Yes,
            Proof::Damaged => return Rest::No,
            Proof::Sound(_) | Proof::None => {}
        }
        let Ok(_permit) = self.proofs.acquire().await else { return Rest::Unknown };
        match self.prove(pack, &meta, layout, group, deadline).await {
            Ok(true) => {
                pack.set_proof(Proof::Sound(Stamp::of(&meta)));
                Rest::Yes
            }
            Ok(false) | Err(Trouble::NotFound | Trouble::Cut { .. }) => Rest::No,
            Err(_) => Rest::Unknown,
        }
    }

    /// Reads a pack and checks all of it. What is damaged is noted; a pack that is another's is forgotten.
    async fn prove(
        &self,
        pack: &Arc<Pack>,
        meta: &ObjectMeta,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        deadline: Instant,
    ) -> Result<bool, Trouble> {
        let footer = match self.footer_of(meta, deadline).await {
            Ok(footer) => Some(footer),
            Err(Trouble::Damaged(_) | Trouble::Cut { .. }) => None,
            Err(trouble) => return Err(trouble),
        };
        let footer = footer.filter(|footer| {
            let packed: Vec<Packed> = footer.blocks.iter().map(|block| self.packed(layout, group, block)).collect();
            (footer.namespace_digest, footer.layout_digest, footer.group)
                == (layout.namespace_digest, layout.digest, group)
                && packed[..] == pack.blocks[..]
        });
        let Some(footer) = footer else {
            tracing::warn!(pack = %pack.location, "an object in the bucket is not the pack that its name says; its blocks are written again");
            self.state.lock().directory.remove(pack);
            return Ok(false);
        };
        let damaged = self.damaged_blocks(&footer, meta, deadline).await?;
        if damaged.is_empty() {
            return Ok(true);
        }
        self.counts.corrupt_blocks.fetch_add(damaged.len() as u64, Ordering::Relaxed);
        tracing::warn!(pack = %pack.location, blocks = damaged.len(), "a pack in the bucket is damaged; its blocks are written again as they are put");
        pack.set_proof(Proof::Damaged);
        let mut state = self.state.lock();
        for block in &damaged {
            state.directory.note_damaged(pack, self.digest(layout, group, &block.hash));
        }
        Ok(false)
    }

    /// The blocks of a pack whose frames are not what its footer says: those of the first piece that has any, for one is enough.
    /// What comes twice alike is how it is stored; what differs was damaged on its way, and is read again.
    pub(super) async fn damaged_blocks(
        &self,
        footer: &Footer,
        meta: &ObjectMeta,
        deadline: Instant,
    ) -> Result<Vec<PackedBlock>, Trouble> {
        for piece in pieces(&footer.blocks) {
            let mut before = None;
            let piece_bytes = piece.iter().map(|block| block.frame_bytes).sum();
            let _room = self.checked_bytes.room(piece_bytes, deadline).await?;
            let damaged =
                retried!(self.bucket, deadline, piece_bytes, self.damaged_in(piece, footer, meta, &mut before))?;
            if !damaged.is_empty() {
                return Ok(damaged);
            }
        }
        Ok(Vec::new())
    }

    async fn damaged_in(
        &self,
        piece: &[PackedBlock],
        footer: &Footer,
        meta: &ObjectMeta,
        before: &mut Option<u64>,
    ) -> Result<Vec<PackedBlock>, Trouble> {
        let (Some(first), Some(last)) = (piece.first(), piece.last()) else { return Ok(Vec::new()) };
        let (bytes, _) = self.bucket.read_once(&meta.location, first.offset..last.offset + last.frame_bytes).await?;
        let frame = |block: &PackedBlock| bytes.get((block.offset - first.offset) as usize..);
        let damaged: Vec<PackedBlock> =
            piece.iter().filter(|block| !is_sound(block, footer, frame(block))).copied().collect();
        let sum = Some(xxhash_rust::xxh3::xxh3_64(&bytes));
        if damaged.is_empty() || std::mem::replace(before, sum) == sum {
            return Ok(damaged);
        }
        Err(Trouble::Damaged(format!("{} blocks do not match their checksums", damaged.len())))
    }

    /// The store's time is known as of a while ago at most.
    pub(super) async fn measure_if_old(&self, deadline: Instant) -> Result<(), Trouble> {
        if self.bucket.clock.is_fresh(self.bucket.now()) {
            return Ok(());
        }
        let name = format!("{:032x}", self.next_id());
        crate::bucket::measure(&self.bucket, self.names.root(), &name, deadline).await
    }

    /// For how long the writing, or the reading, of so many bytes is tried.
    pub(super) fn write_time(&self, bytes: u64) -> Duration {
        Duration::from_millis(caps::OBJECT_STALL_MS * u64::from(caps::OBJECT_TRIES_MAX) + bytes / 1000)
    }
}

/// Neighbours that are read with one request.
fn pieces(blocks: &[PackedBlock]) -> Vec<&[PackedBlock]> {
    let (mut pieces, mut rest) = (Vec::new(), blocks);
    while let Some(first) = rest.first() {
        let fits =
            |block: &&PackedBlock| block.offset + block.frame_bytes - first.offset <= caps::OBJECT_READ_BYTES_MAX;
        let count = rest.iter().take_while(fits).count().max(1);
        let (piece, behind) = rest.split_at(count);
        pieces.push(piece);
        rest = behind;
    }
    pieces
}

/// True where `frame` begins with the frame of this block, and all of it is right.
pub(super) fn is_sound(block: &PackedBlock, footer: &Footer, frame: Option<&[u8]>) -> bool {
    let Some(frame) = frame.and_then(|frame| frame.get(..block.frame_bytes as usize)) else { return false };
    let Ok(header) = FrameHeader::decode(frame) else { return false };
    let ours = header.identity.namespace_digest == footer.namespace_digest
        && header.identity.layout_digest == footer.layout_digest
        && header.identity.group == footer.group
        && header.identity.hash == padded(&block.hash)
        && header.frame_bytes() == block.frame_bytes;
    let at = header.payload_offset();
    let payload = frame.get(at..at + header.payload_bytes() as usize);
    ours && payload.is_some_and(|payload| header.verify(payload).is_ok())
}
