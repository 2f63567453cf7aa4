//! Which names are without a value at first, though the request has one of that name. Jinja decides that before it runs a template: a name
//! that a body sets, whatever comes of it, and has not read before, is the body's own from its beginning. Loops, macros and blocks in
//! that body see it so; only they can read it before it is set.

use std::collections::HashSet;
use std::sync::Arc;

use super::Syntax;
use super::ast::{Expr, ForNode, MacroNode, Stmt, Target};
use super::walk;

/// Puts [`Stmt::Unset`] where a body begins in which that can be seen.
pub(crate) fn settle(body: &mut Vec<Stmt>) -> Result<(), Syntax> {
    Body { refs: HashSet::new(), read_within: HashSet::new(), unset: Vec::new(), around: None, in_loop: false }
        .settle(body)
}

/// A body that has names of its own.
struct Body<'a> {
    /// What it names, and what it is given.
    refs: HashSet<Arc<str>>,
    /// What bodies in it name, up to here.
    read_within: HashSet<Arc<str>>,
    unset: Vec<Arc<str>>,
    around: Option<&'a Self>,
    in_loop: bool,
}

fn names_of<'a>(target: &'a Target, names: &mut Vec<&'a Arc<str>>) {
    match target {
        Target::Name(name) => names.push(name),
        Target::Tuple(targets) => targets.iter().for_each(|target| names_of(target, names)),
        Target::Attr(..) => {}
    }
}

impl<'a> Body<'a> {
    fn settle(mut self, body: &mut Vec<Stmt>) -> Result<(), Syntax> {
        self.read_all(body, false)?;
        self.settle_within(body)?;
        if !self.unset.is_empty() {
            body.insert(0, Stmt::Unset(self.unset));
        }
        Ok(())
    }

    fn knows(&self, name: &str) -> bool {
        self.refs.contains(name) || self.around.is_some_and(|around| around.knows(name))
    }

    fn load(&mut self, expr: &Expr) {
        walk::names(expr, &mut |name| _ = self.refs.insert(Arc::clone(name)));
    }

    /// `in_branch`: it may not be set, so it is what the request says until it is.
    fn store(&mut self, target: &Target, in_branch: bool) -> Result<(), Syntax> {
        let mut names = Vec::new();
        names_of(target, &mut names);
        if let Target::Attr(of, _) = target {
            self.refs.insert(Arc::clone(of));
        }
        for name in names {
            if self.in_loop && &**name == "loop" {
                return Err(Syntax("a loop's own name cannot be set".into()));
            }
            if !in_branch && self.read_within.contains(name) && !self.knows(name) {
                self.unset.push(Arc::clone(name));
            }
            self.refs.insert(Arc::clone(name));
        }
        Ok(())
    }

    fn read_all(&mut self, body: &[Stmt], in_branch: bool) -> Result<(), Syntax> {
        body.iter().try_for_each(|statement| self.read(statement, in_branch))
    }

    fn read(&mut self, statement: &Stmt, in_branch: bool) -> Result<(), Syntax> {
        let within =
            |body: &mut Self| walk::names_in(statement, &mut |name| _ = body.read_within.insert(Arc::clone(name)));
        match statement {
            Stmt::Text(_) | Stmt::Break | Stmt::Continue | Stmt::Unset(_) => {}
            Stmt::Print(exprs) => exprs.iter().for_each(|expr| self.load(expr)),
            Stmt::If(branches, other) => {
                for (test, inner) in branches {
                    self.load(test);
                    self.read_all(inner, true)?;
                }
                self.read_all(other, true)?;
            }
            Stmt::Set(target, value) => {
                self.load(value);
                self.store(target, in_branch)?;
            }
            Stmt::SetBlock(target, ..) => {
                within(self);
                self.store(target, in_branch)?;
            }
            Stmt::Macro(node) => {
                if let Some(name) = &node.name {
                    self.store(&Target::Name(Arc::clone(name)), in_branch)?;
                }
                within(self);
            }
            Stmt::For(node) => {
                self.load(&node.iter);
                within(self);
            }
            Stmt::With(pairs, _) => {
                pairs.iter().for_each(|(_, value)| self.load(value));
                within(self);
            }
            Stmt::Call(expr, _) | Stmt::FilterBlock(expr, _) => {
                self.load(expr);
                within(self);
            }
            Stmt::Generation(_) => within(self),
        }
        Ok(())
    }

    /// A body in this one, which is given these names.
    fn inner(&'a self, given: Vec<&Arc<str>>, in_loop: bool) -> Self {
        let refs = given.into_iter().cloned().collect();
        Self { refs, read_within: HashSet::new(), unset: Vec::new(), around: Some(self), in_loop }
    }

    fn settle_within(&self, body: &mut [Stmt]) -> Result<(), Syntax> {
        for statement in body {
            match statement {
                Stmt::If(branches, other) => {
                    branches.iter_mut().try_for_each(|(_, inner)| self.settle_within(inner))?;
                    self.settle_within(other)?;
                }
                Stmt::For(node) => self.settle_loop(alone(node)?)?,
                Stmt::SetBlock(_, _, inner) | Stmt::FilterBlock(_, inner) => {
                    self.inner(Vec::new(), self.in_loop).settle(inner)?;
                }
                Stmt::With(pairs, inner) => {
                    let mut given = Vec::new();
                    pairs.iter().for_each(|(target, _)| names_of(target, &mut given));
                    self.inner(given, self.in_loop).settle(inner)?;
                }
                Stmt::Macro(node) | Stmt::Call(_, node) | Stmt::Generation(node) => self.settle_macro(alone(node)?)?,
                Stmt::Text(_) | Stmt::Print(_) | Stmt::Set(..) | Stmt::Break | Stmt::Continue | Stmt::Unset(_) => {}
            }
        }
        Ok(())
    }

    fn settle_loop(&self, node: &mut ForNode) -> Result<(), Syntax> {
        let mut given = Vec::new();
        names_of(&node.target, &mut given);
        if given.iter().any(|name| &***name == "loop") {
            return Err(Syntax("a loop's own name cannot be set".into()));
        }
        self.inner(given, true).settle(&mut node.body)?;
        self.inner(Vec::new(), true).settle(&mut node.other)
    }

    fn settle_macro(&self, node: &mut MacroNode) -> Result<(), Syntax> {
        let mut inner = self.inner(node.params.iter().collect(), self.in_loop);
        node.defaults.iter().for_each(|default| inner.load(default));
        inner.settle(&mut node.body)
    }
}

/// A node that nobody else has yet.
fn alone<T>(node: &mut Arc<T>) -> Result<&mut T, Syntax> {
    Arc::get_mut(node).ok_or_else(|| Syntax("a node of the template's tree is shared".into()))
}
