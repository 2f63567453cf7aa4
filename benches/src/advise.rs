//! `advise` beside whole simulations of the same trace: how far it is off, what it costs.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use kvstore::serve::{StartOptions, start};
use kvstore::{replay, trace};
use kvstore_tests::memory;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::NamespaceId;
use kvstore_tiers::sampled::SampledAccesses;
use kvstore_tiers::simulate::{SimulatedRequest, simulate};
use kvstore_tiers::{BootTime, SequenceHash};

use crate::figure::{self, median};

/// Sizes at which they are compared, in blocks.
const SIZES: [u64; 6] = [1_000, 3_000, 5_000, 10_000, 20_000, 30_000];

/// Seconds and the most memory, in MiB, of a command from its start to its end.
fn run(command: &mut Command) -> anyhow::Result<(f64, f64)> {
    let started = Instant::now();
    let child = command.stdout(Stdio::null()).spawn()?;
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both are valid for writing, and the child is this process's own and not waited for elsewhere.
    let waited = unsafe { libc::wait4(child.id() as libc::pid_t, &raw mut status, 0, usage.as_mut_ptr()) };
    anyhow::ensure!(waited == child.id() as libc::pid_t && status == 0, "{command:?} failed");
    // SAFETY: wait4 succeeded and wrote it; and all zeros are a rusage, too.
    let usage = unsafe { usage.assume_init() };
    Ok((started.elapsed().as_secs_f64(), usage.ru_maxrss as f64 / 1024.0))
}

/// Measures the group.
pub fn measure(daemon: &Path, path: &Path, rounds: usize) -> anyhow::Result<()> {
    let trace = trace::read(path)?;
    let policy = PolicyKind::default();
    let (mut whole, mut estimates) = (Vec::new(), Vec::new());
    let mut times = Vec::new();
    let mut kept = 0;
    for _ in 0..rounds.min(5) {
        let started = Instant::now();
        whole = SIZES
            .iter()
            .map(|size| {
                let requests = trace.iter();
                let requests = requests.map(|of| SimulatedRequest { at_ms: of.timestamp_ms, blocks: &of.blocks });
                simulate(policy.build(*size as usize), requests, *size as usize).ratio()
            })
            .collect();
        let simulated = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let mut sample = SampledAccesses::new(kvstore::advise::ONE_IN, kvstore::caps::ACCESSES_KEPT_MAX);
        trace.iter().for_each(|request| sample.request(request.timestamp_ms, request.blocks.iter().copied()));
        estimates = sample.curve(policy, &SIZES).iter().map(|point| point.hit_ratio).collect();
        kept = sample.len();
        times.push(started.elapsed().as_secs_f64() / simulated);
    }
    // What `kvstore replay --simulate` computes: the policy, LRU, and the optimum.
    let mut of_replay = Vec::new();
    for _ in 0..rounds.min(5) {
        let started = Instant::now();
        for size in SIZES {
            replay::simulate(&trace, size as usize, policy);
        }
        let whole = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let mut sample = SampledAccesses::new(kvstore::advise::ONE_IN, kvstore::caps::ACCESSES_KEPT_MAX);
        trace.iter().for_each(|request| sample.request(request.timestamp_ms, request.blocks.iter().copied()));
        sample.curve(policy, &SIZES);
        of_replay.push(started.elapsed().as_secs_f64() / whole);
    }
    let mut command = Command::new(daemon);
    let sizes = ["--host-bytes", "5000MiB", "--nvme-bytes", "20000MiB", "--object-bytes", "80000MiB"];
    let (seconds, mib) = run(command.arg("advise").arg(path).args(sizes).arg("--json"))?;
    let mut worst = 0.0f64;
    for ((size, whole), estimate) in SIZES.iter().zip(&whole).zip(&estimates) {
        worst = worst.max((whole - estimate).abs());
        figure::note("advise", &format!("hit_ratio_{size}"), *estimate);
        figure::note("advise", &format!("simulated_hit_ratio_{size}"), *whole);
    }
    figure::print("advise", "worst_difference_at_six_sizes", worst, "<= 0.02");
    figure::print("advise", "time_of_replay_simulate", median(of_replay), "<= 0.05");
    figure::print("advise", "most_memory_mib", mib, "<= 64");
    figure::note("advise", "time_of_simulating_the_policy_alone", median(times));
    figure::note("advise", "seconds_of_the_command_21_sizes", seconds);
    figure::note("advise", "sampled_accesses", kept as f64);
    figure::print("advise", "access_log_of_copying_64KiB_blocks", access_log(&trace, rounds)?, "<= 0.01");
    Ok(())
}

/// What a daemon takes to note every block that the trace asks for, by what it takes to copy those blocks once.
fn access_log(trace: &[trace::TraceRequest], rounds: usize) -> anyhow::Result<f64> {
    const BLOCK: usize = 64 << 10;
    let folder = tempfile::tempdir()?;
    let settings = ["host.bytes=16MiB", "nvme.paths=off", "http.address=off", "log.level=error"];
    let options = StartOptions {
        file: None,
        settings: settings.map(str::to_owned).to_vec(),
        listen: vec![format!("unix:{}", folder.path().join("advise.sock").display())],
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let running = runtime.block_on(start(options))?;
    let layout = memory::layout("advise", BLOCK as u32, 1);
    let layout = running.daemon.host.register_layout(NamespaceId(0), layout)?;
    let of = |id: &u64| SequenceHash::new(&replay::sequence_hash(*id)).map_err(anyhow::Error::from);
    let requests: Vec<Vec<SequenceHash>> =
        trace.iter().map(|request| request.blocks.iter().map(of).collect()).collect::<anyhow::Result<_>>()?;
    let blocks: usize = requests.iter().map(Vec::len).sum();
    let (from, mut to) = (vec![1u8; 256 * BLOCK], vec![0u8; 256 * BLOCK]);
    let mut ratios = Vec::new();
    for round in 0..rounds.min(5) as u64 {
        let started = Instant::now();
        for (at, hashes) in (0..).zip(&requests) {
            // Apart in time: none is taken for the one before.
            running.daemon.accesses.note(&layout, hashes, BootTime((round << 40) + at * 10_000));
        }
        let noted = started.elapsed().as_secs_f64();
        let started = Instant::now();
        for at in 0..blocks {
            let place = at % 256 * BLOCK..(at % 256 + 1) * BLOCK;
            if let (Some(to), Some(from)) = (to.get_mut(place.clone()), from.get(place)) {
                to.copy_from_slice(from);
            }
        }
        std::hint::black_box(&to);
        ratios.push(noted / started.elapsed().as_secs_f64());
    }
    runtime.block_on(running.shut_down());
    Ok(median(ratios))
}
