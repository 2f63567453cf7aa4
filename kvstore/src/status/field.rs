//! What a field of the status is, and the values of a message beside these descriptions.

use kvstore_proto::v1::StatusResponse;

/// What a number counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Things, or nothing that has a unit.
    Count,
    /// Bytes.
    Bytes,
    /// Milliseconds; seconds in a metric.
    Millis,
}

/// How a metric behaves, in Prometheus' words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Many values.
    Histogram,
}

impl Kind {
    /// As `docs/metrics.md` writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name, which ends in its unit.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Its help text.
    pub help: &'static str,
    /// A label that tells it from other fields of the same metric.
    pub label: Option<(&'static str, &'static str)>,
    /// The field is a text: the metric is 1 where it is this one, and 0 otherwise.
    pub text: Option<&'static str>,
}

/// How `/readyz` shows a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Readiness {
    Hidden,
    Shown,
    /// As null where the text is empty.
    OrNull,
}

/// One field of a message of the status.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in the message; templates and `/readyz` use it, too.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// Its place in the JSON of the command line, with dots.
    pub json: Option<&'static str>,
    /// Metrics of the message have its value as this label.
    pub label: Option<&'static str>,
    /// Its metric.
    pub metric: Option<Metric>,
    /// The fields of the messages in it.
    pub fields: &'static [Field],
    pub(super) readiness: Readiness,
}

/// A field without a unit.
pub(super) const fn plain() -> Field {
    let (name, unit, readiness) = ("", Unit::Count, Readiness::Hidden);
    Field { name, unit, json: None, label: None, metric: None, fields: &[], readiness }
}

/// A field of bytes.
pub(super) const fn bytes() -> Field {
    Field { unit: Unit::Bytes, ..plain() }
}

/// A field of milliseconds.
pub(super) const fn millis() -> Field {
    Field { unit: Unit::Millis, ..plain() }
}

/// A field of one message or many.
pub(super) const fn nested<M: Described>() -> Field {
    Field { fields: M::FIELDS, ..plain() }
}

impl Field {
    pub(super) const fn named(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    /// In the JSON, there.
    pub(super) const fn json(mut self, place: &'static str) -> Self {
        self.json = Some(place);
        self
    }

    /// In `/readyz`.
    pub(super) const fn ready(mut self) -> Self {
        self.readiness = Readiness::Shown;
        self
    }

    /// In `/readyz`, as null where it is empty.
    pub(super) const fn ready_or_null(mut self) -> Self {
        self.readiness = Readiness::OrNull;
        self
    }

    /// A label of the message's metrics.
    pub(super) const fn label(mut self, name: &'static str) -> Self {
        self.label = Some(name);
        self
    }

    pub(super) const fn counter(self, name: &'static str, help: &'static str) -> Self {
        self.metric(Kind::Counter, name, help)
    }

    pub(super) const fn gauge(self, name: &'static str, help: &'static str) -> Self {
        self.metric(Kind::Gauge, name, help)
    }

    /// A gauge that is 1 while the field is `text`.
    pub(super) const fn gauge_while(self, text: &'static str, name: &'static str, help: &'static str) -> Self {
        let mut field = self.gauge(name, help);
        if let Some(metric) = &mut field.metric {
            metric.text = Some(text);
        }
        field
    }

    /// The metric has this label, too.
    pub(super) const fn of(mut self, label: &'static str, value: &'static str) -> Self {
        if let Some(metric) = &mut self.metric {
            metric.label = Some((label, value));
        }
        self
    }

    const fn metric(mut self, kind: Kind, name: &'static str, help: &'static str) -> Self {
        self.metric = Some(Metric { name, kind, help, label: None, text: None });
        self
    }
}

/// A message whose fields are described.
pub trait Described {
    /// The fields, in the order in which they are declared.
    const FIELDS: &'static [Field];

