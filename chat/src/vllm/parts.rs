//! Parts of a message's content, as vLLM's `_parse_chat_message_content_part` reads them.

use std::sync::Arc;

use super::{NotKnown, object, refused};
use crate::value::{Dict, Value};

const BILLING: &str = "x-anthropic-billing-header";

/// Keys of the classes of parts: they do not reach a template, all others do.
const KNOWN: &[&str] = &[
    "text",
    "type",
    "prompt_cache_breakpoint",
    "image_url",
    "input_audio",
    "file",
    "audio_url",
    "image_embeds",
    "uuid",
    "audio_embeds",
    "video_embeds",
    "data",
    "video_url",
    "refusal",
    "image_pil",
    "name",
    "thinking",
    "closed",
];

const MEDIA: &[&str] = &[
    "image_url",
    "input_image",
    "image_pil",
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
    "audio_url",
    "input_audio",
    "video_url",
];

fn text_of<'a>(part: &'a Dict, key: &str) -> Option<&'a str> {
    part.get(key)?.as_str()
}

fn is_kind(part: &Dict, kind: &str) -> bool {
    text_of(part, "type") == Some(kind) && text_of(part, kind).is_some()
}

/// How many fields of a class a part sets, of the class that fits best. `None`: it fits none.
pub(super) fn fields(part: &Value) -> Option<usize> {
    let part = match part {
        Value::Str(_) => return Some(0),
        other => other.as_dict()?,
    };
    let set = |key: &str| usize::from(part.get(key).is_some_and(|value| value.is_none() || value.as_str().is_some()));
    let picture = set("image_url") + set("uuid");
    let reference = match part.get("type") {
        None => usize::from(text_of(part, "name").is_some()),
        Some(kind) if kind.as_str() == Some("tool_reference") => 1 + usize::from(text_of(part, "name").is_some()),
        Some(_) => 0,
    };
    let thinking = match (is_kind(part, "thinking"), part.get("closed")) {
        (true, None) => 2,
        (true, Some(Value::Bool(_))) => 3,
        _ => 0,
    };
    let text = if is_kind(part, "text") || is_kind(part, "refusal") { 2 } else { 0 };
    Some(text.max(thinking).max(reference).max(picture).max(set("audio_url")).max(set("video_url")))
}

/// Whether OpenAI's own class of a message takes the part: it has fewer kinds than vLLM's.
pub(super) fn is_openai(part: &Value, role: &str) -> Result<bool, NotKnown> {
    let Some(part) = part.as_dict() else { return Ok(false) };
    if is_kind(part, "text") || (role == "assistant" && is_kind(part, "refusal")) {
        return Ok(true);
    }
    match text_of(part, "type") {
        Some(kind @ ("image_url" | "input_audio" | "file")) if role == "user" => media(kind),
        _ => Ok(false),
    }
}

/// A content without the line that Claude Code puts before a system text.
pub(super) fn without_billing(parts: Vec<Value>) -> Vec<Value> {
    parts.into_iter().filter_map(without_header).collect()
}

fn without_header(part: Value) -> Option<Value> {
    let text = match &part {
        Value::Str(text) => Some(&**text),
        Value::Dict(dict) if text_of(dict, "type") == Some("text") => text_of(dict, "text"),
        _ => None,
    };
    let Some(text) = text.filter(|text| text.starts_with(BILLING)) else { return Some(part) };
    let rest = text.split_once('\n').map(|(_, rest)| rest).filter(|rest| !rest.is_empty())?;
    match part.as_dict() {
        None => Some(rest.into()),
        Some(dict) => {
            let mut dict = dict.clone();
            dict.insert("text", rest);
            Some(dict.into())
        }
    }
}

/// A content as templates take it.
pub(super) fn content(parts: &[Value], as_parts: bool) -> Result<Value, NotKnown> {
    let mut out = Vec::new();
    for part in parts {
        out.extend(one(part, as_parts)?);
    }
    if as_parts {
        return Ok(Value::list(out));
    }
    joined(&out).map_or_else(|| refused("a text of a message is no text"), |text| Ok(text.into()))
}

/// Texts, a line each.
pub(super) fn joined(texts: &[Value]) -> Option<String> {
    let texts: Option<Vec<&str>> = texts.iter().map(Value::as_str).collect();
    Some(texts?.join("\n"))
}

fn one(part: &Value, as_parts: bool) -> Result<Option<Value>, NotKnown> {
    if let Value::Str(_) = part {
        return Ok(Some(formed(part.clone(), None, as_parts)).filter(Value::truthy));
    }
    let part = object(part, "a part of a content")?;
    let kind = match part.get("type") {
        None | Some(Value::None) if MEDIA.iter().any(|key| part.contains(key)) => return media("of no type"),
        Some(Value::Str(kind)) => &**kind,
        _ => return refused("a part of a content without a type"),
    };
    if part.get("uuid").is_some_and(|uuid| !uuid.is_none()) || MEDIA.contains(&kind) || part.contains("image_pil") {
        return media(kind);
    }
    let field = match kind {
        "text" | "input_text" | "output_text" => "text",
        "refusal" | "thinking" => kind,
        "tool_reference" => "name",
        _ => return refused("a part of a content of an unknown type"),
    };
    let text = part.get(field).cloned().unwrap_or(Value::None);
    if matches!(kind, "text" | "refusal") && text.is_none() {
        return Ok(None);
    }
    if kind == "tool_reference" && as_parts {
        return Ok(Some(Dict::from_iter([("type", Value::from(kind)), ("name", text)]).into()));
    }
    Ok(Some(formed(text, Some(part), as_parts)).filter(Value::truthy))
}

fn formed(text: Value, part: Option<&Dict>, as_parts: bool) -> Value {
    if !as_parts {
        return text;
    }
    let mut out = Dict::new();
    out.insert("type", "text");
    out.insert("text", text);
    for (key, value) in part.into_iter().flat_map(Dict::fields).filter(|(key, _)| !KNOWN.contains(&&***key)) {
        out.insert(Arc::clone(key), value.clone());
    }
    out.into()
}

fn media<T>(kind: &str) -> Result<T, NotKnown> {
    Err(NotKnown::Media(kind.to_owned()))
}
