//! Puts and gets over a Unix socket, 1 MiB blocks at level MEMORY, one client with one call at a time,
//! beside Redis through its Rust client over its Unix socket in the same run. Both clients send bytes they
//! have and receive into memory of their own; ours also checksums every byte, both ways, on both sides.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::BlockKind;
use kvstore_client::{Client, GroupRef, Plane, PutBlock};
use redis::Commands;
use tokio::runtime::Runtime;

use crate::figure::{self, median};
use crate::process::{Process, own_cpu_seconds};

const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 128;
/// Blocks of one call, where several travel together.
const BATCH: usize = 16;

/// One side of a round: bytes a second, and CPU seconds of client and server for 10^9 bytes.
struct Outcome {
    rate: f64,
    cpu_per_gb: f64,
}

fn timed(server: &Process, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Outcome> {
    let cpu = server.cpu_seconds() + own_cpu_seconds();
    let started = Instant::now();
    work()?;
    let seconds = started.elapsed().as_secs_f64();
    let bytes = (BLOCKS * BLOCK_BYTES) as f64;
    let cpu = server.cpu_seconds() + own_cpu_seconds() - cpu;
    Ok(Outcome { rate: bytes / seconds, cpu_per_gb: cpu / bytes * 1e9 })
}

struct Ours {
    runtime: Runtime,
    client: Client,
    group: GroupRef,
    server: Process,
}

impl Ours {
    fn start(daemon: &Path, folder: &Path) -> anyhow::Result<Self> {
        let socket = folder.join("kvstore.sock");
        let mut command = Command::new(daemon);
        command.args(["serve", "--host-bytes", "1GiB", "--set", "http.address=off", "--set", "nvme.paths=off"]);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        let server = Process::start(command, &socket)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let layout = replay::layout("kvstore benches", BLOCK_BYTES as u32, BlockKind::Attention);
        let (client, group) = runtime.block_on(async {
            let client = Client::connect_over(&format!("unix:{}", socket.display()), Plane::Grpc).await?;
            let group = client.register_layout(layout).await?.group(0);
            anyhow::Ok((client, group))
        })?;
        Ok(Self { runtime, client, group, server })
    }

    fn put(&self, hashes: &[Bytes], contents: &[Bytes], batch: usize) -> anyhow::Result<Outcome> {
        timed(&self.server, || {
            self.runtime.block_on(async {
                for (hashes, contents) in hashes.chunks(batch).zip(contents.chunks(batch)) {
                    let blocks = hashes.iter().zip(contents);
                    let blocks = blocks.map(|(hash, bytes)| PutBlock::new(hash.clone(), bytes.clone())).collect();
                    let results = self.client.put(&self.group, blocks).await?;
                    let stored = results.iter().all(|result| result.status() == kvstore_client::v1::PutStatus::Stored);
                    anyhow::ensure!(stored, "a block was not stored");
                }
                Ok(())
            })
        })
    }

    fn get(&self, hashes: &[Bytes], into: &mut [Vec<u8>]) -> anyhow::Result<Outcome> {
        let batch = into.len();
        timed(&self.server, || {
            self.runtime.block_on(async {
                let mut buffers: Vec<&mut [u8]> = into.iter_mut().map(Vec::as_mut_slice).collect();
                for hashes in hashes.chunks(batch) {
                    let got = self.client.get_into(&self.group, hashes, &mut buffers).await?;
                    anyhow::ensure!(got == hashes.len(), "a block was not there");
                }
                Ok(())
            })
        })
    }

    fn delete(&self, hashes: &[Bytes]) -> anyhow::Result<()> {
        self.runtime.block_on(self.client.delete(&self.group, hashes))?;
        Ok(())
    }
}

struct Redis {
    connection: redis::Connection,
    server: Process,
}

impl Redis {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let socket = folder.join("redis.sock");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--maxmemory", "1gb", "--unixsocket"]);
        command.arg(&socket);
        let server = Process::start(command, &socket)?;
        let connection = redis::Client::open(format!("redis+unix://{}", socket.display()))?.get_connection()?;
        Ok(Self { connection, server })
    }

    fn put(&mut self, hashes: &[Bytes], contents: &[Bytes], batch: usize) -> anyhow::Result<Outcome> {
        let Self { connection, server } = self;
        timed(server, || {
            for (hashes, contents) in hashes.chunks(batch).zip(contents.chunks(batch)) {
                if batch == 1 {
                    for (hash, bytes) in hashes.iter().zip(contents) {
                        let () = connection.set(hash.as_ref(), bytes.as_ref())?;
                    }
                } else {
                    let mut pipe = redis::pipe();
                    for (hash, bytes) in hashes.iter().zip(contents) {
                        pipe.set(hash.as_ref(), bytes.as_ref()).ignore();
                    }
                    let () = pipe.query(connection)?;
                }
            }
            Ok(())
        })
    }

    fn get(&mut self, hashes: &[Bytes], batch: usize) -> anyhow::Result<Outcome> {
        let Self { connection, server } = self;
        timed(server, || {
            for hashes in hashes.chunks(batch) {
                if batch == 1 {
                    let bytes: Vec<u8> = connection.get(hashes.concat())?;
                    anyhow::ensure!(bytes.len() == BLOCK_BYTES, "a value was not there");
                } else {
                    let names: Vec<&[u8]> = hashes.iter().map(|hash| hash.as_ref()).collect();
                    let values: Vec<Vec<u8>> = connection.mget(names)?;
                    anyhow::ensure!(values.iter().all(|value| value.len() == BLOCK_BYTES), "a value was not there");
                }
            }
            Ok(())
        })
    }

    fn delete(&mut self, hashes: &[Bytes]) -> anyhow::Result<()> {
        let names: Vec<&[u8]> = hashes.iter().map(|hash| hash.as_ref()).collect();
        let () = self.connection.del(names)?;
        Ok(())
    }
}

