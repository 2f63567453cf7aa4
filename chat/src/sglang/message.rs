//! One message: what SGLang's classes keep of it, and what is made of that for templates. They drop what they do not know.

use super::{NotKnown, flag_or_none, plain, refused, text_or_none, tools, unsupported};
use crate::engine::object;
use crate::json::{JsonErrorKind, parse};
use crate::value::{Dict, Int, Value};

const ROLES: [&str; 7] = ["system", "assistant", "tool", "function", "developer", "latest_reminder", "root"];
const MEDIA: [&str; 5] = ["image_url", "video_url", "audio_url", "input_audio", "input_image"];

/// A message as templates see it.
pub(super) fn read(message: &Value, parts: bool) -> Result<Value, NotKnown> {
    let message = object(message, "a message")?;
    let Some(role) = message.get("role").and_then(Value::as_str) else { return refused("a message without a role") };
    let role = if role == "user" { role.to_owned() } else { role.to_lowercase() };
    let mut fields = Dict::new();
    fields.insert("role", role.as_str());
    let content = content_of(message, &role, parts)?;
    // What has come in parts goes to the end, where they stay parts.
    let comes_last = parts && matches!(message.get("content"), Some(Value::List(_)));
    if !comes_last {
        fields.insert("content", content.clone());
    }
    match &*role {
        "user" if message.get("role").and_then(Value::as_str) == Some("user") => {}
        role if ROLES.contains(&role) => rest_of(message, role, &mut fields)?,
        _ => return refused("a message of an unknown role"),
    }
    if comes_last {
        fields.insert("content", content);
    }
    Ok(fields.into())
}

/// The fields behind the content, in the order of their class; those that are null are left out.
fn rest_of(message: &Dict, role: &str, fields: &mut Dict) -> Result<(), NotKnown> {
    let mut add = |name: &str, value: Value| {
        if !value.is_none() {
            fields.insert(name, value);
        }
    };
    for name in ["tool_call_id", "name"] {
        add(name, text_or_none(message, name)?);
    }
    let phase = text_or_none(message, "phase")?;
    if phase.as_str().is_some_and(|phase| !matches!(phase, "commentary" | "final_answer")) {
        return refused("a message of an unknown phase");
    }
    add("phase", phase);
    add("reasoning_content", text_or_none(message, "reasoning_content")?);
    for (name, of) in [("tool_calls", call as fn(&Value, bool) -> Result<Value, NotKnown>), ("tools", tool)] {
        match message.get(name) {
            None | Some(Value::None) => {}
            Some(Value::List(items)) => {
                let items = items.iter().map(|item| of(item, role == "assistant")).collect::<Result<_, _>>()?;
                add(name, Value::list(items));
            }
            Some(_) => return refused(format!("{name} is no list")),
        }
    }
    add("prefix", flag_or_none(message, "prefix")?);
    Ok(())
}

fn tool(given: &Value, _: bool) -> Result<Value, NotKnown> {
    tools::checked(given)
}

/// A call; of an assistant's, the arguments are read.
fn call(given: &Value, reads: bool) -> Result<Value, NotKnown> {
    let given = object(given, "a call")?;
    let kind = given.get("type").map_or(Some("function"), Value::as_str);
    let (Some("function"), Some(function)) = (kind, given.get("function").and_then(Value::as_dict)) else {
        return refused("a call of no function");
    };
    let index = match given.get("index") {
        None | Some(Value::None) => Value::None,
        Some(index @ Value::Int(Int::Small(_))) => index.clone(),
        Some(_) => return unsupported("a call whose index is no whole number"),
    };
    let arguments = match function.get("arguments") {
        None | Some(Value::None) => Value::None,
        Some(Value::Str(text)) if reads => arguments(text)?,
        Some(other @ (Value::Str(_) | Value::Dict(_))) => other.clone(),
        Some(_) => return refused("arguments of a call that are neither a text nor an object"),
    };
    plain(&arguments)?;
    let function = Dict::from_iter([("name", text_or_none(function, "name")?), ("arguments", arguments)]);
    let id = text_or_none(given, "id")?;
    let fields = [("id", id), ("index", index), ("type", "function".into()), ("function", function.into())];
    Ok(Dict::from_iter(fields).into())
}

fn arguments(text: &str) -> Result<Value, NotKnown> {
    match parse(text.as_bytes()) {
        Ok(arguments @ Value::Dict(_)) => Ok(arguments),
        Ok(_) => refused("arguments of a call that are no object"),
        Err(error) if error.kind == JsonErrorKind::NoJson => refused("arguments of a call that are no JSON"),
        Err(_) => unsupported("arguments of a call that Python does not read"),
    }
}

fn content_of(message: &Dict, role: &str, as_parts: bool) -> Result<Value, NotKnown> {
    let given = match message.get("content") {
        Some(Value::List(given)) => given,
        Some(text @ Value::Str(_)) => return Ok(text.clone()),
        None | Some(Value::None) if role != "user" => return Ok("".into()),
        _ => return refused("a content that is neither a text nor a list"),
    };
    let mut out = Vec::new();
    for part in given.iter() {
        out.extend(part_of(part, role)?);
    }
    let is_text = |part: &Value| part.get("type").and_then(Value::as_str) == Some("text");
    let joins = !as_parts || role == "tool" && out.iter().all(is_text);
    if !joins {
        return Ok(Value::list(out));
    }
    let texts: Vec<&str> =
        out.iter().filter(|part| is_text(part)).filter_map(|part| part.get("text")?.as_str()).collect();
    Ok(texts.join(" ").into())
}

/// A part as its class writes it; none where templates do not see it.
fn part_of(part: &Value, role: &str) -> Result<Option<Value>, NotKnown> {
    let part = object(part, "a part of a content")?;
    let text = |name: &str| part.get(name).filter(|text| text.as_str().is_some()).cloned();
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    let of = |field: &str, value: Value| Some(Dict::from_iter([("type", kind.into()), (field, value)]).into());
    match (kind, text("text")) {
        ("text", Some(text)) => Ok(of("text", text)),
        ("thinking" | "reasoning", thought)
            if role == "assistant" && thought.is_some() != text("thinking").is_some() =>
        {
            Ok(None)
        }
        ("tool_reference", _) => match text("name") {
            Some(name) => Ok(of("name", name)),
            None => refused("a reference to a tool without its name"),
        },
        (kind, _) if MEDIA.contains(&kind) => Err(NotKnown::Media(kind.to_owned())),
        _ => refused("a part of a content of an unknown type"),
    }
}
