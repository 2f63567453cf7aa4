//! Looks through a template's tree: which names it mentions, which form of contents it expects, which filters it names.

use std::sync::Arc;

use super::ast::{Expr, ForNode, Kind, MacroNode, Stmt, Target};
use super::{ContentForm, Facts, Syntax};

/// A place in a tree.
#[derive(Clone, Copy)]
enum Place<'a> {
    Stmt(&'a Stmt),
    Expr(&'a Expr),
}

fn expr<'a>(of: &'a Expr, visit: &mut dyn FnMut(Place<'a>)) {
    visit(Place::Expr(of));
    of.children().into_iter().for_each(|child| expr(child, visit));
}

fn of_macro<'a>(node: &'a MacroNode, visit: &mut dyn FnMut(Place<'a>)) {
    node.defaults.iter().for_each(|default| expr(default, visit));
    body(&node.body, visit);
}

fn body<'a>(statements: &'a [Stmt], visit: &mut dyn FnMut(Place<'a>)) {
    for statement in statements {
        visit(Place::Stmt(statement));
        match statement {
            Stmt::Text(_) | Stmt::Break | Stmt::Continue | Stmt::Unset(_) => {}
            Stmt::Print(exprs) => exprs.iter().for_each(|each| expr(each, visit)),
            Stmt::If(branches, other) => {
                for (test, inner) in branches {
                    expr(test, visit);
                    body(inner, visit);
                }
                body(other, visit);
            }
            Stmt::For(node) => {
                expr(&node.iter, visit);
                node.test.iter().for_each(|test| expr(test, visit));
                body(&node.body, visit);
                body(&node.other, visit);
            }
            Stmt::Set(_, value) => expr(value, visit),
            Stmt::SetBlock(_, filter, inner) => {
                filter.iter().for_each(|filter| expr(filter, visit));
                body(inner, visit);
            }
            Stmt::With(pairs, inner) => {
                pairs.iter().for_each(|(_, value)| expr(value, visit));
                body(inner, visit);
            }
            Stmt::Macro(node) | Stmt::Generation(node) => of_macro(node, visit),
            Stmt::Call(call, node) => {
                expr(call, visit);
                of_macro(node, visit);
            }
            Stmt::FilterBlock(filter, inner) => {
                expr(filter, visit);
                body(inner, visit);
            }
        }
    }
}

/// The names that an expression reads.
pub(crate) fn names<'a>(of: &'a Expr, found: &mut dyn FnMut(&'a Arc<str>)) {
    expr(of, &mut |place| {
        if let Place::Expr(Expr { kind: Kind::Name(name), .. }) = place {
            found(name);
        }
    });
}

/// The names that a statement reads, and all within it.
pub(crate) fn names_in<'a>(of: &'a Stmt, found: &mut dyn FnMut(&'a Arc<str>)) {
    body(std::slice::from_ref(of), &mut |place| match place {
        Place::Expr(Expr { kind: Kind::Name(name), .. })
        | Place::Stmt(Stmt::Set(Target::Attr(name, _), _) | Stmt::SetBlock(Target::Attr(name, _), ..)) => found(name),
        _ => {}
    });
}

/// Whether a name is read anywhere in a macro.
pub(crate) fn mentions(statements: &[Stmt], defaults: &[Expr], name: &str) -> bool {
    let mut found = false;
    let mut look = |place: Place<'_>| {
        found |= matches!(place, Place::Expr(Expr { kind: Kind::Name(known), .. }) if &**known == name);
    };
    defaults.iter().for_each(|default| expr(default, &mut look));
    body(statements, &mut look);
    found
}

/// Refuses filters and tests that nobody knows. Within a branch they are only missed where they are called.
pub(crate) fn check_names(statements: &[Stmt]) -> Result<(), Syntax> {
    let mut soft: Vec<*const Expr> = Vec::new();
    let mut unknown: Vec<(*const Expr, String)> = Vec::new();
    body(statements, &mut |place| match place {
        Place::Stmt(Stmt::If(branches, other)) => {
            let mut gather = |inner: &[Stmt]| inner.iter().for_each(|statement| direct(statement, &mut soft));
            branches.iter().for_each(|(_, inner)| gather(inner));
            gather(other);
            branches.iter().for_each(|(test, _)| {
                expr(test, &mut |place| {
                    if let Place::Expr(each) = place {
                        soft.push(each);
                    }
                })
            });
        }
        Place::Expr(each) => match &each.kind {
            Kind::Cond(..) => expr(each, &mut |place| {
                if let Place::Expr(inner) = place {
                    soft.push(inner);
                }
            }),
            Kind::Filter(_, name, _) if !super::filters::NAMES.contains(&&**name) => {
                unknown.push((each, format!("no filter {name}")))
            }
            Kind::Test(_, name, _) if !super::tests::NAMES.contains(&&**name) => {
                unknown.push((each, format!("no test {name}")))
            }
            _ => {}
        },
        Place::Stmt(_) => {}
    });
    match unknown.into_iter().find(|(place, _)| !soft.contains(place)) {
        Some((_, what)) => Err(Syntax(what)),
        None => Ok(()),
    }
}

/// The expressions of a statement within a branch, but not those within a scope of its own.
fn direct(statement: &Stmt, soft: &mut Vec<*const Expr>) {
    let mut push = |of: &Expr| {
        expr(of, &mut |place| {
            if let Place::Expr(each) = place {
                soft.push(each);
            }
        })
    };
    match statement {
        Stmt::Print(exprs) => exprs.iter().for_each(push),
        Stmt::Set(_, value) => push(value),
        Stmt::Call(call, _) => push(call),
        Stmt::For(node) => push(&node.iter),
        _ => {}
    }
}

