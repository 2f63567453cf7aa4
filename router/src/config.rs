//! The router's configuration: a TOML file, and flags over it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_chat::json;
use kvstore_chat::prompts::{Options, PromptError, Prompts};
use kvstore_proto::hashes::Sha256Cbor;
use serde::Deserialize;

use crate::caps;
use crate::cost::Choose;
use crate::discovery;
use crate::fleet::{FleetOptions, WorkerSpec};
use crate::hashing::Hashing;
use crate::place::PlaceOptions;
use crate::serve::{Model, ServeOptions};

/// As it stands in the file. `docs/router.md` describes each key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// How engines name blocks: `sha256_cbor`, or `engine`.
    pub hash: HashName,
    /// The engines' PYTHONHASHSEED, where they have one.
    pub hash_seed: Option<String>,
    /// Models, beyond what workers say of them.
    pub models: Vec<ModelConfig>,
    /// Workers.
    pub workers: Vec<WorkerSpec>,
    /// A file of more `[[workers]]`, followed.
    pub workers_file: Option<PathBuf>,
    /// Other replicas of this router.
    pub peers: Vec<String>,
    /// Answers that break off are gone on with.
    pub resume: bool,
    /// Bytes of a request's body.
    pub request_bytes: ByteSize,
    /// How requests are placed.
    pub place: PlaceConfig,
    /// What the indexes may take.
    pub index: IndexConfig,
}

/// See [`Config::hash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashName {
    /// The router computes the engines' hashes.
    Sha256Cbor,
    /// Only the engines can.
    Engine,
}

impl std::str::FromStr for HashName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sha256_cbor" => Ok(Self::Sha256Cbor),
            "engine" => Ok(Self::Engine),
            _ => Err(format!(
                "{text:?} is not known; use sha256_cbor (the engines' prefix_caching_hash_algo) or engine (any other)"
            )),
        }
    }
}

/// A model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// As requests name it.
    pub name: String,
    /// Its folder, or its `tokenizer.json`.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// Another chat template than its own.
    #[serde(default)]
    pub chat_template: Option<PathBuf>,
    /// Arguments for the template that its engines were started with: `--default-chat-template-kwargs`.
    #[serde(default)]
    pub template_kwargs: toml::Table,
    /// Its engines were started with `--exclude-tools-when-tool-choice-none`.
    #[serde(default)]
    pub exclude_tools_when_tool_choice_none: bool,
    /// It is an adapter (LoRA) under a name of its own.
    #[serde(default)]
    pub adapter: bool,
    /// Its base model, where it is an adapter and its engines do not say which.
    #[serde(default)]
    pub base: Option<String>,
}

impl ModelConfig {
    /// A model of this name, with its folder.
    pub fn new(name: &str, tokenizer: &str) -> Self {
        Self {
            name: name.to_owned(),
            tokenizer: Some(tokenizer.into()),
            chat_template: None,
            template_kwargs: toml::Table::new(),
            exclude_tools_when_tool_choice_none: false,
            adapter: false,
            base: None,
        }
    }

    /// What its engines were started with.
    fn options(&self) -> Result<Options, String> {
        let kwargs = toml::Value::Table(self.template_kwargs.clone());
        if let Some(odd) = no_json(&kwargs) {
            return Err(format!("{odd} is no value of JSON; use texts, numbers, true, false, lists and tables"));
        }
        let kwargs = serde_json::to_string(&kwargs).map_err(|error| error.to_string())?;
        let kwargs = json::parse(kwargs.as_bytes()).map_err(|error| error.to_string())?;
        let template_kwargs = kwargs.as_dict().cloned().unwrap_or_default();
        Ok(Options { template_kwargs, excludes_tools: self.exclude_tools_when_tool_choice_none })
    }

    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let options = self.options().map_err(|why| format!("model {name:?}: template_kwargs: {why}"))?;
        if let Some(wrong) = options.wrong_argument() {
            return Err(format!(
                "model {name:?}: template_kwargs: {wrong:?} is an argument of the engine, not of the template"
            ));
        }
        let has_options = !self.template_kwargs.is_empty() || self.exclude_tools_when_tool_choice_none;
        if has_options && self.tokenizer.is_none() {
            return Err(format!(
                "model {name:?}: template_kwargs and exclude_tools_when_tool_choice_none need its tokenizer"
            ));
        }
        Ok(())
    }
}

/// A value that JSON has not, if there is one.
fn no_json(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::Datetime(time) => Some(time.to_string()),
        toml::Value::Float(float) if !float.is_finite() => Some(float.to_string()),
        toml::Value::Array(items) => items.iter().find_map(no_json),
        toml::Value::Table(table) => table.values().find_map(no_json),
        _ => None,
    }
}

