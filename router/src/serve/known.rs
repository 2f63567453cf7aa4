//! What routing needs to know of a request: which model it means, which blocks its prompt has, and who answers such requests.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvstore_chat::conversation::{Beginning, beginnings};
use kvstore_chat::engine::Engine;
use kvstore_chat::prompts::{PromptError, Prompts};
use kvstore_chat::shape::Shape;
use kvstore_chat::tokenize::{Side, cut};
use serde_json::Value;

use super::app::App;
use super::json::Object;
use super::openai::{ApiError, Kind, Prompt, Request};
use crate::caps;
use crate::fleet::{Role, Worker};
use crate::hashing::Chain;
use crate::place::{Asked, Known};

/// What a request says, as far as routing goes by it.
struct Read {
    messages: Arc<[Beginning]>,
    /// Of a chat.
    shape: Option<Shape>,
    known: Result<(u64, Chain), String>,
}

impl Default for Read {
    fn default() -> Self {
        Self { messages: Arc::default(), shape: None, known: Err("it could not be read".into()) }
    }
}

/// A prompt, and how it becomes tokens.
enum Text<'a> {
    Tokens(Vec<u32>),
    Text { prompts: &'a Prompts, text: String, special: bool },
}

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
        let read = if request.body.bytes().len() <= caps::READ_AT_ONCE_BYTES {
            self.read(request, &model, whole)
        } else {
            let (app, reading, of) = (Arc::clone(self), Arc::clone(request), model.clone());
            // A long prompt takes milliseconds to tokenize and to hash.
            tokio::task::spawn_blocking(move || app.read(&reading, &of, whole)).await.unwrap_or_default()
        };
        let Read { messages, shape, known } = read;
        let asked = Asked { messages, session: request.session, ..Asked::default() };
        match known {
            Ok((tokens, chain)) => {
                if let Some(shape) = shape {
                    self.compare(request, &model, shape);
                }
                Asked { model, tokens, chain, known: Known::Tokens, ..asked }
            }
            Err(why) => {
                tracing::debug!(why, model, "the prompt is not known, so the request is routed without its tokens");
                let (tokens, why) = (request.guessed_tokens(), Some(why.into()));
                let told = self.shapes.told(&asked.messages);
                if shape.is_some() && self.tokens_of(&model).is_some() {
                    self.learn_prompt(request, &model, &asked.messages);
                }
                match told {
                    Some(chain) => Asked {
                        model,
                        tokens,
                        chain: (*chain).clone(),
                        known: Known::Beginning,
                        not_known: why,
                        ..asked
                    },
                    None => Asked { model, tokens, not_known: why, ..asked },
                }
            }
        }
    }

    /// Reads a request's conversation and prompt; takes milliseconds for long ones.
    fn read(&self, request: &Request, model: &str, whole: bool) -> Read {
        if request.kind != Kind::Chat {
            return Read { known: self.chain_of(request, model, whole), ..Read::default() };
        }
        let messages = request.body.value("messages");
        let field = |name: &str| if name == "messages" { messages.clone() } else { request.body.value(name) };
        let shape = Shape::of(field);
        let engine = self.engine_of(model).unwrap_or_default();
        let known = match self.shapes.differ((model, engine), shape) {
            true => Err(format!("the engine makes other prompts of this shape than the router: {shape}")),
            false => self.chain_of(request, model, whole),
        };
        Read { messages: beginnings(field, model, self.seed).into(), shape: Some(shape), known }
    }

    /// The beginnings of a request's conversation.
    pub(super) fn beginnings(&self, body: &Object, model: &str) -> Arc<[Beginning]> {
        beginnings(|field| body.value(field), model, self.seed).into()
    }

    /// How many tokens a prompt has, and its blocks: none of those, where no engine has said yet how many tokens they have. Or why that is
    /// not known.
    fn chain_of(&self, request: &Request, model: &str, whole: bool) -> Result<(u64, Chain), String> {
        if whole || !matches!(request.body.value("truncate_prompt_tokens"), Value::Null) {
            let tokens = self.whole_tokens(request, model)?;
            return Ok((tokens.len() as u64, self.chain(request, model, &tokens)));
        }
        let (prompts, text, special) = match self.text_of(request, model)? {
            Text::Tokens(tokens) => return Ok((tokens.len() as u64, self.chain(request, model, &tokens))),
            Text::Text { prompts, text, special } => (prompts, text, special),
        };
        // Nobody has a block without those before it: what follows a block that nobody has need not be known.
        let mut known = Chain::default();
        let may_go_on = |tokens: &[u32]| {
            known = self.chain(request, model, tokens);
            // Of a model whose blocks nobody has told of, nobody is known to have any.
            known.block_tokens > 0 && self.router.fleet.may_have_more(model, &known)
        };
        let tokens = prompts.encode_while(&text, special, may_go_on).map_err(|error| error.to_string())?;
        let chain = if tokens.whole { self.chain(request, model, &tokens.ids) } else { known };
        Ok((tokens.count, chain))
    }

    /// All tokens of a prompt.
    pub(super) fn whole_tokens(&self, request: &Request, model: &str) -> Result<Vec<u32>, String> {
        let field = |name: &str| request.body.value(name);
        let side = match field("truncation_side") {
            Value::Null => None,
            Value::String(side) if side == "left" => Some(Side::Left),
            Value::String(side) if side == "right" => Some(Side::Right),
            _ => return Err("truncation_side is neither left nor right".into()),
        };
        let most = match field("truncate_prompt_tokens") {
            _ if self.engine_of(model)? == Engine::Sglang => None,
            Value::Null => None,
            most => match most.as_u64() {
                Some(most) => Some(usize::try_from(most).unwrap_or(usize::MAX)),
                None => return Err("the prompt is cut to what the model's context holds".into()),
            },
        };
        let wrong = |error: PromptError| error.to_string();
        match (self.text_of(request, model)?, most, side) {
            (Text::Tokens(tokens), None, _) => Ok(tokens),
            (Text::Tokens(tokens), Some(most), Some(side)) => Ok(cut(tokens, most, side)),
            (Text::Tokens(_), Some(_), None) => {
                Err("tokens are cut at the side of the engine's tokenizer, which is not asked for here".into())
            }
            (Text::Text { prompts, text, special }, None, _) => prompts.encode(&text, special).map_err(wrong),
            (Text::Text { prompts, text, special }, Some(most), side) => {
                prompts.encode_cut(&text, special, most, side).map_err(wrong)
            }
        }
    }

    fn text_of(&self, request: &Request, model: &str) -> Result<Text<'_>, String> {
        let prompts =
            || self.tokens_of(model).ok_or_else(|| format!("the router has no tokenizer of the model {model:?}"));
        let engine = self.engine_of(model)?;
        let special = request.body.value("add_special_tokens").as_bool().filter(|_| engine == Engine::Vllm);
        match request.prompt() {
            Prompt::Tokens(tokens) => Ok(Text::Tokens(tokens)),
            Prompt::Text(text) => {
                let prompts = prompts()?;
                prompts.knows_tokens_of(engine, false).map_err(|why| why.to_string())?;
                Ok(Text::Text { prompts, text, special: special.unwrap_or(true) })
            }
            Prompt::Chat => {
                let prompts = prompts()?;
                prompts.knows_tokens_of(engine, true).map_err(|why| why.to_string())?;
                let text = prompts.render(engine, request.body.bytes()).map_err(|error| error.to_string())?;
                Ok(Text::Text { prompts, text, special: special.unwrap_or(false) })
            }
            Prompt::Other => Err("the request has several prompts, or one that is no text".into()),
        }
    }

    /// Whose prompts the workers of a model make.
    pub(super) fn engine_of(&self, model: &str) -> Result<Engine, String> {
        let serving = self.router.fleet.serving(model);
        let is_any_up = serving.iter().any(|worker| worker.is_up());
        let counts = |worker: &&Arc<Worker>| !worker.spec.url.is_empty() && (worker.is_up() || !is_any_up);
        let mut engines = serving.iter().filter(counts).filter_map(|worker| worker.engine());
        let first = engines.next().unwrap_or_default();
        match engines.find(|other| *other != first) {
            Some(other) => Err(format!(
                "the model's workers run two engines, {first} and {other}, which make two prompts of a request"
            )),
            None => Ok(first),
        }
    }

    /// A model's tokenizer; an adapter has its base model's, unless it is given its own.
    pub(super) fn tokens_of(&self, model: &str) -> Option<&Prompts> {
        let own = self.models.get(model).and_then(|model| model.tokens.as_ref());
        own.or_else(|| {
            let serving = self.router.fleet.serving(model);
            serving.iter().find_map(|worker| self.models.get(&worker.spec.model)?.tokens.as_ref())
        })
    }

    /// The blocks of tokens; none while it is not known how many tokens a block has.
    pub(super) fn chain(&self, request: &Request, model: &str, tokens: &[u32]) -> Chain {
        let fleet = &self.router.fleet;
        let adapter = fleet.is_adapter(model).then_some(model);
        let Some(each) = fleet.block_tokens(model) else { return Chain::default() };
        fleet.hashing().chain(tokens, each, adapter, request.salt.as_deref()).unwrap_or_default()
    }

    /// What placing goes by for the rest of an answer: a prompt of tokens.
    pub(super) fn asked_again(&self, asked: &Asked, request: &Request, tokens: &[u32]) -> Asked {
        let chain = self.chain(request, &asked.model, tokens);
        Asked { tokens: tokens.len() as u64, known: Known::Tokens, chain, ..asked.clone() }
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
