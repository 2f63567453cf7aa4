//! What goes through the router arrives as it was meant: requests and answers as they came, breaks told, workers judged fairly.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore_router::fleet::Role;
use kvstore_router::place::PlaceOptions;
use kvstore_router::serve::{Model, ServeOptions};
use kvstore_tests::front::{Front, spec, until};
use kvstore_tests::raw_worker::{RawRequest, RawWorker, Step, chunk, stream_end, stream_head, whole};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const FIELDS: &str = include_str!("../fixtures/vllm_request_fields.json");
const COMPLETIONS: &str = "/v1/completions";
/// Said in another case, as media types may be.
const ODD_STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream ;charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
const CHAT: &str = "/v1/chat/completions";

async fn front(workers: &[&RawWorker]) -> Front {
    front_with(workers, PlaceOptions::default(), ServeOptions::default()).await
}

async fn front_with(workers: &[&RawWorker], place: PlaceOptions, serve: ServeOptions) -> Front {
    let specs: Vec<_> =
        workers.iter().zip('a'..).map(|(worker, id)| spec(&id.to_string(), &worker.url(), Role::Both)).collect();
    Front::start_with(&specs, place, serve).await
}

/// Sends bytes on a connection of its own; all that comes back.
async fn exchange(front: &Front, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(front.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut all = Vec::new();
    // A connection that is reset has said all that it will.
    let _ = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut all)).await.expect("it never closed");
    all
}

/// A body in chunks, put together; and whether it came to its end.
fn unchunked(answer: &[u8]) -> (Vec<u8>, bool) {
    let start = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let (mut rest, mut body) = (&answer[start..], Vec::new());
    while let Some(line) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap().trim(), 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        let Some(data) = rest.get(line + 2..line + 2 + size) else { break };
        body.extend_from_slice(data);
        rest = rest.get(line + 4 + size..).unwrap_or_default();
    }
    (body, false)
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn ok() -> Vec<Step> {
    whole("200 OK", "application/json", b"{\"ok\": true}")
}

/// A small generator: the same numbers in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }

    /// White space between tokens of JSON.
    fn space(&mut self) -> &'static str {
        self.of(&["", "", "", " ", "\n", "\t", "  \r\n"])
    }

    fn string(&mut self) -> String {
        let parts = [
            "hello",
            " ",
            "\\n",
            "\\u00e4",
            "\u{e4}",
            "\\ud83d\\ude00",
            "\u{1f600}",
            "\\\"",
            "\\/",
            "/",
            "{}",
            "\\ud800",
            "<|x|>",
        ];
        let parts: String = (0..self.below(6)).map(|_| self.of(&parts)).collect();
        format!("\"{parts}\"")
    }

    /// A value of one of these kinds, as a schema names them.
    fn value(&mut self, kinds: &[String], depth: usize) -> String {
        let kind = &kinds[self.below(kinds.len())];
        match kind.as_str() {
            "null" => "null".into(),
            "boolean" => self.of(&["true", "false"]).into(),
            "integer" => self.of(&["0", "1", "-1", "7", "20000000000000000000", "1e3"]).into(),
            "number" => self.of(&["0", "-0", "0.1", "1.0", "1e-2", "0.30000000000000004", "1E400", "5e+1"]).into(),
            "string" => self.string(),
            "array" | "object" if depth == 0 => self.of(&["[]", "{}"]).into(),
            "array" => {
                let any = ["null", "boolean", "integer", "number", "string", "array", "object"].map(str::to_owned);
                let items: Vec<String> = (0..self.below(4)).map(|_| self.value(&any, depth - 1)).collect();
                format!("[{}{}]", self.space(), items.join(self.of(&[",", ", ", "\n,"])))
            }
            "object" => {
                let names = ["z", "a", "type", "properties", "reasoning", "label", "answer", "\\u0061b", ""];
                let any = ["null", "number", "string", "array", "object"].map(str::to_owned);
                let count = self.below(5);
                let members: Vec<String> = (0..count)
                    .map(|_| format!("\"{}\"{}:{}", self.of(&names), self.space(), self.value(&any, depth - 1)))
                    .collect();
                format!("{{{}{}}}", self.space(), members.join(self.of(&[",", ", "])))
            }
            choices => {
                let choices: Vec<&str> = choices.trim_start_matches("enum:").split('|').collect();
                format!("\"{}\"", self.of(&choices))
            }
        }
    }

    /// A request with some of a schema's fields, and some that it does not know.
    fn request(&mut self, fields: &HashMap<String, Vec<String>>, is_chat: bool) -> String {
        let needed = if is_chat { "messages" } else { "prompt" };
        let prompts = if is_chat {
            [
                "[{\"role\":\"user\",\"content\":\"x\"}]",
                "[ {\"content\" : null, \"role\": \"assistant\", \"tool_calls\": []} ]",
            ]
        } else {
            ["\"x\"", "[1,  2]"]
        };
        let mut members =
            vec![format!("\"model\"{}:\"m\"", self.space()), format!("\"{needed}\":{}", self.of(&prompts))];
        let mut names: Vec<&String> =
            fields.keys().filter(|name| !["model", needed].contains(&name.as_str())).collect();
        names.sort();
        for _ in 0..self.below(10) {
            let name = names[self.below(names.len())];
            let value = if name == "stream" { "false".into() } else { self.value(&fields[name], 3) };
            members.push(format!("\"{name}\"{}:{}{value}", self.space(), self.space()));
        }
        if self.below(4) == 0 {
            members.push("\"unknown_to_all\": {\"b\": 1.50, \"a\": [1 ,2]}".into());
        }
        for at in (1..members.len()).rev() {
            members.swap(at, self.below(at + 1));
        }
        format!(
            "{}{{{}{}{}}}{}",
            self.space(),
            self.space(),
            members.join(self.of(&[",", ", ", ",\n "])),
            self.space(),
            self.space()
        )
    }
}

