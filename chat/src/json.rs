//! JSON as Python reads and writes it: numbers of any size, `NaN`, the order of keys, and the same separators. It knows nothing of what
//! the values mean.

use std::fmt::Write as _;
use std::sync::Arc;

use num_bigint::BigInt;

use crate::caps::{DIGITS_MAX, JSON_DEPTH_MAX, TEXT_BYTES_MAX};
use crate::jinja::text::float_text;
use crate::value::{Dict, Int, Number, Value};

/// Whose fault it is that a text is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonErrorKind {
    /// It is no JSON, for Python either.
    NoJson,
    /// Python reads it, or fails otherwise: halves of characters, depth, and long numbers.
    NotDone,
}

/// Why a text is no JSON, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub struct JsonError {
    /// Whose fault it is.
    pub kind: JsonErrorKind,
    /// What is wrong.
    pub what: &'static str,
    /// Where.
    pub at: usize,
}

/// `json.loads`. Of a key that is there twice the last value counts, at the first one's place.
pub fn parse(bytes: &[u8]) -> Result<Value, JsonError> {
    let text = std::str::from_utf8(bytes).map_err(|error| JsonError {
        kind: JsonErrorKind::NoJson,
        what: "bytes that are no UTF-8",
        at: error.valid_up_to(),
    })?;
    let mut reader = Reader { text, at: 0, depth: 0 };
    reader.space();
    let value = reader.value()?;
    reader.space();
    if reader.at < text.len() {
        return reader.wrong("more behind the value");
    }
    Ok(value)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn wrong<T>(&self, what: &'static str) -> Result<T, JsonError> {
        Err(JsonError { kind: JsonErrorKind::NoJson, what, at: self.at })
    }

    fn not_done<T>(&self, what: &'static str) -> Result<T, JsonError> {
        Err(JsonError { kind: JsonErrorKind::NotDone, what, at: self.at })
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn takes(&mut self, word: &str) -> bool {
        let there = self.rest().starts_with(word);
        self.at += if there { word.len() } else { 0 };
        there
    }

    fn value(&mut self) -> Result<Value, JsonError> {
        match self.peek() {
            Some(b'{') => self.nested(Self::dict),
            Some(b'[') => self.nested(Self::list),
            Some(b'"') => Ok(Value::Str(self.string()?)),
            _ if self.takes("null") => Ok(Value::None),
            _ if self.takes("true") => Ok(Value::Bool(true)),
            _ if self.takes("false") => Ok(Value::Bool(false)),
            _ if self.takes("NaN") => Ok(Value::Float(f64::NAN)),
            _ if self.takes("Infinity") => Ok(Value::Float(f64::INFINITY)),
            _ if self.takes("-Infinity") => Ok(Value::Float(f64::NEG_INFINITY)),
            _ => self.number(),
        }
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Value, JsonError>) -> Result<Value, JsonError> {
        self.depth += 1;
        if self.depth > JSON_DEPTH_MAX {
            return self.not_done("values too deep within each other");
        }
        self.at += 1;
        self.space();
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn dict(&mut self) -> Result<Value, JsonError> {
        let mut dict = Dict::new();
        if self.takes("}") {
            return Ok(dict.into());
        }
        loop {
            if self.peek() != Some(b'"') {
                return self.wrong("no key");
            }
            let key = self.string()?;
            self.space();
            if !self.takes(":") {
                return self.wrong("no colon");
            }
            self.space();
            let value = self.value()?;
            dict.insert(key, value);
            self.space();
            if self.takes("}") {
                return Ok(dict.into());
            }
            if !self.takes(",") {
                return self.wrong("no comma");
            }
            self.space();
        }
    }

    fn list(&mut self) -> Result<Value, JsonError> {
        let mut items = Vec::new();
        if self.takes("]") {
            return Ok(Value::list(items));
        }
        loop {
            items.push(self.value()?);
            self.space();
            if self.takes("]") {
                return Ok(Value::list(items));
            }
            if !self.takes(",") {
                return self.wrong("no comma");
            }
            self.space();
        }
    }

    /// What stands there as it is, up to the end of a text or to what is written otherwise in it.
    fn plain(&mut self) -> &'a str {
        let plain = self.rest();
        let plain = plain.get(..plain_bytes(plain.as_bytes())).unwrap_or_default();
        self.at += plain.len();
        plain
    }

    fn string(&mut self) -> Result<Arc<str>, JsonError> {
        self.at += 1;
        let plain = self.plain();
        if self.takes("\"") {
            return Ok(plain.into());
        }
        let mut text = plain.to_owned();
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(text.into());
                }
                Some(b'\\') => {
                    text.push(self.escape()?);
                    text.push_str(self.plain());
                }
                Some(_) => return self.wrong("a control character"),
                None => return self.wrong("a text without an end"),
            }
        }
    }

    fn escape(&mut self) -> Result<char, JsonError> {
        self.at += 1;
        let letter = match self.peek() {
            Some(b'n') => '\n',
            Some(b't') => '\t',
            Some(b'r') => '\r',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(letter @ (b'"' | b'\\' | b'/')) => char::from(letter),
            Some(b'u') => {
                self.at += 1;
                return self.unicode();
            }
            _ => return self.wrong("an unknown escape"),
        };
        self.at += 1;
        Ok(letter)
    }

    fn unit(&mut self) -> Result<u32, JsonError> {
        let digits = self.rest().get(..4).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let Some(unit) = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()) else {
            return self.wrong("an unknown escape");
        };
        self.at += 4;
        Ok(unit)
    }

    fn unicode(&mut self) -> Result<char, JsonError> {
        let first = self.unit()?;
        let mut code = first;
        if (0xd800..0xdc00).contains(&first) && self.takes("\\u") {
            let second = self.unit()?;
            if !(0xdc00..0xe000).contains(&second) {
                return self.not_done("half of a surrogate pair");
            }
            code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
        }
        match char::from_u32(code) {
            Some(letter) => Ok(letter),
            None => self.not_done("half of a surrogate pair"),
        }
    }

    fn digits(&mut self) -> usize {
        let count = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        self.at += count;
        count
    }

    fn number(&mut self) -> Result<Value, JsonError> {
        let start = self.at;
        self.takes("-");
        let whole = if self.takes("0") { 1 } else { self.digits() };
        if whole == 0 {
            self.at = start;
            return self.wrong("no value");
        }
        let end = self.at;
        let fraction = self.takes(".") && self.digits() > 0;
        if !fraction {
            self.at = end;
        }
        let before = self.at;
        let mut power = false;
        if self.takes("e") || self.takes("E") {
            let _ = self.takes("+") || self.takes("-");
            power = self.digits() > 0;
        }
        if !power {
            self.at = before;
        }
        let text = self.text.get(start..self.at).unwrap_or_default();
        if fraction || power {
            return Ok(Value::Float(text.parse().unwrap_or(f64::NAN)));
        }
        if whole > DIGITS_MAX {
            return self.not_done("a number of too many digits");
        }
        let big = || text.parse::<BigInt>().unwrap_or_default();
        Ok(Value::Int(text.parse().map_or_else(|_| Int::of(big()), Int::Small)))
    }
}

