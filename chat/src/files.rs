//! A model's folder, as transformers 5 reads it: which chat template is taken, which special tokens a template sees, and which tokenizer
//! comes out of `tokenizer.json` and the files beside it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

/// The files of a model that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {cause}")]
pub struct FileError {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub cause: String,
}

/// Bytes of a file, at most: vocabularies have some tens of mebibytes.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// Templates with names, at most: models have two or three.
const TEMPLATES_MAX: usize = 64;

fn read(path: &Path) -> Result<String, FileError> {
    let wrong = |cause: String| FileError { path: path.to_owned(), cause };
    let bytes = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(wrong(format!("it has {bytes} bytes, and {FILE_BYTES_MAX} are the most")));
    }
    std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))
}

fn read_if_there(path: &Path) -> Result<Option<String>, FileError> {
    if path.exists() { read(path).map(Some) } else { Ok(None) }
}

/// A file of JSON; an empty object where there is none.
fn settings(path: &Path) -> Result<Map<String, Value>, FileError> {
    let Some(text) = read_if_there(path)? else { return Ok(Map::new()) };
    serde_json::from_str(&text).map_err(|error| FileError { path: path.to_owned(), cause: error.to_string() })
}

/// The chat templates of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Templates {
    /// The one of a model that has one alone.
    only: Option<String>,
    /// Those of a model that has several.
    named: IndexMap<String, String>,
    /// That of a model's processor, which is asked first where there are no tools.
    of_processor: Option<String>,
}

impl Templates {
    fn of(folder: &Path, config: &Map<String, Value>) -> Result<Self, FileError> {
        let own = read_if_there(&folder.join("chat_template.jinja"))?;
        let has_processor =
            ["preprocessor_config.json", "processor_config.json"].iter().any(|file| folder.join(file).exists());
        let of_processor = match has_processor && own.is_none() {
            true => settings(&folder.join("chat_template.json"))?
                .get("chat_template")
                .and_then(Value::as_str)
                .map(str::to_owned),
            false => None,
        };
        let mut named = additional(&folder.join("additional_chat_templates"))?;
        if named.is_empty() && own.is_some() {
            return Ok(Self { only: own, named, of_processor });
        }
        // Files stand for all that the configuration says.
        if let Some(own) = own {
            named.insert("default".into(), own);
        }
        if !named.is_empty() {
            return Ok(Self { only: None, named, of_processor });
        }
        Ok(match config.get("chat_template") {
            Some(Value::String(template)) => Self { only: Some(template.clone()), named, of_processor },
            Some(Value::Array(entries)) => {
                let pair = |entry: &Value| {
                    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
                };
                Self { only: None, named: entries.iter().take(TEMPLATES_MAX).filter_map(pair).collect(), of_processor }
            }
            _ => Self { only: None, named, of_processor },
        })
    }

    /// The template for a request. `asked`: the request's own or the server's, a text or the name of one of several.
    /// `None`: the engine has none either, and refuses.
    pub fn choose<'a>(&'a self, asked: Option<&'a str>, with_tools: bool) -> Option<&'a str> {
        if let Some(asked) = asked {
            return Some(self.named.get(asked).map_or(asked, String::as_str));
        }
        if let (false, Some(template)) = (with_tools, &self.of_processor) {
            return Some(template);
        }
        if let Some(only) = &self.only {
            return Some(only);
        }
        let of_tools = self.named.get("tool_use").filter(|_| with_tools);
        of_tools.or_else(|| self.named.get("default")).map(String::as_str)
    }

    /// The one that SGLang takes, whatever the request: its processor's, its own, or the first of several.
    pub fn first(&self) -> Option<&str> {
        self.of_processor.as_ref().or(self.only.as_ref()).or(self.named.values().next()).map(String::as_str)
    }

    /// Whether which of them is the first depends on an order that is not known here.
    pub fn has_no_first(&self) -> bool {
        self.of_processor.is_none() && self.only.is_none() && self.named.len() > 1
    }

    /// All of them with their names, if they have some, for whoever looks through them at the start.
    pub fn all(&self) -> impl Iterator<Item = (Option<&str>, &str)> {
        let nameless = self.only.iter().chain(&self.of_processor).map(|source| (None, source.as_str()));
        nameless.chain(self.named.iter().map(|(name, source)| (Some(name.as_str()), source.as_str())))
    }
}

