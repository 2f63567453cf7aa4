//! Python's operators.

use std::cmp::Ordering;

use num_bigint::BigInt;

use super::RenderError;
use super::ast::{Binary, Compare};
use super::object::{Kind, Object};
use crate::caps::MADE_MAX;
use crate::value::{Int, Key, Number, Value};

type Outcome<T = Value> = Result<T, RenderError>;

pub(crate) fn failed<T>(what: impl Into<String>) -> Outcome<T> {
    Err(RenderError::Failed(what.into()))
}

pub(crate) fn unsupported<T>(what: impl Into<String>) -> Outcome<T> {
    Err(RenderError::Unsupported(what.into()))
}

fn is_markup(value: &Value) -> bool {
    matches!(value, Value::Object(object) if object.markup().is_some())
}

pub(crate) fn binary(operator: Binary, one: &Value, other: &Value) -> Outcome {
    if is_markup(one) || is_markup(other) {
        return unsupported("an operator of a text that is safe in HTML");
    }
    if let (Some(one), Some(other)) = (one.number(), other.number()) {
        return arithmetic(operator, &one, &other);
    }
    match (operator, one, other) {
        (Binary::Add, Value::Str(one), Value::Str(other)) => {
            fits(one.len() + other.len())?;
            Ok(Value::from([&**one, other].concat()))
        }
        (Binary::Add, Value::List(one), Value::List(other)) => {
            fits(one.len() + other.len())?;
            Ok(Value::list([one.as_slice(), other].concat()))
        }
        (Binary::Add, Value::Tuple(one), Value::Tuple(other)) => {
            fits(one.len() + other.len())?;
            Ok(Value::tuple([one.as_slice(), other].concat()))
        }
        (Binary::Mul, Value::Int(_) | Value::Bool(_), Value::Str(_) | Value::List(_) | Value::Tuple(_)) => {
            repeat(other, one)
        }
        (Binary::Mul, Value::Str(_) | Value::List(_) | Value::Tuple(_), Value::Int(_) | Value::Bool(_)) => {
            repeat(one, other)
        }
        (Binary::Mod, Value::Str(format), args) => Ok(super::format::percent(format, args)?.into()),
        (_, Value::Object(_), _) | (_, _, Value::Object(_)) if !matches!(operator, Binary::Add) => {
            unsupported("an operator of an object")
        }
        (_, Value::Dict(_), Value::Dict(_)) => failed("maps cannot be put together"),
        _ => failed(format!("{operator:?} of values that have none")),
    }
}

pub(crate) fn fits(count: usize) -> Outcome<()> {
    if count > MADE_MAX { Err(RenderError::TooMuch("characters of one text")) } else { Ok(()) }
}

fn repeated(items: &[Value], times: usize) -> Vec<Value> {
    std::iter::repeat_n(items, times).flatten().cloned().collect()
}

fn repeat(of: &Value, times: &Value) -> Outcome {
    let Some(Number::Int(times)) = times.number() else { return failed("a text times no number") };
    let times = match times.small() {
        Some(times) => usize::try_from(times).unwrap_or(0),
        None => return failed("a text too many times"),
    };
    let fits = |len: usize| fits(len.saturating_mul(times));
    Ok(match of {
        Value::Str(text) => {
            fits(text.len())?;
            Value::from(text.repeat(times))
        }
        Value::List(items) => {
            fits(items.len())?;
            Value::list(repeated(items, times))
        }
        Value::Tuple(items) => {
            fits(items.len())?;
            Value::tuple(repeated(items, times))
        }
        _ => return failed("nothing that can be repeated"),
    })
}

fn arithmetic(operator: Binary, one: &Number, other: &Number) -> Outcome {
    match (one, other) {
        (Number::Int(one), Number::Int(other)) => integers(operator, one, other),
        _ => floats(operator, one.float(), other.float()),
    }
}

fn floats(operator: Binary, one: f64, other: f64) -> Outcome {
    if other == 0.0 && matches!(operator, Binary::Div | Binary::FloorDiv | Binary::Mod) {
        return failed("division by zero");
    }
    let modulo = || {
        let rest = one % other;
        if rest != 0.0 && (rest < 0.0) != (other < 0.0) {
            rest + other
        } else {
            rest.abs().copysign(if rest == 0.0 { other } else { rest })
        }
    };
    Ok(Value::Float(match operator {
        Binary::Add => one + other,
        Binary::Sub => one - other,
        Binary::Mul => one * other,
        Binary::Div => one / other,
        Binary::Mod => modulo(),
        Binary::FloorDiv => {
            let whole = (one - modulo()) / other;
            if whole == 0.0 { 0.0_f64.copysign(one / other) } else { (whole - 0.5).ceil().max(whole.floor()) }
        }
        Binary::Pow => {
            let power = one.powf(other);
            if one == 0.0 && other < 0.0
                || one < 0.0 && other.fract() != 0.0
                || power.is_infinite() && one.is_finite() && other.is_finite()
            {
                return unsupported("a power that is no number");
            }
            power
        }
    }))
}

