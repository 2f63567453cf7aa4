//! Methods of texts, lists, maps and loops.

use std::sync::Arc;

use super::RenderError;
use super::bounds::weight;
use super::calls::{Bound, Given};
use super::interp::{Interp, Outcome};
use super::object::{Kind, Object, View};
use super::ops::{failed, unsupported};
use super::sequences::items;
use super::tests::is_cased;
use super::text::{fits, is_space};
use crate::caps::PARTS_MAX;
use crate::value::{Dict, Key, Value};

impl Interp<'_> {
    /// `of.name(given)`.
    pub(crate) fn method(&mut self, of: &Value, name: &str, given: Given) -> Outcome {
        self.step(weight(of))?;
        match of {
            Value::Str(text) => of_text(text, name, given),
            Value::Dict(dict) => of_dict(dict, name, given),
            Value::List(items) | Value::Tuple(items) => of_items(of, items, name, given),
            Value::Object(object) => match &*object.0 {
                Kind::Loop(state) => {
                    let mut state = state.lock();
                    if name == "cycle" {
                        let at = state.at.checked_rem(given.positional.len());
                        return at.map_or_else(
                            || failed("no items for cycling given"),
                            |at| Ok(given.positional.get(at).cloned().unwrap_or_default()),
                        );
                    }
                    let changed = state.changed.as_ref() != Some(&given.positional);
                    state.changed = Some(given.positional);
                    Ok(changed.into())
                }
                Kind::Cycler { items, at } => {
                    given.bind(&[])?;
                    let mut at = at.lock();
                    if name == "reset" {
                        *at = 0;
                        return Ok(Value::None);
                    }
                    let value = items.get(*at).cloned().unwrap_or_default();
                    *at = (*at + 1) % items.len().max(1);
                    Ok(value)
                }
                _ => unsupported(format!("the method {name}")),
            },
            _ => unsupported(format!("the method {name}")),
        }
    }
}

fn of_dict(dict: &Arc<Dict>, name: &str, given: Given) -> Outcome {
    let view = |what| Object::value(Kind::View { of: Arc::clone(dict), what });
    if name == "get" {
        if !given.named.is_empty() {
            return failed("get() takes no keyword arguments");
        }
        let given = given.bind(&["key", "default"])?;
        return match (Key::of(given.required(0)?), given.required(0)?) {
            (None, Value::List(_) | Value::Dict(_)) => failed("unhashable type"),
            (key, _) => {
                let found = key.and_then(|key| dict.get_key(&key).cloned());
                Ok(found.or_else(|| given.get(1).cloned()).unwrap_or(Value::None))
            }
        };
    }
    given.bind(&[])?;
    match name {
        "items" => Ok(view(View::Items)),
        "keys" => Ok(view(View::Keys)),
        "values" => Ok(view(View::Values)),
        "copy" => Ok(Value::Dict(Arc::clone(dict))),
        _ => unsupported(format!("the method {name}")),
    }
}

fn of_items(of: &Value, items: &[Value], name: &str, given: Given) -> Outcome {
    match name {
        "copy" => {
            given.bind(&[])?;
            Ok(of.clone())
        }
        "count" => {
            let given = given.bind(&["value"])?;
            let wanted = given.required(0)?;
            Ok(Value::from(items.iter().filter(|item| *item == wanted).count() as i64))
        }
        "index" => {
            let given = given.bind(&["value"])?;
            let wanted = given.required(0)?;
            let at = items.iter().position(|item| item == wanted);
            at.map_or_else(|| failed("is not in list"), |at| Ok(Value::from(at as i64)))
        }
        _ => unsupported(format!("the method {name}")),
    }
}

/// What may stand for the letters to take off: all white space, or those of a text.
fn letters(given: &Bound) -> Outcome<Option<String>> {
    match given.get(0) {
        None | Some(Value::None) => Ok(None),
        Some(_) => given.text(0).map(|chars| Some(chars.to_owned())),
    }
}

