//! What a rendering may take, counted: steps, bytes, and things within each other.

use super::RenderError;
use super::interp::{Interp, Outcome};
use super::object::Kind;
use crate::caps::{CALLS_MAX, DEPTH_MAX, MADE_BYTES_MAX, STACK_BYTES_MAX, STEPS_MAX, VALUES_DEPTH_MAX};
use crate::value::Value;

/// Where the stack is now.
pub(crate) fn stack_place() -> usize {
    let here = 0_u8;
    std::ptr::from_ref(&here).addr()
}

impl Interp<'_> {
    /// Counts what is done.
    pub(crate) fn step(&mut self, steps: usize) -> Outcome<()> {
        self.steps += steps as u64;
        if self.steps > STEPS_MAX { Err(RenderError::TooMuch("steps")) } else { Ok(()) }
    }

    /// Counts a thing within another one. Whoever leaves it takes one off `depth`.
    pub(crate) fn deeper(&mut self) -> Outcome<()> {
        self.step(1)?;
        self.depth += 1;
        if self.depth > DEPTH_MAX || self.stack.abs_diff(stack_place()) > STACK_BYTES_MAX {
            return Err(RenderError::TooMuch("things within each other"));
        }
        Ok(())
    }

    /// Counts a call within another one. Whoever leaves it takes one off `calls`.
    pub(crate) fn enter(&mut self) -> Outcome<()> {
        self.calls += 1;
        if self.calls > CALLS_MAX { Err(RenderError::TooMuch("calls within each other")) } else { Ok(()) }
    }

    /// Counts the bytes of a value that was made.
    pub(crate) fn made(&mut self, value: &Value) -> Outcome<()> {
        self.made += match value {
            Value::Str(text) => text.len(),
            Value::List(items) | Value::Tuple(items) => items.len() * ITEM_BYTES,
            Value::Dict(dict) => dict.len() * MEMBER_BYTES,
            Value::Object(object) => match &*object.0 {
                Kind::Iterator(items) => items.lock().as_ref().map_or(0, ExactSizeIterator::len) * ITEM_BYTES,
                _ => ITEM_BYTES,
            },
            _ => 0,
        };
        if self.made > MADE_BYTES_MAX { Err(RenderError::TooMuch("bytes of values")) } else { Ok(()) }
    }

    /// Counts what comparing a value with others, so often, may take.
    pub(crate) fn compared(&mut self, value: &Value, times: usize) -> Outcome<()> {
        if !matches!(value, Value::List(_) | Value::Tuple(_) | Value::Dict(_)) {
            return self.step(weight(value) * times);
        }
        let mut parts = 0;
        measure(value, 0, &mut parts)?;
        self.step(parts.saturating_mul(times))
    }

    /// Refuses values too deep within each other: a template may make them by itself.
    pub(crate) fn shallow(&mut self, value: &Value) -> Outcome<()> {
        let mut parts = 0;
        measure(value, 0, &mut parts)?;
        self.step(parts / 8)
    }
}

/// A value's own bytes.
const ITEM_BYTES: usize = size_of::<Value>();
/// A key, a value, and what finds them.
const MEMBER_BYTES: usize = 3 * ITEM_BYTES;

/// What a value costs to copy or to compare, in steps.
pub(crate) fn weight(value: &Value) -> usize {
    match value {
        Value::Str(text) => text.len() / 64,
        Value::List(items) | Value::Tuple(items) => items.len() / 4,
        Value::Dict(dict) => dict.len() / 4,
        _ => 0,
    }
}

/// Counts the parts of a value, and refuses it where they are too deep within each other.
fn measure(value: &Value, at: usize, parts: &mut usize) -> Outcome<()> {
    if at > VALUES_DEPTH_MAX {
        return Err(RenderError::TooMuch("values within each other"));
    }
    *parts += 1;
    let mut all = |values: &[Value]| values.iter().try_for_each(|value| measure(value, at + 1, parts));
    match value {
        Value::Str(text) => *parts += text.len() / 64,
        Value::List(items) | Value::Tuple(items) => all(items)?,
        Value::Dict(dict) => dict.iter().try_for_each(|(_, value)| measure(value, at + 1, parts))?,
        Value::Object(object) => match &*object.0 {
            Kind::Method { of, .. } => measure(of, at + 1, parts)?,
            Kind::Iterator(items) => all(items.lock().as_ref().map_or(&[], |items| items.as_slice()))?,
            Kind::View { of, .. } => of.iter().try_for_each(|(_, value)| measure(value, at + 1, parts))?,
            Kind::Group { items, .. } => measure(items, at + 1, parts)?,
            Kind::Cycler { items, .. } => all(items)?,
            _ => {}
        },
        _ => {}
    }
    Ok(())
}
