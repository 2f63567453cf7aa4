//! The Object tier beside plain requests of the same client library to the same store, interleaved. The store is an S3 server in a
//! process of its own, over a folder in memory, so that neither a disk nor its CPU time is measured. Then reads of a bucket on a local
//! path, a folder in memory, too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use futures::StreamExt;
use kvstore::replay;
use kvstore_tests::memory;
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::tier::{hash, now};
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::{
    BeginFill, FillRequest, HostLimits, HostOptions, HostTier, LeasedBlock, Leasing, NamespaceId, RegisteredLayout,
};
use kvstore_tiers::object::{ObjectLimits, ObjectOptions, ObjectTier, ObjectUrl, Offer, Offered, Verify};
use kvstore_tiers::slots::{FlightSource, Priority, Urgency};
use kvstore_tiers::stack::{Asked, Policy, Promotion, Stack, Window};
use kvstore_tiers::{BootTime, HugePages};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use crate::figure::{self, median};
use crate::process::{Process, own_cpu_seconds};

const HELPER: &str = "KVSTORE_BENCH_S3";
const BLOCK: u32 = 1 << 20;
const BLOCKS: u64 = 512;
/// Bytes of a plain request: as many as a pack has.
pub const REQUEST: u64 = 8 << 20;
/// Plain requests at once: as many as the tier has under way.
pub const AT_ONCE: usize = 8;
/// Blocks that are on their way at once: the daemon's own window.
const WINDOW: usize = (AT_ONCE as u64 * REQUEST / BLOCK as u64) as usize;

#[derive(Clone, Copy)]
struct Run {
    gbps: f64,
    cpu_seconds_per_gb: f64,
}

/// True where this process is the store.
pub fn is_helper() -> anyhow::Result<bool> {
    let Ok(folder) = std::env::var(HELPER) else { return Ok(false) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let folder = std::path::PathBuf::from(folder);
        let server = S3Server::start(&folder, "127.0.0.1:0").await;
        std::fs::write(folder.join("address.new"), server.address.to_string())?;
        std::fs::rename(folder.join("address.new"), folder.join("address"))?;
        // It is found by a socket, as every process that is measured.
        let _ready = std::os::unix::net::UnixListener::bind(folder.join("ready"))?;
        std::future::pending::<anyhow::Result<()>>().await
    })?;
    Ok(true)
}

/// An S3 server over `folder`, in a process of its own.
pub fn serve(folder: &std::path::Path) -> anyhow::Result<(Process, std::net::SocketAddr)> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.env(HELPER, folder);
    let server = Process::start(command, &folder.join("ready"))?;
    Ok((server, std::fs::read_to_string(folder.join("address"))?.parse()?))
}

/// Measures the group.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let (_server, address) = serve(folder.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (mut reads, mut writes, mut local_reads) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let prefix = format!("round{round}");
        runtime.block_on(async {
            let (s3, local) = (url(address, &prefix), local_url(folder.path(), &prefix));
            // Who goes first takes turns.
            let ours_first = round.is_multiple_of(2);
            let write = if ours_first {
                let ours = write_blocks(&s3).await?;
                [ours, plain_writes(&s3).await?]
            } else {
                let plain = plain_writes(&s3).await?;
                [write_blocks(&s3).await?, plain]
            };
            let read = reads_of(&s3, ours_first).await?;
            write_blocks(&local).await?;
            plain_writes(&local).await?;
            local_reads.push(reads_of(&local, ours_first).await?);
            writes.push(write);
            reads.push(read);
            anyhow::Ok(())
        })?;
        std::fs::remove_dir_all(folder.path().join(s3::BUCKET).join(&prefix))?;
        std::fs::remove_dir_all(folder.path().join("local").join(&prefix))?;
    }
    for (what, runs, target) in [("read", &reads, ">= 0.9"), ("write", &writes, ">= 0.85")] {
        let of = |value: &dyn Fn(&[Run; 2]) -> f64| median(runs.iter().map(value).collect());
        let name = |suffix: &str| format!("{what}_1MiB_{suffix}");
        figure::print("object", &name("of_plain"), of(&|[a, b]| a.gbps / b.gbps), target);
        let cpu = of(&|[a, b]| a.cpu_seconds_per_gb / b.cpu_seconds_per_gb);
        figure::print("object", &name("cpu_of_plain"), cpu, "<= 1.3");
        figure::note("object", &name("gbps"), of(&|[a, _]| a.gbps));
        figure::note("object", &name("plain_gbps"), of(&|[_, b]| b.gbps));
        figure::note("object", &name("cpu_s_per_gb"), of(&|[a, _]| a.cpu_seconds_per_gb));
        figure::note("object", &name("plain_cpu_s_per_gb"), of(&|[_, b]| b.cpu_seconds_per_gb));
    }
    let of = |value: &dyn Fn(&[Run; 2]) -> f64| median(local_reads.iter().map(value).collect());
    figure::print("object", "local_read_1MiB_of_get_range", of(&|[a, b]| a.gbps / b.gbps), ">= 0.8");
    figure::note("object", "local_read_1MiB_gbps", of(&|[a, _]| a.gbps));
    figure::note("object", "local_read_1MiB_get_range_gbps", of(&|[_, b]| b.gbps));
    Ok(())
}

