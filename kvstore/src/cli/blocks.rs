//! `kvstore put`, `get`, `lookup`, `prefetch`, `pin`, `unpin`, `delete`: commands for single blocks. They
//! use a separate layout, whose blocks are any bytes up to `--block-bytes`.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use kvstore_client::v1::{BlockKind, GetStatus, Level, LookupRequest, PrefetchState, PutStatus};
use kvstore_client::{Client, GetOutcome, GroupRef, PutBlock, PutOptions};
use serde_json::json;

use super::output::{hex, parse_hex, parse_name, print_json, print_table};
use super::{Target, parse_block_bytes};
use crate::replay;

/// Which blocks.
#[derive(clap::Args, Debug)]
pub struct Layout {
    #[command(flatten)]
    target: Target,
    /// The size of the largest block of the layout. Put and get must use the same size.
    #[arg(long, default_value = "1MiB", value_parser = parse_block_bytes, value_name = "SIZE")]
    block_bytes: u32,
    /// Use the layout of `kvstore replay` with this block size, instead of the layout of `kvstore put`.
    #[arg(long)]
    replay: bool,
}

impl Layout {
    async fn open(&self) -> anyhow::Result<(Client, GroupRef)> {
        let client = self.target.connect().await?;
        let layout = if self.replay {
            replay::layout("kvstore replay", self.block_bytes, BlockKind::Attention)
        } else {
            replay::layout("kvstore cli", self.block_bytes, BlockKind::EncoderOutput)
        };
        let registered = client.register_layout(layout).await?;
        Ok((client, registered.group(0)))
    }
}

/// One block's name.
#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Name {
    /// The block's name: 1 to 32 bytes of text.
    #[arg(long, value_parser = parse_name, value_name = "TEXT")]
    key: Option<String>,
    /// The block's sequence hash: 2 to 64 hexadecimal digits.
    #[arg(long, value_parser = parse_hex, value_name = "HEX")]
    hash: Option<Bytes>,
}

impl Name {
    fn bytes(&self) -> Bytes {
        let text = || self.key.clone().unwrap_or_default().into_bytes().into();
        self.hash.clone().unwrap_or_else(text)
    }
}

/// A prefix's names, in order.
#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Names {
    /// The blocks' names, in prefix order: 1 to 32 bytes of text each.
    #[arg(long = "key", value_parser = parse_name, value_name = "TEXT")]
    keys: Vec<String>,
    /// The blocks' sequence hashes, in prefix order: hexadecimal digits.
    #[arg(long = "hash", value_parser = parse_hex, value_name = "HEX")]
    hashes: Vec<Bytes>,
}

impl Names {
    fn bytes(&self) -> Vec<Bytes> {
        let keys = self.keys.iter().map(|key| Bytes::from(key.clone().into_bytes()));
        keys.chain(self.hashes.iter().cloned()).collect()
    }
}

/// Store a file as a block.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvstore put --key greeting hello.txt
  head -c 1000 /dev/urandom | kvstore put --hash c0ffee -")]
pub struct Put {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    name: Name,
    /// The level to ask for: memory, local or durable.
    #[arg(long, default_value = "memory", value_parser = parse_level)]
    level: Level,
    /// The file, or "-" for standard input.
    file: PathBuf,
}

/// A look-up waits so long for a bucket to be searched.
const SEARCH_WAIT_MS: u32 = 5000;

fn parse_level(text: &str) -> Result<Level, String> {
    match text {
        "memory" => Ok(Level::Memory),
        "local" => Ok(Level::Local),
        "durable" => Ok(Level::Durable),
        _ => Err(format!("{text:?} is not memory, local or durable")),
    }
}

/// "1 block is pinned", "2 blocks are pinned".
fn counted(blocks: u64, one: &str, many: &str) -> String {
    if blocks == 1 { format!("1 block {one}") } else { format!("{blocks} blocks {many}") }
}

