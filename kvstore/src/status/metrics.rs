//! The status as metrics, and the process's registry of them. Counters and latencies that the data path records itself are in
//! the registry, too. `docs/metrics.md` lists every metric.

use std::sync::OnceLock;

use kvstore_proto::v1::StatusResponse;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::{Described, Field, Kind, Metric, Node, Unit, Value};

/// Seconds, from 10 us to 10 s.
const LATENCY_BUCKETS: [f64; 13] = [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.25, 1.0, 10.0];

/// What is recorded where it happens, and is not part of the status.
const RECORDED: [(&str, Kind, &str); 7] = [
    ("kvstore_put_seconds", Kind::Histogram, "Duration of put calls, seconds"),
    (
        "kvstore_get_seconds",
        Kind::Histogram,
        "Duration of get calls until the last byte was handed to the connection, seconds",
    ),
    ("kvstore_lookup_seconds", Kind::Histogram, "Duration of look-ups, seconds"),
    ("kvstore_connections", Kind::Gauge, "Open gRPC and HTTP connections"),
    (
        "kvstore_connections_evicted_total",
        Kind::Counter,
        "Silent connections that were closed, because others needed their place",
    ),
    ("kvstore_described_blocks", Kind::Gauge, "Blocks whose tokens the publisher of events knows"),
    ("kvstore_published_events_total", Kind::Counter, "Events published over ZeroMQ"),
];

/// Every metric once: its name, how it behaves, its help text.
pub fn all() -> Vec<(&'static str, Kind, &'static str)> {
    let mut all = RECORDED.to_vec();
    add_of(StatusResponse::FIELDS, &mut all);
    all
}

fn add_of(fields: &'static [Field], all: &mut Vec<(&'static str, Kind, &'static str)>) {
    for field in fields {
        if let Some(Metric { name, kind, help, .. }) = field.metric
            && !all.iter().any(|(known, ..)| *known == name)
        {
            all.push((name, kind, help));
        }
        add_of(field.fields, all);
    }
}

/// The process's registry.
fn registry() -> Option<&'static PrometheusHandle> {
    static REGISTRY: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    let install = || {
        let buckets = Matcher::Suffix("_seconds".into());
        let builder = PrometheusBuilder::new().set_buckets_for_metric(buckets, &LATENCY_BUCKETS).ok()?;
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).ok()?;
        for (name, kind, help) in all() {
            match kind {
                Kind::Counter => metrics::describe_counter!(name, help),
                Kind::Gauge => metrics::describe_gauge!(name, help),
                Kind::Histogram => metrics::describe_histogram!(name, help),
            }
        }
        Some(handle)
    };
    REGISTRY.get_or_init(install).as_ref()
}

/// Makes the registry, so that latencies are recorded from the first call on.
pub(crate) fn start() {
    registry();
}

/// Metrics in Prometheus' text format.
pub(crate) fn render(status: &StatusResponse) -> String {
    let Some(registry) = registry() else { return String::new() };
    set(&Node::of(status));
    registry.render()
}

fn set(node: &Node<'_>) {
    let labels: Vec<(&'static str, String)> =
        node.iter().filter_map(|(field, value)| Some((field.label?, label_value(value)))).collect();
    for (field, value) in node.iter() {
        match value {
            Value::One(node) => node.iter().for_each(set),
            Value::Many(nodes) => nodes.iter().for_each(set),
            _ => {
                if let Some(metric) = &field.metric {
                    set_metric(metric, field.unit, value, labels.clone());
                }
            }
        }
    }
}

fn set_metric(metric: &Metric, unit: Unit, value: &Value<'_>, mut labels: Vec<(&'static str, String)>) {
    labels.extend(metric.label.map(|(name, value)| (name, value.to_owned())));
    let number = match (value, metric.text) {
        (Value::Number(number), _) => *number,
        (Value::Text(text), Some(wanted)) => u64::from(*text == wanted),
        _ => return,
    };
    match metric.kind {
        Kind::Counter => metrics::counter!(metric.name, &labels).absolute(number),
        _ if unit == Unit::Millis => metrics::gauge!(metric.name, &labels).set(number as f64 / 1000.0),
        _ => metrics::gauge!(metric.name, &labels).set(number as f64),
    }
}

fn label_value(value: &Value<'_>) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        Value::Text(text) => (*text).to_owned(),
        _ => String::new(),
    }
}
