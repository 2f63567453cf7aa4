//! What a session is called: its namespace and its request's id.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::manifest::Refused;

/// Bytes of either part: names of objects have a bound, and file systems a lower one.
const PART_BYTES_MAX: usize = 128;

/// See the head of this file. An id names one session, and is not used again once that has been closed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name {
    pub(super) namespace: String,
    pub(super) id: String,
}

/// Whether a text can be a part of a name, and of an object's.
pub(super) fn is_part(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=PART_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_plain) && text != "." && text != ".."
}

impl Name {
    /// Of these parts, each of 1 to 128 letters, digits, `.`, `_` and `-`.
    pub fn new(namespace: &str, id: &str) -> Result<Self, Refused> {
        let name = Self { namespace: namespace.to_owned(), id: id.to_owned() };
        name.check()?;
        Ok(name)
    }

    pub(super) fn check(&self) -> Result<(), Refused> {
        for (part, what) in [(&self.namespace, "namespace"), (&self.id, "id")] {
            if !is_part(part) {
                let shown: String = part.chars().take(PART_BYTES_MAX).collect();
                return Err(Refused(format!(
                    "{shown:?} cannot be a session's {what}: use 1 to 128 letters, digits, '.', '_' and '-'"
                )));
            }
        }
        Ok(())
    }

    /// Whose it is.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The request's id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.namespace, self.id)
    }
}
