//! Searching: which blocks of a chain are in the bucket, whoever stored them.
//!
//! Packs are named by their first and last block, so that a listing of one block's name tells the packs that begin with it. Where
//! the last block is in the asked chain, too, so are all between, and no more has to be read; else it is a branch, and its
//! footer tells how far it goes along. Places where packs begin in any case ([`begins_pack`]) are listed at once, the rest one
//! after another. One search serves all who ask for the same blocks.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvstore_plane::SequenceHash;
use kvstore_transfer::frame::FRAME_ALIGN;
use object_store::ObjectMeta;
use tokio::sync::watch;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::{Directory, Pack};
use super::names::{BlockName, GroupNames, PackName};
use super::pack::{FOOTER_BYTES_MAX, Footer, PackError, PackedBlock, begins_pack};
use crate::below::Searching;
use crate::block::Digest;
use crate::bucket::Trouble;
use crate::caps;
use crate::changes::NamespaceTag;
use crate::clock::BootTime;
use crate::host::RegisteredLayout;
use crate::layout::BlockKind;

/// A chain, and what is known of it.
struct Chain {
    layout: Arc<RegisteredLayout>,
    group: u16,
    names: GroupNames,
    hashes: Vec<SequenceHash>,
    digests: Vec<Digest>,
    places: HashMap<BlockName, usize>,
    /// Nothing is looked for behind a block that is nowhere.
    ends_at_gap: bool,
}

/// Where packs of a chain may begin.
struct Places {
    waiting: BTreeSet<usize>,
    listed: HashSet<usize>,
    /// Those of them where nothing was.
    nowhere: HashSet<usize>,
    /// They are a deletion's, whose listings take their turn among those of all deletions.
    in_turn: bool,
    /// Nothing is looked for from here on.
    gap: usize,
    /// Listings that may be under way.
    at_once: usize,
}

impl Places {
    fn at(starts: Vec<usize>) -> Self {
        Self {
            waiting: BTreeSet::from_iter(starts),
            listed: HashSet::new(),
            nowhere: HashSet::new(),
            in_turn: false,
            gap: usize::MAX,
            at_once: 2,
        }
    }
}

impl ObjectTier {
    /// Starts to look for the blocks of a chain of which it is not known whether they are in the bucket. `None` where nothing is
    /// unknown, or the store does not answer.
    pub fn search(
        self: &Arc<Self>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
        now: BootTime,
    ) -> Option<Searching> {
        if self.bucket.is_away() {
            return None;
        }
        let digests: Vec<Digest> = hashes.iter().map(|hash| self.digest(layout, group, hash)).collect();
        let mut state = self.state.lock();
        let starts = starts(&state.directory, hashes, &digests, self.blocks_per_pack(layout, group), now);
        let (first, last) = (starts.first().and_then(|at| digests.get(*at))?, digests.last()?);
        let key = Digest(first.0 ^ last.0.rotate_left(1));
        if let Some(running) = state.searches.get(&key) {
            return Some(Searching::new(running.clone()));
        }
        if state.searches.len() >= caps::OBJECT_SEARCHES_MAX * 4 {
            return None;
        }
        let (ended, running) = watch::channel(());
        state.searches.insert(key, running.clone());
        drop(state);
        let chain = self.chain_of(layout, group, hashes);
        let tier = Arc::clone(self);
        self.runtime.spawn(async move {
            // What is beyond one piece is found by the next search.
            if let Err(trouble) = tier.search_piece(&chain, &mut Places::at(starts), now).await {
                tracing::debug!(%trouble, "the bucket cannot be searched");
            }
            tier.state.lock().searches.remove(&key);
            drop(ended);
        });
        Some(Searching::new(running))
    }

    fn chain_of(&self, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) -> Chain {
        let digests = hashes.iter().map(|hash| self.digest(layout, group, hash)).collect();
        let places = hashes.iter().map(BlockName::of).zip(0..).collect();
        let names = self.names.group(layout, group);
        let ends_at_gap = self.blocks_per_pack(layout, group) > 1;
        Chain { layout: Arc::clone(layout), group, names, hashes: hashes.to_vec(), digests, places, ends_at_gap }
    }

