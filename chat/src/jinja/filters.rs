//! What stands behind `|`.

use super::bounds::weight;
use super::calls::{Bound, Given};
use super::interp::{Interp, Outcome};
use super::object::{Kind, Object};
use super::ops::{self, failed, unsupported};
use super::sequences::{items, length};
use super::text::{is_space, str_of};
use crate::json::{Dumps, dumps};
use crate::value::{Dict, Int, Key, Number, Value};

/// All that Jinja knows.
pub(crate) const NAMES: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

/// Those that go through what they are given when somebody goes through what they make.
const LATE: [&str; 8] = ["map", "select", "reject", "selectattr", "rejectattr", "batch", "slice", "unique"];

impl Interp<'_> {
    /// `of | name(given)`.
    pub(crate) fn filter(&mut self, name: &str, of: Value, given: Given) -> Outcome {
        self.step(1 + weight(&of))?;
        if matches!(&of, Value::Object(object) if object.markup().is_some())
            && !matches!(name, "string" | "safe" | "length" | "count")
        {
            return unsupported("a filter of a text that is safe in HTML");
        }
        if let (Value::Object(object), true) = (&of, LATE.contains(&name)) {
            let object = object.clone();
            let made = self.filtered_by(name, of, given)?;
            object.leave(None);
            return Ok(made);
        }
        self.filtered_by(name, of, given)
    }

    fn filtered_by(&mut self, name: &str, of: Value, given: Given) -> Outcome {
        match name {
            "map" => self.map(&of, given),
            "select" | "reject" => self.select(&of, given, name == "select", false),
            "selectattr" | "rejectattr" => self.select(&of, given, name == "selectattr", true),
            "sort" | "unique" | "min" | "max" | "groupby" | "dictsort" => {
                // So often is each of a thousand compared.
                self.compared(&of, 10)?;
                super::sort::filter(name, &of, given)
            }
            "batch" | "slice" | "sum" | "join" | "list" | "reverse" | "first" | "last" | "items" | "length"
            | "count" | "attr" => of_sequence(name, &of, given),
            "abs" | "int" | "float" | "round" => of_number(name, &of, given),
            "default" | "d" => {
                let given = given.bind(&["default_value", "boolean"])?;
                let missing = of.is_undefined() || given.truthy(1) && !of.truthy();
                Ok(if missing { given.get(0).cloned().unwrap_or_else(|| "".into()) } else { of })
            }
            "tojson" => tojson(&of, given),
            _ => of_text(name, &of, given),
        }
    }

    fn map(&mut self, of: &Value, mut given: Given) -> Outcome {
        if !of.truthy() {
            return Ok(Object::iterator(Vec::new()));
        }
        let all = items(of)?;
        self.step(all.len())?;
        let mut made = Vec::with_capacity(all.len());
        if given.positional.is_empty() {
            let given = given.bind(&["attribute", "default"])?;
            let path = path(given.required(0)?)?;
            for value in all {
                let found = reach(&value, &path)?;
                made.push(match given.get(1) {
                    Some(default) if found.is_undefined() => default.clone(),
                    _ => found,
                });
            }
        } else {
            let name = given.positional.remove(0);
            let Some(name) = name.as_str() else { return failed("no filter") };
            for value in all {
                made.push(self.filter(name, value, given.clone())?);
            }
        }
        Ok(Object::iterator(made))
    }

    fn select(&mut self, of: &Value, mut given: Given, keeps: bool, by_attribute: bool) -> Outcome {
        if !of.truthy() {
            return Ok(Object::iterator(Vec::new()));
        }
        let all = items(of)?;
        self.step(all.len())?;
        let mut path_of = Vec::new();
        if by_attribute {
            if given.positional.is_empty() {
                return failed("Missing parameter for attribute name");
            }
            path_of = path(&given.positional.remove(0))?;
        }
        let test = if given.positional.is_empty() { None } else { Some(given.positional.remove(0)) };
        let mut kept = Vec::new();
        for value in all {
            let subject = if by_attribute { reach(&value, &path_of)? } else { value.clone() };
            let passes = match &test {
                None => subject.truthy(),
                Some(Value::Str(name)) => self.test(name, &subject, given.clone())?,
                Some(_) => return failed("No such test"),
            };
            if passes == keeps {
                kept.push(value);
            }
        }
        Ok(Object::iterator(kept))
    }
}

