//! A daemon that nobody uses does next to nothing. On a node that waits for its next job, it must not take time from others.

use std::time::{Duration, Instant};

use kvstore_client::Plane;
use kvstore_tests::{TestDaemon, chain, hashes};

const BLOCK_BYTES: u32 = 16 << 10;

/// How often threads of this process went to sleep so far, each because it had waited for something.
fn sleeps() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let of = |path: std::path::PathBuf| {
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    threads.map(|thread| of(thread.unwrap().path())).sum()
}

/// Its background work ran ten times a second, on two threads, and each listener asked as often whether the daemon was draining:
/// some 60 wake-ups a second, and half a percent of a core on a machine that did nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_sleeps_and_wakes_for_the_next_call() {
    let daemon = TestDaemon::start(&["host.bytes=64MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
    client.put(&group, chain(0..10, BLOCK_BYTES)).await.unwrap();
    // Two seconds until it knows that nothing comes, and more where it gets no turn.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut a_second = f64::MAX;
    for _ in 0..20 {
        let (before, started) = (sleeps(), Instant::now());
        tokio::time::sleep(Duration::from_secs(2)).await;
        a_second = sleeps().saturating_sub(before) as f64 / started.elapsed().as_secs_f64();
        if a_second < 25.0 {
            break;
        }
    }
    assert!(a_second < 25.0, "{a_second} wake-ups a second");
    let pinned = client.pin(&group, &hashes(0..10), 60_000).await.unwrap();
    assert_eq!(pinned.pinned_blocks, 10, "it serves the next call");
}