    /// Looks for blocks whatever was found lately, behind gaps, too, to the end of the chain however long it is, and fails where that
    /// cannot be done: for whoever promises that they are gone. Places that are in `nowhere` are left out, and those where nothing was
    /// are added to it.
    pub(super) async fn search_anew(
        self: &Arc<Self>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
        nowhere: &mut HashSet<usize>,
    ) -> Result<(), Trouble> {
        let chain = Chain { ends_at_gap: false, ..self.chain_of(layout, group, hashes) };
        let starts = {
            let mut state = self.state.lock();
            chain.digests.iter().for_each(|digest| state.directory.forget_absence(*digest));
            let per_pack = self.blocks_per_pack(layout, group);
            starts(&state.directory, hashes, &chain.digests, per_pack, (self.clock)())
        };
        let mut places = Places { listed: nowhere.clone(), in_turn: true, ..Places::at(starts) };
        while !places.waiting.is_empty() {
            self.search_piece(&chain, &mut places, (self.clock)()).await?;
            if places.waiting.is_empty() {
                // Behind a gap a pack may begin anywhere: what is left of one whose first blocks were deleted does.
                places.at_once = caps::OBJECT_SEARCHES_EVERYWHERE_MAX;
                let state = self.state.lock();
                let unknown = chain.digests.iter().zip(0..).filter(|(digest, _)| !state.directory.has(**digest));
                let unknown = unknown.map(|(_, at)| at).filter(|at| !places.listed.contains(at));
                places.waiting = unknown.collect();
            }
        }
        nowhere.extend(places.nowhere);
        Ok(())
    }

    /// Packs in the folder of `pack`, which begin with the same block: branches, and the same blocks written again.
    pub(super) async fn packs_beside(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        pack: &Pack,
        deadline: Instant,
    ) -> Result<Vec<Arc<Pack>>, Trouble> {
        let chain = self.chain_of(layout, group, &[]);
        let folder = pack.location.prefix_match(self.names.root()).into_iter().flatten();
        let mut folder: Vec<_> = folder.collect();
        folder.pop();
        let folder = folder.into_iter().fold(self.names.root().clone(), |folder, part| folder.join(part));
        let mut beside = Vec::new();
        for object in self.bucket.list(&folder, caps::OBJECT_BRANCHES_MAX, deadline).await? {
            if object.location != pack.location
                && chain.names.parse(&object.location).is_some()
                && let Some(other) = self.pack_by_footer(&chain, &object, deadline).await?
            {
                beside.push(other);
            }
        }
        Ok(beside)
    }

    /// Blocks of a pack that a writer aims at. One, for kinds that are read without their prefix: a chain of them has holes.
    pub(super) fn blocks_per_pack(&self, layout: &RegisteredLayout, group: u16) -> u64 {
        match layout.group(u32::from(group)) {
            Some(group) if group.group.kind == BlockKind::Attention => {
                (caps::OBJECT_PACK_BYTES / group.block_bytes.max(1)).clamp(1, caps::OBJECT_PACK_BLOCKS_MAX as u64)
            }
            _ => 1,
        }
    }

