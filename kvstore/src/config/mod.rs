//! Configuration: read once into [`RawConfig`], checked once into [`Config`], which the rest trusts.
//!
//! Sources, later ones win: the file, the environment (`KVSTORE_HOST_BYTES` for `host.bytes`), `--set
//! KEY=VALUE`. Unknown keys, impossible values and pairs are refused by the key's name.

mod live;
mod machine;
mod namespaces;
mod object;
mod raw;
mod snapshots;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvstore_proto::zmtp::Endpoint;
use kvstore_tiers::admission::Admission;
use kvstore_tiers::caps::HELD_PERCENT_MAX;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::{HostLimits, NamespaceLimits};
use kvstore_tiers::nvme::NvmeEngine;
use kvstore_tiers::object::{ObjectLimits, ObjectUrl, Verify};
use kvstore_tiers::stack::{AdmissionRules, NamespaceRules};
use kvstore_tiers::{HugePages, Tier};

pub use live::{Change, changes};
pub use machine::{boot_id, default_socket, memory_bytes, memory_to_spare};
pub use namespaces::NamespacePolicy;
pub use raw::RawConfig;

/// The commented sample, which a test keeps true.
pub const SAMPLE: &str = include_str!("sample.toml");

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read the configuration file {path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why. Part of the message, so not its source: a chain of errors would name it twice.
        cause: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{origin}: {problem}")]
    Parse {
        /// The file, variable or flag.
        origin: String,
        /// What is wrong.
        problem: String,
    },
    /// A value that cannot be.
    #[error("{key}: {problem}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong and what would be valid.
        problem: String,
    },
}

pub(crate) fn invalid(key: &str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.to_owned(), problem: problem.into() }
}

/// Where a listener listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A loopback address: other addresses need mutual TLS, which this version does not have.
    Tcp(SocketAddr),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}"),
        }
    }
}

/// One way in, and the namespace that everyone who comes through it uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listener {
    /// Where.
    pub address: Address,
    /// The namespace.
    pub namespace: String,
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// The Nvme tier.
#[derive(Clone, PartialEq, Debug)]
pub struct NvmeConfig {
    /// One folder a disk.
    pub paths: Vec<PathBuf>,
    /// Bytes of each, the index included.
    pub bytes: u64,
    /// Bytes of that for the index; `None`: a part.
    pub index_bytes: Option<u64>,
    /// Bytes that may wait to be written.
    pub dirty_bytes: u64,
    /// How the disks are driven.
    pub engine: NvmeEngine,
    /// Which blocks are written.
    pub admission: Admission,
    /// Requests that make a block reused.
    pub reused_after: u8,
    /// What is read from the bucket goes to disk once this many requests asked for it.
    pub promote_after: u8,
    /// Bytes a day that may be written, of all disks together; `None`: any.
    pub write_budget: Option<u64>,
}

/// The Object tier.
#[derive(Clone, PartialEq, Debug)]
pub struct ObjectConfig {
    /// Where.
    pub url: ObjectUrl,
    /// Which blocks go there.
    pub uploads: Admission,
    /// Bounds.
    pub limits: ObjectLimits,
    /// When an upload is read back before it is acknowledged.
    pub verify: Verify,
    /// A request that brings nothing for this long is made anew.
    pub stall: Duration,
    /// What is older goes.
    pub keep_age: Option<Duration>,
    /// The oldest goes until no more is left.
    pub keep_bytes: Option<u64>,
}

/// Which events are published over ZeroMQ, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublisherConfig {
    /// The PUB socket.
    pub events: Endpoint,
    /// The ROUTER socket.
    pub replay: Option<Endpoint>,
    /// The topic of all messages.
    pub topic: String,
    /// Whose blocks.
    pub namespace: String,
    /// Bytes of descriptions.
    pub bytes: u64,
    /// Hashes are bytes, not their last 64 bits.
    pub hash_bytes: bool,
}

/// Snapshots that this daemon knows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotsConfig {
    /// Where they are.
    pub url: ObjectUrl,
    /// Whose blocks the chunks are that are prewarmed at the start ...
    pub namespace: String,
    /// ... of these snapshots.
    pub prewarm: Vec<PrewarmConfig>,
}

/// A snapshot to prewarm.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrewarmConfig {
    /// Its name or id.
    pub snapshot: String,
    /// Where to.
    pub tier: Tier,
}

