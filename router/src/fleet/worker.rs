//! A worker: an engine that serves requests over HTTP, and says what it has in its memory.

use std::sync::Arc;

use arc_swap::ArcSwap;
use kvstore_chat::engine::Engine;
use kvstore_proto::zmtp::Endpoint;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::AbortHandle;

use super::Node;
use crate::caps;
use crate::events::subscriber::{Following, Source, Subscriber};
use crate::events::vllm::GroupKind;
use crate::events::{EngineView, Naming};
use crate::index::PrefixIndex;

/// What a worker is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whole requests.
    #[default]
    Both,
    /// Prompts, for others to go on with.
    Prefill,
    /// What comes after a prompt that another computed.
    Decode,
    /// Images and other inputs, before a prompt.
    Encode,
}

/// A worker, as it is configured, registered or discovered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSpec {
    /// Its name: any text, its own.
    pub id: String,
    /// Where it serves: `http://host:port`.
    pub url: String,
    /// The model that it serves, as requests name it.
    pub model: String,
    /// What it is for.
    #[serde(default)]
    pub role: Role,
    /// The store's daemon on its node, as clients name it; none without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Where it publishes KV events (`tcp://host:5557`, `ipc:///path`); none: only what its node says is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<String>,
    /// Where it replays them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<String>,
    /// The topic of its events; empty: any.
    #[serde(default)]
    pub topic: String,
    /// Its data-parallel ranks.
    #[serde(default = "one")]
    pub ranks: u16,
    /// The first of them: that of the endpoints above.
    #[serde(default)]
    pub first_rank: u16,
    /// Tokens of its blocks; 0: as its events say.
    #[serde(default)]
    pub block_tokens: u32,
    /// Whose prompts it makes; none: as it says itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
}

fn one() -> u16 {
    1
}

impl WorkerSpec {
    /// A worker of which nothing is known but where it serves which model.
    pub fn new(id: &str, url: &str, model: &str) -> Self {
        Self {
            id: id.to_owned(),
            url: url.to_owned(),
            model: model.to_owned(),
            role: Role::Both,
            node: None,
            events: None,
            replay: None,
            topic: String::new(),
            ranks: 1,
            first_rank: 0,
            block_tokens: 0,
            engine: None,
        }
    }

    fn check_url(&self) -> Result<(), String> {
        let (id, text) = (&self.id, &self.url);
        let url =
            text.parse::<http::Uri>().map_err(|error| format!("worker {id:?}: url {text:?} is not valid: {error}"))?;
        if url.scheme_str() != Some("http") || url.host().is_none() {
            return Err(format!("worker {id:?}: url {text:?} is not an HTTP URL; use http://host:port"));
        }
        let authority = url.authority().map_or("", http::uri::Authority::as_str);
        if url.port_u16().is_none() && authority.rsplit(']').next().is_some_and(|rest| rest.contains(':')) {
            return Err(format!(
                "worker {id:?}: url {text:?} has no valid port; use http://host:port, with a port up to 65535"
            ));
        }
        if url.path().trim_end_matches('/').ends_with("/v1") {
            return Err(format!("worker {id:?}: url {text:?} ends with /v1; leave that out: requests bring it"));
        }
        Ok(())
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        let id = &self.id;
        // Some are known for their blocks alone.
        if !self.url.is_empty() {
            self.check_url()?;
        }
        if id.is_empty() || self.model.is_empty() {
            return Err(format!("worker {id:?}: id and model must not be empty"));
        }
        if self.ranks == 0 || self.ranks > 1024 || self.first_rank > 1024 {
            return Err(format!(
                "worker {id:?}: ranks is {} and first_rank is {}; ranks must be 1 to 1024, first_rank 0 to 1024",
                self.ranks, self.first_rank
            ));
        }
        for endpoint in self.events.iter().chain(&self.replay) {
            endpoint.parse::<Endpoint>().map_err(|error| format!("worker {id:?}: {error}"))?;
        }
        Ok(())
    }
}

/// See the head of this file. Its events are followed until it is dropped.
pub struct Worker {
    /// What it is.
    pub spec: WorkerSpec,
    /// Its engine's number in this router's life, for counting what it does: workers at one URL are one engine.
    pub number: usize,
    /// Its node's daemon.
    pub node: Option<Arc<Node>>,
    /// What its engine has.
    pub view: Arc<EngineView>,
    health: Mutex<Health>,
    served: ArcSwap<Vec<Served>>,
    following: Vec<Arc<Following>>,
    tasks: Vec<AbortHandle>,
}

