//! `kvstore snapshot`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use clap::Subcommand;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kvstore_checkpoint::collect::{self, CollectRules, Collected};
use kvstore_checkpoint::copy::{self, Between};
use kvstore_checkpoint::describe::{self, when, with};
use kvstore_checkpoint::diff;
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::remove::{self, names_of};
use kvstore_checkpoint::restore;
use kvstore_checkpoint::save::{self, Compress, SaveOptions};
use kvstore_checkpoint::store::{Store, StoreError};
use kvstore_client::v1::{PrewarmProgress, PrewarmSnapshotRequest, PrewarmTier, SnapshotInfo};
use kvstore_client::{Chunks, Client};
use kvstore_tiers::bucket::ObjectUrl;
use serde_json::json;

use super::default_address;
use super::near::DaemonChunks;
use super::output::{bytes, print_json, print_pairs, print_table};

/// Save folders (a model, its caches) into an object store, and restore them, every byte verified.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A snapshot is made of chunks that are named by their content: what is in the store already, in this or another snapshot, is not
written again. A save is visible once it is whole, or not at all.

Examples:
  kvstore snapshot save ./llama --store s3://bucket/models --name llama
  kvstore snapshot ls --store s3://bucket/models
  kvstore snapshot restore llama ./llama-here --store s3://bucket/models
  kvstore snapshot diff llama 4f2a9c --store file:///mnt/models
  kvstore snapshot gc --store s3://bucket/models --keep-last 2 --dry-run
  kvstore snapshot save ./llama --to local --local file:///nvme/snapshots --name llama
  kvstore snapshot upload llama --local file:///nvme/snapshots --store s3://bucket/models

KVSTORE_SNAPSHOTS names the store for all of these, and KVSTORE_SNAPSHOTS_LOCAL the one on this node's disk. Credentials come from the
environment, as for object.url."
)]
pub struct Snapshot {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Save a folder.
    Save(Save),
    /// Copy a snapshot that was saved to this node's disk into the store.
    Upload(Upload),
    /// Restore a snapshot into a folder.
    Restore(Restore),
    /// Bring a snapshot into the memory of a node's daemon, or onto its disk.
    Prewarm(Prewarm),
    /// List snapshots.
    Ls(Ls),
    /// Show what a snapshot is made of.
    Inspect(Inspect),
    /// Read every chunk of a snapshot, and verify it.
    Verify(Verify),
    /// Show what differs between two snapshots, by file and tensor.
    Diff(Diff),
    /// Give a snapshot a name; the name means it from then on.
    Tag(Tag),
    /// Remove a name, or a snapshot that has none.
    Rm(Rm),
    /// Delete chunks that no snapshot needs, and snapshots that no name keeps.
    Gc(Gc),
}

/// Where snapshots are, and how to answer.
#[derive(clap::Args, Debug, Clone)]
struct Where {
    /// The object store: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///path.
    #[arg(long, env = "KVSTORE_SNAPSHOTS", value_name = "URL")]
    store: String,
    /// An option of the store's client, such as aws_endpoint=http://127.0.0.1:9000; may be repeated.
    #[arg(long = "option", value_parser = pair, value_name = "KEY=VALUE")]
    options: Vec<(String, String)>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The store on this node's disk.
#[derive(clap::Args, Debug, Clone)]
struct Local {
    /// A store on this node's disk, file:///path: as fast as the disk, and lost with it.
    #[arg(long, env = "KVSTORE_SNAPSHOTS_LOCAL", value_name = "URL")]
    local: Option<String>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// This node's disk: the store that --local names.
    Local,
    /// The store.
    Durable,
}

/// `save`.
#[derive(clap::Args, Debug)]
struct Save {
    /// The folder.
    folder: PathBuf,
    /// The object store, as for the other commands.
    #[arg(long, env = "KVSTORE_SNAPSHOTS", value_name = "URL")]
    store: Option<String>,
    /// An option of the store's client; may be repeated.
    #[arg(long = "option", value_parser = pair, value_name = "KEY=VALUE")]
    options: Vec<(String, String)>,
    #[command(flatten)]
    local: Local,
    /// Where it must be before the command ends. What is local becomes durable by `kvstore snapshot upload`.
    #[arg(long, value_enum, default_value_t = To::Durable)]
    to: To,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Call it so from then on.
    #[arg(long)]
    name: Option<String>,
    /// A fact that a restore may ask for, such as dtype=bf16; may be repeated.
    #[arg(long = "fact", value_parser = pair, value_name = "KEY=VALUE")]
    facts: Vec<(String, String)>,
    /// Compress what becomes smaller, or nothing [default: nothing for file:///, auto otherwise].
    #[arg(long, value_name = "WHAT")]
    compress: Option<CompressArg>,
}

/// `upload`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The snapshot keeps its id. Chunks that the store has are not copied again. An upload that broke off is gone on with by the same command.

Examples:
  kvstore snapshot upload llama --local file:///nvme/snapshots --store s3://bucket/models"
)]
struct Upload {
    /// The snapshot: a name, an id, or the first digits of one.
    snapshot: String,
    #[command(flatten)]
    at: Where,
    #[command(flatten)]
    local: Local,
    /// Compress what becomes smaller, or nothing [default: nothing for file:///, auto otherwise].
    #[arg(long, value_name = "WHAT")]
    compress: Option<CompressArg>,
}

