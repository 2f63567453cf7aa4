//! Requests, and what a template sees of them in vLLM: `fixtures/vllm_conversations.py` has made it with the engine's own classes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use kvstore_chat::json::{Dumps, dumps, parse};
use kvstore_chat::value::{Dict, Value};
use kvstore_chat::vllm::{Conversation, Form, NotKnown, conversation};

fn text_of(value: &Value) -> String {
    dumps(value, &Dumps::default()).unwrap()
}

fn option<'a>(case: &'a Value, name: &str) -> &'a Value {
    case.get("options").unwrap().get(name).unwrap()
}

/// The template of the fixture that prints texts.
fn texts(messages: &[Value], trim: bool) -> String {
    let mut out = String::new();
    let mut push = |text: &str| out.push_str(if trim { text.trim() } else { text });
    for message in messages {
        match message.get("content").unwrap() {
            Value::List(parts) => {
                parts.iter().for_each(|part| push(part.get("text").and_then(Value::as_str).unwrap_or_default()));
            }
            text => push(text.as_str().unwrap()),
        }
        push("|");
    }
    out
}

fn made(case: &Value) -> Result<Conversation, NotKnown> {
    let parts = option(case, "content").as_str() == Some("openai");
    let form = Form { parts, developers: option(case, "developer").truthy() };
    conversation(case.get("request").unwrap().as_dict().unwrap(), form)
}

/// How a case differs; `None` where it does not.
fn differs(case: &Value) -> Option<String> {
    let expect = case.get("expect").unwrap();
    let made = match (made(case), expect.as_dict()) {
        (Err(_), None) | (Err(NotKnown::Unsupported(_) | NotKnown::Argument(_)), _) => return None,
        (Err(why), Some(_)) => return Some(why.to_string()),
        (Ok(_), None) => return Some("the engine refuses it".into()),
        (Ok(made), Some(_)) => made,
    };
    if let Some(want) = expect.get("texts") {
        for (want, trim) in [(want, false), (expect.get("trimmed").unwrap(), true)] {
            let got = made.prompt(texts(&made.messages, trim)).ok();
            if got.as_deref() != want.as_str() {
                return Some(format!("text {got:?}"));
            }
        }
        return None;
    }
    let (got, want) = (text_of(&Value::list(made.messages)), text_of(expect.get("messages").unwrap()));
    if got != want {
        return Some(format!("messages {got}"));
    }
    let (got, want) = (text_of(&made.tools.unwrap_or(Value::None)), text_of(expect.get("tools").unwrap()));
    if got != want {
        return Some(format!("tools {got}"));
    }
    let names = ["add_generation_prompt", "documents", "reasoning_effort", "enable_thinking", "thinking", "foo"];
    let got: Dict = names.iter().filter_map(|name| Some((*name, made.more.get(name)?.clone()))).collect();
    let got = Value::from(got);
    (got != *expect.get("kwargs").unwrap()).then(|| format!("arguments {}", text_of(&got)))
}

#[test]
fn conversations_are_those_of_the_engine() {
    // Two options of the server are not known here.
    let is_asked = |case: &Value| !option(case, "exclude").truthy() && !option(case, "defaults").truthy();
    let lines = include_str!("fixtures/vllm_conversations.jsonl").lines();
    let cases: Vec<Value> = lines.map(|line| parse(line.as_bytes()).unwrap()).filter(is_asked).collect();
    let wrong: Vec<String> =
        cases.iter().filter_map(|case| differs(case).map(|how| format!("{how}\n  {}", text_of(case)))).collect();
    let valid: Vec<&Value> = cases.iter().filter(|case| case.get("expect").unwrap().as_dict().is_some()).collect();
    let known = valid.iter().filter(|case| made(case).is_ok()).count();
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    // Others have numbers in arguments that only Python reads: the fixture has many.
    assert!(known * 100 >= valid.len() * 98, "{known} of {} are known", valid.len());
}
