//! Drives a daemon with a trace: for each request, looks the prefix up, gets the hits, and puts the misses.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore_client::v1::{BlockKind, LookupRequest, PutStatus};
use kvstore_client::{Client, GroupRef, PutBlock, PutOptions};
use serde::Serialize;

use super::content::{content, layout, sequence_hash, wrong_bytes};
use crate::caps::REPLAY_BATCH_BLOCKS;
use crate::trace::TraceRequest;

/// The bits of a block's residency that stand for memory and disk.
const HOST_BIT: u32 = 2;
const NVME_BIT: u32 = 4;
/// A look-up waits so long for a bucket to be searched, where the daemon has one.
const SEARCH_WAIT_MS: u32 = 5000;
/// Bytes of blocks in one get or put: bounds the driver's memory.
const BATCH_BYTES: usize = 32 << 20;

/// How to drive.
#[derive(Clone, Copy, Debug)]
pub struct Drive {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Times real time; `None`: as fast as it goes.
    pub speed: Option<f64>,
    /// Check every byte that comes back.
    pub verify: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Requests of the trace.
    pub requests: usize,
    /// Blocks asked for.
    pub blocks: u64,
    /// Blocks found, by tier.
    pub hits: Hits,
    /// Hits per block.
    pub hit_ratio: f64,
    /// Bytes that came back wrong; counted with `--verify` only.
    pub wrong_bytes: u64,
    /// True where every byte was checked.
    pub verified: bool,
    /// Bytes read.
    pub get_bytes: u64,
    /// Bytes stored.
    pub put_bytes: u64,
    /// 10^9 bytes a second, within get calls.
    pub get_gbps: f64,
    /// The same within put calls.
    pub put_gbps: f64,
    /// Duration of get calls, microseconds.
    pub get_us: Percentiles,
    /// Duration of put calls, microseconds.
    pub put_us: Percentiles,
    /// Blocks that the daemon evicted meanwhile.
    pub evicted_blocks: u64,
    /// Blocks that found no room.
    pub busy_blocks: u64,
    /// The whole run.
    pub seconds: f64,
}

/// Hits by tier.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Hits {
    /// Looked up in memory.
    pub host: u64,
    /// Looked up on disk, not in memory.
    pub nvme: u64,
    /// Looked up in the bucket alone.
    pub object: u64,
}

/// Of the durations of calls.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    /// Half of the calls took less.
    pub p50: f64,
    /// 99 of 100 took less.
    pub p99: f64,
}

/// Calls and the bytes they moved.
#[derive(Default)]
struct Calls {
    durations: Vec<Duration>,
    bytes: u64,
}

impl Calls {
    fn add(&mut self, started: Instant, bytes: usize) {
        self.durations.push(started.elapsed());
        self.bytes += bytes as u64;
    }

    fn gbps(&self) -> f64 {
        let seconds: f64 = self.durations.iter().map(Duration::as_secs_f64).sum();
        if seconds > 0.0 { self.bytes as f64 / seconds / 1e9 } else { 0.0 }
    }

    fn percentiles(&mut self) -> Percentiles {
        self.durations.sort_unstable();
        let at = |part: f64| {
            let index = (self.durations.len() as f64 * part) as usize;
            let duration = self.durations.get(index.min(self.durations.len().saturating_sub(1)));
            duration.map_or(0.0, |duration| duration.as_secs_f64() * 1e6)
        };
        Percentiles { p50: at(0.50), p99: at(0.99) }
    }
}

struct Driver<'a> {
    client: &'a Client,
    group: GroupRef,
    options: Drive,
    buffers: Vec<Vec<u8>>,
    gets: Calls,
    puts: Calls,
    report: Report,
}

/// Runs `trace` through the daemon; `progress` is told after each request how many blocks hit so far.
pub async fn drive(
    client: &Client,
    trace: &[TraceRequest],
    options: Drive,
    mut progress: impl FnMut(&Report),
) -> Result<Report, kvstore_client::Error> {
    let registered =
        client.register_layout(layout("kvstore replay", options.block_bytes, BlockKind::Attention)).await?;
    let evicted = |status: &kvstore_client::v1::StatusResponse| status.host.as_ref().map_or(0, |host| host.evicted);
    let evicted_before = evicted(&client.status().await?);
    let report = Report { verified: options.verify, ..Report::default() };
    let mut driver = Driver {
        client,
        group: registered.group(0),
        options,
        buffers: Vec::new(),
        gets: Calls::default(),
        puts: Calls::default(),
        report,
    };
    let started = Instant::now();
    let first = trace.first().map_or(0, |request| request.timestamp_ms);
    for request in trace {
        if let Some(speed) = options.speed {
            let due = Duration::from_secs_f64(request.timestamp_ms.saturating_sub(first) as f64 / 1000.0 / speed);
            tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
        }
        driver.request(&request.blocks).await?;
        progress(&driver.report);
    }
    let mut report = driver.finish();
    report.seconds = started.elapsed().as_secs_f64();
    report.evicted_blocks = evicted(&client.status().await?).saturating_sub(evicted_before);
    Ok(report)
}

