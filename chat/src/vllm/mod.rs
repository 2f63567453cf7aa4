//! What vLLM (0.32) makes of a conversation before its template sees it. From the sources of its `entrypoints/chat_utils.py` and of the
//! protocol classes of `entrypoints/openai/chat_completion`. Tested against the engine itself in `tests/vllm_conversations.rs`.

mod calls;
mod message;
mod parts;
mod system;
mod tools;

use std::sync::Arc;

pub use crate::engine::NotKnown;
use crate::engine::{ARGUMENTS, flag, given, object, refused, unsupported};
use crate::jinja::{ContentForm, Facts};
use crate::value::{Dict, Int, Value};

/// What a template's source says of how messages are to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Form {
    /// The template walks through the parts of a message's content; otherwise it gets one text.
    pub parts: bool,
    /// It knows of developers.
    pub developers: bool,
}

impl Form {
    /// What the engine finds out about a template.
    pub fn of(facts: &Facts) -> Self {
        Self { parts: facts.content == ContentForm::OpenAi, developers: facts.knows_developer }
    }
}

/// What a template gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The messages.
    pub messages: Vec<Value>,
    /// The tools; `None` where there are none.
    pub tools: Option<Value>,
    /// Everything else, by its name.
    pub more: Dict,
    /// The last message goes on: what it ends with.
    goes_on: Option<String>,
}

/// Stands where a message that is gone on with ends: the prompt is cut there.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// What `reasoning_effort` may be.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
/// Characters of a salt, at most.
const SALT_CHARS_MAX: usize = 1024;

/// A map as a class writes it: its own keys first, in its order, and then the others.
fn class(dict: &Dict, keys: &[&str]) -> Dict {
    let own = keys.iter().filter_map(|key| Some((*key, dict.get(key)?.clone())));
    let mut out: Dict = own.collect();
    for (key, value) in dict.fields().filter(|(key, _)| !keys.contains(&&***key)) {
        out.insert(Arc::clone(key), value.clone());
    }
    out
}

/// What a template gets of a request.
pub fn conversation(request: &Dict, form: Form) -> Result<Conversation, NotKnown> {
    let (generates, goes_on) =
        (flag(request, "add_generation_prompt", true)?, flag(request, "continue_final_message", false)?);
    if generates && goes_on {
        return refused("continue_final_message needs add_generation_prompt to be false");
    }
    check_others(request)?;
    let Some(Value::List(all)) = request.get("messages") else { return refused("messages is not a list") };
    let mut messages = all.iter().map(|one| message::read(one, form)).collect::<Result<Vec<Value>, NotKnown>>()?;
    if messages.is_empty() {
        return refused("there are no messages");
    }
    if !form.developers {
        messages = system::without_developer(messages)?;
    }
    let end = if goes_on { Some(mark_end(&mut messages)?) } else { None };
    let mut more = more(request)?;
    more.insert("add_generation_prompt", generates);
    let tools = tools::read(request)?;
    // A template's own arguments stand for the request's tools.
    let tools = more.remove("tools").or(tools);
    Ok(Conversation { messages, tools, more, goes_on: end })
}

/// Fields that no template sees: what the engine refuses, or takes instead of messages.
fn check_others(request: &Dict) -> Result<(), NotKnown> {
    if let Some(salt) = given(request, "cache_salt") {
        let chars = salt.as_str().map(|salt| salt.chars().count());
        if !chars.is_some_and(|chars| (1..=SALT_CHARS_MAX).contains(&chars)) {
            return refused("cache_salt is no text, or of no length for one");
        }
    }
    if given(request, "truncation_side").is_some_and(|side| !matches!(side.as_str(), Some("left" | "right"))) {
        return refused("truncation_side is neither left nor right");
    }
    if given(request, "truncate_prompt_tokens")
        .is_some_and(|most| matches!(most, Value::Int(most) if *most < Int::Small(-1)))
    {
        return refused("truncate_prompt_tokens is below -1");
    }
    flag(request, "add_special_tokens", false)?;
    let ids = given(request, "kv_transfer_params").and_then(|params| params.get("prompt_token_ids"));
    if ids.is_some_and(|ids| !ids.is_none()) { unsupported("a prompt in kv_transfer_params") } else { Ok(()) }
}

impl Conversation {
    /// Whether the last message is to be gone on with.
    pub fn goes_on(&self) -> bool {
        self.goes_on.is_some()
    }

