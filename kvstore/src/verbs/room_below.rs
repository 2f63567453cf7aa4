//! Room in the tiers below: puts wait while too many blocks wait to be written or uploaded.

use tokio::time::Instant;

use super::put::Target;
use crate::caps;
use crate::daemon::Daemon;

/// True where what is put now may go to the tiers below at once.
pub fn is_there(daemon: &Daemon, target: &Target) -> bool {
    let on_disk = daemon.nvme.as_ref().is_none_or(|nvme| nvme.has_dirty_room());
    on_disk
        && (!target.waits_for_uploads(daemon) || daemon.object.as_ref().is_none_or(|object| object.has_upload_room()))
}

/// Puts wait while too much has yet to be written or uploaded; false where that takes too long.
pub async fn wait_for(daemon: &Daemon, target: &Target) -> bool {
    wait_for_dirty_room(daemon).await && wait_for_upload_room(daemon, target).await
}

async fn wait_for_upload_room(daemon: &Daemon, target: &Target) -> bool {
    let Some(object) = daemon.object.as_ref().filter(|_| target.waits_for_uploads(daemon)) else { return true };
    let until = Instant::now() + caps::DIRTY_WAIT;
    loop {
        let uploaded = object.uploaded();
        tokio::pin!(uploaded);
        uploaded.as_mut().enable();
        if object.has_upload_room() {
            return true;
        }
        // What makes the room may be this call's own blocks.
        object.make_room();
        if tokio::time::timeout_at(until, uploaded).await.is_err() {
            return object.has_upload_room();
        }
    }
}

/// Puts wait while too many blocks have yet to be written; false where that takes too long.
async fn wait_for_dirty_room(daemon: &Daemon) -> bool {
    let Some(nvme) = &daemon.nvme else { return true };
    let until = Instant::now() + caps::DIRTY_WAIT;
    loop {
        let cleaned = nvme.cleaned();
        tokio::pin!(cleaned);
        cleaned.as_mut().enable();
        if nvme.has_dirty_room() {
            return true;
        }
        if tokio::time::timeout_at(until, cleaned).await.is_err() {
            return nvme.has_dirty_room();
        }
    }
}
