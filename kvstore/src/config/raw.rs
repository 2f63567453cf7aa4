//! The configuration as it is written, and the checks that turn it into what the daemon trusts.

use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_proto::zmtp::Endpoint;
use kvstore_tiers::HugePages;
use kvstore_tiers::admission::Admission;
use kvstore_tiers::caps::{
    HOST_BYTES_MIN, NAMESPACES_MAX, NVME_BYTES_MIN, NVME_INDEX_BYTES_MIN, NVME_PATHS_MAX, STAGING_BYTES_MAX,
    STAGING_BYTES_MIN,
};
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::HostLimits;
use kvstore_tiers::nvme;
use serde::{Deserialize, Serialize};

use super::namespaces::{self, RawNamespace, Tiers};
use super::{Address, Config, ConfigError, Listener, LogFormat, NvmeConfig, PublisherConfig, invalid, machine};
use crate::caps::{self, NVME_BYTES_AUTO_MAX};

/// Every key, as text that has yet to be checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    host: RawHost,
    nvme: RawNvme,
    object: RawObject,
    snapshots: RawSnapshots,
    local: RawLocal,
    calls: RawCalls,
    http: RawHttp,
    events: RawEvents,
    log: RawLog,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    listen: Vec<RawListener>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespace: Vec<RawNamespace>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawHost {
    bytes: String,
    high_watermark_percent: u32,
    low_watermark_percent: u32,
    ready_bytes: String,
    huge_pages: String,
    eviction: String,
}