    /// The prompt, of what the template wrote.
    pub fn prompt(&self, mut text: String) -> Result<String, NotKnown> {
        let Some(end) = &self.goes_on else { return Ok(text) };
        let Some(at) = text.rfind(TAG.trim_end()).filter(|_| text.contains(end.trim())) else {
            return refused("the template does not write the last message as it is, so it cannot be gone on with");
        };
        let is_whole = text.get(at..).is_some_and(|rest| rest.starts_with(TAG));
        text.truncate(at);
        if !is_whole {
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }
}

/// Marks where the last message ends; what it ended with.
fn mark_end(messages: &mut [Value]) -> Result<String, NotKnown> {
    let content = messages.last_mut().and_then(|last| last.get_mut("content"));
    let text = match content {
        Some(Value::List(parts)) => Arc::make_mut(parts).iter_mut().rev().find_map(|part| {
            part.get("text")?.as_str()?;
            part.get_mut("text")
        }),
        other => other,
    };
    let Some(Value::Str(text)) = text else { return refused("the last message has no text to be gone on with") };
    let end = text.to_string();
    *text = format!("{end}{TAG}").into();
    Ok(end)
}

/// The request's fields for the template, and its `chat_template_kwargs`: fields count more. What is null or "auto" is not said.
fn more(request: &Dict) -> Result<Dict, NotKnown> {
    let is_said = |value: &Value| !value.is_none() && value.as_str() != Some("auto");
    let mut more = Dict::new();
    if let Some(given) = given(request, "chat_template_kwargs") {
        let Value::Dict(given) = given else { return refused("chat_template_kwargs is no object") };
        if let Some((name, _)) = given.fields().find(|(name, _)| ARGUMENTS.contains(&&***name)) {
            return Err(NotKnown::Argument(name.to_string()));
        }
        more.extend(given.fields().filter(|(_, value)| is_said(value)));
    }
    // It is never the template's to know.
    more.remove("continue_final_message");
    if let Some(effort) = given(request, "reasoning_effort") {
        let Some(word) = effort.as_str().filter(|word| EFFORTS.contains(word)) else {
            return refused("reasoning_effort is none of those there are");
        };
        let says = request.get("chat_template_kwargs").and_then(|given| given.get("enable_thinking")).is_some();
        if !says {
            more.insert("enable_thinking", word != "none");
        }
        more.insert("reasoning_effort", effort.clone());
    }
    if let Some(documents) = given(request, "documents") {
        let of_texts =
            |one: &Value| one.as_dict().is_some_and(|one| one.fields().all(|(_, value)| value.as_str().is_some()));
        if !documents.as_list().is_some_and(|all| all.iter().all(of_texts)) {
            return refused("documents are no objects of texts");
        }
        more.insert("documents", documents.clone());
    }
    Ok(more)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Conversation, Form, NotKnown, conversation};
    use crate::json::{Dumps, dumps, parse};
    use crate::value;

    const PLAIN: Form = Form { parts: false, developers: false };

    fn read(request: Value, form: Form) -> Result<Conversation, NotKnown> {
        conversation(parse(request.to_string().as_bytes()).unwrap().as_dict().unwrap(), form)
    }

    /// As JSON, where keys have an order.
    fn json_of(value: impl Into<value::Value>) -> Value {
        serde_json::from_str(&dumps(&value.into(), &Dumps::default()).unwrap()).unwrap()
    }

    fn messages(all: Value, form: Form) -> Value {
        json_of(value::Value::list(read(json!({"messages": all}), form).unwrap().messages))
    }

