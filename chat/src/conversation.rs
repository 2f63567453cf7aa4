//! Names for the beginnings of a conversation: that of a message covers all that comes before it. Nobody has to render anything for them,
//! so that they serve for pictures, for templates that cannot be read, and for other APIs than that of chats.
//!
//! They are one process's own, never stored and never sent.

use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

/// What all messages of a conversation have in common, and a prompt depends on, under the names of three APIs.
const HEAD: [&str; 12] = [
    "tools",
    "tool_choice",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning",
    "reasoning_effort",
    "thinking",
    "system",
    "instructions",
    "previous_response_id",
    "cache_salt",
];
/// What clients add to messages and move on from turn to turn, and no prompt has.
const MARKS: [&str; 2] = ["cache_control", "prompt_cache_breakpoint"];
/// Messages that get names: conversations of agents have some hundreds.
pub const MESSAGES_MAX: usize = 4096;
/// A picture or the like that comes inside of a request counts as so many bytes of text: some hundred to a thousand tokens, whatever its
/// size.
const ITEM_BYTES: u64 = 2048;

/// A conversation's first messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beginning {
    /// Their name.
    pub name: u64,
    /// Bytes of their texts, and of what comes before the first.
    pub bytes: u64,
}

/// The beginnings of the conversation of a request, the shortest first; none where it has no messages. `field`: a field of the request,
/// null where it has none. `model`: the one that is asked for, which may be an adapter. `seed` keeps clients from choosing names.
pub fn beginnings(field: impl Fn(&str) -> Value, model: &str, seed: u64) -> Vec<Beginning> {
    let of_chat = field("messages");
    let messages = if of_chat.is_null() { field("input") } else { of_chat };
    let messages: &[Value] = match &messages {
        Value::Array(messages) => messages,
        // The Responses API has a text for a message of the user.
        Value::String(_) => std::slice::from_ref(&messages),
        _ => return Vec::new(),
    };
    let mut writer = Writer { hash: Xxh3::with_seed(seed), bytes: 0 };
    writer.text(model);
    for name in HEAD {
        let value = field(name);
        if !value.is_null() {
            writer.text(name);
            writer.value(&value);
        }
    }
    let name = |writer: &mut Writer, message: &Value| {
        writer.value(message);
        Beginning { name: writer.hash.digest(), bytes: writer.bytes }
    };
    messages.iter().take(MESSAGES_MAX).map(|message| name(&mut writer, message)).collect()
}

/// Takes values so that none can be taken for another: each with its kind, texts and lists with their lengths.
struct Writer {
    hash: Xxh3,
    bytes: u64,
}

impl Writer {
    fn text(&mut self, text: &str) {
        self.hash.update(&(text.len() as u64).to_le_bytes());
        self.hash.update(text.as_bytes());
        let is_inside = text.starts_with("data:") && text.len() as u64 > ITEM_BYTES;
        self.bytes += if is_inside { ITEM_BYTES } else { text.len() as u64 };
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.hash.update(b"0"),
            Value::Bool(true) => self.hash.update(b"t"),
            Value::Bool(false) => self.hash.update(b"f"),
            Value::Number(number) => {
                self.hash.update(b"n");
                self.text(&number.to_string());
            }
            Value::String(text) => {
                self.hash.update(b"s");
                self.text(text);
            }
            Value::Array(items) => {
                self.hash.update(b"[");
                self.hash.update(&(items.len() as u64).to_le_bytes());
                items.iter().for_each(|item| self.value(item));
            }
            Value::Object(fields) => {
                // Clients send back what they got, without nulls, and in another order.
                let is_said = |name: &str, value: &Value| !value.is_null() && !MARKS.contains(&name);
                let mut fields: Vec<(&str, &Value)> = fields
                    .iter()
                    .map(|(name, value)| (newer(name), value))
                    .filter(|(name, value)| is_said(name, value))
                    .collect();
                fields.sort_by_key(|(name, _)| *name);
                fields.dedup_by_key(|(name, _)| *name);
                self.hash.update(b"{");
                self.hash.update(&(fields.len() as u64).to_le_bytes());
                for (name, value) in fields {
                    self.text(name);
                    self.value(value);
                }
            }
        }
    }
}

/// Thoughts come back under either of two names.
fn newer(name: &str) -> &str {
    if name == "reasoning_content" { "reasoning" } else { name }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names(request: &Value) -> Vec<u64> {
        let field = |name: &str| request.get(name).cloned().unwrap_or(Value::Null);
        beginnings(field, "m", 7).iter().map(|beginning| beginning.name).collect()
    }

    #[test]
    fn a_longer_conversation_begins_with_the_names_of_the_shorter() {
        let short = names(&json!({"messages": [{"role": "user", "content": "a"}]}));
        let long = names(
            &json!({"stream": true, "messages": [{"content": "a", "name": null, "role": "user"}, {"role": "assistant", "content": "b"}]}),
        );
        assert_eq!((short.len(), long.len()), (1, 2));
        assert_eq!(short[0], long[0]);
        assert_eq!(names(&json!({"input": "a"})).len(), 1);
        assert!(names(&json!({"prompt": "a"})).is_empty());
        assert_eq!(names(&json!({"messages": vec![json!({}); MESSAGES_MAX + 1]})).len(), MESSAGES_MAX);
    }

    #[test]
    fn what_a_prompt_depends_on_makes_another_name() {
        let plain = json!({"messages": [{"role": "user", "content": "a"}]});
        let first = |request: &Value| names(request)[0];
        for (field, value) in [
            ("cache_salt", json!("s")),
            ("tools", json!([{"type": "function"}])),
            ("chat_template_kwargs", json!({"a": 1})),
            ("reasoning_effort", json!("low")),
            ("system", json!("a")),
            ("messages", json!([{"role": "system", "content": "a"}])),
            ("messages", json!([{"role": "user", "content": ["a"]}])),
            ("messages", json!([{"role": "user", "content": "a", "b": {}}])),
        ] {
            let mut other = plain.clone();
            other[field] = value;
            assert_ne!(first(&plain), first(&other), "{field}");
        }
        let field = |name: &str| plain.get(name).cloned().unwrap_or(Value::Null);
        assert_ne!(beginnings(field, "m", 7), beginnings(field, "other", 7));
        assert_ne!(beginnings(field, "m", 7), beginnings(field, "m", 8));
    }

    #[test]
    fn marks_and_old_names_do_not_matter_and_pictures_are_no_long_texts() {
        let marked = json!({"messages": [{"role": "assistant", "reasoning_content": "r", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]});
        let plain =
            json!({"messages": [{"role": "assistant", "reasoning": "r", "content": [{"type": "text", "text": "a"}]}]});
        assert_eq!(names(&marked), names(&plain));
        let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{}", "A".repeat(1 << 20))}}]}]);
        let field = |name: &str| if name == "messages" { picture.clone() } else { Value::Null };
        assert!(beginnings(field, "m", 7)[0].bytes < 4096);
    }
}
