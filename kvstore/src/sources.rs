//! The configuration in force, and its sources: they are read again, and keys are changed, while the daemon runs.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::config::{self, Change, Config, ConfigError, RawConfig};

/// Where the configuration comes from, to read it again.
pub struct Sources {
    /// The file.
    pub file: Option<PathBuf>,
    /// `--set` flags.
    pub settings: Vec<String>,
    /// `--listen` flags.
    pub listen: Vec<String>,
    /// What is in force, as written.
    pub raw: RawConfig,
}

impl Sources {
    /// Reads file, environment and flags anew.
    pub fn read(&self) -> Result<RawConfig, ConfigError> {
        let mut raw = config::load_raw(self.file.as_deref(), std::env::vars(), &self.settings)?;
        if !self.listen.is_empty() {
            raw.listen_on(&self.listen);
        }
        Ok(raw)
    }
}

/// The configuration in force. One change at a time, all or nothing.
pub struct InForce {
    config: ArcSwap<Config>,
    sources: Mutex<Sources>,
}

impl InForce {
    /// This one, checked from these sources.
    pub fn new(config: Config, sources: Sources) -> Self {
        Self { config: ArcSwap::from_pointee(config), sources: Mutex::new(sources) }
    }

    /// What is in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// The same, as TOML, without secrets.
    pub fn toml(&self) -> String {
        self.sources.lock().raw.without_secrets().to_toml()
    }

    /// Reads the sources again; `apply` does what the changes ask for, or refuses them.
    pub fn reload(&self, apply: impl FnOnce(&Config) -> Result<(), ConfigError>) -> Result<Vec<Change>, ConfigError> {
        let mut sources = self.sources.lock();
        let raw = sources.read()?;
        self.change(&mut sources, raw, apply)
    }

    /// Changes keys that may change live; `apply` does what the changes ask for, or refuses them.
    pub fn set(
        &self,
        values: &[(String, String)],
        apply: impl FnOnce(&Config) -> Result<(), ConfigError>,
    ) -> Result<Vec<Change>, ConfigError> {
        let mut sources = self.sources.lock();
        let mut raw = sources.raw.clone();
        for (key, value) in values {
            raw.set(key, value)?;
        }
        self.change(&mut sources, raw, apply)
    }

    fn change(
        &self,
        sources: &mut Sources,
        raw: RawConfig,
        apply: impl FnOnce(&Config) -> Result<(), ConfigError>,
    ) -> Result<Vec<Change>, ConfigError> {
        let new = raw.check()?;
        let changes = config::changes(&self.config.load(), &new)?;
        apply(&new)?;
        self.config.store(Arc::new(new));
        sources.raw = raw;
        for change in &changes {
            tracing::info!(key = change.key, from = change.from, to = change.to, "configuration changed");
        }
        Ok(changes)
    }
}