/// What a template is, as engines find it out.
pub(crate) fn facts(source: &str, statements: &[Stmt]) -> Facts {
    let content =
        if Contents::of(statements).iterates().unwrap_or(false) { ContentForm::OpenAi } else { ContentForm::String };
    let of_message = |of: &Expr| ["message", "msg", "m"].iter().any(|name| reaches(of, name, Some("content")));
    let walks = loops_of(statements).iter().any(|node| of_message(&node.iter));
    Facts {
        sglang: crate::sglang::Form::of_source(source, walks),
        content,
        knows_developer: source.contains("\"developer\"") || source.contains("'developer'"),
        has_word_content: source.contains("content"),
        asks_time: mentions(statements, &[], "strftime_now"),
    }
}

/// A target that is no plain name: the engine gives up, and takes contents as texts.
struct GivesUp;

struct Contents<'a> {
    loops: Vec<&'a ForNode>,
    sets: Vec<(&'a Target, &'a Expr)>,
    macros: Vec<&'a MacroNode>,
    calls: Vec<&'a Expr>,
}

fn loops_of(statements: &[Stmt]) -> Vec<&ForNode> {
    let mut loops = Vec::new();
    body(statements, &mut |place| {
        if let Place::Stmt(Stmt::For(node)) = place {
            loops.push(&**node);
        }
    });
    loops
}

fn plain(target: &Target) -> Result<&str, GivesUp> {
    if let Target::Name(name) = target { Ok(name) } else { Err(GivesUp) }
}

/// A name, or something of it: filtered, tested, a slice of it; with a key, that of it.
fn reaches(of: &Expr, name: &str, key: Option<&str>) -> bool {
    let is_name = |of: &Expr| matches!(&of.kind, Kind::Name(known) if &**known == name);
    match (&of.kind, key) {
        (Kind::Filter(inner, ..), _) => inner.as_ref().is_some_and(|inner| reaches(inner, name, key)),
        (Kind::Test(inner, ..), _) => reaches(inner, name, key),
        (Kind::Item(inner, at), _) if matches!(at.kind, Kind::Slice(_)) => reaches(inner, name, key),
        (Kind::Item(inner, at), Some(key)) => {
            is_name(inner) && matches!(&at.kind, Kind::Const(known) if known.as_str() == Some(key))
        }
        (Kind::Attr(inner, attr), Some(key)) => is_name(inner) && &**attr == key,
        (_, Some(_)) => false,
        (_, None) => is_name(of),
    }
}

impl<'a> Contents<'a> {
    fn of(statements: &'a [Stmt]) -> Self {
        let mut found = Self { loops: loops_of(statements), sets: Vec::new(), macros: Vec::new(), calls: Vec::new() };
        body(statements, &mut |place| match place {
            Place::Stmt(Stmt::Set(target, value)) => found.sets.push((target, value)),
            Place::Stmt(Stmt::Macro(node)) => found.macros.push(node),
            Place::Expr(each) if matches!(each.kind, Kind::Call(..)) => found.calls.push(each),
            _ => {}
        });
        found
    }

    /// Names that hold the messages, or some of them.
    fn lists(&self) -> Result<Vec<&'a str>, GivesUp> {
        let mut names = vec!["messages"];
        let mut at = 0;
        while let Some(name) = names.get(at).copied() {
            for (target, value) in &self.sets {
                if reaches(value, name, None) {
                    let target = plain(target)?;
                    if !names.contains(&target) {
                        names.push(target);
                    }
                }
            }
            at += 1;
        }
        Ok(names)
    }

    /// Names that hold one message.
    fn messages(&self) -> Result<Vec<&'a str>, GivesUp> {
        let lists = self.lists()?;
        let over = self.loops.iter().filter(|node| lists.iter().any(|name| reaches(&node.iter, name, None)));
        over.map(|node| plain(&node.target)).collect()
    }

    /// Whether something goes through the parts of a content.
    fn iterates(&self) -> Result<bool, GivesUp> {
        let messages = self.messages()?;
        let is_content = |of: &Expr| messages.iter().any(|name| reaches(of, name, Some("content")));
        let mut within: Vec<(*const ForNode, Vec<&str>)> = Vec::new();
        for node in &self.macros {
            let params = self.content_params(node, &is_content);
            within.extend(loops_of(&node.body).into_iter().map(|each| (std::ptr::from_ref(each), params.clone())));
        }
        for node in &self.loops {
            let name = if let Kind::Name(name) = &node.iter.kind { &**name } else { "" };
            let mut around = within.iter().filter(|(each, _)| std::ptr::eq(*each, *node)).peekable();
            let free = around.peek().is_none();
            // Of macros around it, the last one that is given contents counts.
            let given =
                around.rfind(|(_, params)| !params.is_empty()).is_some_and(|(_, params)| params.contains(&name));
            if is_content(&node.iter) || given || free && name == "content" {
                plain(&node.target)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Parameters of a macro that are given a content somewhere.
    fn content_params(&self, node: &'a MacroNode, is_content: &dyn Fn(&Expr) -> bool) -> Vec<&'a str> {
        let mut given = Vec::new();
        for call in &self.calls {
            let Kind::Call(callee, args) = &call.kind else { continue };
            let theirs = matches!(&callee.kind, Kind::Name(name) if Some(name) == node.name.as_ref());
            if theirs {
                let positional = node.params.iter().zip(&args.positional).filter(|(_, arg)| is_content(arg));
                given.extend(positional.map(|(param, _)| &**param));
                let named = args.named.iter().filter(|(_, arg)| is_content(arg)).map(|(name, _)| name);
                given.extend(
                    named.filter_map(|name| node.params.iter().find(|param| *param == name)).map(|param| &**param),
                );
            }
        }
        given
    }
}