/// Reads of the tier, and plain ones of as many bytes.
async fn reads_of(url: &ObjectUrl, ours_first: bool) -> anyhow::Result<[Run; 2]> {
    if ours_first {
        let ours = read_blocks(url).await?;
        return Ok([ours, plain_reads(url).await?]);
    }
    let plain = plain_reads(url).await?;
    Ok([read_blocks(url).await?, plain])
}

impl Run {
    fn of(started: Instant, cpu: f64) -> Self {
        let gb = (BLOCKS * u64::from(BLOCK)) as f64 / 1e9;
        Self { gbps: gb / started.elapsed().as_secs_f64(), cpu_seconds_per_gb: (own_cpu_seconds() - cpu) / gb }
    }
}

/// The server's bucket, below `prefix`.
pub fn url(address: std::net::SocketAddr, prefix: &str) -> ObjectUrl {
    let settings = s3::settings(address, prefix);
    let value =
        |key: &str| settings.iter().find_map(|setting| setting.strip_prefix(key)).unwrap_or_default().to_owned();
    let options = value("object.options=");
    let options = options.split(',').filter_map(|option| option.split_once('='));
    ObjectUrl {
        url: value("object.url="),
        options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
    }
}

fn local_url(folder: &std::path::Path, prefix: &str) -> ObjectUrl {
    ObjectUrl { url: format!("file://{}/local/{prefix}", folder.display()), options: Vec::new() }
}

struct Tier {
    host: Arc<HostTier>,
    object: Arc<ObjectTier>,
    layout: Arc<RegisteredLayout>,
}

/// A tier over an empty memory, all of whose slabs are made and full of other blocks.
async fn tier(url: &ObjectUrl, seed: u64) -> anyhow::Result<Tier> {
    let bytes = (BLOCKS * u64::from(BLOCK)) + (128 << 20);
    let limits = HostLimits { bytes, high_watermark_percent: 99, low_watermark_percent: 98 };
    let options = HostOptions {
        limits,
        huge_pages: HugePages::Auto,
        policy: PolicyKind::Lru,
        seed: 1,
        epoch: 1,
        bytes_ceiling: bytes,
    };
    let namespaces = vec!["default".to_owned()];
    let host = HostTier::new(options, &namespaces);
    let layout = memory::layout("benches", BLOCK, 16);
    let layout = host.register_layout(NamespaceId(0), layout)?;
    let options = ObjectOptions {
        opened: url.open()?,
        namespaces,
        limits: ObjectLimits { upload_bytes: bytes, backlog_bytes: bytes },
        verify: Verify::Probe,
        stall: Duration::from_secs(5),
        log_folder: None,
        seed,
        clock: now,
    };
    let object = ObjectTier::open(options, &host, None)?;
    let tier = Tier { host, object, layout };
    for id in 0..BLOCKS + 100 {
        tier.put(1_000_000 + id, None)?;
    }
    while tier.object.status().state != "SERVING" {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(tier)
}

impl Tier {
    fn put(&self, id: u64, parent: Option<u64>) -> anyhow::Result<(Option<LeasedBlock>, Vec<u32>)> {
        let deadline = BootTime(u64::MAX);
        let urgency = Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline };
        let (layout, parent) = (&*self.layout, parent.map(hash));
        let request = FillRequest { layout, group: 0, hash: hash(id), parent, length: BLOCK, urgency };
        loop {
            match self.host.begin_fill(&request, now()) {
                BeginFill::Fill(mut fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.host.drop_plan(plan));
                    fill.append(&replay::content(id, BLOCK as usize), now())?;
                    let sums = fill.section_sums();
                    return Ok((fill.commit_leased(true).1, sums));
                }
                BeginFill::NeedsSlab(plan) => self.host.make_slab(plan)?,
                _ => anyhow::bail!("no room for block {id}"),
            }
        }
    }
}

