//! A template as a tree.

use std::sync::Arc;

use crate::value::Value;

/// An expression, and how many are within each other in it.
#[derive(Debug)]
pub(crate) struct Expr {
    pub(crate) kind: Kind,
    pub(crate) height: usize,
}

/// What an expression is.
#[derive(Debug)]
pub(crate) enum Kind {
    Const(Value),
    Name(Arc<str>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    /// Only within an item.
    Slice(Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Args),
    /// What is filtered is not there in a block that is.
    Filter(Option<Box<Expr>>, Arc<str>, Args),
    Test(Box<Expr>, Arc<str>, Args),
    /// The condition, what is then, and what else.
    Cond(Box<[Expr; 2]>, Option<Box<Expr>>),
    Binary(Binary, Box<[Expr; 2]>),
    And(Box<[Expr; 2]>),
    Or(Box<[Expr; 2]>),
    Not(Box<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Compare(Box<Expr>, Vec<(Compare, Expr)>),
    Concat(Vec<Expr>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

/// What a call is given.
#[derive(Debug, Default)]
pub(crate) struct Args {
    pub(crate) positional: Vec<Expr>,
    pub(crate) named: Vec<(Arc<str>, Expr)>,
    pub(crate) all: Option<Box<Expr>>,
    pub(crate) all_named: Option<Box<Expr>>,
}

impl Args {
    pub(crate) fn exprs(&self) -> impl Iterator<Item = &Expr> {
        let spread = self.all.iter().chain(&self.all_named).map(|expr| &**expr);
        self.positional.iter().chain(self.named.iter().map(|(_, expr)| expr)).chain(spread)
    }
}

impl Expr {
    pub(crate) fn new(kind: Kind) -> Self {
        let mut expr = Self { kind, height: 0 };
        expr.height = 1 + expr.children().iter().map(|child| child.height).max().unwrap_or(0);
        expr
    }

    /// What it is made of.
    pub(crate) fn children(&self) -> Vec<&Self> {
        match &self.kind {
            Kind::Const(_) | Kind::Name(_) => Vec::new(),
            Kind::List(items) | Kind::Tuple(items) | Kind::Concat(items) => items.iter().collect(),
            Kind::Dict(pairs) => pairs.iter().flat_map(|(key, value)| [key, value]).collect(),
            Kind::Attr(of, _) | Kind::Not(of) | Kind::Neg(of) | Kind::Pos(of) => vec![of],
            Kind::Item(of, at) => vec![of, at],
            Kind::Slice(parts) => parts.iter().flatten().collect(),
            Kind::Call(of, args) | Kind::Test(of, _, args) => std::iter::once(&**of).chain(args.exprs()).collect(),
            Kind::Filter(of, _, args) => of.iter().map(|of| &**of).chain(args.exprs()).collect(),
            Kind::Cond(both, other) => both.iter().chain(other.as_deref()).collect(),
            Kind::Binary(_, both) | Kind::And(both) | Kind::Or(both) => both.iter().collect(),
            Kind::Compare(first, others) => {
                std::iter::once(&**first).chain(others.iter().map(|(_, expr)| expr)).collect()
            }
        }
    }
}

/// What a value is given to.
#[derive(Debug)]
pub(crate) enum Target {
    Name(Arc<str>),
    Tuple(Vec<Target>),
    /// An attribute of a namespace.
    Attr(Arc<str>, Arc<str>),
}

/// A statement.
#[derive(Debug)]
pub(crate) enum Stmt {
    Text(Arc<str>),
    Print(Vec<Expr>),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(Arc<ForNode>),
    Set(Target, Expr),
    /// The body's text goes through the filters, the innermost first.
    SetBlock(Target, Option<Expr>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Macro(Arc<MacroNode>),
    Call(Expr, Arc<MacroNode>),
    /// What an engine generated. Its text is the body's.
    Generation(Arc<MacroNode>),
    FilterBlock(Expr, Vec<Stmt>),
    Break,
    Continue,
    /// Names without a value, whatever the request gives to the template.
    Unset(Vec<Arc<str>>),
}

/// A loop.
#[derive(Debug)]
pub(crate) struct ForNode {
    pub(crate) target: Target,
    pub(crate) iter: Expr,
    pub(crate) test: Option<Expr>,
    pub(crate) recursive: bool,
    pub(crate) body: Vec<Stmt>,
    pub(crate) other: Vec<Stmt>,
}

/// A macro, or the body of a call.
#[derive(Debug)]
pub(crate) struct MacroNode {
    /// None: the body of a call.
    pub(crate) name: Option<Arc<str>>,
    pub(crate) params: Vec<Arc<str>>,
    /// Those of the last parameters.
    pub(crate) defaults: Vec<Expr>,
    pub(crate) body: Vec<Stmt>,
    pub(crate) takes_varargs: bool,
    pub(crate) takes_kwargs: bool,
    pub(crate) takes_caller: bool,
}