/// A model that a worker says that it serves.
#[derive(Clone, PartialEq, Debug)]
pub struct Served {
    /// As requests name it.
    pub id: String,
    /// The base model, where it is an adapter (LoRA).
    pub parent: Option<String>,
    /// Tokens of its context.
    pub tokens_max: Option<u64>,
    /// All that the worker says of it.
    pub entry: Value,
}

/// What a worker says under `/v1/models`; none where it is something else.
pub fn read_served(answer: &[u8]) -> Option<Vec<Served>> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let served = |entry: &Value| {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        let tokens_max = entry.get("max_model_len").and_then(Value::as_u64);
        Some(Served { id: text("id")?, parent: text("parent"), tokens_max, entry: entry.clone() })
    };
    let all = answer.get("data")?.as_array()?;
    Some(all.iter().take(caps::MODELS_PER_WORKER_MAX).filter_map(served).collect())
}

/// Why a worker is thought to be away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// Nobody listens there, or it says itself that it does not work.
    Gone,
    /// It did not answer, or hung up: once may be chance.
    Doubt,
}

#[derive(Default)]
struct Health {
    away: bool,
    doubts: u32,
    /// Why it did not answer last.
    why: String,
}

impl Worker {
    pub(super) fn follow(
        spec: WorkerSpec,
        number: usize,
        node: Option<Arc<Node>>,
        index: Arc<PrefixIndex>,
        naming: Naming,
    ) -> Arc<Self> {
        let view = Arc::new(EngineView::new(index, naming));
        let (mut tasks, mut following) = (Vec::new(), Vec::new());
        let endpoint = |text: &Option<String>| text.as_deref().and_then(|text| text.parse::<Endpoint>().ok());
        let replay = endpoint(&spec.replay);
        if let Some(events) = endpoint(&spec.events) {
            for rank in 0..spec.ranks {
                let source = Source {
                    events: events.of_rank(rank),
                    replay: replay.as_ref().map(|replay| replay.of_rank(rank)),
                    topic: spec.topic.clone(),
                    rank: u32::from(spec.first_rank + rank),
                };
                let subscriber = Subscriber::new(source, Arc::clone(&view));
                following.push(subscriber.following());
                tasks.push(tokio::spawn(subscriber.follow()).abort_handle());
            }
        }
        Arc::new(Self {
            spec,
            number,
            node,
            view,
            health: Mutex::default(),
            served: ArcSwap::default(),
            following,
            tasks,
        })
    }

    /// Whether it gets requests.
    pub fn is_up(&self) -> bool {
        !self.health.lock().away
    }

    /// It answered. True where it was away.
    pub fn succeeded(&self) -> bool {
        let mut health = self.health.lock();
        health.doubts = 0;
        std::mem::take(&mut health.away)
    }

    /// It did not, and why. True where it counts as away from now on.
    pub fn failed(&self, evidence: Evidence, why: &str) -> bool {
        let mut health = self.health.lock();
        health.doubts += 1;
        why.clone_into(&mut health.why);
        let away = evidence == Evidence::Gone || health.doubts >= caps::DOUBTS_MAX;
        away && !std::mem::replace(&mut health.away, true)
    }

    /// Whether its events come, of all its ranks. True where it has none.
    pub fn follows_all(&self) -> bool {
        self.following.iter().all(|following| following.problem().is_none())
    }

    /// What the router lacks of it, each with why.
    pub fn problems(&self) -> Vec<String> {
        let events = self.spec.events.as_deref().unwrap_or_default();
        let following = self.following.iter().filter_map(|following| following.problem());
        let mut problems: Vec<String> = following.map(|why| format!("no events from {events}: {why}")).collect();
        let health = self.health.lock();
        if health.away {
            problems.push(format!("it is away, and gets no requests: {}", health.why));
        }
        drop(health);
        if let (Some(address), None) = (&self.spec.node, &self.node) {
            problems.push(format!("the node {address} cannot be followed"));
        }
        if let Some(node) = self.node.as_ref().filter(|node| !node.status().whole) {
            problems.push(format!("the node {} does not answer, so its blocks are not known", node.address));
        }
        let unread = self.view.counts().unread;
        if unread > 0 {
            problems.push(format!("{unread} of its messages or events could not be read"));
        }
        problems
    }

