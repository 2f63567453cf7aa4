//! What is done before a request is answered: blocks are brought nearer, pictures encoded, prompts computed by workers for that alone.

use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};

use super::app::App;
use super::openai::{Kind, Request};
use super::upstream::{Outgoing, Upstream};
use crate::caps;
use crate::fleet::{Role, Worker};
use crate::place::{Asked, Placed};

impl App {
    /// Tells the node that blocks of its slower tiers are wanted in memory.
    pub(super) fn hint(&self, placed: &Placed, asked: &Asked) {
        let [_, nvme, object] = placed.terms.cached.fetched_bytes;
        if let Some(node) = placed.worker.node.clone()
            && nvme + object > 0
        {
            let (model, chain) = (placed.worker.spec.model.clone(), asked.chain.clone());
            tokio::spawn(async move { node.prefetch(&model, &chain).await });
        }
    }

    async fn send_ahead(
        &self,
        worker: &Worker,
        kind: Kind,
        headers: &HeaderMap,
        body: &Bytes,
        what: &str,
    ) -> Option<Upstream> {
        let request = Outgoing { method: &Method::POST, path: kind.path(), headers, body, reads: true, rank: None };
        match self.workers.ask(worker, request, self.router.options().silence).await {
            Ok(answer) if answer.status().is_success() => Some(answer),
            Ok(answer) => {
                tracing::warn!(worker = worker.spec.id, status = %answer.status(), "the worker did not {what}");
                None
            }
            Err(failure) => {
                tracing::warn!(worker = worker.spec.id, error = failure.message(), "the worker did not {what}");
                None
            }
        }
    }

    /// All of an answer, within the time that an answer may be silent.
    async fn read_ahead(&self, answer: Upstream) -> Option<Bytes> {
        let whole = Limited::new(answer.into_body(), caps::ANSWER_READ_MAX).collect();
        let whole = tokio::time::timeout(self.router.options().silence, whole).await;
        Some(whole.ok()?.ok()?.to_bytes())
    }

    /// Where there are workers for prompts alone, and this one has much to compute: one of them computes it first, and the store has it
    /// then. What it says is to be told to the worker that answers.
    pub(super) async fn prefill_first(&self, request: &Request, asked: &Asked, headers: &HeaderMap) -> Option<Value> {
        if !self.has_role(&asked.model, Role::Prefill) {
            return None;
        }
        let here = self.router.candidates(asked, &[]).ok()?;
        let least = here.iter().map(|candidate| candidate.terms.tokens_to_compute).min();
        if least.is_some_and(|least| least < self.router.options().split_tokens_min) {
            return None;
        }
        let prefill = Asked { role: Role::Prefill, ..asked.clone() };
        let placed = self.router.place(&prefill, &[]).await.ok()?;
        // As vLLM's connectors that hand over blocks expect it; the store's passes it over.
        let hand_over = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null, "remote_host": null, "remote_port": null});
        let hand_over = hand_over.to_string();
        let mut set = vec![("stream", "false"), ("max_tokens", "1")];
        if request.kind == Kind::Chat {
            set.push(("max_completion_tokens", "1"));
        }
        for (name, nothing) in [("stream_options", "null"), ("min_tokens", "0")] {
            set.extend(request.body.get(name).is_some().then_some((name, nothing)));
        }
        if request.body.get("kv_transfer_params").is_none() {
            set.push(("kv_transfer_params", &hand_over));
        }
        let body = request.body.with(&set);
        let answer = self.send_ahead(&placed.worker, request.kind, headers, &body, "compute a prompt ahead").await?;
        let whole = self.read_ahead(answer).await?;
        let whole: Value = serde_json::from_slice(&whole).ok()?;
        whole.get("kv_transfer_params").filter(|parameters| parameters.is_object()).cloned()
    }

    /// Where there are workers for inputs that are no text, they get each of them first; the store has their outputs then.
    pub(super) async fn encode_first(&self, request: &Request, model: &str, headers: &HeaderMap) {
        if request.kind != Kind::Chat || !self.has_role(model, Role::Encode) {
            return;
        }
        let messages = request.body.value("messages");
        let messages = messages.as_array();
        let parts = messages.into_iter().flatten().filter_map(|message| message.get("content")?.as_array()).flatten();
        let others = parts.filter(|part| part.get("type").is_some_and(|kind| kind != "text"));
        let each = others.take(caps::ENCODED_PARTS_MAX).map(|part| async move {
            let asked = Asked { model: model.to_owned(), tokens: 1, role: Role::Encode, ..Asked::default() };
            let placed = self.router.place(&asked, &[]).await.ok()?;
            let body = json!({"model": model, "max_tokens": 1, "stream": false, "messages": [{"role": "user", "content": [part]}]});
            let body = Bytes::from(body.to_string());
            let answer = self.send_ahead(&placed.worker, Kind::Chat, headers, &body, "encode an input ahead").await?;
            self.read_ahead(answer).await.map(drop)
        });
        futures::future::join_all(each).await;
    }
}
