//! How Python writes values: `str` and `repr`.

use std::fmt::Write as _;

use super::RenderError;
use super::object::{Kind, View};
use crate::caps::{TEXT_BYTES_MAX, VALUES_DEPTH_MAX};
use crate::value::{Dict, Value};

/// White space, as `str.isspace` has it.
pub(crate) fn is_space(letter: char) -> bool {
    letter.is_whitespace() || matches!(letter, '\u{1c}'..='\u{1f}')
}

/// `repr` of a number with a fraction: the shortest digits that read the same.
pub fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "nan".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{float:e}");
    let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    if !(-4..16).contains(&power) {
        let mut text = digits.to_owned();
        _ = write!(text, "e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs());
        return text;
    }
    let plain = format!("{float}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Refuses a text that is too long. Whoever writes one asks after each part.
pub(crate) fn fits(text: &str) -> Result<(), RenderError> {
    if text.len() > TEXT_BYTES_MAX { Err(RenderError::TooMuch("bytes of a text")) } else { Ok(()) }
}

/// `str(value)`.
pub(crate) fn str_of(value: &Value) -> Result<String, RenderError> {
    let mut text = String::new();
    write_str(value, &mut text)?;
    Ok(text)
}

/// `str(value)`, behind what is there.
pub(crate) fn write_str(value: &Value, out: &mut String) -> Result<(), RenderError> {
    match value {
        Value::Undefined => {}
        Value::Str(text) => out.push_str(text),
        Value::Object(object) if object.markup().is_some() => out.push_str(&object.markup().unwrap_or_default()),
        other => write_repr(other, out, 0)?,
    }
    Ok(())
}

/// `repr(value)`.
pub(crate) fn repr(value: &Value) -> Result<String, RenderError> {
    let mut text = String::new();
    write_repr(value, &mut text, 0)?;
    Ok(text)
}

fn write_repr(value: &Value, out: &mut String, depth: usize) -> Result<(), RenderError> {
    if depth > VALUES_DEPTH_MAX {
        return Err(RenderError::TooMuch("values within each other"));
    }
    fits(out)?;
    match value {
        Value::Undefined => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(bool) => out.push_str(if *bool { "True" } else { "False" }),
        Value::Int(int) => _ = write!(out, "{int}"),
        Value::Float(float) => out.push_str(&float_text(*float)),
        Value::Str(text) => write_repr_of_text(text, out)?,
        Value::List(items) => write_items(items.iter(), out, ("[", "]"), depth)?,
        Value::Tuple(items) if items.len() == 1 => write_items(items.iter(), out, ("(", ",)"), depth)?,
        Value::Tuple(items) => write_items(items.iter(), out, ("(", ")"), depth)?,
        Value::Dict(dict) => write_dict(dict, out, depth)?,
        Value::Object(object) => match &*object.0 {
            Kind::Namespace(names) => {
                let names = names.lock().clone();
                out.push_str("<Namespace ");
                write_dict(&names, out, depth)?;
                out.push('>');
            }
            Kind::Range(range) if range.step == 1 => _ = write!(out, "range({}, {})", range.start, range.stop),
            Kind::Range(range) => _ = write!(out, "range({}, {}, {})", range.start, range.stop, range.step),
            Kind::View { of, what: View::Keys } => {
                write_items(of.iter().map(|(key, _)| key), out, ("dict_keys([", "])"), depth)?
            }
            Kind::View { of, what: View::Values } => {
                write_items(of.iter().map(|(_, value)| value), out, ("dict_values([", "])"), depth)?;
            }
            Kind::View { of, what: View::Items } => {
                let pairs: Vec<Value> =
                    of.iter().map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()])).collect();
                write_items(pairs.iter(), out, ("dict_items([", "])"), depth)?;
            }
            Kind::Group { key, items } => write_items([key, items].into_iter(), out, ("(", ")"), depth)?,
            Kind::Macro(known) => match &known.node.name {
                Some(name) => {
                    out.push_str("<Macro ");
                    write_repr_of_text(name, out)?;
                    out.push('>');
                }
                None => return Err(RenderError::Unsupported("the text of a caller".into())),
            },
            Kind::Loop(state) => {
                let state = state.lock();
                _ = write!(out, "<LoopContext {}/{}>", state.at + 1, state.items.len());
            }
            _ => return Err(RenderError::Unsupported("the text of an object".into())),
        },
    }
    Ok(())
}

fn write_items<'a>(
    items: impl Iterator<Item = &'a Value>,
    out: &mut String,
    (open, close): (&str, &str),
    depth: usize,
) -> Result<(), RenderError> {
    out.push_str(open);
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.push_str(", ");
        }
        write_repr(item, out, depth + 1)?;
    }
    out.push_str(close);
    Ok(())
}

fn write_dict(dict: &Dict, out: &mut String, depth: usize) -> Result<(), RenderError> {
    out.push('{');
    for (at, (key, value)) in dict.iter().enumerate() {
        if at > 0 {
            out.push_str(", ");
        }
        write_repr(key, out, depth + 1)?;
        out.push_str(": ");
        write_repr(value, out, depth + 1)?;
    }
    out.push('}');
    Ok(())
}

fn write_repr_of_text(text: &str, out: &mut String) -> Result<(), RenderError> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if letter == quote => {
                out.push('\\');
                out.push(letter);
            }
            ' '..='~' => out.push(letter),
            _ if super::printable::is_printable(letter) => out.push(letter),
            _ => {
                let code = u32::from(letter);
                _ = match code {
                    0..0x100 => write!(out, "\\x{code:02x}"),
                    0x100..0x10000 => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
    Ok(())
}
