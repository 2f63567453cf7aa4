//! What the daemon does when asked: one verb, one file.

pub mod delete;
pub mod get;
pub mod lookup;
pub mod pin;
pub mod prefetch;
pub mod promote;
pub mod put;
pub mod register_layout;
pub mod status;
pub mod verify;