/// A checked configuration.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// The Host tier's sizes.
    pub host: HostLimits,
    /// Bytes of memory that are made ready ahead of need.
    pub host_ready_bytes: u64,
    /// Whether slabs ask for huge pages.
    pub huge_pages: HugePages,
    /// Which block goes first.
    pub eviction: PolicyKind,
    /// The Nvme tier, where there is one.
    pub nvme: Option<NvmeConfig>,
    /// The Object tier, where there is one.
    pub object: Option<ObjectConfig>,
    /// The store of snapshots, where there is one.
    pub snapshots: Option<SnapshotsConfig>,
    /// What holds for single namespaces.
    pub policies: BTreeMap<String, NamespacePolicy>,
    /// The ways in.
    pub listeners: Vec<Listener>,
    /// Metrics and health over HTTP.
    pub http: Option<SocketAddr>,
    /// Events over ZeroMQ, where they are published.
    pub publisher: Option<PublisherConfig>,
    /// Whether engines on this node may attach to the local plane.
    pub local_plane: bool,
    /// How long the local plane looks for the next command before it sleeps.
    pub local_spin: Duration,
    /// Staging memory of a local client that puts.
    pub local_staging_bytes: u64,
    /// How long a call without a deadline may take.
    pub call_deadline: Duration,
    /// How long a drain waits for calls in flight.
    pub drain_deadline: Duration,
    /// The log filter.
    pub log_level: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

impl Config {
    /// Which blocks of this namespace go to the bucket.
    pub fn uploads_of(&self, namespace: &str) -> Admission {
        let of_namespace = self.policies.get(namespace).and_then(|policy| policy.uploads);
        self.object.as_ref().map_or(Admission::Asked, |object| of_namespace.unwrap_or(object.uploads))
    }

    /// Which blocks of this namespace go to disk.
    pub fn admission_of(&self, namespace: &str) -> Admission {
        let of_namespace = self.policies.get(namespace).and_then(|policy| policy.admission);
        self.nvme.as_ref().map_or(Admission::All, |nvme| of_namespace.unwrap_or(nvme.admission))
    }

    /// What this namespace may have of the memory, and whether it is written back.
    pub fn host_limits_of(&self, namespace: &str) -> NamespaceLimits {
        let policy = self.policies.get(namespace).copied().unwrap_or_default();
        let to_disk = self.nvme.is_some() && self.admission_of(namespace) == Admission::Evicted;
        NamespaceLimits {
            bytes: policy.host_bytes,
            held_percent: policy.pin_percent.unwrap_or(HELD_PERCENT_MAX),
            ttl_ms: policy.ttl.map(|ttl| ttl.as_millis() as u64),
            writes_back: to_disk || self.uploads_of(namespace) == Admission::Evicted,
        }
    }

    /// Which copies go to which tier; `namespaces` in the order of their numbers.
    pub fn admission_rules(&self, namespaces: &[String]) -> AdmissionRules {
        let nvme = self.nvme.as_ref();
        let rules = |name: &String| NamespaceRules {
            nvme: self.admission_of(name),
            object: self.uploads_of(name),
            promote_after: (self.policies.get(name).and_then(|policy| policy.promote_after))
                .or(nvme.map(|nvme| nvme.promote_after))
                .unwrap_or(1),
        };
        AdmissionRules {
            namespaces: namespaces.iter().map(rules).collect(),
            reused_after: nvme.map_or(2, |nvme| nvme.reused_after),
            counts: self.counts_requests(),
            write_budget: nvme.and_then(|nvme| nvme.write_budget),
        }
    }

    /// True where it is to be known how many requests asked for a block.
    pub fn counts_requests(&self) -> bool {
        let Some(nvme) = &self.nvme else {
            return self.namespaces().iter().any(|name| self.uploads_of(name) == Admission::Reused);
        };
        nvme.write_budget.is_some()
            || nvme.promote_after > 1
            || self.policies.values().any(|policy| policy.promote_after.is_some_and(|requests| requests > 1))
            || self
                .namespaces()
                .iter()
                .any(|name| self.admission_of(name) == Admission::Reused || self.uploads_of(name) == Admission::Reused)
    }

    /// The namespaces, each once.
    pub fn namespaces(&self) -> Vec<String> {
        let mut names: Vec<String> = self.listeners.iter().map(|listener| listener.namespace.clone()).collect();
        names.sort();
        names.dedup();
        names
    }
}

/// Reads and checks a configuration: `file`, then `environment`, then `settings` (`KEY=VALUE`).
pub fn load(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    settings: &[String],
) -> Result<Config, ConfigError> {
    load_raw(file, environment, settings)?.check()
}

/// The same, before it is checked.
pub fn load_raw(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    settings: &[String],
) -> Result<RawConfig, ConfigError> {
    let mut raw = match file {
        Some(path) => {
            let text =
                std::fs::read_to_string(path).map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
            RawConfig::parse(&path.display().to_string(), &text)?
        }
        None => RawConfig::default(),
    };
    let variables: BTreeMap<String, String> = environment.collect();
    for key in RawConfig::keys() {
        let variable = format!("KVSTORE_{}", key.replace('.', "_").to_uppercase());
        if let Some(value) = variables.get(&variable) {
            raw.set(&key, value).map_err(|error| named(&variable, error))?;
        }
    }
    for setting in settings {
        let Some((key, value)) = setting.split_once('=') else {
            return Err(invalid("--set", format!("{setting:?} is not of the form KEY=VALUE")));
        };
        raw.set(key.trim(), value.trim()).map_err(|error| named("--set", error))?;
    }
    Ok(raw)
}

