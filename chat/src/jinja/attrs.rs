//! Attributes and items of values, as the sandbox gives them.

use std::sync::Arc;

use super::RenderError;
use super::object::{Kind, Loop, Object, View};
use super::ops::unsupported;
use super::sequences::nth;
use crate::value::{Key, Value};

type Outcome<T = Value> = Result<T, RenderError>;

const DICT: &[&str] = &["get", "items", "keys", "values", "copy", "fromkeys"];
/// What would change a value: the sandbox takes it for undefined.
const DICT_CHANGES: &[&str] = &["clear", "pop", "popitem", "setdefault", "update"];
const LIST: &[&str] = &["count", "index", "copy"];
const TUPLE: &[&str] = &["count", "index"];
const NUMBER: &[&str] = &[
    "real",
    "imag",
    "numerator",
    "denominator",
    "bit_length",
    "bit_count",
    "conjugate",
    "from_bytes",
    "to_bytes",
    "as_integer_ratio",
    "is_integer",
    "hex",
    "fromhex",
];
const TEXT: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

fn method(of: &Value, name: &str) -> Value {
    Object::value(Kind::Method { of: of.clone(), name: name.into() })
}

/// Whether a name is a method of a text or a map, and nothing else.
pub(crate) fn has_method(of: &Value, name: &str) -> bool {
    match of {
        Value::Str(_) => TEXT.contains(&name),
        Value::Dict(_) => DICT.contains(&name),
        _ => false,
    }
}

/// What Python's `getattr` gives: `None` where there is no such attribute. `Undefined`: one that the sandbox hides.
pub(crate) fn own(of: &Value, name: &str) -> Outcome<Option<Value>> {
    if name.starts_with("__") && name.ends_with("__") {
        return unsupported(format!("the attribute {name}"));
    }
    let known = |names: &[&str]| names.contains(&name).then(|| method(of, name));
    Ok(match of {
        Value::Dict(_) if DICT_CHANGES.contains(&name) => Some(Value::Undefined),
        Value::Dict(_) => known(DICT),
        Value::List(_)
            if matches!(name, "append" | "clear" | "pop" | "reverse" | "insert" | "sort" | "extend" | "remove") =>
        {
            Some(Value::Undefined)
        }
        Value::List(_) => known(LIST),
        Value::Tuple(_) => known(TUPLE),
        Value::Str(_) => known(TEXT),
        Value::Int(_) | Value::Bool(_) | Value::Float(_) if NUMBER.contains(&name) => {
            return unsupported(format!("the attribute {name} of a number"));
        }
        Value::Object(object) => return of_object(object, name),
        _ => None,
    })
}

fn of_object(object: &Object, name: &str) -> Outcome<Option<Value>> {
    let this = Value::Object(object.clone());
    match &*object.0 {
        Kind::Namespace(names) => {
            let value = names.lock().get(name).cloned();
            Ok(value.map(|value| if name.starts_with('_') { Value::Undefined } else { value }))
        }
        Kind::Loop(state) => match name {
            "cycle" | "changed" => Ok(Some(method(&this, name))),
            _ => of_loop(&state.lock(), name),
        },
        Kind::Macro(known) if name == "name" => Ok(known.node.name.as_ref().map(|name| Value::Str(Arc::clone(name)))),
        Kind::Group { key, .. } if name == "grouper" => Ok(Some(key.clone())),
        Kind::Group { items, .. } if name == "list" => Ok(Some(items.clone())),
        Kind::Cycler { .. } if matches!(name, "next" | "reset") => Ok(Some(method(&this, name))),
        Kind::Cycler { items, at } if name == "current" => Ok(items.get(*at.lock()).cloned()),
        _ => unsupported(format!("the attribute {name} of an object")),
    }
}

fn of_loop(state: &Loop, name: &str) -> Outcome<Option<Value>> {
    let (at, len) = (state.at, state.items.len());
    let number = |number: usize| Some(Value::from(number as i64));
    let item = |at: Option<usize>| Some(at.and_then(|at| state.items.get(at).cloned()).unwrap_or_default());
    Ok(match name {
        "index" => number(at + 1),
        "index0" => number(at),
        "first" => Some((at == 0).into()),
        "last" => Some((at + 1 == len).into()),
        "length" => number(len),
        "revindex" => number(len.saturating_sub(at)),
        "revindex0" => number(len.saturating_sub(at + 1)),
        "depth" => number(state.depth),
        "depth0" => number(state.depth.saturating_sub(1)),
        "previtem" => item(at.checked_sub(1)),
        "nextitem" => item(Some(at + 1)),
        _ => None,
    })
}

/// `of.name`: an attribute, or else an item.
pub(crate) fn attr(of: &Value, name: &str) -> Outcome {
    if of.is_undefined() {
        return super::ops::failed(format!("{name} of what is undefined"));
    }
    if name.starts_with("__") && name.ends_with("__") && of.get(name).is_none() {
        return Ok(Value::Undefined);
    }
    if let Some(value) = own(of, name)? {
        return Ok(value);
    }
    Ok(of.get(name).cloned().unwrap_or_default())
}

/// `of[at]`: an item, or else an attribute.
pub(crate) fn item(of: &Value, at: &Value) -> Outcome {
    let found = match (of, at) {
        (Value::Undefined, _) => return super::ops::failed("an item of what is undefined"),
        (Value::Dict(dict), _) => Key::of(at).and_then(|key| dict.get_key(&key).cloned()),
        (Value::Object(object), Value::Int(_) | Value::Bool(_)) => match &*object.0 {
            Kind::Range(_) | Kind::Group { .. } => {
                nth(of, at.as_i64().or(at.as_bool().map(i64::from)).unwrap_or(i64::MAX))?
            }
            Kind::View { what: View::Keys | View::Values | View::Items, .. }
            | Kind::Iterator(_)
            | Kind::Namespace(_) => None,
            _ => return unsupported("an item of an object"),
        },
        (_, Value::Bool(bool)) => nth(of, i64::from(*bool))?,
        (_, Value::Int(int)) => match int.small() {
            Some(at) => nth(of, at)?,
            None => None,
        },
        _ => None,
    };
    match (found, at) {
        (Some(found), _) => Ok(found),
        (None, Value::Str(name)) if name.starts_with("__") && name.ends_with("__") => Ok(Value::Undefined),
        (None, Value::Str(name)) => Ok(own(of, name)?.unwrap_or_default()),
        (None, _) => Ok(Value::Undefined),
    }
}
