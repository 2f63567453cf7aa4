//! Policies of single namespaces, over what holds for all.

use std::collections::BTreeMap;
use std::str::FromStr;

use bytesize::ByteSize;
use kvstore_tiers::caps::{HELD_PERCENT_MAX, HOST_BYTES_MIN};
use kvstore_tiers::host::{HostLimits, NamespaceLimits};
use serde::{Deserialize, Serialize};

use super::{ConfigError, Listener, ObjectConfig, Uploads, invalid};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNamespace {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_bytes: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin_percent: Option<u64>,
}

/// What holds for one namespace.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct NamespacePolicy {
    /// Which of its blocks go to the bucket; `None`: as the configuration says of all.
    pub uploads: Option<Uploads>,
    /// Of the Host tier.
    pub limits: NamespaceLimits,
}

impl std::fmt::Display for NamespacePolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let uploads = self.uploads.map_or("as all", Uploads::name);
        let bytes = self.limits.bytes.map_or_else(|| "any".to_owned(), |bytes| ByteSize(bytes).to_string());
        write!(f, "upload {uploads}, host_bytes {bytes}, pin_percent {}", self.limits.held_percent)
    }
}

pub(super) fn check(
    raw: &[RawNamespace],
    host: &HostLimits,
    object: Option<&ObjectConfig>,
    listeners: &[Listener],
) -> Result<BTreeMap<String, NamespacePolicy>, ConfigError> {
    let mut policies = BTreeMap::new();
    for namespace in raw {
        let name = &namespace.name;
        if !listeners.iter().any(|listener| listener.namespace == *name) {
            return Err(invalid("namespace.name", format!("{name:?} is the namespace of no [[listen]]")));
        }
        let uploads = match namespace.upload.as_deref() {
            None => None,
            Some(_) if object.is_none() => {
                return Err(invalid("namespace.upload", format!("{name:?}: there is no object.url to upload to")));
            }
            Some(text) => Some(
                Uploads::from_str(text)
                    .map_err(|problem| invalid("namespace.upload", format!("{name:?}: {problem}")))?,
            ),
        };
        let bytes = namespace.host_bytes.as_deref().map(|text| {
            let bytes = ByteSize::from_str(text).map(|size| size.as_u64()).ok();
            let (least, most) = (ByteSize(HOST_BYTES_MIN), ByteSize(host.bytes));
            bytes.filter(|bytes| (HOST_BYTES_MIN..=host.bytes).contains(bytes)).ok_or_else(|| {
                let problem = format!("{name:?}: {text:?} is not a size within {least} and host.bytes, {most}");
                invalid("namespace.host_bytes", problem)
            })
        });
        let held_percent = namespace.pin_percent.unwrap_or(HELD_PERCENT_MAX);
        if held_percent > HELD_PERCENT_MAX {
            let problem = format!("{name:?}: {held_percent} is not within 0 to {HELD_PERCENT_MAX}");
            return Err(invalid("namespace.pin_percent", problem));
        }
        let limits = NamespaceLimits { bytes: bytes.transpose()?, held_percent };
        if policies.insert(name.clone(), NamespacePolicy { uploads, limits }).is_some() {
            return Err(invalid("namespace.name", format!("{name:?} is listed twice")));
        }
    }
    Ok(policies)
}
