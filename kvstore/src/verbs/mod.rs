//! The verbs of the daemon, each in its own file.

pub mod collect;
pub mod delete;
pub mod describe;
pub mod get;
pub mod lookup;
pub mod pin;
pub mod prefetch;
pub mod put;
pub mod register_layout;
pub mod verify;
pub mod watch;
