//! `kvstore advise`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use bytesize::ByteSize;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::sampled::SampledAccesses;

use super::Target;
use super::output::{bytes, print_json, print_table};
use crate::advise::{Advice, ONE_IN, Setting, TIERS, advise};
use crate::{caps, trace};

/// Show what smaller or larger tiers would bring, from recent accesses or from a trace.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A daemon samples one in 16 of the blocks that are looked up, and keeps the last million sampled accesses. Without a trace, the
command judges these accesses, at the sizes of the daemon's tiers. Sizes that are given here replace the daemon's.

Examples:
  kvstore advise                                    ask the running daemon
  kvstore advise --object-bytes 10TiB --write suggested.toml
  kvstore advise trace.jsonl --block-bytes 1MiB --host-bytes 8GiB --nvme-bytes 100GiB"
)]
pub struct Advise {
    #[command(flatten)]
    target: Target,
    /// A trace to judge instead: one JSON object per line, with `timestamp` (ms) and `hash_ids` (one id per block).
    trace: Option<PathBuf>,
    /// The size of a block of the trace.
    #[arg(long, value_parser = ByteSize::from_str, requires = "trace", default_value = "1MiB", value_name = "SIZE")]
    block_bytes: ByteSize,
    /// The number of tokens in a block of the trace.
    #[arg(long, requires = "trace", default_value_t = 512, value_name = "TOKENS")]
    block_tokens: u64,
    /// Judge this size of memory instead of the daemon's. With a trace, the default is 8GiB.
    #[arg(long, value_parser = ByteSize::from_str, value_name = "SIZE")]
    host_bytes: Option<ByteSize>,
    /// Judge this size of all disks together instead of the daemon's.
    #[arg(long, value_parser = ByteSize::from_str, value_name = "SIZE")]
    nvme_bytes: Option<ByteSize>,
    /// Judge a bucket that may hold this much.
    #[arg(long, value_parser = ByteSize::from_str, value_name = "SIZE")]
    object_bytes: Option<ByteSize>,
    /// The eviction policy to simulate with a trace: sessions or lru.
    #[arg(long, requires = "trace", default_value = "sessions", value_parser = PolicyKind::from_str)]
    policy: PolicyKind,
    /// Write the suggested sizes to this file, as part of a configuration. The file must not exist yet.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

impl Advise {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (sample, setting) = match &self.trace {
            Some(path) => self.sample_trace(path)?,
            None => self.sample_daemon().await?,
        };
        if sample.is_empty() {
            bail!(
                "the sample of looked-up blocks is empty (it takes one block in 16): run this again when engines have used the daemon, or give a trace"
            );
        }
        let advice = advise(&sample, &setting);
        if let Some(path) = &self.write {
            let options = || std::fs::OpenOptions::new().write(true).create_new(true).open(path);
            let written =
                options().and_then(|mut file| std::io::Write::write_all(&mut file, advice.to_toml().as_bytes()));
            written.with_context(|| format!("cannot write {}", path.display()))?;
        }
        if self.target.json {
            print_json(&serde_json::to_value(&advice)?)?;
        } else {
            self.print(&advice, &setting);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn sample_trace(&self, path: &std::path::Path) -> anyhow::Result<(SampledAccesses, Setting)> {
        let mut sample = SampledAccesses::new(ONE_IN, caps::ACCESSES_KEPT_MAX);
        trace::for_each(path, |request| sample.request(request.timestamp_ms, request.blocks.into_iter()))?;
        let size = |size: Option<ByteSize>| size.map(|size| size.as_u64());
        let host = size(self.host_bytes).unwrap_or(8 << 30);
        let setting = Setting {
            block_bytes: self.block_bytes.as_u64().max(1),
            block_tokens: self.block_tokens,
            tiers: [Some(host), size(self.nvme_bytes), size(self.object_bytes)],
            policy: self.policy,
        };
        Ok((sample, setting))
    }

    async fn sample_daemon(&self) -> anyhow::Result<(SampledAccesses, Setting)> {
        let client = self.target.connect().await?;
        let status = client.status().await?;
        let mut sample = None;
        let (mut block_bytes, mut block_tokens) = (1, 1);
        client
            .accesses(|chunk| {
                let sample = sample.get_or_insert_with(|| SampledAccesses::new(chunk.one_in, caps::ACCESSES_KEPT_MAX));
                (block_bytes, block_tokens) = (chunk.block_bytes.max(1), chunk.block_tokens);
                sample.set_part(chunk.part);
                for chain in chunk.chains {
                    sample.request_of(chain.at_ms, chain.names, chain.asked);
                }
            })
            .await?;
        let host = status.host.unwrap_or_default();
        let nvme = status.nvme.map(|nvme| nvme.volumes.iter().map(|volume| volume.bytes_max).sum());
        let given = |given: Option<ByteSize>, now: Option<u64>| given.map(|size| size.as_u64()).or(now);
        let setting = Setting {
            block_bytes,
            block_tokens,
            tiers: [
                given(self.host_bytes, Some(host.bytes_max)),
                given(self.nvme_bytes, nvme),
                given(self.object_bytes, None),
            ],
            policy: PolicyKind::from_str(&host.eviction_policy).unwrap_or_default(),
        };
        let sample = sample.unwrap_or_else(|| SampledAccesses::new(ONE_IN, caps::ACCESSES_KEPT_MAX));
        Ok((sample, setting))
    }

    fn print(&self, advice: &Advice, setting: &Setting) {
        println!(
            "Requests asked for {} blocks of {}. The sample has {} of these accesses.",
            advice.asked_blocks,
            bytes(setting.block_bytes),
            advice.sampled_accesses
        );
        println!(
            "With room for everything, {:.1}% of the blocks would be hits.\n",
            advice.hit_ratio_without_bounds * 100.0
        );
        for tier in &advice.tiers {
            let rows = tier.choices.iter().map(|choice| {
                vec![
                    if choice.times == 1.0 { "now".into() } else { format!("x {}", choice.times) },
                    bytes(choice.bytes),
                    format!("{:.1}%", choice.hit_ratio * 100.0),
                    format!("{:.1}%", choice.read_ratio * 100.0),
                    bytes(choice.read_bytes_per_gb as u64),
                    format!("{:.0}", choice.tokens_saved_per_1000),
                ]
            });
            let heading = [
                tier.tier,
                "size",
                "hits up to this tier",
                "hits in this tier",
                "read per GB asked for",
                "tokens saved per 1000",
            ];
            print_table(&heading, rows.collect());
            println!("suggested: {}\n", bytes(tier.suggested_bytes));
        }
        let lacking: Vec<&str> =
            TIERS.iter().filter(|tier| advice.tiers.iter().all(|told| told.tier != **tier)).copied().collect();
        if !lacking.is_empty() {
            println!(
                "There is no advice on these tiers, because they do not exist or their size was not given: {}.",
                lacking.join(", ")
            );
        }
        if let Some(path) = &self.write {
            println!("The suggested sizes are in {}.", path.display());
        }
    }
}
