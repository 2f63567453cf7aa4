//! The keys that may change while the daemon runs.

use super::{Config, ConfigError, NvmeConfig, ObjectConfig, invalid};

/// One change, for the log and the caller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The key.
    pub key: &'static str,
    /// Before.
    pub from: String,
    /// After.
    pub to: String,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.from, self.to)
    }
}

/// The changes from `old` to `new`; refused by name where one needs a restart.
pub fn changes(old: &Config, new: &Config) -> Result<Vec<Change>, ConfigError> {
    let fixed = [
        ("host.huge_pages", old.huge_pages == new.huge_pages),
        ("host.eviction", old.eviction == new.eviction),
        ("nvme.paths", nvme(old, |nvme| nvme.paths.clone()) == nvme(new, |nvme| nvme.paths.clone())),
        ("nvme.index_bytes", nvme(old, |nvme| nvme.index_bytes) == nvme(new, |nvme| nvme.index_bytes)),
        ("nvme.io", nvme(old, |nvme| nvme.engine) == nvme(new, |nvme| nvme.engine)),
        ("object.url", object(old, |object| object.url.url.clone()) == object(new, |object| object.url.url.clone())),
        ("object.options", object(old, |object| object.url.clone()) == object(new, |object| object.url.clone())),
        ("object.verify", object(old, |object| object.verify) == object(new, |object| object.verify)),
        ("object.stall", object(old, |object| object.stall) == object(new, |object| object.stall)),
        ("snapshots", old.snapshots == new.snapshots),
        ("local.plane", old.local_plane == new.local_plane),
        ("listen", old.listeners == new.listeners),
        ("http.address", old.http == new.http),
        ("events", old.publisher == new.publisher),
        ("log.format", old.log_format == new.log_format),
    ];
    if let Some((key, _)) = fixed.into_iter().find(|(_, same)| !same) {
        return Err(invalid(key, "this key changes only with a restart of the daemon, so nothing was changed"));
    }
    let pairs = live(old).into_iter().zip(live(new)).filter(|((_, from), (_, to))| from != to);
    Ok(pairs.map(|((key, from), (_, to))| Change { key, from, to }).collect())
}

/// The keys that may change, with their values as they are told.
fn live(config: &Config) -> Vec<(&'static str, String)> {
    let bytes = |bytes: u64| bytesize::ByteSize(bytes).to_string();
    let size = |size: Option<u64>| size.map_or_else(|| "off".to_owned(), bytes);
    let time = |time| humantime::format_duration(time).to_string();
    let name = |name: Option<&'static str>| name.unwrap_or("off").to_owned();
    let count = |count: Option<u8>| count.unwrap_or_default().to_string();
    vec![
        ("host.bytes", bytes(config.host.bytes)),
        ("host.high_watermark_percent", config.host.high_watermark_percent.to_string()),
        ("host.low_watermark_percent", config.host.low_watermark_percent.to_string()),
        ("host.ready_bytes", bytes(config.host_ready_bytes)),
        ("nvme.bytes", size(nvme(config, |nvme| nvme.bytes))),
        ("nvme.dirty_bytes", size(nvme(config, |nvme| nvme.dirty_bytes))),
        ("nvme.admit", name(nvme(config, |nvme| nvme.admission.name()))),
        ("nvme.reused_after", count(nvme(config, |nvme| nvme.reused_after))),
        ("nvme.promote_after", count(nvme(config, |nvme| nvme.promote_after))),
        ("nvme.write_budget", size(nvme(config, |nvme| nvme.write_budget).flatten())),
        ("object.upload", name(object(config, |object| object.uploads.name()))),
        ("object.upload_bytes", size(object(config, |object| object.limits.upload_bytes))),
        ("object.backlog_bytes", size(object(config, |object| object.limits.backlog_bytes))),
        ("object.keep_age", age(config)),
        ("object.keep_bytes", size(object(config, |object| object.keep_bytes).flatten())),
        ("namespace", policies(config)),
        ("local.spin", time(config.local_spin)),
        ("local.staging_bytes", bytes(config.local_staging_bytes)),
        ("calls.deadline", time(config.call_deadline)),
        ("calls.drain_deadline", time(config.drain_deadline)),
        ("log.level", config.log_level.clone()),
    ]
}

fn nvme<T>(config: &Config, of: impl Fn(&NvmeConfig) -> T) -> Option<T> {
    config.nvme.as_ref().map(of)
}

fn object<T>(config: &Config, of: impl Fn(&ObjectConfig) -> T) -> Option<T> {
    config.object.as_ref().map(of)
}

fn age(config: &Config) -> String {
    let age = object(config, |object| object.keep_age).flatten();
    age.map_or_else(|| "off".to_owned(), |age| humantime::format_duration(age).to_string())
}

fn policies(config: &Config) -> String {
    let policies = config.policies.iter().map(|(name, policy)| format!("{name}: {policy}"));
    policies.collect::<Vec<_>>().join("; ")
}
