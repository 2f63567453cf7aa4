//! Values as Python has them: what a request holds and what a template computes. It knows no JSON and no template.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use foldhash::quality::RandomState;
use indexmap::IndexMap;
use num_bigint::BigInt;

use crate::jinja::object::Object;

/// A number without a fraction, of any size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Int {
    /// One that a machine word holds.
    Small(i64),
    /// One that it does not.
    Big(Arc<BigInt>),
}

impl Int {
    /// The smallest form of a number.
    pub fn of(value: BigInt) -> Self {
        i64::try_from(&value).map_or_else(|_| Self::Big(Arc::new(value)), Self::Small)
    }

    /// For arithmetic.
    pub fn big(&self) -> BigInt {
        match self {
            Self::Small(small) => BigInt::from(*small),
            Self::Big(big) => big.as_ref().clone(),
        }
    }

    /// A count or an index; `None` where it is larger than any.
    pub fn small(&self) -> Option<i64> {
        match self {
            Self::Small(small) => Some(*small),
            Self::Big(_) => None,
        }
    }

    /// As a number with a fraction, rounded to the nearest; infinite where Python would refuse.
    pub fn float(&self) -> f64 {
        match self {
            Self::Small(small) => *small as f64,
            Self::Big(big) => big.to_string().parse().unwrap_or(f64::NAN),
        }
    }

    /// Whether it is not 0.
    pub fn truthy(&self) -> bool {
        !matches!(self, Self::Small(0))
    }
}

impl PartialOrd for Int {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Int {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Small(one), Self::Small(other)) => one.cmp(other),
            _ => self.big().cmp(&other.big()),
        }
    }
}

impl std::fmt::Display for Int {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Small(small) => small.fmt(f),
            Self::Big(big) => big.fmt(f),
        }
    }
}

/// A value of Python.
#[derive(Clone, Debug, Default)]
pub enum Value {
    /// What a template asked for and nobody set.
    #[default]
    Undefined,
    /// `None`; null in JSON.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// A number without a fraction.
    Int(Int),
    /// A number with one.
    Float(f64),
    /// A text.
    Str(Arc<str>),
    /// A list.
    List(Arc<Vec<Value>>),
    /// A tuple.
    Tuple(Arc<Vec<Value>>),
    /// A map that keeps the order of its keys.
    Dict(Arc<Dict>),
    /// What only templates make: macros, namespaces, iterators.
    Object(Object),
}

impl Value {
    /// A list of these.
    pub fn list(items: Vec<Self>) -> Self {
        Self::List(Arc::new(items))
    }

    /// A tuple of these.
    pub fn tuple(items: Vec<Self>) -> Self {
        Self::Tuple(Arc::new(items))
    }

    /// A map.
    pub fn dict(dict: Dict) -> Self {
        Self::Dict(Arc::new(dict))
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(text) = self { Some(text) } else { None }
    }

    /// The items, if it is a list.
    pub fn as_list(&self) -> Option<&[Self]> {
        if let Self::List(items) = self { Some(items) } else { None }
    }

    /// The map, if it is one.
    pub fn as_dict(&self) -> Option<&Dict> {
        if let Self::Dict(dict) = self { Some(dict) } else { None }
    }

    /// `True` or `False`, if it is one of them.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(bool) = self { Some(*bool) } else { None }
    }

    /// The number, if it has no fraction and a machine word holds it.
    pub fn as_i64(&self) -> Option<i64> {
        if let Self::Int(int) = self { int.small() } else { None }
    }

    /// Whether it is `None`.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Whether it is what nobody set.
    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined)
    }

    /// The value of a key, if it is a map that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_dict()?.get(key)
    }

    /// The same, to be changed: in a copy, where somebody else has this map too.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Self> {
        let Self::Dict(dict) = self else { return None };
        Arc::make_mut(dict).0.get_mut(&TextKey(key))
    }

    /// `bool(value)`.
    pub fn truthy(&self) -> bool {
        match self {
            Self::Undefined | Self::None => false,
            Self::Bool(bool) => *bool,
            Self::Int(int) => int.truthy(),
            Self::Float(float) => *float != 0.0,
            Self::Str(text) => !text.is_empty(),
            Self::List(items) | Self::Tuple(items) => !items.is_empty(),
            Self::Dict(dict) => !dict.is_empty(),
            Self::Object(object) => object.truthy(),
        }
    }

    /// A number, where it is one: `True` is 1.
    pub(crate) fn number(&self) -> Option<Number> {
        match self {
            Self::Bool(bool) => Some(Number::Int(Int::Small(i64::from(*bool)))),
            Self::Int(int) => Some(Number::Int(int.clone())),
            Self::Float(float) => Some(Number::Float(*float)),
            _ => None,
        }
    }
}

/// A number of either kind.
#[derive(Clone, Debug)]
pub(crate) enum Number {
    Int(Int),
    Float(f64),
}

impl Number {
    pub(crate) fn float(&self) -> f64 {
        match self {
            Self::Int(int) => int.float(),
            Self::Float(float) => *float,
        }
    }

    pub(crate) fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Int(one), Self::Int(other)) => Some(one.cmp(other)),
            (Self::Int(one), Self::Float(other)) => compare_mixed(one, *other),
            (Self::Float(one), Self::Int(other)) => compare_mixed(other, *one).map(Ordering::reverse),
            (Self::Float(one), Self::Float(other)) => one.partial_cmp(other),
        }
    }
}

