//! From a request's text to the tokens that its engine will see: Hugging Face's tokenizer of the model, and its chat template.
//!
//! What comes out is for routing alone: the engine gets the text. Where the two differ, a prefix is taken for shorter than it is.

mod chunks;

use std::path::{Path, PathBuf};

use minijinja::{Environment, context};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Why a tokenizer could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A file.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The text.
    #[error("cannot tokenize the prompt: {0}")]
    Tokenize(String),
    /// The template.
    #[error("the model's chat template refuses these messages: {0}")]
    Template(String),
    /// There is none.
    #[error("the model has no chat template; name one with chat_template in the router's configuration")]
    NoTemplate,
}

/// A model's tokenizer, and its chat template.
pub struct Tokens {
    tokenizer: Tokenizer,
    template: Option<Environment<'static>>,
    template_problem: Option<String>,
    bos_token: String,
    eos_token: String,
    /// Tokens that stand before and after a text with special ones.
    around: (Vec<u32>, Vec<u32>),
    /// Tokens of pieces, where texts may be cut.
    cache: Option<chunks::Cache>,
}

/// Tokens of a text, or of its beginning.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    /// They.
    pub ids: Vec<u32>,
    /// How many the whole text has; a guess where these are not all.
    pub count: u64,
    /// These are all.
    pub whole: bool,
}

const TEMPLATE: &str = "chat";
/// What a tokenizer is tried with: prose, code, numbers, other scripts, white space.
const TRIED: &str = "The quick brown fox, said Dr. O'Neill, doesn't jump over 12,345.67 lazy dogs; it sleeps. \
    fn main() { let x = vec![1, 2, 3]; println!(\"{x:?}\"); } // a comment\n\n    if a == b and c != d:\n\treturn None\n\
    https://example.org/path?query=1&other=two user@example.org C:\\Users\\me 2026-11-26T12:00:00Z \
    Stra\u{df}e na\u{ef}ve \u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{645}\u{631}\u{62d}\u{628}\u{627} \u{1f600}\u{1f680} end of it   and then more words follow here ";

fn read(path: &Path) -> Result<String, TokenError> {
    std::fs::read_to_string(path).map_err(|cause| TokenError::Read { path: path.to_owned(), cause: cause.to_string() })
}

