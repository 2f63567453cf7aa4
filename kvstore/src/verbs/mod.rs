//! The verbs of the daemon, each in its own file.

pub mod collect;
pub mod delete;
pub mod describe;
pub mod get;
pub mod lookup;
pub mod pin;
pub mod prefetch;
pub mod put;
pub mod register_layout;
mod taken;
pub mod verify;
pub mod watch;

use std::time::Duration;

use tonic::Status;

use crate::daemon::Daemon;

/// Waits until what was done to the disks' indexes is safe from a crash. Where a disk cannot write it, the call fails, and says
/// `problem`: OK is a promise. It waits as long as its caller, who drops it at the call's deadline.
async fn until_synced(daemon: &Daemon, problem: &str) -> Result<(), Status> {
    let Some(nvme) = &daemon.nvme else { return Ok(()) };
    let waiting = nvme.sync();
    // Without a channel, and where one is dropped, the disks are closed.
    let mut safe = !waiting.is_empty();
    for synced in waiting {
        safe &= synced.await.unwrap_or(false);
    }
    if safe { Ok(()) } else { Err(Status::unavailable(problem)) }
}

/// Waits for a call until its time is over. A call that is dropped then gives back what it took.
pub async fn by_deadline<T>(time: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("the call's deadline passed: try again, with more time");
    tokio::time::timeout(time, call).await.map_err(late)?
}
