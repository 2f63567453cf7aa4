//! `kvstore replay`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use kvstore_tiers::eviction::PolicyKind;

use super::output::{bytes, print_json, print_pairs};
use super::parse_block_bytes;
use crate::replay::{Drive, Report, Simulation, drive, simulate};
use crate::serve::{StartOptions, start};
use crate::trace;

/// Drive a daemon with a trace of LLM requests, or simulate its eviction policy.
#[derive(clap::Args, Debug)]
#[command(after_help = "The trace has one JSON object a line, with `timestamp` (ms) and `hash_ids` (one id per block).
Without --address, a daemon of its own is started in this process. Exit status 1 when a byte was wrong.

Examples:
  kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --verify
  kvstore replay trace.jsonl --block-bytes 1MiB --address unix:/run/kvstore/default.sock --speed 10
  kvstore replay trace.jsonl --simulate --capacity-blocks 5000")]
pub struct Replay {
    /// The trace.
    trace: PathBuf,
    /// Bytes of a block.
    #[arg(long, value_parser = parse_block_bytes, required_unless_present = "simulate", value_name = "SIZE")]
    block_bytes: Option<u32>,
    /// Times real time, or "max": as fast as it goes.
    #[arg(long, default_value = "max", value_parser = parse_speed, value_name = "X")]
    speed: Speed,
    /// Check every byte that comes back.
    #[arg(long)]
    verify: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Drive this daemon. KVSTORE_ADDRESS does not count here: a replay writes thousands of blocks.
    #[arg(long, conflicts_with = "simulate", value_name = "ADDRESS")]
    address: Option<String>,
    /// Memory of the daemon that is started otherwise.
    #[arg(long, conflicts_with_all = ["address", "simulate"], value_name = "SIZE")]
    host_bytes: Option<String>,
    /// Run the policy on metadata alone, beside LRU and Belady's optimum.
    #[arg(long, requires = "capacity_blocks")]
    simulate: bool,
    /// Room for this many blocks.
    #[arg(long, requires = "simulate", value_parser = parse_capacity, value_name = "N")]
    capacity_blocks: Option<usize>,
    /// The eviction policy: hazard or lru.
    #[arg(long, conflicts_with = "address", value_name = "NAME")]
    policy: Option<PolicyKind>,
}

/// How fast.
#[derive(Clone, Copy, Debug)]
enum Speed {
    Times(f64),
    Max,
}

fn parse_capacity(text: &str) -> Result<usize, String> {
    let most = 100_000_000;
    let capacity = text.parse().ok().filter(|capacity| (1..=most).contains(capacity));
    capacity.ok_or_else(|| format!("{text:?} is not a whole number of blocks from 1 to {most}"))
}

fn parse_speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed::Max);
    }
    let times = text.parse::<f64>().ok().filter(|times| times.is_finite() && *times > 0.0);
    times.map(Speed::Times).ok_or_else(|| format!("{text:?} is neither \"max\" nor a number above 0"))
}

impl Replay {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let trace = trace::read(&self.trace)?;
        if let Some(capacity_blocks) = self.capacity_blocks {
            let simulation = simulate(&trace, capacity_blocks, self.policy.unwrap_or_default());
            if self.json {
                print_json(&simulation)?;
            } else {
                print_simulation(&simulation);
            }
            return Ok(ExitCode::SUCCESS);
        }
        let Some(block_bytes) = self.block_bytes else { bail!("--block-bytes is missing") };
        let speed = if let Speed::Times(times) = self.speed { Some(times) } else { None };
        let options = Drive { block_bytes, speed, verify: self.verify };
        let report = match &self.address {
            Some(address) => self.drive(address, &trace, options).await?,
            None => self.drive_embedded(&trace, options).await?,
        };
        if self.json {
            print_json(&report)?;
        } else {
            print_report(&report);
        }
        Ok(if report.wrong_bytes == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn drive_embedded(&self, trace: &[trace::TraceRequest], options: Drive) -> anyhow::Result<Report> {
        let folder = tempfile::tempdir()?;
        let socket = format!("unix:{}", folder.path().join("replay.sock").display());
        let mut settings = vec!["http.address=off".to_owned(), "log.level=warn".to_owned()];
        settings.extend(self.host_bytes.iter().map(|bytes| format!("host.bytes={bytes}")));
        settings.extend(self.policy.map(|policy| format!("host.eviction={}", policy.name())));
        let running = start(StartOptions { file: None, settings, listen: vec![socket.clone()] }).await?;
        if !self.json {
            let config = running.daemon.config();
            eprintln!(
                "a daemon of this process: {} of memory, eviction by {}",
                bytes(config.host.bytes),
                config.eviction.name()
            );
        }
        let report = self.drive(&socket, trace, options).await;
        running.shut_down().await;
        report
    }

    async fn drive(&self, address: &str, trace: &[trace::TraceRequest], options: Drive) -> anyhow::Result<Report> {
        let client = kvstore_client::Client::connect(address).await?;
        let bar = ProgressBar::new(trace.len() as u64);
        bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} requests, {elapsed} of {duration} {msg}")?);
        let report = drive(&client, trace, options, |report| {
            bar.set_position(report.requests as u64);
            if report.requests % 64 == 0 {
                let ratio = 100.0 * report.hits.host as f64 / report.blocks.max(1) as f64;
                bar.set_message(format!("{ratio:.1}% hits, {} wrong bytes", report.wrong_bytes));
            }
        })
        .await?;
        bar.finish_and_clear();
        Ok(report)
    }
}

fn print_simulation(simulation: &Simulation) {
    let room = simulation.optimum_hit_ratio - simulation.lru_hit_ratio;
    let closed = if room > 0.0 { (simulation.hit_ratio - simulation.lru_hit_ratio) / room } else { 0.0 };
    print_pairs(&[
        ("requests", simulation.requests.to_string()),
        ("blocks", simulation.blocks.to_string()),
        ("capacity", format!("{} blocks", simulation.capacity_blocks)),
        (simulation.policy, format!("{:.2}% hits", 100.0 * simulation.hit_ratio)),
        ("lru", format!("{:.2}% hits", 100.0 * simulation.lru_hit_ratio)),
        ("optimum", format!("{:.2}% hits", 100.0 * simulation.optimum_hit_ratio)),
        ("closed", format!("{:.1}% of the distance from LRU to the optimum", 100.0 * closed)),
    ]);
}

fn print_report(report: &Report) {
    let wrong = if report.verified { report.wrong_bytes.to_string() } else { "not checked: see --verify".into() };
    let calls = |gbps: f64, us: &crate::replay::Percentiles| {
        format!("{gbps:.2} GB/s, p50 {:.0} us, p99 {:.0} us a call", us.p50, us.p99)
    };
    print_pairs(&[
        ("requests", report.requests.to_string()),
        ("blocks", report.blocks.to_string()),
        ("hits", format!("{} host, {} nvme: {:.2}%", report.hits.host, report.hits.nvme, 100.0 * report.hit_ratio)),
        ("read", format!("{}, {}", bytes(report.get_bytes), calls(report.get_gbps, &report.get_us))),
        ("stored", format!("{}, {}", bytes(report.put_bytes), calls(report.put_gbps, &report.put_us))),
        ("evicted", format!("{} blocks", report.evicted_blocks)),
        ("busy", format!("{} blocks", report.busy_blocks)),
        ("wrong bytes", wrong),
        ("took", format!("{:.1} s", report.seconds)),
    ]);
}
