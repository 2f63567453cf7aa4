//! The configuration as it is written, and the checks that turn it into what the daemon trusts.

use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_tiers::HugePages;
use kvstore_tiers::caps::{HOST_BYTES_MIN, NAMESPACES_MAX};
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::HostLimits;
use serde::{Deserialize, Serialize};

use super::{Address, Config, ConfigError, Listener, LogFormat, invalid, machine};
use crate::caps;

/// Every key, as text that has yet to be checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    host: RawHost,
    calls: RawCalls,
    http: RawHttp,
    log: RawLog,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    listen: Vec<RawListener>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawHost {
    bytes: String,
    high_watermark_percent: u32,
    low_watermark_percent: u32,
    huge_pages: String,
    eviction: String,
}

impl Default for RawHost {
    fn default() -> Self {
        Self {
            bytes: "auto".into(),
            high_watermark_percent: 99,
            low_watermark_percent: 98,
            huge_pages: "auto".into(),
            eviction: "hazard".into(),
        }
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
            return Err(invalid(key, format!("unknown key; valid are {}", known.join(", "))));
        }
        let (section, name) = key.split_once('.').unwrap_or((key, ""));
        let mut whole = toml::Value::try_from(&*self).map_err(|error| invalid(key, error.to_string()))?;
        let slot = whole.get_mut(section).and_then(|section| section.get_mut(name));
        let Some(slot) = slot else { return Err(invalid(key, "unknown key")) };
        *slot = match slot {
            toml::Value::Integer(_) => toml::Value::Integer(
                value.parse().map_err(|_| invalid(key, format!("{value:?} is not a whole number")))?,
            ),
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

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// Checks every value.
    pub fn check(&self) -> Result<Config, ConfigError> {
        let host = self.host.check()?;
        let listeners = self.check_listeners()?;
        let huge_pages = match self.host.huge_pages.as_str() {
            "auto" => HugePages::Auto,
            "off" => HugePages::Off,
            other => return Err(invalid("host.huge_pages", format!("{other:?} is not \"auto\" or \"off\""))),
        };
        let log_format = match self.log.format.as_str() {
            "human" => LogFormat::Human,
            "json" => LogFormat::Json,
            other => return Err(invalid("log.format", format!("{other:?} is not \"human\" or \"json\""))),
        };
        tracing_subscriber::EnvFilter::from_str(&self.log.level)
            .map_err(|error| invalid("log.level", format!("{:?}: {error}", self.log.level)))?;
        let http = match self.http.address.as_str() {
            "off" => None,
            address => Some(loopback("http.address", address)?),
        };
        Ok(Config {
            host,
            huge_pages,
            eviction: PolicyKind::from_str(&self.host.eviction).map_err(|problem| invalid("host.eviction", problem))?,
            listeners,
            http,
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
            return Err(invalid("listen", format!("at most {NAMESPACES_MAX} listeners, not {}", self.listen.len())));
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
                format!("{} is less than the least, {}", ByteSize(bytes), ByteSize(HOST_BYTES_MIN)),
            ));
        }
        if bytes > machine_bytes {
            let problem =
                format!("{} is more than this machine's memory, {}", ByteSize(bytes), ByteSize(machine_bytes));
            return Err(invalid("host.bytes", problem));
        }
        let (high, low) = (self.high_watermark_percent, self.low_watermark_percent);
        if !(1..=100).contains(&high) {
            return Err(invalid("host.high_watermark_percent", format!("{high} is not within 1 to 100")));
        }
        if low >= high {
            let problem = format!("{low} must be below host.high_watermark_percent, {high}");
            return Err(invalid("host.low_watermark_percent", problem));
        }
        Ok(HostLimits { bytes, high_watermark_percent: high, low_watermark_percent: low })
    }
}

impl RawListener {
    fn check(&self) -> Result<Listener, ConfigError> {
        let namespace = self.namespace.clone();
        let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if namespace.is_empty() || namespace.len() > 64 || !namespace.chars().all(sound) {
            let problem = format!("{namespace:?} is not 1 to 64 letters, digits, '-', '_' or '.'");
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
        return Err(invalid("listen.address", format!("unix:{} is not an absolute path of a socket", path.display())));
    }
    // sun_path has 108 bytes with its final zero.
    if path.as_os_str().len() > 107 {
        return Err(invalid(
            "listen.address",
            format!("{} is longer than a socket's path may be, 107 bytes", path.display()),
        ));
    }
    Ok(path)
}

fn loopback(key: &str, text: &str) -> Result<std::net::SocketAddr, ConfigError> {
    let address = text
        .to_socket_addrs()
        .ok()
        .and_then(|mut addresses| addresses.next())
        .ok_or_else(|| invalid(key, format!("{text:?} is neither unix:/path nor host:port")))?;
    if !address.ip().is_loopback() {
        let problem =
            format!("{address} is not a loopback address: others need mutual TLS, which this version does not have");
        return Err(invalid(key, problem));
    }
    Ok(address)
}

fn duration(key: &str, text: &str) -> Result<Duration, ConfigError> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| invalid(key, format!("{text:?} is not a duration such as \"30s\"")))?;
    if duration.is_zero() || duration > caps::DEADLINE_MAX {
        let longest = humantime::format_duration(caps::DEADLINE_MAX);
        return Err(invalid(key, format!("{text:?} is not within 1ms to {longest}")));
    }
    Ok(duration)
}