/// Keys were sorted, and numbers written anew: another prompt for the model, where tools and schemas are part of it.
#[tokio::test(flavor = "multi_thread")]
async fn requests_arrive_as_they_were_sent() {
    let fields: Value = serde_json::from_str(FIELDS).unwrap();
    let worker = RawWorker::start(|_| ok()).await;
    let front = front(&[&worker]).await;
    let mut random = Random(7);
    for (path, class) in [(CHAT, "chat"), (COMPLETIONS, "completion")] {
        let fields: HashMap<String, Vec<String>> = serde_json::from_value(fields[class].clone()).unwrap();
        for turn in 0..1000 {
            let body = random.request(&fields, class == "chat");
            let answer = front.post_bytes(path, body.clone()).await;
            assert_eq!((answer.status, answer.body.as_ref()), (200, &b"{\"ok\": true}"[..]), "{class} {turn}: {body}");
            let got = worker.requests().last().unwrap().body.clone();
            assert_eq!(String::from_utf8_lossy(&got), body, "{class} {turn}");
        }
    }
    assert_eq!(worker.requests().len(), 2000);
}

/// The same of streams between two workers, where the router may ask for token ids: that is all that it adds.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_asked_for_as_they_were_but_for_token_ids() {
    let fields: Value = serde_json::from_str(FIELDS).unwrap();
    let (a, b) = (RawWorker::start(|_| ok()).await, RawWorker::start(|_| ok()).await);
    let front = front(&[&a, &b]).await;
    let (mut random, mut added) = (Random(13), 0);
    for (path, class) in [(CHAT, "chat"), (COMPLETIONS, "completion")] {
        let fields: HashMap<String, Vec<String>> = serde_json::from_value(fields[class].clone()).unwrap();
        let few: HashMap<String, Vec<String>> = fields
            .iter()
            .filter(|(name, _)| {
                ["temperature", "top_p", "user", "max_tokens", "return_token_ids", "messages", "prompt", "model"]
                    .contains(&name.as_str())
            })
            .map(|(name, kinds)| (name.clone(), kinds.clone()))
            .collect();
        for turn in 0..300 {
            let body = random.request(if turn % 2 == 0 { &few } else { &fields }, class == "chat");
            let end = body.rfind('}').unwrap();
            let body = format!("{},\"stream\":true{}", &body[..end], &body[end..]);
            assert_eq!(front.post_bytes(path, body.clone()).await.status, 200, "{body}");
            let of = |worker: &RawWorker| {
                worker.requests().last().map(|request| String::from_utf8(request.body.to_vec()).unwrap())
            };
            let got = [of(&a), of(&b)];
            let end = body.rfind('}').unwrap();
            let with = format!("{},\"return_token_ids\":true{}", &body[..end], &body[end..]);
            let asks = body.contains("return_token_ids");
            let is_it =
                |got: &String| *got == body || *got == with || asks && without_value(got) == without_value(&body);
            assert!(got.iter().flatten().any(is_it), "{class} {turn}: {body}\n{got:?}");
            added += usize::from(got.iter().flatten().any(|got| *got == with));
        }
    }
    assert!(added > 50, "{added}");
}

/// A body without what it says of token ids, the last time that it does.
fn without_value(body: &str) -> String {
    let Some(at) = body.rfind("\"return_token_ids\"") else { return body.to_owned() };
    let after = &body[at..];
    let end =
        ["true", "false", "null"].iter().filter_map(|value| Some(after.find(value)? + value.len())).min().unwrap();
    format!("{}{}", &body[..at], &after[end..])
}

/// Where the router asks for token ids, so that it could go on elsewhere, all else stays as it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_router_adds_is_all_that_changes() {
    let workers = [RawWorker::start(|_| ok()).await, RawWorker::start(|_| ok()).await];
    let front = front(&[&workers[0], &workers[1]]).await;
    let got = async |body: &str| {
        let before: usize = workers.iter().map(|worker| worker.requests().len()).sum();
        assert_eq!(front.post_bytes(CHAT, body.to_owned()).await.status, 200);
        let all: Vec<RawRequest> = workers.iter().flat_map(RawWorker::requests).collect();
        assert_eq!(all.len(), before + 1);
        let bodies = workers.iter().filter_map(|worker| worker.requests().last().map(|request| request.body.clone()));
        bodies
            .map(|body| String::from_utf8(body.to_vec()).unwrap())
            .find(|got| got.contains(&body[body.find("\"messages\"").unwrap()..][..50]))
            .unwrap()
    };
    let plain = "{\"zeta\": null, \"messages\": [{\"role\": \"user\", \"content\": \"1\"}], \"temperature\": 1.0e0, \"stream\": true}  ";
    assert_eq!(got(plain).await, plain.replace("true}", "true,\"return_token_ids\":true}"));
    let said =
        "{\"return_token_ids\" : false, \"messages\": [{\"role\": \"user\", \"content\": \"2\"}], \"stream\": true}";
    assert_eq!(got(said).await, said.replace("false", "true"));
    for same in [
        "{\"messages\": [{\"role\": \"user\", \"content\": \"3\"}], \"stream\": true, \"tools\": [{\"b\": 1, \"a\": 2}]}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"4\"}], \"stream\": false, \"b\": 1, \"a\": 2}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"5\"}], \"stream\": true, \"return_token_ids\": true}",
    ] {
        assert_eq!(got(same).await, same);
    }
}

