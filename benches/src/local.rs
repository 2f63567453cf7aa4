//! The local plane: blocks read where they lie and put through shared memory, by a client in this process of a daemon in
//! another, beside what the machine does at best in the same run: `memcpy`, a cache line that two cores pass to and fro, a Unix
//! socket between pinned processes.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::{BlockKind, PutStatus};
use kvstore_client::{Client, GroupRef, Leases, Plane, PutBlock, PutOptions, PutSlice};
use kvstore_plane::stream_copy;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::runtime::Runtime;

use crate::figure::{self, median};
use crate::process::Process;

const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 64;
const PREFIX: usize = 256;
const CHAINS: usize = 64;
/// Of the clients that hold leases.
const CLIENTS: usize = 500;
const LEASES_EACH: usize = 100;
/// Names the folder of a process that this one starts.
const HELPER: &str = "KVSTORE_BENCH_HELPER";

/// A daemon in a process of its own, and a client of its local plane.
pub struct Daemon {
    /// What the client's calls run on.
    pub runtime: Runtime,
    /// The client.
    pub client: Client,
    address: String,
    http: String,
    server: Process,
}

impl Daemon {
    /// Starts it, with 2 GiB of memory.
    pub fn start(daemon: &Path, folder: &Path) -> anyhow::Result<Self> {
        let socket = folder.join("kvstore.sock");
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new(daemon);
        command.args(["serve", "--host-bytes", "2GiB", "--set", "nvme.paths=off"]);
        command.args(["--set", &format!("http.address={port}")]);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        let server = Process::start(command, &socket)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = format!("unix:{}", socket.display());
        let client = runtime.block_on(Client::connect_over(&address, Plane::Local))?;
        Ok(Self { runtime, client, address, http: port.to_string(), server })
    }

    /// The group of a layout with blocks of this size.
    pub fn group(&self, block_bytes: usize) -> anyhow::Result<GroupRef> {
        let layout = replay::layout("kvstore local benches", block_bytes as u32, BlockKind::Attention);
        Ok(self.runtime.block_on(self.client.register_layout(layout))?.group(0))
    }

    fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let mut stream = std::net::TcpStream::connect(&self.http)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).with_context(|| format!("no metric {name}"))
    }
}

/// The names of a chain's blocks.
pub fn hashes(chain: u64, blocks: usize) -> Vec<Bytes> {
    (0..blocks as u64).map(|at| replay::sequence_hash(chain << 20 | at)).collect()
}

fn pin_to(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    // Best effort: a container may allow other cores only.
    let _ = sched_setaffinity(None, &set);
}

/// `None`: the whole machine again.
fn unpin(cores: usize) {
    let mut set = CpuSet::new();
    (0..cores).for_each(|core| set.set(core));
    let _ = sched_setaffinity(None, &set);
}

