//! The snapshots' part of the configuration.

use kvstore_tiers::Tier;
use kvstore_tiers::object::ObjectUrl;

use super::object::options;
use super::raw::RawSnapshots;
use super::{ConfigError, Listener, PrewarmConfig, SnapshotsConfig, invalid};

impl RawSnapshots {
    pub(super) fn check(&self, listeners: &[Listener], has_disk: bool) -> Result<Option<SnapshotsConfig>, ConfigError> {
        let asked = self.prewarm.iter().filter(|name| !name.is_empty());
        let prewarm = asked.map(|text| prewarm(text, has_disk)).collect::<Result<Vec<_>, _>>()?;
        let options = options("snapshots.options", &self.options)?;
        if self.url == "off" {
            return match prewarm.first() {
                Some(_) => Err(invalid("snapshots.prewarm", "there is no store of snapshots: set snapshots.url, too")),
                None => Ok(None),
            };
        }
        let namespace = self.namespace.clone();
        if !prewarm.is_empty() && !listeners.iter().any(|listener| listener.namespace == namespace) {
            return Err(invalid(
                "snapshots.namespace",
                format!("no [[listen]] has the namespace {namespace:?}: add one"),
            ));
        }
        let url = ObjectUrl { url: self.url.clone(), options };
        url.open().map_err(|error| invalid("snapshots.url", error.to_string()))?;
        Ok(Some(SnapshotsConfig { url, namespace, prewarm }))
    }
}

/// `NAME`, or `NAME:disk`.
fn prewarm(text: &str, has_disk: bool) -> Result<PrewarmConfig, ConfigError> {
    let (snapshot, tier) = match text.split_once(':') {
        None | Some((_, "memory")) => (text.trim_end_matches(":memory"), Tier::Host),
        Some((snapshot, "disk")) if has_disk => (snapshot, Tier::Nvme),
        Some((_, "disk")) => {
            let problem = format!("{text:?} needs a disk, and this daemon has none: set nvme.paths");
            return Err(invalid("snapshots.prewarm", problem));
        }
        Some(_) => {
            let problem = format!("{text:?} is neither NAME, NAME:memory nor NAME:disk");
            return Err(invalid("snapshots.prewarm", problem));
        }
    };
    Ok(PrewarmConfig { snapshot: snapshot.to_owned(), tier })
}
