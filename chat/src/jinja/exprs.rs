//! A template's expressions as trees.

use std::sync::Arc;

use super::ast::{Args, Binary, Compare, Expr, Kind};
use super::lex::Token;
use super::parse::{Parsed, Parser, boxed};
use crate::value::Value;

impl Parser {
    /// An expression, or several that are a tuple.
    pub(super) fn tuple(&mut self, conditional: bool) -> Parsed<Expr> {
        self.tuple_of(conditional, true, &[])
    }

    pub(super) fn tuple_until(&mut self, conditional: bool, ends: &[&str]) -> Parsed<Expr> {
        self.tuple_of(conditional, false, ends)
    }

    fn tuple_of(&mut self, conditional: bool, _any: bool, ends: &[&str]) -> Parsed<Expr> {
        let mut items = Vec::new();
        let mut tuple = false;
        loop {
            let over = matches!(self.peek(), Some(Token::VariableEnd | Token::BlockEnd | Token::Op(")")) | None)
                || ends.iter().any(|end| self.is_name(end));
            if over {
                break;
            }
            items.push(if conditional { self.expression()? } else { self.deeper(Self::or)? });
            if !self.takes(",") {
                break;
            }
            tuple = true;
        }
        match (items.pop(), tuple) {
            (Some(only), false) => Ok(only),
            (Some(last), true) => {
                items.push(last);
                self.node(Kind::Tuple(items))
            }
            (None, _) => self.wrong("expected an expression"),
        }
    }

    pub(super) fn expression(&mut self) -> Parsed<Expr> {
        self.deeper(Self::conditional)
    }

    fn conditional(&mut self) -> Parsed<Expr> {
        let mut expr = self.or()?;
        while self.takes_name("if") {
            let test = self.or()?;
            let other = if self.takes_name("else") { Some(Box::new(self.expression()?)) } else { None };
            expr = self.node(Kind::Cond(boxed(test, expr), other))?;
        }
        Ok(expr)
    }

    pub(super) fn or(&mut self) -> Parsed<Expr> {
        let mut expr = self.and()?;
        while self.takes_name("or") {
            let other = self.and()?;
            expr = self.node(Kind::Or(boxed(expr, other)))?;
        }
        Ok(expr)
    }

    fn and(&mut self) -> Parsed<Expr> {
        let mut expr = self.not()?;
        while self.takes_name("and") {
            let other = self.not()?;
            expr = self.node(Kind::And(boxed(expr, other)))?;
        }
        Ok(expr)
    }

    fn not(&mut self) -> Parsed<Expr> {
        if self.takes_name("not") {
            let of = self.deeper(Self::not)?;
            return self.node(Kind::Not(Box::new(of)));
        }
        self.compare()
    }

    fn comparison(&mut self) -> Option<Compare> {
        let not_in =
            self.is_name("not") && matches!(self.tokens.get(self.at + 1), Some(Token::Name(name)) if name == "in");
        let operator = match self.peek()? {
            Token::Op("==") => Compare::Eq,
            Token::Op("!=") => Compare::Ne,
            Token::Op("<") => Compare::Lt,
            Token::Op("<=") => Compare::Le,
            Token::Op(">") => Compare::Gt,
            Token::Op(">=") => Compare::Ge,
            Token::Name(name) if name == "in" => Compare::In,
            _ if not_in => Compare::NotIn,
            _ => return None,
        };
        self.at += 1 + usize::from(not_in);
        Some(operator)
    }

    fn compare(&mut self) -> Parsed<Expr> {
        let first = self.sum()?;
        let mut others = Vec::new();
        while let Some(operator) = self.comparison() {
            others.push((operator, self.sum()?));
        }
        if others.is_empty() { Ok(first) } else { self.node(Kind::Compare(Box::new(first), others)) }
    }

    fn binary(&mut self, operators: &[(&str, Binary)], next: fn(&mut Self) -> Parsed<Expr>) -> Parsed<Expr> {
        let mut expr = next(self)?;
        while let Some((_, operator)) = operators.iter().find(|(sign, _)| self.is_op(sign)) {
            self.at += 1;
            let other = next(self)?;
            expr = self.node(Kind::Binary(*operator, boxed(expr, other)))?;
        }
        Ok(expr)
    }

