//! Prompts: the next turn of an agent's conversation beside all of it and beside transformers, and conversations that nobody can render.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use kvstore_chat::conversation::Beginning;
use kvstore_chat::engine::Engine;
use kvstore_chat::prompts::Prompts;
use kvstore_proto::hashes::Sha256Cbor;
use kvstore_router::fleet::{Conversations, Fleet, FleetOptions, WorkerSpec};
use kvstore_router::hashing::Hashing;
use kvstore_router::place::{Asked, PlaceOptions, Router};
use serde_json::{Value, json};

use crate::figure::{self, median};
use crate::routing::{CORPUS, write_tokenizer};

/// Tokens of the conversation.
const TOKENS: usize = 30_000;
const WORKERS: usize = 8;
const BLOCK_BYTES: u64 = 64 * 4;
/// In the manner of models that call tools.
const TEMPLATE: &str = "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.content %}{{- message.content }}{%- endif %}{%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '\\n<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
/// A process that renders and tokenizes with transformers: a file's name comes in a line, seconds and tokens go out.
const TRANSFORMERS: &str = r#"
import json, sys, time
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    request = json.load(open(line.strip()))
    for message in request["messages"]:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    begun = time.perf_counter()
    made = tokenizer.apply_chat_template(request["messages"], tools=request["tools"], add_generation_prompt=True, tokenize=True, return_dict=False)
    print(json.dumps([time.perf_counter() - begun, made]), flush=True)
"#;

/// Measures the group. `python`: one that has transformers.
pub fn measure(agents: &Path, python: Option<&PathBuf>, rounds: usize) -> anyhow::Result<()> {
    next_turn(python, rounds)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(conversations(agents))
}

