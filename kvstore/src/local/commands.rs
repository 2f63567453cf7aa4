//! Commands: decodes and checks the commands from a client's ring, and runs them at once or hands them to a task.

use std::sync::Arc;
use std::time::Duration;

use kvstore_plane::{Command, Completion, RecordHead, verbs as call};
use kvstore_proto::v1::{GetStatus, LookupRequest};
use kvstore_tiers::caps::PROMOTIONS_PER_CALL;
use kvstore_tiers::host::{HoldId, LeasedBlock, Leasing, RegisteredLayout};
use kvstore_tiers::slots::Priority;
use kvstore_tiers::stack::{self, Asked, Level, Policy, Window, Wish};
use kvstore_tiers::{BlockRef, SequenceHash};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tonic::Status;

use super::client::{LocalClient, Promoted, Task};
use super::stage::{self, Batch, Piece};
use crate::daemon::{Daemon, InFlight};
use crate::verbs::put::Target;
use crate::verbs::{self, delete, get, lookup, pin, prefetch, register_layout};
use crate::{caps, telemetry, wire};

/// Does what a record asks for. False where the client does not keep to the protocol.
pub fn run(
    daemon: &Arc<Daemon>,
    runtime: &tokio::runtime::Handle,
    client: &Arc<LocalClient>,
    head: RecordHead,
    payload: &[u8],
) -> bool {
    let Ok(command) = Command::decode(head.kind, payload) else { return false };
    telemetry::add(&daemon.traffic.local_commands, 1);
    let tag = head.tag;
    match command {
        Command::Copy { offset, bytes, last, crc32 } => {
            stage::copy(client, tag, Piece { offset, bytes, last, crc32 });
        }
        Command::Abandon => stage::abandon(client, tag),
        Command::Release => drop(client.promoted.lock().remove(&tag)),
        command => match daemon.enter() {
            None => client.fail(tag, &wire::draining()),
            Some(call) => {
                if let Err(status) = start(daemon, runtime, client, tag, command, call) {
                    client.fail(tag, &status);
                }
            }
        },
    }
    true
}

fn start(
    daemon: &Arc<Daemon>,
    runtime: &tokio::runtime::Handle,
    client: &Arc<LocalClient>,
    tag: u64,
    command: Command,
    call: InFlight,
) -> Result<(), Status> {
    match command {
        Command::Stage { layout, group, local, upload, deadline_ms, blocks } => {
            let (layout, group) = known(daemon, client, layout, group)?;
            let level = if local { Level::Local } else { Level::Memory };
            let target = Target { layout, group, wish: Wish { namespace: client.namespace(), level, upload } };
            let expires = Instant::now() + deadline(daemon, deadline_ms);
            let (daemon, runtime) = (Arc::clone(daemon), runtime.clone());
            Batch { daemon, runtime, target, expires, _call: call }.stage(client, tag, &blocks);
        }
        Command::Promote { layout, group, deadline_ms, ticket, hashes } => {
            let (layout, group) = known(daemon, client, layout, group)?;
            if ticket != 0 {
                get::known_ticket(daemon, client.namespace(), HoldId(ticket))?;
            }
            let task = begin_task(client)?;
            let until = Instant::now() + deadline(daemon, deadline_ms);
            let promotion = Promotion { client: Arc::clone(client), tag, hashes, _task: task, _call: call };
            runtime.spawn(promotion.run(Arc::clone(daemon), layout, group, until));
        }
        Command::Hint { layout, group, hashes } => {
            let (layout, group) = known(daemon, client, layout, group)?;
            if let Some(task) = begin_task(client).ok().filter(|_| daemon.stack.has_below()) {
                let deadline = Instant::now() + caps::HINT_TIME;
                let stack = Arc::clone(&daemon.stack);
                let promotion = stack::Promotion { stack, layout, group, priority: Priority::Prefetch, deadline };
                runtime.spawn(async move {
                    let policy = Policy { ahead: promotion.ahead(), ends_outranked: true, ends_full: false };
                    let mut window = Window::new(&promotion, policy, asked(hashes));
                    while let Some(_leased) = window.next().await {}
                    drop((task, call));
                });
            }
        }
        Command::Call { verb, deadline_ms, request } => {
            let later = Later { runtime, client, tag, time: deadline(daemon, deadline_ms), in_flight: call };
            return self::call(daemon, later, verb, &request);
        }
        Command::Copy { .. } | Command::Abandon | Command::Release => {}
    }
    Ok(())
}

