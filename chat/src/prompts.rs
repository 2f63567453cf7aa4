//! From a request to the prompt that its engine makes of it: a model's tokenizer and its chat templates, as read from its files.
//!
//! What is not known for certain is an error here, never a guess. A request's own template, a program of the client's, is not run.

use std::collections::HashMap;
use std::path::Path;

use crate::engine::{ARGUMENTS, Engine, NotKnown, TWICE};
use crate::files::{FileError, Files, Templates};
use crate::jinja::{Clock, RenderError, Syntax, Template};
use crate::json::{JsonError, parse};
use crate::tokenize::{Encoded, Side, TokenizeError, Tokenizer, cut};
use crate::value::{Dict, Value};
use crate::{sglang, vllm};

/// Why a prompt is not known.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// A file.
    #[error(transparent)]
    Read(#[from] FileError),
    /// The tokenizer, or the text.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// The request is no object of JSON.
    #[error("the request is no object of JSON that Python would read the same: {0}")]
    Json(#[from] JsonError),
    /// The request is another value.
    #[error("the request is no object")]
    NoObject,
    /// The template, whatever the request.
    #[error("the model's chat template cannot be used: {0}")]
    Syntax(Syntax),
    /// The template, for this request.
    #[error("the model's chat template does not render these messages: {0}")]
    Render(#[from] RenderError),
    /// What the engine makes of the messages.
    #[error(transparent)]
    NotKnown(#[from] NotKnown),
    /// The request brings one.
    #[error("the request brings a chat template of its own: a program of the client's, which is not run here")]
    OwnTemplate,
    /// There is none.
    #[error("the model has no chat template; name one with chat_template in the router's configuration")]
    NoTemplate,
}

/// What an engine was started with that changes its prompts.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Arguments for the template, where a request says none of the same name: `--default-chat-template-kwargs`.
    pub template_kwargs: Dict,
    /// The template does not see tools of which none may be called: vLLM's `--exclude-tools-when-tool-choice-none`.
    pub excludes_tools: bool,
}

impl Options {
    /// An argument of these that is the engine's own, so that no request could be rendered.
    pub fn wrong_argument(&self) -> Option<&str> {
        let names = self.template_kwargs.fields().map(|(name, _)| &**name);
        let mut wrong = names.filter(|name| ARGUMENTS.contains(name) || TWICE.contains(name));
        wrong.next()
    }
}

/// A model's tokenizer, and its chat templates.
pub struct Prompts {
    tokenizer: Tokenizer,
    templates: Templates,
    /// By its source, each template; or why it cannot be used.
    parsed: HashMap<String, Result<Template, Syntax>>,
    special_tokens: Dict,
    clock: Clock,
    truncation_side: Side,
    problem: Option<String>,
    own_way_of_sglang: Option<String>,
    /// Why SGLang's tokens are not known: of a chat's prompt, and of a text.
    not_of_sglang: [Option<&'static str>; 2],
    options: Options,
}

impl Prompts {
    /// Reads a model's folder (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and what else transformers reads), or its
    /// `tokenizer.json` alone. `template`: another chat template than the model's own.
    pub fn load(path: &Path, template: Option<&Path>) -> Result<Self, PromptError> {
        let files = Files::read(path, template)?;
        let tokenizer = Tokenizer::new(&files)?;
        let (mut parsed, mut unusable) = (HashMap::new(), None);
        for (name, source) in files.templates.all() {
            let usable = Template::parse(source);
            // A template that cannot be read costs conversations, and no other prompts.
            if let (Err(why), None) = (&usable, &unusable) {
                let name = name.map(|name| format!(" {name:?}")).unwrap_or_default();
                unusable = Some(format!(
                    "its chat template{name} cannot be used, so its conversations are placed by load: {why}"
                ));
            }
            parsed.insert(source.to_owned(), usable);
        }
        let built_anew = files.built_anew.map(|class| {
            format!("its tokenizer's class, {class}, is one that transformers makes anew: if its tokens differ from those of tokenizer.json, prefixes are not found")
        });
        let special_tokens = files.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str())).collect();
        let truncation_side = if files.truncates_left { Side::Left } else { Side::Right };
        let (clock, options) = (Clock::here(), Options::default());
        let restores =
            files.sglang_restores.then_some("a tokenizer of which SGLang puts parts back that transformers made anew");
        // It makes tokens of the text once more, and those at the beginning come twice.
        let twice = files.has_media && tokenizer.adds_tokens();
        let twice = twice.then_some("a prompt of a model for pictures or sound whose tokenizer adds tokens");
        let around = files.says_tokens_around.then_some("a text whose first token SGLang takes from the configuration");
        let not_of_sglang = [restores.or(twice), restores.or(around)];
        let (templates, own_way_of_sglang, problem) =
            (files.templates, files.own_way_of_sglang, unusable.or(built_anew));
        Ok(Self {
            tokenizer,
            templates,
            parsed,
            special_tokens,
            clock,
            truncation_side,
            problem,
            own_way_of_sglang,
            not_of_sglang,
            options,
        })
    }

    /// The same, for engines that were started with these.
    pub fn with_options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// What of its prompts is not known, or may not be, though there are files.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Why the tokens of this engine are not known, whatever the text. `chat`: of a conversation's prompt.
    pub fn knows_tokens_of(&self, engine: Engine, chat: bool) -> Result<(), NotKnown> {
        let [of_chat, of_text] = self.not_of_sglang;
        match if chat { of_chat } else { of_text } {
            Some(what) if engine == Engine::Sglang => Err(NotKnown::Unsupported(what.into())),
            _ => Ok(()),
        }
    }

    /// The tokens of a text. `special`: with those that the model expects around a prompt.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, PromptError> {
        Ok(self.tokenizer.encode(text, special)?)
    }

    /// The tokens of a text's beginning: of more and more of it, while those so far may be followed by others that matter.
    pub fn encode_while(
        &self,
        text: &str,
        special: bool,
        goes_on: impl FnMut(&[u32]) -> bool,
    ) -> Result<Encoded, PromptError> {
        Ok(self.tokenizer.encode_while(text, special, goes_on)?)
    }

    /// The tokens of a text, `most` of them. `side`: where the rest is left out; by the model's own rule where the request says none, and the
    /// special tokens around stay then.
    pub fn encode_cut(
        &self,
        text: &str,
        special: bool,
        most: usize,
        side: Option<Side>,
    ) -> Result<Vec<u32>, PromptError> {
        match side {
            Some(side) => Ok(cut(self.tokenizer.encode(text, special)?, most, side)),
            None => Ok(self.tokenizer.encode_cut(text, special, most, self.truncation_side)?),
        }
    }

    /// Whether the text of these tokens ends with a whole character.
    pub fn ends_with_character(&self, ids: &[u32]) -> bool {
        self.tokenizer.ends_with_character(ids)
    }

    /// The tokens of a conversation: a request's body, as a request for the next message of it.
    pub fn encode_chat(&self, engine: Engine, body: &[u8]) -> Result<Vec<u32>, PromptError> {
        // The template has written what special tokens there are to be.
        self.knows_tokens_of(engine, true)?;
        self.encode(&self.render(engine, body)?, false)
    }

    /// The text of a conversation: a request's body, as a request for the next message of it.
    pub fn render(&self, engine: Engine, body: &[u8]) -> Result<String, PromptError> {
        let Value::Dict(request) = parse(body)? else { return Err(PromptError::NoObject) };
        match engine {
            Engine::Vllm => self.render_vllm(&request),
            Engine::Sglang => self.render_sglang(&request),
        }
    }

    fn render_vllm(&self, request: &Dict) -> Result<String, PromptError> {
        let given = |name: &str| request.get(name).filter(|value| !value.is_none());
        let asked = given("chat_template").and_then(Value::as_str);
        let template = self.template(self.templates.choose(asked, given("tools").is_some()))?;
        let mut made = vllm::conversation(request, vllm::Form::of(template.facts()))?;
        if made.goes_on() && !template.facts().has_word_content {
            return Err(NotKnown::Refused("the template writes no content that could be gone on with".into()).into());
        }
        if self.options.excludes_tools && given("tool_choice").and_then(Value::as_str) == Some("none") {
            made.tools = None;
        }
        let mut more = self.options.template_kwargs.clone();
        more.extend(made.more.fields());
        let messages = std::mem::take(&mut made.messages);
        let names = self.names(&more, messages, made.tools.take());
        Ok(made.prompt(template.render(&names, &self.clock)?)?)
    }

    fn render_sglang(&self, request: &Dict) -> Result<String, PromptError> {
        if let Some(own) = &self.own_way_of_sglang {
            return Err(NotKnown::Unsupported(format!("a prompt that SGLang makes in a way of its own ({own})")).into());
        }
        if self.templates.has_no_first() {
            return Err(NotKnown::Unsupported("the first of several templates".into()).into());
        }
        let template = self.template(self.templates.first())?;
        let made = sglang::conversation(request, sglang::Form::of(template.facts()), &self.options.template_kwargs)?;
        let names = self.names(&made.more, made.messages.clone(), made.tools.clone());
        match (template.render(&names, &self.clock), made.flat_tools) {
            // Once more, with the functions alone: there are templates that expect so.
            (Err(RenderError::Raised(_) | RenderError::Failed(_)), Some(flat)) => {
                let names = self.names(&made.more, made.messages, Some(flat));
                Ok(template.render(&names, &self.clock)?)
            }
            (text, _) => Ok(text?),
        }
    }

    fn template(&self, source: Option<&str>) -> Result<&Template, PromptError> {
        match self.parsed.get(source.ok_or(PromptError::NoTemplate)?) {
            Some(Ok(template)) => Ok(template),
            Some(Err(why)) => Err(PromptError::Syntax(why.clone())),
            None => Err(PromptError::OwnTemplate),
        }
    }

    /// What the template sees. What the request gives to it stands for special tokens of the same name.
    fn names(&self, more: &Dict, messages: Vec<Value>, tools: Option<Value>) -> Dict {
        let mut names = self.special_tokens.clone();
        names.extend(more.fields());
        if !names.contains("documents") {
            names.insert("documents", Value::None);
        }
        names.insert("messages", Value::list(messages));
        names.insert("tools", tools.unwrap_or(Value::None));
        names
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Encoded, Engine, NotKnown, Options, Path, PromptError, Prompts, RenderError};

    /// A tokenizer with a word for each of a few words, in a folder like a model's.
    fn folder(template: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let words = ["[UNK]", "<s>", "user", "assistant", "system", "hello", "there", ":", "tool"];
        let vocabulary: serde_json::Map<String, Value> =
            words.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let settings = json!({"bos_token": {"content": "<s>"}, "chat_template": template});
        std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        folder
    }

    const CHAT: &str = "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}{{ message['role'].strip() }} : {{ message['content'] }} {% endfor %}{% if tools %}tool {% endif %}{% if add_generation_prompt %}assistant :{% endif %}";

    const HELLO: &[u8] = b"{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}";

    #[test]
    fn texts_and_conversations_become_tokens() {
        let folder = folder(CHAT);
        let prompts = Prompts::load(folder.path(), None).unwrap();
        assert_eq!(prompts.encode("hello there", true).unwrap(), [1, 5, 6]);
        assert_eq!(prompts.encode("hello", false).unwrap(), [5]);
        let chat = |request: Value| prompts.encode_chat(Engine::Vllm, request.to_string().as_bytes());
        let plain = json!({"messages": [{"role": "system", "content": "hello"}, {"role": "user", "content": [{"type": "text", "text": "there"}]}]});
        assert_eq!(chat(plain).unwrap(), [1, 4, 7, 5, 2, 7, 6, 3, 7]);
        let with_tools = json!({"messages": [{"role": "user", "content": "hello"}], "tools": [{"function": {"name": "f"}}], "chat_template_kwargs": {"add": 1}});
        assert_eq!(chat(with_tools).unwrap(), [1, 2, 7, 5, 8, 3, 7]);
        let error = chat(json!({"messages": [{"role": "bad", "content": ""}]})).unwrap_err();
        assert!(error.to_string().contains("no such role"), "{error}");
        // The file alone has no template.
        let alone = folder.path().join("alone");
        std::fs::create_dir(&alone).unwrap();
        std::fs::copy(folder.path().join("tokenizer.json"), alone.join("tokenizer.json")).unwrap();
        let prompts = Prompts::load(&alone.join("tokenizer.json"), None).unwrap();
        assert!(matches!(prompts.encode_chat(Engine::Vllm, b"{\"messages\": []}"), Err(PromptError::NoTemplate)));
        assert!(Prompts::load(Path::new("/nowhere"), None).err().unwrap().to_string().contains("/nowhere"));
    }

    /// A folder of several templates had only one of them, and a tokenizer that was saved with truncation cut prompts.
    #[test]
    fn files_are_read_as_an_engine_reads_them() {
        let folder = folder("hello");
        let path = folder.path().join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        tokenizer["truncation"] =
            json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let named = json!([{"name": "default", "template": "hello"}, {"name": "tool_use", "template": "tool {{ unk_token }}user"}]);
        let settings = json!({"chat_template": named, "tokenizer_class": "T5Tokenizer"});
        std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        let prompts = Prompts::load(folder.path(), None).unwrap();
        assert!(prompts.problem().unwrap().contains("T5Tokenizer"), "{:?}", prompts.problem());
        assert_eq!(prompts.encode("hello there user tool", false).unwrap(), [5, 6, 2, 8]);
        let chat = |more: Value| {
            let mut request = json!({"messages": [{"role": "user", "content": "there"}]});
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            prompts.encode_chat(Engine::Vllm, request.to_string().as_bytes()).unwrap()
        };
        assert_eq!(chat(json!({})), [5]);
        assert_eq!(
            chat(json!({"tools": [{"function": {"name": "f"}}]})),
            [8, 2],
            "and a special token that the model has not is nothing"
        );
        let own = json!({"messages": [{"role": "user", "content": "there"}], "chat_template": "user {{ messages[0].content }}"});
        assert!(
            matches!(prompts.encode_chat(Engine::Vllm, own.to_string().as_bytes()), Err(PromptError::OwnTemplate)),
            "it could take all memory"
        );
        assert_eq!(
            chat(json!({"tools": [{"function": {"name": "f"}}], "chat_template": "default"})),
            [5],
            "by its name"
        );
    }

    /// What an engine was started with changed its prompts, and not ours.
    #[test]
    fn an_engines_own_options_change_its_prompts() {
        let folder = folder("{% if enable_thinking %}tool {% endif %}{{ word }}{% if tools %} system{% endif %}");
        let own = crate::json::parse(b"{\"enable_thinking\": true, \"word\": \"user\"}").unwrap();
        let options = Options { template_kwargs: own.as_dict().unwrap().clone(), excludes_tools: true };
        let prompts = Prompts::load(folder.path(), None).unwrap().with_options(options);
        let render = |engine: Engine, more: Value| {
            let mut request =
                json!({"messages": [{"role": "user", "content": "there"}], "tools": [{"function": {"name": "f"}}]});
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            prompts.render(engine, request.to_string().as_bytes()).unwrap()
        };
        for engine in [Engine::Vllm, Engine::Sglang] {
            assert_eq!(render(engine, json!({})), "tool user system");
            assert_eq!(render(engine, json!({"tool_choice": "none"})), "tool user");
            assert_eq!(render(engine, json!({"chat_template_kwargs": {"word": "hello"}})), "tool hello system");
            // What the effort says counts more.
            assert_eq!(render(engine, json!({"reasoning_effort": "none"})), "user system");
        }
        let null = json!({"chat_template_kwargs": {"word": null}});
        assert_eq!(render(Engine::Vllm, null.clone()), "tool user system", "null is not said");
        assert_eq!(render(Engine::Sglang, null), "tool None system", "null is null");
    }

    /// vLLM refuses to go on with a message whose template never names the content. A prompt was made.
    #[test]
    fn nothing_goes_on_without_a_content() {
        let folder = folder("{{ messages[0]['con' ~ 'tent'] }}");
        let prompts = Prompts::load(folder.path(), None).unwrap();
        let request = json!({"messages": [{"role": "assistant", "content": "a"}], "add_generation_prompt": false, "continue_final_message": true});
        let made = prompts.render(Engine::Vllm, request.to_string().as_bytes());
        assert!(matches!(made, Err(PromptError::NotKnown(NotKnown::Refused(_)))), "{made:?}");
    }

    /// SGLang asks a template that fails once more, with the functions alone; and some models it does not ask at all.
    #[test]
    fn templates_are_asked_twice_by_sglang_or_not_at_all() {
        let folder = folder("{{ raise_exception('no') if tools[0].function }}{{ tools[0].name }}");
        let request =
            json!({"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "user"}}]});
        let render =
            || Prompts::load(folder.path(), None).unwrap().render(Engine::Sglang, request.to_string().as_bytes());
        assert_eq!(render().unwrap(), "user");
        std::fs::write(folder.path().join("config.json"), json!({"architectures": ["KimiK3ForCausalLM"]}).to_string())
            .unwrap();
        assert!(render().unwrap_err().to_string().contains("KimiK3ForCausalLM"));
    }

    /// SGLang makes tokens of some prompts in ways of its own: they were taken for those of transformers.
    #[test]
    fn tokens_that_sglang_makes_otherwise_are_not_known() {
        let known = |settings: Value, model: Value| {
            let folder = folder("{{ messages[0].content }}");
            std::fs::write(folder.path().join("config.json"), model.to_string()).unwrap();
            let mut config = json!({"chat_template": "{{ messages[0].content }}"});
            config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
            std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
            let prompts = Prompts::load(folder.path(), None).unwrap();
            let knows = |engine: Engine| [true, false].map(|chat| prompts.knows_tokens_of(engine, chat).is_ok());
            assert_eq!(knows(Engine::Vllm), [true, true]);
            assert_eq!(prompts.encode_chat(Engine::Sglang, HELLO).is_ok(), knows(Engine::Sglang)[0]);
            knows(Engine::Sglang)
        };
        assert_eq!(known(json!({}), json!({})), [true, true]);
        assert_eq!(known(json!({}), json!({"vision_config": {}})), [false, true], "the first token comes twice");
        assert_eq!(known(json!({"add_bos_token": true}), json!({})), [true, false]);
        let folder = folder("x");
        std::fs::write(folder.path().join("tokenizer_config.json"), "{\"split_special_tokens\": true}").unwrap();
        let error = Prompts::load(folder.path(), None).err().unwrap().to_string();
        assert!(error.contains("split_special_tokens"), "{error}");
    }

    #[test]
    fn a_text_is_read_only_as_far_as_that_matters() {
        let folder = folder(CHAT);
        let prompts = Prompts::load(folder.path(), None).unwrap();
        let text = "hello there user : assistant tool system ".repeat(500);
        let whole = prompts.encode(&text, true).unwrap();
        let mut asked = Vec::new();
        let read = |goes_on: usize, asked: &mut Vec<usize>| {
            asked.clear();
            let go = |ids: &[u32]| {
                asked.push(ids.len());
                assert_eq!(ids, &whole[..ids.len()], "a beginning");
                ids.len() < goes_on
            };
            prompts.encode_while(&text, true, go).unwrap()
        };
        let first = read(0, &mut asked);
        assert_eq!((asked.len(), first.whole, first.ids.len()), (1, false, asked[0]));
        assert!(first.ids.len() < 200 && (3400..3600).contains(&first.count), "{} of {}", first.count, whole.len());
        assert!(!read(1000, &mut asked).whole && asked.len() < 6, "{asked:?}");
        assert_eq!(
            read(usize::MAX, &mut asked),
            Encoded { count: whole.len() as u64, ids: whole.clone(), whole: true }
        );
    }

    #[test]
    fn what_only_training_needs_is_nothing_and_a_date_is_todays() {
        let folder = folder(
            "{% for m in messages %}{%- generation -%}\n{{ m.content }}{% endgeneration %}{% endfor %} {{ strftime_now('%Y') }}",
        );
        let prompts = Prompts::load(folder.path(), None).unwrap();
        let text = prompts.render(Engine::Vllm, HELLO).unwrap();
        let year = text.strip_prefix("hello ").and_then(|year| year.parse::<u32>().ok());
        assert!(year.is_some_and(|year| year >= 2026), "{text}");
    }

    #[test]
    fn a_template_without_end_ends() {
        let folder = folder("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}");
        let prompts = Prompts::load(folder.path(), None).unwrap();
        assert!(matches!(prompts.encode_chat(Engine::Vllm, HELLO), Err(PromptError::Render(RenderError::TooMuch(_)))));
    }

    /// Conversations are lost, and nothing else; what costs them is said, with the template's name where there are several.
    #[test]
    fn a_template_that_cannot_be_read_costs_its_conversations_alone() {
        let folder = folder("{% if %}");
        let prompts = Prompts::load(folder.path(), None).unwrap();
        assert!(prompts.problem().unwrap().starts_with("its chat template cannot be used"), "{:?}", prompts.problem());
        assert!(matches!(prompts.encode_chat(Engine::Vllm, HELLO), Err(PromptError::Syntax(_))));
        assert_eq!(prompts.encode("hello", false).unwrap(), [5]);
        let named =
            json!([{"name": "default", "template": "hello"}, {"name": "tool_use", "template": "{{ 1 | nobody }}"}]);
        let settings = json!({"chat_template": named});
        std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        let prompts = Prompts::load(folder.path(), None).unwrap();
        assert_eq!(
            prompts.problem(),
            Some(
                "its chat template \"tool_use\" cannot be used, so its conversations are placed by load: no filter nobody"
            )
        );
        assert_eq!(prompts.encode_chat(Engine::Vllm, HELLO).unwrap(), [5]);
    }

    /// A body's numbers are the template's as they were written: serde_json would have made one of 23 digits another one.
    #[test]
    fn numbers_of_a_request_are_those_that_it_has() {
        let folder =
            folder("{{ tools[0].function.parameters.n }} {{ tools[0].function.parameters.n | tojson }} {{ x }}");
        let prompts = Prompts::load(folder.path(), None).unwrap();
        for (sent, printed) in [
            ("12345678901234567890123", "12345678901234567890123"),
            ("-0", "0"),
            ("1e22", "1e+22"),
            ("2.0", "2.0"),
            ("0.1", "0.1"),
        ] {
            let body = format!(
                r#"{{"messages": [{{"role": "user", "content": "a"}}], "chat_template_kwargs": {{"x": {sent}}},
                "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {{"n": {sent}}}}}}}]}}"#
            );
            assert_eq!(
                prompts.render(Engine::Vllm, body.as_bytes()).unwrap(),
                format!("{printed} {printed} {printed}")
            );
        }
        assert!(matches!(prompts.render(Engine::Vllm, b"[]"), Err(PromptError::NoObject)));
        assert!(matches!(prompts.render(Engine::Vllm, b"{"), Err(PromptError::Json(_))));
    }
}
