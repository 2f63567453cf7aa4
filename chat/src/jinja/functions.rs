//! Calls: of macros, of loops, and of what every template may call.

use std::sync::Arc;

use parking_lot::Mutex;

use super::RenderError;
use super::calls::Given;
use super::interp::{Interp, Outcome};
use super::object::{Function, Kind, Macro, Object, Range, Scope};
use super::ops::{failed, unsupported};
use super::text::str_of;
use crate::caps::RANGE_MAX;
use crate::value::{Dict, Value};

impl Interp<'_> {
    pub(crate) fn call(&mut self, callee: &Value, given: Given) -> Outcome {
        let Value::Object(object) = callee else { return failed("object is not callable") };
        match &*object.0 {
            Kind::Macro(known) => self.call_macro(known, given),
            Kind::Method { of, name } => self.method(of, name, given),
            Kind::Function(function) => self.function(*function, given),
            Kind::Joiner { between, used } => {
                given.bind(&[])?;
                self.namespace_writes += 1;
                Ok(if std::mem::replace(&mut *used.lock(), true) { Value::Str(Arc::clone(between)) } else { "".into() })
            }
            Kind::Loop(state) => {
                let given = given.bind(&["iterable"])?;
                let (again, depth) = {
                    let state = state.lock();
                    (state.again.clone(), state.depth)
                };
                let Some((node, scope)) = again else { return failed("the loop is not recursive") };
                self.enter()?;
                let mut out = String::new();
                self.run_loop(&node, given.required(0)?, &scope, depth + 1, &mut out)?;
                self.calls -= 1;
                Ok(out.into())
            }
            _ => failed("object is not callable"),
        }
    }

    fn call_macro(&mut self, known: &Macro, mut given: Given) -> Outcome {
        self.enter()?;
        let node = &known.node;
        let scope = Scope::within(&known.scope);
        // Each call may put what it was given into another list.
        given
            .positional
            .iter()
            .chain(given.named.iter().map(|(_, value)| value))
            .try_for_each(|value| self.shallow(value))?;
        let mut take = |name: &str| {
            let at = given.named.iter().position(|(known, _)| &**known == name)?;
            Some(given.named.remove(at).1)
        };
        let rest = given.positional.split_off(node.params.len().min(given.positional.len()));
        let mut positional = given.positional.into_iter();
        let mut missing = Vec::new();
        for (at, param) in node.params.iter().enumerate() {
            match positional.next().or_else(|| take(param)) {
                Some(value) => scope.set(param, value),
                None => missing.push((at, param)),
            }
        }
        if node.takes_caller && !node.params.iter().any(|param| &**param == "caller") {
            scope.set(&"caller".into(), take("caller").unwrap_or_default());
        }
        if node.takes_kwargs {
            scope.set(&"kwargs".into(), given.named.drain(..).collect::<Dict>().into());
        } else if !given.named.is_empty() {
            return failed("macro takes no such keyword argument");
        }
        if node.takes_varargs {
            scope.set(&"varargs".into(), Value::tuple(rest));
        } else if !rest.is_empty() {
            return failed("macro takes not more arguments");
        }
        let without = node.params.len() - node.defaults.len();
        for (at, param) in missing {
            let default = at.checked_sub(without).and_then(|at| node.defaults.get(at));
            let value = default.map_or(Ok(Value::Undefined), |default| self.eval(default, &scope))?;
            scope.set(param, value);
        }
        let mut out = String::new();
        self.body(&node.body, &scope, &mut out)?;
        self.calls -= 1;
        Ok(out.into())
    }

    fn function(&mut self, function: Function, given: Given) -> Outcome {
        match function {
            Function::Range => range(given),
            Function::Dict | Function::Namespace => {
                let mut dict = Dict::new();
                if given.positional.len() > 1 {
                    return failed("at most 1 argument");
                }
                match given.positional.first() {
                    None => {}
                    Some(Value::Dict(known)) => dict = known.as_ref().clone(),
                    Some(_) => return unsupported("a map of pairs"),
                }
                for (name, value) in given.named {
                    self.shallow(&value)?;
                    dict.insert(name, value);
                }
                if function == Function::Dict {
                    return Ok(dict.into());
                }
                let made = Object::value(Kind::Namespace(Mutex::new(dict)));
                self.namespaces.push(made.clone());
                Ok(made)
            }
            Function::Cycler => {
                let items = Given { named: given.named, ..Given::default() }.bind(&[]).map(|_| given.positional)?;
                if items.is_empty() {
                    failed("at least one item has to be provided")
                } else {
                    Ok(Object::value(Kind::Cycler { items, at: Mutex::new(0) }))
                }
            }
            Function::Joiner => {
                let given = given.bind(&["sep"])?;
                let between = given.get(0).map_or(Ok(", ".into()), str_of)?.into();
                Ok(Object::value(Kind::Joiner { between, used: Mutex::new(false) }))
            }
            Function::Lipsum => unsupported("lipsum or self"),
            Function::RaiseException => {
                let given = given.bind(&["message"])?;
                Err(RenderError::Raised(str_of(given.required(0)?)?))
            }
            Function::StrftimeNow => {
                let given = given.bind(&["format"])?;
                Ok(self.clock.format(given.text(0)?)?.into())
            }
        }
    }
}

fn range(given: Given) -> Outcome {
    let Given { positional, named } = given;
    let numbers: Option<Vec<i64>> =
        positional.iter().map(|value| value.as_i64().or(value.as_bool().map(i64::from))).collect();
    let (start, stop, step) = match (numbers.as_deref(), named.is_empty()) {
        (Some([stop]), true) => (0, *stop, 1),
        (Some([start, stop]), true) => (*start, *stop, 1),
        (Some([start, stop, step]), true) if *step != 0 => (*start, *stop, *step),
        _ => return failed("not the arguments of a range"),
    };
    let range = Range { start, stop, step };
    if range.len() > RANGE_MAX {
        return failed("Range too big");
    }
    Ok(Object::value(Kind::Range(range)))
}
