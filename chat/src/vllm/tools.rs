//! Tools, as vLLM's classes write them out again.

use super::{NotKnown, class, object, refused, unsupported};
use crate::value::{Dict, Value};

/// The request's tools for the template: a list, or none.
pub(super) fn read(request: &Dict) -> Result<Option<Value>, NotKnown> {
    let tools = match request.get("tools") {
        None | Some(Value::None) => None,
        Some(Value::List(tools)) if !tools.is_empty() => Some(tools),
        Some(_) => return refused("tools must be a list of some"),
    };
    let choice = request.get("tool_choice").filter(|choice| !choice.is_none());
    let is_none = choice.and_then(Value::as_str) == Some("none");
    let Some(tools) = tools else {
        return if choice.is_some() && !is_none { refused("tool_choice without tools") } else { Ok(None) };
    };
    let dumped = Value::list(tools.iter().map(one).collect::<Result<_, _>>()?);
    check_choice(choice, tools)?;
    Ok(Some(dumped))
}

fn check_choice(choice: Option<&Value>, tools: &[Value]) -> Result<(), NotKnown> {
    let named = match choice {
        None => return Ok(()),
        Some(Value::Str(word)) if matches!(&**word, "none" | "auto" | "required") => return Ok(()),
        Some(named) => named,
    };
    if named.get("type").is_some_and(|kind| kind.as_str() != Some("function")) {
        return refused("tool_choice is of an unknown type");
    }
    let name = |value: &Value| value.get("function")?.get("name")?.as_str().map(str::to_owned);
    match name(named) {
        Some(wanted) if tools.iter().any(|tool| name(tool).as_ref() == Some(&wanted)) => Ok(()),
        _ => refused("tool_choice names no tool"),
    }
}

fn flag(dict: &Dict, key: &str) -> Result<Option<bool>, NotKnown> {
    match dict.get(key) {
        None | Some(Value::None) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => unsupported(format!("a tool's {key} that is neither true nor false")),
    }
}

fn one(tool: &Value) -> Result<Value, NotKnown> {
    let tool = object(tool, "a tool")?;
    if tool.get("type").is_some_and(|kind| kind.as_str() != Some("function")) {
        return refused("a tool of an unknown type");
    }
    let Some(function) = tool.get("function").and_then(Value::as_dict) else {
        return refused("a tool without a function");
    };
    let mut out = Dict::new();
    let Some(name) = function.get("name").and_then(Value::as_str) else {
        return refused("a tool without a name");
    };
    out.insert("name", name);
    let description = function.get("description").cloned().unwrap_or(Value::None);
    let parameters = function.get("parameters").cloned().unwrap_or(Value::None);
    let fit = matches!(description, Value::Str(_) | Value::None) && matches!(parameters, Value::Dict(_) | Value::None);
    if !fit {
        return refused("a tool's description must be a text, and its parameters an object");
    }
    out.insert("description", description);
    out.insert("parameters", parameters);
    let (deferred, own) = (flag(tool, "defer_loading")?, flag(function, "defer_loading")?);
    for (key, value) in [("strict", flag(function, "strict")?), ("defer_loading", own.or(deferred))] {
        if let Some(value) = value {
            out.insert(key, value);
        }
    }
    let mut tool = Dict::new();
    tool.insert("type", "function");
    tool.insert("function", out);
    if let Some(deferred) = deferred {
        tool.insert("defer_loading", deferred);
    }
    Ok(tool.into())
}

const FUNCTION: &[&str] = &["name", "description", "parameters", "strict"];

/// The fields that a class counts in a tool of a developer's message; `None` where it does not take it.
pub(super) fn fields(tool: &Value) -> Option<usize> {
    let function = tool.get("function")?.as_dict()?;
    (tool.get("type")?.as_str()? == "function").then_some(())?;
    function.get("name")?.as_str()?;
    let fits = function.get("description").is_none_or(|text| text.as_str().is_some())
        && function.get("parameters").is_none_or(|dict| dict.as_dict().is_some())
        && function.get("strict").is_none_or(|flag| flag.is_none() || flag.as_bool().is_some());
    fits.then(|| 2 + FUNCTION.iter().filter(|key| function.contains(key)).count())
}

/// A developer's tools in the order of their class.
pub(super) fn as_class(tools: &Value) -> Result<Value, NotKnown> {
    let Some(tools) = tools.as_list() else { return Ok(tools.clone()) };
    let mut out = Vec::new();
    for tool in tools {
        let mut tool = class(object(tool, "a tool")?, &["function", "type"]);
        let function = tool.get("function").and_then(Value::as_dict).map(|function| class(function, FUNCTION));
        tool.insert("function", function.unwrap_or_default());
        out.push(tool.into());
    }
    Ok(Value::list(out))
}