/// How requests are placed.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlaceConfig {
    /// 0: always the worker that is expected to answer first.
    pub temperature: f64,
    /// Requests under way at a worker.
    pub requests_max: u64,
    /// Expected seconds before a request at a worker.
    pub wait_seconds_max: f64,
    /// A session stays while its worker takes so many times the best's time.
    pub affinity: f64,
    /// Seconds that a request waits where all are full.
    pub queue_seconds: f64,
    /// Requests that wait.
    pub queue_max: usize,
    /// Seconds of silence after which an answer counts as broken off.
    pub silence_seconds: f64,
    /// Prompts with fewer tokens to compute are not split between pools.
    pub split_tokens_min: u64,
}

impl Default for PlaceConfig {
    fn default() -> Self {
        let (place, choose) = (PlaceOptions::default(), Choose::default());
        Self {
            temperature: choose.temperature,
            requests_max: choose.requests_max,
            wait_seconds_max: choose.seconds_max,
            affinity: choose.affinity,
            queue_seconds: place.queue_time.as_secs_f64(),
            queue_max: place.queue_max,
            silence_seconds: place.silence.as_secs_f64(),
            split_tokens_min: place.split_tokens_min,
        }
    }
}

/// What the indexes may take.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IndexConfig {
    /// That of engines' memory.
    pub engine_bytes: ByteSize,
    /// That of nodes' tiers.
    pub node_bytes: ByteSize,
}

impl Default for IndexConfig {
    fn default() -> Self {
        let fleet = FleetOptions::default();
        Self { engine_bytes: ByteSize(fleet.engine_index_bytes), node_bytes: ByteSize(fleet.node_index_bytes) }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8088)),
            hash: HashName::Sha256Cbor,
            hash_seed: None,
            models: Vec::new(),
            workers: Vec::new(),
            workers_file: None,
            peers: Vec::new(),
            resume: true,
            request_bytes: ByteSize(caps::REQUEST_BYTES_MAX),
            place: PlaceConfig::default(),
            index: IndexConfig::default(),
        }
    }
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| anyhow::anyhow!("cannot read the configuration file {}: {error}", path.display()))?;
        toml::from_str(&text)
            .map_err(|error| anyhow::anyhow!("the configuration file {} is not valid: {error}", path.display()))
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> anyhow::Result<()> {
        discovery::check(&self.workers).map_err(anyhow::Error::msg)?;
        for (at, model) in self.models.iter().enumerate() {
            model.check().map_err(anyhow::Error::msg)?;
            let is_twice = self.models.iter().take(at).any(|other| other.name == model.name);
            anyhow::ensure!(!is_twice, "model {:?} is listed twice; say all of it in one place", model.name);
        }
        let place = &self.place;
        for (key, value, least, most) in [
            ("place.temperature", place.temperature, 0.0, 100.0),
            ("place.wait_seconds_max", place.wait_seconds_max, 0.001, 3600.0),
            ("place.affinity", place.affinity, 1.0, 100.0),
            ("place.queue_seconds", place.queue_seconds, 0.0, 3600.0),
            ("place.silence_seconds", place.silence_seconds, 1.0, 86_400.0),
        ] {
            anyhow::ensure!((least..=most).contains(&value), "{key} is {value}; it must be from {least} to {most}");
        }
        let bytes = self.request_bytes;
        anyhow::ensure!(
            (1024..=1 << 32).contains(&bytes.as_u64()),
            "request_bytes is {bytes}; it must be from 1 KiB to 4 GiB"
        );
        anyhow::ensure!(place.requests_max > 0, "place.requests_max is 0; it must be at least 1");
        for peer in &self.peers {
            let is_http = peer.parse::<http::Uri>().is_ok_and(|url| url.scheme_str() == Some("http"));
            anyhow::ensure!(is_http, "peers: {peer:?} is not an HTTP URL; use http://host:port of another replica");
        }
        anyhow::ensure!(
            !self.workers.is_empty() || self.workers_file.is_some(),
            "no workers are configured; name at least one with --worker, [[workers]] or workers_file"
        );
        Ok(())
    }

    /// How engines name blocks.
    pub fn hashing(&self) -> anyhow::Result<Hashing> {
        Ok(match (self.hash, &self.hash_seed) {
            (HashName::Engine, _) => Hashing::Engine,
            (HashName::Sha256Cbor, Some(seed)) => Hashing::Sha256Cbor(Sha256Cbor::with_seed(seed)?),
            (HashName::Sha256Cbor, None) => Hashing::Sha256Cbor(Sha256Cbor::default()),
        })
    }

    /// What placing goes by.
    pub fn place_options(&self) -> PlaceOptions {
        let place = &self.place;
        PlaceOptions {
            choose: Choose {
                temperature: place.temperature,
                requests_max: place.requests_max,
                seconds_max: place.wait_seconds_max,
                affinity: place.affinity,
            },
            queue_time: Duration::from_secs_f64(place.queue_seconds),
            queue_max: place.queue_max,
            silence: Duration::from_secs_f64(place.silence_seconds),
            split_tokens_min: place.split_tokens_min,
        }
    }

    /// What the indexes may take.
    pub fn fleet_options(&self) -> FleetOptions {
        FleetOptions {
            engine_index_bytes: self.index.engine_bytes.as_u64(),
            node_index_bytes: self.index.node_bytes.as_u64(),
        }
    }

    /// How to serve.
    pub fn serve_options(&self) -> ServeOptions {
        let request_bytes = self.request_bytes.as_u64();
        ServeOptions { resume: self.resume, peers: self.peers.clone(), request_bytes, ..ServeOptions::default() }
    }

    /// Loads the models' tokenizers. One that cannot be used costs that model its prefix routing, and nothing else.
    pub fn load_models(&self) -> HashMap<String, Model> {
        let load = |model: &ModelConfig| {
            let options = model.options().unwrap_or_default();
            let load = |path| Ok(Prompts::load(path, model.chat_template.as_deref())?.with_options(options));
            let tokens = model.tokenizer.as_deref().map(load).transpose();
            let (tokens, problem) = match tokens {
                Ok(tokens) => {
                    let problem = tokens.as_ref().and_then(Prompts::problem).map(str::to_owned);
                    (tokens, problem)
                }
                Err::<_, PromptError>(error) => {
                    (None, Some(format!("its tokenizer cannot be used, so its prompts are placed by load: {error}")))
                }
            };
            if let Some(problem) = &problem {
                tracing::error!(model = model.name, problem, "a model's prompts are not known in full");
            }
            (model.name.clone(), Model { tokens, adapter: model.adapter, base: model.base.clone(), problem })
        };
        self.models.iter().map(load).collect()
    }
}