/// How long `work` takes.
pub fn seconds(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Whole, page-aligned, touched buffers.
fn buffers(count: usize, bytes: usize) -> Vec<Vec<u8>> {
    (0..count).map(|at| vec![at as u8 + 1; bytes]).collect()
}

fn gets(daemon: &Daemon, rounds: usize) -> anyhow::Result<()> {
    let group = daemon.group(BLOCK_BYTES)?;
    let names = hashes(1, BLOCKS);
    let blocks = names.iter().zip(0..).map(|(hash, id)| PutBlock::new(hash.clone(), replay::content(id, BLOCK_BYTES)));
    daemon.runtime.block_on(daemon.client.put(&group, blocks.collect()))?;
    let leases: Leases = daemon.runtime.block_on(daemon.client.leases(&group, &names))?;
    anyhow::ensure!(leases.len() == BLOCKS, "not all blocks are resident");
    let mut into = buffers(BLOCKS, BLOCK_BYTES);
    let bytes = (BLOCKS * BLOCK_BYTES) as f64;
    let (mut ratios, mut ours, mut plains, mut streams) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let mut slices: Vec<&mut [u8]> = into.iter_mut().map(Vec::as_mut_slice).collect();
        let mut of = [0.0; 3];
        for turn in 0..3 {
            match (round + turn) % 3 {
                0 => {
                    of[0] = seconds(|| {
                        let got = daemon.runtime.block_on(daemon.client.get_into(&group, &names, &mut slices))?;
                        anyhow::ensure!(got == BLOCKS, "a block was not there");
                        Ok(())
                    })?;
                }
                1 => {
                    of[1] = seconds(|| {
                        leases.iter().zip(&mut slices).for_each(|(from, to)| to.copy_from_slice(from));
                        Ok(())
                    })?;
                }
                _ => {
                    of[2] = seconds(|| {
                        leases.iter().zip(&mut slices).for_each(|(from, to)| stream_copy(from, to));
                        Ok(())
                    })?;
                }
            }
        }
        // The first round warms up.
        if round > 0 {
            ratios.push(of[1].min(of[2]) / of[0]);
            ours.push(bytes / of[0] / 1e9);
            plains.push(bytes / of[1] / 1e9);
            streams.push(bytes / of[2] / 1e9);
        }
    }
    figure::print("local", "get_64x1mib_of_faster_memcpy", median(ratios), ">= 0.9");
    figure::note("local", "get_64x1mib_gbps", median(ours));
    figure::note("local", "memcpy_plain_gbps", median(plains));
    figure::note("local", "memcpy_non_temporal_gbps", median(streams));
    Ok(())
}

fn puts(daemon: &Daemon, rounds: usize) -> anyhow::Result<()> {
    let group = daemon.group(BLOCK_BYTES)?;
    let contents: Vec<Bytes> = (0..BLOCKS as u64).map(|id| replay::content(id, BLOCK_BYTES)).collect();
    let mut into = buffers(BLOCKS, BLOCK_BYTES);
    let mut ratios = [Vec::new(), Vec::new(), Vec::new()];
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    let bytes = (BLOCKS * BLOCK_BYTES) as f64;
    let client = &daemon.client;
    let put = async |names: &[Bytes], contents: &[Bytes]| {
        let bytes: Vec<&[u8]> = contents.iter().map(AsRef::as_ref).collect();
        let slice = |(hash, bytes)| PutSlice { hash, parent: None, parts: std::slice::from_ref(bytes) };
        let blocks: Vec<PutSlice<'_>> = names.iter().map(AsRef::as_ref).zip(&bytes).map(slice).collect();
        let stored = client.put_from(&group, &blocks, PutOptions::default()).await?;
        anyhow::ensure!(stored.iter().all(|result| result.status() == PutStatus::Stored), "a block was not stored");
        anyhow::Ok(())
    };
    for round in 0..=rounds {
        let mut copy = || {
            seconds(|| {
                contents.iter().zip(&mut into).for_each(|(from, to)| to.copy_from_slice(std::hint::black_box(from)));
                Ok(())
            })
        };
        for (way, (ratios, rates)) in ratios.iter_mut().zip(&mut rates).enumerate() {
            let names = hashes(1000 + (round * 3 + way) as u64, BLOCKS);
            let before = copy()?;
            let ours = seconds(|| {
                daemon.runtime.block_on(async {
                    match way {
                        0 => {
                            for (name, content) in names.chunks(1).zip(contents.chunks(1)) {
                                put(name, content).await?;
                            }
                        }
                        1 => {
                            let lane = async |lane: usize| {
                                let own = names.chunks(1).zip(contents.chunks(1)).skip(lane).step_by(4);
                                for (name, content) in own {
                                    put(name, content).await?;
                                }
                                anyhow::Ok(())
                            };
                            futures::future::try_join4(lane(0), lane(1), lane(2), lane(3)).await?;
                        }
                        _ => put(&names, &contents).await?,
                    }
                    Ok(())
                })
            })?;
            let copied = (before + copy()?) / 2.0;
            daemon.runtime.block_on(client.delete(&group, &names))?;
            // Slots of deleted blocks come back with the daemon's next tick.
            std::thread::sleep(Duration::from_millis(120));
            if round > 0 {
                ratios.push(copied / ours);
                rates.push(bytes / ours / 1e9);
            }
        }
    }
    let [one, four, batch] = ratios;
    let [one_rate, four_rate, batch_rate] = rates;
    figure::print("local", "put_1mib_one_at_a_time_of_memcpy", median(one), ">= 0.35");
    figure::print("local", "put_1mib_four_in_flight_of_memcpy", median(four), ">= 0.55");
    figure::note("local", "put_64x1mib_batch_of_memcpy", median(batch));
    figure::note("local", "put_1mib_one_at_a_time_gbps", median(one_rate));
    figure::note("local", "put_1mib_four_in_flight_gbps", median(four_rate));
    figure::note("local", "put_64x1mib_batch_gbps", median(batch_rate));
    Ok(())
}

