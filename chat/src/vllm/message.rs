//! One message: which of vLLM's classes it becomes, and what is made of it for templates. Classes keep keys that they do not
//! know, behind those that they do; what decides is which parts of a content, and which values, a class takes.

use std::borrow::Cow;

use super::{Form, NotKnown, calls, object, parts, refused, tools, unsupported};
use crate::value::{Dict, Value};

fn is_text(value: &Value) -> bool {
    value.as_str().is_some()
}

fn is_text_or_none(value: &Value) -> bool {
    value.is_none() || is_text(value)
}

/// Whether a field takes a value.
type Fits = fn(&Value) -> bool;
/// The fields that an item of a list sets, where its class takes it.
type Fields = fn(&Value) -> Option<usize>;

/// The old name of a field is read as the new one.
fn renamed(message: &Dict) -> Cow<'_, Dict> {
    if !message.contains("reasoning_content") {
        return Cow::Borrowed(message);
    }
    let mut message = message.clone();
    let old = message.remove("reasoning_content").filter(|old| !old.is_none());
    if let (Some(old), None | Some(Value::None)) = (old, message.get("reasoning")) {
        message.insert("reasoning", old);
    }
    Cow::Owned(message)
}

/// The fields that vLLM's own class counts in a message; `None` where it does not take it.
fn fields_of_custom(message: &Dict) -> Option<usize> {
    let checks: [(&str, Fits); 5] = [
        ("role", is_text),
        ("name", is_text),
        ("tool_call_id", is_text_or_none),
        ("reasoning", is_text_or_none),
        ("task", is_text_or_none),
    ];
    let mut count = 0;
    for (key, fits) in checks {
        if let Some(value) = message.get(key) {
            fits(value).then_some(())?;
            count += 1;
        }
    }
    message.get("role")?;
    let lists: [(&str, bool, Fields); 3] =
        [("content", false, parts::fields), ("tool_calls", true, calls::fields), ("tools", true, tools::fields)];
    for (key, or_none, of_item) in lists {
        count += match message.get(key) {
            None => 0,
            Some(Value::None) if or_none => 1,
            Some(Value::Str(_)) if key == "content" => 1,
            Some(Value::List(items)) => items.iter().map(of_item).sum::<Option<usize>>()? + 1,
            Some(_) => return None,
        };
    }
    Some(count)
}

/// The same of OpenAI's class for the role, which looks at lists only later.
fn fields_of_openai(message: &Dict) -> Option<usize> {
    let role = message.get("role")?.as_str()?;
    let content = message.get("content");
    let is_content = |value: &Value| matches!(value, Value::Str(_) | Value::List(_));
    let name = message.get("name");
    match role {
        "developer" | "system" | "user" => {
            let fits = content.is_some_and(is_content) && name.is_none_or(is_text);
            fits.then_some(2 + usize::from(name.is_some()))
        }
        "tool" => (content.is_some_and(is_content) && message.get("tool_call_id").is_some_and(is_text)).then_some(3),
        "function" => (content.is_some_and(is_text_or_none) && name.is_some_and(is_text)).then_some(3),
        "assistant" => fields_of_assistant(message),
        _ => None,
    }
}

fn fields_of_assistant(message: &Dict) -> Option<usize> {
    let mut count = 1;
    for (key, value) in message.fields() {
        count += match &**key {
            "content" => matches!(value, Value::None | Value::Str(_) | Value::List(_)).then_some(1)?,
            "name" => is_text(value).then_some(1)?,
            "refusal" => is_text_or_none(value).then_some(1)?,
            "tool_calls" => value.as_list().map(|_| 1)?,
            "audio" if value.is_none() => 1,
            "audio" => value.get("id")?.as_str().map(|_| 2)?,
            "function_call" if value.is_none() => 1,
            "function_call" => {
                value.get("name")?.as_str()?;
                value.get("arguments")?.as_str().map(|_| 3)?
            }
            _ => 0,
        };
    }
    Some(count)
}

/// A message as templates see it.
pub(super) fn read(message: &Value, form: Form) -> Result<Value, NotKnown> {
    let message = renamed(object(message, "a message")?);
    if message.contains("author") {
        return unsupported("a message with an author");
    }
    if message.get("tool_calls").is_some_and(|calls| !calls.is_none() && calls.as_list().is_none()) {
        return unsupported("calls that are no list");
    }
    let (custom, openai) = (fields_of_custom(&message), fields_of_openai(&message));
    let is_custom = match (custom, openai) {
        (None, None) => return refused("a message that fits no class"),
        (Some(custom), Some(openai)) => custom > openai,
        (custom, None) => custom.is_some(),
        (None, _) => false,
    };
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        return refused("a message without a role");
    };
    let mut given = match message.get("content") {
        None | Some(Value::None) => Vec::new(),
        Some(Value::List(given)) => given.to_vec(),
        Some(text) => vec![Dict::from_iter([("type", Value::from("text")), ("text", text.clone())]).into()],
    };
    for part in given.iter().filter(|_| !is_custom) {
        if !parts::is_openai(part, role)? {
            return refused(format!("a part of a content that a message of {role} may not have"));
        }
    }
    if role == "system" {
        given = parts::without_billing(given);
    }
    let content = parts::content(&given, form.parts)?;
    finish(&message, role, content, is_custom)
}

fn finish(message: &Dict, role: &str, content: Value, is_custom: bool) -> Result<Value, NotKnown> {
    let mut out = Dict::new();
    out.insert("role", role);
    out.insert("content", content);
    // All calls are read, of whatever role: what is none is refused.
    let given = message.get("tool_calls").and_then(Value::as_list).filter(|_| role == "assistant");
    if let Some(given) = given.filter(|given| !given.is_empty()) {
        out.insert("tool_calls", calls::read(given)?);
    }
    if role == "assistant"
        && let Some(reasoning) = message.get("reasoning").filter(|reasoning| !reasoning.is_none())
    {
        out.insert("reasoning", reasoning.clone());
        out.insert("reasoning_content", reasoning.clone());
    }
    if role == "tool" {
        if let Some(id) = message.get("tool_call_id") {
            out.insert("tool_call_id", id.clone());
        }
        if let Some(text) = out.get("content").and_then(text_of_result).transpose()? {
            out.insert("content", text);
        }
    }
    for key in ["name", "task"] {
        if let Some(text) = message.get(key).and_then(Value::as_str) {
            out.insert(key, text);
        }
    }
    if role == "developer" {
        let given = message.get("tools").cloned().unwrap_or(Value::None);
        out.insert("tools", if is_custom { tools::as_class(&given)? } else { given });
    }
    Ok(out.into())
}

/// The texts of a tool's answer are one, unless there is something else among them.
fn text_of_result(content: &Value) -> Option<Result<String, NotKnown>> {
    let items = content.as_list()?;
    if items.iter().any(|item| item.get("type").and_then(Value::as_str) != Some("text")) {
        return None;
    }
    let texts: Vec<Value> = items.iter().filter_map(|item| item.get("text").cloned()).collect();
    Some(parts::joined(&texts).map_or_else(|| refused("a text of a tool's answer is no text"), Ok))
}