/// Exactly, as Python does it: no rounding to a float on the way.
fn compare_mixed(int: &Int, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    if float.is_infinite() || float.abs() >= 1e300 {
        return Some(if float > 0.0 { Ordering::Less } else { Ordering::Greater });
    }
    let whole: BigInt = format!("{:.0}", float.trunc()).parse().ok()?;
    Some(int.big().cmp(&whole).then_with(|| 0.0.partial_cmp(&float.fract()).unwrap_or(Ordering::Equal)))
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl From<bool> for Value {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}

impl From<i64> for Value {
    fn from(int: i64) -> Self {
        Self::Int(Int::Small(int))
    }
}

impl From<f64> for Value {
    fn from(float: f64) -> Self {
        Self::Float(float)
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Self {
        Self::dict(dict)
    }
}

/// `==` of Python: 1, 1.0 and `True` are equal, maps are whatever the order of their keys.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        if let (Some(one), Some(other)) = (self.number(), other.number()) {
            return one.compare(&other) == Some(Ordering::Equal);
        }
        match (self, other) {
            (Self::Undefined, Self::Undefined) | (Self::None, Self::None) => true,
            (Self::Str(one), Self::Str(other)) => one == other,
            (Self::List(one), Self::List(other)) | (Self::Tuple(one), Self::Tuple(other)) => one == other,
            (Self::Dict(one), Self::Dict(other)) => one == other,
            (Self::Object(one), Self::Object(other)) => one.same(other),
            _ => false,
        }
    }
}

/// A value that may be the key of a map: one that never changes.
#[derive(Clone, Debug)]
pub struct Key(Value);

impl Key {
    /// `None`: Python refuses it, or it is never one in a template.
    pub fn of(value: &Value) -> Option<Self> {
        let hashable = match value {
            Value::None | Value::Bool(_) | Value::Int(_) | Value::Str(_) => true,
            Value::Float(float) => !float.is_nan(),
            Value::Tuple(items) => items.iter().all(|item| Self::of(item).is_some()),
            _ => false,
        };
        hashable.then(|| Self(value.clone()))
    }

    /// The value.
    pub fn value(&self) -> &Value {
        &self.0
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash(&self.0, state);
    }
}

fn hash<H: Hasher>(value: &Value, state: &mut H) {
    match value {
        // As `str` does it: keys are looked up by a text alone.
        Value::Str(text) => text.hash(state),
        Value::Tuple(items) => items.iter().for_each(|item| hash(item, state)),
        other => match other.number() {
            Some(Number::Int(Int::Big(big))) => big.to_string().parse::<f64>().unwrap_or(0.0).to_bits().hash(state),
            // 0.0 and -0.0 are one key.
            Some(number) => (number.float() + 0.0).to_bits().hash(state),
            None => 0_u8.hash(state),
        },
    }
}

struct TextKey<'a>(&'a str);

impl Hash for TextKey<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl indexmap::Equivalent<Key> for TextKey<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        key.0.as_str() == Some(self.0)
    }
}

/// A map that keeps the order of its keys.
#[derive(Clone, Debug, Default)]
pub struct Dict(IndexMap<Key, Value, RandomState>);

impl Dict {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of a text.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(&TextKey(key))
    }

    /// The value of any key.
    pub fn get_key(&self, key: &Key) -> Option<&Value> {
        self.0.get(key)
    }

    /// Whether it has a text for a key.
    pub fn contains(&self, key: &str) -> bool {
        self.0.contains_key(&TextKey(key))
    }

    /// Sets the value of a text. A key that is there keeps its place.
    pub fn insert(&mut self, key: impl Into<Arc<str>>, value: impl Into<Value>) -> Option<Value> {
        self.0.insert(Key(Value::Str(key.into())), value.into())
    }

    /// Sets the value of any key. One that is there keeps its place, and its first form.
    pub fn insert_key(&mut self, key: Key, value: Value) -> Option<Value> {
        self.0.insert(key, value)
    }

    /// Takes a text out; the others keep their order.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(&TextKey(key))
    }

    /// All, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Value, &Value)> + DoubleEndedIterator {
        self.0.iter().map(|(key, value)| (&key.0, value))
    }

    /// The texts among its keys, in order; of JSON, all are.
    pub fn fields(&self) -> impl Iterator<Item = (&Arc<str>, &Value)> {
        self.0.iter().filter_map(|(key, value)| if let Value::Str(text) = &key.0 { Some((text, value)) } else { None })
    }

    /// Sets the values of all these texts.
    pub fn extend<'a>(&mut self, fields: impl IntoIterator<Item = (&'a Arc<str>, &'a Value)>) {
        for (key, value) in fields {
            self.insert(Arc::clone(key), value.clone());
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl PartialEq for Dict {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.0.iter().all(|(key, value)| other.0.get(key) == Some(value))
    }
}

impl<K: Into<Arc<str>>, V: Into<Value>> FromIterator<(K, V)> for Dict {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let mut dict = Self::new();
        for (key, value) in pairs {
            dict.insert(key, value);
        }
        dict
    }
}
