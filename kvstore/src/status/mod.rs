//! The status: the daemon at one moment, as one message.
//!
//! `tree.rs` describes each field of the message once: where its value comes from, its unit, its place in the JSON, its metric
//! with the help text. All that shows the status is rendered from the message and these descriptions: the metrics, `/readyz`, and
//! the tables, JSON and live view of the command line, which gets the message over the wire.

mod field;
mod json;
pub mod metrics;
mod ready;
mod text;
mod tree;

pub use field::{Described, Field, Kind, Metric, Node, Unit, Value};
pub use json::to_json;
pub(crate) use ready::ready;
pub use text::fill;
pub use tree::status;
