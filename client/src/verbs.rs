//! The calls about blocks that carry no block bytes.

use bytes::Bytes;
use kvstore_plane::verbs;
use kvstore_proto::v1::blocks_client::BlocksClient;
use kvstore_proto::v1::{
    CancelPrefetchRequest, DeleteRequest, DeleteResponse, DescribeBlocksRequest, Layout, LookupRequest, LookupResponse,
    PinRequest, PinResponse, PrefetchProgress, PrefetchRequest, RegisterLayoutRequest, ReleaseTicketRequest,
    UnpinRequest, WatchPrefetchRequest,
};
use prost::Message;
use tonic::{Request, Response, Status};

use crate::caps::DESCRIBE_BYTES;
use crate::connection::Connection;
use crate::{Client, Error};

/// The bits of a look-up's residency that name a tier: Device, Host, Nvme, Object.
const RESIDENT_IN_SOME_TIER: u32 = 1 | 2 | 4 | 8;

/// A layout that the daemon knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredLayout {
    /// Names the layout: 32 bytes.
    pub digest: Bytes,
    /// Bytes of a block of each layer group.
    pub block_bytes: Vec<u64>,
    /// The daemon publishes events, and wants to be told the tokens of blocks: [`Client::describe`].
    pub wants_tokens: bool,
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

    /// Makes a call over the rings of the local plane where there is one and its messages fit, else over gRPC.
    async fn call<Q: Message, A: Message + Default>(
        &self,
        verb: u16,
        request: Q,
        grpc: impl AsyncFnOnce(BlocksClient<Connection>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Error> {
        self.within(async {
            if let Some(attachment) = self.attached_for_calls()?
                && let Some(answer) = attachment.verb(verb, &request, self.deadline_ms()).await?
            {
                return Ok(answer);
            }
            Ok(grpc(self.blocks().await?, self.request(request)).await?.into_inner())
        })
        .await
    }

    /// The same for a call that names a layout: a daemon that restarted is told the layout, and asked again.
    async fn call_with_layout<Q: Message + Clone, A: Message + Default>(
        &self,
        verb: u16,
        digest: &Bytes,
        request: Q,
        grpc: impl AsyncFn(BlocksClient<Connection>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Error> {
        match self.call(verb, request.clone(), &grpc).await {
            Err(Error::NotFound(why)) => {
                if !self.register_again(digest).await? {
                    return Err(Error::NotFound(why));
                }
                self.call(verb, request, &grpc).await
            }
            answer => answer,
        }
    }

    /// Registers a layout that this client registered before; false where it did not.
    pub(crate) async fn register_again(&self, digest: &Bytes) -> Result<bool, Error> {
        let Some(layout) = self.shared.layouts.load().get(digest).cloned() else { return Ok(false) };
        self.register_layout(layout).await?;
        Ok(true)
    }

    /// Makes a layout known; the same layout has the same digest everywhere. The client remembers it, and registers it again
    /// with a daemon that restarted.
    pub async fn register_layout(&self, layout: Layout) -> Result<RegisteredLayout, Error> {
        let response = match self.attached().filter(|attachment| !attachment.is_draining()) {
            Some(attachment) => self.within(attachment.register(layout.clone(), self.deadline_ms())).await?,
            None => {
                let request = RegisterLayoutRequest { layout: Some(layout.clone()) };
                self.within(async {
                    Ok(self.blocks().await?.register_layout(self.request(request)).await?.into_inner())
                })
                .await?
            }
        };
        let digest = response.layout_digest.clone();
        self.shared.layouts.rcu(|layouts| {
            let mut layouts = std::collections::HashMap::clone(layouts);
            layouts.insert(digest.clone(), layout.clone());
            layouts
        });
        let (block_bytes, wants_tokens) = (response.block_bytes, response.wants_tokens);
        Ok(RegisteredLayout { digest, block_bytes, wants_tokens })
    }

    /// Tells the tokens of a run of blocks that are stored, or are about to be, for the events that the daemon publishes; `parent` is the block before
    /// them. False where nobody is told. Of use where [`RegisteredLayout::wants_tokens`] says so.
    pub async fn describe(
        &self,
        group: &GroupRef,
        hashes: &[Bytes],
        parent: Option<&Bytes>,
        tokens: &[u32],
        adapter: Option<&str>,
    ) -> Result<bool, Error> {
        // A block's tokens take up to five bytes each, beside its name: those of a long prompt are more than one message may have.
        let each = tokens.len() / hashes.len().max(1);
        let window = (DESCRIBE_BYTES / (40 + 5 * each)).max(1);
        let whole = hashes.len() <= window || tokens.len() != each * hashes.len();
        let window = if whole { hashes.len().max(1) } else { window };
        self.within(async {
            let (mut first, mut taken) = (0, true);
            loop {
                let end = (first + window).min(hashes.len());
                let parent = first.checked_sub(1).and_then(|before| hashes.get(before)).or(parent);
                let request = DescribeBlocksRequest {
                    layout_digest: group.layout_digest.clone(),
                    group: group.group,
                    sequence_hashes: hashes.get(first..end).unwrap_or_default().to_vec(),
                    parent_hash: parent.cloned().unwrap_or_default(),
                    tokens: if whole { tokens } else { tokens.get(first * each..end * each).unwrap_or_default() }
                        .to_vec(),
                    adapter: adapter.unwrap_or_default().to_owned(),
                };
                taken &= self.blocks().await?.describe_blocks(self.request(request)).await?.into_inner().taken;
                first = end;
                if first >= hashes.len() || !taken {
                    return Ok(taken);
                }
            }
        })
        .await
    }

    /// How far a prefix can be used, and where its blocks are.
    pub async fn lookup(&self, request: LookupRequest) -> Result<LookupResponse, Error> {
        let digest = request.layout_digest.clone();
        self.call_with_layout(verbs::LOOKUP, &digest, request, async |mut client, request| client.lookup(request).await)
            .await
    }

    /// How many blocks of a prefix can be read, in one group.
    pub async fn readable_blocks(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<usize, Error> {
        // Where all are in memory, the daemon need not be asked.
        if let Some(resident) = self.resident_now(group, hashes)
            && resident? == hashes.len()
            && !hashes.is_empty()
        {
            return Ok(hashes.len());
        }
        let request = LookupRequest {
            layout_digest: group.layout_digest.clone(),
            groups: vec![group.group],
            sequence_hashes: hashes.to_vec(),
            ..LookupRequest::default()
        };
        Ok(self.lookup(request).await?.readable_blocks as usize)
    }

    /// Which of these blocks can be read, each by itself: holes and all.
    pub async fn contains(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<Vec<bool>, Error> {
        if hashes.is_empty() {
            return Ok(Vec::new());
        }
        // Where all are in memory, the daemon need not be asked.
        if let Some(resident) = self.resident_now(group, hashes)
            && resident? == hashes.len()
        {
            return Ok(vec![true; hashes.len()]);
        }
        let request = LookupRequest {
            layout_digest: group.layout_digest.clone(),
            groups: vec![group.group],
            sequence_hashes: hashes.to_vec(),
            ..LookupRequest::default()
        };
        let residency = self.lookup(request).await?.residency;
        Ok(residency.iter().map(|tiers| tiers & RESIDENT_IN_SOME_TIER != 0).collect())
    }

    /// Ends a look-up's ticket before its time; false when it had ended.
    pub async fn release_ticket(&self, ticket: Bytes) -> Result<bool, Error> {
        let request = ReleaseTicketRequest { ticket };
        let answer = self
            .call(verbs::RELEASE_TICKET, request, async |mut client, request| client.release_ticket(request).await)
            .await?;
        Ok(answer.released)
    }

    /// Starts to bring a prefix into memory; returns a ticket at once. `deadline_ms` 0 means 10 s.
    pub async fn prefetch(&self, group: &GroupRef, hashes: &[Bytes], deadline_ms: u32) -> Result<Bytes, Error> {
        let request = PrefetchRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
            deadline_ms,
        };
        let digest = &group.layout_digest;
        let answer = self
            .call_with_layout(verbs::PREFETCH, digest, request, async |mut client, request| {
                client.prefetch(request).await
            })
            .await?;
        Ok(answer.ticket)
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
        let request = CancelPrefetchRequest { ticket };
        let answer = self
            .call(verbs::CANCEL_PREFETCH, request, async |mut client, request| client.cancel_prefetch(request).await)
            .await?;
        Ok(answer.cancelled)
    }

    /// Keeps the leading readable run of a prefix from being evicted for `ttl_ms`.
    pub async fn pin(&self, group: &GroupRef, hashes: &[Bytes], ttl_ms: u64) -> Result<PinResponse, Error> {
        let request = PinRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
            ttl_ms,
        };
        let digest = &group.layout_digest;
        self.call_with_layout(verbs::PIN, digest, request, async |mut client, request| client.pin(request).await).await
    }

    /// Ends a pin before its time; false when it had ended.
    pub async fn unpin(&self, pin: Bytes) -> Result<bool, Error> {
        let request = UnpinRequest { pin };
        let answer = self.call(verbs::UNPIN, request, async |mut client, request| client.unpin(request).await).await?;
        Ok(answer.unpinned)
    }

    /// Makes blocks unreadable at once; pinned ones stay.
    pub async fn delete(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<DeleteResponse, Error> {
        let request = DeleteRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.to_vec(),
        };
        let digest = &group.layout_digest;
        self.call_with_layout(verbs::DELETE, digest, request, async |mut client, request| client.delete(request).await)
            .await
    }
}
