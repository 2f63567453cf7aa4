//! Filters that compare items with each other.

use std::cmp::Ordering;

use super::calls::Given;
use super::filters::{caseless, key, path, reach};
use super::interp::Outcome;
use super::object::{Kind, Object};
use super::ops::{failed, order};
use super::sequences::items;
use crate::value::{Dict, Value};

/// `of | name(given)`.
pub(crate) fn filter(name: &str, of: &Value, given: Given) -> Outcome {
    match name {
        "sort" => {
            let given = given.bind(&["reverse", "case_sensitive", "attribute"])?;
            let mut all = keyed(of, given.get(2), given.truthy(1), true)?;
            sort(&mut all, given.truthy(0))?;
            Ok(Value::list(all.into_iter().map(|(_, value)| value).collect()))
        }
        "dictsort" => {
            let given = given.bind(&["case_sensitive", "by", "reverse"])?;
            let at = match given.get(1).map_or(Ok("key"), |_| given.text(1))? {
                "key" => 0,
                "value" => 1,
                _ => return failed("You can only sort by either \"key\" or \"value\""),
            };
            let Value::Dict(dict) = of else { return failed("no map to sort") };
            let pairs = dict.iter().map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()])).collect();
            let mut all = keyed(&Value::list(pairs), Some(&Value::from(at)), given.truthy(0), false)?;
            sort(&mut all, given.truthy(2))?;
            Ok(Value::list(all.into_iter().map(|(_, value)| value).collect()))
        }
        "unique" => {
            let given = given.bind(&["case_sensitive", "attribute"])?;
            let mut seen = Dict::new();
            let mut kept = Vec::new();
            for (by, value) in keyed(of, given.get(1), given.truthy(0), false)? {
                if seen.insert_key(key(&by)?, Value::None).is_none() {
                    kept.push(value);
                }
            }
            Ok(Object::iterator(kept))
        }
        "groupby" => groupby(of, given),
        _ => {
            let given = given.bind(&["case_sensitive", "attribute"])?;
            let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
            let mut all = keyed(of, given.get(1), given.truthy(0), false)?.into_iter();
            let Some(mut best) = all.next() else { return Ok(Value::Undefined) };
            for next in all {
                if order(&next.0, &best.0)? == Some(wanted) {
                    best = next;
                }
            }
            Ok(best.1)
        }
    }
}

/// Items with what they are compared by. `several`: the attributes may be more than one, with commas between them.
fn keyed(of: &Value, attribute: Option<&Value>, case_sensitive: bool, several: bool) -> Outcome<Vec<(Value, Value)>> {
    let paths: Vec<Vec<Value>> = match attribute {
        None | Some(Value::None) => vec![Vec::new()],
        Some(Value::Str(text)) if several => text.split(',').map(|part| path(&part.into())).collect::<Outcome<_>>()?,
        Some(attribute) => vec![path(attribute)?],
    };
    let by = |value: &Value| -> Outcome {
        let mut keys = Vec::new();
        for path in &paths {
            let found = reach(value, path)?;
            keys.push(if case_sensitive { found } else { caseless(&found) });
        }
        match keys.pop() {
            Some(only) if keys.is_empty() => Ok(only),
            last => {
                keys.extend(last);
                Ok(Value::list(keys))
            }
        }
    };
    items(of)?.into_iter().map(|value| Ok((by(&value)?, value))).collect()
}

/// Stable, also backwards.
fn sort(all: &mut [(Value, Value)], reverse: bool) -> Outcome<()> {
    if all.iter().any(|(by, _)| matches!(by, Value::Float(float) if float.is_nan())) {
        return super::ops::unsupported("an order of what is no number");
    }
    merge(all, reverse)
}

/// The library's own sorting may panic where values have no order, which only shows on the way.
fn merge(all: &mut [(Value, Value)], reverse: bool) -> Outcome<()> {
    if all.len() < 2 {
        return Ok(());
    }
    let (left, right) = all.split_at_mut(all.len() / 2);
    merge(left, reverse)?;
    merge(right, reverse)?;
    let mut sorted = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    while let (Some(one), Some(other)) = (left.peek(), right.peek()) {
        let order = order(&one.0, &other.0)?;
        let before = if reverse { Ordering::Less } else { Ordering::Greater };
        sorted.extend(if order == Some(before) { right.next() } else { left.next() }.cloned());
    }
    sorted.extend(left.chain(right).cloned());
    all.clone_from_slice(&sorted);
    Ok(())
}

fn groupby(of: &Value, given: Given) -> Outcome {
    let given = given.bind(&["attribute", "default", "case_sensitive"])?;
    if given.get(1).is_some_and(|default| !default.is_none()) {
        return super::ops::unsupported("groupby with a default");
    }
    let attribute = given.required(0)?;
    let mut all = keyed(of, Some(attribute), given.truthy(2), false)?;
    sort(&mut all, false)?;
    let path = path(attribute)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (by, value) in all {
        match groups.last_mut() {
            Some((known, values)) if *known == by => values.push(value),
            _ => groups.push((by, vec![value])),
        }
    }
    let made = groups.into_iter().map(|(by, values)| {
        // Its name is that of the first one, as it is written there.
        let key = values.first().filter(|_| !given.truthy(2)).map_or(Ok(by), |first| reach(first, &path))?;
        Ok(Object::value(Kind::Group { key, items: Value::list(values) }))
    });
    Ok(Value::list(made.collect::<Outcome<_>>()?))
}
