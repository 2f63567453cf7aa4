//! What SGLang (0.5.23) makes of a conversation before its template sees it. From the sources of its `entrypoints/openai/serving_chat.py`,
//! `entrypoints/openai/protocol.py` and `parser/jinja_template_utils.py`. What its server's own options change (parsers of calls and
//! thoughts, templates that it has by model) is not seen here: its `/tokenize` is asked.

mod effort;
mod message;
mod tools;

use crate::engine::{ARGUMENTS, NotKnown, TWICE, flag, given, refused, unsupported};
use crate::jinja::Facts;
use crate::value::{Dict, Int, Value};

/// What a template's source says of how messages and efforts are to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Form {
    /// The template walks through the parts of a message's content; otherwise it gets one text.
    pub parts: bool,
    /// It reads efforts as Hunyuan's do.
    pub hunyuan: bool,
    /// It has an argument of its own for a low effort.
    pub low_effort: bool,
}

impl Form {
    /// What the engine finds out about a template.
    pub fn of(facts: &Facts) -> Self {
        facts.sglang
    }

    /// The same, of its source; `walks`: a loop goes through the content of `message`, `msg` or `m`.
    pub(crate) fn of_source(source: &str, walks: bool) -> Self {
        let has = |words: &[&str]| words.iter().all(|word| source.contains(word));
        let shows = ["image", "audio", "video", "vision"].iter().any(|word| source.contains(word));
        Self {
            parts: shows || walks,
            hunyuan: has(&["reasoning_effort", "reasoning_mode_token", "no_think"]),
            low_effort: has(&["low_effort", "truncate_history_thinking"]),
        }
    }
}

/// What a template gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The messages.
    pub messages: Vec<Value>,
    /// The tools; `None` where there are none.
    pub tools: Option<Value>,
    /// The same without what is around each, for a template that fails with the others.
    pub flat_tools: Option<Value>,
    /// Everything else, by its name.
    pub more: Dict,
}

/// What a template gets of a request. `own`: the server's own arguments for templates, where the request has none of the same name.
pub fn conversation(request: &Dict, form: Form, own: &Dict) -> Result<Conversation, NotKnown> {
    if given(request, "input_ids").is_some() {
        return unsupported("a prompt in input_ids");
    }
    let goes_on = flag(request, "continue_final_message", false)?;
    let Some(Value::List(all)) = request.get("messages") else { return refused("messages is not a list") };
    let read = all.iter().map(|one| message::read(one, form.parts)).collect::<Result<Vec<Value>, NotKnown>>()?;
    let messages = ended(read, goes_on)?;
    let tools = tools::read(request)?;
    let more = effort::arguments(request, form, own)?;
    // Arguments of the function that renders: it fails where one comes twice.
    if let Some((name, _)) = more.fields().find(|(name, _)| ARGUMENTS.contains(&&***name) || TWICE.contains(&&***name))
    {
        return Err(NotKnown::Argument(name.to_string()));
    }
    for (_, value) in more.fields() {
        plain(value)?;
    }
    let mut more = more;
    more.insert("add_generation_prompt", true);
    let flat_tools = tools.as_ref().and_then(tools::flat);
    Ok(Conversation { messages, tools, flat_tools, more })
}

/// The last message is a user's, whoever wrote it, unless it is to be gone on with.
fn ended(mut messages: Vec<Value>, goes_on: bool) -> Result<Vec<Value>, NotKnown> {
    let Some(last) = messages.last_mut() else { return refused("there are no messages") };
    let content = last.get("content").filter(|content| content.as_str().is_some()).cloned();
    if let (Some("assistant"), Some(content)) = (last.get("role").and_then(Value::as_str), content) {
        if goes_on {
            return unsupported("a last message to go on with, whose tokens SGLang makes apart,");
        }
        *last = Dict::from_iter([("role", Value::from("user")), ("content", content)]).into();
    }
    Ok(messages)
}