fn looks(daemon: &Daemon, rounds: usize) -> anyhow::Result<()> {
    let group = daemon.group(4096)?;
    let content = replay::content(1, 4096);
    let chains: Vec<Vec<Bytes>> = (0..CHAINS as u64).map(|chain| hashes(1 << 20 | chain, PREFIX)).collect();
    for chain in &chains {
        let blocks = chain.iter().map(|hash| PutBlock::new(hash.clone(), content.clone())).collect();
        daemon.runtime.block_on(daemon.client.put(&group, blocks))?;
    }
    let lease = |names: &[Bytes]| -> anyhow::Result<()> {
        let leases = daemon.client.leases_now(&group, names).context("not attached")??;
        anyhow::ensure!(leases.len() == names.len(), "a block was not there");
        Ok(())
    };
    let (mut single, mut per_block, mut warm, mut pings) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut random = 1u64;
    for round in 0..=rounds {
        let mut ones = Vec::with_capacity(20_000);
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let chain = chains.get((random >> 40) as usize % CHAINS).map(Vec::as_slice).unwrap_or_default();
            let at = (random >> 20) as usize % PREFIX;
            let name = chain.get(at..=at).unwrap_or_default();
            let started = Instant::now();
            lease(name)?;
            ones.push(started.elapsed().as_nanos() as f64 / 1e3);
        }
        let mut prefixes = Vec::new();
        for turn in 0..500usize {
            let chain = chains.get(turn * 7 % CHAINS).map(Vec::as_slice).unwrap_or_default();
            prefixes.push(seconds(|| lease(chain))? * 1e9 / PREFIX as f64);
        }
        let mut hot = Vec::new();
        for _ in 0..200 {
            hot.push(seconds(|| lease(chains.first().map(Vec::as_slice).unwrap_or_default()))? * 1e9 / PREFIX as f64);
        }
        if round > 0 {
            single.push(median(ones));
            per_block.push(median(prefixes));
            warm.push(median(hot));
            pings.push(cache_line_us());
        }
    }
    figure::print("local", "lease_one_block_p50_us", median(single), "<= 0.5");
    figure::print("local", "lease_prefix_of_256_ns_a_block", median(per_block), "<= 60");
    figure::note("local", "lease_prefix_of_256_again_ns_a_block", median(warm));
    figure::note("local", "cache_line_ping_pong_us", median(pings));
    Ok(())
}

/// Microseconds for a cache line to go to another core and back.
fn cache_line_us() -> f64 {
    const TURNS: u64 = 20_000;
    let line = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin_to(1);
            for turn in 0..TURNS {
                while line.load(Ordering::Acquire) != turn * 2 + 1 {
                    std::hint::spin_loop();
                }
                line.store(turn * 2 + 2, Ordering::Release);
            }
        });
        let started = Instant::now();
        for turn in 0..TURNS {
            line.store(turn * 2 + 1, Ordering::Release);
            while line.load(Ordering::Acquire) != turn * 2 + 2 {
                std::hint::spin_loop();
            }
        }
        started.elapsed().as_secs_f64() * 1e6 / TURNS as f64
    })
}

