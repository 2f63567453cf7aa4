//! What routing needs to know of a request: which model it means, which blocks its prompt has, and who answers such requests.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::app::App;
use super::openai::{ApiError, Prompt, Request};
use crate::caps;
use crate::fleet::{Role, Worker};
use crate::hashing::Chain;
use crate::place::Asked;
use crate::tokens::TokenError;

impl App {
    /// The model that a request means: the one that it names, or the only one. A name that is new is looked for at the workers first.
    pub(super) async fn model_of(&self, named: &str) -> Result<String, ApiError> {
        if named.is_empty() {
            let mut bases: Vec<String> =
                self.router.fleet.workers().iter().map(|worker| worker.spec.model.clone()).collect();
            bases.sort_unstable();
            bases.dedup();
            return match bases.as_slice() {
                [] | [_] => Ok(bases.pop().unwrap_or_default()),
                several => Err(ApiError::no_model(&several.join(", "))),
            };
        }
        if self.router.fleet.serving(named).is_empty() {
            // An adapter may have been loaded just now.
            self.ask_models_now().await;
        }
        Ok(named.to_owned())
    }

    /// What placing goes by. Long prompts are tokenized only as far as some cache may have them.
    pub(super) async fn asked(self: &Arc<Self>, request: &Arc<Request>, model: String) -> Asked {
        self.read_prompt(request, model, false).await
    }

    /// The same, of the whole prompt: for people.
    pub(super) async fn asked_whole(self: &Arc<Self>, request: &Arc<Request>, model: String) -> Asked {
        self.read_prompt(request, model, true).await
    }

    async fn read_prompt(self: &Arc<Self>, request: &Arc<Request>, model: String, whole: bool) -> Asked {
        let known = if request.body.bytes().len() <= caps::READ_AT_ONCE_BYTES {
            self.chain_of(request, &model, whole)
        } else {
            let (app, reading, of) = (Arc::clone(self), Arc::clone(request), model.clone());
            // A long prompt takes milliseconds to tokenize and to hash.
            tokio::task::spawn_blocking(move || app.chain_of(&reading, &of, whole)).await.ok().flatten()
        };
        let session = request.session;
        match known {
            Some((tokens, chain)) => Asked { model, tokens, chain, session, role: Role::Both },
            _ => Asked { model, tokens: request.guessed_tokens(), session, ..Asked::default() },
        }
    }

    fn chain_of(&self, request: &Request, model: &str, whole: bool) -> Option<(u64, Chain)> {
        let tokenizer = self.tokens_of(model);
        let refused = |error: TokenError| {
            tracing::debug!(%error, model, "the prompt cannot be tokenized, so the request is routed without its tokens");
        };
        let (text, special) = match request.prompt() {
            Prompt::Tokens(tokens) => {
                return self.chain(request, model, &tokens).map(|chain| (tokens.len() as u64, chain));
            }
            Prompt::Text(text) => (text, true),
            Prompt::Chat => {
                let body = serde_json::from_slice(request.body.bytes()).ok()?;
                (tokenizer?.render(&body).map_err(refused).ok()?, false)
            }
            Prompt::Other => return None,
        };
        let tokenizer = tokenizer?;
        if whole {
            let tokens = tokenizer.encode(&text, special).map_err(refused).ok()?;
            return self.chain(request, model, &tokens).map(|chain| (tokens.len() as u64, chain));
        }
        // Nobody has a block without those before it: what follows a block that nobody has need not be known.
        let mut known = None;
        let may_go_on = |tokens: &[u32]| {
            known = self.chain(request, model, tokens);
            known.as_ref().is_some_and(|chain| self.router.fleet.may_have_more(model, chain))
        };
        let tokens = tokenizer.encode_while(&text, special, may_go_on).map_err(refused).ok()?;
        let chain = if tokens.whole { self.chain(request, model, &tokens.ids)? } else { known? };
        Some((tokens.count, chain))
    }

    /// A model's tokenizer; an adapter has its base model's, unless it is given its own.
    fn tokens_of(&self, model: &str) -> Option<&crate::tokens::Tokens> {
        let own = self.models.get(model).and_then(|model| model.tokens.as_ref());
        own.or_else(|| {
            let serving = self.router.fleet.serving(model);
            serving.iter().find_map(|worker| self.models.get(&worker.spec.model)?.tokens.as_ref())
        })
    }

    fn chain(&self, request: &Request, model: &str, tokens: &[u32]) -> Option<Chain> {
        let fleet = &self.router.fleet;
        let adapter = fleet.is_adapter(model).then_some(model);
        fleet.hashing().chain(tokens, fleet.block_tokens(model)?, adapter, request.salt.as_deref()).ok()
    }

    /// What placing goes by for the rest of an answer: a prompt of tokens.
    pub(super) fn asked_again(&self, asked: &Asked, request: &Request, tokens: &[u32]) -> Asked {
        let chain = self.chain(request, &asked.model, tokens).unwrap_or_default();
        Asked { tokens: tokens.len() as u64, chain, ..asked.clone() }
    }

    /// Whole requests go to workers that do both halves, or to those that do the second where a pool is split.
    pub(super) fn answering_role(&self, model: &str) -> Role {
        let decodes = |worker: &Arc<Worker>| worker.spec.role == Role::Decode;
        if self.router.fleet.serving(model).iter().any(decodes) { Role::Decode } else { Role::Both }
    }

    pub(super) fn has_role(&self, model: &str, role: Role) -> bool {
        let has = |worker: &Arc<Worker>| worker.spec.role == role && worker.is_up();
        self.router.fleet.serving(model).iter().any(has)
    }

    /// Engines that may answer such requests, up or not.
    pub(super) fn engines(&self, asked: &Asked) -> usize {
        let answers = |worker: &&Arc<Worker>| worker.spec.role == asked.role && !worker.spec.url.is_empty();
        let serving = self.router.fleet.serving(&asked.model);
        serving.iter().filter(answers).map(|worker| worker.number).collect::<BTreeSet<usize>>().len()
    }

    /// Tokens that a model's context has, as a worker says; of an adapter, its base model's.
    pub(super) async fn model_tokens_max(&self, worker: &Worker, model: &str) -> Option<u64> {
        let known = || {
            let served = worker.served();
            let of = |id: &str| served.iter().find(|served| served.id == id);
            let this = of(model)?;
            this.tokens_max.or_else(|| of(this.parent.as_deref()?)?.tokens_max)
        };
        if let Some(known) = known() {
            return Some(known);
        }
        self.ask_models_now().await;
        known()
    }
}