/// The parts of an attribute's name: texts, and numbers of items.
pub(crate) fn path(of: &Value) -> Outcome<Vec<Value>> {
    match of {
        Value::Str(text) => Ok(text
            .split('.')
            .map(|part| match part.parse::<i64>() {
                Ok(at) if part.bytes().all(|digit| digit.is_ascii_digit()) => Value::from(at),
                _ => Value::from(part),
            })
            .collect()),
        Value::Int(_) => Ok(vec![of.clone()]),
        _ => unsupported("such an attribute"),
    }
}

/// What is at the end of a path.
pub(crate) fn reach(of: &Value, path: &[Value]) -> Outcome {
    path.iter().try_fold(of.clone(), |of, part| super::attrs::item(&of, part))
}

fn tojson(of: &Value, given: Given) -> Outcome {
    let given = given.bind(&["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match given.get(1) {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(other) => match other.number() {
            Some(Number::Int(Int::Small(width @ ..=1000))) => Some(" ".repeat(usize::try_from(width).unwrap_or(0))),
            _ => return failed("not such an indent"),
        },
    };
    let separators = match given.get(2) {
        None | Some(Value::None) => None,
        Some(value) => match items(value)?.as_slice() {
            [Value::Str(item), Value::Str(key)] => Some((item.to_string(), key.to_string())),
            _ => return failed("not such separators"),
        },
    };
    let how = Dumps { ensure_ascii: given.truthy(0), indent, separators, sort_keys: given.truthy(3) };
    dumps(of, &how).map_or_else(failed, |text| Ok(text.into()))
}

fn of_sequence(name: &str, of: &Value, given: Given) -> Outcome {
    match name {
        "length" | "count" => {
            given.bind(&[])?;
            Ok(Value::from(length(of)? as i64))
        }
        "list" => {
            given.bind(&[])?;
            Ok(Value::list(items(of)?))
        }
        "first" => {
            given.bind(&[])?;
            if let Value::Object(object) = of
                && let Kind::Iterator(items) = &*object.0
            {
                let mut items = items.lock();
                let Some(items) = &mut *items else { return unsupported("an iterator that a loop is in, or left") };
                return Ok(items.next().unwrap_or_default());
            }
            Ok(items(of)?.into_iter().next().unwrap_or_default())
        }
        "last" => {
            given.bind(&[])?;
            if matches!(of, Value::Object(object) if matches!(&*object.0, Kind::Iterator(_))) {
                return failed("object is not reversible");
            }
            Ok(items(of)?.pop().unwrap_or_default())
        }
        "reverse" => {
            given.bind(&[])?;
            if let Value::Str(text) = of {
                return Ok(Value::from(text.chars().rev().collect::<String>()));
            }
            Ok(Object::iterator(items(of)?.into_iter().rev().collect()))
        }
        "items" => {
            given.bind(&[])?;
            match of {
                Value::Undefined => Ok(Object::iterator(Vec::new())),
                Value::Dict(dict) => Ok(Object::iterator(items(&Object::value(Kind::View {
                    of: dict.clone(),
                    what: super::object::View::Items,
                }))?)),
                _ => failed("Can only get item pairs from a mapping."),
            }
        }
        "attr" => {
            let given = given.bind(&["name"])?;
            match (of, given.required(0)?) {
                (Value::Undefined, _) => failed("an attribute of what is undefined"),
                (of, Value::Str(name)) => Ok(super::attrs::own(of, name)?.unwrap_or_default()),
                _ => unsupported("such an attribute"),
            }
        }
        "join" => join(of, &given.bind(&["d", "attribute"])?),
        "sum" => {
            let given = given.bind(&["attribute", "start"])?;
            let path = given.get(0).filter(|by| !by.is_none()).map(path).transpose()?.unwrap_or_default();
            let mut sum = given.get(1).cloned().unwrap_or_else(|| 0.into());
            for value in items(of)? {
                if sum.as_str().is_some() {
                    return failed("sum() can't sum strings");
                }
                sum = ops::binary(super::ast::Binary::Add, &sum, &reach(&value, &path)?)?;
            }
            Ok(sum)
        }
        "batch" => batch(&items(of)?, &given.bind(&["linecount", "fill_with"])?),
        _ => slices(&items(of)?, &given.bind(&["slices", "fill_with"])?),
    }
}

impl From<i32> for Value {
    fn from(int: i32) -> Self {
        Self::from(i64::from(int))
    }
}