fn named(origin: &str, error: ConfigError) -> ConfigError {
    ConfigError::Parse { origin: origin.to_owned(), problem: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str, environment: &[(&str, &str)], settings: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvstore.toml");
        std::fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
        load(Some(&path), environment, &settings)
    }

    /// Every key stands in the sample, commented out, with the value that the daemon uses without it.
    #[test]
    fn the_sample_lists_every_key_with_its_default() {
        let uncommented: String =
            SAMPLE.lines().map(|line| line.strip_prefix("#! ").unwrap_or(line)).flat_map(|line| [line, "\n"]).collect();
        let raw = RawConfig::parse("sample", &uncommented).unwrap();
        assert_eq!(raw.check().unwrap(), RawConfig::default().check().unwrap());
        for key in RawConfig::keys() {
            let name = key.rsplit('.').next().unwrap();
            assert!(SAMPLE.contains(&format!("#! {name} = ")), "{key} is not in the sample");
        }
        RawConfig::parse("sample", SAMPLE).unwrap();
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let file = "[host]\nbytes = \"64MiB\"\nhigh_watermark_percent = 80\nlow_watermark_percent = 70\n";
        let config = load_text(file, &[], &[]).unwrap();
        assert_eq!((config.host.bytes, config.host.high_watermark_percent), (64 << 20, 80));
        let config = load_text(file, &[("KVSTORE_HOST_BYTES", "128MiB")], &[]).unwrap();
        assert_eq!(config.host.bytes, 128 << 20);
        let config = load_text(file, &[("KVSTORE_HOST_BYTES", "128MiB")], &["host.bytes=256MiB"]).unwrap();
        assert_eq!(config.host.bytes, 256 << 20);
    }

    /// A daemon whose size somebody chose takes its memory at once; one that chose it by itself leaves most of it until it is needed.
    #[test]
    fn how_much_memory_is_made_ready_depends_on_who_chose_the_size() {
        let ready = |settings: &[&str]| load_text("", &[], settings).unwrap().host_ready_bytes;
        assert_eq!(ready(&["host.bytes=64MiB"]), 64 << 20);
        assert_eq!(ready(&["host.bytes=64MiB", "host.ready_bytes=off"]), 0);
        assert_eq!(ready(&["host.bytes=64MiB", "host.ready_bytes=8MiB"]), 8 << 20);
        let own = load_text("", &[], &[]).unwrap();
        assert_eq!(own.host_ready_bytes, (own.host.bytes / 16).min(1 << 30));
    }

    #[test]
    fn mistakes_are_named() {
        let cases: [(&str, &[&str], &str); 21] = [
            ("[host]\nbites = 1", &[], "bites"),
            ("[hosts]\nbytes = \"1GiB\"", &[], "hosts"),
            ("[host]\nbytes = \"12 parsecs\"", &[], "host.bytes"),
            ("[host]\nbytes = \"64KiB\"", &[], "host.bytes"),
            ("[host]\nbytes = \"9999TiB\"", &[], "host.bytes"),
            ("[host]\nhigh_watermark_percent = 50\nlow_watermark_percent = 60", &[], "low_watermark_percent"),
            ("[host]\nhigh_watermark_percent = 101", &[], "high_watermark_percent"),
            ("[host]\neviction = \"random\"", &[], "sessions"),
            ("[host]\nready_bytes = \"plenty\"", &[], "host.ready_bytes"),
            ("[host]\nbytes = \"64MiB\"\nready_bytes = \"65MiB\"", &[], "host.bytes is 64.0 MiB"),
            ("[[listen]]\naddress = \"0.0.0.0:7540\"", &[], "loopback"),
            ("[[listen]]\naddress = \"unix:relative.sock\"", &[], "absolute"),
            ("[nvme]\npaths = [\"relative\"]", &[], "absolute"),
            ("[nvme]\npaths = [\"/tmp/a\", \"off\"]", &[], "alone"),
            ("[nvme]\npaths = [\"/tmp/a\", \"/tmp/a\"]", &[], "twice"),
            ("[nvme]\npaths = [\"/tmp/a\"]\nbytes = \"1MiB\"", &[], "nvme.bytes"),
            ("[nvme]\npaths = [\"/tmp/a\"]\nbytes = \"64MiB\"\nindex_bytes = \"60MiB\"", &[], "nvme.index_bytes"),
            ("[nvme]\npaths = [\"/tmp/a\"]\ndirty_bytes = \"9999TiB\"", &[], "nvme.dirty_bytes"),
            ("[nvme]\nio = \"aio\"", &[], "nvme.io"),
            ("", &["host.bytes"], "KEY=VALUE"),
            ("", &["host.bites=1"], "host.bites"),
        ];
        for (text, settings, named) in cases {
            let error = load_text(text, &[], settings).unwrap_err().to_string();
            assert!(error.contains(named), "{text:?} {settings:?}: {error}");
        }
    }
}
