//! Tools, as SGLang's classes write them out again: in the client's order, with what the client left out as nulls behind.

use super::{NotKnown, flag_or_none, plain, refused, text_or_none, unsupported};
use crate::engine::{given, object};
use crate::value::{Dict, Value};

const TYPES: [&str; 7] = ["string", "number", "integer", "boolean", "object", "array", "null"];
/// Where schemas have others: in maps by name, in lists, and alone.
const BY_NAME: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];
const LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
const ALONE: [&str; 10] = [
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
];

/// The request's tools for the template: a list, or none.
pub(super) fn read(request: &Dict) -> Result<Option<Value>, NotKnown> {
    let all = match given(request, "tools") {
        None => Vec::new(),
        Some(Value::List(tools)) => tools.iter().map(checked).collect::<Result<Vec<Value>, NotKnown>>()?,
        Some(_) => return refused("tools is no list"),
    };
    let name = |of: &Value| of.get("function")?.get("name")?.as_str().map(str::to_owned);
    let shown = match given(request, "tool_choice") {
        None => all,
        Some(Value::Str(word)) => match &**word {
            "none" => Vec::new(),
            "auto" | "required" => all,
            _ => return refused("tool_choice is none of those there are"),
        },
        Some(named) => {
            let wanted = name(named);
            let shown: Vec<Value> = all.into_iter().filter(|tool| name(tool) == wanted).collect();
            if shown.is_empty() {
                return refused("tool_choice names no tool");
            }
            shown
        }
    };
    Ok(Some(shown).filter(|shown| !shown.is_empty()).map(Value::list))
}

/// The functions alone.
pub(super) fn flat(tools: &Value) -> Option<Value> {
    let functions = tools.as_list()?.iter().map(|tool| tool.get("function").unwrap_or(tool).clone());
    Some(Value::list(functions.collect()))
}

/// A tool as its class writes it.
pub(super) fn checked(tool: &Value) -> Result<Value, NotKnown> {
    let tool = object(tool, "a tool")?;
    let Some(given) = tool.get("function").and_then(Value::as_dict) else {
        return refused("a tool without a function");
    };
    let Some(name @ Value::Str(_)) = given.get("name") else { return refused("a tool without a name") };
    let kind = match tool.get("type") {
        None => Value::from("function"),
        Some(kind @ Value::Str(_)) => kind.clone(),
        Some(_) => return refused("a tool whose type is no text"),
    };
    let parameters = given.get("parameters").cloned().unwrap_or(Value::None);
    plain(&parameters)?;
    has_plain_types(&parameters)?;
    let (deferred, own) = (flag_or_none(tool, "defer_loading")?, flag_or_none(given, "defer_loading")?);
    let own = if own.is_none() { deferred.clone() } else { own };
    let known = Dict::from_iter([
        ("description", text_or_none(given, "description")?),
        ("name", name.clone()),
        ("parameters", parameters),
        ("strict", flag_or_none(given, "strict")?),
        ("defer_loading", own),
    ]);
    let is_said =
        |key: &str| !matches!(key, "strict" | "defer_loading") || known.get(key).is_some_and(|flag| !flag.is_none());
    let mut function = Dict::new();
    let in_order = given.fields().map(|(key, _)| &**key).chain(known.fields().map(|(key, _)| &**key));
    for key in in_order.filter(|key| is_said(key)) {
        if let Some(value) = known.get(key) {
            function.insert(key, value.clone());
        }
    }
    Ok(Dict::from_iter([("type", kind), ("function", function.into()), ("defer_loading", deferred)]).into())
}

/// The engine writes types of other worlds (`varchar`) anew: these are not followed here.
fn has_plain_types(schema: &Value) -> Result<(), NotKnown> {
    let Some(schema) = schema.as_dict() else {
        return schema.as_list().into_iter().flatten().try_for_each(has_plain_types);
    };
    let is_plain = |kind: &Value| kind.as_str().is_none_or(|kind| TYPES.contains(&kind));
    let plain = match schema.get("type") {
        Some(Value::List(kinds)) => kinds
            .iter()
            .enumerate()
            .all(|(at, kind)| is_plain(kind) && kinds.iter().take(at).all(|other| other != kind)),
        Some(kind) => is_plain(kind),
        None => true,
    };
    if !plain {
        return unsupported("a tool's schema with types of other worlds than JSON's");
    }
    let by_name = BY_NAME.iter().filter_map(|key| schema.get(key)?.as_dict()).flat_map(Dict::fields);
    by_name.map(|(_, inner)| inner).try_for_each(has_plain_types)?;
    let lists = LISTS.iter().filter_map(|key| schema.get(key)?.as_list()).flatten();
    lists.chain(ALONE.iter().filter_map(|key| schema.get(key))).try_for_each(has_plain_types)
}
