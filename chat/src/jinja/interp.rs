//! Runs a template's tree.

use std::sync::Arc;

use parking_lot::Mutex;

use super::ast::{Args, Expr, ForNode, Kind as E, MacroNode, Stmt, Target};
use super::attrs::{attr, has_method, item};
use super::bounds::{stack_place, weight};
use super::calls::Given;
use super::object::{Function, Kind, Loop, Macro, Object, Scope};
use super::ops::{self, failed, unsupported};
use super::sequences::{items, slice};
use super::text::{fits, write_str};
use super::{Clock, RenderError};
use crate::value::{Dict, Key, Value};

pub(crate) type Outcome<T = Value> = Result<T, RenderError>;

/// What comes behind a statement.
#[derive(PartialEq, Eq)]
pub(crate) enum Flow {
    On,
    Break,
    Continue,
}

/// One rendering.
pub(crate) struct Interp<'a> {
    context: &'a Dict,
    pub(crate) clock: &'a Clock,
    pub(super) steps: u64,
    pub(super) made: usize,
    pub(super) depth: usize,
    pub(super) calls: usize,
    pub(super) stack: usize,
    /// What may hold itself, and is taken apart in the end.
    scopes: Vec<Arc<Scope>>,
    pub(super) namespaces: Vec<Value>,
    namespace_reads: u64,
    pub(super) namespace_writes: u64,
}

/// The text of a template.
pub(crate) fn render(body: &[Stmt], context: &Dict, clock: &Clock) -> Outcome<String> {
    let mut interp = Interp {
        context,
        clock,
        steps: 0,
        made: 0,
        depth: 0,
        calls: 0,
        stack: stack_place(),
        scopes: Vec::new(),
        namespaces: Vec::new(),
        namespace_reads: 0,
        namespace_writes: 0,
    };
    let mut out = String::new();
    let done = interp.body(body, &Arc::new(Scope::default()), &mut out);
    interp.take_apart();
    done.map(|_| out)
}