/// An agent's conversation of so many messages, each pair of them a call and its result.
fn conversation(messages: usize) -> Value {
    let tools: Vec<Value> = (0..12)
        .map(|at| json!({"type": "function", "function": {"name": format!("tool_{at}"), "description": "Reads a part of a file.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "from": {"type": "integer"}}, "required": ["path"]}}}))
        .collect();
    let mut texts = CORPUS.as_bytes().chunks(1200).map(String::from_utf8_lossy).cycle();
    let mut all =
        vec![json!({"role": "system", "content": texts.next()}), json!({"role": "user", "content": "Mend the test."})];
    while all.len() < messages {
        let id = format!("call_{}", all.len());
        let arguments = json!({"path": format!("src/file_{id}.rs"), "from": all.len()}).to_string();
        all.push(json!({"role": "assistant", "content": null, "tool_calls": [{"id": id, "type": "function", "function": {"name": "tool_3", "arguments": arguments}}]}));
        all.push(json!({"role": "tool", "tool_call_id": id, "content": texts.next()}));
    }
    json!({"model": "m", "messages": all, "tools": tools})
}

struct Transformers {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Transformers {
    fn start(python: &Path, folder: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", TRANSFORMERS])
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("{} cannot be started", python.display()))?;
        let (input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let mut this = Self { child, input, output: BufReader::new(output) };
        anyhow::ensure!(this.line()?.trim() == "ready", "transformers does not read the tokenizer");
        Ok(this)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        anyhow::ensure!(!line.is_empty(), "transformers ended");
        Ok(line)
    }

    fn render(&mut self, request: &Path) -> anyhow::Result<(f64, Vec<u32>)> {
        writeln!(self.input, "{}", request.display())?;
        Ok(serde_json::from_str(&self.line()?)?)
    }
}

impl Drop for Transformers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn next_turn(python: Option<&PathBuf>, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    write_tokenizer(folder.path())?;
    let config = json!({"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string())?;
    let prompts = Prompts::load(folder.path(), None)?;
    let mut messages = 20;
    while prompts.encode_chat(Engine::Vllm, conversation(messages).to_string().as_bytes())?.len() < TOKENS {
        messages += 4;
    }
    let (before, now) = (conversation(messages - 2).to_string(), conversation(messages).to_string());
    let file = folder.path().join("request.json");
    std::fs::write(&file, &now)?;
    let mut transformers = python.map(|python| Transformers::start(python, folder.path())).transpose()?;
    let (mut whole, mut next, mut theirs, mut equal) = (Vec::new(), Vec::new(), Vec::new(), true);
    let timed = |prompts: &Prompts, body: &str| -> anyhow::Result<(f64, Vec<u32>)> {
        let begun = Instant::now();
        let tokens = prompts.encode_chat(Engine::Vllm, body.as_bytes())?;
        Ok((begun.elapsed().as_secs_f64(), tokens))
    };
    for _ in 0..rounds {
        let fresh = Prompts::load(folder.path(), None)?;
        let (seconds, _) = timed(&fresh, &now)?;
        whole.push(seconds);
        let fresh = Prompts::load(folder.path(), None)?;
        timed(&fresh, &before)?;
        let (seconds, ours) = timed(&fresh, &now)?;
        next.push(seconds);
        if let Some(transformers) = &mut transformers {
            let (seconds, made) = transformers.render(&file)?;
            theirs.push(seconds);
            equal &= made == ours;
        }
    }
    let (whole, next) = (median(whole), median(next));
    figure::print("prompts", "next_turn_of_whole", next / whole, "<= 0.1");
    figure::note("prompts", "next_turn_ms", next * 1e3);
    figure::note("prompts", "whole_ms", whole * 1e3);
    if transformers.is_some() {
        anyhow::ensure!(equal, "transformers makes other tokens");
        figure::print("prompts", "next_turn_faster_than_transformers", median(theirs.clone()) / next, ">= 20");
        figure::note("prompts", "transformers_ms", median(theirs) * 1e3);
    }
    Ok(())
}

/// The requests of the agents' trace as conversations: each as the beginnings of its messages. What follows the part that a request shares with
/// an earlier one is a message.
fn requests(agents: &Path) -> anyhow::Result<Vec<Vec<Beginning>>> {
    let text = std::fs::read_to_string(agents).with_context(|| format!("{} cannot be read", agents.display()))?;
    let mut all: Vec<Vec<Beginning>> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let numbers: Vec<i64> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let [_, parent, shared, new] = numbers[..] else { anyhow::bail!("{line:?} has no four numbers") };
        let shared_bytes = shared as u64 * BLOCK_BYTES;
        let of_parent = usize::try_from(parent).ok().and_then(|parent| all.get(parent));
        let shares = of_parent.into_iter().flatten().take_while(|beginning| beginning.bytes <= shared_bytes);
        let mut messages: Vec<Beginning> = shares.copied().collect();
        let bytes = shared_bytes + new as u64 * BLOCK_BYTES;
        if messages.last().is_none_or(|last| last.bytes < bytes) {
            let name = (all.len() as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            messages.push(Beginning { name, bytes });
        }
        all.push(messages);
    }
    Ok(all)
}

/// Eight workers whose template nobody can render, and which send no events.
async fn conversations(agents: &Path) -> anyhow::Result<()> {
    let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
    let specs: Vec<WorkerSpec> =
        (0..WORKERS).map(|at| WorkerSpec::new(&format!("w{at}"), &format!("http://w{at}:1"), "m")).collect();
    fleet.set_workers(&specs);
    let router = Router::new(Arc::clone(&fleet), PlaceOptions::default());
    let mut had: Vec<std::collections::HashSet<u64>> = vec![Default::default(); WORKERS];
    let (mut go_on, mut right, mut messages, mut used) = (0, 0, 0, std::collections::BTreeSet::new());
    for request in requests(agents)? {
        let longest = |had: &std::collections::HashSet<u64>| {
            let known = request.iter().rev().find(|beginning| had.contains(&beginning.name));
            known.map_or(0, |beginning| beginning.bytes)
        };
        let most = had.iter().map(longest).max().unwrap_or(0);
        let tokens = request.last().map_or(1, |last| last.bytes / 4);
        let asked = Asked { model: "m".into(), tokens, messages: request.clone().into(), ..Asked::default() };
        let placed = router.place(&asked, &[]).await?;
        let at = placed.worker.number;
        let Some(there) = had.get_mut(at) else { continue };
        if most > 0 {
            go_on += 1;
            right += u64::from(longest(there) == most);
        }
        messages += request.len();
        used.insert(at);
        there.extend(request.iter().map(|beginning| beginning.name));
    }
    anyhow::ensure!(used.len() == WORKERS, "all workers have conversations: {used:?}");
    figure::print("prompts", "conversations_go_on", right as f64 / go_on as f64, ">= 0.95");
    figure::note("prompts", "conversations_that_go_on", go_on as f64);
    figure::note("prompts", "messages", messages as f64);
    figure::print("prompts", "bytes_a_message", Conversations::BYTES_A_MESSAGE as f64, "<= 32");
    Ok(())
}