/// At most one byte more than a block may have: enough to see that it is too many.
fn read_file(path: &PathBuf, most: u32) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = u64::from(most) + 1;
    if path.as_os_str() == "-" {
        std::io::stdin().take(limit).read_to_end(&mut bytes)?;
    } else {
        let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        file.take(limit).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    }
    if bytes.is_empty() || bytes.len() as u64 == limit {
        let most = bytesize::ByteSize(most.into());
        bail!(
            "{} is {}: a block has 1 byte to {most}; see --block-bytes",
            path.display(),
            if bytes.is_empty() { "empty" } else { "too large" }
        );
    }
    Ok(bytes)
}

impl Put {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let bytes = read_file(&self.file, self.layout.block_bytes)?;
        let (client, group) = self.layout.open().await?;
        let length = bytes.len();
        let block = PutBlock::new(self.name.bytes(), bytes);
        let options = PutOptions { level: self.level, ..PutOptions::default() };
        let results = client.put_with(&group, vec![block], options).await?;
        let result = results.first().context("the daemon sent no result for the block")?;
        let stored = matches!(result.status(), PutStatus::Stored | PutStatus::Present | PutStatus::Joined);
        let level = if stored { result.level().as_str_name() } else { "" };
        if self.layout.target.json {
            print_json(&json!({ "status": result.status().as_str_name(), "level": level, "bytes": length }))?;
        } else {
            println!("{} {level} {}", result.status().as_str_name(), bytesize::ByteSize(length as u64));
        }
        Ok(if stored { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Read a block.
#[derive(clap::Args, Debug)]
#[command(after_help = "The exit status is 1 if the block is not there.

Examples:
  kvstore get --key greeting
  kvstore get --hash c0ffee --output block.bin")]
pub struct Get {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    name: Name,
    /// Write the bytes to this file instead of standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Get {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (client, group) = self.layout.open().await?;
        let outcomes = client.get(&group, &[self.name.bytes()]).await?;
        let outcome = outcomes.into_iter().next().context("the daemon sent no result for the block")?;
        let status = match &outcome {
            GetOutcome::Hit(_) => GetStatus::Hit,
            GetOutcome::InFlight => GetStatus::InFlight,
            GetOutcome::Miss => GetStatus::Miss,
            GetOutcome::DataLoss => GetStatus::DataLoss,
        };
        let bytes = outcome.bytes().cloned().unwrap_or_default();
        if let (Some(path), GetStatus::Hit) = (&self.output, status) {
            std::fs::write(path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
        }
        if self.layout.target.json {
            print_json(&json!({ "status": status.as_str_name(), "bytes": bytes.len() }))?;
        } else if status != GetStatus::Hit {
            let problem = match status {
                GetStatus::InFlight => "the block is on its way into memory: try again",
                GetStatus::DataLoss => "data loss: the block is pinned, but can no longer be read from any tier",
                _ => "the block is not there; if it was put with --block-bytes, give the same size",
            };
            eprintln!("kvstore: {problem}");
        } else if self.output.is_none() {
            std::io::stdout().write_all(&bytes)?;
        }
        Ok(if status == GetStatus::Hit { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Show how many blocks of a prefix can be read, and where they are.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  kvstore lookup --key first --key second")]
pub struct Lookup {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    names: Names,
}

fn tiers(residency: u32) -> String {
    let names = [(1, "device"), (2, "host"), (4, "nvme"), (8, "object"), (256, "in flight")];
    let held: Vec<_> = names.iter().filter(|(bit, _)| residency & bit != 0).map(|(_, name)| *name).collect();
    if held.is_empty() { "-".into() } else { held.join(", ") }
}

impl Lookup {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (client, group) = self.layout.open().await?;
        let hashes = self.names.bytes();
        let request = LookupRequest {
            layout_digest: group.layout_digest,
            groups: vec![0],
            sequence_hashes: hashes.clone(),
            // Where there is a bucket, it is searched first.
            search_wait_ms: SEARCH_WAIT_MS,
            ..LookupRequest::default()
        };
        let answer = client.lookup(request).await?;
        let blocks = || hashes.iter().zip(&answer.residency);
        if self.layout.target.json {
            let blocks: Vec<_> = blocks().map(|(hash, at)| json!({ "hash": hex(hash), "tiers": tiers(*at) })).collect();
            print_json(&json!({ "readable_blocks": answer.readable_blocks, "blocks": blocks }))?;
        } else {
            println!("{} of {} blocks can be read", answer.readable_blocks, hashes.len());
            print_table(&["block", "tiers"], blocks().map(|(hash, at)| vec![hex(hash), tiers(*at)]).collect());
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Bring a prefix into memory before it is needed.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  kvstore prefetch --key first --key second --deadline 5s")]
pub struct Prefetch {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    names: Names,
    /// Give up after this long.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    deadline: Duration,
}

impl Prefetch {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (client, group) = self.layout.open().await?;
        let deadline_ms = u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX);
        let ticket = client.prefetch(&group, &self.names.bytes(), deadline_ms).await?;
        let bar = indicatif::ProgressBar::new(0);
        let last = client
            .watch_prefetch(ticket, |step| {
                bar.set_length(u64::from(step.blocks - step.missing));
                bar.set_position(step.ready.into());
            })
            .await?;
        bar.finish_and_clear();
        if self.layout.target.json {
            print_json(&json!({
                "state": last.state().as_str_name(), "blocks": last.blocks, "ready": last.ready, "missing": last.missing,
            }))?;
        } else {
            println!(
                "{}: {} of {} blocks are in memory, {} are in no tier",
                last.state().as_str_name(),
                last.ready,
                last.blocks,
                last.missing
            );
        }
        Ok(if last.state() == PrefetchState::Done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Keep a prefix from being evicted for a while.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  kvstore pin --key first --key second --ttl 1h")]
pub struct Pin {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    names: Names,
    /// How long the pin lasts.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration, value_name = "DURATION")]
    ttl: Duration,
}

impl Pin {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (client, group) = self.layout.open().await?;
        let answer = client.pin(&group, &self.names.bytes(), self.ttl.as_millis() as u64).await?;
        let pin = hex(&answer.pin);
        if self.layout.target.json {
            print_json(&json!({ "pin": pin, "pinned_blocks": answer.pinned_blocks }))?;
        } else if answer.pinned_blocks == 0 {
            eprintln!("kvstore: no block of the prefix can be read, so nothing is pinned");
        } else {
            println!(
                "{}; end the pin with: kvstore unpin {pin}",
                counted(answer.pinned_blocks.into(), "is pinned", "are pinned")
            );
        }
        Ok(if answer.pinned_blocks > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// End a pin.
#[derive(clap::Args, Debug)]
pub struct Unpin {
    #[command(flatten)]
    target: Target,
    /// The pin, as `kvstore pin` printed it.
    #[arg(value_parser = parse_hex)]
    pin: Bytes,
}

impl Unpin {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let unpinned = self.target.connect().await?.unpin(self.pin).await?;
        if self.target.json {
            print_json(&json!({ "unpinned": unpinned }))?;
        } else {
            println!("{}", if unpinned { "unpinned" } else { "there is no such pin, or it has expired" });
        }
        Ok(if unpinned { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Delete blocks.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  kvstore delete --key greeting")]
pub struct Delete {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    names: Names,
}

impl Delete {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let (client, group) = self.layout.open().await?;
        let answer = client.delete(&group, &self.names.bytes()).await?;
        if self.layout.target.json {
            print_json(&json!({ "deleted": answer.deleted, "pinned": answer.pinned }))?;
        } else {
            println!("{}", counted(answer.deleted, "was deleted", "were deleted"));
            if answer.pinned > 0 {
                let kept = counted(answer.pinned, "is pinned and was kept", "are pinned and were kept");
                println!("{kept}; end the pin first, with: kvstore unpin PIN");
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
