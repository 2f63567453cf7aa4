//! What a daemon costs that nobody uses: CPU time, syncs and writes.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use kvstore::replay;
use kvstore_client::Client;
use kvstore_client::v1::BlockKind;
use kvstore_tests::chain;

use crate::figure;
use crate::process::Process;

/// How long is measured.
const MEASURED: Duration = Duration::from_secs(60);
/// What was stored is written and uploaded by then, and the daemon has found out that nothing goes on.
const SETTLES: Duration = Duration::from_secs(10);
const BLOCK: u32 = 1 << 20;
const BLOCKS: u64 = 16;

/// What it had used so far.
struct Used {
    cpu_ns: u64,
    syncs: u64,
    written_bytes: u64,
}

/// Measures a daemon with a disk and a bucket that holds some blocks; its folders are below `folder`.
pub fn measure(daemon: &Path, folder: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    let at = |name: &str| std::path::absolute(folder.path().join(name)).map(|path| path.display().to_string());
    let socket = folder.path().join("idle.sock");
    let address = format!("unix:{}", at("idle.sock")?);
    let mut command = Command::new(daemon);
    command.args(["serve", "--listen", &address, "--set", "http.address=off", "--set", "log.level=error"]);
    let settings = [
        "host.bytes=256MiB".to_owned(),
        format!("nvme.paths={}", at("disk")?),
        "nvme.bytes=1GiB".to_owned(),
        format!("object.url=file://{}", at("bucket")?),
        "object.upload=all".to_owned(),
    ];
    settings.iter().for_each(|setting| _ = command.args(["--set", setting]));
    let process = Process::start(command, &socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (before, after) = runtime.block_on(async {
        {
            let client = Client::connect(&address).await?;
            let group = client.register_layout(replay::layout("idle", BLOCK, BlockKind::Attention)).await?.group(0);
            client.put(&group, chain(0..BLOCKS, BLOCK)).await?;
        }
        tokio::time::sleep(SETTLES).await;
        let before = used(&process, &address).await?;
        tokio::time::sleep(MEASURED).await;
        anyhow::Ok((before, used(&process, &address).await?))
    })?;
    let minutes = MEASURED.as_secs_f64() / 60.0;
    let percent = (after.cpu_ns - before.cpu_ns) as f64 / 1e9 / MEASURED.as_secs_f64() * 100.0;
    figure::print("idle", "cpu_percent", percent, "< 0.1");
    figure::print("idle", "syncs_per_minute", (after.syncs - before.syncs) as f64 / minutes, "= 0");
    let written = after.written_bytes - before.written_bytes;
    figure::print("idle", "written_bytes_per_minute", written as f64 / minutes, "= 0");
    Ok(())
}

/// What it used until now. The connection that asks is gone before it is measured.
async fn used(process: &Process, address: &str) -> anyhow::Result<Used> {
    let status = Client::connect(address).await?.status().await?;
    let syncs = status.nvme.context("no Nvme tier")?.volumes.iter().map(|volume| volume.syncs).sum();
    let proc = format!("/proc/{}", process.id());
    let io = std::fs::read_to_string(format!("{proc}/io"))?;
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("no write_bytes")?;
    // Each thread's time in nanoseconds: the process's counts hundredths of a second.
    let mut cpu_ns = 0;
    for thread in std::fs::read_dir(format!("{proc}/task"))? {
        let spent = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        cpu_ns += spent.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Used { cpu_ns, syncs, written_bytes: written.trim().parse()? })
}
