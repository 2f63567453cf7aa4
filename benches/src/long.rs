//! A prompt of a million tokens: 65,536 blocks of 16 KiB, looked up and read by a local client in one call, beside the same
//! blocks in calls of 1,024.

use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::{LookupRequest, PutStatus};
use kvstore_client::{GroupRef, PutOptions, PutSlice};

use crate::figure::{self, median};
use crate::local::{Daemon, hashes, seconds};

const BLOCK_BYTES: usize = 16 << 10;
const BLOCKS: usize = 65_536;
/// Blocks of a prompt that nobody calls long.
const SHORT: usize = 1024;

fn put(daemon: &Daemon, group: &GroupRef, names: &[Bytes]) -> anyhow::Result<()> {
    let content = replay::content(1, BLOCK_BYTES);
    let parts: [&[u8]; 1] = [&content];
    let blocks: Vec<_> = names.iter().map(|hash| PutSlice { hash, parent: None, parts: &parts }).collect();
    let stored = daemon.runtime.block_on(daemon.client.put_from(group, &blocks, PutOptions::default()))?;
    anyhow::ensure!(stored.iter().all(|result| result.status() == PutStatus::Stored), "a block was not stored");
    Ok(())
}

/// Measures the group.
pub fn measure(binary: &Path, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let daemon = Daemon::start(binary, folder.path())?;
    let group = daemon.group(BLOCK_BYTES)?;
    let names = hashes(1, BLOCKS);
    put(&daemon, &group, &names)?;
    let request = || LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: names.clone(),
        ..LookupRequest::default()
    };
    let mut into = vec![1u8; BLOCKS * BLOCK_BYTES];
    let mut slices: Vec<&mut [u8]> = into.chunks_exact_mut(BLOCK_BYTES).collect();
    let (mut lookups, mut looks, mut ratios, mut longs, mut shorts) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    for round in 0..=rounds {
        let asked = request();
        let lookup = seconds(|| {
            let found = daemon.runtime.block_on(daemon.client.lookup(asked))?;
            anyhow::ensure!(found.readable_blocks as usize == BLOCKS, "a block was not there");
            Ok(())
        })?;
        let look = seconds(|| {
            let readable = daemon.runtime.block_on(daemon.client.readable_blocks(&group, &names))?;
            anyhow::ensure!(readable == BLOCKS, "a block was not there");
            Ok(())
        })?;
        let mut of = [0.0; 2];
        for turn in 0..2 {
            let is_short = (round + turn) % 2 == 0;
            let each = if is_short { SHORT } else { BLOCKS };
            let taken = seconds(|| {
                for (names, slices) in names.chunks(each).zip(slices.chunks_mut(each)) {
                    let got = daemon.runtime.block_on(daemon.client.get_into(&group, names, slices))?;
                    anyhow::ensure!(got == names.len(), "a block was not there");
                }
                Ok(())
            })?;
            *of.get_mut(usize::from(is_short)).context("two ways")? = taken;
        }
        // The first round warms up.
        if round > 0 {
            let [long, short] = of;
            let bytes = (BLOCKS * BLOCK_BYTES) as f64;
            lookups.push(lookup * 1e3);
            looks.push(look * 1e3);
            ratios.push(short / long);
            longs.push(bytes / long / 1e9);
            shorts.push(bytes / short / 1e9);
        }
    }
    figure::print("long", "lookup_ms", median(lookups), "<= 10");
    figure::note("long", "readable_blocks_ms", median(looks));
    figure::print("long", "local_get_ratio", median(ratios), ">= 0.8");
    figure::note("long", "local_get_gbps", median(longs));
    figure::note("long", "local_get_1024_gbps", median(shorts));
    Ok(())
}
