//! The verbs of the daemon, each in its own file.

pub mod collect;
pub mod delete;
pub mod describe;
pub mod get;
pub mod lookup;
pub mod pin;
pub mod prefetch;
pub mod prewarm;
pub mod put;
pub mod register_layout;
pub mod snapshots;
pub mod verify;
pub mod watch;

use std::time::Duration;

use tonic::Status;

/// Waits for a call until its time is over. A call that is dropped then gives back what it took.
pub async fn by_deadline<T>(time: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("the call's deadline passed: try again, with more time");
    tokio::time::timeout(time, call).await.map_err(late)?
}
