//! The daemon and its command line: policy and process. The crates below it do what it tells them: none of
//! them reads a configuration, speaks the wire or logs to an operator.

mod accesses;
pub mod advise;
pub mod caps;
pub mod cli;
mod clock;
pub mod config;
pub mod daemon;
mod http;
pub mod local;
pub mod publisher;
pub mod replay;
pub mod serve;
mod server;
mod service;
pub mod telemetry;
pub mod trace;
mod verbs;
mod wire;