/// `restore`.
#[derive(clap::Args, Debug)]
struct Restore {
    /// The snapshot: a name, an id, or the first digits of one.
    snapshot: String,
    /// The folder to make; it must not exist.
    to: PathBuf,
    #[command(flatten)]
    at: Where,
    /// A fact that the snapshot must have; may be repeated.
    #[arg(long = "fact", value_parser = pair, value_name = "KEY=VALUE")]
    facts: Vec<(String, String)>,
    /// A fact that may differ nevertheless; may be repeated.
    #[arg(long, value_name = "KEY")]
    allow: Vec<String>,
    /// Look for chunks in the memory and on the disk of this daemon first: unix:/path/to/socket or http://host:port.
    #[arg(long, value_name = "ADDRESS")]
    daemon: Option<String>,
    #[command(flatten)]
    local: Local,
}

/// `prewarm`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The daemons read the snapshot themselves, from the store that snapshots.url of their configuration names. What a daemon has on its disk
comes from there. Where somebody prewarms the same already, the command waits for that.

Examples:
  kvstore snapshot prewarm llama
  kvstore snapshot prewarm llama --daemon http://127.0.0.1:7540 --daemon unix:/run/kvstore/b.sock --tier disk --keep 1h"
)]
struct Prewarm {
    /// The snapshot: a name, an id, or the first digits of one.
    snapshot: String,
    /// The address of a daemon; may be repeated [default: that of this user's daemon].
    #[arg(long = "daemon", value_name = "ADDRESS")]
    daemons: Vec<String>,
    /// Where to bring it.
    #[arg(long, value_enum, default_value_t = PrewarmTierArg::Memory)]
    tier: PrewarmTierArg,
    /// Pin it for so long once it is there, such as 1h: at most a day [default: not at all].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    keep: Option<Duration>,
    /// Give up after this long: at most an hour.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Print JSON: a line for each daemon.
    #[arg(long)]
    json: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum PrewarmTierArg {
    /// Memory.
    Memory,
    /// The disk.
    Disk,
}

/// `ls`.
#[derive(clap::Args, Debug)]
struct Ls {
    /// The object store, as for the other commands.
    #[arg(long, env = "KVSTORE_SNAPSHOTS", value_name = "URL", required_unless_present = "daemon")]
    store: Option<String>,
    /// An option of the store's client; may be repeated.
    #[arg(long = "option", value_parser = pair, value_name = "KEY=VALUE")]
    options: Vec<(String, String)>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Also show how much of each snapshot this daemon has in memory and on disk. The list is then that of the daemon's own store.
    #[arg(long, value_name = "ADDRESS")]
    daemon: Option<String>,
}

/// `inspect`.
#[derive(clap::Args, Debug)]
struct Inspect {
    /// The snapshot.
    snapshot: String,
    #[command(flatten)]
    at: Where,
    /// Show the tensors, too.
    #[arg(long)]
    tensors: bool,
}

/// `verify`.
#[derive(clap::Args, Debug)]
struct Verify {
    /// The snapshot.
    snapshot: String,
    #[command(flatten)]
    at: Where,
}

/// `diff`.
#[derive(clap::Args, Debug)]
struct Diff {
    /// The first.
    first: String,
    /// The second.
    second: String,
    #[command(flatten)]
    at: Where,
}

/// `tag`.
#[derive(clap::Args, Debug)]
struct Tag {
    /// The snapshot.
    snapshot: String,
    /// Its name.
    name: String,
    #[command(flatten)]
    at: Where,
}

/// `rm`.
#[derive(clap::Args, Debug)]
struct Rm {
    /// The name, or the snapshot.
    snapshot: String,
    #[command(flatten)]
    at: Where,
}

/// `gc`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Snapshots that never had a name stay until `kvstore snapshot rm` removes them. A save and a collection exclude each other:
while one is under way, the other is refused. A save that was killed holds collections up for a day at most."
)]
struct Gc {
    #[command(flatten)]
    at: Where,
    /// Keep what each name means, and this many in all of what it meant before.
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    keep_last: usize,
    /// Only count what would go.
    #[arg(long)]
    dry_run: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum CompressArg {
    /// What becomes smaller: weights in byte planes with zstd, other files with lz4.
    Auto,
    /// Nothing.
    Nothing,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Where {
    fn open(&self) -> anyhow::Result<Store> {
        Ok(Store::open(&ObjectUrl { url: self.store.clone(), options: self.options.clone() })?)
    }

    async fn commit(&self, asked: &str) -> anyhow::Result<(Store, Commit)> {
        let store = self.open()?;
        let commit = store.snapshot(&store.resolve(asked).await?).await?;
        Ok((store, commit))
    }

    /// Shows how far something is while it runs.
    async fn shown<T>(&self, progress: &Arc<Progress>, work: impl Future<Output = T>) -> T {
        let bar = if self.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
        bar.set_style(bar_style());
        let show = async {
            loop {
                bar.set_length(Progress::read(&progress.total));
                bar.set_position(Progress::read(&progress.done));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let done = tokio::select! {
            done = work => done,
            never = show => never,
        };
        bar.finish_and_clear();
        done
    }
}

fn bar_style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// What is compressed on its way to a store.
fn compress(asked: Option<CompressArg>, url: &str) -> Compress {
    match asked {
        Some(CompressArg::Nothing) => Compress::Nothing,
        None if url.starts_with("file:") => Compress::Nothing,
        _ => Compress::Auto,
    }
}

impl Local {
    fn url(&self) -> anyhow::Result<&str> {
        let url = self.local.as_deref().context("no store on this node's disk is named: give --local file:///path")?;
        anyhow::ensure!(url.starts_with("file:"), "--local: {url:?} is not on this node's disk; use file:///path");
        Ok(url)
    }

    fn open(&self) -> anyhow::Result<Store> {
        Ok(Store::open(&ObjectUrl { url: self.url()?.to_owned(), options: Vec::new() })?)
    }
}

impl Save {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let at = match self.to {
            To::Local => Where { store: self.local.url()?.to_owned(), options: Vec::new(), json: self.json },
            To::Durable => {
                let store = self.store.clone();
                let store = store.context("no store is named: give --store URL, or set KVSTORE_SNAPSHOTS")?;
                Where { store, options: self.options.clone(), json: self.json }
            }
        };
        let store = at.open()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let options = SaveOptions {
            name: self.name.clone(),
            facts: self.facts.iter().cloned().collect(),
            compress: compress(self.compress, &at.store),
            writer: format!("kvstore {}", env!("CARGO_PKG_VERSION")),
            now_ms: now.as_millis() as i64,
        };
        let progress = Arc::new(Progress::default());
        let commit = at.shown(&progress, save::save(&store, &self.folder, options, &progress)).await?;
        let names: Vec<String> = self.name.into_iter().collect();
        tell_written("saved", &commit, &names, &at, &progress)?;
        if self.to == To::Local && !at.json {
            let asked = names.first().unwrap_or(&commit.id);
            eprintln!("it is on this node's disk alone: kvstore snapshot upload {asked} makes it durable");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What came of a save or an upload.
fn tell_written(verb: &str, commit: &Commit, names: &[String], at: &Where, progress: &Progress) -> anyhow::Result<()> {
    let (found, moved) = (Progress::read(&progress.found), Progress::read(&progress.moved));
    if at.json {
        let all = describe::snapshot(commit, names);
        return print_json(&with(all, [("found_bytes", json!(found)), ("written_bytes", json!(moved))]));
    }
    println!("{}", commit.id);
    let totals = commit.totals;
    eprintln!(
        "{verb} {} in {} files; {} were in the store already, {} were written",
        bytes(totals.bytes),
        totals.files,
        bytes(found),
        bytes(moved)
    );
    Ok(())
}

impl Upload {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (local, store) = (self.local.open()?, self.at.open()?);
        let (id, is_name) = local.resolve_named(&self.snapshot).await?;
        let name = is_name.then_some(self.snapshot.as_str());
        let progress = Arc::new(Progress::default());
        let compress = compress(self.compress, &self.at.store);
        let between = Between { from: &local, to: &store };
        let copied = self.at.shown(&progress, copy::copy(between, &id, name, compress, &progress)).await?;
        let names = names_of(&store.names().await?, &id);
        tell_written("uploaded", &copied, &names, &self.at, &progress)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Restore {
    /// The snapshot, in the store or on this node's disk; a store that reads chunks on the disk first; and whether it is on the disk alone,
    /// as far as is known.
    async fn found(&self) -> anyhow::Result<(Store, Commit, bool)> {
        if self.local.local.is_none() {
            let (store, commit) = self.at.commit(&self.snapshot).await?;
            return Ok((store, commit, false));
        }
        let (local, store) = (self.local.open()?, self.at.open()?);
        let of_store = async { store.snapshot(&store.resolve(&self.snapshot).await?).await };
        let error = match of_store.await {
            Ok(commit) => return Ok((store.with_near(Arc::new(local)), commit, false)),
            Err(error) => error,
        };
        // It was not uploaded; or the store does not answer, and may know a newer one of this name. What else is wrong is not passed over.
        anyhow::ensure!(error.is_away() || matches!(error, StoreError::NoSuch(_)), error);
        let Ok(id) = local.resolve(&self.snapshot).await else { return Err(error.into()) };
        let commit = local.snapshot(&id).await?;
        eprintln!("{id} of {} is taken from this node's disk: {error}", when(commit.created_ms));
        Ok((local, commit, true))
    }

    async fn run(self) -> anyhow::Result<ExitCode> {
        let (store, commit, is_local) = self.found().await?;
        let facts: BTreeMap<String, String> = self.facts.iter().cloned().collect();
        restore::check_facts(&commit, &facts, &self.allow)?;
        let store = match &self.daemon {
            Some(address) => store.with_near(Arc::new(DaemonChunks(Chunks::new(Client::connect(address).await?)))),
            None => store,
        };
        let progress = Arc::new(Progress::default());
        self.at.shown(&progress, restore::restore(&store, &commit, &self.to, &progress)).await?;
        let (found, moved) = (Progress::read(&progress.found), Progress::read(&progress.moved));
        if self.at.json {
            print_json(&json!({
                "id": commit.id, "folder": self.to, "bytes": commit.totals.bytes, "found_bytes": found, "read_bytes": moved,
                "local": is_local,
            }))?;
        } else {
            eprintln!(
                "restored {} in {} files into {}, every byte verified",
                bytes(commit.totals.bytes),
                commit.totals.files,
                self.to.display()
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Prewarm {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let daemons = match self.daemons.as_slice() {
            [] => vec![default_address()],
            named => named.to_vec(),
        };
        let bars = MultiProgress::new();
        if self.json {
            bars.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        let each = daemons.iter().map(|address| self.one(address, bars.add(ProgressBar::new(0))));
        let all: Vec<_> = futures::future::join_all(each).await;
        let mut is_done = true;
        for (address, answer) in daemons.iter().zip(all) {
            match answer {
                Ok(done) if self.json => {
                    let pins: Vec<String> =
                        done.pins.iter().map(|pin| pin.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
                    print_json(&json!({
                        "daemon": address, "id": done.id, "bytes": done.total_bytes, "found_bytes": done.found_bytes,
                        "read_bytes": done.read_bytes, "pins": pins,
                    }))?;
                }
                Ok(done) => println!(
                    "{address}: {} are there; {} were, {} came from the store",
                    bytes(done.total_bytes),
                    bytes(done.found_bytes),
                    bytes(done.read_bytes)
                ),
                Err(error) => {
                    is_done = false;
                    eprintln!("{address}: {error}");
                }
            }
        }
        Ok(if is_done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn one(&self, address: &str, bar: ProgressBar) -> Result<PrewarmProgress, kvstore_client::Error> {
        bar.set_style(bar_style());
        let ms = |time: Duration| time.as_millis() as u64;
        let tier = match self.tier {
            PrewarmTierArg::Memory => PrewarmTier::PrewarmMemory,
            PrewarmTierArg::Disk => PrewarmTier::PrewarmDisk,
        };
        let request = PrewarmSnapshotRequest {
            snapshot: self.snapshot.clone(),
            tier: tier.into(),
            deadline_ms: ms(self.deadline),
            keep_ms: self.keep.map_or(0, ms),
        };
        let report = |step: &PrewarmProgress| {
            bar.set_length(step.total_bytes);
            bar.set_position(step.done_bytes);
        };
        let done = Client::connect(address).await?.prewarm_snapshot(request, report).await;
        bar.finish_and_clear();
        done
    }
}

impl Ls {
    async fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(address) = &self.daemon {
            return self.of_daemon(address).await;
        }
        let url = ObjectUrl { url: self.store.unwrap_or_default(), options: self.options };
        let store = Store::open(&url)?;
        let (names, all) = tokio::try_join!(store.names(), store.list())?;
        let failed: Vec<_> = all.iter().filter_map(|one| one.as_ref().err()).collect();
        if self.json {
            print_json(&describe::list(&names, &all))?;
        } else {
            let row = |commit: &Commit| {
                vec![
                    commit.id.get(..12).unwrap_or_default().to_owned(),
                    names_of(&names, &commit.id).join(", "),
                    when(commit.created_ms),
                    bytes(commit.totals.bytes),
                    commit.totals.files.to_string(),
                    commit.totals.tensors.to_string(),
                    commit.source.clone(),
                ]
            };
            let head = ["id", "names", "created", "bytes", "files", "tensors", "source"];
            print_table(&head, all.iter().flatten().map(row).collect());
            failed.iter().for_each(|(id, why)| eprintln!("{id} cannot be read: {why}"));
        }
        Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Ls {
    /// What a daemon says of its store, and of its node.
    async fn of_daemon(&self, address: &str) -> anyhow::Result<ExitCode> {
        let answer = Client::connect(address).await?.list_snapshots(true).await?;
        if self.json {
            let each = answer.snapshots.iter().map(|one| {
                let there = one.residency.unwrap_or_default();
                json!({
                    "id": one.id, "names": one.names, "created": when(one.created_ms), "bytes": one.bytes,
                    "chunk_bytes": one.chunk_bytes, "memory_bytes": there.memory_bytes, "disk_bytes": there.disk_bytes,
                })
            });
            let failed = answer.unreadable.iter().map(|one| json!({"id": one.id, "error": one.error}));
            print_json(&json!({"snapshots": each.collect::<Vec<_>>(), "unreadable": failed.collect::<Vec<_>>()}))?;
        } else {
            let row = |one: &SnapshotInfo| {
                let there = one.residency.unwrap_or_default();
                vec![
                    one.id.get(..12).unwrap_or_default().to_owned(),
                    one.names.join(", "),
                    when(one.created_ms),
                    bytes(one.chunk_bytes),
                    bytes(there.memory_bytes),
                    bytes(there.disk_bytes),
                ]
            };
            let head = ["id", "names", "created", "in the store", "in memory", "on disk"];
            print_table(&head, answer.snapshots.iter().map(row).collect());
            answer.unreadable.iter().for_each(|one| eprintln!("{} cannot be read: {}", one.id, one.error));
        }
        Ok(if answer.unreadable.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Inspect {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (store, commit) = self.at.commit(&self.snapshot).await?;
        let names = names_of(&store.names().await?, &commit.id);
        let files = store.files(&commit).await?;
        if self.at.json {
            print_json(&describe::inspected(&commit, &names, &files, self.tensors))?;
            return Ok(ExitCode::SUCCESS);
        }
        let totals = commit.totals;
        let facts: Vec<String> = commit.facts.iter().map(|(name, value)| format!("{name}={value}")).collect();
        print_pairs(&[
            ("id", commit.id.clone()),
            ("names", names.join(", ")),
            ("created", when(commit.created_ms)),
            ("source", commit.source.clone()),
            ("writer", commit.writer.clone()),
            ("facts", facts.join(", ")),
            ("files", format!("{}, {}", totals.files, bytes(totals.bytes))),
            ("chunks", format!("{}, {}", totals.chunks, bytes(totals.chunk_bytes))),
            ("tensors", totals.tensors.to_string()),
        ]);
        let row = |file: &kvstore_checkpoint::manifest::File| {
            let (chunks, tensors) = (file.extents.0.len(), file.tensors.0.len());
            vec![file.path.clone(), bytes(file.bytes), chunks.to_string(), tensors.to_string()]
        };
        print_table(&["file", "bytes", "chunks", "tensors"], files.iter().map(row).collect());
        if self.tensors {
            let tensors = files.iter().flat_map(|file| file.tensors.0.iter().map(move |tensor| (file, tensor)));
            let rows = tensors.map(|(file, tensor)| {
                let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
                let size = bytes(tensor.end - tensor.start);
                vec![tensor.name.clone(), tensor.dtype.clone(), shape.join(" x "), size, file.path.clone()]
            });
            print_table(&["tensor", "type", "shape", "bytes", "file"], rows.collect());
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Verify {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (store, commit) = self.at.commit(&self.snapshot).await?;
        let progress = Arc::new(Progress::default());
        let checked = self.at.shown(&progress, restore::verify(&store, &commit, &progress)).await?;
        let wrong = &checked.wrong;
        if self.at.json {
            print_json(&describe::checked(&commit, &checked))?;
        } else {
            println!("{} chunks are sound, {} are not", checked.sound, wrong.len());
            wrong.iter().for_each(|(_, why)| println!("{why}"));
            if !wrong.is_empty() {
                println!("save the folder again: damaged chunks are written anew");
            }
        }
        Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Diff {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (store, first) = self.at.commit(&self.first).await?;
        let second = store.snapshot(&store.resolve(&self.second).await?).await?;
        let found = diff::diff(&store, &first, &second).await?;
        if self.at.json {
            print_json(&describe::differences(&first, &second, &found))?;
        } else {
            let row = |one: &diff::Difference| {
                let tensor = one.tensor.clone().unwrap_or_default();
                vec![describe::change(one.change).to_owned(), one.file.clone(), tensor, bytes(one.bytes)]
            };
            print_table(&["change", "file", "tensor", "bytes"], found.all.iter().map(row).collect());
            println!(
                "{} of the second are in the first, {} are not",
                bytes(found.shared_bytes),
                bytes(found.new_bytes)
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Tag {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let (store, commit) = self.at.commit(&self.snapshot).await?;
        store.let_mean(&self.name, Some(&commit.id)).await?;
        if self.at.json {
            print_json(&json!({"id": commit.id, "name": self.name}))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Rm {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let store = self.at.open()?;
        remove::remove(&store, &self.snapshot).await?;
        if self.at.json {
            print_json(&json!({"removed": self.snapshot}))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Gc {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let store = self.at.open()?;
        let collected = Collected::default();
        let rules = CollectRules { keep_last: self.keep_last, dry_run: self.dry_run };
        collect::collect(&store, rules, &collected).await?;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let failed = read(&collected.failed);
        if self.at.json {
            print_json(&describe::collected(&collected, self.dry_run))?;
        } else {
            let went = if self.dry_run { "would be deleted" } else { "deleted" };
            println!(
                "{went}: {} snapshots, {} chunks, {}",
                read(&collected.gone_snapshots),
                read(&collected.gone_chunks),
                bytes(read(&collected.gone_bytes))
            );
            println!("kept: {} snapshots, {} chunks", read(&collected.snapshots), read(&collected.chunks));
            if failed > 0 {
                println!("not deleted, because the store failed: {failed} objects; run the command again");
            }
        }
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Snapshot {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.verb {
            Verb::Save(save) => save.run().await,
            Verb::Upload(upload) => upload.run().await,
            Verb::Restore(restore) => restore.run().await,
            Verb::Prewarm(prewarm) => prewarm.run().await,
            Verb::Ls(ls) => ls.run().await,
            Verb::Inspect(inspect) => inspect.run().await,
            Verb::Verify(verify) => verify.run().await,
            Verb::Diff(diff) => diff.run().await,
            Verb::Tag(tag) => tag.run().await,
            Verb::Rm(rm) => rm.run().await,
            Verb::Gc(gc) => gc.run().await,
        }
    }
}