fn begin_task(client: &Arc<LocalClient>) -> Result<Task, Status> {
    let busy = || Status::resource_exhausted("too many commands of this client are waiting: try again later");
    client.begin_task().ok_or_else(busy)
}

fn deadline(daemon: &Daemon, deadline_ms: u32) -> Duration {
    match deadline_ms {
        0 => daemon.config().call_deadline,
        asked => Duration::from_millis(u64::from(asked)).min(caps::DEADLINE_MAX),
    }
}

fn known(
    daemon: &Daemon,
    client: &LocalClient,
    layout: u32,
    group: u16,
) -> Result<(Arc<RegisteredLayout>, u16), Status> {
    let unknown = || Status::not_found(format!("layout number {layout} is not registered: call RegisterLayout first"));
    let layout = daemon.host.layout_at(client.namespace(), layout).ok_or_else(unknown)?;
    wire::known_group(&layout, u32::from(group))?;
    Ok((layout, group))
}

fn decode<M: Message + Default>(request: &[u8]) -> Result<M, Status> {
    M::decode(request).map_err(|error| wire::invalid("request", error))
}

/// A call that a task may have to wait for.
struct Later<'a> {
    runtime: &'a tokio::runtime::Handle,
    client: &'a Arc<LocalClient>,
    tag: u64,
    time: Duration,
    in_flight: InFlight,
}

impl Later<'_> {
    /// Has a task wait for the call, and answer it.
    fn spawn<M: Message>(self, call: impl Future<Output = Result<M, Status>> + Send + 'static) -> Result<(), Status> {
        let task = begin_task(self.client)?;
        let (client, tag, time, in_flight) = (Arc::clone(self.client), self.tag, self.time, self.in_flight);
        self.runtime.spawn(async move {
            match verbs::by_deadline(time, call).await {
                Ok(response) => client.complete(tag, &Completion::Response(response.encode_to_vec())),
                Err(status) => client.fail(tag, &status),
            }
            drop((task, in_flight));
        });
        Ok(())
    }
}

/// A call of `kvstore.v1.Blocks`: the verbs that gRPC serves, without it.
fn call(daemon: &Arc<Daemon>, later: Later<'_>, verb: u16, request: &[u8]) -> Result<(), Status> {
    let namespace = later.client.namespace();
    let response = match verb {
        call::REGISTER_LAYOUT => register_layout::register_layout(daemon, namespace, decode(request)?)?.encode_to_vec(),
        call::LOOKUP => {
            let request: LookupRequest = decode(request)?;
            if lookup::may_wait(daemon, &request) {
                let daemon = Arc::clone(daemon);
                return later.spawn(async move { lookup::lookup_patiently(&daemon, namespace, &request).await });
            }
            lookup::lookup(daemon, namespace, &request)?.encode_to_vec()
        }
        call::RELEASE_TICKET => lookup::release_ticket(daemon, namespace, &decode(request)?)?.encode_to_vec(),
        call::PREFETCH => {
            let _runtime = later.runtime.enter();
            prefetch::prefetch(daemon, namespace, &decode(request)?)?.encode_to_vec()
        }
        call::CANCEL_PREFETCH => prefetch::cancel(daemon, namespace, &decode(request)?)?.encode_to_vec(),
        call::UNPIN => pin::unpin(daemon, namespace, &decode(request)?)?.encode_to_vec(),
        call::PIN => {
            let (daemon, request) = (Arc::clone(daemon), decode(request)?);
            return later.spawn(async move { pin::pin(&daemon, namespace, &request).await });
        }
        call::DELETE => {
            let (daemon, request) = (Arc::clone(daemon), decode(request)?);
            return later.spawn(async move { delete::delete(&daemon, namespace, &request).await });
        }
        other => return Err(Status::unimplemented(format!("the local plane has no verb {other}"))),
    };
    later.client.complete(later.tag, &Completion::Response(response));
    Ok(())
}

