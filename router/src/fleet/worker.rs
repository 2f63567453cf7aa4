//! A worker: an engine that serves requests over HTTP, and says what it has in its memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvstore_proto::zmtp::Endpoint;
use serde::{Deserialize, Serialize};
use tokio::task::AbortHandle;

use super::Node;
use crate::events::subscriber::{Source, Subscriber};
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
        }
    }

    fn check_url(&self) -> Result<(), String> {
        let (id, text) = (&self.id, &self.url);
        let url =
            text.parse::<http::Uri>().map_err(|error| format!("worker {id:?}: url {text:?} is not valid: {error}"))?;
        if url.scheme_str() != Some("http") || url.host().is_none() {
            return Err(format!("worker {id:?}: url {text:?} is not an HTTP URL; use http://host:port"));
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
    /// Its number in this router's life: for counting what it does.
    pub number: usize,
    /// Its node's daemon.
    pub node: Option<Arc<Node>>,
    /// What its engine has.
    pub view: Arc<EngineView>,
    up: AtomicBool,
    tasks: Vec<AbortHandle>,
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
        let mut tasks = Vec::new();
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
                tasks.push(tokio::spawn(subscriber.follow()).abort_handle());
            }
        }
        Arc::new(Self { spec, number, node, view, up: AtomicBool::new(true), tasks })
    }

    /// False after it refused connections, until it answers again.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// It answered, or did not. True where that is news.
    pub fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::AcqRel) != up
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
