//! `kvstore replay`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use kvstore_tiers::eviction::PolicyKind;

use super::output::{bytes, print_json, print_pairs};
use super::{PlaneArg, parse_block_bytes};
use crate::replay::{Drive, Report, Simulation, drive, simulate};
use crate::serve::{StartOptions, start};
use crate::trace;

/// Drive a daemon with a trace of LLM requests, or simulate its eviction policy.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The trace has one JSON object per line, with `timestamp` (ms) and `hash_ids` (one id per block).
Without --address, the command starts a daemon in its own process. The exit status is 1 if any byte was wrong.

With --crash, the daemon runs in a separate process, which is killed with kill -9 halfway and started again.

Examples:
  kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 256MiB --verify
  kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --host-bytes 128MiB --nvme-bytes 2GiB --crash --verify
  kvstore replay trace.jsonl --block-bytes 1MiB --plane grpc
  kvstore replay trace.jsonl --block-bytes 1MiB --address unix:/run/kvstore/default.sock --speed 10
  kvstore replay trace.jsonl --simulate --capacity-blocks 5000"
)]
pub struct Replay {
    /// The trace.
    trace: PathBuf,
    /// The size of a block.
    #[arg(long, value_parser = parse_block_bytes, required_unless_present = "simulate", value_name = "SIZE")]
    block_bytes: Option<u32>,
    /// Replay this many times as fast as real time, or "max" for as fast as possible.
    #[arg(long, default_value = "max", value_parser = parse_speed, value_name = "X")]
    speed: Speed,
    /// Check every byte that comes back.
    #[arg(long)]
    verify: bool,
    /// How blocks are transferred.
    #[arg(long, default_value = "auto", conflicts_with = "simulate", value_name = "PLANE")]
    plane: PlaneArg,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Drive the daemon at this address. KVSTORE_ADDRESS is ignored, because a replay writes thousands of blocks.
    #[arg(long, conflicts_with = "simulate", value_name = "ADDRESS")]
    address: Option<String>,
    /// Memory of the daemon that is started without --address.
    #[arg(long, conflicts_with_all = ["address", "simulate"], value_name = "SIZE")]
    host_bytes: Option<String>,
    /// Disk of the daemon that is started without --address. By default, memory is its only tier.
    #[arg(long, conflicts_with_all = ["address", "simulate"], value_name = "SIZE")]
    nvme_bytes: Option<String>,
    /// The folder for --nvme-bytes. By default, it is a temporary folder.
    #[arg(long, requires = "nvme_bytes", value_name = "FOLDER")]
    nvme_path: Option<PathBuf>,
    /// Kill the daemon with kill -9 halfway through the trace, start it again, and go on.
    #[arg(long, requires = "nvme_bytes")]
    crash: bool,
    /// Simulate the policy on metadata alone, and compare it with LRU and Belady's optimum.
    #[arg(long, requires = "capacity_blocks")]
    simulate: bool,
    /// Simulate room for this many blocks.
    #[arg(long, requires = "simulate", value_parser = parse_capacity, value_name = "N")]
    capacity_blocks: Option<usize>,
    /// The eviction policy: sessions or lru.
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
        if self.crash {
            return self.drive_with_crash(&trace, options).await;
        }
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
        let settings = self.settings(folder.path());
        let running = start(StartOptions { file: None, settings, listen: vec![socket.clone()] }).await?;
        if !self.json {
            let config = running.daemon.config();
            eprintln!(
                "started a daemon in this process, with {} of memory and eviction by {}",
                bytes(config.host.bytes),
                config.eviction.name()
            );
        }
        let report = self.drive(&socket, trace, options).await;
        running.shut_down().await;
        report
    }

    /// Of a daemon that this replay starts; `folder` goes with it.
    fn settings(&self, folder: &std::path::Path) -> Vec<String> {
        let mut settings = vec!["http.address=off".to_owned(), "log.level=warn".to_owned()];
        settings.extend(self.host_bytes.iter().map(|bytes| format!("host.bytes={bytes}")));
        settings.extend(self.policy.map(|policy| format!("host.eviction={}", policy.name())));
        match &self.nvme_bytes {
            None => settings.push("nvme.paths=off".to_owned()),
            Some(bytes) => {
                let path = self.nvme_path.clone().unwrap_or_else(|| folder.join("nvme"));
                let path = std::path::absolute(&path).unwrap_or(path);
                settings.push(format!("nvme.paths={}", path.display()));
                settings.push(format!("nvme.bytes={bytes}"));
            }
        }
        settings
    }

    /// Half of the trace, `kill -9`, the other half. The daemon is this program again, as `serve`.
    async fn drive_with_crash(&self, trace: &[trace::TraceRequest], options: Drive) -> anyhow::Result<ExitCode> {
        let folder = tempfile::tempdir()?;
        let socket = format!("unix:{}", folder.path().join("replay.sock").display());
        let settings = self.settings(folder.path());
        let (before, after) = trace.split_at(trace.len() / 2);
        let (daemon, _) = Served::start(&socket, &settings).await?;
        let before = self.drive(&socket, before, options).await?;
        daemon.kill()?;
        if !self.json {
            eprintln!("killed the daemon with kill -9 in the middle of the trace; starting it again");
        }
        let (daemon, ready) = Served::start(&socket, &settings).await?;
        let after = self.drive(&socket, after, options).await?;
        daemon.kill()?;
        let ready_ms = ready.as_secs_f64() * 1e3;
        if self.json {
            print_json(&serde_json::json!({ "before": before, "after": after, "ready_ms": ready_ms }))?;
        } else {
            println!("before kill -9:");
            print_report(&before);
            println!(
                "\nafter kill -9 (the daemon was ready in {ready_ms:.0} ms, with empty memory and the blocks on disk):"
            );
            print_report(&after);
        }
        let sound = before.wrong_bytes + after.wrong_bytes == 0;
        Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn drive(&self, address: &str, trace: &[trace::TraceRequest], options: Drive) -> anyhow::Result<Report> {
        let client = kvstore_client::Client::connect_over(address, self.plane.into()).await?;
        let bar = ProgressBar::new(trace.len() as u64);
        bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} requests, {elapsed} of {duration} {msg}")?);
        let report = drive(&client, trace, options, |report| {
            bar.set_position(report.requests as u64);
            if report.requests % 64 == 0 {
                let ratio = 100.0 * (report.hits.host + report.hits.nvme + report.hits.object) as f64
                    / report.blocks.max(1) as f64;
                bar.set_message(format!("{ratio:.1}% hits, {} wrong bytes", report.wrong_bytes));
            }
        })
        .await?;
        bar.finish_and_clear();
        Ok(report)
    }
}