fn strings<'a>(parts: impl IntoIterator<Item = &'a str>) -> Outcome {
    let parts: Vec<Value> = parts.into_iter().take(PARTS_MAX + 1).map(Value::from).collect();
    if parts.len() > PARTS_MAX { Err(RenderError::TooMuch("parts of a text")) } else { Ok(Value::list(parts)) }
}

fn of_text(text: &str, name: &str, given: Given) -> Outcome {
    let keywords = matches!(name, "split" | "rsplit" | "splitlines" | "expandtabs" | "format" | "encode");
    if !given.named.is_empty() && !keywords {
        return failed(format!("str.{name}() takes no keyword arguments"));
    }
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let chars = letters(&given.bind(&["chars"])?)?;
            let off = |letter: char| chars.as_ref().map_or_else(|| is_space(letter), |chars| chars.contains(letter));
            Ok(match name {
                "strip" => text.trim_matches(off),
                "lstrip" => text.trim_start_matches(off),
                _ => text.trim_end_matches(off),
            }
            .into())
        }
        "split" | "rsplit" => split(text, name == "rsplit", &given.bind(&["sep", "maxsplit"])?),
        "splitlines" => strings(lines(text, given.bind(&["keepends"])?.truthy(0))),
        "partition" | "rpartition" => {
            let given = given.bind(&["sep"])?;
            let sep = given.text(0)?;
            if sep.is_empty() {
                return failed("empty separator");
            }
            let parts = if name == "partition" { text.split_once(sep) } else { text.rsplit_once(sep) };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, sep, after],
                (None, "partition") => [text, "", ""],
                _ => ["", "", text],
            };
            Ok(Value::tuple(parts.into_iter().map(Value::from).collect()))
        }
        "startswith" | "endswith" => begins(text, name == "startswith", &given.bind(&["prefix", "start", "end"])?),
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, name, &given.bind(&["sub", "start", "end"])?),
        "replace" => {
            let given = given.bind(&["old", "new", "count"])?;
            Ok(replace(text, given.text(0)?, given.text(1)?, given.int(2, -1)?)?.into())
        }
        "join" => {
            let mut out = String::new();
            for (at, item) in items(given.bind(&["iterable"])?.required(0)?)?.iter().enumerate() {
                let Some(item) = item.as_str() else { return failed("expected str instance") };
                out.push_str(if at > 0 { text } else { "" });
                out.push_str(item);
                fits(&out)?;
            }
            Ok(out.into())
        }
        "removeprefix" | "removesuffix" => {
            let given = given.bind(&["affix"])?;
            let affix = given.text(0)?;
            let rest = if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Ok(rest.unwrap_or(text).into())
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let given = given.bind(&["width", "fillchar"])?;
            let fill = given.get(1).map_or(Ok(" "), |_| given.text(1))?;
            let (mut fill, Some(first)) = (fill.chars(), fill.chars().next()) else { return failed("no character") };
            if fill.nth(1).is_some() || given.get(0).is_none() {
                return failed("The fill character must be exactly one character long");
            }
            let side = name.chars().next().unwrap_or('c');
            Ok(pad(text, given.int(0, 0)?, if side == 'z' { '0' } else { first }, side)?.into())
        }
        "format" => Ok(super::format::braces(text, &given)?.into()),
        "expandtabs" => expand_tabs(text, given.bind(&["tabsize"])?.int(0, 8)?),
        _ => {
            given.bind(&[])?;
            plain(text, name)
        }
    }
}

