//! What a request uses, as a few bits: prompts of one shape are right or wrong together, so that one of each is compared with an engine's.

use serde_json::Value;

/// The constructs that a request uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape(u32);

/// By bit, with the names for people.
const NAMES: [&str; 24] = [
    "tools",
    "calls",
    "results",
    "parts",
    "items",
    "reasoning",
    "effort",
    "developer",
    "several systems",
    "system not first",
    "documents",
    "template variables",
    "goes on",
    "no generation prompt",
    "names",
    "null content",
    "no content",
    "refusal",
    "empty calls",
    "several calls",
    "other roles",
    "special tokens",
    "odd arguments",
    "strict tools",
];

impl Shape {
    /// That of a chat request. `field`: a field of it, null where it has none.
    pub fn of(field: impl Fn(&str) -> Value) -> Self {
        let mut shape = Self::default();
        for (name, construct) in
            [("reasoning_effort", "effort"), ("documents", "documents"), ("chat_template_kwargs", "template variables")]
        {
            shape.set_if(!field(name).is_null(), construct);
        }
        shape.set_if(field("continue_final_message") == true, "goes on");
        shape.set_if(field("add_special_tokens") == true, "special tokens");
        shape.set_if(field("add_generation_prompt") == false, "no generation prompt");
        let (tools, messages) = (field("tools"), field("messages"));
        let tools = tools.as_array().map(Vec::as_slice).unwrap_or_default();
        shape.set_if(!tools.is_empty(), "tools");
        let is_strict = |tool: &Value| tool.pointer("/function/strict").is_some();
        shape.set_if(tools.iter().any(is_strict), "strict tools");
        let mut systems = 0;
        for (at, message) in messages.as_array().into_iter().flatten().enumerate() {
            shape.message(message);
            if message.get("role").and_then(Value::as_str) == Some("system") {
                systems += 1;
                shape.set_if(at > 0, "system not first");
            }
        }
        shape.set_if(systems > 1, "several systems");
        shape
    }

    fn set_if(&mut self, condition: bool, name: &str) {
        if let Some(bit) = NAMES.iter().position(|known| condition && *known == name) {
            self.0 |= 1 << bit;
        }
    }

    fn message(&mut self, message: &Value) {
        match message.get("role").and_then(Value::as_str) {
            Some("user" | "assistant" | "system") => {}
            Some("tool") => self.set_if(true, "results"),
            Some("developer") => self.set_if(true, "developer"),
            _ => self.set_if(true, "other roles"),
        }
        match message.get("content") {
            None => self.set_if(true, "no content"),
            Some(Value::Null) => self.set_if(true, "null content"),
            Some(Value::Array(parts)) => {
                let is_text = |part: &Value| part.get("text").is_some();
                self.set_if(true, "parts");
                self.set_if(!parts.iter().all(is_text), "items");
            }
            Some(_) => {}
        }
        let is_set = |key: &str| message.get(key).is_some_and(|value| !value.is_null());
        self.set_if(is_set("reasoning") || is_set("reasoning_content"), "reasoning");
        self.set_if(is_set("name"), "names");
        self.set_if(message.get("refusal").is_some(), "refusal");
        let Some(calls) = message.get("tool_calls").and_then(Value::as_array) else { return };
        self.set_if(calls.is_empty(), "empty calls");
        self.set_if(!calls.is_empty(), "calls");
        self.set_if(calls.len() > 1, "several calls");
        let is_odd = |call: &Value| {
            let arguments = call.pointer("/function/arguments").and_then(Value::as_str);
            !arguments.is_some_and(|text| text.trim_start().starts_with('{'))
        };
        self.set_if(calls.iter().any(is_odd), "odd arguments");
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bits = NAMES.iter().enumerate().filter(|(bit, _)| self.0 >> bit & 1 == 1);
        let used: Vec<&str> = bits.map(|(_, name)| *name).collect();
        if used.is_empty() { f.write_str("plain") } else { f.write_str(&used.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shape(request: &Value) -> String {
        Shape::of(|name| request.get(name).cloned().unwrap_or(Value::Null)).to_string()
    }

    #[test]
    fn a_shape_says_what_a_request_uses() {
        assert_eq!(shape(&json!({"messages": [{"role": "user", "content": "a"}]})), "plain");
        let agent = json!({"tools": [{"function": {"name": "f"}}], "messages": [{"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": [{"type": "text", "text": "a"}]}]});
        assert_eq!(shape(&agent), "tools, calls, results, parts, null content");
        let odd = json!({"reasoning_effort": "low", "continue_final_message": true, "add_generation_prompt": false, "messages": [
            {"role": "user", "content": [{"type": "image_url"}], "name": "n"}, {"role": "system", "content": ""}, {"role": "critic"},
            {"role": "assistant", "reasoning": "r", "refusal": null, "tool_calls": [{"function": {"arguments": "[]"}}, {"function": {"arguments": "{}"}}]}]});
        assert_eq!(
            shape(&odd),
            "calls, parts, items, reasoning, effort, system not first, goes on, no generation prompt, names, no content, refusal, several calls, other roles, odd arguments"
        );
    }

    #[test]
    fn every_name_has_a_bit() {
        for name in NAMES {
            let mut shape = Shape::default();
            shape.set_if(true, name);
            assert_eq!(shape.to_string(), name);
        }
    }
}
