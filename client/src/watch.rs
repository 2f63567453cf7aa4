//! Following what the blocks of a daemon do. A watch goes on by itself: what breaks it is told, and it starts again.

use std::time::Duration;

use kvstore_proto::v1::events_client::EventsClient;
use kvstore_proto::v1::watch_response::Part;
use kvstore_proto::v1::{WatchChanges, WatchLayout, WatchRates, WatchRequest, WatchResponse, WatchSnapshot};
use tonic::Streaming;

use crate::{Client, Error};

/// A watch that ended is begun again after this long ...
const AGAIN_FIRST: Duration = Duration::from_millis(100);
/// ... and twice as long each time, up to this.
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// What a watch tells.
#[derive(Clone, Debug, PartialEq)]
pub enum WatchEvent {
    /// Forget what is known of this daemon: layouts and a snapshot follow.
    Reset,
    /// A watch that was cut off goes on where it ended: what is known is true again, once the next changes came.
    Resumed,
    /// A layout, and what names its blocks.
    Layout(WatchLayout),
    /// Blocks that are readable.
    Snapshot(WatchSnapshot),
    /// The snapshot is whole, once all changes before this number came.
    SnapshotEnd(u64),
    /// Blocks came and left.
    Changes(WatchChanges),
    /// How fast the tiers are read.
    Rates(WatchRates),
    /// The watch was cut off, and is begun again. What is known is old until the next event.
    Lost(Error),
}

/// See [`Client::watch`].
pub struct Watch {
    client: Client,
    log: u64,
    next: u64,
    stream: Option<Streaming<WatchResponse>>,
    pause: Duration,
    failed: bool,
}

impl Client {
    /// Follows what becomes readable in the daemon's tiers, and what leaves them; see the service `Events` in `events.proto`. Connects
    /// with the first [`Watch::next`].
    pub fn watch(&self) -> Watch {
        self.watch_from((0, 0))
    }

    /// The same, from where an earlier watch of the daemon stood ([`Watch::position`]): for a follower that kept what it knew. Begins with
    /// [`WatchEvent::Reset`] where the daemon can't go on from there.
    pub fn watch_from(&self, (log, next): (u64, u64)) -> Watch {
        Watch { client: self.clone(), log, next, stream: None, pause: AGAIN_FIRST, failed: false }
    }

    async fn start_watch(&self, log: u64, next: u64) -> Result<Streaming<WatchResponse>, Error> {
        self.within(async {
            let mut events = EventsClient::with_origin(self.connection().await?, self.origin());
            Ok(events.watch(WatchRequest { log, next }).await?.into_inner())
        })
        .await
    }
}

impl Watch {
    /// The next event. Never ends; waits while the daemon is away. Dropping the future loses nothing.
    pub async fn next(&mut self) -> WatchEvent {
        loop {
            if self.stream.is_none() {
                if self.failed {
                    tokio::time::sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(AGAIN_MAX);
                    self.failed = false;
                }
                match self.client.start_watch(self.log, self.next).await {
                    Ok(stream) => self.stream = Some(stream),
                    Err(error) => return self.lost(error),
                }
            }
            let Some(stream) = &mut self.stream else { continue };
            match stream.message().await {
                Ok(Some(WatchResponse { part: Some(part) })) => return self.take(part),
                // Sent by a newer daemon.
                Ok(Some(WatchResponse { part: None })) => {}
                Ok(None) => return self.lost(Error::Unavailable("the daemon ended the watch".into())),
                Err(status) => return self.lost(status.into()),
            }
        }
    }

    /// Where it stands: the daemon's log, and the number of the next change. Of use once a snapshot is whole.
    pub fn position(&self) -> (u64, u64) {
        (self.log, self.next)
    }

    fn lost(&mut self, error: Error) -> WatchEvent {
        self.stream = None;
        self.failed = true;
        WatchEvent::Lost(error)
    }

    fn take(&mut self, part: Part) -> WatchEvent {
        self.pause = AGAIN_FIRST;
        match part {
            Part::Start(start) => {
                (self.log, self.next) = (start.log, start.next);
                if start.snapshot { WatchEvent::Reset } else { WatchEvent::Resumed }
            }
            Part::Changes(changes) if changes.first == self.next => {
                self.next = changes.next;
                WatchEvent::Changes(changes)
            }
            Part::Changes(changes) => {
                let gap = format!(
                    "changes {} to {} are missing, so the watch starts again from a snapshot",
                    self.next, changes.first
                );
                (self.log, self.next) = (0, 0);
                self.lost(Error::Other(gap))
            }
            Part::Layout(layout) => WatchEvent::Layout(layout),
            Part::Snapshot(snapshot) => WatchEvent::Snapshot(snapshot),
            Part::SnapshotEnd(end) => WatchEvent::SnapshotEnd(end.next),
            Part::Rates(rates) => WatchEvent::Rates(rates),
        }
    }
}
