//! The router's side of `make test-templates`: for each line of its input, `{"engine": .., "folder": .., "request": ..}`, a line with the prompt that the
//! folder's template makes of the request, `{"text": ..}`, or why there is none, `{"not_known": ..}`. The empty string is no request: the
//! answer says whether the folder's template can be used at all. A request that is `{"text": .., "special": ..}` is answered with the
//! text's tokens, `{"tokens": ..}`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "it is a part of a test")]

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;

use kvstore_chat::engine::Engine;
use kvstore_chat::prompts::Prompts;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// A text of which the tokens are asked for.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    text: String,
    special: bool,
}

/// The answer to one request.
fn answer(prompts: &Prompts, engine: Engine, request: &RawValue) -> Value {
    if request.get() == r#""""# {
        return json!({"problem": prompts.problem()});
    }
    if let Ok(Text { text, special }) = serde_json::from_str(request.get()) {
        return match prompts.encode(&text, special) {
            Ok(tokens) => json!({"tokens": tokens}),
            Err(why) => json!({"not_known": why.to_string()}),
        };
    }
    match prompts.render(engine, request.get().as_bytes()) {
        Ok(text) => json!({"text": text}),
        Err(why) => json!({"not_known": why.to_string()}),
    }
}

fn main() {
    let mut last: Option<(String, Prompts)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let fields: HashMap<String, Box<RawValue>> = serde_json::from_str(&line).unwrap();
        let engine: Engine = serde_json::from_str(fields["engine"].get()).unwrap();
        let folder: String = serde_json::from_str(fields["folder"].get()).unwrap();
        let prompts = match last.take() {
            Some((name, prompts)) if name == folder => prompts,
            _ => Prompts::load(Path::new(&folder), None).unwrap(),
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", answer(&prompts, engine, &fields["request"])).unwrap();
        out.flush().unwrap();
        last = Some((folder, prompts));
    }
}