/// Templates in files of their own, by name.
fn additional(folder: &Path) -> Result<IndexMap<String, String>, FileError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(IndexMap::new()),
        Err(error) => return Err(FileError { path: folder.to_owned(), cause: error.to_string() }),
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    let named =
        paths.iter().take(TEMPLATES_MAX).filter_map(|path| Some((path, path.file_stem()?.to_str()?.to_owned())));
    named.map(|(path, name)| Ok((name, read(path)?))).collect()
}

/// A token that stands beside the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    pub(crate) content: String,
    pub(crate) single_word: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) normalized: bool,
    pub(crate) special: bool,
}

impl Added {
    /// One that is told by its text alone.
    fn special(content: &str) -> Self {
        let content = content.to_owned();
        Self { content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }
    }

    pub(crate) fn of(value: &Value) -> Option<Self> {
        let flag = |name: &str| value.get(name).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        Some(Self {
            content: value.get("content")?.as_str()?.to_owned(),
            single_word: flag("single_word").unwrap_or(false),
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            normalized: flag("normalized").unwrap_or(!special),
            special,
        })
    }

    /// A named special token: a text, or a map.
    fn named(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Some(Self::special(text)),
            Value::Object(_) => Some(Self { special: true, ..Self::of(value)? }),
            _ => None,
        }
    }
}

/// The classes of tokenizers that transformers 5.19 makes, as far as what they do differs. All but the first take vocabulary, merges and
/// post-processor from `tokenizer.json`, and make the rest anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// It is what `tokenizer.json` says.
    AsTheFile,
    Qwen2,
    Qwen35,
    Llama,
    Gemma,
    Gpt2,
    GptNeoX,
    /// They are made anew in a way that is not known here.
    Other(&'static str),
}

/// By the model's type, the class that transformers has for it (`TOKENIZER_MAPPING_NAMES`), where it is none that reads the file: those
/// of models that make texts.
const OF_MODELS: &[(&str, Class)] = &[
    ("aya_vision", Class::Other("CohereTokenizer")),
    ("cohere", Class::Other("CohereTokenizer")),
    ("cohere2", Class::Other("CohereTokenizer")),
    ("codegen", Class::Gpt2),
    ("dbrx", Class::Gpt2),
    ("emu3", Class::Gpt2),
    ("falcon_mamba", Class::GptNeoX),
    ("gemma", Class::Gemma),
    ("gemma2", Class::Gemma),
    ("gemma3", Class::Gemma),
    ("gemma3_text", Class::Gemma),
    ("gemma3n", Class::Gemma),
    ("gemma3n_text", Class::Gemma),
    ("gpt2", Class::Gpt2),
    ("gpt_neo", Class::Gpt2),
    ("gpt_neox", Class::GptNeoX),
    ("gptj", Class::Gpt2),
    ("hunyuan_vl", Class::Qwen2),
    ("hyperclovax_vision_v2", Class::Gpt2),
    ("idefics", Class::Llama),
    ("idefics2", Class::Llama),
    ("internvl", Class::Qwen2),
    ("jais2", Class::Gpt2),
    ("mamba", Class::GptNeoX),
    ("mamba2", Class::GptNeoX),
    ("mpt", Class::GptNeoX),
    ("olmo", Class::GptNeoX),
    ("olmoe", Class::GptNeoX),
    ("opt", Class::Gpt2),
    ("ovis2", Class::Qwen2),
    ("phi", Class::Gpt2),
    ("qwen2", Class::Qwen2),
    ("qwen2_5_omni", Class::Qwen2),
    ("qwen2_5_vl", Class::Qwen2),
    ("qwen2_audio", Class::Qwen2),
    ("qwen2_moe", Class::Qwen2),
    ("qwen2_vl", Class::Qwen2),
    ("qwen3", Class::Qwen2),
    ("qwen3_5", Class::Qwen35),
    ("qwen3_5_moe", Class::Qwen35),
    ("qwen3_5_moe_text", Class::Qwen35),
    ("qwen3_5_text", Class::Qwen35),
    ("qwen3_asr", Class::Qwen2),
    ("qwen3_moe", Class::Qwen2),
    ("qwen3_next", Class::Qwen2),
    ("qwen3_omni_moe", Class::Qwen2),
    ("qwen3_vl", Class::Qwen2),
    ("qwen3_vl_moe", Class::Qwen2),
    ("qwen4_exp", Class::Qwen35),
    ("recurrent_gemma", Class::Gemma),
    ("rwkv", Class::GptNeoX),
    ("shieldgemma2", Class::Gemma),
    ("starcoder2", Class::Gpt2),
    ("t5", Class::Other("T5Tokenizer")),
    ("t5gemma", Class::Gemma),
    ("xlstm", Class::GptNeoX),
    ("zaya", Class::Gemma),
];

