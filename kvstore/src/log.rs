//! Logs to standard error, and the filter that can be changed while the daemon runs.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::LogFormat;

/// Changes the log filter while it runs.
#[derive(Clone, Default)]
pub struct LogControl(Option<reload::Handle<EnvFilter, Registry>>);

impl LogControl {
    /// Sets the filter; its text was checked with the configuration.
    pub fn set_level(&self, level: &str) {
        if let (Some(handle), Ok(filter)) = (&self.0, level.parse::<EnvFilter>()) {
            let _ = handle.reload(filter);
        }
    }
}

/// Starts logging to standard error. Does nothing the second time in a process.
pub fn start_logging(level: &str, format: LogFormat) -> LogControl {
    let filter = level.parse::<EnvFilter>().unwrap_or_default();
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        LogFormat::Human => {
            let colours = std::io::stderr().is_terminal();
            registry.with(fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colours)).try_init()
        }
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    LogControl(started.is_ok().then_some(handle))
}