    /// Lists place after place, more of them at once the more is found, up to the first gap: attention reads nothing behind one. Ends
    /// after so many listings; what has not been looked at by then is left in `places`.
    async fn search_piece(self: &Arc<Self>, chain: &Chain, places: &mut Places, now: BootTime) -> Result<(), Trouble> {
        let within = std::time::Duration::from_millis(caps::OBJECT_STALL_MS * 2);
        let deadline = Instant::now() + within;
        let mut under_way = FuturesUnordered::new();
        let mut listings = 0;
        loop {
            while under_way.len() < places.at_once
                && listings < caps::OBJECT_LISTINGS_PER_SEARCH_MAX
                && let Some(at) = places.waiting.pop_first()
            {
                let Some((hash, digest)) = chain.hashes.get(at).zip(chain.digests.get(at)) else { continue };
                if at < places.gap && !self.state.lock().directory.has(*digest) && places.listed.insert(at) {
                    listings += 1;
                    let turns = places.in_turn.then_some(&self.deletion_listings);
                    under_way.push(async move {
                        let (turn, deadline) = match turns {
                            // From its turn on, it has the time of all of them.
                            Some(turns) => (turns.acquire().await.ok(), Instant::now() + within),
                            None => (None, deadline),
                        };
                        let found = self.packs_at(chain, at, hash, deadline).await;
                        drop(turn);
                        (at, found)
                    });
                }
            }
            let Some((at, found)) = under_way.next().await else { return Ok(()) };
            match found? {
                0 => {
                    places.nowhere.insert(at);
                    if let Some(digest) = chain.digests.get(at) {
                        self.state.lock().directory.note_absent(*digest, now.plus_ms(caps::OBJECT_ABSENT_MS));
                    }
                    places.gap = if chain.ends_at_gap { places.gap.min(at) } else { places.gap };
                }
                blocks => {
                    // What comes behind begins another pack.
                    places.waiting.insert(at + blocks);
                    places.at_once = places.at_once.max((places.at_once * 2).min(caps::OBJECT_SEARCHES_MAX));
                }
            }
        }
    }

    /// Finds the packs that begin with the block at `at`, and makes them known. How many blocks of the chain they have.
    async fn packs_at(
        &self,
        chain: &Chain,
        at: usize,
        first: &SequenceHash,
        deadline: Instant,
    ) -> Result<usize, Trouble> {
        let folder = chain.names.beginning_with(&BlockName::of(first));
        let mut objects: Vec<(PackName, ObjectMeta)> = self
            .bucket
            .list(&folder, caps::OBJECT_BRANCHES_MAX, deadline)
            .await?
            .into_iter()
            .filter_map(|object| Some((chain.names.parse(&object.location)?, object)))
            .collect();
        // Those that go furthest along the chain first; of rewrites the newest.
        objects.sort_by_key(|(name, object)| {
            let length = chain.places.get(&name.last).map_or(0, |last| (last + 1).saturating_sub(at));
            (std::cmp::Reverse(length), std::cmp::Reverse(name.rewrite), std::cmp::Reverse(object.last_modified))
        });
        let digests = chain.digests.get(at..).unwrap_or_default();
        let (mut most, mut footers) = (0, 0);
        for (name, object) in &objects {
            // The last block is in the chain, and so are all between; or it is a branch, and its footer tells how far it goes.
            let whole = chain.places.get(&name.last).and_then(|last| (last + 1).checked_sub(at));
            let even = whole.and_then(|blocks| self.even_pack(chain, object, chain.hashes.get(at..at + blocks)?));
            let pack = match even {
                Some(pack) => pack,
                None if footers < BRANCHES_READ => {
                    footers += 1;
                    let Some(pack) = self.pack_by_footer(chain, object, deadline).await? else { continue };
                    pack
                }
                None => continue,
            };
            let along = pack.blocks.iter().zip(digests).take_while(|(block, digest)| block.digest == **digest).count();
            if along > 0 {
                most = most.max(along);
                let mut state = self.state.lock();
                state.directory.insert(&pack);
                // Unless it is known to be damaged in there: then the next copy is looked for.
                if digests.iter().take(most).all(|digest| state.directory.has(*digest)) {
                    break;
                }
            }
        }
        Ok(most)
    }

    /// The pack of blocks that are all of one size, as it must be if it is sound: its footer need not be read.
    fn even_pack(&self, chain: &Chain, object: &ObjectMeta, hashes: &[SequenceHash]) -> Option<Arc<Pack>> {
        let frame_bytes = self.frame_bytes(&chain.layout, chain.group)?;
        let count = hashes.len() as u64;
        let footer = super::pack::footer_bytes(hashes.len());
        if hashes.len() > caps::OBJECT_PACK_BLOCKS_MAX || object.size != count * frame_bytes + footer {
            return None;
        }
        let packed = |(hash, at): (&SequenceHash, u64)| {
            let block = PackedBlock { hash: *hash, offset: at * frame_bytes, frame_bytes };
            self.packed(&chain.layout, chain.group, &block)
        };
        let blocks = hashes.iter().zip(0..).map(packed).collect();
        let written_ms = object.last_modified.timestamp_millis();
        let namespace = NamespaceTag::of(&chain.layout.namespace_digest);
        Some(Pack::new(object.location.clone(), object.size, written_ms, blocks, namespace))
    }

