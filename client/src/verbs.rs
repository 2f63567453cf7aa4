//! The calls about blocks that carry no block bytes.

use bytes::Bytes;
use kvstore_proto::v1::blocks_client::BlocksClient;
use kvstore_proto::v1::{
    CancelPrefetchRequest, DeleteRequest, DeleteResponse, Layout, LookupRequest, LookupResponse, PinRequest,
    PinResponse, PrefetchProgress, PrefetchRequest, RegisterLayoutRequest, ReleaseTicketRequest, UnpinRequest,
    WatchPrefetchRequest,
};
use tonic::Request;

use crate::connection::Connection;
use crate::{Client, Error};

/// A layout that the daemon knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredLayout {
    /// Names the layout: 32 bytes.
    pub digest: Bytes,
    /// Bytes of a block of each layer group.
    pub block_bytes: Vec<u64>,
}

impl RegisteredLayout {
    /// One of its layer groups.
    pub fn group(&self, group: u32) -> GroupRef {
        GroupRef { layout_digest: self.digest.clone(), group }
    }
}

/// A layer group of a layout: where blocks are put and got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRef {
    /// The layout.
    pub layout_digest: Bytes,
    /// The group's number in it.
    pub group: u32,
}

impl Client {
    async fn blocks(&self) -> Result<BlocksClient<Connection>, Error> {
        let client = BlocksClient::with_origin(self.connection().await?, self.origin());
        Ok(client.max_decoding_message_size(16 << 20).max_encoding_message_size(16 << 20))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline());
        request
    }

    /// Makes a layout known; the same layout has the same digest everywhere.
    pub async fn register_layout(&self, layout: Layout) -> Result<RegisteredLayout, Error> {
        self.within(async {
            let request = self.request(RegisterLayoutRequest { layout: Some(layout) });
            let response = self.blocks().await?.register_layout(request).await?.into_inner();
            Ok(RegisteredLayout { digest: response.layout_digest, block_bytes: response.block_bytes })
        })
        .await
    }

    /// How far a prefix can be used, and where its blocks are.
    pub async fn lookup(&self, request: LookupRequest) -> Result<LookupResponse, Error> {
        self.within(async { Ok(self.blocks().await?.lookup(self.request(request)).await?.into_inner()) }).await
    }

    /// How many blocks of a prefix can be read, in one group.
    pub async fn readable_blocks(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<usize, Error> {
        let request = LookupRequest {
            layout_digest: group.layout_digest.clone(),
            groups: vec![group.group],
            sequence_hashes: hashes.to_vec(),
            ..LookupRequest::default()
        };
        Ok(self.lookup(request).await?.readable_blocks as usize)
    }

    /// Ends a look-up's ticket before its time; false when it had ended.
    pub async fn release_ticket(&self, ticket: Bytes) -> Result<bool, Error> {
        let request = self.request(ReleaseTicketRequest { ticket });
        self.within(async { Ok(self.blocks().await?.release_ticket(request).await?.into_inner().released) }).await
    }

    /// Starts to bring a prefix into memory; returns a ticket at once. `deadline_ms` 0 means 10 s.
    pub async fn prefetch(&self, group: &GroupRef, hashes: &[Bytes], deadline_ms: u32) -> Result<Bytes, Error> {
        let request = self.request(PrefetchRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
            deadline_ms,
        });
        self.within(async { Ok(self.blocks().await?.prefetch(request).await?.into_inner().ticket) }).await
    }

    /// Follows a prefetch until it ends; `report` sees each step. The last step.
    pub async fn watch_prefetch(
        &self,
        ticket: Bytes,
        mut report: impl FnMut(&PrefetchProgress),
    ) -> Result<PrefetchProgress, Error> {
        let request = self.request(WatchPrefetchRequest { ticket });
        self.within(async {
            let mut steps = self.blocks().await?.watch_prefetch(request).await?.into_inner();
            let mut last = PrefetchProgress::default();
            while let Some(step) = steps.message().await? {
                report(&step);
                last = step;
            }
            Ok(last)
        })
        .await
    }

    /// Cancels a prefetch; false when it had ended.
    pub async fn cancel_prefetch(&self, ticket: Bytes) -> Result<bool, Error> {
        let request = self.request(CancelPrefetchRequest { ticket });
        self.within(async { Ok(self.blocks().await?.cancel_prefetch(request).await?.into_inner().cancelled) }).await
    }

    /// Keeps the leading readable run of a prefix from being evicted for `ttl_ms`.
    pub async fn pin(&self, group: &GroupRef, hashes: &[Bytes], ttl_ms: u64) -> Result<PinResponse, Error> {
        let request = self.request(PinRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
            ttl_ms,
        });
        self.within(async { Ok(self.blocks().await?.pin(request).await?.into_inner()) }).await
    }

    /// Ends a pin before its time; false when it had ended.
    pub async fn unpin(&self, pin: Bytes) -> Result<bool, Error> {
        let request = self.request(UnpinRequest { pin });
        self.within(async { Ok(self.blocks().await?.unpin(request).await?.into_inner().unpinned) }).await
    }

    /// Makes blocks unreadable at once; pinned ones stay.
    pub async fn delete(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<DeleteResponse, Error> {
        let request = self.request(DeleteRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
        });
        self.within(async { Ok(self.blocks().await?.delete(request).await?.into_inner()) }).await
    }
}
