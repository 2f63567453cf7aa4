//! The lock of the Host tier: how long others wait for it at most while large holds come, go and expire, and what that does to puts.
//!
//! Measured from outside: one thread takes a cheap call under the lock again and again, and keeps its longest wait. The scheduler is
//! in that, too: a thread that holds the lock may lose its core. How long a thread that takes no lock is kept from running at most,
//! in the same run, is beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_tests::memory;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::{
    BeginFill, FillRequest, HoldId, HoldKind, HostLimits, HostOptions, HostTier, NamespaceId, NamespaceLimits,
    PoolStatus, RegisteredLayout,
};
use kvstore_tiers::slots::{FlightSource, Priority, Urgency};
use kvstore_tiers::{BootTime, HugePages, SequenceHash};

use crate::figure::{self, median};

const BLOCK_BYTES: u32 = 4096;
const NAMESPACES: usize = 16;
/// Of all namespaces together. The first has more than the others: a hold is of one namespace.
const SLABS: usize = 1024;
const SLABS_OF_FIRST: usize = 139;
const SLAB_BYTES: u64 = 4 << 20;
/// The most that one call may name.
const HELD: usize = 65_536;
/// Of one round of one measurement.
const ROUND: Duration = Duration::from_millis(400);
const PUTS: usize = 20_000;

fn hash(namespace: usize, at: u64) -> SequenceHash {
    let bytes = replay::sequence_hash((namespace as u64) << 40 | at);
    SequenceHash::new(&bytes).unwrap_or_else(|_| unreachable!("32 bytes are a hash"))
}

/// Each namespace has its part, so that none takes from another.
fn slabs_of(namespace: usize) -> u64 {
    (if namespace == 0 { SLABS_OF_FIRST } else { (SLABS - SLABS_OF_FIRST) / (NAMESPACES - 1) }) as u64
}

/// A full tier.
struct Tier {
    host: Arc<HostTier>,
    layouts: Vec<Arc<RegisteredLayout>>,
    held: Vec<SequenceHash>,
    /// Blocks that were put, by namespace.
    put: Vec<AtomicU64>,
    content: Vec<u8>,
    now: AtomicU64,
}

impl Tier {
    fn new() -> anyhow::Result<Self> {
        let limits = HostLimits { bytes: 32 * SLAB_BYTES, high_watermark_percent: 99, low_watermark_percent: 98 };
        let options = HostOptions {
            limits,
            huge_pages: HugePages::Off,
            policy: PolicyKind::Sessions,
            seed: 1,
            epoch: 1,
            bytes_ceiling: SLABS as u64 * SLAB_BYTES,
        };
        let names: Vec<String> = (0..NAMESPACES).map(|at| format!("n{at}")).collect();
        let host = HostTier::new(options, &names);
        // Slabs have the size that suits the first bound.
        host.set_limits(HostLimits { bytes: SLABS as u64 * SLAB_BYTES, ..limits });
        let bound = |at: usize| Some(slabs_of(at) * SLAB_BYTES);
        host.set_namespace_limits(
            (0..NAMESPACES).map(|at| NamespaceLimits { bytes: bound(at), ..NamespaceLimits::default() }),
        );
        let layout = memory::layout("locks", BLOCK_BYTES, 1);
        let register = |at: usize| host.register_layout(NamespaceId(at), layout.clone());
        let layouts = (0..NAMESPACES).map(register).collect::<Result<Vec<_>, _>>()?;
        let held = (0..HELD as u64).map(|at| hash(0, at)).collect();
        let put = (0..NAMESPACES).map(|_| AtomicU64::new(0)).collect();
        let (content, now) = (vec![7; BLOCK_BYTES as usize], AtomicU64::new(1));
        let tier = Self { host, layouts, held, put, content, now };
        tier.fill()?;
        Ok(tier)
    }

    fn fill(&self) -> anyhow::Result<()> {
        for namespace in 0..NAMESPACES {
            self.put_one(namespace)?;
            let of_one = |pool: &PoolStatus| pool.slots / pool.slabs.max(1);
            let slots = self.host.status().pools.get(namespace).map_or(0, of_one) * slabs_of(namespace);
            // The first stays below the high watermark: what is held now and then must not be evicted in between.
            let blocks = if namespace == 0 { slots * 97 / 100 } else { slots };
            for _ in 1..blocks {
                self.put_one(namespace)?;
            }
            let used = self.host.status().pools.get(namespace).map_or(0, |pool| pool.used);
            anyhow::ensure!(used == blocks, "namespace {namespace} has {used} of {blocks} blocks");
        }
        Ok(())
    }

    fn now(&self) -> BootTime {
        BootTime(self.now.load(Ordering::Relaxed))
    }