fn integers(operator: Binary, one: &Int, other: &Int) -> Outcome {
    if !other.truthy() && matches!(operator, Binary::Div | Binary::FloorDiv | Binary::Mod) {
        return failed("division by zero");
    }
    if let (Int::Small(one), Int::Small(other)) = (one, other) {
        let small = match operator {
            Binary::Add => one.checked_add(*other),
            Binary::Sub => one.checked_sub(*other),
            Binary::Mul => one.checked_mul(*other),
            Binary::FloorDiv => one.checked_div_euclid(*other).map(|_| floor_div(*one, *other)),
            Binary::Mod => one
                .checked_rem(*other)
                .map(|rest| if rest != 0 && (rest < 0) != (*other < 0) { rest + other } else { rest }),
            Binary::Pow => u32::try_from(*other).ok().and_then(|power| one.checked_pow(power)),
            Binary::Div if one.unsigned_abs() < 1 << 53 && other.unsigned_abs() < 1 << 53 => {
                return Ok(Value::Float(*one as f64 / *other as f64));
            }
            Binary::Div => None,
        };
        if let Some(small) = small {
            return Ok(Value::from(small));
        }
    }
    big(operator, &one.big(), &other.big())
}

fn floor_div(one: i64, other: i64) -> i64 {
    let whole = one / other;
    if one % other != 0 && (one < 0) != (other < 0) { whole - 1 } else { whole }
}

fn big(operator: Binary, one: &BigInt, other: &BigInt) -> Outcome {
    if one.bits() + other.bits() > 1 << 16 {
        return Err(RenderError::TooMuch("digits of a number"));
    }
    let negative = |number: &BigInt| number.sign() == num_bigint::Sign::Minus;
    let (whole, rest) = match operator {
        Binary::FloorDiv | Binary::Mod => (one / other, one % other),
        _ => Default::default(),
    };
    let apart = rest != BigInt::ZERO && negative(&rest) != negative(other);
    let made = match operator {
        Binary::Add => one + other,
        Binary::Sub => one - other,
        Binary::Mul => one * other,
        Binary::FloorDiv if apart => whole - 1,
        Binary::FloorDiv => whole,
        Binary::Mod if apart => rest + other,
        Binary::Mod => rest,
        Binary::Div => return unsupported("division of large numbers"),
        Binary::Pow => {
            let Ok(power) = u32::try_from(other) else {
                return unsupported("a power that is no whole number");
            };
            if one.bits().saturating_mul(power.into()) > 1 << 14 {
                return Err(RenderError::TooMuch("digits of a number"));
            }
            one.pow(power)
        }
    };
    Ok(Value::Int(Int::of(made)))
}

pub(crate) fn negative(value: &Value) -> Outcome {
    match value.number() {
        Some(Number::Int(int)) => Ok(Value::Int(Int::of(-int.big()))),
        Some(Number::Float(float)) => Ok(Value::Float(-float)),
        None => failed("bad operand for unary -"),
    }
}

/// `<` and the like; `None` of numbers that are none.
pub(crate) fn order(one: &Value, other: &Value) -> Outcome<Option<Ordering>> {
    if let (Some(one), Some(other)) = (one.number(), other.number()) {
        return Ok(one.compare(&other));
    }
    match (one, other) {
        (Value::Str(one), Value::Str(other)) => Ok(Some(one.cmp(other))),
        (Value::List(one), Value::List(other)) | (Value::Tuple(one), Value::Tuple(other)) => {
            for (one, other) in one.iter().zip(other.iter()) {
                if one != other {
                    return order(one, other);
                }
            }
            Ok(Some(one.len().cmp(&other.len())))
        }
        (Value::Object(_), _) | (_, Value::Object(_)) => unsupported("an order of objects"),
        _ => failed("'<' not supported between these values"),
    }
}

pub(crate) fn compare(operator: Compare, one: &Value, other: &Value) -> Outcome<bool> {
    Ok(match operator {
        Compare::Eq => equal(one, other)?,
        Compare::Ne => !equal(one, other)?,
        Compare::In => contains(other, one)?,
        Compare::NotIn => !contains(other, one)?,
        Compare::Lt => order(one, other)? == Some(Ordering::Less),
        Compare::Gt => order(one, other)? == Some(Ordering::Greater),
        Compare::Le => matches!(order(one, other)?, Some(Ordering::Less | Ordering::Equal)),
        Compare::Ge => matches!(order(one, other)?, Some(Ordering::Greater | Ordering::Equal)),
    })
}

pub(crate) fn equal(one: &Value, other: &Value) -> Outcome<bool> {
    match (one, other) {
        (Value::Object(object), _) | (_, Value::Object(object)) => match &*object.0 {
            Kind::View { .. } | Kind::Markup(_) | Kind::Group { .. } => unsupported("equality of objects"),
            _ => Ok(one == other),
        },
        _ => Ok(one == other),
    }
}

/// `item in of`.
pub(crate) fn contains(of: &Value, item: &Value) -> Outcome<bool> {
    let text = |text: &str| match item {
        Value::Str(part) => Ok(text.contains(&**part)),
        _ => failed("'in <string>' requires string as left operand"),
    };
    match of {
        Value::Undefined => Ok(false),
        Value::Str(whole) => text(whole),
        Value::List(items) | Value::Tuple(items) => Ok(items.contains(item)),
        Value::Dict(dict) => match (item, Key::of(item)) {
            (_, Some(key)) => Ok(dict.get_key(&key).is_some()),
            (Value::List(_) | Value::Dict(_) | Value::Tuple(_), None) => failed("unhashable type"),
            _ => Ok(false),
        },
        Value::Object(Object(kind)) => match &**kind {
            Kind::Range(_) | Kind::View { .. } | Kind::Group { .. } => Ok(super::sequences::items(of)?.contains(item)),
            _ => unsupported("in of an object"),
        },
        _ => failed("argument is not iterable"),
    }
}