/// The chat template among the settings of a tokenizer: a text, or the one called "default" of several.
fn template_of(settings: &Value) -> Option<String> {
    match settings.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// A special token among the settings: a text, or a map with its content.
fn special(settings: &Value, name: &str) -> String {
    let token = &settings[name];
    token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
}

impl Tokens {
    /// Reads a model's folder (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`), or its `tokenizer.json` alone. `template`: another
    /// chat template than the model's own.
    pub fn load(path: &Path, template: Option<&Path>) -> Result<Self, TokenError> {
        let (file, folder) = match path.is_dir() {
            true => (path.join("tokenizer.json"), path),
            false => (path.to_owned(), path.parent().unwrap_or(Path::new("."))),
        };
        let tokenizer = Tokenizer::from_file(&file)
            .map_err(|cause| TokenError::Read { path: file.clone(), cause: cause.to_string() })?;
        let settings_file = folder.join("tokenizer_config.json");
        let settings: Value = match settings_file.exists() {
            true => serde_json::from_str(&read(&settings_file)?)
                .map_err(|cause| TokenError::Read { path: settings_file, cause: cause.to_string() })?,
            false => Value::Null,
        };
        let jinja = folder.join("chat_template.jinja");
        let source = match template {
            Some(path) => Some(read(path)?),
            None if jinja.exists() => Some(read(&jinja)?),
            None => template_of(&settings),
        };
        // A template that cannot be read costs conversations, and no other prompts.
        let (template, template_problem) = match source.map(environment).transpose() {
            Ok(template) => (template, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let (bos_token, eos_token) = (special(&settings, "bos_token"), special(&settings, "eos_token"));
        let mut tokens = Self {
            tokenizer,
            template,
            template_problem,
            bos_token,
            eos_token,
            around: (Vec::new(), Vec::new()),
            cache: None,
        };
        tokens.try_cutting()?;
        Ok(tokens)
    }

    /// Why it has no chat template, though there is one.
    pub fn template_problem(&self) -> Option<&str> {
        self.template_problem.as_deref()
    }

    /// Whether texts may be cut for this tokenizer: it says the same of a text of many kinds, whole and in pieces.
    fn try_cutting(&mut self) -> Result<(), TokenError> {
        let (with, without) = (self.encode_whole(TRIED, true)?, self.encode_whole(TRIED, false)?);
        let Some(at) = with.windows(without.len().max(1)).position(|window| window == without) else { return Ok(()) };
        let (before, rest) = with.split_at(at);
        self.around = (before.to_vec(), rest.get(without.len()..).unwrap_or_default().to_vec());
        self.cache = Some(chunks::Cache::default());
        let text = TRIED.repeat(4);
        if self.encode(&text, true)? != self.encode_whole(&text, true)? {
            self.cache = None;
        }
        Ok(())
    }

    /// The tokens of a text. `special`: with those that the model expects around a prompt.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenError> {
        Ok(self.encode_while(text, special, |_| true)?.ids)
    }

    /// The tokens of a text's beginning: of more and more of it, while those so far may be followed by others that matter.
    pub fn encode_while(
        &self,
        text: &str,
        special: bool,
        mut goes_on: impl FnMut(&[u32]) -> bool,
    ) -> Result<Encoded, TokenError> {
        let Some(cache) = &self.cache else {
            let ids = self.encode_whole(text, special)?;
            return Ok(Encoded { count: ids.len() as u64, ids, whole: true });
        };
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (before, after) = &self.around;
        if special {
            ids.extend_from_slice(before);
        }
        let (mut bytes, mut pieces, mut asks_at) = (0, 0, 1);
        for piece in chunks::pieces(text) {
            ids.extend_from_slice(&cache.get(piece, || self.encode_whole(piece, false))?);
            bytes += piece.len();
            pieces += 1;
            // Twice as much each time: what is asked about again is no more than what is new.
            if pieces == asks_at && bytes < text.len() {
                asks_at *= 2;
                if !goes_on(&ids) {
                    let count = (ids.len() as f64 * text.len() as f64 / bytes as f64) as u64;
                    return Ok(Encoded { ids, count, whole: false });
                }
            }
        }
        if special {
            ids.extend_from_slice(after);
        }
        Ok(Encoded { count: ids.len() as u64, ids, whole: true })
    }

    /// Whether the text of these tokens ends with a whole character.
    pub fn ends_with_character(&self, ids: &[u32]) -> bool {
        // No character has more bytes than four, and hardly a token less than one.
        let end = ids.get(ids.len().saturating_sub(8)..).unwrap_or_default();
        self.tokenizer.decode(end, false).is_ok_and(|text| !text.ends_with('\u{fffd}'))
    }

    fn encode_whole(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenError> {
        let encoded =
            self.tokenizer.encode_fast(text, special).map_err(|error| TokenError::Tokenize(error.to_string()))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The tokens of a conversation, as a request for the next message of it.
    pub fn encode_chat(&self, request: &Value) -> Result<Vec<u32>, TokenError> {
        // The template has written what special tokens there are to be.
        self.encode(&self.render(request)?, false)
    }

    /// The text of a conversation, as a request for the next message of it.
    pub fn render(&self, request: &Value) -> Result<String, TokenError> {
        let environment = self.template.as_ref().ok_or(TokenError::NoTemplate)?;
        let wrong = |error: minijinja::Error| TokenError::Template(error.to_string());
        let template = environment.get_template(TEMPLATE).map_err(wrong)?;
        let more = match request.get("chat_template_kwargs") {
            Some(Value::Object(more)) => minijinja::Value::from_serialize(more),
            _ => minijinja::Value::from_serialize(Value::Object(Default::default())),
        };
        let given =
            |name: &str| request.get(name).filter(|value| !value.is_null()).map(minijinja::Value::from_serialize);
        let messages = flattened(request.get("messages").unwrap_or(&Value::Null));
        let values = context! {
            messages => messages,
            tools => given("tools"),
            documents => given("documents"),
            add_generation_prompt => request.get("add_generation_prompt").and_then(Value::as_bool).unwrap_or(true),
            continue_final_message => request.get("continue_final_message").and_then(Value::as_bool).unwrap_or(false),
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            ..more
        };
        template.render(values).map_err(wrong)
    }
}

/// Messages whose content is a list of texts alone, with that as one text: most templates know nothing else.
fn flattened(messages: &Value) -> Value {
    let Value::Array(messages) = messages else { return messages.clone() };
    let flat = |message: &Value| -> Value {
        let text_of = |part: &Value| {
            let is_text = part.get("type").is_some_and(|kind| kind == "text");
            part.get("text").filter(|_| is_text)?.as_str().map(str::to_owned)
        };
        let parts = message.get("content").and_then(Value::as_array);
        let texts: Option<Vec<String>> = parts.and_then(|parts| parts.iter().map(text_of).collect());
        let mut message = message.clone();
        if let (Some(texts), Some(fields)) = (texts, message.as_object_mut()) {
            fields.insert("content".into(), Value::String(texts.join("\n")));
        }
        message
    };
    Value::Array(messages.iter().map(flat).collect())
}

fn environment(source: String) -> Result<Environment<'static>, TokenError> {
    let mut environment = Environment::new();
    // As transformers renders them.
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(10_000_000));
    environment.add_function("raise_exception", |why: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, why))
    });
    environment.add_function("strftime_now", |_format: String| String::new());
    environment.add_template_owned(TEMPLATE, source).map_err(|error| TokenError::Template(error.to_string()))?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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

    #[test]
    fn texts_and_conversations_become_tokens() {
        let folder = folder(CHAT);
        let tokens = Tokens::load(folder.path(), None).unwrap();
        assert_eq!(tokens.encode("hello there", true).unwrap(), [1, 5, 6]);
        assert_eq!(tokens.encode("hello", false).unwrap(), [5]);
        let chat = |request: Value| tokens.encode_chat(&request);
        let plain = json!({"messages": [{"role": "system", "content": "hello"}, {"role": "user", "content": [{"type": "text", "text": "there"}]}]});
        assert_eq!(chat(plain).unwrap(), [1, 4, 7, 5, 2, 7, 6, 3, 7]);
        let with_tools = json!({"messages": [{"role": "user", "content": "hello"}], "tools": [{"a": 1}], "chat_template_kwargs": {"add": 1}});
        assert_eq!(chat(with_tools).unwrap(), [1, 2, 7, 5, 8, 3, 7]);
        let error = chat(json!({"messages": [{"role": "bad", "content": ""}]})).unwrap_err();
        assert!(error.to_string().contains("no such role"), "{error}");
        // The file alone has no template.
        let alone = folder.path().join("alone");
        std::fs::create_dir(&alone).unwrap();
        std::fs::copy(folder.path().join("tokenizer.json"), alone.join("tokenizer.json")).unwrap();
        let tokens = Tokens::load(&alone.join("tokenizer.json"), None).unwrap();
        assert!(matches!(tokens.encode_chat(&json!({"messages": []})), Err(TokenError::NoTemplate)));
        assert!(Tokens::load(Path::new("/nowhere"), None).err().unwrap().to_string().contains("/nowhere"));
    }

    /// In pieces, from the cache and not, a text has the tokens that it has as a whole; a tokenizer that has tokens across words is not cut.
    #[test]
    fn long_texts_have_the_tokens_that_they_have_as_a_whole() {
        let folder = folder(CHAT);
        let tokens = Tokens::load(folder.path(), None).unwrap();
        assert!(tokens.cache.is_some() && tokens.around == (vec![1], vec![]));
        let text = "hello there user : assistant tool system ".repeat(500);
        for text in [&text, &format!("{text} there"), &text[..5000].to_owned()] {
            for special in [true, false] {
                assert_eq!(tokens.encode(text, special).unwrap(), tokens.encode_whole(text, special).unwrap());
            }
        }
        // One whose words are whole lines.
        let path = folder.path().join("tokenizer.json");
        let mut settings: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        settings["pre_tokenizer"] =
            json!({"type": "Split", "pattern": {"String": "\n"}, "behavior": "Removed", "invert": false});
        std::fs::write(&path, settings.to_string()).unwrap();
        let tokens = Tokens::load(folder.path(), None).unwrap();
        assert!(tokens.cache.is_none());
        assert_eq!(tokens.encode(&text, false).unwrap(), [0], "one line, one unknown word");
    }

    #[test]
    fn a_text_is_read_only_as_far_as_that_matters() {
        let folder = folder(CHAT);
        let tokens = Tokens::load(folder.path(), None).unwrap();
        let text = "hello there user : assistant tool system ".repeat(500);
        let whole = tokens.encode(&text, true).unwrap();
        let mut asked = Vec::new();
        let read = |goes_on: usize, asked: &mut Vec<usize>| {
            asked.clear();
            let go = |ids: &[u32]| {
                asked.push(ids.len());
                assert_eq!(ids, &whole[..ids.len()], "a beginning");
                ids.len() < goes_on
            };
            tokens.encode_while(&text, true, go).unwrap()
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
    fn a_template_without_end_ends() {
        let folder = folder("{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}");
        let tokens = Tokens::load(folder.path(), None).unwrap();
        assert!(matches!(tokens.encode_chat(&json!({"messages": []})), Err(TokenError::Template(_))));
    }
}