/// A daemon in a process of its own, killed at the latest when this value goes.
struct Served(std::process::Child);

impl Served {
    /// Starts it; how long it took until it answered.
    async fn start(socket: &str, settings: &[String]) -> anyhow::Result<(Self, Duration)> {
        let started = Instant::now();
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command
            .args(["serve", "--listen", socket])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null());
        settings.iter().for_each(|setting| _ = command.args(["--set", setting]));
        let mut daemon = Self(command.spawn()?);
        loop {
            if let Ok(client) = kvstore_client::Client::connect(socket).await
                && client.status().await.is_ok()
            {
                return Ok((daemon, started.elapsed()));
            }
            if let Some(status) = daemon.0.try_wait()? {
                bail!("the daemon ended before it answered: {status}");
            }
            if started.elapsed() > Duration::from_secs(60) {
                bail!("the daemon did not answer within a minute");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// SIGKILL, and waits for the end.
    fn kill(mut self) -> anyhow::Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
        (
            "prefill",
            format!(
                "{:.1}% of the time saved, as estimated; with LRU {:.1}%",
                100.0 * simulation.prefill_saved,
                100.0 * simulation.lru_prefill_saved
            ),
        ),
    ]);
}

fn print_report(report: &Report) {
    let wrong = if report.verified { report.wrong_bytes.to_string() } else { "not checked: see --verify".into() };
    let calls = |gbps: f64, us: &crate::replay::Percentiles| {
        format!("{gbps:.2} GB/s, p50 {:.0} us, p99 {:.0} us per call", us.p50, us.p99)
    };
    print_pairs(&[
        ("requests", report.requests.to_string()),
        ("blocks", report.blocks.to_string()),
        (
            "hits",
            format!(
                "{} host, {} nvme, {} object: {:.2}%",
                report.hits.host,
                report.hits.nvme,
                report.hits.object,
                100.0 * report.hit_ratio
            ),
        ),
        ("read", format!("{}, {}", bytes(report.get_bytes), calls(report.get_gbps, &report.get_us))),
        ("stored", format!("{}, {}", bytes(report.put_bytes), calls(report.put_gbps, &report.put_us))),
        ("evicted", format!("{} blocks", report.evicted_blocks)),
        ("busy", format!("{} blocks", report.busy_blocks)),
        ("wrong bytes", wrong),
        ("took", format!("{:.1} s", report.seconds)),
    ]);
}