/// The first word of a log filter that is neither a level nor says one for a target. tracing takes such a word for the name of a
/// target, and logs nothing else: a misspelt level would silence the program.
pub fn unknown_level(filter: &str) -> Option<&str> {
    let level = |word: &str| word.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    filter.split(',').map(str::trim).find(|word| !word.is_empty() && !word.contains(['=', '[']) && !level(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    const WORKER: &str = "[[workers]]\nid = \"a\"\nurl = \"http://h:1\"\nmodel = \"m\"\n";

    #[test]
    fn what_is_wrong_is_named() {
        assert!(checked(WORKER).is_ok());
        for (text, says) in [
            ("", "no workers"),
            ("[place]\ntemperature = -1", "unreachable"),
            ("hash = \"md5\"", "unknown variant"),
            ("peers = [\"x\"]", "peers"),
            ("[place]\nrequests_max = 0", "requests_max"),
            ("[place]\naffinity = 0.5", "place.affinity is 0.5; it must be from 1 to 100"),
            ("lisen = 1", "unknown field"),
            ("[[models]]\nname = \"m\"\n[[models]]\nname = \"m\"", "model \"m\" is listed twice"),
            (
                "[[models]]\nname = \"m\"\ntokenizer = \"x\"\ntemplate_kwargs = {messages = 1}",
                "\"messages\" is an argument of the engine",
            ),
            ("[[models]]\nname = \"m\"\ntokenizer = \"x\"\ntemplate_kwargs = {a = [nan]}", "NaN is no value of JSON"),
            (
                "[[models]]\nname = \"m\"\ntokenizer = \"x\"\ntemplate_kwargs = {a = 2026-01-01}",
                "2026-01-01 is no value of JSON",
            ),
            ("[[models]]\nname = \"m\"\ntemplate_kwargs = {a = 1}", "need its tokenizer"),
            ("request_bytes = \"10B\"", "request_bytes is 10 B; it must be from 1 KiB to 4 GiB"),
            ("[index]\nengine_bytes = \"much\"", "engine_bytes"),
        ] {
            let text = if text.is_empty() { String::new() } else { format!("{text}\n{WORKER}") };
            let error = checked(&text).unwrap_err();
            assert!(
                error.contains(says) || says == "unreachable" && error.contains("place.temperature is -1"),
                "{error}"
            );
        }
    }
}