fn join(of: &Value, given: &Bound) -> Outcome {
    let between = given.get(0).map_or(Ok(String::new()), str_of)?;
    let path = given.get(1).filter(|by| !by.is_none()).map(path).transpose()?.unwrap_or_default();
    let mut out = String::new();
    for (at, value) in items(of)?.iter().enumerate() {
        if at > 0 {
            out.push_str(&between);
        }
        super::text::write_str(&reach(value, &path)?, &mut out)?;
        super::text::fits(&out)?;
    }
    Ok(out.into())
}

fn batch(all: &[Value], given: &Bound) -> Outcome {
    let Ok(count @ 1..) = usize::try_from(given.int(0, 0)?) else { return unsupported("such a batch") };
    let mut made: Vec<Vec<Value>> = all.chunks(count).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (given.get(1).filter(|fill| !fill.is_none()), made.last_mut()) {
        if count > crate::caps::RANGE_MAX {
            return Err(super::RenderError::TooMuch("items"));
        }
        last.resize(count, fill.clone());
    }
    Ok(Object::iterator(made.into_iter().map(Value::list).collect()))
}

fn slices(all: &[Value], given: &Bound) -> Outcome {
    let Ok(count @ 1..=1000) = usize::try_from(given.int(0, 0)?) else { return unsupported("so many slices") };
    let (each, more) = (all.len() / count, all.len() % count);
    let mut rest = all;
    let mut made = Vec::new();
    for at in 0..count {
        let (taken, after) = rest.split_at((each + usize::from(at < more)).min(rest.len()));
        let mut taken = taken.to_vec();
        if let Some(fill) = given.get(1).filter(|fill| !fill.is_none() && at >= more) {
            taken.push(fill.clone());
        }
        made.push(Value::list(taken));
        rest = after;
    }
    Ok(Object::iterator(made))
}

fn of_number(name: &str, of: &Value, given: Given) -> Outcome {
    match name {
        "abs" => match of.number() {
            Some(Number::Int(int)) => Ok(if int < Int::Small(0) { ops::negative(of)? } else { Value::Int(int) }),
            Some(Number::Float(float)) => Ok(Value::Float(float.abs())),
            None => failed("bad operand type for abs()"),
        },
        "int" => {
            let given = given.bind(&["default", "base"])?;
            let default = given.get(0).cloned().unwrap_or_else(|| 0.into());
            if given.int(1, 10)? != 10 && of.as_str().is_some() {
                return unsupported("numbers of another base");
            }
            super::format::int(of, default)
        }
        "float" => {
            let given = given.bind(&["default"])?;
            let default = given.get(0).cloned().unwrap_or(Value::Float(0.0));
            super::format::float(of, default)
        }
        _ => {
            let given = given.bind(&["precision", "method"])?;
            super::format::round(of, given.int(0, 0)?, given.get(1).map_or(Ok("common"), |_| given.text(1))?)
        }
    }
}

fn of_text(name: &str, of: &Value, given: Given) -> Outcome {
    if matches!(
        name,
        "urlencode"
            | "urlize"
            | "filesizeformat"
            | "pprint"
            | "random"
            | "striptags"
            | "xmlattr"
            | "wordwrap"
            | "forceescape"
    ) {
        return unsupported(format!("the filter {name}"));
    }
    if name == "indent" && of.as_str().is_none() {
        return failed("indent of no text");
    }
    let text = str_of(of)?;
    if let "string" | "lower" | "upper" | "capitalize" | "title" | "wordcount" | "safe" | "escape" | "e" = name {
        given.bind(&[])?;
        return plain(name, of, text);
    }
    Ok(match name {
        "trim" => {
            let given = given.bind(&["chars"])?;
            match given.get(0) {
                None | Some(Value::None) => text.trim_matches(is_space).into(),
                Some(_) => {
                    let chars = given.text(0)?;
                    text.trim_matches(|letter| chars.contains(letter)).into()
                }
            }
        }
        "replace" => {
            let given = given.bind(&["old", "new", "count"])?;
            let (old, new) = (str_of(given.required(0)?)?, str_of(given.required(1)?)?);
            let count = if given.get(2).is_none_or(Value::is_none) { -1 } else { given.int(2, -1)? };
            super::methods::replace(&text, &old, &new, count)?.into()
        }
        "indent" => indent(&text, &given.bind(&["width", "first", "blank"])?)?.into(),
        "center" => super::methods::pad(&text, given.bind(&["width"])?.int(0, 80)?, ' ', 'c')?.into(),
        "truncate" => truncate(&text, &given.bind(&["length", "killwords", "end", "leeway"])?)?.into(),
        "format" => format_filter(&text, given)?,
        _ => return failed(format!("No filter named {name}")),
    })
}

