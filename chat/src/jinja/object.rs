//! What only templates make: macros, namespaces, iterators, and methods that nobody has called yet.

use std::sync::Arc;

use parking_lot::Mutex;

use super::ast::MacroNode;
use crate::value::{Dict, Value};

/// Something that a template made. It leaves a template only as a text.
#[derive(Clone)]
pub struct Object(pub(crate) Arc<Kind>);

impl std::fmt::Debug for Object {
    // Macros know the scope they are in, which knows them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<object>")
    }
}

/// What an object is.
pub(crate) enum Kind {
    Namespace(Mutex<Dict>),
    Range(Range),
    /// Gone through once. `None`: a loop is in it, or was left before its end; what else there is of it is not known here.
    Iterator(Mutex<Option<std::vec::IntoIter<Value>>>),
    Macro(Macro),
    Method {
        of: Value,
        name: Arc<str>,
    },
    Function(Function),
    Loop(Mutex<Loop>),
    View {
        of: Arc<Dict>,
        what: View,
    },
    /// A key and what has it: what `groupby` makes.
    Group {
        key: Value,
        items: Value,
    },
    Markup(Arc<str>),
    Cycler {
        items: Vec<Value>,
        at: Mutex<usize>,
    },
    Joiner {
        between: Arc<str>,
        used: Mutex<bool>,
    },
}

/// `range`.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) start: i64,
    pub(crate) stop: i64,
    pub(crate) step: i64,
}

impl Range {
    pub(crate) fn len(self) -> usize {
        let (span, step) = match self.step > 0 {
            true => (i128::from(self.stop) - i128::from(self.start), i128::from(self.step)),
            false => (i128::from(self.start) - i128::from(self.stop), -i128::from(self.step)),
        };
        if span <= 0 { 0 } else { usize::try_from((span + step - 1) / step).unwrap_or(usize::MAX) }
    }
}

/// Parts of a map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Keys,
    Values,
    Items,
}

/// What every template may call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
    RaiseException,
    StrftimeNow,
}

/// A macro, or the body of a call.
pub(crate) struct Macro {
    pub(crate) node: Arc<MacroNode>,
    pub(crate) scope: Arc<Scope>,
}

/// Where a loop is.
pub(crate) struct Loop {
    pub(crate) items: Arc<Vec<Value>>,
    pub(crate) at: usize,
    pub(crate) depth: usize,
    pub(crate) changed: Option<Vec<Value>>,
    /// The loop to call again, if it is recursive, and where it stands.
    pub(crate) again: Option<(Arc<super::ast::ForNode>, Arc<Scope>)>,
}

/// Names and their values, within others.
#[derive(Default)]
pub(crate) struct Scope {
    pub(crate) names: Mutex<Vec<(Arc<str>, Value)>>,
    pub(crate) parent: Option<Arc<Scope>>,
}

impl Scope {
    pub(crate) fn within(parent: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self { names: Mutex::default(), parent: Some(Arc::clone(parent)) })
    }

    pub(crate) fn set(&self, name: &Arc<str>, value: Value) {
        let mut names = self.names.lock();
        match names.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => names.push((Arc::clone(name), value)),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<Value> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some((_, value)) = here.names.lock().iter().find(|(known, _)| &**known == name) {
                return Some(value.clone());
            }
            scope = here.parent.as_deref();
        }
        None
    }
}

impl Object {
    pub(crate) fn value(kind: Kind) -> Value {
        Value::Object(Self(Arc::new(kind)))
    }

    pub(crate) fn iterator(items: Vec<Value>) -> Value {
        Self::value(Kind::Iterator(Mutex::new(Some(items.into_iter()))))
    }

    /// What is left of it, if it is an iterator.
    pub(crate) fn leave(&self, items: Option<Vec<Value>>) {
        if let Kind::Iterator(left) = &*self.0 {
            *left.lock() = items.map(Vec::into_iter);
        }
    }

    pub(crate) fn truthy(&self) -> bool {
        match &*self.0 {
            Kind::Range(range) => range.len() > 0,
            Kind::View { of, .. } => !of.is_empty(),
            Kind::Markup(text) => !text.is_empty(),
            Kind::Loop(_) => true,
            _ => true,
        }
    }

    /// A text that is safe in HTML, if it is one.
    pub(crate) fn markup(&self) -> Option<Arc<str>> {
        if let Kind::Markup(text) = &*self.0 { Some(Arc::clone(text)) } else { None }
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        match (&*self.0, &*other.0) {
            (Kind::Range(one), Kind::Range(other)) => {
                let (count, single) = (one.len(), one.len() == 1);
                count == other.len() && (count == 0 || one.start == other.start && (single || one.step == other.step))
            }
            (Kind::Markup(one), Kind::Markup(other)) => one == other,
            _ => Arc::ptr_eq(&self.0, &other.0),
        }
    }
}