    fn put_one(&self, namespace: usize) -> anyhow::Result<()> {
        let at = self.put.get(namespace).map_or(0, |put| put.fetch_add(1, Ordering::Relaxed));
        let Some(layout) = self.layouts.get(namespace) else { anyhow::bail!("no namespace {namespace}") };
        let deadline = BootTime(u64::MAX);
        let urgency = Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline };
        let length = BLOCK_BYTES;
        let request = FillRequest { layout, group: 0, hash: hash(namespace, at), parent: None, length, urgency };
        loop {
            match self.host.begin_fill(&request, self.now()) {
                BeginFill::Fill(mut fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.host.drop_plan(plan));
                    fill.append(&self.content, self.now())?;
                    fill.commit(true);
                    return Ok(());
                }
                BeginFill::NeedsSlab(plan) => self.host.make_slab(plan)?,
                BeginFill::Wait => std::thread::yield_now(),
                _ => anyhow::bail!("block {at} of namespace {namespace} was not put"),
            }
        }
    }

    /// Holds come and go: half of them are ended by name, half by the tick that follows their time.
    fn hold_until(&self, stop: &AtomicBool) -> anyhow::Result<Vec<f64>> {
        let Some(layout) = self.layouts.first() else { return Ok(Vec::new()) };
        let runs = [(&**layout, 0, self.held.as_slice())];
        let mut times = Vec::new();
        for round in 0u128.. {
            let now = BootTime(self.now.fetch_add(2, Ordering::Relaxed));
            let started = Instant::now();
            let hold = |id: u128| self.host.hold(NamespaceId(0), HoldId(id), HoldKind::Pin, &runs, now.plus_ms(1));
            let held = hold(2 * round)?;
            times.push(started.elapsed().as_secs_f64() * 1e6);
            anyhow::ensure!(held.blocks == HELD, "{} blocks were held", held.blocks);
            hold(2 * round + 1)?;
            self.host.release_hold(NamespaceId(0), HoldId(2 * round), HoldKind::Pin);
            self.host.tick(now.plus_ms(2));
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(times)
    }

    /// Microseconds that each of many cheap calls took.
    fn probe(&self) -> Vec<f64> {
        let (until, mut waits) = (Instant::now() + ROUND, Vec::with_capacity(8 << 20));
        let mut before = Instant::now();
        while before < until {
            std::hint::black_box(self.host.limits());
            let after = Instant::now();
            waits.push((after - before).as_secs_f64() * 1e6);
            before = after;
        }
        waits
    }

    /// Microseconds that passed at most between two looks at the clock, while another thread works, too.
    fn longest_gap() -> f64 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let (until, mut longest) = (Instant::now() + ROUND, Duration::ZERO);
            let mut before = Instant::now();
            while before < until {
                let after = Instant::now();
                longest = longest.max(after - before);
                before = after;
            }
            stop.store(true, Ordering::Relaxed);
            longest.as_secs_f64() * 1e6
        })
    }

    /// Microseconds that each of many puts took: of new blocks, which push out old ones.
    fn puts(&self) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::with_capacity(PUTS);
        for at in 0..PUTS {
            let started = Instant::now();
            self.put_one(1 + at % (NAMESPACES - 1))?;
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    }

    /// `work`, while holds come and go on another thread.
    fn beside_holds<T>(&self, work: impl FnOnce() -> T) -> anyhow::Result<(T, Vec<f64>)> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let holds = scope.spawn(|| self.hold_until(&stop));
            let done = work();
            stop.store(true, Ordering::Relaxed);
            let times = holds.join().map_err(|_| anyhow::anyhow!("the holds ended badly"))??;
            Ok((done, times))
        })
    }
}

/// The value below which the given part of all is.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * part) as usize;
    values.get(at.min(values.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Measures the group.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    let tier = Tier::new()?;
    let status = tier.host.status();
    let slabs: u64 = status.pools.iter().map(|pool| pool.slabs).sum();
    eprintln!("{} blocks in {slabs} slabs of {} namespaces", status.blocks, status.pools.len());
    let (mut longest, mut gaps, mut rare, mut holds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut beside, mut alone, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (mut waits, times) = tier.beside_holds(|| tier.probe())?;
        let gap = Tier::longest_gap();
        let mut without = tier.puts()?;
        let (with, _) = tier.beside_holds(|| tier.puts())?;
        let (without, with) = (quantile(&mut without, 0.99), quantile(&mut with?, 0.99));
        // The first round warms up.
        if round > 0 {
            rare.push(quantile(&mut waits, 0.999));
            longest.push(waits.last().copied().unwrap_or(f64::NAN));
            gaps.push(gap);
            holds.push(median(times));
            beside.push(with);
            alone.push(without);
            ratios.push(with / without);
        }
    }
    figure::print("locks", "longest_wait_us", median(longest), "<= 1000");
    figure::note("locks", "longest_gap_us", median(gaps));
    figure::note("locks", "wait_p999_us", median(rare));
    figure::note("locks", "hold_65536_us", median(holds));
    figure::print("locks", "put_p99_of_idle", median(ratios), "<= 1.5");
    figure::note("locks", "put_p99_us", median(beside));
    figure::note("locks", "put_p99_idle_us", median(alone));
    Ok(())
}