/// Blocks of one chain that are in memory, until all of them are DURABLE.
async fn write_blocks(url: &ObjectUrl) -> anyhow::Result<Run> {
    let tier = tier(url, 1).await?;
    let mut blocks = Vec::new();
    for id in 0..BLOCKS {
        let (block, sums) = tier.put(id, id.checked_sub(1))?;
        blocks.push((block.context("not published")?, sums));
    }
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    let mut waiting = Vec::new();
    for (id, (block, sums)) in (0..BLOCKS).zip(blocks) {
        let offer = Offer {
            layout: Arc::clone(&tier.layout),
            group: 0,
            hash: hash(id),
            parent: id.checked_sub(1).map(hash),
            block,
            sums,
            durable: true,
            has_waited: true,
        };
        match tier.object.offer(offer) {
            Offered::Accepted(Some(told)) => waiting.push(told),
            _ => anyhow::bail!("block {id} is not taken"),
        }
    }
    tier.object.flush();
    for told in waiting {
        anyhow::ensure!(told.await == Ok(true), "a block is not DURABLE: {:?}", tier.object.status());
    }
    let run = Run::of(started, cpu);
    tier.object.close(Duration::ZERO).await;
    Ok(run)
}

/// The same bytes as plain creates of the size of a pack.
async fn plain_writes(url: &ObjectUrl) -> anyhow::Result<Run> {
    let opened = url.open()?;
    let content: Vec<Bytes> =
        (0..REQUEST / u64::from(BLOCK)).map(|id| Bytes::from(replay::content(id, BLOCK as usize).to_vec())).collect();
    let requests = BLOCKS * u64::from(BLOCK) / REQUEST;
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    let mut under_way = futures::stream::iter(0..requests)
        .map(|number| {
            let location = opened.prefix.clone().join("plain").join(number.to_string());
            let payload: PutPayload = content.iter().cloned().collect();
            let store = Arc::clone(&opened.store);
            tokio::spawn(async move { store.put_opts(&location, payload, PutMode::Create.into()).await })
        })
        .buffer_unordered(AT_ONCE);
    while let Some(put) = under_way.next().await {
        put??;
    }
    Ok(Run::of(started, cpu))
}

/// The chain's blocks from the bucket into memory, checked, in order.
async fn read_blocks(url: &ObjectUrl) -> anyhow::Result<Run> {
    let tier = tier(url, 2).await?;
    let hashes: Vec<_> = (0..BLOCKS).map(hash).collect();
    if let Some(search) = tier.object.search(&tier.layout, 0, &hashes, now()) {
        search.ended().await;
    }
    anyhow::ensure!(tier.object.presence(&tier.layout, 0, &hashes).iter().all(|found| *found), "not all were found");
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let (stack, layout) = (
        Stack::new(&tier.host, [(kvstore_tiers::Tier::Object, Arc::clone(&tier.object) as _)], now),
        Arc::clone(&tier.layout),
    );
    let promotion = Promotion { stack, layout, group: 0, priority: Priority::Demand, deadline };
    let policy = Policy { ahead: WINDOW, ends_outranked: false, ends_full: false };
    let asked = hashes.into_iter().enumerate().map(|(index, hash)| Asked { index, hash, known: None });
    let mut window = Window::new(&promotion, policy, asked);
    while let Some((index, _, leasing)) = window.next().await {
        anyhow::ensure!(matches!(leasing, Leasing::Leased(_)), "block {index} did not come");
    }
    let run = Run::of(started, cpu);
    tier.object.close(Duration::ZERO).await;
    Ok(run)
}

/// The same bytes as plain ranged GETs.
async fn plain_reads(url: &ObjectUrl) -> anyhow::Result<Run> {
    let opened = url.open()?;
    let requests = BLOCKS * u64::from(BLOCK) / REQUEST;
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    let mut under_way = futures::stream::iter(0..requests)
        .map(|number| {
            let location = opened.prefix.clone().join("plain").join(number.to_string());
            let store = Arc::clone(&opened.store);
            tokio::spawn(async move { store.get_range(&location, 0..REQUEST).await })
        })
        .buffered(AT_ONCE);
    while let Some(got) = under_way.next().await {
        anyhow::ensure!(got??.len() as u64 == REQUEST, "a body is short");
    }
    Ok(Run::of(started, cpu))
}