/// A random stream as engines send them, in events.
fn random_stream(random: &mut Random, choices: usize) -> Vec<Vec<u8>> {
    let end = random.of(&["\n\n", "\r\n\r\n"]);
    let mut events: Vec<String> = Vec::new();
    let odd = [
        format!(": keep-alive{end}"),
        format!("event: ping{end}"),
        format!("id: 7{end}"),
        format!("data: {{\"choices\": [], \"error\": null}}{end}"),
        end[..end.len() / 2].to_owned(),
    ];
    for choice in 0..choices {
        for token in 0..1 + random.below(4) {
            if random.below(2) == 0 {
                events.push(odd[random.below(odd.len())].clone());
            }
            let text = random.string().replace("\\ud800", "");
            events.push(format!(
                "data: {{\"z\":1.0,\"id\":\"c\",\"choices\":[{{\"index\":{choice},\"text\":{text},\"token_ids\":[{token}],\"finish_reason\":null}}]}}{end}"
            ));
        }
        events.push(format!(
            "data: {{\"choices\":[{{\"index\":{choice},\"text\":\"\",\"finish_reason\":\"stop\"}}]}}{end}"
        ));
    }
    events.push(format!("data: [DONE]{end}"));
    events.into_iter().map(String::into_bytes).collect()
}

/// Wherever a stream breaks, a client has either all of the answer, or a beginning of it and an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_is_a_beginning_and_an_error_at_every_byte() {
    let mut random = Random(11);
    for (turn, choices) in [1, 2, 1, 3, 1, 2].into_iter().enumerate() {
        let events = random_stream(&mut random, choices);
        let stream: Arc<Vec<u8>> = Arc::new(events.concat());
        let told = Arc::clone(&stream);
        // The request says where to cut, and how: within a chunk, or as a whole one before it hangs up.
        let worker = RawWorker::start(move |request| {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            let at = body["cut"].as_u64().unwrap() as usize;
            let pieces: Vec<Step> = told[..at].chunks(1 + at % 97).map(chunk).collect();
            let mut steps = vec![stream_head()];
            steps.extend(pieces);
            steps.push(if at == told.len() && body["sound"] == true { stream_end() } else { Step::HangUp });
            steps
        })
        .await;
        let front = front(&[&worker]).await;
        // Behind the last choice's end, nothing is missing but the last line.
        let whole_from = stream.len() - events.last().unwrap().len();
        let ends: Vec<usize> = events
            .iter()
            .scan(0, |at, event| {
                *at += event.len();
                Some(*at)
            })
            .collect();
        for cut in 0..=stream.len() {
            let body =
                json!({"model": "m", "prompt": [1], "n": choices, "stream": true, "cut": cut, "sound": cut % 2 == 0});
            let answer = exchange(&front, &post(COMPLETIONS, body.to_string().as_bytes())).await;
            if cut == 0 && !answer.starts_with(b"HTTP/1.1 200") {
                continue;
            }
            let (got, ended) = unchunked(&answer);
            assert!(ended, "the client's own connection is sound");
            let text = String::from_utf8_lossy(&got);
            if cut >= whole_from {
                let done = text.trim_end().ends_with("data: [DONE]");
                assert!(done && got.starts_with(&stream[..whole_from]), "{turn}, cut at {cut}: {text}");
                continue;
            }
            let here = ends.iter().copied().filter(|end| *end <= cut).max().unwrap_or(0);
            // An empty line may belong to the event before it.
            let rest = got.strip_prefix(&stream[..here]).unwrap_or_else(|| panic!("{turn}, cut at {cut}: {text}"));
            let error = std::str::from_utf8(rest).unwrap().trim_start_matches(['\r', '\n']);
            assert!(
                error.starts_with("data: {\"error\":{\"message\":") && error.ends_with("}}\n\n"),
                "{turn}, cut at {cut}: {error:?}"
            );
            assert_eq!(error.matches("data: ").count(), 1, "{turn}, cut at {cut}: {error:?}");
            assert!(!error.contains("[DONE]"), "no end that looks like one");
        }
    }
}

