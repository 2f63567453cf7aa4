//! Writing one pack: a create-only PUT, and a read of what is there then.
//!
//! A PUT whose answer was lost may have succeeded; its repetition is refused. So whoever is refused reads the object's footer: its
//! own nonce means that it is done, another's that a writer with the same blocks was faster. That object is then read whole and
//! checked, and adopted: two engines may have computed slightly different bytes for one name, either is right. What is damaged,
//! or may soon be collected, is not rested on: the blocks are written again, under a name with a number behind it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use kvstore_transfer::SectionSums;
use kvstore_transfer::frame::{FRAME_ALIGN, FrameHeader};
use object_store::ObjectMeta;
use object_store::path::Path;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::Pack;
use super::names::{BlockName, PackName};
use super::pack::{Footer, PackedBlock};
use super::proof::{Proof, Stamp};
use super::upload::Member;
use crate::block::BlockRef;
use crate::bucket::{Trouble, retried};
use crate::caps;
use crate::changes::NamespaceTag;
use crate::clock::BootTime;
use crate::host::RegisteredLayout;

/// Names under which the same blocks are tried, each a number behind the last: damaged and old ones are few.
const REWRITES_MAX: u32 = 16;
static PADDING: [u8; FRAME_ALIGN] = [0; FRAME_ALIGN];

/// What was written is read back so often, where it comes damaged: a byte may flip on its way.
const CONFIRMATIONS: usize = 2;
/// An object that says that it was written later than it can be now, by more than this, is no younger than any other: clocks of
/// the servers of one store differ by less.
const SKEW_MS: i64 = 5 * 60 * 1000;

/// A pack that is about to be written.
pub(super) struct Packing {
    pub pieces: Vec<Bytes>,
    pub bytes: u64,
    pub footer: Footer,
    pub footer_bytes: Bytes,
}