    /// Their values, in the same order.
    fn values(&self) -> Vec<Value<'_>>;
}

/// The value of a field.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    /// A number; the field tells its unit.
    Number(u64),
    /// A ratio.
    Ratio(f64),
    /// A text.
    Text(&'a str),
    /// Texts.
    Texts(&'a [String]),
    /// A message, or none.
    One(Option<Node<'a>>),
    /// Messages.
    Many(Vec<Node<'a>>),
}

/// A message, as its fields.
#[derive(Clone, Debug)]
pub struct Node<'a> {
    fields: &'static [Field],
    values: Vec<Value<'a>>,
}

impl<'a> Node<'a> {
    /// The whole status.
    pub fn of(status: &'a StatusResponse) -> Self {
        Self::new(status)
    }

    fn new<M: Described>(message: &'a M) -> Self {
        Self { fields: M::FIELDS, values: message.values() }
    }

    /// Its fields, and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Field, &Value<'a>)> {
        self.fields.iter().zip(&self.values)
    }

    /// The field with this name, or with these names and dots between them; none in a message that is not there.
    pub fn get(&self, path: &str) -> Option<(&'static Field, &Value<'a>)> {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let found = self.iter().find(|(field, _)| field.name == name)?;
        match (rest, found.1) {
            (None, _) => Some(found),
            (Some(rest), Value::One(Some(node))) => node.get(rest),
            _ => None,
        }
    }

    /// The messages in the field with this name.
    pub fn nodes(&self, path: &str) -> &[Node<'a>] {
        match self.get(path) {
            Some((_, Value::Many(nodes))) => nodes,
            Some((_, Value::One(node))) => node.as_slice(),
            _ => &[],
        }
    }

    /// The number with this name, or the sum of those in many messages; 0 where there is none.
    pub fn number(&self, path: &str) -> u64 {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        match (self.get(name), rest) {
            (Some((_, Value::Number(number))), None) => *number,
            (Some(_), Some(rest)) => self.nodes(name).iter().map(|node| node.number(rest)).sum(),
            _ => 0,
        }
    }

    /// The text with this name; empty where there is none.
    pub fn text(&self, path: &str) -> &'a str {
        match self.get(path) {
            Some((_, Value::Text(text))) => text,
            _ => "",
        }
    }
}

/// What a field of a message holds.
pub(super) trait Holds {
    fn value(&self) -> Value<'_>;
}

impl Holds for u64 {
    fn value(&self) -> Value<'_> {
        Value::Number(*self)
    }
}

impl Holds for f64 {
    fn value(&self) -> Value<'_> {
        Value::Ratio(*self)
    }
}

impl Holds for String {
    fn value(&self) -> Value<'_> {
        Value::Text(self)
    }
}

impl Holds for Vec<String> {
    fn value(&self) -> Value<'_> {
        Value::Texts(self)
    }
}

impl<M: Described> Holds for Option<M> {
    fn value(&self) -> Value<'_> {
        Value::One(self.as_ref().map(Node::new))
    }
}

impl<M: Described> Holds for Vec<M> {
    fn value(&self) -> Value<'_> {
        Value::Many(self.iter().map(Node::new).collect())
    }
}

/// Describes the fields of a message, one a line: `name: value, description;`. Makes the function that fills the message in, and
/// its [`Described`]. A field of the message without a line does not compile.
macro_rules! described {
    ($(#[$doc:meta])* fn $function:ident($($from:ident: $source:ty),*) -> $message:ty {
        $($name:ident: $value:expr, $field:expr;)*
    }) => {
        $(#[$doc])*
        fn $function($($from: $source),*) -> $message {
            type Message = $message;
            Message { $($name: $value),* }
        }

        impl Described for $message {
            const FIELDS: &'static [Field] = &[$($field.named(stringify!($name))),*];

            fn values(&self) -> Vec<Value<'_>> {
                vec![$(Holds::value(&self.$name)),*]
            }
        }
    };
}
pub(super) use described;
