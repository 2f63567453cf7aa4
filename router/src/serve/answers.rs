//! Answers that one worker keeps: the Responses API goes on with them (`previous_response_id`), asks for them, and ends them by their id.

use std::sync::Arc;

use http::Method;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::json::Object;
use crate::caps;
use crate::fleet::Worker;
use crate::place::Router;

const ROUTE: &str = "/v1/responses";
/// An answer begins with its id, and an event of one with the answer. In texts, quotes are escaped.
const KEY: &[u8] = b"\"id\"";

/// The path without its query, below the route; `None` for another route.
fn below(path: &str) -> Option<&str> {
    let rest = path.split('?').next()?.strip_prefix(ROUTE)?;
    (rest.is_empty() || rest.starts_with('/')).then(|| rest.trim_matches('/'))
}

fn name_of(id: &str, seed: u64) -> u64 {
    xxh3_64_with_seed(id.as_bytes(), seed)
}

/// The answer that a request is about, or goes on with. `seed` keeps clients from choosing names. `is_kept`: there is one of this name; below
/// the route there are other words than ids.
pub(super) fn gone_on_with(path: &str, body: Option<&Object>, seed: u64, is_kept: impl Fn(u64) -> bool) -> Option<u64> {
    let about = below(path)?.split('/').next().filter(|id| !id.is_empty()).map(|id| name_of(id, seed));
    let before = || match body?.value("previous_response_id") {
        Value::String(id) => Some(name_of(&id, seed)),
        _ => None,
    };
    about.filter(|name| is_kept(*name)).or_else(before)
}

/// Whether a request makes an answer that may be kept.
pub(super) fn makes_one(path: &str, method: &Method) -> bool {
    *method == Method::POST && below(path) == Some("")
}

/// Reads an answer's id as it passes: it stands near the beginning.
pub(super) struct Finder {
    router: Arc<Router>,
    worker: Arc<Worker>,
    seed: u64,
    /// What came so far; empty once the id is found, or is not there.
    seen: Option<Vec<u8>>,
}

impl Finder {
    pub(super) fn new(router: &Arc<Router>, worker: &Arc<Worker>, seed: u64) -> Self {
        Self { router: Arc::clone(router), worker: Arc::clone(worker), seed, seen: Some(Vec::new()) }
    }

    /// The next piece.
    pub(super) fn see(&mut self, piece: &[u8]) {
        let Some(seen) = &mut self.seen else { return };
        let room = caps::ANSWER_ID_WITHIN.saturating_sub(seen.len());
        seen.extend_from_slice(piece.get(..room).unwrap_or(piece));
        if let Some(id) = id_in(seen) {
            self.router.keeps_answer(name_of(id, self.seed), &self.worker);
            self.seen = None;
        } else if room <= piece.len() {
            self.seen = None;
        }
    }
}

fn id_in(text: &[u8]) -> Option<&str> {
    let at = text.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let mut parts = text.get(at..)?.split(|byte| *byte == b'"');
    let between = parts.next()?;
    let is_value = between.iter().all(|byte| matches!(byte, b':' | b' ' | b'\n' | b'\t' | b'\r'));
    // What has no end yet is the last part.
    let (id, _) = (parts.next().filter(|_| is_value)?, parts.next()?);
    std::str::from_utf8(id).ok()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn requests_say_which_answer_they_go_on_with() {
        let name = name_of("resp_1", 7);
        let body = |text: &'static str| Object::read(Bytes::from_static(text.as_bytes())).unwrap();
        let on = body("{\"previous_response_id\": \"resp_1\", \"input\": \"a\"}");
        let asked = |path: &str, body: Option<&Object>| gone_on_with(path, body, 7, |found| found == name);
        assert_eq!(asked("/v1/responses", Some(&on)), Some(name));
        assert_ne!(gone_on_with("/v1/responses", Some(&on), 8, |_| true), Some(name));
        assert_eq!(asked("/v1/responses/resp_1?stream=true", None), Some(name));
        assert_eq!(asked("/v1/responses/resp_1/cancel", Some(&body("{}"))), Some(name));
        assert_eq!(asked("/v1/responses/render", Some(&on)), Some(name), "a route, and no id");
        assert_eq!(asked("/v1/responses/render", None), None);
        assert_eq!(asked("/v1/responses", Some(&body("{\"previous_response_id\": null}"))), None);
        assert_eq!(asked("/v1/responses", None), None);
        assert_eq!(asked("/v1/responsesx/resp_1", Some(&on)), None);
        assert!(
            makes_one("/v1/responses?a=b", &Method::POST) && !makes_one("/v1/responses/resp_1/cancel", &Method::POST)
        );
        assert!(!makes_one("/v1/responses", &Method::GET));
    }

    #[test]
    fn an_id_is_found_wherever_an_answer_is_cut() {
        let text = b"event: response.created\ndata: {\"response\":{\"id\":\"resp_ab\",\"previous_response_id\":\"resp_0\"}}\n\n";
        assert_eq!(id_in(text), Some("resp_ab"));
        (0..55).for_each(|cut| assert_eq!(id_in(&text[..cut]), None, "{cut}"));
        assert_eq!(id_in(b"{\n \"id\" : \"a client's own\"}"), Some("a client's own"));
        assert_eq!(id_in(b"{\"previous_response_id\": \"resp_0\", \"id\": \"resp_1\"}"), Some("resp_1"));
        assert_eq!(id_in(b"{\"id\": 7, \"a\": \"b\"}"), None);
    }
}