impl Default for RawHost {
    fn default() -> Self {
        Self {
            bytes: "auto".into(),
            high_watermark_percent: 99,
            low_watermark_percent: 98,
            ready_bytes: "auto".into(),
            huge_pages: "auto".into(),
            eviction: "sessions".into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawNvme {
    paths: Vec<String>,
    bytes: String,
    index_bytes: String,
    dirty_bytes: String,
    io: String,
    admit: String,
    reused_after: u8,
    promote_after: u8,
    write_budget: String,
}

impl Default for RawNvme {
    fn default() -> Self {
        Self {
            paths: vec!["auto".into()],
            bytes: "auto".into(),
            index_bytes: "auto".into(),
            dirty_bytes: "auto".into(),
            io: "auto".into(),
            admit: "all".into(),
            reused_after: 2,
            promote_after: 1,
            write_budget: "off".into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawObject {
    pub(super) url: String,
    pub(super) options: Vec<String>,
    pub(super) upload: String,
    pub(super) upload_bytes: String,
    pub(super) backlog_bytes: String,
    pub(super) verify: String,
    pub(super) stall: String,
    pub(super) keep_age: String,
    pub(super) keep_bytes: String,
}

impl Default for RawObject {
    fn default() -> Self {
        Self {
            url: "off".into(),
            options: Vec::new(),
            upload: "asked".into(),
            upload_bytes: "auto".into(),
            backlog_bytes: "auto".into(),
            verify: "probe".into(),
            stall: "5s".into(),
            keep_age: "off".into(),
            keep_bytes: "off".into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawSnapshots {
    pub(super) url: String,
    pub(super) options: Vec<String>,
    pub(super) namespace: String,
    pub(super) prewarm: Vec<String>,
}

impl Default for RawSnapshots {
    fn default() -> Self {
        Self { url: "off".into(), options: Vec::new(), namespace: default_namespace(), prewarm: Vec::new() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLocal {
    plane: String,
    spin: String,
    staging_bytes: String,
}

impl Default for RawLocal {
    fn default() -> Self {
        Self { plane: "on".into(), spin: "50us".into(), staging_bytes: "512KiB".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawCalls {
    deadline: String,
    drain_deadline: String,
}

impl Default for RawCalls {
    fn default() -> Self {
        Self { deadline: "30s".into(), drain_deadline: "10s".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawHttp {
    address: String,
}

impl Default for RawHttp {
    fn default() -> Self {
        Self { address: "127.0.0.1:7541".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawEvents {
    publish: String,
    replay: String,
    topic: String,
    namespace: String,
    hashes: String,
    bytes: String,
}

impl Default for RawEvents {
    fn default() -> Self {
        Self {
            publish: "off".into(),
            replay: "off".into(),
            topic: String::new(),
            namespace: default_namespace(),
            hashes: "int".into(),
            bytes: "64MiB".into(),
        }
    }
}

impl RawEvents {
    fn check(&self, listeners: &[Listener]) -> Result<Option<PublisherConfig>, ConfigError> {
        let endpoint = |key: &'static str, text: &str| -> Result<Option<Endpoint>, ConfigError> {
            match text {
                "off" => Ok(None),
                text => text.parse().map(Some).map_err(|problem: String| invalid(key, problem)),
            }
        };
        let replay = endpoint("events.replay", &self.replay)?;
        let hash_bytes = match self.hashes.as_str() {
            "int" => false,
            "bytes" => true,
            other => return Err(invalid("events.hashes", format!("{other:?} is not \"int\" or \"bytes\""))),
        };
        let bytes = ByteSize::from_str(&self.bytes)
            .map_err(|_| invalid("events.bytes", format!("{:?} is not a size such as \"64MiB\"", self.bytes)))?
            .as_u64();
        if bytes < 1 << 20 {
            return Err(invalid("events.bytes", "must be at least 1MiB"));
        }
        let Some(events) = endpoint("events.publish", &self.publish)? else {
            return match replay {
                Some(_) => Err(invalid("events.replay", "a replay needs published events: set events.publish, too")),
                None => Ok(None),
            };
        };
        if !listeners.iter().any(|listener| listener.namespace == self.namespace) {
            return Err(invalid(
                "events.namespace",
                format!("no [[listen]] has the namespace {:?}: add one", self.namespace),
            ));
        }
        let (topic, namespace) = (self.topic.clone(), self.namespace.clone());
        Ok(Some(PublisherConfig { events, replay, topic, namespace, bytes, hash_bytes }))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLog {
    level: String,
    format: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { level: "info".into(), format: "human".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListener {
    address: String,
    #[serde(default = "default_namespace")]
    namespace: String,
}

fn default_namespace() -> String {
    "default".into()
}

impl RawConfig {
    /// Reads TOML; `origin` names it in errors.
    pub fn parse(origin: &str, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text)
            .map_err(|error| ConfigError::Parse { origin: origin.to_owned(), problem: error.to_string() })
    }

    /// The keys of single values: "host.bytes" and so on.
    pub fn keys() -> Vec<String> {
        let Ok(toml::Value::Table(sections)) = toml::Value::try_from(Self::default()) else { return Vec::new() };
        let keys_of = |(section, value): (String, toml::Value)| {
            let keys = value.as_table().map(|table| table.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
            keys.into_iter().map(move |key| format!("{section}.{key}"))
        };
        sections.into_iter().flat_map(keys_of).collect()
    }

    /// Changes one key.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let known = Self::keys();
        if !known.iter().any(|name| name == key) {
            return Err(invalid(key, format!("this key is unknown; the valid keys are {}", known.join(", "))));
        }
        let (section, name) = key.split_once('.').unwrap_or((key, ""));
        let mut whole = toml::Value::try_from(&*self).map_err(|error| invalid(key, error.to_string()))?;
        let slot = whole.get_mut(section).and_then(|section| section.get_mut(name));
        let Some(slot) = slot else { return Err(invalid(key, "this key is unknown")) };
        *slot = match slot {
            toml::Value::Integer(_) => toml::Value::Integer(
                value.parse().map_err(|_| invalid(key, format!("{value:?} is not a whole number")))?,
            ),
            toml::Value::Array(_) => {
                let parts = value.split(',').map(|part| toml::Value::String(part.trim().to_owned()));
                toml::Value::Array(parts.collect())
            }
            _ => toml::Value::String(value.to_owned()),
        };
        *self = whole.try_into().map_err(|error: toml::de::Error| invalid(key, error.to_string()))?;
        Ok(())
    }

    /// Opens these listeners instead of the configured ones.
    pub fn listen_on(&mut self, addresses: &[String]) {
        self.listen = addresses
            .iter()
            .map(|address| RawListener { address: address.clone(), namespace: default_namespace() })
            .collect();
    }

    /// The same, with what may be a secret blotted out: to be shown.
    pub fn without_secrets(&self) -> Self {
        let mut shown = self.clone();
        for option in shown.object.options.iter_mut().chain(&mut shown.snapshots.options) {
            if let Some((key, _)) = option.split_once('=') {
                let name = key.to_ascii_lowercase();
                if ["secret", "key", "token", "password", "credential"].iter().any(|word| name.contains(word)) {
                    *option = format!("{key}=***");
                }
            }
        }
        shown
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// Checks every value.
    pub fn check(&self) -> Result<Config, ConfigError> {
        let host = self.host.check()?;
        let nvme = self.nvme.check(&host)?;
        let object = self.object.check(&host, nvme.as_ref())?;
        let listeners = self.check_listeners()?;
        let snapshots = self.snapshots.check(&listeners, nvme.is_some())?;
        let policies = namespaces::check(
            &self.namespace,
            &Tiers { host: &host, nvme: nvme.as_ref(), object: object.as_ref() },
            &listeners,
        )?;
        let huge_pages = match self.host.huge_pages.as_str() {
            "auto" => HugePages::Auto,
            "off" => HugePages::Off,
            other => return Err(invalid("host.huge_pages", format!("{other:?} is not \"auto\" or \"off\""))),
        };
        let local_plane = match self.local.plane.as_str() {
            "on" => true,
            "off" => false,
            other => return Err(invalid("local.plane", format!("{other:?} is not \"on\" or \"off\""))),
        };
        let (local_spin, local_staging_bytes) = self.local.check()?;
        let log_format = match self.log.format.as_str() {
            "human" => LogFormat::Human,
            "json" => LogFormat::Json,
            other => return Err(invalid("log.format", format!("{other:?} is not \"human\" or \"json\""))),
        };
        tracing_subscriber::EnvFilter::from_str(&self.log.level)
            .map_err(|error| invalid("log.level", format!("{:?}: {error}", self.log.level)))?;
        if let Some(word) = unknown_level(&self.log.level) {
            let valid = "use error, warn, info, debug, trace or off, or a filter such as \"info,kvstore=debug\"";
            return Err(invalid("log.level", format!("{word:?} is not a level; {valid}")));
        }
        let http = match self.http.address.as_str() {
            "off" => None,
            address => Some(loopback("http.address", address)?),
        };
        let publisher = self.events.check(&listeners)?;
        Ok(Config {
            host,
            publisher,
            nvme,
            object,
            snapshots,
            policies,
            host_ready_bytes: self.host.check_ready(&host)?,
            huge_pages,
            eviction: PolicyKind::from_str(&self.host.eviction).map_err(|problem| invalid("host.eviction", problem))?,
            listeners,
            http,
            local_plane,
            local_spin,
            local_staging_bytes,
            call_deadline: duration("calls.deadline", &self.calls.deadline)?,
            drain_deadline: duration("calls.drain_deadline", &self.calls.drain_deadline)?,
            log_level: self.log.level.clone(),
            log_format,
        })
    }

    fn check_listeners(&self) -> Result<Vec<Listener>, ConfigError> {
        if self.listen.is_empty() {
            let address = Address::Unix(machine::default_socket());
            return Ok(vec![Listener { address, namespace: default_namespace() }]);
        }
        if self.listen.len() > NAMESPACES_MAX {
            return Err(invalid(
                "listen",
                format!("there are {} listeners, but at most {NAMESPACES_MAX} are allowed", self.listen.len()),
            ));
        }
        let listeners = self.listen.iter().map(RawListener::check).collect::<Result<Vec<_>, _>>()?;
        for (at, listener) in listeners.iter().enumerate() {
            if listeners.iter().take(at).any(|earlier| earlier.address == listener.address) {
                return Err(invalid("listen.address", format!("{} is listed twice", listener.address)));
            }
        }
        Ok(listeners)
    }
}

impl RawHost {
    fn check(&self) -> Result<HostLimits, ConfigError> {
        let machine_bytes = machine::memory_bytes();
        let bytes = match self.bytes.as_str() {
            "auto" => (machine_bytes / 4).max(HOST_BYTES_MIN),
            text => ByteSize::from_str(text)
                .map_err(|_| {
                    invalid("host.bytes", format!("{text:?} is neither \"auto\" nor a size such as \"8GiB\""))
                })?
                .as_u64(),
        };
        if bytes < HOST_BYTES_MIN {
            return Err(invalid(
                "host.bytes",
                format!("{} is too small: it must be at least {}", ByteSize(bytes), ByteSize(HOST_BYTES_MIN)),
            ));
        }
        if bytes > machine_bytes {
            let problem =
                format!("{} is too large: this machine's memory has {}", ByteSize(bytes), ByteSize(machine_bytes));
            return Err(invalid("host.bytes", problem));
        }
        let (high, low) = (self.high_watermark_percent, self.low_watermark_percent);
        if !(1..=100).contains(&high) {
            return Err(invalid("host.high_watermark_percent", format!("{high} is out of range: it must be 1 to 100")));
        }
        if low >= high {
            let problem = format!("{low} is too high: it must be below host.high_watermark_percent, which is {high}");
            return Err(invalid("host.low_watermark_percent", problem));
        }
        Ok(HostLimits { bytes, high_watermark_percent: high, low_watermark_percent: low })
    }

    fn check_ready(&self, host: &HostLimits) -> Result<u64, ConfigError> {
        let key = "host.ready_bytes";
        let bytes = match self.ready_bytes.as_str() {
            "off" => 0,
            "auto" if self.bytes == "auto" => (host.bytes / caps::READY_PARTS).min(caps::READY_BYTES_AUTO_MAX),
            "auto" => host.bytes,
            text => ByteSize::from_str(text)
                .map_err(|_| {
                    invalid(key, format!("{text:?} is neither \"auto\", \"off\" nor a size such as \"1GiB\""))
                })?
                .as_u64(),
        };
        if bytes > host.bytes {
            let problem = format!("{} is too large: host.bytes is {}", ByteSize(bytes), ByteSize(host.bytes));
            return Err(invalid(key, problem));
        }
        Ok(bytes)
    }
}

/// Bytes as text, where "auto" leaves the choice to the caller.
pub(super) fn size_or_auto(key: &str, text: &str) -> Result<Option<u64>, ConfigError> {
    if text == "auto" {
        return Ok(None);
    }
    let size = ByteSize::from_str(text)
        .map_err(|_| invalid(key, format!("{text:?} is neither \"auto\" nor a size such as \"8GiB\"")))?;
    Ok(Some(size.as_u64()))
}

impl RawLocal {
    fn check(&self) -> Result<(Duration, u64), ConfigError> {
        let spin = humantime::parse_duration(&self.spin)
            .map_err(|_| invalid("local.spin", format!("{:?} is not a duration such as \"50us\"", self.spin)))?;
        if spin > caps::LOCAL_SPIN_MAX {
            let problem = format!("{} is too long: it must be at most {:?}", self.spin, caps::LOCAL_SPIN_MAX);
            return Err(invalid("local.spin", problem));
        }
        let key = "local.staging_bytes";
        let bytes = ByteSize::from_str(&self.staging_bytes)
            .map_err(|_| invalid(key, format!("{:?} is not a size such as \"512KiB\"", self.staging_bytes)))?
            .as_u64();
        if !(STAGING_BYTES_MIN..=STAGING_BYTES_MAX).contains(&bytes) {
            let (least, largest) = (ByteSize(STAGING_BYTES_MIN), ByteSize(STAGING_BYTES_MAX));
            return Err(invalid(key, format!("{} is out of range: it must be {least} to {largest}", ByteSize(bytes))));
        }
        Ok((spin, bytes))
    }
}

impl RawNvme {
    fn check(&self, host: &HostLimits) -> Result<Option<NvmeConfig>, ConfigError> {
        let engine = nvme::engine_of(&self.io)
            .ok_or_else(|| invalid("nvme.io", format!("{:?} is not \"auto\", \"io_uring\" or \"pread\"", self.io)))?;
        let Some(paths) = self.check_paths()? else { return Ok(None) };
        let bytes = self.check_bytes(&paths)?;
        let index_bytes = size_or_auto("nvme.index_bytes", &self.index_bytes)?;
        let index = index_bytes.unwrap_or_else(|| nvme::index_bytes_of(bytes));
        if index < NVME_INDEX_BYTES_MIN || index > bytes / 2 {
            let (least, most) = (ByteSize(NVME_INDEX_BYTES_MIN), ByteSize(bytes / 2));
            let problem =
                format!("{} is out of range: it must be {least} to half of nvme.bytes, {most}", ByteSize(index));
            return Err(invalid("nvme.index_bytes", problem));
        }
        let dirty_bytes = size_or_auto("nvme.dirty_bytes", &self.dirty_bytes)?.unwrap_or(host.bytes / 4);
        if dirty_bytes == 0 || dirty_bytes > host.bytes / 2 {
            let problem = format!(
                "{} is out of range: it must be 1 byte to half of host.bytes, {}, because dirty blocks stay in memory",
                ByteSize(dirty_bytes),
                ByteSize(host.bytes / 2)
            );
            return Err(invalid("nvme.dirty_bytes", problem));
        }
        let admission = Admission::from_str(&self.admit).map_err(|problem| invalid("nvme.admit", problem))?;
        let (reused_after, promote_after) = (self.reused_after, self.promote_after);
        if reused_after < 2 {
            return Err(invalid(
                "nvme.reused_after",
                format!("{reused_after} is out of range: it must be 2 to 255 requests"),
            ));
        }
        if promote_after == 0 {
            return Err(invalid("nvme.promote_after", "0 is out of range: it must be 1 to 255 requests"));
        }
        let write_budget = match self.write_budget.as_str() {
            "off" => None,
            text => Some(
                ByteSize::from_str(text)
                    .map_err(|_| {
                        let problem = format!("{text:?} is neither \"off\" nor a size per day such as \"2TiB\"");
                        invalid("nvme.write_budget", problem)
                    })?
                    .as_u64(),
            ),
        };
        Ok(Some(NvmeConfig {
            paths,
            bytes,
            index_bytes,
            dirty_bytes,
            engine,
            admission,
            reused_after,
            promote_after,
            write_budget,
        }))
    }

    fn check_paths(&self) -> Result<Option<Vec<PathBuf>>, ConfigError> {
        let key = "nvme.paths";
        match self.paths.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            [] | ["off"] => return Ok(None),
            ["auto"] => return Ok(Some(vec![machine::default_data_folder()])),
            many if many.iter().any(|path| matches!(*path, "auto" | "off")) => {
                return Err(invalid(key, "\"auto\" and \"off\" must stand alone, without other paths"));
            }
            many if many.len() > NVME_PATHS_MAX => {
                return Err(invalid(
                    key,
                    format!("there are {} paths, but at most {NVME_PATHS_MAX} are allowed", many.len()),
                ));
            }
            _ => {}
        }
        let paths: Vec<PathBuf> = self.paths.iter().map(PathBuf::from).collect();
        for (at, path) in paths.iter().enumerate() {
            if !path.is_absolute() {
                return Err(invalid(
                    key,
                    format!(
                        "{:?} is not an absolute path; write one such as \"/mnt/nvme0/kvstore\"",
                        path.display().to_string()
                    ),
                ));
            }
            if paths.iter().take(at).any(|earlier| earlier == path) {
                return Err(invalid(key, format!("{} is listed twice", path.display())));
            }
        }
        Ok(Some(paths))
    }

    fn check_bytes(&self, paths: &[PathBuf]) -> Result<u64, ConfigError> {
        let sizes: Vec<(u64, u64)> = paths.iter().filter_map(|path| machine::disk_bytes(path)).collect();
        let smallest = sizes.iter().map(|(all, _)| *all).min().unwrap_or(u64::MAX);
        // Fixed by the file system's size, not by what is free: a restart must not find another bound.
        let auto = (smallest / 10).clamp(NVME_BYTES_MIN, NVME_BYTES_AUTO_MAX);
        let bytes = size_or_auto("nvme.bytes", &self.bytes)?.unwrap_or(auto);
        if bytes < NVME_BYTES_MIN {
            let problem = format!("{} is too small: it must be at least {}", ByteSize(bytes), ByteSize(NVME_BYTES_MIN));
            return Err(invalid("nvme.bytes", problem));
        }
        if bytes > smallest {
            let problem = format!(
                "{} is too large: the smallest file system of nvme.paths has {}",
                ByteSize(bytes),
                ByteSize(smallest)
            );
            return Err(invalid("nvme.bytes", problem));
        }
        Ok(bytes)
    }
}

impl RawListener {
    fn check(&self) -> Result<Listener, ConfigError> {
        let namespace = self.namespace.clone();
        let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if namespace.is_empty() || namespace.len() > 64 || !namespace.chars().all(sound) {
            let problem = format!("{namespace:?} is not a valid name: use 1 to 64 letters, digits, '-', '_' or '.'");
            return Err(invalid("listen.namespace", problem));
        }
        let address = match self.address.strip_prefix("unix:") {
            Some(path) => Address::Unix(absolute(path)?),
            None => Address::Tcp(loopback("listen.address", self.address.trim_start_matches("http://"))?),
        };
        Ok(Listener { address, namespace })
    }
}

fn absolute(path: &str) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(path);
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(invalid("listen.address", format!("unix:{} is not an absolute path to a socket", path.display())));
    }
    // sun_path has 108 bytes with its final zero.
    if path.as_os_str().len() > 107 {
        return Err(invalid(
            "listen.address",
            format!("{} is too long: a socket's path can have at most 107 bytes", path.display()),
        ));
    }
    Ok(path)
}

fn loopback(key: &str, text: &str) -> Result<std::net::SocketAddr, ConfigError> {
    let address = text.to_socket_addrs().ok().and_then(|mut addresses| addresses.next()).ok_or_else(|| {
        let others = "a [[listen]] address may also be unix:/path, and http.address may be \"off\"";
        invalid(key, format!("{text:?} is not host:port; {others}"))
    })?;
    if !address.ip().is_loopback() {
        let problem = format!(
            "{address} is not a loopback address such as 127.0.0.1: other addresses need mutual TLS, which this version does not have"
        );
        return Err(invalid(key, problem));
    }
    Ok(address)
}

pub(super) fn duration(key: &str, text: &str) -> Result<Duration, ConfigError> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| invalid(key, format!("{text:?} is not a duration such as \"30s\"")))?;
    if duration.is_zero() || duration > caps::DEADLINE_MAX {
        let longest = humantime::format_duration(caps::DEADLINE_MAX);
        return Err(invalid(key, format!("{text:?} is out of range: it must be 1ms to {longest}")));
    }
    Ok(duration)
}

/// The first word of a log filter that is neither a level nor says one for a target. tracing takes such a word for the name of a
/// target, and logs nothing else: a misspelt level would silence the program.
fn unknown_level(filter: &str) -> Option<&str> {
    let level = |word: &str| word.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    filter.split(',').map(str::trim).find(|word| !word.is_empty() && !word.contains(['=', '[']) && !level(word))
}
