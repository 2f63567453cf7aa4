//! Policies of single namespaces. They override the settings for all namespaces.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_tiers::admission::Admission;
use kvstore_tiers::caps::{HELD_PERCENT_MAX, HOST_BYTES_MIN, TTL_MS_MAX, TTL_MS_MIN};
use kvstore_tiers::host::HostLimits;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Listener, NvmeConfig, ObjectConfig, invalid};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNamespace {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    admit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    promote_after: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_bytes: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nvme_bytes: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin_percent: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_age: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_bytes: Option<String>,
}

/// What holds for one namespace; `None`: as the configuration says of all.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct NamespacePolicy {
    /// Which of its blocks go to disk.
    pub admission: Option<Admission>,
    /// What is read from the bucket goes to disk once this many requests asked for it.
    pub promote_after: Option<u8>,
    /// Which of its blocks go to the bucket.
    pub uploads: Option<Admission>,
    /// Bytes of its slabs in memory at most.
    pub host_bytes: Option<u64>,
    /// Bytes of its blocks on disk at most.
    pub nvme_bytes: Option<u64>,
    /// At most this part of the memory may be pinned, in percent.
    pub pin_percent: Option<u64>,
    /// What nobody stored or asked for in this long leaves memory and disk.
    pub ttl: Option<Duration>,
    /// What is older goes from the bucket.
    pub keep_age: Option<Duration>,
    /// The oldest goes from the bucket until no more is left.
    pub keep_bytes: Option<u64>,
}

impl std::fmt::Display for NamespacePolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = |bytes: u64| ByteSize(bytes).to_string();
        let time = |time: Duration| humantime::format_duration(time).to_string();
        let set = [
            ("admit", self.admission.map(|admission| admission.name().to_owned())),
            ("promote_after", self.promote_after.map(|requests| requests.to_string())),
            ("upload", self.uploads.map(|uploads| uploads.name().to_owned())),
            ("host_bytes", self.host_bytes.map(size)),
            ("nvme_bytes", self.nvme_bytes.map(size)),
            ("pin_percent", self.pin_percent.map(|percent| percent.to_string())),
            ("ttl", self.ttl.map(time)),
            ("keep_age", self.keep_age.map(time)),
            ("keep_bytes", self.keep_bytes.map(size)),
        ];
        let set: Vec<String> = set.into_iter().filter_map(|(key, value)| Some(format!("{key} {}", value?))).collect();
        f.write_str(if set.is_empty() { "the settings for all namespaces" } else { "" })?;
        f.write_str(&set.join(", "))
    }
}

/// The tiers that a namespace's policy is about.
pub(super) struct Tiers<'a> {
    pub host: &'a HostLimits,
    pub nvme: Option<&'a NvmeConfig>,
    pub object: Option<&'a ObjectConfig>,
}

pub(super) fn check(
    raw: &[RawNamespace],
    tiers: &Tiers<'_>,
    listeners: &[Listener],
) -> Result<BTreeMap<String, NamespacePolicy>, ConfigError> {
    let mut policies = BTreeMap::new();
    for namespace in raw {
        let name = &namespace.name;
        if !listeners.iter().any(|listener| listener.namespace == *name) {
            return Err(invalid("namespace.name", format!("no [[listen]] has the namespace {name:?}: add one")));
        }
        if policies.insert(name.clone(), namespace.check(tiers)?).is_some() {
            return Err(invalid("namespace.name", format!("{name:?} is listed twice: keep one [[namespace]] for it")));
        }
    }
    Ok(policies)
}

impl RawNamespace {
    fn wrong(&self, key: &str, problem: impl std::fmt::Display) -> ConfigError {
        invalid(&format!("namespace.{key}"), format!("{:?}: {problem}", self.name))
    }

    fn check(&self, tiers: &Tiers<'_>) -> Result<NamespacePolicy, ConfigError> {
        let needs_disk = [
            ("admit", self.admit.is_some()),
            ("promote_after", self.promote_after.is_some()),
            ("nvme_bytes", self.nvme_bytes.is_some()),
        ];
        let needs_bucket = [
            ("upload", self.upload.is_some()),
            ("keep_age", self.keep_age.is_some()),
            ("keep_bytes", self.keep_bytes.is_some()),
            ("promote_after", self.promote_after.is_some()),
        ];
        if let Some((key, _)) = needs_disk.into_iter().find(|(_, set)| *set && tiers.nvme.is_none()) {
            return Err(self.wrong(key, "this key needs an Nvme tier: set nvme.paths, or remove the key"));
        }
        if let Some((key, _)) = needs_bucket.into_iter().find(|(_, set)| *set && tiers.object.is_none()) {
            return Err(self.wrong(key, "this key needs an object store: set object.url, or remove the key"));
        }
        if self.promote_after == Some(0) {
            return Err(self.wrong("promote_after", "0 is out of range: it must be 1 to 255 requests"));
        }
        if let Some(percent) = self.pin_percent.filter(|percent| *percent > HELD_PERCENT_MAX) {
            return Err(
                self.wrong("pin_percent", format!("{percent} is out of range: it must be 0 to {HELD_PERCENT_MAX}"))
            );
        }
        let disk = tiers.nvme.map_or(0, |nvme| nvme.bytes * nvme.paths.len() as u64);
        Ok(NamespacePolicy {
            admission: self.named("admit", self.admit.as_deref())?,
            promote_after: self.promote_after,
            uploads: self.named("upload", self.upload.as_deref())?,
            host_bytes: self.size("host_bytes", self.host_bytes.as_deref(), HOST_BYTES_MIN, tiers.host.bytes)?,
            nvme_bytes: self.size("nvme_bytes", self.nvme_bytes.as_deref(), 1 << 20, disk)?,
            pin_percent: self.pin_percent,
            ttl: self.time("ttl", self.ttl.as_deref(), TTL_MS_MIN)?,
            keep_age: self.time("keep_age", self.keep_age.as_deref(), 1)?,
            keep_bytes: self.size("keep_bytes", self.keep_bytes.as_deref(), 0, u64::MAX)?,
        })
    }

