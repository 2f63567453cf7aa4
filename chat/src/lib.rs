//! The prompt that an engine makes of a request: a model's files, what a template gets of a conversation, and the tokens of a text. It
//! knows no HTTP.

#![forbid(unsafe_code)]

pub mod caps;
pub mod conversation;
pub mod engine;
pub mod files;
pub mod jinja;
pub mod json;
pub mod prompts;
pub mod sglang;
pub mod shape;
pub mod tokenize;
pub mod value;
pub mod vllm;