/// How many bytes there are before a quote, a backslash or a control character: eight at a time, as texts are long.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    const HIGHS: u64 = ONES << 7;
    // A byte's highest bit is set where it is less, and in those above it at most: the lowest one is right.
    let below = |word: u64, than: u64| word.wrapping_sub(ONES * than) & !word & HIGHS;
    let (words, _) = bytes.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let found = below(word, 0x20) | below(word ^ (ONES * 0x22), 1) | below(word ^ (ONES * 0x5c), 1);
        if found != 0 {
            return 8 * at + found.trailing_zeros() as usize / 8;
        }
    }
    let before = 8 * words.len();
    let is_odd = |byte: &u8| *byte < 0x20 || matches!(byte, b'"' | b'\\');
    let rest = bytes.get(before..).unwrap_or_default();
    before + rest.iter().position(is_odd).unwrap_or(rest.len())
}

/// How `json.dumps` writes.
#[derive(Clone, Debug, Default)]
pub struct Dumps {
    /// Nothing but ASCII.
    pub ensure_ascii: bool,
    /// What a level is indented by; nothing is where there is none.
    pub indent: Option<String>,
    /// Between items and behind keys, where they are not the usual ones.
    pub separators: Option<(String, String)>,
    /// Keys in order.
    pub sort_keys: bool,
}