/// By its name in a model's files. Those that are not here either read the file, or are told by [`Class::Other`].
const OF_NAMES: &[(&str, Class)] = &[
    ("Qwen2Tokenizer", Class::Qwen2),
    ("Qwen3_5Tokenizer", Class::Qwen35),
    ("LlamaTokenizer", Class::Llama),
    ("GemmaTokenizer", Class::Gemma),
    ("GPT2Tokenizer", Class::Gpt2),
    ("GPTNeoXTokenizer", Class::GptNeoX),
    ("CohereTokenizer", Class::Other("CohereTokenizer")),
    ("T5Tokenizer", Class::Other("T5Tokenizer")),
    ("BertTokenizer", Class::Other("BertTokenizer")),
    ("RobertaTokenizer", Class::Other("RobertaTokenizer")),
    ("XLMRobertaTokenizer", Class::Other("XLMRobertaTokenizer")),
    ("CodeLlamaTokenizer", Class::Other("CodeLlamaTokenizer")),
    ("BloomTokenizer", Class::AsTheFile),
    ("TokenizersBackend", Class::AsTheFile),
    ("PythonBackend", Class::AsTheFile),
    ("PreTrainedTokenizer", Class::AsTheFile),
    ("MistralCommonBackend", Class::AsTheFile),
];

/// Models whose repositories name a class that is not theirs (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`): theirs counts.
const MISNAMED: &[&str] =
    &["hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"];

/// Models of which transformers always reads the file, whatever class their repositories name.
const READ: &[&str] = &[
    "arctic",
    "aria",
    "chameleon",
    "cohere_asr",
    "deepseek_ocr",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "deepseek_vl",
    "deepseek_vl_v2",
    "ernie4_5",
    "ernie4_5_moe",
    "flex_olmo",
    "fuyu",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v",
    "glm4v_moe",
    "gpt_bigcode",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hyperclovax",
    "internlm2",
    "jamba",
    "janus",
    "kimi_k25",
    "kimi_linear",
    "llava",
    "llava_next",
    "mimo_v2_flash",
    "minicpm3",
    "minicpmv",
    "minimax_m2",
    "molmo",
    "molmo2",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "opencua",
    "paddleocr_vl",
    "persimmon",
    "phi3",
    "phi3_v",
    "phimoe",
    "smolvlm",
    "stablelm",
    "step3_vl",
    "step3p5",
    "umt5",
    "vipllava",
];

/// Which class transformers makes of these files; or the name of one that is not known here.
fn class_of(config: &Map<String, Value>, model: &Map<String, Value>) -> Result<Class, String> {
    let text = |from: &Map<String, Value>, key: &str| from.get(key).and_then(Value::as_str).map(str::to_owned);
    let model_type = text(model, "model_type").unwrap_or_default();
    let said = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
    if READ.contains(&model_type.as_str()) && said.is_some() {
        return Ok(Class::AsTheFile);
    }
    let of_model = OF_MODELS.iter().find(|(name, _)| *name == model_type).map(|(_, class)| *class);
    match (said, of_model) {
        (Some(_), Some(class)) if MISNAMED.contains(&model_type.as_str()) => Ok(class),
        (Some(said), _) => {
            let name = said.trim_end_matches("Fast");
            OF_NAMES.iter().find(|(known, _)| *known == name).map(|(_, class)| *class).ok_or_else(|| name.to_owned())
        }
        (None, class) => Ok(class.unwrap_or(Class::AsTheFile)),
    }
}