/// Methods without arguments.
fn plain(text: &str, name: &str) -> Outcome {
    let all = |is: fn(char) -> bool| Ok(Value::from(!text.is_empty() && text.chars().all(is)));
    let ascii = text.is_ascii();
    match name {
        "upper" => Ok(text.to_uppercase().into()),
        "lower" => Ok(text.to_lowercase().into()),
        "casefold" if ascii => Ok(text.to_lowercase().into()),
        "capitalize" => Ok(capitalize(text)?.into()),
        "title" => Ok(title(text)?.into()),
        "swapcase" if ascii => {
            let swap = |letter: char| {
                if letter.is_ascii_lowercase() { letter.to_ascii_uppercase() } else { letter.to_ascii_lowercase() }
            };
            Ok(text.chars().map(swap).collect::<String>().into())
        }
        "isspace" => all(is_space),
        "isascii" => Ok(ascii.into()),
        "isdigit" | "isdecimal" | "isnumeric" if ascii => all(|letter| letter.is_ascii_digit()),
        "isalpha" if ascii => all(|letter| letter.is_ascii_alphabetic()),
        "isalnum" if ascii => all(|letter| letter.is_ascii_alphanumeric()),
        "isupper" => Ok(is_cased(text, char::is_uppercase, char::is_lowercase).into()),
        "islower" => Ok(is_cased(text, char::is_lowercase, char::is_uppercase).into()),
        "isprintable" => Ok(text.chars().all(super::printable::is_printable).into()),
        "isidentifier" if ascii => {
            let starts = text.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_');
            Ok((starts && text.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')).into())
        }
        _ => unsupported(format!("str.{name}() of this text")),
    }
}

/// The first letter in the form for titles, which few letters have.
fn title_letter(letter: char, out: &mut String) -> Outcome<()> {
    let mut upper = letter.to_uppercase();
    let single = upper.len() == 1;
    let special = matches!(letter, '\u{1c4}'..='\u{1cc}' | '\u{1f1}'..='\u{1f3}' | '\u{10d0}'..='\u{10ff}');
    if !single || special {
        return unsupported("this letter at the beginning of a title");
    }
    out.extend(upper.next());
    Ok(())
}

pub(crate) fn capitalize(text: &str) -> Outcome<String> {
    let mut out = String::new();
    let mut letters = text.chars();
    if let Some(first) = letters.next() {
        title_letter(first, &mut out)?;
    }
    if letters.as_str().contains('\u{3a3}') {
        return unsupported("a sigma in a title");
    }
    out.push_str(&letters.as_str().to_lowercase());
    Ok(out)
}

fn title(text: &str) -> Outcome<String> {
    let mut out = String::new();
    let mut within = false;
    for letter in text.chars() {
        if letter == '\u{3a3}' {
            return unsupported("a sigma in a title");
        }
        let cased = letter.is_lowercase() || letter.is_uppercase() || letter.to_uppercase().ne([letter]);
        match (cased, within) {
            (true, false) => title_letter(letter, &mut out)?,
            (true, true) => out.extend(letter.to_lowercase()),
            _ => out.push(letter),
        }
        within = cased;
    }
    Ok(out)
}

/// `str.splitlines`.
pub(crate) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    let ends = |letter: char| {
        matches!(letter, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    while let Some((at, letter)) = rest.char_indices().find(|(_, letter)| ends(*letter)) {
        let after =
            at + if rest.get(at..).is_some_and(|rest| rest.starts_with("\r\n")) { 2 } else { letter.len_utf8() };
        lines.extend(rest.get(..if keep_ends { after } else { at }));
        rest = rest.get(after..).unwrap_or_default();
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn split(text: &str, from_end: bool, given: &Bound) -> Outcome {
    let most = usize::try_from(given.int(1, -1)?).map_or(usize::MAX, |most| most.saturating_add(1));
    match given.get(0) {
        None | Some(Value::None) => strings(split_space(text, from_end, most)),
        Some(_) => {
            let sep = given.text(0)?;
            if sep.is_empty() {
                return failed("empty separator");
            }
            if !from_end {
                return strings(text.splitn(most, sep));
            }
            let mut parts: Vec<&str> = text.rsplitn(most, sep).collect();
            parts.reverse();
            strings(parts)
        }
    }
}

fn split_space(text: &str, from_end: bool, most: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_end { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| parts.len() + 1 < most) else {
            parts.push(rest);
            break;
        };
        if from_end {
            let width = rest.get(at..).and_then(|rest| rest.chars().next()).map_or(1, char::len_utf8);
            parts.extend(rest.get(at + width..));
            rest = rest.get(..at).unwrap_or_default().trim_end_matches(is_space);
        } else {
            parts.extend(rest.get(..at));
            rest = rest.get(at..).unwrap_or_default().trim_start_matches(is_space);
        }
    }
    if from_end {
        parts.reverse();
        parts.retain(|part| !part.is_empty());
    }
    parts
}

fn begins(text: &str, start: bool, given: &Bound) -> Outcome {
    if given.get(1).is_some() {
        return unsupported("startswith from a place on");
    }
    let one = |affix: &Value| match affix {
        Value::Str(affix) if start => Ok(text.starts_with(&**affix)),
        Value::Str(affix) => Ok(text.ends_with(&**affix)),
        _ => failed("first arg must be str or a tuple of str"),
    };
    Ok(match given.required(0)? {
        Value::Tuple(affixes) => {
            let mut found = false;
            for affix in affixes.iter() {
                found = found || one(affix)?;
            }
            found.into()
        }
        affix => one(affix)?.into(),
    })
}

fn find(text: &str, name: &str, given: &Bound) -> Outcome {
    let sub = given.text(0)?;
    let letters = |at: usize| text.get(..at).unwrap_or_default().chars().count() as i64;
    let mut offset = 0;
    let mut within = text;
    if given.get(1).is_some() {
        let from = given.int(1, 0)?;
        if from < 0 || given.get(2).is_some() || name != "find" {
            return unsupported("find in a part of a text");
        }
        offset = text.char_indices().nth(usize::try_from(from).unwrap_or(usize::MAX)).map_or(text.len(), |(at, _)| at);
        if from > letters(text.len()) {
            return Ok((-1).into());
        }
        within = text.get(offset..).unwrap_or_default();
    }
    if name == "count" {
        return Ok(Value::from(if sub.is_empty() {
            letters(text.len()) + 1
        } else {
            text.matches(sub).count() as i64
        }));
    }
    let at = if name.starts_with('r') { within.rfind(sub) } else { within.find(sub) };
    match at {
        Some(at) => Ok(letters(offset + at).into()),
        None if name.ends_with("index") => failed("substring not found"),
        None => Ok((-1).into()),
    }
}

/// `str.replace`: so often, or always where the count is below 0.
pub(crate) fn replace(text: &str, old: &str, new: &str, count: i64) -> Outcome<String> {
    let bytes = text.len().saturating_add(text.matches(old).count().saturating_mul(new.len()));
    super::ops::fits(bytes)?;
    Ok(text.replacen(old, new, usize::try_from(count).unwrap_or(usize::MAX)))
}

/// `str.ljust` and the like, by their first letter.
pub(crate) fn pad(text: &str, width: i64, fill: char, side: char) -> Outcome<String> {
    let width = usize::try_from(width).unwrap_or(0);
    super::ops::fits(width)?;
    let len = text.chars().count();
    let missing = width.saturating_sub(len);
    let fills = |count: usize| fill.to_string().repeat(count);
    Ok(match side {
        'l' => text.to_owned() + &fills(missing),
        'r' => fills(missing) + text,
        'z' => {
            let (sign, rest) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{rest}", fills(missing))
        }
        _ => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fills(left), fills(missing - left))
        }
    })
}

fn expand_tabs(text: &str, size: i64) -> Outcome {
    let size = usize::try_from(size).unwrap_or(0).min(1000);
    let mut out = String::new();
    let mut column = 0;
    for letter in text.chars() {
        match letter {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.push_str(&" ".repeat(spaces));
                fits(&out)?;
                column += spaces;
            }
            '\t' => {}
            _ => {
                out.push(letter);
                column = if matches!(letter, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out.into())
}
