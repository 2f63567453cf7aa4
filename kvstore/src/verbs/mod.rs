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

use tonic::Status;

use crate::daemon::Daemon;

/// Waits until what was done to the disks' indexes is safe from a crash. Where a disk cannot write it, the call fails, and says
/// `problem`: OK is a promise.
async fn until_synced(daemon: &Daemon, problem: &str) -> Result<(), Status> {
    let Some(nvme) = &daemon.nvme else { return Ok(()) };
    let waiting = nvme.sync();
    let all = async {
        // Without a channel, and where one is dropped, the disks are closed.
        let mut safe = !waiting.is_empty();
        for synced in waiting {
            safe &= synced.await.unwrap_or(false);
        }
        safe
    };
    match tokio::time::timeout(daemon.config().call_deadline, all).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Status::unavailable(problem)),
        Err(_) => {
            Err(Status::deadline_exceeded(format!("the disk did not sync before the call's deadline: {problem}")))
        }
    }
}
