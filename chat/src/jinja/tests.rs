//! What stands behind `is`.

use super::ast::Compare;
use super::calls::Given;
use super::interp::{Interp, Outcome};
use super::object::Kind;
use super::ops::{compare, contains, failed, unsupported};
use super::text::str_of;
use crate::value::{Number, Value};

/// All that Jinja knows.
pub(crate) const NAMES: &[&str] = &[
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "==",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "gt",
    "greaterthan",
    "in",
    "integer",
    "iterable",
    "le",
    "lower",
    "lt",
    "lessthan",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
    "!=",
    ">",
    ">=",
    "<",
    "<=",
];

impl Interp<'_> {
    /// `of is name(given)`.
    pub(crate) fn test(&mut self, name: &str, of: &Value, given: Given) -> Outcome<bool> {
        let operator = match name {
            "eq" | "equalto" | "==" => Some(Compare::Eq),
            "ne" | "!=" => Some(Compare::Ne),
            "lt" | "lessthan" | "<" => Some(Compare::Lt),
            "le" | "<=" => Some(Compare::Le),
            "gt" | "greaterthan" | ">" => Some(Compare::Gt),
            "ge" | ">=" => Some(Compare::Ge),
            _ => None,
        };
        if let Some(operator) = operator {
            let given = given.bind(&["b"])?;
            return compare(operator, of, given.required(0)?);
        }
        if matches!(name, "in" | "sameas" | "divisibleby") {
            let given = given.bind(&["other"])?;
            let other = given.required(0)?;
            return match name {
                "in" => contains(other, of),
                "sameas" => same(of, other),
                _ => Ok(!super::ops::binary(super::ast::Binary::Mod, of, other)?.truthy()),
            };
        }
        given.bind(&[])?;
        of_value(name, of)
    }
}

fn of_value(name: &str, of: &Value) -> Outcome<bool> {
    let odd =
        || -> Outcome<bool> { Ok(super::ops::binary(super::ast::Binary::Mod, of, &Value::from(2))? == Value::from(1)) };
    Ok(match name {
        "defined" => !of.is_undefined(),
        "undefined" => of.is_undefined(),
        "none" => of.is_none(),
        "boolean" => matches!(of, Value::Bool(_)),
        "true" => matches!(of, Value::Bool(true)),
        "false" => matches!(of, Value::Bool(false)),
        "integer" => matches!(of, Value::Int(_)),
        "float" => matches!(of, Value::Float(_)),
        "number" => of.number().is_some(),
        "string" => matches!(of, Value::Str(_)) || matches!(of, Value::Object(object) if object.markup().is_some()),
        "mapping" => matches!(of, Value::Dict(_)),
        "iterable" => match of {
            Value::Undefined | Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) => true,
            Value::Object(object) => !matches!(
                &*object.0,
                Kind::Namespace(_)
                    | Kind::Macro(_)
                    | Kind::Method { .. }
                    | Kind::Function(_)
                    | Kind::Cycler { .. }
                    | Kind::Joiner { .. }
            ),
            _ => false,
        },
        "sequence" => match of {
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Undefined => true,
            Value::Object(object) => matches!(&*object.0, Kind::Range(_) | Kind::Group { .. } | Kind::Markup(_)),
            _ => false,
        },
        "callable" => match of {
            Value::Object(object) => !matches!(
                &*object.0,
                Kind::Range(_)
                    | Kind::Iterator(_)
                    | Kind::View { .. }
                    | Kind::Group { .. }
                    | Kind::Namespace(_)
                    | Kind::Markup(_)
                    | Kind::Cycler { .. }
            ),
            Value::Undefined => true,
            _ => false,
        },
        "even" => even(of, odd()?),
        "odd" => odd()?,
        "lower" => is_cased(&str_of(of)?, char::is_lowercase, char::is_uppercase),
        "upper" => is_cased(&str_of(of)?, char::is_uppercase, char::is_lowercase),
        "escaped" => matches!(of, Value::Object(object) if object.markup().is_some()),
        "filter" => of.as_str().is_some_and(|name| super::filters::NAMES.contains(&name)),
        "test" => of.as_str().is_some_and(|name| NAMES.contains(&name)),
        _ => return failed(format!("No test named {name}")),
    })
}

fn even(of: &Value, odd: bool) -> bool {
    match of.number() {
        Some(Number::Float(float)) => float % 2.0 == 0.0,
        _ => !odd,
    }
}

/// `str.islower` and the like: at least one letter, and none of the other case.
pub(crate) fn is_cased(text: &str, this: fn(char) -> bool, other: fn(char) -> bool) -> bool {
    text.chars().any(this) && !text.chars().any(other)
}

fn same(one: &Value, other: &Value) -> Outcome<bool> {
    match (one, other) {
        (Value::None, _) | (_, Value::None) => Ok(one.is_none() && other.is_none()),
        (Value::Bool(one), Value::Bool(other)) => Ok(one == other),
        (Value::Bool(_), _) | (_, Value::Bool(_)) => Ok(false),
        _ => unsupported("sameas of these values"),
    }
}
