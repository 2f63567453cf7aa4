//! Replay: drives a daemon with a trace as an engine would, or simulates its eviction policy.

mod content;
mod drive;
mod simulate;

pub use content::{content, layout, sequence_hash, wrong_bytes};
pub use drive::{Drive, Percentiles, Report, drive};
pub use simulate::{Simulation, simulate};
