//! The local plane: engines on this node read blocks in place, without a call to the daemon, and send it commands through rings
//! in shared memory. `docs/design/local-plane.md` describes the protocol.
//!
//! One thread polls the listeners, the sockets, the ends of processes, and the rings. It copies the bytes that clients stage.
//! Work that must wait runs in a task of the runtime. While commands come, the thread looks at the rings without sleeping. After
//! the last command it goes on for as long as the configuration says, then sleeps until a client kicks it.

mod client;
mod commands;
mod peer;
mod server;
mod socket;
mod stage;

pub use server::{Plane, start};
pub use socket::{PlaneListener, plane_path};
