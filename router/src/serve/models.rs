//! The models that are served: as workers say, those first of all.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::App;
use super::openai::ApiError;
use super::upstream::{Failure, judge};
use crate::caps;
use crate::fleet::{Worker, read_served};

impl App {
    /// Asks all workers whether they live, and now and then what they serve.
    pub(super) async fn look_after_workers(&self) {
        let workers = self.router.fleet.workers();
        let each = workers.iter().filter(|worker| !worker.spec.url.is_empty()).map(|worker| async {
            let was_up = worker.is_up();
            match self.workers.get(&worker.spec.url, "/health", caps::HEALTH_WITHIN).await {
                Ok((status, _)) if status.is_server_error() => {
                    judge(worker, crate::fleet::Evidence::Gone, &format!("its /health says {status}"));
                }
                Ok(_) => {
                    if worker.succeeded() {
                        tracing::info!(worker = worker.spec.id, "the worker answers again");
                    }
                }
                Err(Failure::Worker(evidence, why)) => judge(worker, evidence, &why),
                Err(failure) => judge(worker, crate::fleet::Evidence::Doubt, &failure.message()),
            }
            if worker.is_up() && (!was_up || worker.served().is_empty()) {
                self.ask_models_of(worker).await;
            }
        });
        futures::future::join_all(each).await;
    }

    async fn ask_models_of(&self, worker: &Arc<Worker>) {
        if let Ok((status, answer)) = self.workers.get(&worker.spec.url, "/v1/models", caps::HEALTH_WITHIN).await
            && status.is_success()
            && let Some(served) = read_served(&answer)
        {
            worker.set_served(served);
        }
    }

    /// Asks all workers that are up what they serve.
    pub(super) async fn ask_models(&self) {
        let workers = self.router.fleet.workers();
        let up = workers.iter().filter(|worker| worker.is_up() && !worker.spec.url.is_empty());
        futures::future::join_all(up.map(|worker| self.ask_models_of(worker))).await;
    }

    /// The same, because a request asks for what is not known; not more often than [`caps::MODELS_EVERY_MIN`].
    pub(super) async fn ask_models_now(&self) {
        let now = self.started.elapsed().as_millis() as u64;
        let last = self.models_asked_ms.load(Ordering::Relaxed);
        let is_due = now >= last || last == 0;
        let next = now + caps::MODELS_EVERY_MIN.as_millis() as u64;
        // One asks for all who wait; those who come meanwhile go by what is known.
        if is_due && self.models_asked_ms.compare_exchange(last, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.ask_models().await;
        }
    }

    /// Each model once, as the first worker that serves it tells of it; contexts as the smallest says.
    fn model_entries(&self) -> Vec<Value> {
        let workers = self.router.fleet.workers();
        let entry = |name: String| {
            let served: Vec<_> = workers
                .iter()
                .flat_map(|worker| worker.served().iter().filter(|one| one.id == name).cloned().collect::<Vec<_>>())
                .collect();
            let Some(first) = served.first() else {
                return json!({"id": name, "object": "model", "created": 0, "owned_by": "kvstore-router"});
            };
            let mut entry = first.entry.clone();
            if let (Some(least), Some(fields)) =
                (served.iter().filter_map(|one| one.tokens_max).min(), entry.as_object_mut())
            {
                fields.insert("max_model_len".into(), json!(least));
            }
            entry
        };
        self.router.fleet.models().into_iter().map(entry).collect()
    }
}

/// All models.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": app.model_entries()}))
}

/// One model.
pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    match app.model_entries().into_iter().find(|entry| entry.get("id").is_some_and(|name| *name == id)) {
        Some(entry) => Json(entry).into_response(),
        None => ApiError::no_such_model(&id).into_response(),
    }
}
