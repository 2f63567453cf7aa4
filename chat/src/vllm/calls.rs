//! Calls of tools in an assistant's message: the order of their keys is that of the class, and arguments are objects.

use super::{NotKnown, class, object, refused, unsupported};
use crate::json::{self, JsonErrorKind};
use crate::value::{Dict, Value};

fn is_call(call: &Value) -> bool {
    let text = |value: Option<&Value>| value.is_some_and(|value| value.as_str().is_some());
    let function = call.get("function");
    text(call.get("id"))
        && call.get("type").and_then(Value::as_str) == Some("function")
        && text(function.and_then(|function| function.get("name")))
        && text(function.and_then(|function| function.get("arguments")))
}

/// The fields that a class counts in a call; `None` where it takes none of it.
pub(super) fn fields(call: &Value) -> Option<usize> {
    is_call(call).then_some(5)
}

/// As templates see them.
pub(super) fn read(calls: &[Value]) -> Result<Value, NotKnown> {
    Ok(Value::list(calls.iter().map(one).collect::<Result<_, _>>()?))
}

fn one(call: &Value) -> Result<Value, NotKnown> {
    if !is_call(call) {
        return refused("a call that is no function's");
    }
    let mut call = class(object(call, "a call")?, &["id", "function", "type"]);
    let function = call.get("function").and_then(Value::as_dict).cloned().unwrap_or_default();
    let mut function = class(&function, &["arguments", "name"]);
    let arguments = arguments(function.get("arguments").and_then(Value::as_str).unwrap_or_default())?;
    function.insert("arguments", arguments);
    call.insert("function", function);
    Ok(call.into())
}

/// What is no object is an empty one.
fn arguments(text: &str) -> Result<Value, NotKnown> {
    match json::parse(text.as_bytes()) {
        Ok(arguments @ Value::Dict(_)) => Ok(arguments),
        // Python reads it, or fails otherwise than over a text that is no JSON.
        Err(error) if error.kind == JsonErrorKind::NotDone => unsupported(format!("arguments of a call: {error}")),
        Ok(_) | Err(_) => Ok(Dict::new().into()),
    }
}
