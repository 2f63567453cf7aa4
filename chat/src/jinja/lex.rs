//! A template's text as tokens: which white space beside a tag goes, and what stands within one.

use num_bigint::BigInt;

use super::Syntax;
use super::text::is_space;
use crate::value::{Int, Value};

/// A piece of a template.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    Text(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Const(Value),
    Op(&'static str),
}

/// The longest first.
const OPERATORS: &[&str] = &[
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// The tokens of a template.
pub(crate) fn tokens(source: &str) -> Result<Vec<Token>, Syntax> {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    let mut lexer = Lexer { text: &text, at: 0, line_starts: true, tokens: Vec::new() };
    while lexer.at < text.len() {
        lexer.root()?;
    }
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    /// Whether what was read last ends a line.
    line_starts: bool,
    tokens: Vec<Token>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn wrong<T>(&self, what: impl Into<String>) -> Result<T, Syntax> {
        let line = self.text.get(..self.at).unwrap_or_default().matches('\n').count() + 1;
        Err(Syntax(format!("line {line}: {}", what.into())))
    }

    fn takes(&mut self, word: &str) -> bool {
        let there = self.rest().starts_with(word);
        self.at += if there { word.len() } else { 0 };
        there
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(is_space).len();
    }

    /// A sign behind the beginning of a tag.
    fn sign(&mut self) -> Option<char> {
        let sign = self.rest().chars().next().filter(|sign| matches!(sign, '-' | '+'));
        self.at += usize::from(sign.is_some());
        sign
    }

    /// Text up to a tag, and the tag.
    fn root(&mut self) -> Result<(), Syntax> {
        let rest = self.rest();
        let begin = rest
            .match_indices('{')
            .map(|(at, _)| at)
            .find(|at| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')));
        let Some(begin) = begin else {
            self.data(rest, None, false);
            self.at = self.text.len();
            return Ok(());
        };
        let (before, tag) = (rest.get(..begin).unwrap_or_default(), rest.as_bytes().get(begin + 1).copied());
        self.at += begin + 2;
        let sign = self.sign();
        self.data(before, sign, tag != Some(b'{'));
        self.line_starts = false;
        match tag {
            Some(b'#') => self.comment(),
            Some(b'%') if self.raw_begins() => self.raw(),
            Some(b'%') => self.tag(Token::BlockBegin),
            _ => self.tag(Token::VariableBegin),
        }
    }

    fn data(&mut self, text: &str, sign: Option<char>, strips: bool) {
        let kept = match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if strips => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let last = text.get(line..).unwrap_or_default();
                let blank = !last.is_empty() && last.chars().all(is_space);
                if blank && (line > 0 || self.starts_line()) { text.get(..line).unwrap_or_default() } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.tokens.push(Token::Text(kept.to_owned()));
        }
    }

    fn starts_line(&self) -> bool {
        self.line_starts
    }

    fn trim_newline(&mut self) {
        self.line_starts = self.takes("\n");
    }

    /// Behind `-`: all white space goes.
    fn skip_after(&mut self) {
        let from = self.at;
        self.skip_space();
        self.line_starts = self.text.get(from..self.at).unwrap_or_default().ends_with('\n');
    }

    fn comment(&mut self) -> Result<(), Syntax> {
        let Some(end) = self.rest().find("#}") else { return self.wrong("a comment without an end") };
        let inner = self.rest().get(..end).unwrap_or_default();
        let sign = inner.chars().last();
        self.at += end + 2;
        match sign {
            Some('-') => self.skip_after(),
            Some('+') => self.line_starts = false,
            _ => self.trim_newline(),
        }
        Ok(())
    }

    fn raw_begins(&mut self) -> bool {
        let from = self.at;
        self.skip_space();
        if self.takes("raw") {
            self.skip_space();
            if self.takes("-%}") {
                self.skip_space();
                return true;
            }
            if self.takes("%}") {
                return true;
            }
        }
        self.at = from;
        false
    }

    fn raw(&mut self) -> Result<(), Syntax> {
        if self.rest().is_empty() {
            return Ok(());
        }
        let from = self.at;
        self.line_starts = self.text.get(..from).unwrap_or_default().ends_with('\n');
        let mut search = from;
        while let Some(found) = self.text.get(search..).and_then(|rest| rest.find("{%")) {
            let begin = search + found;
            self.at = begin + 2;
            let sign = self.sign();
            self.skip_space();
            if self.takes("endraw") {
                self.skip_space();
                let (kept, minus) = (self.takes("+%}"), self.rest().starts_with("-%}"));
                if kept || self.takes("-%}") || self.takes("%}") {
                    self.data(self.text.get(from..begin).unwrap_or_default(), sign, true);
                    match (kept, minus) {
                        (true, _) => self.line_starts = false,
                        (_, true) => self.skip_after(),
                        _ => self.trim_newline(),
                    }
                    return Ok(());
                }
            }
            search = begin + 1;
        }
        self.wrong("raw text without an end")
    }

    /// What stands within a tag.
    fn tag(&mut self, begin: Token) -> Result<(), Syntax> {
        let block = begin == Token::BlockBegin;
        let (close, end) = if block { ("%}", Token::BlockEnd) } else { ("}}", Token::VariableEnd) };
        self.tokens.push(begin);
        let mut open: Vec<&'static str> = Vec::new();
        loop {
            if open.is_empty() {
                let minus = self.rest().strip_prefix('-').is_some_and(|rest| rest.starts_with(close));
                let plus = block && self.rest().starts_with("+%}");
                if minus || plus || self.rest().starts_with(close) {
                    self.at += close.len() + usize::from(minus || plus);
                    match (minus, plus || !block) {
                        (true, _) => self.skip_after(),
                        (_, true) => self.line_starts = false,
                        _ => self.trim_newline(),
                    }
                    self.tokens.push(end);
                    return Ok(());
                }
            }
            let Some(letter) = self.rest().chars().next() else { return self.wrong("a tag without an end") };
            if is_space(letter) {
                self.skip_space();
            } else {
                self.inside(letter, &mut open)?;
            }
        }
    }

    fn inside(&mut self, letter: char, open: &mut Vec<&'static str>) -> Result<(), Syntax> {
        if letter.is_ascii_digit() {
            let number = self.number()?;
            self.tokens.push(Token::Const(number));
        } else if letter.is_alphabetic() || letter == '_' {
            let rest = self.rest();
            let end = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
            self.tokens.push(Token::Name(rest.get(..end).unwrap_or_default().to_owned()));
            self.at += end;
        } else if matches!(letter, '\'' | '"') {
            let text = self.string(letter)?;
            self.tokens.push(Token::Const(text.into()));
        } else {
            let Some(operator) = OPERATORS.iter().find(|operator| self.rest().starts_with(**operator)) else {
                return self.wrong(format!("unexpected {letter:?}"));
            };
            match *operator {
                "(" => open.push(")"),
                "[" => open.push("]"),
                "{" => open.push("}"),
                ")" | "]" | "}" if open.pop() != Some(operator) => {
                    return self.wrong(format!("unexpected {operator:?}"));
                }
                _ => {}
            }
            self.at += operator.len();
            self.tokens.push(Token::Op(operator));
        }
        Ok(())
    }

    /// Digits with single `_` between them.
    fn digits(&mut self, radix: u32) -> String {
        let mut digits = String::new();
        let mut letters = self.rest().chars().peekable();
        while let Some(letter) = letters.next() {
            if letter.is_digit(radix) {
                digits.push(letter);
                self.at += 1;
            } else if letter == '_'
                && letters.peek().is_some_and(|next| next.is_digit(radix))
                && (!digits.is_empty() || radix != 10)
            {
                self.at += 1;
            } else {
                break;
            }
        }
        digits
    }

    fn number(&mut self) -> Result<Value, Syntax> {
        let prefix = self.rest().get(..2).unwrap_or_default().to_ascii_lowercase();
        if let Some(radix) =
            [("0b", 2), ("0o", 8), ("0x", 16)].iter().find(|(known, _)| *known == prefix).map(|(_, radix)| *radix)
        {
            self.at += 2;
            let digits = self.digits(radix);
            let big = BigInt::parse_bytes(digits.as_bytes(), radix);
            return big.map_or_else(|| self.wrong("a number without digits"), |big| Ok(Value::Int(Int::of(big))));
        }
        // No fraction behind a point: `a.0.1` are two items.
        let after_point = self.text.get(..self.at).unwrap_or_default().ends_with('.');
        let whole = self.digits(10);
        let from = self.at;
        let mut text = whole.clone();
        if !after_point && self.float_tail(&mut text) {
            return Ok(Value::Float(text.parse().unwrap_or(f64::NAN)));
        }
        self.at = from;
        if whole.len() > 1 && whole.starts_with('0') && whole.bytes().any(|digit| digit != b'0') || whole.len() > 4300 {
            return self.wrong("a number that begins with 0, or is too long");
        }
        Ok(Value::Int(Int::of(whole.parse().unwrap_or_default())))
    }

    fn float_tail(&mut self, text: &mut String) -> bool {
        let mut is_float = false;
        let point = self.rest().as_bytes();
        if point.first() == Some(&b'.') && point.get(1).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
            let fraction = self.digits(10);
            text.push('.');
            text.push_str(&fraction);
            is_float = true;
        }
        let from = self.at;
        if self.takes("e") || self.takes("E") {
            let minus = self.takes("-");
            if !minus {
                self.takes("+");
            }
            let power = self.digits(10);
            if power.is_empty() {
                self.at = from;
            } else {
                text.push_str(if minus { "e-" } else { "e" });
                text.push_str(&power);
                is_float = true;
            }
        }
        is_float
    }

    fn string(&mut self, quote: char) -> Result<String, Syntax> {
        self.at += 1;
        let mut text = String::new();
        loop {
            let mut letters = self.rest().chars();
            match letters.next() {
                None => return self.wrong("a text without an end"),
                Some(letter) if letter == quote => {
                    self.at += 1;
                    return Ok(text);
                }
                Some('\\') => {
                    let Some(letter) = letters.next() else { return self.wrong("a text without an end") };
                    self.at += 1 + letter.len_utf8();
                    self.escape(letter, &mut text)?;
                }
                Some(letter) => {
                    text.push(letter);
                    self.at += letter.len_utf8();
                }
            }
        }
    }

    fn escape(&mut self, letter: char, text: &mut String) -> Result<(), Syntax> {
        let plain = match letter {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'v' => '\u{b}',
            '\\' | '\'' | '"' => letter,
            '\n' => return Ok(()),
            'x' => return self.code(2, text),
            'u' => return self.code(4, text),
            'U' => return self.code(8, text),
            'N' => return self.wrong("a character by its name"),
            '0'..='7' => {
                let mut code = letter.to_digit(8).unwrap_or(0);
                let more: Vec<u32> = self.rest().chars().take(2).map_while(|digit| digit.to_digit(8)).collect();
                self.at += more.len();
                more.iter().for_each(|digit| code = code * 8 + digit);
                text.extend(char::from_u32(code));
                return Ok(());
            }
            other if other.is_ascii() => {
                text.push('\\');
                other
            }
            // Python writes other letters as escapes first, whose backslash is then escaped by this one.
            other => {
                let code = u32::from(other);
                text.push_str(&match code {
                    0..0x100 => format!("\\x{code:02x}"),
                    0x100..0x10000 => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
                return Ok(());
            }
        };
        text.push(plain);
        Ok(())
    }

    fn code(&mut self, digits: usize, text: &mut String) -> Result<(), Syntax> {
        let hex = self.rest().get(..digits).filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match hex.and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32) {
            Some(letter) => text.push(letter),
            None => return self.wrong("an unknown escape"),
        }
        self.at += digits;
        Ok(())
    }
}