impl Interp<'_> {
    fn take_apart(&mut self) {
        for scope in self.scopes.drain(..) {
            scope.names.lock().clear();
        }
        for namespace in &self.namespaces {
            if let Value::Object(object) = namespace
                && let Kind::Namespace(names) = &*object.0
            {
                let taken = std::mem::take(&mut *names.lock());
                drop(taken);
            }
        }
    }

    pub(crate) fn body(&mut self, body: &[Stmt], scope: &Arc<Scope>, out: &mut String) -> Outcome<Flow> {
        self.deeper()?;
        for statement in body {
            let flow = self.statement(statement, scope, out)?;
            fits(out)?;
            if flow != Flow::On {
                self.depth -= 1;
                return Ok(flow);
            }
        }
        self.depth -= 1;
        Ok(Flow::On)
    }

    fn statement(&mut self, statement: &Stmt, scope: &Arc<Scope>, out: &mut String) -> Outcome<Flow> {
        match statement {
            Stmt::Text(text) => out.push_str(text),
            Stmt::Print(exprs) => self.print(exprs, scope, out)?,
            Stmt::If(branches, other) => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.truthy() {
                        return self.body(body, scope, out);
                    }
                }
                return self.body(other, scope, out);
            }
            Stmt::For(node) => self.for_loop(node, scope, out)?,
            Stmt::Set(target, value) => {
                let value = self.eval(value, scope)?;
                self.assign(target, value, scope)?;
            }
            Stmt::SetBlock(target, filter, body) => self.set_block(target, filter.as_ref(), body, scope)?,
            Stmt::With(pairs, body) => return self.with(pairs, body, scope, out),
            Stmt::Macro(node) => self.define(node, scope),
            Stmt::Call(call, node) => self.call_block(call, node, scope, out)?,
            Stmt::Generation(node) => self.whole(&node.body, &Scope::within(scope), out)?,
            Stmt::FilterBlock(filter, body) => {
                let mut inner = String::new();
                self.whole(body, &Scope::within(scope), &mut inner)?;
                let value = self.filtered(filter, inner.into(), scope)?;
                write_str(&value, out)?;
            }
            Stmt::Unset(names) => names.iter().for_each(|name| scope.set(name, Value::Undefined)),
            Stmt::Break => return Ok(Flow::Break),
            Stmt::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    /// A body that no `break` leaves.
    fn whole(&mut self, body: &[Stmt], scope: &Arc<Scope>, out: &mut String) -> Outcome<()> {
        match self.body(body, scope, out)? {
            Flow::On => Ok(()),
            _ => unsupported("break or continue out of a block's text"),
        }
    }

    fn print(&mut self, exprs: &[Expr], scope: &Arc<Scope>, out: &mut String) -> Outcome<()> {
        for expr in exprs {
            let value = self.eval(expr, scope)?;
            write_str(&value, out)?;
        }
        Ok(())
    }

    fn set_block(&mut self, target: &Target, filter: Option<&Expr>, body: &[Stmt], scope: &Arc<Scope>) -> Outcome<()> {
        let mut inner = String::new();
        let within = Scope::within(scope);
        self.whole(body, &within, &mut inner)?;
        let value = match filter {
            Some(filter) => self.filtered(filter, inner.into(), &within)?,
            None => inner.into(),
        };
        self.assign(target, value, scope)
    }

    fn with(&mut self, pairs: &[(Target, Expr)], body: &[Stmt], scope: &Arc<Scope>, out: &mut String) -> Outcome<Flow> {
        let within = Scope::within(scope);
        for (target, value) in pairs {
            let value = self.eval(value, scope)?;
            self.assign(target, value, &within)?;
        }
        self.body(body, &within, out)
    }

    fn define(&mut self, node: &Arc<MacroNode>, scope: &Arc<Scope>) {
        let made = Object::value(Kind::Macro(Macro { node: Arc::clone(node), scope: Arc::clone(scope) }));
        if let Some(name) = &node.name {
            scope.set(name, made);
        }
        self.scopes.push(Arc::clone(scope));
    }

    fn call_block(&mut self, call: &Expr, node: &Arc<MacroNode>, scope: &Arc<Scope>, out: &mut String) -> Outcome<()> {
        let E::Call(callee, args) = &call.kind else { return failed("no call") };
        let callee = self.eval(callee, scope)?;
        let mut given = self.given(args, scope)?;
        let caller = Object::value(Kind::Macro(Macro { node: Arc::clone(node), scope: Arc::clone(scope) }));
        given.named.push(("caller".into(), caller));
        let value = self.call(&callee, given)?;
        write_str(&value, out)
    }

    fn assign(&mut self, target: &Target, value: Value, scope: &Arc<Scope>) -> Outcome<()> {
        match target {
            Target::Name(name) => {
                self.shallow(&value)?;
                if matches!(&value, Value::Object(object) if matches!(&*object.0, Kind::Macro(_) | Kind::Loop(_))) {
                    self.scopes.push(Arc::clone(scope));
                }
                scope.set(name, value);
            }
            Target::Tuple(targets) => {
                let values = items(&value)?;
                if values.len() != targets.len() {
                    return failed("not as many values as names");
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
            Target::Attr(of, name) => {
                self.shallow(&value)?;
                // Such a macro outlives the names that it reads.
                if matches!(&value, Value::Object(object) if matches!(&*object.0, Kind::Macro(known) if known.scope.parent.is_some()))
                {
                    return unsupported("a macro that a namespace takes out of its block");
                }
                self.namespace_writes += 1;
                match self.name(of, scope) {
                    Value::Object(object) => match &*object.0 {
                        Kind::Namespace(names) => _ = names.lock().insert(Arc::clone(name), value),
                        _ => return failed("cannot assign attribute on non-namespace object"),
                    },
                    _ => return failed("cannot assign attribute on non-namespace object"),
                }
            }
        }
        Ok(())
    }

    fn for_loop(&mut self, node: &Arc<ForNode>, scope: &Arc<Scope>, out: &mut String) -> Outcome<()> {
        let over = self.eval(&node.iter, scope)?;
        self.run_loop(node, &over, scope, 1, out)
    }

    /// A loop over something, so deep in its own recursion.
    pub(crate) fn run_loop(
        &mut self,
        node: &Arc<ForNode>,
        over: &Value,
        scope: &Arc<Scope>,
        depth: usize,
        out: &mut String,
    ) -> Outcome<()> {
        let all = match (over, &node.test) {
            (Value::List(all) | Value::Tuple(all), None) => Arc::clone(all),
            _ => Arc::new(items(over)?),
        };
        let iterator = match over {
            Value::Object(object) if matches!(&*object.0, Kind::Iterator(_)) => Some(object),
            _ => None,
        };
        if let Some(iterator) = iterator {
            iterator.leave(None);
        }
        self.step(all.len())?;
        let reads = self.namespace_reads;
        let all = if node.test.is_some() { Arc::new(self.tested(node, &all, scope)?) } else { all };
        let writes = (self.namespace_reads > reads).then_some(self.namespace_writes);
        let again = node.recursive.then(|| (Arc::clone(node), Arc::clone(scope)));
        let state =
            Arc::new(Kind::Loop(Mutex::new(Loop { items: Arc::clone(&all), at: 0, depth, changed: None, again })));
        let name: Arc<str> = "loop".into();
        for (at, value) in all.iter().enumerate() {
            if let Kind::Loop(state) = &*state {
                state.lock().at = at;
            }
            let within = Scope::within(scope);
            within.set(&name, Value::Object(Object(Arc::clone(&state))));
            self.assign(&node.target, value.clone(), &within)?;
            let flow = self.body(&node.body, &within, out)?;
            if writes.is_some_and(|writes| self.namespace_writes != writes) && at + 1 < all.len() {
                return unsupported("a loop that changes what its condition reads");
            }
            if flow == Flow::Break {
                return Ok(());
            }
        }
        if let Some(iterator) = iterator {
            iterator.leave(Some(Vec::new()));
        }
        if all.is_empty() {
            self.body(&node.other, &Scope::within(scope), out)?;
        }
        Ok(())
    }

    fn tested(&mut self, node: &ForNode, all: &[Value], scope: &Arc<Scope>) -> Outcome<Vec<Value>> {
        let Some(test) = &node.test else { return Ok(all.to_vec()) };
        let mut kept = Vec::new();
        for value in all {
            let within = Scope::within(scope);
            self.assign(&node.target, value.clone(), &within)?;
            if self.eval(test, &within)?.truthy() {
                kept.push(value.clone());
            }
        }
        Ok(kept)
    }

    pub(crate) fn name(&self, name: &str, scope: &Scope) -> Value {
        let function = |function| Object::value(Kind::Function(function));
        scope.get(name).or_else(|| self.context.get(name).cloned()).unwrap_or_else(|| match name {
            "range" => function(Function::Range),
            "dict" => function(Function::Dict),
            "namespace" => function(Function::Namespace),
            "cycler" => function(Function::Cycler),
            "joiner" => function(Function::Joiner),
            "lipsum" | "self" => function(Function::Lipsum),
            "raise_exception" => function(Function::RaiseException),
            "strftime_now" => function(Function::StrftimeNow),
            _ => Value::Undefined,
        })
    }

    pub(crate) fn eval(&mut self, expr: &Expr, scope: &Arc<Scope>) -> Outcome {
        self.deeper()?;
        let value = match &expr.kind {
            E::Const(value) => value.clone(),
            E::Name(name) => self.name(name, scope),
            E::Attr(of, name) => {
                let of = self.eval(of, scope)?;
                self.noted(&of);
                attr(&of, name)?
            }
            E::Item(of, at) => self.item(of, at, scope)?,
            E::Call(callee, args) => {
                let value = self.called(callee, args, scope)?;
                self.made(&value)?;
                value
            }
            E::Filter(of, name, args) => {
                let Some(of) = of else { return failed("a filter of nothing") };
                let of = self.eval(of, scope)?;
                let given = self.given(args, scope)?;
                let value = self.filter(name, of, given)?;
                self.made(&value)?;
                value
            }
            E::Test(of, name, args) => {
                let of = self.eval(of, scope)?;
                let given = self.given(args, scope)?;
                self.test(name, &of, given)?.into()
            }
            E::Cond(both, other) => self.conditional(both, other.as_deref(), scope)?,
            E::And(both) | E::Or(both) => {
                let [one, other] = &**both;
                let one = self.eval(one, scope)?;
                if one.truthy() == matches!(expr.kind, E::Or(_)) { one } else { self.eval(other, scope)? }
            }
            E::Not(of) => (!self.eval(of, scope)?.truthy()).into(),
            _ => {
                let value = self.computed(expr, scope)?;
                self.made(&value)?;
                value
            }
        };
        self.depth -= 1;
        Ok(value)
    }

    fn called(&mut self, callee: &Expr, args: &Args, scope: &Arc<Scope>) -> Outcome {
        let callee = match &callee.kind {
            E::Attr(of, name) => {
                let of = self.eval(of, scope)?;
                self.noted(&of);
                // What most calls are needs no object for the method.
                if has_method(&of, name) {
                    let given = self.given(args, scope)?;
                    return self.method(&of, name, given);
                }
                attr(&of, name)?
            }
            _ => self.eval(callee, scope)?,
        };
        let given = self.given(args, scope)?;
        self.call(&callee, given)
    }

    /// A namespace that is read may change.
    fn noted(&mut self, of: &Value) {
        if matches!(of, Value::Object(object) if matches!(&*object.0, Kind::Namespace(_) | Kind::Joiner { .. } | Kind::Cycler { .. }))
        {
            self.namespace_reads += 1;
        }
    }

    fn conditional(&mut self, both: &[Expr; 2], other: Option<&Expr>, scope: &Arc<Scope>) -> Outcome {
        let [test, then] = both;
        if self.eval(test, scope)?.truthy() {
            return self.eval(then, scope);
        }
        other.map_or(Ok(Value::Undefined), |other| self.eval(other, scope))
    }

    #[inline(never)]
    fn computed(&mut self, expr: &Expr, scope: &Arc<Scope>) -> Outcome {
        match &expr.kind {
            E::List(items) => Ok(Value::list(self.all(items, scope)?)),
            E::Tuple(items) => Ok(Value::tuple(self.all(items, scope)?)),
            E::Dict(pairs) => self.dict(pairs, scope),
            E::Binary(operator, both) => {
                let [one, other] = &**both;
                let (one, other) = (self.eval(one, scope)?, self.eval(other, scope)?);
                let made = ops::binary(*operator, &one, &other)?;
                self.step(weight(&made))?;
                Ok(made)
            }
            E::Neg(of) => ops::negative(&self.eval(of, scope)?),
            E::Pos(of) => match self.eval(of, scope)? {
                Value::Bool(bool) => Ok(i64::from(bool).into()),
                number @ (Value::Int(_) | Value::Float(_)) => Ok(number),
                _ => failed("bad operand for unary +"),
            },
            E::Compare(first, others) => {
                let mut one = self.eval(first, scope)?;
                for (operator, other) in others {
                    let other = self.eval(other, scope)?;
                    self.compared(&one, 1)?;
                    self.compared(&other, 1)?;
                    if !ops::compare(*operator, &one, &other)? {
                        return Ok(false.into());
                    }
                    one = other;
                }
                Ok(true.into())
            }
            E::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    let part = self.eval(part, scope)?;
                    write_str(&part, &mut text)?;
                    fits(&text)?;
                }
                self.step(text.len() / 64)?;
                Ok(text.into())
            }
            _ => failed("no expression"),
        }
    }

    fn dict(&mut self, pairs: &[(Expr, Expr)], scope: &Arc<Scope>) -> Outcome {
        let mut dict = Dict::new();
        for (key, value) in pairs {
            let key = self.eval(key, scope)?;
            let value = self.eval(value, scope)?;
            match (Key::of(&key), &key) {
                (Some(key), _) => _ = dict.insert_key(key, value),
                (None, Value::List(_) | Value::Dict(_)) => return failed("unhashable type"),
                (None, _) => return unsupported("such a key"),
            }
        }
        Ok(dict.into())
    }

    fn item(&mut self, of: &Expr, at: &Expr, scope: &Arc<Scope>) -> Outcome {
        let of = self.eval(of, scope)?;
        self.noted(&of);
        if let E::Slice(parts) = &at.kind {
            let mut bounds = [Value::None, Value::None, Value::None];
            for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
                if let Some(part) = part {
                    *bound = self.eval(part, scope)?;
                }
            }
            self.step(weight(&of))?;
            let value = slice(&of, &bounds)?;
            self.made(&value)?;
            return Ok(value);
        }
        let at = self.eval(at, scope)?;
        self.step(if matches!(of, Value::Str(_)) { weight(&of) } else { 1 })?;
        item(&of, &at)
    }

    fn all(&mut self, exprs: &[Expr], scope: &Arc<Scope>) -> Outcome<Vec<Value>> {
        let mut values = Vec::with_capacity(exprs.len());
        for expr in exprs {
            values.push(self.eval(expr, scope)?);
        }
        Ok(values)
    }

    pub(crate) fn given(&mut self, args: &Args, scope: &Arc<Scope>) -> Outcome<Given> {
        let mut given = Given { positional: self.all(&args.positional, scope)?, named: Vec::new() };
        for (name, value) in &args.named {
            if given.named.iter().any(|(known, _)| known == name) {
                return failed("keyword argument repeated");
            }
            let value = self.eval(value, scope)?;
            given.named.push((Arc::clone(name), value));
        }
        if let Some(all) = &args.all {
            let all = self.eval(all, scope)?;
            given.positional.extend(items(&all)?);
        }
        if let Some(all) = &args.all_named {
            let Value::Dict(all) = self.eval(all, scope)? else { return failed("argument after ** must be a mapping") };
            for (key, value) in all.iter() {
                match key {
                    Value::Str(key) if !given.named.iter().any(|(known, _)| known == key) => {
                        given.named.push((Arc::clone(key), value.clone()));
                    }
                    _ => return failed("keywords must be different strings"),
                }
            }
        }
        Ok(given)
    }

    /// The filters of a block, the innermost first, of its text.
    fn filtered(&mut self, filter: &Expr, of: Value, scope: &Arc<Scope>) -> Outcome {
        let E::Filter(inner, name, args) = &filter.kind else { return failed("no filter") };
        let of = match inner {
            Some(inner) => self.filtered(inner, of, scope)?,
            None => of,
        };
        let given = self.given(args, scope)?;
        self.filter(name, of, given)
    }
}
