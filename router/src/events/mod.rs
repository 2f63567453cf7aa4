//! What engines say of the blocks in their own memory, and what nodes say of theirs.

mod engine;
mod learnt;
pub mod subscriber;
pub mod vllm;

pub use engine::{EngineCounts, EngineGroup, EngineView, Memory, Naming};