impl ObjectTier {
    /// Writes a run of one chain, all in memory, to the bucket. Returns once it is confirmed there.
    pub(super) async fn write_pack(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        run: &[Member],
    ) -> Result<(), Trouble> {
        if run.is_empty() {
            return Ok(());
        }
        let nonce = self.next_id().to_le_bytes();
        let packing =
            pack(layout, group, run, nonce).ok_or_else(|| Trouble::Failed("a block cannot be framed".into()))?;
        self.store_packing(layout, &packing, Instant::now() + self.write_time(packing.bytes)).await?;
        self.counts.written_packs.fetch_add(1, Ordering::Relaxed);
        self.counts.written_blocks.fetch_add(run.len() as u64, Ordering::Relaxed);
        self.counts.written_bytes.fetch_add(packing.bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a pack under the first of its names that is free, or adopts what is there. Returns once it is confirmed and known.
    pub(super) async fn store_packing(
        &self,
        layout: &Arc<RegisteredLayout>,
        packing: &Packing,
        deadline: Instant,
    ) -> Result<(), Trouble> {
        let Footer { group, blocks, .. } = &packing.footer;
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return Ok(()) };
        let names = self.names.group(layout, *group);
        let (first, last) = (BlockName::of(&first.hash), BlockName::of(&last.hash));
        for rewrite in 0..REWRITES_MAX {
            let location = names.pack(&PackName { first, last, rewrite });
            let there = self.create_or_adopt(&location, packing, deadline).await?;
            let Some(meta) = there else { continue };
            let blocks = blocks.iter().map(|block| self.packed(layout, *group, block)).collect();
            let namespace = NamespaceTag::of(&layout.namespace_digest);
            let pack = Pack::new(location, meta.size, meta.last_modified.timestamp_millis(), blocks, namespace);
            pack.set_proof(Proof::Sound(Stamp::of(&meta)));
            self.state.lock().directory.insert(&pack);
            return Ok(());
        }
        Err(Trouble::Failed(format!("{REWRITES_MAX} objects with these blocks are old or damaged")))
    }

    /// The object at `location`, once it is known to hold the pack; `None` where another is there that cannot be rested on.
    async fn create_or_adopt(
        &self,
        location: &Path,
        packing: &Packing,
        deadline: Instant,
    ) -> Result<Option<ObjectMeta>, Trouble> {
        let (mut tries, mut tried) = (0, false);
        let began = self.bucket.now();
        loop {
            let created =
                retried!(self.bucket, deadline, packing.bytes, self.create_unless_there(location, packing, &mut tried));
            let ended = self.bucket.now();
            let written = began..ended;
            match created {
                Ok(()) => return self.confirm(location, packing, written, deadline).await,
                Err(Trouble::Exists) => match self.whose(location, packing, deadline).await {
                    Ok(Whose::Own) => return self.confirm(location, packing, written, deadline).await,
                    Ok(Whose::Sound(meta)) => return Ok(Some(meta)),
                    Ok(Whose::Unsound) => return Ok(None),
                    // Refused, and not there: another writer is at it, or it was collected just now.
                    Err(Trouble::NotFound) if tries < caps::OBJECT_TRIES_MAX => {
                        tries += 1;
                        tokio::time::sleep(self.bucket.backoff(tries)).await;
                    }
                    Err(trouble) => return Err(trouble),
                },
                Err(trouble) => return Err(trouble),
            }
        }
    }

    /// One try of a create. A repeated one looks first: the earlier may have succeeded, and a store that refuses may close the
    /// connection before it has read the body, so that the refusal is not seen.
    async fn create_unless_there(&self, location: &Path, packing: &Packing, tried: &mut bool) -> Result<(), Trouble> {
        if std::mem::replace(tried, true) {
            match self.bucket.head_once(location).await {
                Err(Trouble::NotFound) => {}
                Ok(_) => return Err(Trouble::Exists),
                Err(trouble) => return Err(trouble),
            }
        }
        self.bucket.create(location, packing.pieces.iter().cloned().collect()).await
    }

    /// What was created at `written` is there, has the right length, and the right bytes: all of them are read back, or the footer alone
    /// where the store checks what it is sent. `None`: something else is there.
    async fn confirm(
        &self,
        location: &Path,
        packing: &Packing,
        written: Range<BootTime>,
        deadline: Instant,
    ) -> Result<Option<ObjectMeta>, Trouble> {
        let footer_at = packing.bytes - packing.footer_bytes.len() as u64;
        let (start, expected) = match self.reads_back() {
            true => (0, &packing.pieces[..]),
            false => (footer_at, std::slice::from_ref(&packing.footer_bytes)),
        };
        let _room = self.checked_bytes.room(packing.bytes - start, deadline).await?;
        for _ in 0..CONFIRMATIONS {
            let (read, meta) = match self.bucket.read(location, start..packing.bytes, deadline).await {
                Err(Trouble::Cut { .. }) => break,
                read => read?,
            };
            if meta.size == packing.bytes && is_made_of(&read, expected) {
                self.bucket.clock.note(written.start, written.end, meta.last_modified.timestamp_millis());
                return Ok(Some(meta));
            }
        }
        tracing::error!(%location, "the store holds other bytes than were sent to it; the blocks are written again under another name");
        let _ = self.bucket.delete(location, deadline).await;
        Ok(None)
    }

    /// Whose the object is that is there already.
    async fn whose(&self, location: &Path, packing: &Packing, deadline: Instant) -> Result<Whose, Trouble> {
        let meta = self.bucket.head(location, deadline).await?;
        let footer = match self.footer_of(&meta, deadline).await {
            Ok(footer) => footer,
            Err(Trouble::Damaged(_) | Trouble::Cut { .. }) => return Ok(Whose::Unsound),
            Err(trouble) => return Err(trouble),
        };
        if footer.nonce == packing.footer.nonce {
            return Ok(Whose::Own);
        }
        // The same blocks take the same bytes.
        if meta.size != packing.bytes || !self.is_young(meta.last_modified.timestamp_millis()) {
            return Ok(Whose::Unsound);
        }
        let sound = same_blocks(&footer, &packing.footer)
            && match self.damaged_blocks(&footer, &meta, deadline).await {
                Err(Trouble::Cut { .. }) => false,
                damaged => damaged?.is_empty(),
            };
        if !sound {
            tracing::warn!(%location, "a pack in the bucket is damaged; its blocks are written again under another name");
        }
        Ok(if sound { Whose::Sound(meta) } else { Whose::Unsound })
    }

    /// True where an acknowledgement may rest on an object that was written then, by the store's clock: no collector takes it for
    /// a while. False where it is not known how late it is there.
    pub(super) fn is_young(&self, written_ms: i64) -> bool {
        let Some(now_ms) = self.bucket.clock.latest_ms(self.bucket.now()) else { return false };
        (-SKEW_MS..caps::OBJECT_GRACE_MS / 2).contains(&(now_ms - written_ms))
    }
}

enum Whose {
    /// This very pack: an answer was lost.
    Own,
    /// Another writer's, with the same blocks.
    Sound(ObjectMeta),
    /// Damaged, or so old that it may be collected soon.
    Unsound,
}

fn is_made_of(bytes: &[u8], pieces: &[Bytes]) -> bool {
    let rest = pieces.iter().try_fold(bytes, |rest, piece| rest.strip_prefix(&piece[..]));
    rest.is_some_and(<[u8]>::is_empty)
}

fn same_blocks(one: &Footer, other: &Footer) -> bool {
    (one.namespace_digest, one.layout_digest, one.group) == (other.namespace_digest, other.layout_digest, other.group)
        && one.blocks == other.blocks
}

/// Frames the members of a run, without copying them.
fn pack(layout: &Arc<RegisteredLayout>, group: u16, run: &[Member], nonce: [u8; 16]) -> Option<Packing> {
    let [a, b, c, d, e, f, g, h, ..] = nonce;
    let generation = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let (mut pieces, mut blocks, mut bytes) =
        (Vec::with_capacity(run.len() * 3 + 1), Vec::with_capacity(run.len()), 0u64);
    for member in run {
        let block = member.block.clone()?;
        let named = BlockRef { layout, group, hash: member.hash };
        let (identity, section) = (named.identity(member.parent)?, named.section_bytes());
        let sums = if member.sums.is_empty() { sums_of(&block, section) } else { member.sums.clone() };
        let header = FrameHeader::of_sums(identity, generation, block.len() as u64, section, &sums)?;
        let frame_bytes = header.frame_bytes();
        let padding = frame_bytes as usize - header.payload_offset() - block.len();
        pieces.push(Bytes::from(header.encode()));
        pieces.push(block);
        if padding > 0 {
            pieces.push(Bytes::from_static(PADDING.get(..padding)?));
        }
        blocks.push(PackedBlock { hash: member.hash, offset: bytes, frame_bytes });
        bytes += frame_bytes;
    }
    let footer =
        Footer { namespace_digest: layout.namespace_digest, layout_digest: layout.digest, group, nonce, blocks };
    let footer_bytes = Bytes::from(footer.encode());
    pieces.push(footer_bytes.clone());
    bytes += footer_bytes.len() as u64;
    Some(Packing { pieces, bytes, footer, footer_bytes })
}

fn sums_of(block: &[u8], section_bytes: u32) -> Vec<u32> {
    let mut sums = SectionSums::new(section_bytes as usize);
    sums.update(block);
    sums.sections()
}