/// Filters without arguments.
fn plain(name: &str, of: &Value, text: String) -> Outcome {
    Ok(match name {
        "string" if of_markup(of) => of.clone(),
        "lower" => text.to_lowercase().into(),
        "upper" => text.to_uppercase().into(),
        "capitalize" => super::methods::capitalize(&text)?.into(),
        "title" => title(&text)?.into(),
        "wordcount" => {
            let words = text.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
            Value::from(words.filter(|word| !word.is_empty()).count() as i64)
        }
        "safe" => Object::value(Kind::Markup(text.into())),
        "escape" | "e" => {
            let escaped = text.replace('&', "&amp;").replace('>', "&gt;").replace('<', "&lt;");
            Object::value(Kind::Markup(escaped.replace('\'', "&#39;").replace('"', "&#34;").into()))
        }
        _ => text.into(),
    })
}

fn of_markup(of: &Value) -> bool {
    matches!(of, Value::Object(object) if object.markup().is_some())
}

fn format_filter(text: &str, given: Given) -> Outcome {
    let args = match (given.positional.is_empty(), given.named.is_empty()) {
        (false, false) => return failed("can't handle positional and keyword arguments at the same time"),
        (_, true) => Value::tuple(given.positional),
        _ => given.named.into_iter().collect::<Dict>().into(),
    };
    Ok(super::format::percent(text, &args)?.into())
}

/// Jinja's own: letters behind white space, hyphens and brackets are large, all others small.
fn title(text: &str) -> Outcome<String> {
    let mut out = String::new();
    let mut begins = true;
    for letter in text.chars() {
        let separates = is_space(letter) || matches!(letter, '-' | '(' | '{' | '[' | '<');
        match (separates, begins) {
            (true, _) => out.push(letter),
            (false, true) => out.extend(letter.to_uppercase()),
            (false, false) => out.extend(letter.to_lowercase()),
        }
        begins = separates;
    }
    Ok(out)
}

fn indent(text: &str, given: &Bound) -> Outcome<String> {
    let with = match given.get(0) {
        Some(Value::Str(with)) => with.to_string(),
        _ => " ".repeat(usize::try_from(given.int(0, 4)?.min(1000)).unwrap_or(0)),
    };
    let (first, blank) = (given.truthy(1), given.truthy(2));
    let text = format!("{text}\n");
    let mut out = String::new();
    if blank {
        let lines = super::methods::lines(&text, false);
        super::ops::fits(text.len().saturating_add(lines.len().saturating_mul(with.len())))?;
        out = lines.join(&format!("\n{with}"));
    } else {
        let lines = super::methods::lines(&text, false);
        for (at, line) in lines.iter().enumerate() {
            if at > 0 {
                out.push('\n');
                if !line.is_empty() {
                    out.push_str(&with);
                }
            }
            out.push_str(line);
            super::text::fits(&out)?;
        }
    }
    Ok(if first { with + &out } else { out })
}

fn truncate(text: &str, given: &Bound) -> Outcome<String> {
    let most = given.int(0, 255)?;
    let end = given.get(2).map_or(Ok("..."), |_| given.text(2))?;
    let leeway = if given.get(3).is_none_or(Value::is_none) { 5 } else { given.int(3, 5)? };
    let count = |text: &str| text.chars().count() as i64;
    if most < count(end) || leeway < 0 {
        return failed("expected another length");
    }
    if count(text) <= most + leeway {
        return Ok(text.to_owned());
    }
    let kept: String = text.chars().take(usize::try_from(most - count(end)).unwrap_or(0)).collect();
    let kept =
        if given.truthy(1) { kept.as_str() } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(kept, _)| kept) };
    Ok(format!("{kept}{end}"))
}

/// A key that small and large letters share.
pub(crate) fn caseless(value: &Value) -> Value {
    value.as_str().map_or_else(|| value.clone(), |text| text.to_lowercase().into())
}

/// Whether two values are one for a set.
pub(crate) fn key(value: &Value) -> Outcome<Key> {
    Key::of(value).map_or_else(|| unsupported("such a key"), Ok)
}
