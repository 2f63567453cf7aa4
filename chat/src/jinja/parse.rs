//! A template's tokens as a tree. It evaluates nothing.

use std::sync::Arc;

use super::Syntax;
use super::ast::{Expr, ForNode, Kind, MacroNode, Stmt, Target};
use super::lex::{Token, tokens};
use crate::caps::{HEIGHT_MAX, SOURCE_DEPTH_MAX};

pub(super) type Parsed<T> = Result<T, Syntax>;

/// The statements of a template.
pub(crate) fn parse(source: &str) -> Parsed<Vec<Stmt>> {
    let mut parser = Parser { tokens: tokens(source)?, at: 0, depth: 0, loops: 0 };
    let body = parser.body(&[])?;
    if parser.at < parser.tokens.len() {
        return parser.wrong("unexpected end");
    }
    Ok(body)
}

pub(super) struct Parser {
    pub(super) tokens: Vec<Token>,
    pub(super) at: usize,
    depth: usize,
    /// Loops around this place, for `break`.
    loops: usize,
}

pub(super) fn boxed(one: Expr, other: Expr) -> Box<[Expr; 2]> {
    Box::new([one, other])
}

impl Parser {
    pub(super) fn wrong<T>(&self, what: &str) -> Parsed<T> {
        Err(Syntax(format!("{what}, at {:?}", self.tokens.get(self.at))))
    }

    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    pub(super) fn is_op(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Op(op)) if *op == operator)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(known)) if known == name)
    }

    pub(super) fn takes(&mut self, operator: &str) -> bool {
        let there = self.is_op(operator);
        self.at += usize::from(there);
        there
    }

    pub(super) fn takes_name(&mut self, name: &str) -> bool {
        let there = self.is_name(name);
        self.at += usize::from(there);
        there
    }

    pub(super) fn expect(&mut self, operator: &str) -> Parsed<()> {
        if self.takes(operator) { Ok(()) } else { self.wrong(&format!("expected {operator}")) }
    }

    fn expect_end(&mut self) -> Parsed<()> {
        if self.peek() == Some(&Token::BlockEnd) {
            self.at += 1;
            return Ok(());
        }
        self.wrong("expected the end of the tag")
    }

    pub(super) fn name(&mut self) -> Parsed<Arc<str>> {
        if let Some(Token::Name(name)) = self.peek() {
            let name = name.as_str().into();
            self.at += 1;
            return Ok(name);
        }
        self.wrong("expected a name")
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > SOURCE_DEPTH_MAX {
            return self.wrong("too deep");
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// A tree of this kind, if it is not too high.
    pub(super) fn node(&self, kind: Kind) -> Parsed<Expr> {
        let expr = Expr::new(kind);
        if expr.height > HEIGHT_MAX { self.wrong("too deep") } else { Ok(expr) }
    }

    /// Statements up to a tag of one of these names, whose beginning and name are taken too.
    fn body(&mut self, ends: &[&str]) -> Parsed<Vec<Stmt>> {
        self.deeper(|parser| {
            let mut body = Vec::new();
            loop {
                match parser.peek() {
                    None if ends.is_empty() => return Ok(body),
                    None => return parser.wrong("a block without an end"),
                    Some(Token::Text(text)) => {
                        body.push(Stmt::Text(text.as_str().into()));
                        parser.at += 1;
                    }
                    Some(Token::VariableBegin) => {
                        parser.at += 1;
                        let expr = parser.tuple(true)?;
                        if parser.peek() != Some(&Token::VariableEnd) {
                            return parser.wrong("expected the end of the expression");
                        }
                        parser.at += 1;
                        body.push(Stmt::Print(vec![expr]));
                    }
                    Some(Token::BlockBegin) => {
                        parser.at += 1;
                        if ends.iter().any(|end| parser.is_name(end)) {
                            return Ok(body);
                        }
                        body.push(parser.statement()?);
                    }
                    Some(_) => return parser.wrong("unexpected token"),
                }
            }
        })
    }

    /// What is behind the beginning of a block, to its end.
    fn statement(&mut self) -> Parsed<Stmt> {
        let name = self.name()?;
        let statement = match &*name {
            "if" => self.if_statement()?,
            "for" => self.for_statement()?,
            "set" => return self.set_statement(),
            "with" => self.with_statement()?,
            "macro" => self.macro_statement()?,
            "call" => self.call_statement()?,
            "filter" => self.filter_statement()?,
            "generation" => self.generation()?,
            "print" => self.print()?,
            "break" | "continue" if self.loops == 0 => return self.wrong("outside of a loop"),
            "break" => Stmt::Break,
            "continue" => Stmt::Continue,
            "include" | "import" | "from" | "extends" => return self.unsupported("another template"),
            "block" => return self.unsupported("a block"),
            "autoescape" => return self.unsupported("autoescape"),
            _ => return self.wrong(&format!("unknown tag {name}")),
        };
        self.expect_end()?;
        Ok(statement)
    }

    /// Nothing behind it is read.
    fn unsupported(&mut self, what: &'static str) -> Parsed<Stmt> {
        self.at = self.tokens.len();
        Err(Syntax(format!("{what} is not done here")))
    }

    fn end_of_block(&mut self, end: &str) -> Parsed<Vec<Stmt>> {
        self.expect_end()?;
        let body = self.body(&[end])?;
        self.at += 1;
        Ok(body)
    }

    fn if_statement(&mut self) -> Parsed<Stmt> {
        let mut branches = Vec::new();
        let mut other = Vec::new();
        loop {
            let test = self.tuple(false)?;
            self.expect_end()?;
            let body = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            if self.takes_name("elif") {
                continue;
            }
            if self.takes_name("else") {
                self.expect_end()?;
                other = self.body(&["endif"])?;
            }
            self.at += 1;
            return Ok(Stmt::If(branches, other));
        }
    }

    fn for_statement(&mut self) -> Parsed<Stmt> {
        let target = self.target(&["in"])?;
        if !self.takes_name("in") {
            return self.wrong("expected in");
        }
        let iter = self.tuple_until(false, &["recursive"])?;
        let test = if self.takes_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.takes_name("recursive");
        self.expect_end()?;
        self.loops += 1;
        let body = self.body(&["endfor", "else"]);
        self.loops -= 1;
        let body = body?;
        let mut other = Vec::new();
        if self.takes_name("else") {
            self.expect_end()?;
            other = self.body(&["endfor"])?;
        }
        self.at += 1;
        Ok(Stmt::For(Arc::new(ForNode { target, iter, test, recursive, body, other })))
    }

    /// Names that are set: one, or several in a tuple.
    fn target(&mut self, ends: &[&str]) -> Parsed<Target> {
        let mut targets = Vec::new();
        let mut tuple = false;
        loop {
            if !targets.is_empty() && (self.is_op("=") || ends.iter().any(|end| self.is_name(end))) {
                break;
            }
            targets.push(self.deeper(Self::single_target)?);
            if !self.takes(",") {
                break;
            }
            tuple = true;
        }
        match (targets.pop(), tuple) {
            (Some(only), false) => Ok(only),
            (Some(last), true) => {
                targets.push(last);
                Ok(Target::Tuple(targets))
            }
            (None, _) => self.wrong("expected a name"),
        }
    }

    fn single_target(&mut self) -> Parsed<Target> {
        if self.takes("(") {
            let inner = self.target(&[])?;
            self.expect(")")?;
            return Ok(inner);
        }
        let name = self.name()?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.wrong("a constant cannot be set");
        }
        Ok(Target::Name(name))
    }

    fn set_statement(&mut self) -> Parsed<Stmt> {
        let ahead = (self.tokens.get(self.at + 1), self.tokens.get(self.at + 2));
        let target = match ahead {
            (Some(Token::Op(".")), Some(Token::Name(_))) => {
                let of = self.name()?;
                self.at += 1;
                Target::Attr(of, self.name()?)
            }
            _ => self.target(&[])?,
        };
        if self.takes("=") {
            let value = self.tuple(true)?;
            self.expect_end()?;
            return Ok(Stmt::Set(target, value));
        }
        let filter = self.postfix_filters(None)?;
        let body = self.end_of_block("endset")?;
        self.expect_end()?;
        Ok(Stmt::SetBlock(target, filter, body))
    }

    fn with_statement(&mut self) -> Parsed<Stmt> {
        let mut pairs = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            if !pairs.is_empty() {
                self.expect(",")?;
            }
            let target = self.single_target()?;
            self.expect("=")?;
            pairs.push((target, self.expression()?));
        }
        Ok(Stmt::With(pairs, self.end_of_block("endwith")?))
    }

    fn signature(&mut self) -> Parsed<(Vec<Arc<str>>, Vec<Expr>)> {
        let (mut params, mut defaults) = (Vec::new(), Vec::new());
        self.expect("(")?;
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect(",")?;
            }
            params.push(self.name()?);
            if self.takes("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.wrong("a parameter without a default behind one that has one");
            }
        }
        self.expect(")")?;
        Ok((params, defaults))
    }

    fn macro_of(
        &mut self,
        name: Option<Arc<str>>,
        (params, defaults): (Vec<Arc<str>>, Vec<Expr>),
        end: &str,
    ) -> Parsed<Arc<MacroNode>> {
        let loops = std::mem::take(&mut self.loops);
        let body = self.end_of_block(end);
        self.loops = loops;
        let body = body?;
        let uses =
            |name: &str| !params.iter().any(|param| &**param == name) && super::walk::mentions(&body, &defaults, name);
        let (takes_varargs, takes_kwargs, takes_caller) =
            (uses("varargs"), uses("kwargs"), super::walk::mentions(&body, &defaults, "caller"));
        Ok(Arc::new(MacroNode { name, params, defaults, body, takes_varargs, takes_kwargs, takes_caller }))
    }

    fn macro_statement(&mut self) -> Parsed<Stmt> {
        let name = self.name()?;
        let signature = self.signature()?;
        Ok(Stmt::Macro(self.macro_of(Some(name), signature, "endmacro")?))
    }

    fn call_statement(&mut self) -> Parsed<Stmt> {
        let signature = if self.is_op("(") { self.signature()? } else { Default::default() };
        let call = self.expression()?;
        if !matches!(call.kind, Kind::Call(..)) {
            return self.wrong("expected a call");
        }
        Ok(Stmt::Call(call, self.macro_of(None, signature, "endcall")?))
    }

    fn generation(&mut self) -> Parsed<Stmt> {
        Ok(Stmt::Generation(self.macro_of(None, Default::default(), "endgeneration")?))
    }

    fn filter_statement(&mut self) -> Parsed<Stmt> {
        let first = self.filter(None)?;
        let Some(filter) = self.postfix_filters(Some(first))? else { return self.wrong("expected a filter") };
        Ok(Stmt::FilterBlock(filter, self.end_of_block("endfilter")?))
    }

    fn print(&mut self) -> Parsed<Stmt> {
        let mut exprs = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            if !exprs.is_empty() {
                self.expect(",")?;
            }
            exprs.push(self.expression()?);
        }
        Ok(Stmt::Print(exprs))
    }
}
