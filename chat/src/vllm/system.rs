//! Messages of a developer, for templates that know none: they are the system's, and the system's are one.

use super::{NotKnown, parts, refused};
use crate::value::{Dict, Value};

fn role(message: &Value) -> Option<&str> {
    message.get("role").and_then(Value::as_str)
}

pub(super) fn without_developer(messages: Vec<Value>) -> Result<Vec<Value>, NotKnown> {
    if !messages.iter().any(|message| role(message) == Some("developer")) {
        return Ok(messages);
    }
    let converted: Vec<Value> = messages.into_iter().map(converted).collect();
    let is_system = |message: &&Value| role(message) == Some("system");
    // The engine joins texts before it looks whether there is one system alone, and fails where one is none.
    let mut texts = converted.iter().filter(is_system).map(text).collect::<Result<Vec<String>, NotKnown>>()?;
    // A first one that is empty does not count as one before the others, but they are not first.
    if texts.len() == 1 && converted.first().and_then(role) == Some("system") {
        return Ok(converted);
    }
    texts.retain(|text| !text.is_empty());
    let mut out =
        vec![Dict::from_iter([("role", Value::from("system")), ("content", texts.join("\n\n").into())]).into()];
    out.extend(converted.into_iter().filter(|message| role(message) != Some("system")));
    Ok(out)
}

fn converted(message: Value) -> Value {
    match message.as_dict() {
        Some(dict) if role(&message) == Some("developer") => {
            let mut dict = dict.clone();
            dict.insert("role", "system");
            dict.remove("tools");
            dict.into()
        }
        _ => message,
    }
}

fn text(message: &Value) -> Result<String, NotKnown> {
    Ok(match message.get("content") {
        Some(Value::List(items)) => {
            let texts: Vec<Value> = items.iter().filter_map(|item| item.get("text").cloned()).collect();
            parts::joined(&texts).map_or_else(|| refused("a text of the system is no text"), Ok)?
        }
        Some(Value::Str(text)) => text.to_string(),
        _ => String::new(),
    })
}