/// A command over the rings, back to back, beside a datagram to a process on the other core and back.
fn commands(daemon: &Daemon, rounds: usize) -> anyhow::Result<()> {
    let group = daemon.group(4096)?;
    let cores = std::thread::available_parallelism()?.get();
    let (socket, echo) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None)?;
    let mut echo = helper("echo", Some(&echo), "")?;
    let name = hashes(2 << 20, 1);
    let name = name.first().context("one hash")?;
    let block = [PutSlice { hash: name, parent: None, parts: &[&replay::content(1, 4096)] }];
    daemon.runtime.block_on(daemon.client.put_from(&group, &block, PutOptions::default()))?;
    pin_to(0);
    let (mut ratios, mut rings, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let mut ring = Vec::new();
        for _ in 0..3000 {
            let started = Instant::now();
            // A block that is there: one command, one completion.
            daemon.runtime.block_on(daemon.client.put_from(&group, &block, PutOptions::default()))?;
            ring.push(started.elapsed().as_secs_f64() * 1e6);
        }
        let mut datagrams = Vec::new();
        let mut buffer = [0u8; 64];
        for _ in 0..3000 {
            let started = Instant::now();
            rustix::net::send(&socket, &buffer, SendFlags::empty())?;
            rustix::net::recv(&socket, &mut buffer, RecvFlags::empty())?;
            datagrams.push(started.elapsed().as_secs_f64() * 1e6);
        }
        if round > 0 {
            let (ring, datagram) = (median(ring), median(datagrams));
            ratios.push(ring / datagram);
            rings.push(ring);
            sockets.push(datagram);
        }
    }
    unpin(cores);
    let _ = echo.kill();
    let _ = echo.wait();
    figure::print("local", "command_of_socket_ping_pong", median(ratios), "<= 0.5");
    figure::note("local", "command_p50_us", median(rings));
    figure::note("local", "socket_ping_pong_p50_us", median(sockets));
    Ok(())
}

/// This program again, for another part.
fn helper(part: &str, stdin: Option<&OwnedFd>, argument: &str) -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    // One arena: clients are measured here, not an allocator's habits.
    command.env(HELPER, part).env("_RJEM_MALLOC_CONF", "narenas:1,tcache:false").arg("--").arg(argument);
    if let Some(stdin) = stdin {
        command.stdin(std::process::Stdio::from(stdin.try_clone()?));
    }
    Ok(command.spawn()?)
}

/// What a helper does; false where this process is none.
pub fn is_helper() -> anyhow::Result<bool> {
    let Ok(part) = std::env::var(HELPER) else { return Ok(false) };
    match part.as_str() {
        "echo" => {
            pin_to(1);
            let stdin = std::io::stdin();
            let mut buffer = [0u8; 64];
            while rustix::net::recv(stdin.as_fd(), &mut buffer, RecvFlags::empty())?.0 > 0 {
                rustix::net::send(stdin.as_fd(), &buffer, SendFlags::empty())?;
            }
        }
        "clients" => hold(&std::env::args().next_back().unwrap_or_default())?,
        other => anyhow::bail!("unknown part {other}"),
    }
    Ok(true)
}

