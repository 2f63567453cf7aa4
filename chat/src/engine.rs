//! Which engine makes a prompt, and why a prompt of it is not known. vLLM and SGLang make two prompts of one request.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::value::{Dict, Value};

/// The engine that a worker runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// vLLM, and engines that make its prompts.
    #[default]
    Vllm,
    /// SGLang.
    Sglang,
}

impl Engine {
    /// The one that lists its models as its own: the field `owned_by` of `/v1/models`. `None`: some other server.
    pub fn of_owner(owner: &str) -> Option<Self> {
        owner.parse().ok()
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "vllm" => Ok(Self::Vllm),
            "sglang" => Ok(Self::Sglang),
            _ => Err(format!("{text:?} is no engine whose prompts are known; use vllm or sglang")),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        })
    }
}

/// Why the prompt that an engine makes of a request is not known here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotKnown {
    /// The engine refuses such a request.
    #[error("the engine refuses the request: {0}")]
    Refused(String),
    /// There is more than text in it, and the engine decides what stands for that.
    #[error("a message has a part of the type {0:?}, which the engine alone can put into its prompt")]
    Media(String),
    /// An argument of the engine's own, not of the template.
    #[error("chat_template_kwargs has {0:?}, which is an argument of the engine, not of the template")]
    Argument(String),
    /// The engine takes it, perhaps, and what it makes of it is not followed here.
    #[error("{0} is not followed here")]
    Unsupported(String),
}

/// Arguments of the function that renders, which are not the template's.
pub(crate) const ARGUMENTS: [&str; 11] = [
    "conversation",
    "messages",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// Those that an engine gives to it by itself.
pub(crate) const TWICE: [&str; 3] = ["tools", "add_generation_prompt", "continue_final_message"];

pub(crate) fn refused<T>(why: impl Into<String>) -> Result<T, NotKnown> {
    Err(NotKnown::Refused(why.into()))
}

pub(crate) fn unsupported<T>(what: impl Into<String>) -> Result<T, NotKnown> {
    Err(NotKnown::Unsupported(what.into()))
}

pub(crate) fn object<'a>(value: &'a Value, what: &str) -> Result<&'a Dict, NotKnown> {
    value.as_dict().map_or_else(|| refused(format!("{what} is no object")), Ok)
}

pub(crate) fn given<'a>(from: &'a Dict, name: &str) -> Option<&'a Value> {
    from.get(name).filter(|value| !value.is_none())
}

pub(crate) fn flag(from: &Dict, name: &str, unsaid: bool) -> Result<bool, NotKnown> {
    match from.get(name) {
        None => Ok(unsaid),
        Some(Value::Bool(said)) => Ok(*said),
        Some(_) => refused(format!("{name} is neither true nor false")),
    }
}
