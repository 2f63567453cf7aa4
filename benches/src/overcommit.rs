//! A trace at four times what memory and disk hold, with a bucket below: what is still found, and what is written to disk.

use std::path::Path;

use kvstore::replay::{Drive, drive};
use kvstore::serve::{StartOptions, start};
use kvstore::trace;
use kvstore_client::Client;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::simulate::{SimulatedRequest, simulate};

use crate::figure;

const BLOCK: u64 = 16 << 10;

struct Run {
    hit_ratio: f64,
    admitted_bytes: u64,
    wrong_bytes: u64,
}

/// Measures; the folders of disk and bucket are below `folder`.
pub fn measure(folder: &Path, path: &Path) -> anyhow::Result<()> {
    let trace = trace::read(path)?;
    let blocks: std::collections::HashSet<u64> =
        trace.iter().flat_map(|request| request.blocks.iter().copied()).collect();
    let requests = trace.iter();
    let requests = requests.map(|of| SimulatedRequest { at_ms: of.timestamp_ms, blocks: &of.blocks });
    let unbounded = simulate(PolicyKind::Lru.build(blocks.len()), requests, blocks.len()).ratio();
    // A quarter of all that is asked for, an eighth of that in memory.
    let whole = blocks.len() as u64 * BLOCK;
    let (host, nvme) = (whole / 4 / 8, whole / 4 * 7 / 8);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let run = |admit: &str| {
        let folder = tempfile::tempdir_in(folder)?;
        let socket = format!("unix:{}", folder.path().join("overcommit.sock").display());
        let settings = vec![
            format!("host.bytes={host}"),
            format!("nvme.paths={}", folder.path().join("disk").display()),
            format!("nvme.bytes={nvme}"),
            format!("nvme.admit={admit}"),
            format!("object.url=file://{}", folder.path().join("bucket").display()),
            "object.upload=all".into(),
            "http.address=off".into(),
            "log.level=error".into(),
        ];
        runtime.block_on(async {
            let running = start(StartOptions { file: None, settings, listen: vec![socket.clone()] }).await?;
            let client = Client::connect(&socket).await?;
            let options = Drive { block_bytes: BLOCK as u32, speed: None, verify: true };
            let report = drive(&client, &trace, options, |_| {}).await?;
            let status = client.status().await?;
            let nvme = status.nvme.unwrap_or_default();
            let admitted_bytes = nvme.volumes.iter().map(|volume| volume.admitted_bytes).sum();
            eprintln!(
                "{admit}: {:?} of {}, busy {}, {:?}",
                report.hits, report.blocks, report.busy_blocks, status.object
            );
            running.shut_down().await;
            anyhow::Ok(Run { hit_ratio: report.hit_ratio, admitted_bytes, wrong_bytes: report.wrong_bytes })
        })
    };
    let through = run("all")?;
    let reused = run("reused")?;
    let written = reused.admitted_bytes as f64 / through.admitted_bytes.max(1) as f64;
    figure::note("object", "overcommit_hit_ratio_without_bounds", unbounded);
    figure::note("object", "overcommit_hit_ratio", reused.hit_ratio);
    figure::print("object", "overcommit_below_unbounded", unbounded - reused.hit_ratio, "<= 0.01");
    figure::note("object", "overcommit_write_through_hit_ratio", through.hit_ratio);
    figure::print("object", "overcommit_disk_writes_of_write_through", written, "<= 0.6");
    figure::print("object", "overcommit_wrong_bytes", (reused.wrong_bytes + through.wrong_bytes) as f64, "= 0");
    Ok(())
}
