//! The status as text for people: templates with the names of fields.

use std::time::Duration;

use super::{Field, Node, Unit, Value};

/// Fills a template in: `{name}` is a field in its unit, `{name:seconds}` a time in whole seconds without a unit. What stands in
/// `[` and `]` is left out where a field in it is empty or 0.
pub fn fill(template: &str, node: &Node<'_>) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find('[') {
        let (before, optional) = rest.split_at(at);
        let (optional, after) = optional.get(1..).and_then(|tail| tail.split_once(']')).unwrap_or((optional, ""));
        out.push_str(&fill_part(before, node).0);
        let (text, complete) = fill_part(optional, node);
        out.push_str(if complete { &text } else { "" });
        rest = after;
    }
    out.push_str(&fill_part(rest, node).0);
    out
}

/// Fills a template without options in; and whether no field was empty or 0.
fn fill_part(template: &str, node: &Node<'_>) -> (String, bool) {
    let (mut out, mut complete) = (String::new(), true);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let (name, after) = after.split_once('}').unwrap_or((after, ""));
        let (text, is_empty) = value_of(name, node);
        out.push_str(&text);
        complete &= !is_empty;
        rest = after;
    }
    out.push_str(rest);
    (out, complete)
}

fn value_of(name: &str, node: &Node<'_>) -> (String, bool) {
    let (name, in_seconds) = name.strip_suffix(":seconds").map_or((name, false), |name| (name, true));
    match node.get(name) {
        Some((_, Value::Number(ms))) if in_seconds => ((ms / 1000).to_string(), *ms == 0),
        Some((field, value)) => (shown(field, value), matches!(value, Value::Number(0) | Value::Text(""))),
        None => ("?".into(), true),
    }
}

fn shown(field: &Field, value: &Value<'_>) -> String {
    match (value, field.unit) {
        (Value::Number(number), Unit::Count) => number.to_string(),
        (Value::Number(bytes), Unit::Bytes) => bytesize::ByteSize(*bytes).to_string(),
        (Value::Number(ms), Unit::Millis) => humantime::format_duration(Duration::from_secs(ms / 1000)).to_string(),
        (Value::Ratio(ratio), _) => format!("{ratio:.2}"),
        (Value::Text(text), _) => (*text).to_owned(),
        (Value::Texts(texts), _) => texts.join(", "),
        (Value::One(_) | Value::Many(_), _) => "?".into(),
    }
}
