//! What the router adds to a request: 500 a second, each with a prompt of some two thousand tokens that is tokenized, hashed, looked up and placed among eight
//! workers, beside the same requests straight to a worker.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvstore_chat::prompts::Prompts;
use kvstore_proto::hashes::Sha256Cbor;
use kvstore_router::events::vllm::{Batch, Event, Stored};
use kvstore_router::fleet::{Fleet, FleetOptions, WorkerSpec};
use kvstore_router::hashing::Hashing;
use kvstore_router::place::{PlaceOptions, Router};
use kvstore_router::serve::{App, Model, ServeOptions};
use kvstore_tests::engine::ScriptedEngine;
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{DecoderWrapper, TokenizerBuilder};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::figure::{self, median};

const PER_SECOND: u64 = 500;
const SECONDS: u64 = 6;
const WORKERS: usize = 8;
/// Blocks that each worker has, beside those of the prompts.
const BLOCKS: u64 = 50_000;
/// Text of this project's documents as they were when this figure was first measured: it must not change with them.
pub const CORPUS: &str = include_str!("corpus.txt");

/// A byte-level tokenizer, as most models have, learnt from this project's own words.
pub fn write_tokenizer(folder: &std::path::Path) -> anyhow::Result<()> {
    let wrong = |error: tokenizers::Error| anyhow::anyhow!("{error}");
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(8000)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, DecoderWrapper>::default()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(ByteLevel::default()))
            .build()
            .map_err(wrong)?;
    tokenizer.train(&mut trainer, CORPUS.lines()).map_err(wrong)?;
    tokenizer.save(folder.join("tokenizer.json"), false).map_err(wrong)
}

/// Latencies of requests that begin at fixed times, whatever became of those before; sorted.
async fn load(client: &Client<HttpConnector, Full<Bytes>>, url: &str, bodies: &[Bytes]) -> anyhow::Result<Vec<f64>> {
    let url: http::Uri = format!("{url}/v1/completions").parse()?;
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for (at, body) in bodies.iter().enumerate() {
        let due = begun + Duration::from_secs_f64(at as f64 / PER_SECOND as f64);
        tokio::time::sleep_until(due.into()).await;
        let request = http::Request::post(url.clone())
            .header("content-type", "application/json")
            .body(Full::new(body.clone()))?;
        let client = client.clone();
        tasks.push(tokio::spawn(async move {
            let answer = client.request(request).await?;
            anyhow::ensure!(answer.status().is_success(), "{}", answer.status());
            answer.into_body().collect().await?;
            Ok(due.elapsed().as_secs_f64() * 1e3)
        }));
    }
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.push(task.await??);
    }
    latencies.sort_by(f64::total_cmp);
    Ok(latencies)
}

fn quantile(sorted: &[f64], quantile: f64) -> f64 {
    sorted.get((sorted.len() as f64 * quantile) as usize).copied().unwrap_or(f64::NAN)
}

/// These engines: each has other blocks, and some of the prompt's.
fn fleet_of(engines: &[ScriptedEngine], tokens: &Prompts, prompt: &str) -> anyhow::Result<Arc<Fleet>> {
    let spec = |(at, engine): (usize, &ScriptedEngine)| WorkerSpec {
        block_tokens: 16,
        ..WorkerSpec::new(&format!("w{at}"), &engine.url(), "m")
    };
    let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
    fleet.set_workers(&engines.iter().enumerate().map(spec).collect::<Vec<_>>());
    let known = fleet.hashing().chain(&tokens.encode(prompt, true)?, 16, None, None)?.names;
    for (at, worker) in fleet.workers().iter().enumerate() {
        let others = (0..BLOCKS / 100).map(|run| {
            let hashes = (0..100).map(|block| (at as u64 + 1) << 40 | run << 10 | block).collect();
            Event::Stored(Stored { hashes, block_tokens: 16, ..Stored::default() })
        });
        let prefix = Stored {
            hashes: known.iter().copied().take(known.len() * at / WORKERS).collect(),
            block_tokens: 16,
            ..Stored::default()
        };
        let events = others.chain([Event::Stored(prefix)]).collect();
        worker.view.apply(&Batch { events, ..Batch::default() }, 0);
    }
    Ok(fleet)
}

