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
pub mod verify;
pub mod watch;

use tonic::Status;

use crate::daemon::Daemon;

/// Waits until what was done to the disks' indexes is safe from a crash. A disk that cannot sync is out of service,
/// and says so in the status; the call goes on.
async fn until_synced(daemon: &Daemon) -> Result<(), Status> {
    let Some(nvme) = &daemon.nvme else { return Ok(()) };
    let all = async {
        for synced in nvme.sync() {
            // Refused or closed: nothing to wait for.
            let _ = synced.await;
        }
    };
    let late = |_| Status::deadline_exceeded("the disk did not sync before the call's deadline");
    tokio::time::timeout(daemon.config().call_deadline, all).await.map_err(late)
}