/// `json.dumps`; or what Python would raise.
pub fn dumps(value: &Value, how: &Dumps) -> Result<String, String> {
    let (item, key) = match &how.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None if how.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let mut writer = Writer { out: String::new(), how, item, key, depth: 0 };
    writer.value(value)?;
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    how: &'a Dumps,
    item: &'a str,
    key: &'a str,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) -> Result<(), String> {
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(bool) => self.out.push_str(if *bool { "true" } else { "false" }),
            Value::Int(int) => _ = write!(self.out, "{int}"),
            Value::Float(float) => self.out.push_str(&number(*float)),
            Value::Str(text) => self.string(text),
            Value::List(items) | Value::Tuple(items) => {
                self.items('[', ']', items.len(), |writer, at| match items.get(at) {
                    Some(item) => writer.value(item),
                    None => Ok(()),
                })?
            }
            Value::Dict(dict) => self.dict(dict)?,
            Value::Object(object) => match object.markup() {
                Some(text) => self.string(&text),
                None => return Err("Object is not JSON serializable".into()),
            },
            Value::Undefined => return Err("Object of type Undefined is not JSON serializable".into()),
        }
        Ok(())
    }

    fn dict(&mut self, dict: &Dict) -> Result<(), String> {
        let mut pairs: Vec<(&Value, &Value)> = dict.iter().collect();
        if self.how.sort_keys {
            sort(&mut pairs)?;
        }
        self.items('{', '}', pairs.len(), |writer, at| {
            let Some((key, value)) = pairs.get(at) else { return Ok(()) };
            match key {
                Value::Str(text) => writer.string(text),
                Value::None => writer.string("null"),
                Value::Bool(bool) => writer.string(if *bool { "true" } else { "false" }),
                Value::Int(int) => writer.string(&int.to_string()),
                Value::Float(float) => writer.string(&number(*float)),
                _ => return Err("keys must be str, int, float, bool or None".into()),
            }
            writer.out.push_str(writer.key);
            writer.value(value)
        })
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        count: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), String>,
    ) -> Result<(), String> {
        self.out.push(open);
        self.depth += 1;
        if self.depth > 2 * JSON_DEPTH_MAX {
            return Err("values too deep within each other".into());
        }
        for at in 0..count {
            if at > 0 {
                self.out.push_str(self.item);
            }
            self.line();
            write(self, at)?;
            if self.out.len() > TEXT_BYTES_MAX {
                return Err("a text that is too long".into());
            }
        }
        self.depth -= 1;
        if count > 0 {
            self.line();
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(indent) = &self.how.indent {
            self.out.push('\n');
            (0..self.depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        let plain = if self.how.ensure_ascii { 0 } else { plain_bytes(text.as_bytes()) };
        let (plain, rest) = text.split_at_checked(plain).unwrap_or_default();
        self.out.push_str(plain);
        for letter in rest.chars() {
            match letter {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                _ if letter < ' ' || self.how.ensure_ascii && letter > '~' => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(letter),
            }
        }
        self.out.push('"');
    }
}

fn number(float: f64) -> String {
    match float {
        _ if float.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => float_text(float),
    }
}

/// Keys of one kind; others cannot be compared.
fn sort(pairs: &mut [(&Value, &Value)]) -> Result<(), String> {
    if pairs.iter().all(|(key, _)| key.as_str().is_some()) {
        pairs.sort_by(|(one, _), (other, _)| one.as_str().cmp(&other.as_str()));
        return Ok(());
    }
    let numbers: Option<Vec<Number>> = pairs.iter().map(|(key, _)| key.number()).collect();
    if numbers.is_none() && pairs.len() > 1 {
        return Err("'<' not supported between keys".into());
    }
    pairs.sort_by(|(one, _), (other, _)| {
        one.number()
            .zip(other.number())
            .and_then(|(one, other)| one.compare(&other))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(text: &str) -> String {
        dumps(&parse(text.as_bytes()).unwrap(), &Dumps::default()).unwrap()
    }

    #[test]
    fn what_python_reads_it_writes_the_same() {
        for (read, written) in [
            (
                r#"{"b":1,"a":[true,null,1.0,-0.0,1e2,1E400]}"#,
                r#"{"b": 1, "a": [true, null, 1.0, -0.0, 100.0, Infinity]}"#,
            ),
            (r#"{"a":1,"b":2,"a":3}"#, r#"{"a": 3, "b": 2}"#),
            (
                "[123456789012345678901234567890, -0, NaN, -Infinity]",
                "[123456789012345678901234567890, 0, NaN, -Infinity]",
            ),
            (r#""\ud83d\ude00\u00e9\/\b\u0001\u007f""#, "\"\u{1f600}\u{e9}/\\b\\u0001\u{7f}\""),
            ("[1e16, 1e-5, 0.0001, 123456789.125]", "[1e+16, 1e-05, 0.0001, 123456789.125]"),
        ] {
            assert_eq!(again(read), written);
        }
    }

    #[test]
    fn the_end_of_what_is_plain_is_found_wherever_it_is() {
        for at in 0..40 {
            for odd in ['"', '\\', '\n', '\0', '\u{1f}'] {
                let around = |plain: char| plain.to_string().repeat(at) + &odd.to_string() + "\"\u{1}!#[]\u{7f}\u{e4}";
                for plain in ['a', ' ', '!', '#', '[', ']', '\u{7f}', '\u{e4}', '\u{1f600}'] {
                    assert_eq!(
                        plain_bytes(around(plain).as_bytes()),
                        at * plain.len_utf8(),
                        "{odd:?} behind {at} {plain}"
                    );
                }
            }
        }
        assert_eq!((plain_bytes(b""), plain_bytes("\u{e4}x".repeat(9).as_bytes())), (0, 27));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "",
            "01",
            "[1,]",
            "{\"a\":1,}",
            "\"\n\"",
            "\"\\x\"",
            "nul",
            "1 2",
            "{1:2}",
            "'a'",
            "+1",
            ".5",
            "[",
            "\"a",
            "--1",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        let deep = "[".repeat(300) + &"]".repeat(300);
        assert_eq!(parse(deep.as_bytes()).unwrap_err().what, "values too deep within each other");
        for half in [r#""\ud83d""#, r#""\ude00x""#, r#""\ud83d\u0041""#] {
            assert_eq!(parse(half.as_bytes()).unwrap_err().what, "half of a surrogate pair");
        }
    }
}