    /// The models that it says that it serves; empty until it was asked.
    pub fn served(&self) -> Arc<Vec<Served>> {
        self.served.load_full()
    }

    /// It says that it serves these.
    pub fn set_served(&self, served: Vec<Served>) {
        if **self.served.load() != served {
            self.served.store(Arc::new(served));
        }
    }

    /// Whose prompts it makes, by its configuration or by whose models it says that they are; `None`: it has not said yet.
    pub fn engine(&self) -> Option<Engine> {
        let said = || {
            let served = self.served.load();
            let owner = served.iter().find_map(|served| served.entry.get("owned_by")?.as_str());
            // Other servers are taken for the one whose API most of them follow.
            let of_owner = owner.map(|owner| Engine::of_owner(owner).unwrap_or_default());
            of_owner.or_else(|| (!served.is_empty()).then(Engine::default))
        };
        self.spec.engine.or_else(said)
    }

    /// Whether it serves this model, by its configuration or by its own word.
    pub fn serves(&self, model: &str) -> bool {
        self.spec.model == model || self.served.load().iter().any(|served| served.id == model)
    }

    /// Whether no block of a prefix is of use, in its engine and on its node, without all that stand before it.
    pub(super) fn needs_all_blocks(&self) -> bool {
        let groups = self.view.groups();
        let of_engine = groups.is_empty() || groups.iter().any(|group| group.kind == GroupKind::Attention);
        of_engine && self.node.as_ref().is_none_or(|node| node.needs_all_blocks(&self.spec.model))
    }

    /// Whether its engine's events have told of blocks. One of which nothing is heard is not an empty one.
    pub fn tells_of_blocks(&self) -> bool {
        !self.view.groups().is_empty()
    }

    /// Tokens of its blocks; `None` until that is known.
    pub fn block_tokens(&self) -> Option<u32> {
        let known = if self.spec.block_tokens > 0 { self.spec.block_tokens } else { self.view.block_tokens() };
        (known > 0).then_some(known)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use kvstore_proto::hashes::Sha256Cbor;

    use super::*;
    use crate::fleet::{Fleet, FleetOptions};
    use crate::hashing::Hashing;

    #[tokio::test]
    async fn a_worker_is_away_after_evidence_and_back_at_its_first_success() {
        let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
        fleet.set_workers(&[WorkerSpec::new("a", "http://127.0.0.1:1", "m")]);
        let worker = fleet.worker("a").unwrap();
        for _ in 0..3 {
            for _ in 1..caps::DOUBTS_MAX {
                assert!(!worker.failed(Evidence::Doubt, "silent") && worker.is_up(), "once may be chance");
            }
            assert!(!worker.succeeded(), "it was never away");
        }
        for _ in 1..caps::DOUBTS_MAX {
            worker.failed(Evidence::Doubt, "silent");
        }
        assert!(
            worker.failed(Evidence::Doubt, "silent") && !worker.is_up() && !worker.failed(Evidence::Doubt, "silent")
        );
        assert!(worker.succeeded() && worker.is_up());
        assert!(worker.failed(Evidence::Gone, "refused") && !worker.is_up(), "nobody listens there");
    }

    #[test]
    fn what_a_worker_says_of_its_models_is_read_as_far_as_it_can_be() {
        let answer = r#"{"object": "list", "data": [
            {"id": "m", "root": "/models/m", "parent": null, "max_model_len": 4096, "extra": {"a": 1}},
            {"id": "m-lora", "root": "/loras/x", "parent": "m", "max_model_len": null}, {"object": "model"}, 7]}"#;
        let served = read_served(answer.as_bytes()).unwrap();
        let short: Vec<_> = served.iter().map(|one| (one.id.as_str(), one.parent.as_deref(), one.tokens_max)).collect();
        assert_eq!(short, [("m", None, Some(4096)), ("m-lora", Some("m"), None)]);
        assert_eq!(served[0].entry["extra"]["a"], 1);
        for other in ["", "[]", "{\"data\": 7}", "<html>"] {
            assert_eq!(read_served(other.as_bytes()), None, "{other}");
        }
    }
}