/// Blocks that are brought into memory for a client.
struct Promotion {
    client: Arc<LocalClient>,
    tag: u64,
    hashes: Vec<SequenceHash>,
    _task: Task,
    _call: InFlight,
}

impl Promotion {
    /// Brings as many of the leading blocks as there is room for, and leases: those that come are kept until the client has leased them.
    async fn run(mut self, daemon: Arc<Daemon>, layout: Arc<RegisteredLayout>, group: u16, deadline: Instant) {
        let hashes = std::mem::take(&mut self.hashes);
        let stack = Arc::clone(&daemon.stack);
        let promotion = stack::Promotion { stack, layout, group, priority: Priority::Demand, deadline };
        promotion.search(&hashes).await;
        if self.client.is_gone() {
            return;
        }
        // A part of what is left: what calls with slow readers have is not this client's to wait for.
        let part = (daemon.leasable.available_permits() / caps::PROMOTABLE_PARTS).max(PROMOTIONS_PER_CALL);
        let most = hashes.len().min(caps::BLOCKS_PER_GET_WINDOW).min(part);
        let Ok(permits) = Arc::clone(&daemon.leasable).try_acquire_many_owned(most as u32) else {
            let problem = "calls hold leases on too many blocks at once: try again later";
            return self.client.fail(self.tag, &Status::resource_exhausted(problem));
        };
        let (mut ready, mut next) = (Vec::with_capacity(most), GetStatus::Hit);
        let policy = Policy { ahead: usize::MAX, ends_outranked: false, ends_full: true };
        let mut window = Window::new(&promotion, policy, asked(hashes.iter().copied().take(most)));
        while let Some((_, hash, leasing)) = window.next().await {
            let block = BlockRef { layout: &promotion.layout, group, hash };
            match leasing {
                Leasing::Leased(block) => ready.push(block),
                Leasing::Miss if daemon.stack.is_held_below(&block) => {
                    next = GetStatus::DataLoss;
                    break;
                }
                other => {
                    next = status_of(&other);
                    break;
                }
            }
            if self.client.is_gone() {
                return;
            }
        }
        if next == GetStatus::Hit && ready.len() < hashes.len() {
            // Those behind come in their turn.
            next = GetStatus::InFlight;
        }
        self.keep(ready, permits, next);
    }

    fn keep(self, ready: Vec<LeasedBlock>, mut permits: OwnedSemaphorePermit, next: GetStatus) {
        let promoted = Completion::Promoted { ready: ready.len() as u32, next: next as u32 };
        if !ready.is_empty() && !self.client.is_gone() {
            let until = Instant::now() + caps::PROMOTED_KEPT;
            if let Some(permits) = permits.split(ready.len()) {
                self.client.promoted.lock().insert(self.tag, Promoted { until, _kept: (ready, permits) });
            }
        }
        self.client.complete(self.tag, &promoted);
    }
}

/// Blocks that are all yet to be brought.
fn asked(hashes: impl IntoIterator<Item = SequenceHash>) -> impl Iterator<Item = Asked> {
    hashes.into_iter().enumerate().map(|(index, hash)| Asked { index, hash, known: None })
}

fn status_of(leasing: &Leasing) -> GetStatus {
    match leasing {
        Leasing::Leased(_) => GetStatus::Hit,
        Leasing::InFlight => GetStatus::InFlight,
        Leasing::Miss => GetStatus::Miss,
    }
}
