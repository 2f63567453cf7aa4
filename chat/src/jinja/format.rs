//! Numbers and values as texts by a format: `%`, `str.format`, and what makes numbers of texts.

use std::fmt::Write as _;

use num_bigint::BigInt;

use super::RenderError;
use super::calls::Given;
use super::ops::{failed, unsupported};
use super::text::{fits, is_space, repr, str_of};
use crate::caps::WIDTH_MAX;
use crate::value::{Int, Number, Value};

type Outcome<T = Value> = Result<T, RenderError>;

/// How one value is written.
#[derive(Default)]
struct Spec {
    left: bool,
    center: bool,
    zero: bool,
    plus: bool,
    space: bool,
    comma: bool,
    width: usize,
    precision: Option<usize>,
    aligned: bool,
    fill: Option<char>,
}

impl Spec {
    fn pad(&self, text: String, number: bool) -> String {
        let missing = self.width.saturating_sub(text.chars().count());
        let fill = |count: usize| self.fill.unwrap_or(' ').to_string().repeat(count);
        if number && self.zero && !self.left && !self.aligned {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+', ' '])));
            return format!("{sign}{}{digits}", "0".repeat(missing));
        }
        if self.center {
            return format!("{}{text}{}", fill(missing / 2), fill(missing - missing / 2));
        }
        if self.left { text + &fill(missing) } else { fill(missing) + &text }
    }

    fn signed(&self, text: String) -> String {
        match (text.starts_with('-'), self.plus, self.space) {
            (false, true, _) => format!("+{text}"),
            (false, false, true) => format!(" {text}"),
            _ => text,
        }
    }
}

/// `format % args`.
pub(crate) fn percent(format: &str, args: &Value) -> Outcome<String> {
    let one = std::slice::from_ref(args);
    let (mut rest, is_map) = match args {
        Value::Tuple(items) => (items.iter(), false),
        Value::Dict(_) => (one.iter(), true),
        _ => (one.iter(), false),
    };
    let mut out = String::new();
    let mut letters = format.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        if letters.next_if_eq(&'%').is_some() {
            out.push('%');
            continue;
        }
        let mut named = None;
        if letters.next_if_eq(&'(').is_some() {
            let name: String = letters.by_ref().take_while(|letter| *letter != ')').collect();
            let Some(value) = args.get(&name) else { return failed("no such key in a format") };
            named = Some(value);
        }
        let mut spec = Spec::default();
        while let Some(flag) = letters.next_if(|letter| "-0+ #".contains(*letter)) {
            match flag {
                '-' => spec.left = true,
                '0' => spec.zero = true,
                '+' => spec.plus = true,
                ' ' => spec.space = true,
                _ => return unsupported("such a format"),
            }
        }
        spec.width = digits(&mut letters)?.unwrap_or(0);
        if letters.next_if_eq(&'.').is_some() {
            spec.precision = Some(digits(&mut letters)?.unwrap_or(0));
        }
        let Some(kind) = letters.next() else { return failed("incomplete format") };
        let Some(value) = named.or_else(|| rest.next()) else {
            return failed("not enough arguments for format string");
        };
        out.push_str(&one_percent(kind, value, &spec)?);
        fits(&out)?;
    }
    if !is_map && rest.next().is_some() {
        return failed("not all arguments converted during string formatting");
    }
    Ok(out)
}