    /// A pack as its footer says; `None` where that is damaged or another's.
    async fn pack_by_footer(
        &self,
        chain: &Chain,
        object: &ObjectMeta,
        deadline: Instant,
    ) -> Result<Option<Arc<Pack>>, Trouble> {
        let footer = match self.footer_of(object, deadline).await {
            Ok(footer) => footer,
            // It went meanwhile, or is no pack of ours: nothing is known of it.
            Err(Trouble::NotFound) => return Ok(None),
            Err(trouble @ (Trouble::Damaged(_) | Trouble::Cut { .. })) => {
                tracing::warn!(pack = %object.location, why = %trouble, "a pack's footer is damaged");
                return Ok(None);
            }
            Err(trouble) => return Err(trouble),
        };
        // A frame is its block, a page of header at most, and what rounds it up.
        let block_bytes = chain.layout.group(u32::from(chain.group)).map_or(0, |group| group.block_bytes);
        let frame_bytes_max = block_bytes + 2 * FRAME_ALIGN as u64;
        let ours = footer.namespace_digest == chain.layout.namespace_digest
            && footer.layout_digest == chain.layout.digest
            && footer.group == chain.group
            && footer.blocks.iter().all(|block| block.frame_bytes <= frame_bytes_max);
        let written_ms = object.last_modified.timestamp_millis();
        let pack = || {
            let blocks = footer.blocks.iter().map(|block| self.packed(&chain.layout, chain.group, block)).collect();
            let namespace = NamespaceTag::of(&footer.namespace_digest);
            Pack::new(object.location.clone(), object.size, written_ms, blocks, namespace)
        };
        Ok(ours.then(pack))
    }

    /// Reads a pack's footer.
    pub(super) async fn footer_of(&self, object: &ObjectMeta, deadline: Instant) -> Result<Footer, Trouble> {
        if object.size == 0 {
            // There is no range of nothing: a store that is asked for one answers with an error.
            return Err(Trouble::Damaged(PackError::Magic.to_string()));
        }
        let mut bytes = FOOTER_FIRST_BYTES;
        loop {
            let start = object.size.saturating_sub(bytes);
            let damaged = |error: PackError| Trouble::Damaged(error.to_string());
            let (last, meta) = self.bucket.read(&object.location, start..object.size, deadline).await?;
            if meta.size != object.size {
                return Err(Trouble::Damaged(format!(
                    "the object has {} bytes, but was listed with {}",
                    meta.size, object.size
                )));
            }
            match Footer::decode(&last, object.size) {
                Err(PackError::Longer(need)) if need <= FOOTER_BYTES_MAX && need > bytes && need <= object.size => {
                    bytes = need;
                }
                other => return other.map_err(damaged),
            }
        }
    }
}

/// Where packs may begin that are not known: behind what is known, and where a block's name says so.
fn starts(
    directory: &Directory,
    hashes: &[SequenceHash],
    digests: &[Digest],
    per_pack: u64,
    now: BootTime,
) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut known_before = true;
    for (at, (hash, digest)) in hashes.iter().zip(digests).enumerate() {
        let known = directory.has(*digest);
        let may_begin = known_before || begins_pack(hash, per_pack);
        if !known && may_begin && !directory.is_absent(*digest, now) {
            starts.push(at);
        }
        known_before = known;
    }
    starts
}

/// Footers that are read of packs that begin with one block: further branches are found by who stored them.
const BRANCHES_READ: usize = 4;
/// A footer of 100 blocks or so comes with the first request.
const FOOTER_FIRST_BYTES: u64 = 8 << 10;