/// The same between two workers that give the same answer: from wherever the first broke off, the client has the one answer, once, or a
/// beginning of it and an error. The usage is asked for, so that an answer is not whole before it has come.
#[tokio::test(flavor = "multi_thread")]
async fn a_continued_stream_is_the_one_answer_at_every_byte() {
    const TOKENS: u32 = 6;
    let event = |value: Value| format!("data: {value}\n\n");
    let piece = move |token: u32| {
        let reason = if token + 1 == TOKENS { json!("stop") } else { Value::Null };
        // The text of an odd token comes with the next one's: half a character.
        let text = if token.is_multiple_of(2) { String::new() } else { format!("<{}><{token}>", token - 1) };
        json!({"id": "c", "choices": [{"index": 0, "text": text, "prompt_token_ids": [1], "token_ids": [100 + token], "finish_reason": reason}]})
    };
    let answer_from = move |token: u32| -> Vec<u8> {
        let mut all: String = (token..TOKENS).map(|token| event(piece(token))).collect();
        all += &event(
            json!({"id": "c", "choices": [], "usage": {"prompt_tokens": 1 + token, "completion_tokens": TOKENS - token}}),
        );
        (all + "data: [DONE]\n\n").into_bytes()
    };
    let cut = Arc::new(std::sync::atomic::AtomicUsize::new(usize::MAX));
    let told = Arc::clone(&cut);
    let answers = Arc::new(move |request: &RawRequest| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let whole = answer_from(body["prompt"].as_array().unwrap().len() as u32 - 1);
        // The first that is asked is cut.
        let cut = told.swap(usize::MAX, Ordering::Relaxed).min(whole.len());
        let mut steps = vec![stream_head()];
        steps.extend(whole[..cut].chunks(40).map(chunk));
        steps.push(if cut == whole.len() { stream_end() } else { Step::HangUp });
        steps
    });
    let (one, two) = (Arc::clone(&answers), answers);
    let (a, b) =
        (RawWorker::start(move |request| one(request)).await, RawWorker::start(move |request| two(request)).await);
    let front = front(&[&a, &b]).await;
    let body = json!({"model": "m", "prompt": [1], "max_tokens": 20, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}});
    let text: String = (0..TOKENS).map(|token| format!("<{token}>")).collect();
    let (mut continued, mut broken) = (0, 0);
    let length = answer_from(0).len();
    for at in 0..length {
        cut.store(at, Ordering::Relaxed);
        let before = a.requests().len() + b.requests().len();
        let answer = front.post(COMPLETIONS, body.clone()).await;
        let pieces = answer.pieces();
        let got: String = pieces.iter().filter_map(|piece| piece["choices"][0]["text"].as_str()).collect();
        assert!(pieces.iter().all(|piece| piece["choices"][0]["token_ids"].is_null()), "nobody asked for them");
        let asked = a.requests().len() + b.requests().len() - before;
        if pieces.last().unwrap().get("error").is_some() {
            assert!(text.starts_with(&got) && asked == 1, "cut at {at}: {got:?}");
            broken += 1;
        } else {
            assert_eq!(got, text, "cut at {at}");
            let usage = &pieces.last().unwrap()["usage"];
            assert_eq!(
                (&usage["prompt_tokens"], &usage["completion_tokens"]),
                (&json!(1), &json!(TOKENS)),
                "cut at {at}"
            );
            continued += usize::from(asked == 2);
        }
    }
    // Between the last choice's end and the usage, nobody can give the rest.
    assert!(continued > length / 2 && broken > 50, "{continued} continued, {broken} broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_come_through_byte_by_byte_whatever_is_in_them() {
    let odd: &[u8] = b": hello\n\nretry: 3\ndata: {\"b\": 1.0, \"a\": 2, \"choices\": [], \"error\": null}\n\ndata:[1,  2]\r\n\r\ndata: not JSON\n\nevent: x\ndata: {\ndata: }\n\ndata: \xff\n\ndata: {\"choices\":[{\"index\":0,\"text\":\"x\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n: bye\n\n";
    let worker = RawWorker::start(move |_| {
        let mut steps = vec![stream_head(), chunk(&odd[..5]), Step::Wait(Duration::from_millis(5))];
        steps.extend(odd[5..].chunks(17).map(chunk));
        steps.push(stream_end());
        steps
    })
    .await;
    let front = front(&[&worker]).await;
    for path in [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages"] {
        let body = json!({"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": true});
        let answer = front.post(path, body).await;
        assert_eq!((answer.status, answer.worker.as_str()), (200, "a"), "{path}");
        assert_eq!(answer.body, odd, "{path}");
        assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    }
}

/// Comments keep connections open while a prompt is computed: they come when they are sent.
#[tokio::test(flavor = "multi_thread")]
async fn keep_alives_come_at_once() {
    let worker = RawWorker::start(|_| {
        let mut steps = vec![stream_head()];
        for _ in 0..4 {
            steps.extend([chunk(b": keep-alive\n\n"), Step::Wait(Duration::from_secs(1))]);
        }
        steps.extend([
            chunk(b"data: {\"choices\":[{\"index\":0,\"text\":\"x\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"),
            stream_end(),
        ]);
        steps
    })
    .await;
    let front = front(&[&worker]).await;
    let mut stream = TcpStream::connect(front.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(&post(COMPLETIONS, b"{\"prompt\": \"x\", \"stream\": true}")).await.unwrap();
    let (mut all, mut came) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    while stream.read_buf(&mut all).await.unwrap() > 0 {
        came.push((begun.elapsed(), all.windows(10).filter(|window| window == b"keep-alive").count()));
    }
    // Four seconds lie between the first and the end. Whoever reads late on a busy machine may find two of them at once.
    let first = came.iter().find(|(_, count)| *count > 0).unwrap();
    let (end, all) = came.last().unwrap();
    assert!(first.1 < 4 && *all == 4 && *end - first.0 > Duration::from_millis(900), "one after the other: {came:?}");
}

/// Pieces of an answer, one after the other, then a break.
fn breaking(pieces: &[Value]) -> Vec<Step> {
    let mut steps = vec![stream_head()];
    steps.extend(pieces.iter().map(|piece| chunk(format!("data: {piece}\n\n").as_bytes())));
    steps.extend([Step::Wait(Duration::from_millis(50)), Step::HangUp]);
    steps
}

fn delta(delta: Value) -> Value {
    json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
}

/// A stream that breaks at two workers, of which the second would go on as the first: what was sent is not sent again.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_is_not_asked_for_again() {
    let role = json!({"role": "assistant", "content": ""});
    let cases = [
        ("a role alone", vec![delta(role.clone())]),
        (
            "a call",
            vec![
                delta(role.clone()),
                delta(json!({"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": "{"}}]})),
            ],
        ),
        ("a thought", vec![delta(role.clone()), delta(json!({"reasoning_content": "I th"}))]),
        ("a thought under its new name", vec![delta(role.clone()), delta(json!({"reasoning": "I th"}))]),
        ("a refusal", vec![delta(role.clone()), delta(json!({"refusal": "I c"}))]),
        ("a function's call", vec![delta(json!({"function_call": {"name": "f", "arguments": ""}}))]),
        ("something of a later day", vec![delta(json!({"novelty": {"a": 1}}))]),
        ("what cannot be read", vec![json!([1, 2])]),
    ];
    for (what, pieces) in cases {
        let told = pieces.clone();
        let answers = move |_: &RawRequest| breaking(&told);
        let (a, b) = (RawWorker::start(answers.clone()).await, RawWorker::start(answers).await);
        let front = front(&[&a, &b]).await;
        let body =
            json!({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": true, "max_tokens": 9});
        let answer = front.post(CHAT, body).await;
        let mut got = answer.pieces();
        let error = got.pop().unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains("broke off"), "{what}: {error}");
        assert_eq!(got, pieces, "{what}");
        assert_eq!(a.requests().len() + b.requests().len(), 1, "{what}");
    }
}