/// Numbers that this engine's own reader of JSON has otherwise than Python's, or refuses.
fn plain(value: &Value) -> Result<(), NotKnown> {
    match value {
        Value::Int(Int::Big(_)) => unsupported("a number of more than 64 bits"),
        Value::Float(float) if !float.is_finite() => refused("a number that is none in JSON"),
        Value::List(items) => items.iter().try_for_each(plain),
        Value::Dict(dict) => dict.fields().try_for_each(|(_, value)| plain(value)),
        _ => Ok(()),
    }
}

fn text_or_none(dict: &Dict, name: &str) -> Result<Value, NotKnown> {
    match dict.get(name) {
        None | Some(Value::None) => Ok(Value::None),
        Some(text @ Value::Str(_)) => Ok(text.clone()),
        Some(_) => refused(format!("{name} is no text")),
    }
}

fn flag_or_none(dict: &Dict, name: &str) -> Result<Value, NotKnown> {
    match dict.get(name) {
        None | Some(Value::None) => Ok(Value::None),
        Some(flag @ Value::Bool(_)) => Ok(flag.clone()),
        Some(_) => unsupported(format!("a {name} that is neither true nor false")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Conversation, Form, NotKnown, conversation};
    use crate::json::{Dumps, dumps, parse};
    use crate::value;

    const TEXTS: Form = Form { parts: false, hunyuan: false, low_effort: false };
    const PARTS: Form = Form { parts: true, ..TEXTS };

    fn read(request: &Value, form: Form) -> Result<Conversation, NotKnown> {
        conversation(parse(request.to_string().as_bytes()).unwrap().as_dict().unwrap(), form, &value::Dict::new())
    }

    fn text_of(value: impl Into<value::Value>) -> String {
        dumps(&value.into(), &Dumps::default()).unwrap()
    }

    fn messages(all: Value, form: Form) -> String {
        text_of(value::Value::list(read(&json!({"messages": all}), form).unwrap().messages))
    }

    fn json_text(value: Value) -> String {
        text_of(parse(value.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn messages_have_the_fields_of_their_classes_and_no_nulls() {
        let call = json!({"id": "c", "type": "function", "x": 1, "function": {"arguments": "{\"z\": 1, \"a\": 2}", "name": "f"}});
        let sent = json!([
            {"content": "a", "name": "n", "role": "user"},
            {"tool_calls": [call], "reasoning": "lost", "reasoning_content": "kept", "role": "Assistant"},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]);
        let due = json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "reasoning_content": "kept", "tool_calls": [
                {"id": "c", "index": null, "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}]},
            {"role": "tool", "content": "a b", "tool_call_id": "c"},
        ]);
        assert_eq!(messages(sent.clone(), TEXTS), json_text(due.clone()));
        // Where contents come in parts, they come last.
        let last = json!({"role": "tool", "tool_call_id": "c", "content": "a b"});
        let mut due = due;
        due[2] = last;
        assert_eq!(messages(sent, PARTS), json_text(due));
        for wrong in
            [json!({"role": "USER", "content": "a"}), json!({"role": "user"}), json!({"role": "bot", "content": "a"})]
        {
            assert!(matches!(read(&json!({"messages": [wrong]}), TEXTS), Err(NotKnown::Refused(_))));
        }
        let picture = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
        assert_eq!(read(&json!({"messages": [picture]}), TEXTS), Err(NotKnown::Media("image_url".into())));
    }

    #[test]
    fn a_last_answer_becomes_a_question() {
        let sent =
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "t"}]);
        let due = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
        assert_eq!(messages(sent.clone(), TEXTS), json_text(due));
        let goes_on = json!({"messages": sent, "continue_final_message": true});
        assert!(matches!(read(&goes_on, TEXTS), Err(NotKnown::Unsupported(_))));
    }

    #[test]
    fn tools_keep_the_order_of_the_client_and_lack_nothing() {
        let tools = |tools: Value, choice: Value| {
            let request =
                json!({"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": choice});
            read(&request, TEXTS).map(|made| made.tools.map(text_of))
        };
        let sent = json!([{"function": {"parameters": {"type": "object"}, "name": "f", "title": "x"}, "type": "function"}, {"function": {"name": "g", "strict": true}}]);
        let due = json!([
            {"type": "function", "function": {"parameters": {"type": "object"}, "name": "f", "description": null}, "defer_loading": null},
            {"type": "function", "function": {"name": "g", "strict": true, "description": null, "parameters": null}, "defer_loading": null},
        ]);
        assert_eq!(tools(sent.clone(), Value::Null).unwrap(), Some(json_text(due.clone())));
        assert_eq!(tools(sent.clone(), json!("none")).unwrap(), None);
        let named = json!({"type": "function", "function": {"name": "g"}});
        assert_eq!(tools(sent.clone(), named).unwrap(), Some(json_text(json!([due[1]]))));
        assert!(matches!(tools(sent, json!({"function": {"name": "h"}})), Err(NotKnown::Refused(_))));
        assert_eq!(tools(json!([]), Value::Null).unwrap(), None);
        let odd = json!([{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "varchar"}}}}}]);
        assert!(matches!(tools(odd, Value::Null), Err(NotKnown::Unsupported(_))), "it writes another type");
    }

    #[test]
    fn arguments_of_the_template_follow_the_effort() {
        let more = |mut request: Value, form: Form| {
            request["messages"] = json!([{"role": "user", "content": "x"}]);
            read(&request, form).map(|made| text_of(made.more))
        };
        let due = |due: Value| Ok(json_text(due));
        assert_eq!(more(json!({}), TEXTS), due(json!({"add_generation_prompt": true})));
        assert_eq!(
            more(json!({"reasoning_effort": "none", "chat_template_kwargs": {"thinking": true, "a": null}}), TEXTS),
            due(
                json!({"reasoning_effort": "none", "thinking": true, "a": null, "enable_thinking": false, "add_generation_prompt": true})
            )
        );
        assert_eq!(
            more(json!({"reasoning": {"effort": 0.5, "enabled": "off"}}), TEXTS),
            due(
                json!({"reasoning_effort": 0.5, "thinking": true, "enable_thinking": true, "add_generation_prompt": true})
            )
        );
        let hunyuan = Form { hunyuan: true, ..TEXTS };
        assert!(matches!(more(json!({}), hunyuan), Err(NotKnown::Unsupported(_))));
        // The route for chats takes it out of the arguments.
        let twice =
            |effort: Value| json!({"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": effort}});
        let high = json!({"reasoning_effort": "high", "thinking": true, "enable_thinking": true, "add_generation_prompt": true});
        assert_eq!(more(twice(Value::Null), TEXTS), due(high));
        let none = json!({"chat_template_kwargs": {"reasoning_effort": null}});
        assert_eq!(more(none, TEXTS), due(json!({"add_generation_prompt": true})));
        let low = json!({"reasoning_effort": "low", "thinking": true, "enable_thinking": true, "add_generation_prompt": true});
        assert_eq!(more(twice(json!("low")), TEXTS), due(low));
        let spaced = json!({"reasoning": {"enabled": "\u{1c}yes"}});
        assert_eq!(
            more(spaced, TEXTS),
            due(json!({"thinking": true, "enable_thinking": true, "add_generation_prompt": true}))
        );
        let low = Form { low_effort: true, ..TEXTS };
        assert!(matches!(more(json!({"reasoning_effort": "low"}), low), Err(NotKnown::Unsupported(_))));
        let within = json!({"chat_template_kwargs": {"reasoning_effort": "low"}});
        assert!(matches!(more(within, low), Err(NotKnown::Unsupported(_))));
        for wrong in
            [json!({"reasoning_effort": true}), json!({"reasoning_effort": 2}), json!({"chat_template_kwargs": []})]
        {
            assert!(matches!(more(wrong, TEXTS), Err(NotKnown::Refused(_))));
        }
        assert_eq!(
            more(json!({"chat_template_kwargs": {"tools": []}}), TEXTS),
            Err(NotKnown::Argument("tools".into()))
        );
    }
}