    #[test]
    fn calls_and_tools_come_as_the_engines_classes_write_them() {
        let sent = json!([
            {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "index": 0, "id": "c", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "x", "tool_calls": []},
        ]);
        let due = json!([
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"arguments": {"z": 1, "a": 2}, "name": "f"}, "type": "function", "index": 0}]},
            {"role": "tool", "content": "a\nb", "tool_call_id": "c"},
            {"role": "assistant", "content": "x"},
        ]);
        // Their order, too.
        assert_eq!(messages(sent, PLAIN).to_string(), due.to_string());
        let tools = json!([{"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "title": "x", "strict": true}, "type": "function"}, {"function": {"name": "g"}}]);
        let made = read(json!({"messages": [{"role": "user", "content": "x"}], "tools": tools}), PLAIN).unwrap();
        let due = json!([
            {"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": 2}, "strict": true}},
            {"type": "function", "function": {"name": "g", "description": null, "parameters": null}},
        ]);
        assert_eq!(json_of(made.tools.unwrap()).to_string(), due.to_string());
        let of_call = |arguments: &str| {
            let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}});
            let made = read(json!({"messages": [{"role": "assistant", "tool_calls": [call]}]}), PLAIN)?;
            let function = made.messages[0].get("tool_calls").unwrap().as_list().unwrap()[0].get("function").cloned();
            Ok(dumps(function.unwrap().get("arguments").unwrap(), &Dumps::default()).unwrap())
        };
        for (arguments, due) in [
            ("", "{}"),
            ("[1]", "{}"),
            ("{", "{}"),
            ("{\"a\":NaN}", "{\"a\": NaN}"),
            ("{\"a\":12345678901234567890123}", "{\"a\": 12345678901234567890123}"),
            ("{\"a\":-0}", "{\"a\": 0}"),
        ] {
            assert_eq!(of_call(arguments).unwrap(), due, "{arguments}");
        }
        assert!(matches!(of_call("{\"a\": \"\\ud800\"}"), Err(NotKnown::Unsupported(_))), "half of a character");
    }

    #[test]
    fn content_is_one_text_or_parts_as_the_template_walks_through_it() {
        let sent = json!([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}, {"type": "refusal", "refusal": "b"}]}, {"role": "user", "content": "c"}]);
        let parts = Form { parts: true, ..PLAIN };
        assert_eq!(messages(sent.clone(), PLAIN)[0]["content"], "a\nb");
        let text = |text: &str| json!({"type": "text", "text": text});
        assert_eq!(
            messages(sent.clone(), parts)[0]["content"],
            json!([{"type": "text", "text": "a", "x": 1}, text("b")])
        );
        assert_eq!(messages(sent, parts)[1]["content"], json!([text("c")]));
        let picture =
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
        assert_eq!(read(picture, PLAIN), Err(NotKnown::Media("image_url".into())));
    }

    #[test]
    fn thoughts_are_there_under_both_names_where_the_engine_keeps_them() {
        let thought = |message: Value| messages(json!([message]), PLAIN)[0].get("reasoning_content").cloned();
        for name in ["reasoning", "reasoning_content"] {
            assert_eq!(thought(json!({"role": "assistant", "content": "4", name: "t"})), Some(json!("t")));
        }
        // Whatever class a message becomes: keys that it does not know stay.
        assert_eq!(thought(json!({"role": "assistant", "content": null, "reasoning": "t"})), Some(json!("t")));
        assert_eq!(
            thought(json!({"role": "assistant", "content": "4", "refusal": null, "reasoning": "t"})),
            Some(json!("t"))
        );
        assert_eq!(thought(json!({"role": "user", "content": "4", "reasoning": "t"})), None);
    }

    #[test]
    fn developers_are_the_system_for_templates_that_know_none() {
        let developer = json!({"role": "developer", "content": "b"});
        let sent = json!([{"role": "system", "content": "a"}, {"role": "user", "content": "x"}, developer]);
        assert_eq!(
            messages(sent.clone(), PLAIN),
            json!([{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "x"}])
        );
        let kept = messages(sent, Form { developers: true, ..PLAIN });
        assert_eq!(kept[2], json!({"role": "developer", "content": "b", "tools": null}));
        assert_eq!(messages(json!([developer]), PLAIN), json!([{"role": "system", "content": "b"}]));
        // The engine fails to join such texts. A prompt was made without them.
        let empty = json!([{"role": "developer", "content": [{"type": "thinking", "thinking": null}]}]);
        let parts = Form { parts: true, ..PLAIN };
        assert!(matches!(read(json!({"messages": empty}), parts), Err(NotKnown::Refused(_))));
    }

    #[test]
    fn a_line_that_changes_with_each_request_is_taken_away() {
        let line = "x-anthropic-billing-header: a=1;";
        let system =
            |content: Value| messages(json!([{"role": "system", "content": content}]), PLAIN)[0]["content"].clone();
        assert_eq!(system(json!(format!("{line}\nrest"))), "rest");
        assert_eq!(system(json!([{"type": "text", "text": line}, {"type": "text", "text": "rest"}])), "rest");
        assert_eq!(system(json!(format!("rest\n{line}"))), format!("rest\n{line}"));
    }

    #[test]
    fn arguments_of_the_template_are_those_that_the_engine_gives_it() {
        let more = |request: Value| {
            let mut request = request;
            request["messages"] = json!([{"role": "user", "content": "x"}]);
            read(request, PLAIN).map(|made| json_of(made.more))
        };
        assert_eq!(
            more(json!({"reasoning_effort": "low"})).unwrap(),
            json!({"enable_thinking": true, "reasoning_effort": "low", "add_generation_prompt": true})
        );
        let said = json!({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": false, "reasoning_effort": "high", "a": null, "b": "auto", "c": 1}});
        assert_eq!(
            more(said).unwrap(),
            json!({"enable_thinking": false, "reasoning_effort": "low", "c": 1, "add_generation_prompt": true})
        );
        assert_eq!(
            more(json!({"chat_template_kwargs": {"add_generation_prompt": false}})).unwrap(),
            json!({"add_generation_prompt": true})
        );
        assert_eq!(
            more(json!({"chat_template_kwargs": {"tokenize": true}})),
            Err(NotKnown::Argument("tokenize".into()))
        );
        for wrong in
            [json!({"add_generation_prompt": 1}), json!({"continue_final_message": true}), json!({"tools": []})]
        {
            assert!(matches!(more(wrong), Err(NotKnown::Refused(_))));
        }
    }

    #[test]
    fn a_message_that_goes_on_ends_the_prompt() {
        let request = |content: Value| json!({"messages": [{"role": "assistant", "content": content}], "add_generation_prompt": false, "continue_final_message": true});
        let made = read(request(json!("It is ")), PLAIN).unwrap();
        let marked = made.messages[0].get("content").and_then(value::Value::as_str).unwrap();
        assert_eq!(made.prompt(format!("<a>{marked}</a>")).unwrap(), "<a>It is ");
        assert_eq!(made.prompt(format!("<a>{}</a>", marked.trim())).unwrap(), "<a>It is", "a template that trims");
        assert!(matches!(made.prompt("<a></a>".into()), Err(NotKnown::Refused(_))));
        assert!(matches!(read(request(json!([])), Form { parts: true, ..PLAIN }), Err(NotKnown::Refused(_))));
    }
}
