//! `kvstore bench`: measures puts and gets against a daemon, and compares them with memcpy in the same run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore_client::v1::{BlockKind, PutStatus};
use kvstore_client::{Client, GroupRef, PutBlock};
use serde::Serialize;

use super::output::{print_json, print_table};
use super::{Target, parse_block_bytes};
use crate::replay;

/// Measure puts and gets, and compare them with memcpy.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The blocks are deleted afterwards.\n\nExample:\n  kvstore bench --block-bytes 1MiB --blocks 64 --rounds 15"
)]
pub struct Bench {
    #[command(flatten)]
    target: Target,
    /// The size of a block.
    #[arg(long, default_value = "1MiB", value_parser = parse_block_bytes, value_name = "SIZE")]
    block_bytes: u32,
    /// The number of blocks in a round.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    blocks: u32,
    /// The number of rounds. The medians are reported.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

#[derive(Serialize)]
struct Row {
    what: &'static str,
    gbps: f64,
    of_memcpy: f64,
}

impl Bench {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let client = self.target.connect().await?;
        let layout = replay::layout("kvstore bench", self.block_bytes, BlockKind::Attention);
        let group = client.register_layout(layout).await?.group(0);
        let bar = indicatif::ProgressBar::new(self.rounds.into());
        let mut rounds = Vec::new();
        for round in 0..self.rounds {
            rounds.push(self.round(&client, &group, round).await?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let bytes = f64::from(self.block_bytes) * f64::from(self.blocks);
        let gbps = |of: fn(&[Duration; 3]) -> Duration| bytes / median(rounds.iter().map(of).collect()) / 1e9;
        let (put, get, copy) = (gbps(|[put, _, _]| *put), gbps(|[_, get, _]| *get), gbps(|[_, _, copy]| *copy));
        let row = |what, gbps| Row { what, gbps, of_memcpy: gbps / copy };
        let rows = [row("put", put), row("get", get), row("memcpy", copy)];
        if self.target.json {
            print_json(&rows)?;
        } else {
            let cells =
                |row: &Row| vec![row.what.into(), format!("{:.2} GB/s", row.gbps), format!("{:.2}", row.of_memcpy)];
            print_table(&["", "median", "relative to memcpy"], rows.iter().map(cells).collect());
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Durations of a put, a get and a copy of the same blocks.
    async fn round(&self, client: &Client, group: &GroupRef, round: u32) -> anyhow::Result<[Duration; 3]> {
        let first = u64::from(round) << 32 | u64::from(std::process::id()) << 48;
        let ids: Vec<u64> = (0..u64::from(self.blocks)).map(|at| first + at).collect();
        let size = self.block_bytes as usize;
        let hashes: Vec<Bytes> = ids.iter().map(|id| replay::sequence_hash(*id)).collect();
        let contents: Vec<Bytes> = ids.iter().map(|id| replay::content(*id, size)).collect();
        let blocks =
            hashes.iter().zip(&contents).map(|(hash, bytes)| PutBlock::new(hash.clone(), bytes.clone())).collect();
        let started = Instant::now();
        let results = client.put(group, blocks).await?;
        let put = started.elapsed();
        let stored = results.iter().filter(|result| result.status() == PutStatus::Stored).count();
        anyhow::ensure!(
            stored == ids.len(),
            "only {stored} of {} blocks found room: raise host.bytes or use fewer --blocks",
            ids.len()
        );
        let mut into = vec![vec![0u8; size]; ids.len()];
        let mut buffers: Vec<&mut [u8]> = into.iter_mut().map(Vec::as_mut_slice).collect();
        let started = Instant::now();
        let got = client.get_into(group, &hashes, &mut buffers).await?;
        let get = started.elapsed();
        anyhow::ensure!(
            got == ids.len(),
            "only {got} of {} blocks were still there: raise host.bytes or use fewer --blocks",
            ids.len()
        );
        let started = Instant::now();
        for (to, from) in buffers.iter_mut().zip(&contents) {
            to.copy_from_slice(std::hint::black_box(from));
        }
        let copy = started.elapsed();
        client.delete(group, &hashes).await?;
        Ok([put, get, copy])
    }
}

fn median(mut durations: Vec<Duration>) -> f64 {
    durations.sort_unstable();
    durations.get(durations.len() / 2).map_or(f64::NAN, Duration::as_secs_f64)
}
