//! The daemon and its command line: policy and process. The crates below it do what it tells them: none of
//! them reads a configuration, speaks the wire or logs to an operator.

mod accesses;
pub mod advise;
mod authority;
mod caller;
mod calls;
pub mod caps;
pub mod cli;
mod clock;
pub mod config;
mod connections;
mod copy_rate;
pub mod daemon;
pub mod data_calls;
mod describing;
mod descriptors;
mod http;
mod listeners;
pub mod local;
mod log;
mod open;
mod prefetches;
mod prewarms;
pub mod publisher;
mod random;
pub mod replay;
pub mod serve;
mod service;
mod sources;
pub mod status;
pub mod telemetry;
mod tick;
pub mod trace;
mod verbs;
mod wire;
