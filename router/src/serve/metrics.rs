//! The router's figures, for Prometheus.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use super::app::App;
use crate::place::By;

impl App {
    pub(super) fn metrics(&self) -> String {
        let mut text = String::new();
        let place = &self.router.counts;
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let fleet = &self.router.fleet;
        let workers = fleet.workers();
        let unread = workers.iter().map(|worker| worker.view.counts().unread).sum();
        let counters = [
            ("requests_total", "Requests that the router received", get(&self.counts.requests)),
            ("placed_total", "Requests that the router placed at a worker", get(&place.placed)),
            ("by_affinity_total", "Requests that stayed at the worker of their session", get(&place.by_affinity)),
            ("shed_total", "Requests that were refused because all workers were full", get(&place.shed)),
            ("resumed_total", "Answers that broke off and continued at another worker", get(&self.counts.resumed)),
            ("broken_total", "Answers that broke off and could not be continued", get(&self.counts.broken)),
            (
                "differing_shapes_total",
                "Shapes of requests whose prompts turned out not to be the engine's, and are not read for a while",
                get(&self.counts.differing_shapes),
            ),
            (
                "expired_total",
                "Requests that expired because the router heard nothing more of them",
                get(&place.expired),
            ),
            ("prompt_tokens_total", "Prompt tokens of the requests that were placed", get(&place.tokens)),
            (
                "cached_tokens_total",
                "Prompt tokens that the chosen workers had or could fetch",
                get(&place.cached_tokens),
            ),
            ("unread_events_total", "Messages and events of engines that the router could not read", unread),
        ];
        for (name, help, value) in counters {
            write(&mut text, name, help, "counter", value);
        }
        let by = By::ALL.iter().zip(&place.by).map(|(by, count)| (by.label(), get(count)));
        write_by(&mut text, "placed_by_total", "Requests that were placed, by what was known of their prompts", by);
        let (engines, tiers) = (fleet.engine_index().status(), fleet.tier_index().status());
        let up = workers.iter().filter(|worker| worker.is_up()).count() as u64;
        let without_events =
            workers.iter().filter(|worker| worker.spec.events.is_some() && !worker.follows_all()).count();
        let without_node = fleet.nodes().iter().filter(|node| !node.status().whole).count();
        let gauges = [
            ("waiting", "Requests that wait for a worker", self.router.waiting() as u64),
            ("workers", "Workers that the router knows", workers.len() as u64),
            ("workers_up", "Workers that answer", up),
            (
                "workers_without_events",
                "Workers whose events the router does not get, though it is told where they are",
                without_events as u64,
            ),
            (
                "nodes_away",
                "Nodes whose blocks the router does not know, because they do not answer",
                without_node as u64,
            ),
            (
                "models_without_tokens",
                "Models whose tokenizer or template the router could not read",
                self.models_with_problems() as u64,
            ),
            ("engine_index_blocks", "Blocks in the index of the engines' memory", engines.blocks),
            ("engine_index_bytes", "Bytes of the index of the engines' memory", engines.bytes),
            ("node_index_blocks", "Blocks in the index of the nodes' tiers", tiers.blocks),
            ("node_index_bytes", "Bytes of the index of the nodes' tiers", tiers.bytes),
        ];
        for (name, help, value) in gauges {
            write(&mut text, name, help, "gauge", value);
        }
        text
    }

    fn models_with_problems(&self) -> usize {
        self.models.values().filter(|model| model.problem.is_some()).count()
    }
}

fn write_by<'a>(text: &mut String, name: &str, help: &str, values: impl Iterator<Item = (&'a str, u64)>) {
    let name = format!("kvstore_router_{name}");
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
    for (by, value) in values {
        let _ = writeln!(text, "{name}{{by=\"{by}\"}} {value}");
    }
}

fn write(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    let name = format!("kvstore_router_{name}");
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
}