    fn named<T: FromStr<Err = String>>(&self, key: &str, text: Option<&str>) -> Result<Option<T>, ConfigError> {
        text.map(|text| T::from_str(text).map_err(|problem| self.wrong(key, problem))).transpose()
    }

    fn size(&self, key: &str, text: Option<&str>, least: u64, most: u64) -> Result<Option<u64>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        let bytes = ByteSize::from_str(text).ok().map(|size| size.as_u64());
        match bytes.filter(|bytes| (least..=most).contains(bytes)) {
            None if most == u64::MAX => Err(self.wrong(key, format!("{text:?} is not a size such as \"10TiB\""))),
            None => {
                let (least, most) = (ByteSize(least), ByteSize(most));
                Err(self.wrong(key, format!("{text:?} must be a size from {least} to the size of the tier, {most}")))
            }
            bytes => Ok(bytes),
        }
    }

    fn time(&self, key: &str, text: Option<&str>, least_ms: u64) -> Result<Option<Duration>, ConfigError> {
        let Some(text) = text else { return Ok(None) };
        let time = humantime::parse_duration(text).ok();
        let sound = time.filter(|time| (u128::from(least_ms)..=u128::from(TTL_MS_MAX)).contains(&time.as_millis()));
        let least = humantime::format_duration(Duration::from_millis(least_ms));
        let problem = || self.wrong(key, format!("{text:?} is not a duration such as \"6h\", from {least} to a year"));
        sound.map(Some).ok_or_else(problem)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::RawConfig;

    /// Each says whose policy it is, what is wrong, and what would be valid.
    #[test]
    fn mistakes_are_named() {
        let head = "[[listen]]\naddress = \"unix:/tmp/a.sock\"\nnamespace = \"a\"\n[[namespace]]\nname = \"a\"\n";
        let tiers = "[nvme]\npaths = [\"/tmp/kvstore-none\"]\nbytes = \"64MiB\"\n[object]\nurl = \"file:///tmp/kvstore-none\"\n";
        let cases = [
            ("[nvme]\npaths = [\"off\"]\n", "admit = \"all\"", "set nvme.paths"),
            ("[nvme]\npaths = [\"off\"]\n", "nvme_bytes = \"10MiB\"", "set nvme.paths"),
            ("[nvme]\npaths = [\"off\"]\n", "keep_age = \"1d\"", "set object.url"),
            (tiers, "admit = \"some\"", "\"evicted\""),
            (tiers, "upload = \"some\"", "\"reused\""),
            (tiers, "promote_after = 0", "must be 1 to 255"),
            (tiers, "nvme_bytes = \"1TiB\"", "the size of the tier, 64.0 MiB"),
            (tiers, "host_bytes = \"1KiB\"", "namespace.host_bytes"),
            (tiers, "pin_percent = 99", "0 to 50"),
            (tiers, "ttl = \"1s\"", "from 10s to a year"),
            (tiers, "ttl = \"forever\"", "such as \"6h\""),
            (tiers, "keep_bytes = \"many\"", "such as \"10TiB\""),
        ];
        for (tiers, line, expected) in cases {
            let error = RawConfig::parse("test", &format!("{head}{line}\n{tiers}")).unwrap().check().unwrap_err();
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("\"a\""), "{line}: {text}");
        }
        let all = "admit = \"evicted\"\nupload = \"evicted\"\npromote_after = 3\nhost_bytes = \"8MiB\"\nnvme_bytes = \"16MiB\"\n\
                   pin_percent = 5\nttl = \"6h\"\nkeep_age = \"2d\"\nkeep_bytes = \"1TiB\"\n";
        let config = RawConfig::parse("test", &format!("{head}{all}{tiers}")).unwrap().check().unwrap();
        let expected = "admit evicted, promote_after 3, upload evicted, host_bytes 8.0 MiB, nvme_bytes 16.0 MiB, pin_percent 5, \
                        ttl 6h, keep_age 2days, keep_bytes 1.0 TiB";
        assert_eq!(config.policies["a"].to_string(), expected);
    }
}