impl Driver<'_> {
    async fn request(&mut self, blocks: &[u64]) -> Result<(), kvstore_client::Error> {
        self.report.requests += 1;
        self.report.blocks += blocks.len() as u64;
        if blocks.is_empty() {
            return Ok(());
        }
        let hashes: Vec<Bytes> = blocks.iter().map(|id| sequence_hash(*id)).collect();
        let request = LookupRequest {
            layout_digest: self.group.layout_digest.clone(),
            groups: vec![self.group.group],
            sequence_hashes: hashes.clone(),
            search_wait_ms: SEARCH_WAIT_MS,
            ..LookupRequest::default()
        };
        let found = self.client.lookup(request).await?;
        let hits = self.get(blocks, &hashes, found.readable_blocks as usize).await?;
        for tiers in found.residency.iter().take(hits) {
            let hits = &mut self.report.hits;
            let tier = match *tiers {
                tiers if tiers & HOST_BIT != 0 => &mut hits.host,
                tiers if tiers & NVME_BIT != 0 => &mut hits.nvme,
                _ => &mut hits.object,
            };
            *tier += 1;
        }
        self.put(blocks, &hashes, hits).await
    }

    fn batch_blocks(&self) -> usize {
        (BATCH_BYTES / self.options.block_bytes as usize).clamp(1, REPLAY_BATCH_BLOCKS)
    }

    /// Reads the first `count` blocks; how many came.
    async fn get(&mut self, blocks: &[u64], hashes: &[Bytes], count: usize) -> Result<usize, kvstore_client::Error> {
        let batch = self.batch_blocks();
        let mut hits = 0;
        while hits < count {
            let end = (hits + batch).min(count);
            let wanted = hashes.get(hits..end).unwrap_or_default();
            let block_bytes = self.options.block_bytes as usize;
            self.buffers.resize(batch.min(count).max(self.buffers.len()), Vec::new());
            let mut buffers: Vec<&mut [u8]> = self
                .buffers
                .iter_mut()
                .take(wanted.len())
                .map(|buffer| {
                    buffer.resize(block_bytes, 0);
                    buffer.as_mut_slice()
                })
                .collect();
            let started = Instant::now();
            let got = self.client.get_into(&self.group, wanted, &mut buffers).await?;
            self.gets.add(started, got * block_bytes);
            if self.options.verify {
                let got = blocks.iter().skip(hits).zip(&buffers).take(got);
                self.report.wrong_bytes += got.map(|(id, bytes)| wrong_bytes(*id, bytes)).sum::<u64>();
            }
            hits += got;
            if got < wanted.len() {
                break;
            }
        }
        Ok(hits)
    }

    async fn put(&mut self, blocks: &[u64], hashes: &[Bytes], from: usize) -> Result<(), kvstore_client::Error> {
        let batch = self.batch_blocks();
        let mut at = from;
        while at < blocks.len() {
            let end = (at + batch).min(blocks.len());
            let missing = blocks.iter().zip(hashes).enumerate().take(end).skip(at);
            let block_bytes = self.options.block_bytes as usize;
            let put: Vec<PutBlock> = missing
                .map(|(position, (id, hash))| {
                    let parent = position.checked_sub(1).and_then(|before| hashes.get(before)).cloned();
                    PutBlock { hash: hash.clone(), parent, bytes: content(*id, block_bytes) }
                })
                .collect();
            let bytes = put.len() * block_bytes;
            let options = PutOptions { more_follows: end < blocks.len(), ..PutOptions::default() };
            let started = Instant::now();
            let results = self.client.put_with(&self.group, put, options).await?;
            self.puts.add(started, bytes);
            let busy = results.iter().filter(|result| result.status() == PutStatus::Busy).count();
            self.report.busy_blocks += busy as u64;
            at = end;
        }
        Ok(())
    }

    fn finish(mut self) -> Report {
        let mut report = self.report;
        let hits = report.hits.host + report.hits.nvme + report.hits.object;
        report.hit_ratio = if report.blocks == 0 { 0.0 } else { hits as f64 / report.blocks as f64 };
        (report.get_bytes, report.put_bytes) = (self.gets.bytes, self.puts.bytes);
        (report.get_gbps, report.put_gbps) = (self.gets.gbps(), self.puts.gbps());
        (report.get_us, report.put_us) = (self.gets.percentiles(), self.puts.percentiles());
        report
    }
}