/// The same of what the router does not read, and of a request that is wrong; of a comment alone, the whole is asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_unread_is_not_asked_for_again() {
    // What is no text at all.
    let odd = |_: &RawRequest| vec![stream_head(), chunk(b"data: \xff\n\n"), Step::HangUp];
    let (a, b) = (RawWorker::start(odd).await, RawWorker::start(odd).await);
    let between = front(&[&a, &b]).await;
    let got = between.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.body;
    assert!(got.starts_with(b"data: \xff\n\ndata: {\"error\"") && a.requests().len() + b.requests().len() == 1);
    // A request that is wrong is wrong everywhere: the worker's word comes as it is.
    let wrong: &[u8] = b"data: {\"error\": {\"message\": \"too long\", \"code\": 400}}\n\ndata: [DONE]\n\n";
    let refuses = move |_: &RawRequest| vec![stream_head(), chunk(wrong), stream_end()];
    let (a, b) = (RawWorker::start(refuses).await, RawWorker::start(refuses).await);
    let between = front(&[&a, &b]).await;
    assert_eq!(between.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.body, wrong);
    assert_eq!(a.requests().len() + b.requests().len(), 1);
    let answers = |_: &RawRequest| {
        vec![
            Step::Send(ODD_STREAM.into()),
            chunk(b"data: {\"choices\":[{\"index\":0,\"text\":\"x\"}]}\n\n"),
            Step::HangUp,
        ]
    };
    let worker = RawWorker::start(answers).await;
    let got = self::front(&[&worker]).await.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.pieces();
    assert!(got[1]["error"].is_object(), "{got:?}");
    // Nothing was said but that it lives: it is asked again.
    let first = Arc::new(AtomicBool::new(true));
    let answers = move |_: &RawRequest| {
        let mut steps = vec![stream_head(), chunk(b": keep-alive\n\n")];
        if first.swap(false, Ordering::Relaxed) {
            steps.push(Step::HangUp);
        } else {
            steps.push(chunk(
                b"data: {\"choices\":[{\"index\":0,\"text\":\"x\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
            ));
            steps.push(stream_end());
        }
        steps
    };
    let answers = Arc::new(answers);
    let (one, two) = (Arc::clone(&answers), answers);
    let (a, b) =
        (RawWorker::start(move |request| one(request)).await, RawWorker::start(move |request| two(request)).await);
    let front = front(&[&a, &b]).await;
    assert_eq!(front.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.text(), "x");
}