/// Forks into clients, each of which leases blocks and then waits to be killed.
fn hold(address: &str) -> anyhow::Result<()> {
    for number in 0..CLIENTS as u64 {
        // SAFETY: this process has one thread, and the child goes its own way.
        if unsafe { libc::fork() } == 0 {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let held = runtime.block_on(async {
                let client = Client::connect_over(address, Plane::Local).await?;
                let layout = replay::layout("kvstore local benches", 4096, BlockKind::Attention);
                let group = client.register_layout(layout).await?.group(0);
                let names = hashes((1 << 20) | (number % CHAINS as u64), LEASES_EACH);
                let leases = client.leases(&group, &names).await?;
                anyhow::ensure!(leases.len() == LEASES_EACH, "a block was not there");
                anyhow::Ok((client, leases))
            })?;
            loop {
                std::thread::sleep(Duration::from_secs(3600));
                let _ = std::hint::black_box(&held);
            }
        }
    }
    // Children that fail show in the count of leases.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// A control group for memory, where this system lets us make one.
struct Group(std::path::PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let name = format!("kvstore-benches-{}", std::process::id());
        ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].into_iter().find_map(|root| {
            let path = Path::new(root).join(&name);
            let usable = std::fs::create_dir(&path).is_ok();
            let group = usable.then_some(Self(path))?;
            group.bytes().map(|_| group)
        })
    }

    fn add(&self, process: u32) -> anyhow::Result<()> {
        Ok(std::fs::write(self.0.join("cgroup.procs"), process.to_string())?)
    }

    /// What `start` starts is in the group from its first moment: this process goes in, and out again.
    fn inside<T>(&self, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.add(std::process::id())?;
        let started = start();
        let root = self.0.parent().context("a control group has a parent")?;
        std::fs::write(root.join("cgroup.procs"), std::process::id().to_string())?;
        started
    }

    fn bytes(&self) -> Option<f64> {
        let read = |file| std::fs::read_to_string(self.0.join(file)).ok()?.trim().parse().ok();
        read("memory.usage_in_bytes").or_else(|| read("memory.current"))
    }

    fn processes(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Five hundred clients with a hundred leases each: what they and the daemon take, and how soon their leases end.
fn many_clients(daemon: &Path) -> anyhow::Result<()> {
    let Some(group) = Group::new() else {
        println!("no control group can be made here: local.500_clients is skipped");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let daemon = group.inside(|| Daemon::start(daemon, folder.path()))?;
    let names = daemon.group(4096)?;
    let content = replay::content(1, 4096);
    for chain in 0..CHAINS as u64 {
        let blocks = hashes(1 << 20 | chain, PREFIX).into_iter();
        let blocks = blocks.map(|hash| PutBlock::new(hash, content.clone())).collect();
        daemon.runtime.block_on(daemon.client.put(&names, blocks))?;
    }
    let mut clients = group.inside(|| helper("clients", None, &daemon.address))?;
    let until = Instant::now() + Duration::from_secs(60);
    let wanted = (CLIENTS * LEASES_EACH) as f64;
    while daemon.metric("kvstore_local_leases")? < wanted {
        anyhow::ensure!(Instant::now() < until, "only {} leases", daemon.metric("kvstore_local_leases")?);
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(1));
    let slabs = daemon.metric("kvstore_host_mapped_bytes")? + daemon.metric("kvstore_host_ready_bytes")?;
    let beyond = (group.bytes().unwrap_or(f64::NAN) - slabs) / f64::from(1 << 20);
    let killed = Instant::now();
    let daemon_pid = daemon.server.id() as i32;
    let mut others = group.processes();
    others.retain(|process| *process != daemon_pid);
    for process in others.into_iter().filter_map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
    }
    let _ = clients.wait();
    while daemon.metric("kvstore_local_leases")? > 0.0 {
        anyhow::ensure!(killed.elapsed() < Duration::from_secs(30), "leases outlive their clients");
        std::thread::sleep(Duration::from_millis(5));
    }
    let free = killed.elapsed().as_secs_f64();
    drop(daemon);
    std::thread::sleep(Duration::from_millis(200));
    figure::print("local", "500_clients_100_leases_mib_beyond_slabs", beyond, "<= 300");
    figure::print("local", "500_clients_killed_leases_free_s", free, "<= 5");
    Ok(())
}

/// CPU of a daemon with an attached client that asks nothing.
fn idle(daemon: &Daemon) {
    std::thread::sleep(Duration::from_millis(500));
    let before = daemon.server.cpu_seconds();
    std::thread::sleep(Duration::from_secs(5));
    let percent = (daemon.server.cpu_seconds() - before) / 5.0 * 100.0;
    figure::print("local", "idle_cpu_percent", percent, "<= 1");
}

/// Measures the group.
pub fn measure(binary: &Path, rounds: usize) -> anyhow::Result<()> {
    {
        let folder = tempfile::tempdir()?;
        let daemon = Daemon::start(binary, folder.path())?;
        gets(&daemon, rounds)?;
        puts(&daemon, rounds)?;
        looks(&daemon, rounds)?;
        commands(&daemon, rounds)?;
        idle(&daemon);
    }
    many_clients(binary)
}