async fn measure_in_runtime(rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    write_tokenizer(folder.path())?;
    let tokens = Prompts::load(folder.path(), None)?;
    let prompt: String = CORPUS.chars().take(8000).collect();
    let count = tokens.encode(&prompt, true)?.len();
    let body =
        |at: u64| Bytes::from(json!({"model": "m", "max_tokens": 1, "prompt": format!("{prompt} {at}")}).to_string());
    let bodies: Vec<Bytes> = (0..PER_SECOND * SECONDS).map(body).collect();

    let mut engines = Vec::new();
    for _ in 0..WORKERS {
        engines.push(ScriptedEngine::start("m", Duration::ZERO).await);
    }
    let fleet = fleet_of(&engines, &tokens, &prompt)?;
    let router = Router::new(fleet, PlaceOptions::default());
    let model = Model { tokens: Some(tokens), ..Model::default() };
    let app = App::new(Arc::clone(&router), HashMap::from([("m".to_owned(), model)]), ServeOptions::default());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (stop, stopping) = watch::channel(false);
    let (sent, handed) = std::sync::mpsc::channel();
    let std_listener = listener.into_std()?;
    // A runtime of its own: what its threads take is what the router takes.
    let thread = std::thread::spawn(move || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(THREADS).build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(std_listener)?;
            let _ = sent.send(());
            app.serve(listener, stopping).await;
            Ok(())
        })
    });
    handed.recv()?;

    let client = Client::builder(TokioExecutor::new()).build_http();
    let direct_url = engines.first().map(ScriptedEngine::url).unwrap_or_default();
    let unshared = unshared_bodies();
    let mut shared = Added::default();
    let mut unshared_added = Added::default();
    for round in 0..=rounds {
        let direct = load(&client, &direct_url, &bodies).await?;
        let through = counted(&client, &url, &bodies).await?;
        let apart = counted(&client, &url, &unshared).await?;
        if round > 0 {
            shared.take(&direct, &through);
            unshared_added.take(&direct, &apart);
        }
    }
    drop(stop);
    thread.join().map_err(|_| anyhow::anyhow!("the router's thread ended in a panic"))??;
    figure::note("routing", "overhead_prompt_tokens", count as f64);
    figure::note("routing", "overhead_p50_ms_at_500_a_second", median(shared.p50));
    figure::print("routing", "overhead_p99_ms_at_500_a_second", median(shared.p99), "< 5");
    figure::note("routing", "overhead_cores_at_500_a_second", median(shared.cores));
    figure::note("routing", "unshared_p50_ms_at_500_a_second", median(unshared_added.p50));
    figure::print("routing", "unshared_p99_ms_at_500_a_second", median(unshared_added.p99), "< 5");
    figure::print("routing", "unshared_cores_at_500_a_second", median(unshared_added.cores), "<= 1.2");
    figure::note("routing", "straight_to_a_worker_p99_ms_over_its_p50", median(shared.direct_p99));
    Ok(())
}

/// The router's threads.
const THREADS: &str = "bench-router";

/// CPU seconds of the router's threads so far.
fn cpu_seconds() -> f64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
        if name.contains(THREADS) {
            ticks += rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum::<u64>();
        }
    }
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Latencies, sorted, and the cores that the router took.
async fn counted(
    client: &Client<HttpConnector, Full<Bytes>>,
    url: &str,
    bodies: &[Bytes],
) -> anyhow::Result<(Vec<f64>, f64)> {
    let (begun, before) = (Instant::now(), cpu_seconds());
    let latencies = load(client, url, bodies).await?;
    Ok((latencies, (cpu_seconds() - before) / begun.elapsed().as_secs_f64()))
}

/// By round.
#[derive(Default)]
struct Added {
    p50: Vec<f64>,
    p99: Vec<f64>,
    cores: Vec<f64>,
    direct_p99: Vec<f64>,
}

impl Added {
    fn take(&mut self, direct: &[f64], (through, cores): &(Vec<f64>, f64)) {
        let alone = quantile(direct, 0.5);
        self.p50.push(quantile(through, 0.5) - alone);
        self.p99.push(quantile(through, 0.99) - alone);
        self.direct_p99.push(quantile(direct, 0.99) - alone);
        self.cores.push(*cores);
    }
}

/// Prompts of 8,000 characters, of the same words, of which no two begin alike.
fn unshared_bodies() -> Vec<Bytes> {
    let words: Vec<&str> = CORPUS.split_whitespace().collect();
    let mut random = 7u64;
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words.get((random >> 33) as usize % words.len().max(1)).copied().unwrap_or_default()
    };
    let mut prompt = || {
        let mut text = String::with_capacity(8100);
        while text.len() < 8000 {
            text.push_str(next());
            text.push(' ');
        }
        Bytes::from(json!({"model": "m", "max_tokens": 1, "prompt": text}).to_string())
    };
    (0..PER_SECOND * SECONDS).map(|_| prompt()).collect()
}

/// Measures it.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(measure_in_runtime(rounds.min(5)))
}