fn digits(letters: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Outcome<Option<usize>> {
    let mut number = None;
    while let Some(digit) = letters.next_if(char::is_ascii_digit) {
        let value = number.unwrap_or(0) * 10 + digit.to_digit(10).unwrap_or(0) as usize;
        if value > WIDTH_MAX {
            return Err(RenderError::TooMuch("characters in a format"));
        }
        number = Some(value);
    }
    Ok(number)
}

fn one_percent(kind: char, value: &Value, spec: &Spec) -> Outcome<String> {
    let cut = |text: String| match spec.precision {
        Some(most) => text.chars().take(most).collect(),
        None => text,
    };
    Ok(match kind {
        's' => spec.pad(cut(str_of(value)?), false),
        'r' => spec.pad(cut(repr(value)?), false),
        'd' | 'i' => {
            let Some(number) = value.number() else { return failed("%d format: a real number is required") };
            let text = match number {
                Number::Int(int) => int.to_string(),
                Number::Float(float) if float.is_finite() => format!("{:.0}", float.trunc()),
                Number::Float(_) => return failed("cannot convert float to integer"),
            };
            if spec.precision.is_some() {
                return unsupported("such a format");
            }
            spec.pad(spec.signed(if text == "-0" { "0".into() } else { text }), true)
        }
        'f' | 'F' => {
            let Some(number) = value.number() else { return failed("must be real number") };
            spec.pad(spec.signed(fixed(number.float(), spec.precision.unwrap_or(6))?), true)
        }
        'x' | 'X' => match value {
            Value::Int(Int::Small(number @ 0..)) => {
                spec.pad(if kind == 'x' { format!("{number:x}") } else { format!("{number:X}") }, true)
            }
            _ => return unsupported("such a format"),
        },
        _ => return unsupported("such a format"),
    })
}

fn fixed(float: f64, precision: usize) -> Outcome<String> {
    if float.is_finite() { Ok(format!("{float:.precision$}")) } else { unsupported("a format of what is no number") }
}

/// `format.format(...)`.
pub(crate) fn braces(format: &str, given: &Given) -> Outcome<String> {
    let mut out = String::new();
    let mut rest = format;
    let (mut next, mut by_number) = (0, None);
    while let Some(at) = rest.find(['{', '}']) {
        let (before, after) = rest.split_at(at);
        out.push_str(before);
        if after.starts_with("{{") || after.starts_with("}}") {
            out.push_str(after.get(..1).unwrap_or_default());
            rest = after.get(2..).unwrap_or_default();
            continue;
        }
        if after.starts_with('}') {
            return failed("Single '}' encountered in format string");
        }
        let Some((field, behind)) = after.get(1..).and_then(|after| after.split_once('}')) else {
            return failed("expected '}' before end of string");
        };
        if field.contains('{') {
            return unsupported("fields within fields");
        }
        rest = behind;
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
        let name_end = field.find(['.', '[']).unwrap_or(field.len());
        let (name, path) = field.split_at(name_end);
        let number = if name.is_empty() { None } else { name.parse::<usize>().ok() };
        let counts = name.is_empty() || number.is_some();
        if counts && *by_number.get_or_insert(number.is_some()) != number.is_some() {
            return failed("cannot switch between manual and automatic field numbering");
        }
        let value = if name.is_empty() {
            next += 1;
            given.positional.get(next - 1)
        } else if let Some(number) = number {
            given.positional.get(number)
        } else {
            given.named.iter().find(|(known, _)| &**known == name).map(|(_, value)| value)
        };
        let Some(value) = value else { return failed("no such argument of a format") };
        let value = follow(value, path)?;
        let value = match conversion {
            "" => value,
            "r" => repr(&value)?.into(),
            "s" => str_of(&value)?.into(),
            _ => return unsupported("such a conversion"),
        };
        out.push_str(&by_spec(&value, spec)?);
        fits(&out)?;
    }
    out.push_str(rest);
    Ok(out)
}

fn follow(value: &Value, path: &str) -> Outcome {
    let mut value = value.clone();
    let mut rest = path;
    while !rest.is_empty() {
        let Some((key, behind)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) else {
            return unsupported("attributes in a format");
        };
        let key = key.parse::<i64>().map_or_else(|_| Value::from(key), Value::from);
        value = super::attrs::item(&value, &key)?;
        rest = behind;
    }
    if value.is_undefined() { unsupported("what is undefined in a format") } else { Ok(value) }
}

fn by_spec(value: &Value, spec: &str) -> Outcome<String> {
    if spec.is_empty() {
        return str_of(value);
    }
    let mut letters = spec.chars().peekable();
    let mut parsed = Spec::default();
    let second = spec.chars().nth(1);
    if second.is_some_and(|align| "<>^".contains(align)) {
        parsed.fill = letters.next();
    }
    let align = letters.next_if(|align| "<>^".contains(*align));
    parsed.aligned = align.is_some();
    parsed.plus = letters.next_if_eq(&'+').is_some();
    parsed.zero = letters.next_if_eq(&'0').is_some();
    parsed.width = digits(&mut letters)?.unwrap_or(0);
    parsed.comma = letters.next_if_eq(&',').is_some();
    if letters.next_if_eq(&'.').is_some() {
        parsed.precision = digits(&mut letters)?;
    }
    let kind = letters.next();
    if letters.next().is_some() {
        return unsupported("such a format");
    }
    let text = match value {
        Value::Str(_) => true,
        Value::Int(_) | Value::Float(_) => false,
        _ => return unsupported("such a format"),
    };
    parsed.center = align == Some('^');
    parsed.left = align == Some('<') || align.is_none() && text;
    let written = match (value, kind) {
        (Value::Str(text), None | Some('s')) if !parsed.zero && !parsed.plus && !parsed.comma => match parsed.precision
        {
            Some(most) => text.chars().take(most).collect(),
            None => text.to_string(),
        },
        (Value::Int(int), None | Some('d')) if parsed.precision.is_none() => int.to_string(),
        (Value::Int(_) | Value::Float(_), Some('f')) => {
            fixed(value.number().map_or(0.0, |number| number.float()), parsed.precision.unwrap_or(6))?
        }
        _ => return unsupported("such a format"),
    };
    let written = if parsed.comma { commas(&written) } else { written };
    if parsed.comma && parsed.zero {
        return unsupported("such a format");
    }
    Ok(if text { parsed.pad(written, false) } else { parsed.pad(parsed.signed(written), true) })
}

fn commas(number: &str) -> String {
    let (sign, rest) = number.split_at(usize::from(number.starts_with('-')));
    let (whole, fraction) = rest.split_once('.').map_or((rest, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut out = sign.to_owned();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    if let Some(fraction) = fraction {
        _ = write!(out, ".{fraction}");
    }
    out
}

fn number_of(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    text.parse().ok().filter(|_| plain)
}

/// Whether Python may read a number that is not read here.
fn is_odd(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    !text.is_ascii() || text.contains('_') || lower.contains("inf") || lower.contains("nan")
}

/// `| int`.
pub(crate) fn int(of: &Value, default: Value) -> Outcome {
    match of {
        Value::Bool(bool) => Ok(i64::from(*bool).into()),
        Value::Int(_) => Ok(of.clone()),
        Value::Float(float) if float.is_finite() => whole(*float),
        Value::Str(text) if is_odd(text) => unsupported("such a number"),
        Value::Str(text) => {
            let trimmed = text.trim_matches(is_space);
            if let Ok(big) = trimmed.parse::<BigInt>() {
                return Ok(Value::Int(Int::of(big)));
            }
            number_of(trimmed).filter(|float| float.is_finite()).map_or(Ok(default), whole)
        }
        Value::Object(_) => unsupported("a number of an object"),
        // `int(Undefined)` is not caught.
        Value::Undefined => failed("undefined is no number"),
        _ => Ok(default),
    }
}

fn whole(float: f64) -> Outcome {
    let text = format!("{:.0}", float.trunc());
    Ok(Value::Int(Int::of(text.parse().unwrap_or_default())))
}

/// `| float`.
pub(crate) fn float(of: &Value, default: Value) -> Outcome {
    match of {
        Value::Str(text) if is_odd(text) => unsupported("such a number"),
        Value::Str(text) => Ok(number_of(text).map_or(default, Value::Float)),
        Value::Undefined => failed("undefined is no number"),
        Value::Object(_) => unsupported("a number of an object"),
        _ => Ok(of.number().map_or(default, |number| Value::Float(number.float()))),
    }
}

/// `| round`.
pub(crate) fn round(of: &Value, precision: i64, method: &str) -> Outcome {
    let Some(number) = of.number() else { return failed("no number to round") };
    let float = number.float();
    if method == "common" {
        let Ok(digits @ 0..=30) = usize::try_from(precision) else { return unsupported("such a precision") };
        return match number {
            // Jinja rounds by Python's `round(value, precision)`, which leaves whole numbers alone.
            Number::Int(_) => Ok(of.clone()),
            Number::Float(_) => Ok(Value::Float(format!("{float:.digits$}").parse().unwrap_or(f64::NAN))),
        };
    }
    if !matches!(method, "ceil" | "floor") {
        return failed("method must be common, ceil or floor");
    }
    if !(0..=15).contains(&precision) {
        return unsupported("such a precision");
    }
    let factor = 10_f64.powi(precision as i32);
    let scaled = float * factor;
    Ok(Value::Float(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / factor))
}
