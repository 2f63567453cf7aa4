//! Model folders of many kinds: their special tokens, templates and tokens are those that transformers has.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use std::path::Path;

use kvstore_chat::files::Files;
use kvstore_chat::tokenize::Tokenizer;
use serde_json::Value;

fn put(folder: &Path, name: &str, value: &Value) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    std::fs::write(path, text).unwrap();
}

/// What is wrong with what is made of a folder; nothing, where it is what transformers makes of it.
fn differs(head: &Value, case: &Value) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let name = case["tokenizer"].as_str().unwrap();
    put(folder.path(), "tokenizer.json", &head["tokenizers"][name]);
    for (name, value) in case["files"].as_object().unwrap() {
        put(folder.path(), name, value);
    }
    let files = Files::read(folder.path(), None).unwrap();
    let expected = &case["expected"];
    let special: Value =
        files.special_tokens.iter().map(|(name, text)| (name.clone(), Value::from(text.clone()))).collect();
    if special != expected["special_tokens"] {
        return Some(format!("special tokens {special} instead of {}", expected["special_tokens"]));
    }
    for (with_tools, expected) in [false, true].into_iter().zip(expected["templates"].as_array().unwrap()) {
        let chosen = files.templates.choose(None, with_tools);
        if chosen != expected.as_str() {
            return Some(format!("template {chosen:?} instead of {expected}"));
        }
    }
    let tokenizer = match Tokenizer::new(&files) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return Some(error.to_string()),
    };
    for (text, expected) in head["texts"].as_array().unwrap().iter().zip(expected["ids"].as_array().unwrap()) {
        for (special, expected) in [false, true].into_iter().zip(expected.as_array().unwrap()) {
            let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
            let ids = tokenizer.encode(text.as_str().unwrap(), special).unwrap();
            if ids != expected {
                return Some(format!("{text} ({special}): {ids:?} instead of {expected:?}"));
            }
        }
    }
    None
}

#[test]
fn folders_are_read_as_transformers_reads_them() {
    let fixture = include_str!("fixtures/model_folders.jsonl");
    let mut lines = fixture.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let head = lines.next().unwrap();
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for case in lines.filter(|case| case.get("expected").is_some()) {
        compared += 1;
        if let Some(why) = differs(&head, &case) {
            wrong.push(format!("{} {} {}: {why}", case["tokenizer"], case["files"], case["expected"]["class"]));
        }
    }
    assert!(compared > 300 && wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
}
