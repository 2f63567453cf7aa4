//! What can be gone through, indexed and cut.

use super::RenderError;
use super::object::{Kind, View};
use super::ops::{failed, unsupported};
use crate::caps::{PARTS_MAX, RANGE_MAX};
use crate::value::Value;

type Outcome<T = Value> = Result<T, RenderError>;

/// All items, as a loop goes through them.
pub(crate) fn items(of: &Value) -> Outcome<Vec<Value>> {
    Ok(match of {
        Value::Undefined => Vec::new(),
        Value::List(items) | Value::Tuple(items) => items.to_vec(),
        Value::Str(text) if text.len() > PARTS_MAX => return Err(RenderError::TooMuch("parts of a text")),
        Value::Str(text) => text.chars().map(|letter| Value::from(&*letter.encode_utf8(&mut [0; 4]))).collect(),
        Value::Dict(dict) => dict.iter().map(|(key, _)| key.clone()).collect(),
        Value::Object(object) => match &*object.0 {
            Kind::Range(range) => {
                let at = |at: usize| Value::from(range.start.wrapping_add(range.step.wrapping_mul(at as i64)));
                (0..range.len().min(RANGE_MAX)).map(at).collect()
            }
            Kind::Iterator(items) => match &mut *items.lock() {
                Some(items) => items.collect(),
                None => return unsupported("an iterator that a loop is in, or left"),
            },
            Kind::View { of, what } => of
                .iter()
                .map(|(key, value)| match what {
                    View::Keys => key.clone(),
                    View::Values => value.clone(),
                    View::Items => Value::tuple(vec![key.clone(), value.clone()]),
                })
                .collect(),
            Kind::Group { key, items } => vec![key.clone(), items.clone()],
            _ => return unsupported("going through an object"),
        },
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => return failed("object is not iterable"),
    })
}

/// `len(of)`.
pub(crate) fn length(of: &Value) -> Outcome<usize> {
    Ok(match of {
        Value::Undefined => 0,
        Value::Str(text) => text.chars().count(),
        Value::List(items) | Value::Tuple(items) => items.len(),
        Value::Dict(dict) => dict.len(),
        Value::Object(object) => match &*object.0 {
            Kind::Range(range) => range.len(),
            Kind::View { of, .. } => of.len(),
            Kind::Group { .. } => 2,
            Kind::Loop(state) => state.lock().items.len(),
            Kind::Markup(text) => text.chars().count(),
            _ => return failed("object has no len()"),
        },
        _ => return failed("object has no len()"),
    })
}

/// An item by its number, which may count from the end; `None` where there is none.
pub(crate) fn nth(of: &Value, at: i64) -> Outcome<Option<Value>> {
    let place = |len: usize| usize::try_from(if at < 0 { at.saturating_add(len as i64) } else { at }).ok();
    Ok(match of {
        Value::List(items) | Value::Tuple(items) => place(items.len()).and_then(|at| items.get(at).cloned()),
        Value::Str(text) => {
            let at = if at < 0 { place(text.chars().count()) } else { place(0) };
            at.and_then(|at| text.chars().nth(at)).map(|letter| Value::from(&*letter.encode_utf8(&mut [0; 4])))
        }
        Value::Object(object) => match &*object.0 {
            Kind::Range(_) | Kind::Group { .. } => {
                let items = items(of)?;
                place(items.len()).and_then(|at| items.get(at).cloned())
            }
            _ => return unsupported("an item of an object"),
        },
        _ => None,
    })
}

fn bound(value: &Value) -> Outcome<Option<i64>> {
    match value {
        Value::None => Ok(None),
        Value::Bool(bool) => Ok(Some(i64::from(*bool))),
        Value::Int(int) => Ok(Some(int.small().unwrap_or(if int.float() < 0.0 { i64::MIN } else { i64::MAX }))),
        _ => failed("slice indices must be integers or None"),
    }
}

/// The places that a slice takes of so many.
fn places(len: usize, parts: &[Value; 3]) -> Outcome<Vec<usize>> {
    let [start, stop, step] = parts;
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return failed("slice step cannot be zero");
    }
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |at: Option<i64>, default: i64| {
        at.map_or(default, |at| if at < 0 { at.saturating_add(len) } else { at }.clamp(low, high))
    };
    let start = clamp(bound(start)?, if step > 0 { low } else { high });
    let stop = clamp(bound(stop)?, if step > 0 { high } else { low });
    let mut taken = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        taken.extend(usize::try_from(at));
        at = at.saturating_add(step);
    }
    Ok(taken)
}

/// `of[start:stop:step]`.
pub(crate) fn slice(of: &Value, parts: &[Value; 3]) -> Outcome {
    let pick = |items: &[Value]| -> Outcome<Vec<Value>> {
        Ok(places(items.len(), parts)?.into_iter().filter_map(|at| items.get(at).cloned()).collect())
    };
    match of {
        Value::List(items) => Ok(Value::list(pick(items)?)),
        Value::Tuple(items) => Ok(Value::tuple(pick(items)?)),
        Value::Str(text) => {
            let letters: Vec<char> = text.chars().collect();
            let taken = places(letters.len(), parts)?.into_iter().filter_map(|at| letters.get(at));
            Ok(Value::from(taken.collect::<String>()))
        }
        Value::Object(_) => unsupported("a slice of an object"),
        _ => failed("object is not subscriptable"),
    }
}
