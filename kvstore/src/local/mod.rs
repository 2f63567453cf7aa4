//! The local plane: engines on this node read blocks where they lie, without asking, and command the daemon through rings
//! in shared memory. `docs/design/local-plane.md` has the protocol.
//!
//! One thread polls: listeners, sockets, the ends of processes, and the rings. It copies what clients stage; whatever waits is
//! a task of the runtime. While commands come it looks at the rings without sleeping, for as long as the configuration says
//! after the last; then it sleeps until a client kicks it.

mod client;
mod commands;
mod peer;
mod server;
mod socket;
mod stage;

pub use server::{Plane, start};
pub use socket::{PlaneListener, plane_path};