#[derive(Default)]
struct Rounds {
    ours: Vec<Outcome>,
    theirs: Vec<Outcome>,
}

impl Rounds {
    fn print(&self, name: &str, target: &str) {
        let of = |outcomes: &[Outcome], value: fn(&Outcome) -> f64| median(outcomes.iter().map(value).collect());
        let ratio = median(self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours.rate / theirs.rate).collect());
        figure::print("grpc", &format!("{name}_of_redis"), ratio, target);
        figure::note("grpc", &format!("{name}_gbps"), of(&self.ours, |outcome| outcome.rate) / 1e9);
        figure::note("grpc", &format!("{name}_redis_gbps"), of(&self.theirs, |outcome| outcome.rate) / 1e9);
        figure::note("grpc", &format!("{name}_cpu_s_per_gb"), of(&self.ours, |outcome| outcome.cpu_per_gb));
        figure::note("grpc", &format!("{name}_redis_cpu_s_per_gb"), of(&self.theirs, |outcome| outcome.cpu_per_gb));
    }
}

/// Measures the group.
pub fn measure(daemon: &Path, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let ours = Ours::start(daemon, folder.path())?;
    let mut redis = Redis::start(folder.path())?;
    let contents: Vec<Bytes> = (0..BLOCKS as u64).map(|id| replay::content(id, BLOCK_BYTES)).collect();
    for (suffix, batch, put_target, get_target) in [("", 1, ">= 0.8", ">= 0.7"), ("_batch16", BATCH, "none", "none")] {
        let (mut puts, mut gets) = (Rounds::default(), Rounds::default());
        let mut into = vec![vec![0; BLOCK_BYTES]; batch];
        // The first round warms both up and does not count.
        for round in 0..=rounds as u64 {
            let hashes: Vec<Bytes> =
                (0..BLOCKS as u64).map(|at| replay::sequence_hash(round << 32 | (batch as u64) << 56 | at)).collect();
            // Whoever goes first alternates.
            let (put, get, their_put, their_get);
            if round % 2 == 0 {
                put = ours.put(&hashes, &contents, batch)?;
                their_put = redis.put(&hashes, &contents, batch)?;
                get = ours.get(&hashes, &mut into)?;
                their_get = redis.get(&hashes, batch)?;
            } else {
                their_put = redis.put(&hashes, &contents, batch)?;
                put = ours.put(&hashes, &contents, batch)?;
                their_get = redis.get(&hashes, batch)?;
                get = ours.get(&hashes, &mut into)?;
            }
            ours.delete(&hashes)?;
            redis.delete(&hashes)?;
            if round > 0 {
                puts.ours.push(put);
                puts.theirs.push(their_put);
                gets.ours.push(get);
                gets.theirs.push(their_get);
            }
        }
        puts.print(&format!("put{suffix}"), put_target);
        gets.print(&format!("get{suffix}"), get_target);
    }
    Ok(())
}