    fn sum(&mut self) -> Parsed<Expr> {
        self.binary(&[("+", Binary::Add), ("-", Binary::Sub)], Self::concat)
    }

    fn concat(&mut self) -> Parsed<Expr> {
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.takes("~") {
            items.push(self.product()?);
        }
        self.node(Kind::Concat(items))
    }

    fn product(&mut self) -> Parsed<Expr> {
        let operators = [("*", Binary::Mul), ("/", Binary::Div), ("//", Binary::FloorDiv), ("%", Binary::Mod)];
        self.binary(&operators, Self::power)
    }

    fn power(&mut self) -> Parsed<Expr> {
        self.binary(&[("**", Binary::Pow)], |parser| parser.unary(true))
    }

    fn unary(&mut self, with_filters: bool) -> Parsed<Expr> {
        let minus = self.is_op("-");
        let expr = if self.takes("-") || self.takes("+") {
            let of = Box::new(self.deeper(|parser| parser.unary(false))?);
            self.node(if minus { Kind::Neg(of) } else { Kind::Pos(of) })?
        } else {
            self.primary()?
        };
        let expr = self.postfix(expr)?;
        if with_filters { self.filters_and_tests(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let Some(token) = self.peek().cloned() else { return self.wrong("expected an expression") };
        self.at += 1;
        match token {
            Token::Name(name) => self.node(match name.as_str() {
                "true" | "True" => Kind::Const(true.into()),
                "false" | "False" => Kind::Const(false.into()),
                "none" | "None" => Kind::Const(Value::None),
                _ => Kind::Name(name.into()),
            }),
            Token::Const(Value::Str(text)) => {
                let mut text = text.to_string();
                while let Some(Token::Const(Value::Str(more))) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                self.node(Kind::Const(text.into()))
            }
            Token::Const(value) => self.node(Kind::Const(value)),
            Token::Op("(") => self.deeper(Self::parenthesized),
            Token::Op("[") => self.deeper(Self::list),
            Token::Op("{") => self.deeper(Self::dict),
            _ => {
                self.at -= 1;
                self.wrong("expected an expression")
            }
        }
    }

    fn parenthesized(&mut self) -> Parsed<Expr> {
        if self.takes(")") {
            return self.node(Kind::Tuple(Vec::new()));
        }
        let expr = self.tuple(true)?;
        self.expect(")")?;
        Ok(expr)
    }

    fn list(&mut self) -> Parsed<Expr> {
        let mut items = Vec::new();
        while !self.is_op("]") {
            if !items.is_empty() {
                self.expect(",")?;
            }
            if self.is_op("]") {
                break;
            }
            items.push(self.expression()?);
        }
        self.expect("]")?;
        self.node(Kind::List(items))
    }

    fn dict(&mut self) -> Parsed<Expr> {
        let mut pairs = Vec::new();
        while !self.is_op("}") {
            if !pairs.is_empty() {
                self.expect(",")?;
            }
            if self.is_op("}") {
                break;
            }
            let key = self.expression()?;
            self.expect(":")?;
            pairs.push((key, self.expression()?));
        }
        self.expect("}")?;
        self.node(Kind::Dict(pairs))
    }

    fn postfix(&mut self, mut expr: Expr) -> Parsed<Expr> {
        loop {
            if self.takes(".") {
                expr = self.attribute(expr)?;
            } else if self.takes("[") {
                expr = self.deeper(|parser| parser.subscript(expr))?;
            } else if self.is_op("(") {
                let args = self.deeper(Self::args)?;
                expr = self.node(Kind::Call(Box::new(expr), args))?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn attribute(&mut self, of: Expr) -> Parsed<Expr> {
        match self.peek().cloned() {
            Some(Token::Name(name)) => {
                self.at += 1;
                self.node(Kind::Attr(Box::new(of), name.into()))
            }
            Some(Token::Const(Value::Int(int))) => {
                self.at += 1;
                let at = self.node(Kind::Const(Value::Int(int)))?;
                self.node(Kind::Item(Box::new(of), Box::new(at)))
            }
            _ => self.wrong("expected a name or a number"),
        }
    }

    fn subscript(&mut self, of: Expr) -> Parsed<Expr> {
        let mut items = Vec::new();
        while !self.is_op("]") {
            if !items.is_empty() {
                self.expect(",")?;
            }
            items.push(self.subscribed()?);
        }
        self.expect("]")?;
        let at = match (items.pop(), items.is_empty()) {
            (Some(only), true) => only,
            (Some(last), false) => {
                items.push(last);
                self.node(Kind::Tuple(items))?
            }
            (None, _) => return self.wrong("expected an expression"),
        };
        self.node(Kind::Item(Box::new(of), Box::new(at)))
    }

    fn subscribed(&mut self) -> Parsed<Expr> {
        let mut parts = [None, None, None];
        let mut at = 0;
        if !self.is_op(":") {
            let first = self.expression()?;
            if !self.is_op(":") {
                return Ok(first);
            }
            parts = [Some(first), None, None];
        }
        while at < 2 && self.takes(":") {
            at += 1;
            if !self.is_op(":") && !self.is_op("]") && !self.is_op(",") {
                let part = self.expression()?;
                if let Some(place) = parts.get_mut(at) {
                    *place = Some(part);
                }
            }
        }
        self.node(Kind::Slice(Box::new(parts)))
    }

    fn args(&mut self) -> Parsed<Args> {
        self.expect("(")?;
        let mut args = Args::default();
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let named = matches!(self.tokens.get(self.at + 1), Some(Token::Op("=")));
            if self.takes("*") {
                if args.all.is_some() || args.all_named.is_some() {
                    return self.wrong("a second list of arguments");
                }
                args.all = Some(Box::new(self.expression()?));
            } else if self.takes("**") {
                if args.all_named.is_some() {
                    return self.wrong("a second map of arguments");
                }
                args.all_named = Some(Box::new(self.expression()?));
            } else if named && matches!(self.peek(), Some(Token::Name(_))) {
                if args.all_named.is_some() {
                    return self.wrong("an argument behind a map of them");
                }
                let name = self.name()?;
                self.at += 1;
                args.named.push((name, self.expression()?));
            } else {
                if !args.named.is_empty() || args.all.is_some() || args.all_named.is_some() {
                    return self.wrong("an argument behind named ones");
                }
                args.positional.push(self.expression()?);
            }
        }
        self.expect(")")?;
        Ok(args)
    }

    fn filters_and_tests(&mut self, mut expr: Expr) -> Parsed<Expr> {
        loop {
            if self.takes("|") {
                expr = self.filter(Some(expr))?;
            } else if self.takes_name("is") {
                expr = self.test(expr)?;
            } else if self.is_op("(") {
                let args = self.deeper(Self::args)?;
                expr = self.node(Kind::Call(Box::new(expr), args))?;
            } else {
                return Ok(expr);
            }
        }
    }

    /// `| a | b`, of a body.
    pub(super) fn postfix_filters(&mut self, mut expr: Option<Expr>) -> Parsed<Option<Expr>> {
        while self.takes("|") {
            expr = Some(self.filter(expr)?);
        }
        Ok(expr)
    }

    fn dotted(&mut self) -> Parsed<Arc<str>> {
        let mut name = self.name()?.to_string();
        while self.takes(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name.into())
    }

    pub(super) fn filter(&mut self, of: Option<Expr>) -> Parsed<Expr> {
        let name = self.dotted()?;
        let args = if self.is_op("(") { self.deeper(Self::args)? } else { Args::default() };
        self.node(Kind::Filter(of.map(Box::new), name, args))
    }

    fn test(&mut self, of: Expr) -> Parsed<Expr> {
        let not = self.takes_name("not");
        let name = self.dotted()?;
        let keyword = ["else", "or", "and"].iter().any(|word| self.is_name(word));
        let begins = matches!(self.peek(), Some(Token::Name(_) | Token::Const(_) | Token::Op("[" | "{")));
        let args = if self.is_op("(") {
            self.deeper(Self::args)?
        } else if begins && !keyword {
            if self.is_name("is") {
                return self.wrong("tests cannot follow each other");
            }
            let primary = self.primary()?;
            let arg = self.postfix(primary)?;
            Args { positional: vec![arg], ..Args::default() }
        } else {
            Args::default()
        };
        let test = self.node(Kind::Test(Box::new(of), name, args))?;
        if not { self.node(Kind::Not(Box::new(test))) } else { Ok(test) }
    }
}