/// Engines hold text back that may become a stop string, or is half a character, while they tell its tokens already. What went on from
/// those tokens lost that text.
#[tokio::test(flavor = "multi_thread")]
async fn text_that_was_held_back_is_not_lost() {
    let piece = |text: &str, tokens: &[u32]| json!({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [{"index": 0, "text": text, "prompt_token_ids": [1, 2], "token_ids": tokens, "finish_reason": null}]});
    let answers = move |request: &RawRequest| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let prompt = body["prompt"].as_array().unwrap().len();
        if prompt == 2 {
            return breaking(&[piece("o", &[10]), piece("", &[11]), piece("", &[12])]);
        }
        // The text of what comes behind so many tokens.
        let text = ["", "", "", "ther", "her", "er"][prompt];
        let mut steps = vec![stream_head()];
        let end =
            json!({"id": "d", "choices": [{"index": 0, "text": text, "token_ids": [13], "finish_reason": "stop"}]});
        steps.extend([chunk(format!("data: {end}\n\ndata: [DONE]\n\n").as_bytes()), stream_end()]);
        steps
    };
    let (a, b) = (RawWorker::start(answers).await, RawWorker::start(answers).await);
    let front = front(&[&a, &b]).await;
    let body = |more: Value| {
        let mut body = json!({"model": "m", "prompt": [1, 2], "max_tokens": 8, "temperature": 0, "stream": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let answer = front.post(COMPLETIONS, body(json!({}))).await;
    assert_eq!(answer.text(), "other", "half a character was held back: {:?}", answer.body);
    let answer = front.post(COMPLETIONS, body(json!({"stop": ["thx"]}))).await;
    let pieces = answer.pieces();
    let error = pieces.last().unwrap()["error"]["message"].as_str().unwrap();
    assert!(error.contains("\"stop\""), "{error}");
}

/// An idle connection that a worker closes when the next request comes says nothing of the worker.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_closed_meanwhile_are_not_the_workers_fault() {
    for steps in [vec![Step::HangUp], vec![Step::Wait(Duration::from_millis(20)), Step::HangUp]] {
        let worker = RawWorker::start(move |request| if request.at.0 > 0 { steps.clone() } else { ok() }).await;
        let front = front(&[&worker]).await;
        for (turn, path) in
            [COMPLETIONS, CHAT, "/tokenize", COMPLETIONS, "/v1/embeddings", COMPLETIONS].iter().enumerate()
        {
            let answer = front
                .post(path, json!({"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}))
                .await;
            assert_eq!(answer.status, 200, "{turn}: {:?}", answer.body);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(front.get("/workers").await.json()[0]["up"], true);
    }
}

/// A worker that hangs up on a first request, or in the middle of an answer, is not asked for the same again.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_given_once_to_each_worker() {
    for steps in [
        vec![Step::HangUp],
        vec![Step::Send(Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-")), Step::HangUp],
        vec![Step::Send(Bytes::from_static(b"nonsense\r\n\r\n")), Step::HangUp],
    ] {
        let answers = Arc::new(move |_: &RawRequest| steps.clone());
        let (one, two) = (Arc::clone(&answers), answers);
        let (a, b) =
            (RawWorker::start(move |request| one(request)).await, RawWorker::start(move |request| two(request)).await);
        let front = front(&[&a, &b]).await;
        let answer = front.post(COMPLETIONS, json!({"prompt": "x"})).await;
        assert_eq!(answer.status, 503);
        assert_eq!((a.requests().len(), b.requests().len()), (1, 1));
    }
}

/// What the router itself sets a limit to is its own answer, and costs no worker anything.
#[tokio::test(flavor = "multi_thread")]
async fn the_routers_own_limits_are_its_own_answers() {
    let slow = |_: &RawRequest| vec![Step::Wait(Duration::from_secs(30))];
    let (a, b) = (RawWorker::start(slow).await, RawWorker::start(slow).await);
    let place = PlaceOptions { silence: Duration::from_millis(300), ..PlaceOptions::default() };
    let serve = ServeOptions { request_bytes: 10_000, ..ServeOptions::default() };
    let front = front_with(&[&a, &b], place, serve).await;
    let large = json!({"model": "m", "prompt": "x".repeat(10_000)});
    for path in [COMPLETIONS, CHAT, "/v1/embeddings", "/explain"] {
        let answer = front.post(path, large.clone()).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (413, &json!("request_too_large")), "{path}");
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("10000 bytes") && message.contains("request_bytes"), "{message}");
    }
    assert_eq!(a.requests().len() + b.requests().len(), 0);
    for path in [COMPLETIONS, "/v1/embeddings"] {
        let before = a.requests().len() + b.requests().len();
        let answer = front.post(path, json!({"model": "m", "prompt": "x"})).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("timeout")), "{path}");
        assert_eq!(a.requests().len() + b.requests().len(), before + 1, "one worker was asked, and no other");
    }
    // A stream that says nothing behind its head: its client sees why it ends, and nobody else is asked.
    let mute = |_: &RawRequest| vec![stream_head(), Step::Wait(Duration::from_secs(30))];
    let (c, d) = (RawWorker::start(mute).await, RawWorker::start(mute).await);
    let between = front_with(&[&c, &d], place, ServeOptions::default()).await;
    let pieces = between.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.pieces();
    assert_eq!((pieces.len(), &pieces[0]["error"]["code"]), (1, &json!("timeout")));
    assert_eq!(c.requests().len() + d.requests().len(), 1);
    let workers = front.get("/workers").await.json();
    assert!(workers.as_array().unwrap().iter().all(|worker| worker["up"] == true), "{workers}");
}

/// An event that is longer than the router reads is passed on, and what follows it.
#[tokio::test(flavor = "multi_thread")]
async fn endless_events_are_passed_on_unread() {
    let long: Arc<Vec<u8>> = Arc::new([b"data: ", "x".repeat(20 << 20).as_bytes(), b"\n\ndata: {}\n\n"].concat());
    for breaks in [false, true] {
        let told = Arc::clone(&long);
        let answers = move |_: &RawRequest| {
            let mut steps = vec![stream_head()];
            steps.extend(told.chunks(1 << 20).map(chunk));
            steps.push(if breaks { Step::HangUp } else { stream_end() });
            steps
        };
        let answers = Arc::new(answers);
        let (one, two) = (Arc::clone(&answers), answers);
        let (a, b) =
            (RawWorker::start(move |request| one(request)).await, RawWorker::start(move |request| two(request)).await);
        let front = front(&[&a, &b]).await;
        let got = front.post(COMPLETIONS, json!({"prompt": "x", "stream": true})).await.body;
        let rest = got.strip_prefix(long.as_slice()).expect("all that was sent");
        assert_eq!(breaks, rest.starts_with(b"\n\ndata: {\"error\""), "{:?}", &rest[..rest.len().min(100)]);
        assert_eq!(a.requests().len() + b.requests().len(), 1);
    }
}

/// A client that announces much and sends nothing takes nobody's room; what is no path, or has no end of members, is the client's mistake.
#[tokio::test(flavor = "multi_thread")]
async fn odd_clients_cost_no_worker_and_nobody_else() {
    let worker = RawWorker::start(|_| ok()).await;
    let front = front(&[&worker]).await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(front.url.strip_prefix("http://").unwrap()).await.unwrap();
        let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{{", 60 << 20);
        stream.write_all(head.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..5 {
        let starred = exchange(&front, b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(starred.starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&starred));
        let far = format!("GET /{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "x".repeat(65_530));
        let far = exchange(&front, far.as_bytes()).await;
        assert!(
            far.starts_with(b"HTTP/1.1 400 ") || far.starts_with(b"HTTP/1.1 414 "),
            "{}",
            String::from_utf8_lossy(&far[..60])
        );
    }
    let many: String = (0..100_000).map(|at| format!("\"k{at}\":null,")).collect();
    let many = format!("{{{many}\"prompt\":\"x\"}}");
    let explained = front.post_bytes("/explain", many.clone()).await;
    assert!(
        explained.status == 400
            && explained.json()["error"]["message"].as_str().unwrap().contains("at most 1024 members")
    );
    // What Python writes and reads, and serde does not; and what is too much to be read here.
    for odd in [many.as_str(), "{\"prompt\": \"x\", \"top_p\": NaN}", "\u{feff}{\"prompt\": \"x\", \"stream\": true}"] {
        assert_eq!(front.post_bytes(COMPLETIONS, odd.to_owned()).await.status, 200);
        assert_eq!(worker.requests().last().unwrap().body, odd.as_bytes());
    }
    assert_eq!(front.get("/workers").await.json()[0]["up"], true);
    assert_eq!(front.post(COMPLETIONS, json!({"prompt": "x"})).await.status, 200, "there is room");
    // An offer to go on in another protocol may be passed over.
    let offered = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close, Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n";
    assert!(exchange(&front, offered).await.starts_with(b"HTTP/1.1 200 "));
    assert!(!worker.requests().last().unwrap().head.to_lowercase().contains("upgrade"));
}

#[tokio::test(flavor = "multi_thread")]
async fn long_answers_come_as_they_are_made() {
    let body: Arc<Vec<u8>> = Arc::new((0..5_000_000u32).map(|at| b'a' + (at % 23) as u8).collect());
    let told = Arc::clone(&body);
    let worker = RawWorker::start(move |request| {
        let breaks = request.body.windows(5).any(|window| window == b"break");
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", told.len());
        let upto = if breaks { told.len() - 10 } else { told.len() };
        let mut steps = vec![Step::Send(head.into()), Step::Send(Bytes::copy_from_slice(&told[..upto]))];
        steps.extend(breaks.then_some(Step::HangUp));
        steps
    })
    .await;
    let front = front(&[&worker]).await;
    let answer = front.post(COMPLETIONS, json!({"model": "m", "prompt": "x"})).await;
    assert!(answer.body == body.as_slice() && answer.headers["content-length"] == "5000000");
    let broken = exchange(&front, &post(COMPLETIONS, b"{\"model\": \"m\", \"prompt\": \"break\"}")).await;
    let start = broken.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    assert!(broken.len() - start < body.len() && body.starts_with(&broken[start..]), "it shows that it is not whole");
    assert_eq!(worker.requests().len(), 2);
}

/// A worker that says what it was asked.
async fn mirror() -> RawWorker {
    RawWorker::start(|request| {
        let said = json!({"line": request.line(), "length": request.body.len(), "kind": request.header("content-type"), "odd": request.header("x-odd"), "encoding": request.header("accept-encoding")});
        match request.line().split(' ').next() {
            Some("HEAD") => vec![Step::Send(Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-length: 77\r\nx-said: yes\r\n\r\n"))],
            _ if request.line().contains("gzip") => {
                vec![Step::Send(Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8b\x08"))]
            }
            _ if request.line().contains("teapot") => whole("418 I'm a teapot", "text/plain", b"short"),
            _ => whole("200 OK", "application/json", said.to_string().as_bytes()),
        }
    })
    .await
}

/// Every route of an engine's server, and every way to ask.
#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_passed() {
    let worker = mirror().await;
    let front = front(&[&worker]).await;
    for path in [
        "/v1/embeddings",
        "/v1/responses",
        "/rerank",
        "/score",
        "/tokenize",
        "/v1/audio/transcriptions",
        "/pooling?a=1&b=%20c",
    ] {
        let said = front.post(path, json!({"model": "m", "input": "x"})).await;
        assert_eq!(
            (said.json()["line"].as_str().unwrap(), said.worker.as_str()),
            (format!("POST {path} HTTP/1.1").as_str(), "a")
        );
    }
    for own in ["/query", "/register", "/explain"] {
        assert_eq!(front.get(own).await.status, 405, "{own} is the router's own");
    }
    let said = front.get("/version").await.json();
    assert_eq!((&said["line"], &said["length"]), (&json!("GET /version HTTP/1.1"), &json!(0)));
    let line = |method: &str| {
        format!(
            "{method} /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\nx-odd: a, b\r\naccept-encoding: gzip\r\nconnection: close, x-private\r\nx-private: 1\r\n\r\n"
        )
    };
    let deleted = String::from_utf8(exchange(&front, line("DELETE").as_bytes()).await).unwrap();
    assert!(
        deleted.contains("\"line\":\"DELETE /v1/responses/resp_1 HTTP/1.1\"") && deleted.contains("\"odd\":\"a, b\""),
        "{deleted}"
    );
    assert!(deleted.contains("\"encoding\":\"gzip\""), "{deleted}");
    assert!(!worker.requests().last().unwrap().head.contains("x-private"), "it is of the connection");
    let head = String::from_utf8(exchange(&front, line("HEAD").as_bytes()).await).unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n")
            && head.contains("content-length: 77\r\n")
            && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    until("all is over", || front.idle()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_ask_is_passed() {
    let worker = mirror().await;
    let front = front(&[&worker]).await;
    // HTTP/1.0, whole and in pieces; and a body in chunks.
    let old = format!("POST {COMPLETIONS} HTTP/1.0\r\ncontent-length: 15\r\n\r\n{{\"prompt\": \"x\"}}");
    let old = String::from_utf8(exchange(&front, old.as_bytes()).await).unwrap();
    assert!(old.starts_with("HTTP/1.0 200 OK") && old.contains("\"length\":15"), "{old}");
    let chunked = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{{\"promp\r\n8\r\nt\": \"x\"}}\r\n0\r\n\r\n"
    );
    let chunked = String::from_utf8(exchange(&front, chunked.as_bytes()).await).unwrap();
    assert!(chunked.contains("\"length\":15"), "{chunked}");
    let answer = front.get("/gzip").await;
    assert_eq!(
        (&answer.headers["content-encoding"], answer.body.as_ref()),
        (&"gzip".parse().unwrap(), &b"\x1f\x8b\x08"[..])
    );
    let answer = front.post("/teapot", json!({})).await;
    assert_eq!((answer.status, answer.body.as_ref()), (418, &b"short"[..]));
    let upgraded = b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade\r\nupgrade: websocket\r\n\r\n";
    assert!(exchange(&front, upgraded).await.starts_with(b"HTTP/1.1 501 "), "it says that it cannot");
    // A form, and a client that asks for leave first.
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n--b--\r\n";
    let asked = format!(
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: {}\r\n\r\n{form}",
        form.len()
    );
    let asked = String::from_utf8(exchange(&front, asked.as_bytes()).await).unwrap();
    assert!(asked.contains(" 404 ") && asked.contains("model_not_found"), "{asked}");
    let known = asked_form(&front, form.replace("other", "m")).await;
    assert!(known.contains("multipart/form-data; boundary=b"), "{known}");
    until("all is over", || front.idle()).await;
}

async fn asked_form(front: &Front, form: String) -> String {
    let request = format!(
        "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: {}\r\n\r\n{form}",
        form.len()
    );
    String::from_utf8(exchange(front, request.as_bytes()).await).unwrap()
}

/// A client that leaves ends what it asked for, in each phase of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_its_request_in_every_phase() {
    let silent = RawWorker::start(|_| vec![Step::Wait(Duration::from_secs(60))]).await;
    let half = RawWorker::start(|_| {
        vec![
            Step::Send(Bytes::from_static(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
            )),
            Step::Wait(Duration::from_secs(60)),
        ]
    })
    .await;
    let endless =
        RawWorker::start(|_| vec![stream_head(), chunk(b"data: {}\n\n"), Step::Wait(Duration::from_secs(60))]).await;
    for (phase, worker) in [("before the head", &silent), ("within the answer", &half), ("within a stream", &endless)] {
        for path in [COMPLETIONS, "/v1/embeddings"] {
            let front = front(&[worker]).await;
            let mut client = TcpStream::connect(front.url.strip_prefix("http://").unwrap()).await.unwrap();
            client.write_all(&post(path, b"{\"prompt\": \"x\", \"stream\": true}")).await.unwrap();
            until("it is under way", || !front.idle()).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(client);
            until(phase, || front.idle()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_served_by_their_base_models_workers() {
    let (a, b) = (RawWorker::start(|_| ok()).await, RawWorker::start(|_| ok()).await);
    let models = HashMap::from([("m-lora".to_owned(), Model { adapter: true, ..Model::default() })]);
    let specs = [spec("a", &a.url(), Role::Both), spec("b", &b.url(), Role::Both)];
    let front = Front::start_for(&specs, PlaceOptions::default(), ServeOptions::default(), models).await;
    let ask = async |model: &str| front.post(COMPLETIONS, json!({"model": model, "prompt": [1, 2]})).await;
    assert_eq!(ask("m-lora").await.status, 200);
    let ids = async || {
        let models = front.get("/v1/models").await.json();
        models["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|model| model["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    until("the workers are asked", || front.router.fleet.workers().iter().all(|worker| !worker.served().is_empty()))
        .await;
    assert_eq!(ids().await, ["m", "m-lora"]);
    let m = front.get("/v1/models/m").await.json();
    assert_eq!(m["max_model_len"], 4096, "as its engine says");
    assert_eq!(front.get("/v1/models/nobody").await.status, 404);
    // Loaded while it runs, at one of two.
    assert_eq!(ask("new/lora").await.status, 404);
    b.set_models(r#"{"data": [{"id": "m", "max_model_len": 2048}, {"id": "new/lora", "parent": "m", "root": "/x"}]}"#);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for _ in 0..4 {
        let answer = ask("new/lora").await;
        assert_eq!((answer.status, answer.worker.as_str()), (200, "b"));
    }
    assert_eq!(front.get("/v1/models/new/lora").await.json()["parent"], "m");
    assert_eq!(front.get("/v1/models/m").await.json()["max_model_len"], 2048, "what all of them can");
    // A request need not name the model where there is one.
    assert_eq!(front.post(COMPLETIONS, json!({"prompt": "x"})).await.status, 200);
}