/// What the classes cut texts at before they look for tokens.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Class {
    /// Special tokens that it has where nobody says otherwise; an empty one is none, whatever `tokenizer.json` says.
    fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Qwen2 | Self::Qwen35 => {
                &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
            }
            Self::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Self::Gemma => &[
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Self::Gpt2 => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", ""),
            ],
            Self::GptNeoX => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", "<|padding|>"),
            ],
            Self::AsTheFile | Self::Other(_) => &[],
        }
    }

    /// Its normalizer, its pre-tokenizer, and what it sets of a BPE model; `None`: they are the file's.
    fn parts(self, config: &Map<String, Value>) -> Option<(Value, Value, Value)> {
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let space = flag("add_prefix_space");
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space.unwrap_or(false), "trim_offsets": true, "use_regex": use_regex});
        let plain = json!({"dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false});
        let with_bytes = |unknown: &Value| {
            json!({"dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false})
        };
        let nfc = json!({"type": "NFC"});
        let split = |pattern: &str| {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
        };
        Some(match self {
            Self::AsTheFile | Self::Other(_) => return None,
            Self::Qwen2 => (nfc, split(QWEN2), plain),
            Self::Qwen35 => (nfc, split(QWEN35), plain),
            Self::Llama => {
                let scheme = match (space.unwrap_or(true), flag("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                let metaspace =
                    json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false});
                (Value::Null, metaspace, with_bytes(&Value::Null))
            }
            Self::Gemma => {
                let unknown = config.get("unk_token").and_then(Added::named).map(|token| Value::from(token.content));
                let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
                let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
                (replace, split, with_bytes(&unknown.unwrap_or_default()))
            }
            Self::Gpt2 => (Value::Null, byte_level(true), plain),
            Self::GptNeoX => (nfc, byte_level(true), plain),
        })
    }

    /// Changes the file's tokenizer as the class does. True where a part of it that reads texts is another one then.
    fn rebuild(self, tokenizer: &mut Map<String, Value>, config: &Map<String, Value>) -> bool {
        let Some((normalizer, pre_tokenizer, of_model)) = self.parts(config) else { return false };
        let is_same = |part: &str, made: &Value| tokenizer.get(part).unwrap_or(&Value::Null) == made;
        let changes = !is_same("normalizer", &normalizer) || !is_same("pre_tokenizer", &pre_tokenizer);
        tokenizer.insert("normalizer".into(), normalizer);
        tokenizer.insert("pre_tokenizer".into(), pre_tokenizer);
        let model = tokenizer.get_mut("model").and_then(Value::as_object_mut);
        if let (Some(model), Value::Object(of_model)) = (model, of_model) {
            model.extend(of_model);
        }
        if self == Self::GptNeoX {
            // It makes this anew as well, and is not told of tokens around a text.
            tokenizer.insert("post_processor".into(), Value::Null);
        }
        changes
    }
}

/// A model's files, read.
#[derive(Debug)]
pub struct Files {
    /// The chat templates.
    pub templates: Templates,
    /// Special tokens that a template sees, by name (`bos_token`). One that is not here is undefined.
    pub special_tokens: IndexMap<String, String>,
    /// The class of its tokenizer, where transformers makes it anew in a way that is not known here: its tokens may be other ones.
    pub built_anew: Option<String>,
    /// SGLang makes its prompts without a template of Jinja's: what of the model's configuration says so.
    pub own_way_of_sglang: Option<String>,
    /// SGLang puts parts of the file's tokenizer back that transformers made anew.
    pub sglang_restores: bool,
    /// Tokens around a text are said in the configuration, which SGLang follows where transformers does not.
    pub says_tokens_around: bool,
    /// The model takes pictures or sound.
    pub has_media: bool,
    /// A prompt that is to be cut loses its beginning, unless the request says otherwise; its end, where this is false.
    pub truncates_left: bool,
    pub(crate) tokenizer: Map<String, Value>,
    pub(crate) added: Vec<Added>,
}

const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Files {
    /// Reads a model's folder, or a `tokenizer.json` and what lies beside it. `template`: a file that stands for the model's own templates.
    pub fn read(path: &Path, template: Option<&Path>) -> Result<Self, FileError> {
        let (file, folder) = match path.is_dir() {
            true => (path.join("tokenizer.json"), path),
            false => (path.to_owned(), path.parent().unwrap_or(Path::new("."))),
        };
        let text = read(&file)?;
        let mut tokenizer: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| FileError { path: file, cause: error.to_string() })?;
        let mut config = settings(&folder.join("tokenizer_config.json"))?;
        let model = settings(&folder.join("config.json"))?;
        let (class, unknown) = match class_of(&config, &model) {
            Ok(class) => (class, None),
            Err(name) => (Class::AsTheFile, Some(name)),
        };
        let has_decoder = config.contains_key("added_tokens_decoder");
        if !has_decoder {
            // Older repositories say it in a file of its own.
            config.extend(settings(&folder.join("special_tokens_map.json"))?);
        }
        for (name, text) in class.defaults() {
            config.entry(*name).or_insert_with(|| if text.is_empty() { Value::Null } else { Value::from(*text) });
        }
        let templates = match template {
            Some(path) => Templates { only: Some(read(path)?), ..Templates::default() },
            None => Templates::of(folder, &config)?,
        };
        if let Some(token) = tokenizer.get("padding").and_then(|padding| padding.get("pad_token")).cloned() {
            config.entry("pad_token").or_insert(token);
        }
        let of_file = added_of(&tokenizer);
        refuse_splitting(&config, folder)?;
        let sglang_restores = class.rebuild(&mut tokenizer, &config);
        let (says_tokens_around, has_media) = (says_tokens_around(&config), has_media(&model));
        let side = |of: Option<&Value>| of.and_then(Value::as_str).map(|side| side.eq_ignore_ascii_case("left"));
        let of_tokenizer = tokenizer.get("truncation").and_then(|truncation| truncation.get("direction"));
        let truncates_left = side(config.get("truncation_side")).or_else(|| side(of_tokenizer)).unwrap_or(false);
        // An engine turns both off for each prompt.
        tokenizer.insert("truncation".into(), Value::Null);
        tokenizer.insert("padding".into(), Value::Null);
        let named = named(&config);
        let special_tokens = named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect();
        let legacy = if has_decoder { Map::new() } else { settings(&folder.join("added_tokens.json"))? };
        let is_rebuilt = !matches!(class, Class::AsTheFile | Class::Other(_));
        let known = if is_rebuilt && !has_decoder { of_file } else { Vec::new() };
        if is_rebuilt {
            // It takes the vocabulary alone: the tokens beside it are added again, if at all.
            tokenizer.insert("added_tokens".into(), Value::Array(Vec::new()));
        }
        let mut added = added(&tokenizer, &config, &named, (&legacy, known));
        if class == Class::Qwen2 {
            // In the end, those that are special once more, by their texts alone.
            let all = named.values().cloned().chain(listed(&config));
            added.extend(all.map(|token| Added::special(&token.content)));
        }
        let built_anew = match class {
            Class::Other(name) => Some(name.to_owned()),
            _ => unknown,
        };
        let own_way_of_sglang = own_way_of_sglang(&model, templates.all().next().is_some());
        Ok(Self {
            templates,
            special_tokens,
            built_anew,
            own_way_of_sglang,
            sglang_restores,
            says_tokens_around,
            has_media,
            truncates_left,
            tokenizer,
            added,
        })
    }
}

/// Special tokens in texts are not split here.
fn refuse_splitting(config: &Map<String, Value>, folder: &Path) -> Result<(), FileError> {
    if config.get("split_special_tokens") != Some(&Value::Bool(true)) {
        return Ok(());
    }
    let cause = "split_special_tokens is on, and special tokens in texts are not split here".into();
    Err(FileError { path: folder.join("tokenizer_config.json"), cause })
}

fn says_tokens_around(config: &Map<String, Value>) -> bool {
    ["add_bos_token", "add_eos_token"].iter().any(|key| config.get(*key) == Some(&Value::Bool(true)))
}

fn has_media(model: &Map<String, Value>) -> bool {
    ["vision_config", "audio_config", "image_token_id"].iter().any(|key| model.contains_key(*key))
}

/// Types of models whose prompts SGLang makes with templates of its own, and architectures for which it has programs (0.5.23).
fn own_way_of_sglang(model: &Map<String, Value>, has_template: bool) -> Option<String> {
    const TYPES: [&str; 12] = [
        "internvl_chat",
        "deepseek_vl_v2",
        "multi_modality",
        "phi4mm",
        "minicpmv",
        "minicpmo",
        "moss_vl",
        "deepseek-ocr",
        "unlimited-ocr",
        "paddleocr_vl",
        "whisper",
        "minimax_m3_vl",
    ];
    const ARCHITECTURES: [&str; 5] = [
        "DeepseekV4",
        "KimiK3",
        "InklingForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "Glm5NextForConditionalGeneration",
    ];
    let kind = model.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let architecture =
        model.get("architectures").and_then(|all| all.get(0)).and_then(Value::as_str).unwrap_or_default();
    if TYPES.contains(&kind) {
        return Some(kind.to_owned());
    }
    let is_own = ARCHITECTURES.iter().any(|own| architecture.contains(own))
        || (!has_template && architecture.contains("DeepseekV3"));
    is_own.then(|| architecture.to_owned())
}

/// The special tokens that have names.
fn named(config: &Map<String, Value>) -> IndexMap<String, Added> {
    let standard = STANDARD.iter().filter_map(|name| Some(((*name).to_owned(), Added::named(config.get(*name)?)?)));
    let of_the_model = config.iter().filter(|(name, value)| {
        name.ends_with("_token") && !STANDARD.contains(&name.as_str()) && (value.is_string() || value.is_object())
    });
    let of_the_model = of_the_model.filter_map(|(name, value)| Some((name.clone(), Added::named(value)?)));
    let more = config.get("extra_special_tokens").and_then(Value::as_object);
    let more = more.into_iter().flatten().filter_map(|(name, value)| Some((name.clone(), Added::named(value)?)));
    standard.chain(of_the_model).chain(more).collect()
}

/// The tokens beside the vocabulary in `tokenizer.json`, with their numbers.
fn added_of(tokenizer: &Map<String, Value>) -> Vec<(u64, Added)> {
    let all = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(|token| Some((token.get("id")?.as_u64()?, Added::of(token)?))).collect()
}

/// Special tokens that have no names.
fn listed(config: &Map<String, Value>) -> impl Iterator<Item = Added> {
    let mut listed = ["extra_special_tokens", "additional_special_tokens"].iter();
    let listed = listed.find_map(|key| config.get(*key)?.as_array().filter(|list| !list.is_empty()));
    listed.into_iter().flatten().filter_map(Added::named)
}

/// Tokens that `tokenizer.json` does not have, or has otherwise, in the order in which they are added. `older`: what repositories say that
/// have no `added_tokens_decoder`, in `added_tokens.json` and, for tokenizers that are made anew, in `tokenizer.json`.
fn added(
    tokenizer: &Map<String, Value>,
    config: &Map<String, Value>,
    named: &IndexMap<String, Added>,
    (legacy, known): (&Map<String, Value>, Vec<(u64, Added)>),
) -> Vec<Added> {
    let there: Vec<Added> = added_of(tokenizer).into_iter().map(|(_, token)| token).collect();
    let mut decoder: Vec<(u64, Added)> = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, Added::of(token)?)))
        .collect();
    let is_special = |text: &str| named.values().any(|token| token.content == text);
    decoder.extend(legacy.iter().filter_map(|(text, id)| {
        let special = is_special(text);
        Some((id.as_u64()?, Added { special, normalized: !special, ..Added::special(text) }))
    }));
    decoder.extend(known);
    decoder.sort_by_key(|(id, _)| *id);
    let mut more: Vec<Added> =
        decoder.into_iter().map(|(_, token)| token).filter(|token| !there.contains(token)).collect();
    for token in named.values().cloned().chain(listed(config)) {
        let is_there = there.iter().chain(&more).any(|known| known.content == token.content);
        if !is_there {
            more.push(token);
        }
    }
    for token in &mut more {
        token.special |= is_special(&token.content);
    }
    more
}
