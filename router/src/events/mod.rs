//! What engines say of the blocks in their own memory, and what nodes say of theirs.

pub mod vllm;
