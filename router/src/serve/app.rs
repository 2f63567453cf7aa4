//! What all requests share: the router, the models, connections to the workers, and bounds.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use kvstore_chat::prompts::Prompts;

use super::body::Bodies;
use super::shapes::Shapes;
use super::upstream::Workers;
use crate::caps;
use crate::place::Router;

/// A model, as the router is told of it.
#[derive(Default)]
pub struct Model {
    /// Its tokenizer; none: texts are routed by load alone.
    pub tokens: Option<Prompts>,
    /// It is an adapter (LoRA) that engines serve under this name.
    pub adapter: bool,
    /// Its base model, where it is an adapter and that was said.
    pub base: Option<String>,
    /// Why there is no tokenizer, though there should be one.
    pub problem: Option<String>,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Answers that break off are gone on with elsewhere; workers are asked for token ids for that.
    pub resume: bool,
    /// Other replicas of this router, whose requests under way count, too.
    pub peers: Vec<String>,
    /// How often workers are asked whether they live.
    pub health_every: Duration,
    /// Bytes of a request's body, at most.
    pub request_bytes: u64,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            resume: true,
            peers: Vec::new(),
            health_every: Duration::from_secs(2),
            request_bytes: caps::REQUEST_BYTES_MAX,
        }
    }
}

/// Counts since the start.
#[derive(Default, Debug)]
pub struct ServeCounts {
    /// Requests.
    pub requests: AtomicU64,
    /// Answers that went on at another worker.
    pub resumed: AtomicU64,
    /// Answers that broke off for good.
    pub broken: AtomicU64,
    /// Shapes of requests whose prompts turned out not to be the engine's.
    pub differing_shapes: AtomicU64,
}

/// What all requests share.
pub struct App {
    /// Where requests go.
    pub router: Arc<Router>,
    pub(super) models: HashMap<String, Model>,
    pub(super) options: ServeOptions,
    pub(super) workers: Workers,
    pub(super) bodies: Bodies,
    pub(super) counts: ServeCounts,
    pub(super) started: Instant,
    pub(super) shapes: Shapes,
    /// Of the names of conversations, so that no client can choose one.
    pub(super) seed: u64,
    /// When workers may be asked again what they serve, in milliseconds from the start; 0 before the first time.
    pub(super) models_asked_ms: AtomicU64,
}

impl App {
    /// In front of these workers.
    pub fn new(router: Arc<Router>, models: HashMap<String, Model>, options: ServeOptions) -> Arc<Self> {
        let adapters = models.iter().filter(|(_, model)| model.adapter);
        let adapters: BTreeMap<String, Option<String>> =
            adapters.map(|(name, model)| (name.clone(), model.base.clone())).collect();
        router.fleet.set_adapters(adapters);
        Arc::new(Self {
            router,
            models,
            workers: Workers::new(),
            bodies: Bodies::new(options.request_bytes),
            options,
            counts: ServeCounts::default(),
            started: Instant::now(),
            shapes: Shapes::default(),
            seed: RandomState::new().hash_one("conversations"),
            models_asked_ms: AtomicU64::new(0),
        })
    }
}
