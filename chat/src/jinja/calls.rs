//! Arguments of filters, tests, functions and methods.

use std::sync::Arc;

use super::RenderError;
use super::ops::failed;
use crate::value::{Number, Value};

/// What a call is given, evaluated.
#[derive(Clone, Default)]
pub(crate) struct Given {
    pub(crate) positional: Vec<Value>,
    pub(crate) named: Vec<(Arc<str>, Value)>,
}

/// Arguments by the place of their names.
pub(crate) struct Bound(Vec<Option<Value>>);

impl Given {
    /// The arguments of these names, in this order; an error where there are others.
    pub(crate) fn bind(self, names: &[&str]) -> Result<Bound, RenderError> {
        if self.positional.len() > names.len() {
            return failed("too many arguments");
        }
        let mut bound: Vec<Option<Value>> = self.positional.into_iter().map(Some).collect();
        bound.resize(names.len(), None);
        for (name, value) in self.named {
            let place = names.iter().position(|known| *known == &*name).and_then(|at| bound.get_mut(at));
            match place {
                Some(place @ None) => *place = Some(value),
                _ => return failed(format!("unexpected argument {name}")),
            }
        }
        Ok(Bound(bound))
    }
}

impl Bound {
    pub(crate) fn get(&self, at: usize) -> Option<&Value> {
        self.0.get(at)?.as_ref()
    }

    pub(crate) fn required(&self, at: usize) -> Result<&Value, RenderError> {
        self.get(at).map_or_else(|| failed("too few arguments"), Ok)
    }

    /// A text, where one is required.
    pub(crate) fn text(&self, at: usize) -> Result<&str, RenderError> {
        self.required(at)?.as_str().map_or_else(|| failed("must be str"), Ok)
    }

    pub(crate) fn truthy(&self, at: usize) -> bool {
        self.get(at).is_some_and(Value::truthy)
    }

    /// A whole number, or what it is by default.
    pub(crate) fn int(&self, at: usize, default: i64) -> Result<i64, RenderError> {
        let Some(value) = self.get(at) else { return Ok(default) };
        match value.number() {
            Some(Number::Int(int)) => Ok(int.small().unwrap_or(i64::MAX)),
            _ => failed("must be an integer"),
        }
    }
}
