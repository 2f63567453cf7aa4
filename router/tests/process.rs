//! The `kvstore-router` binary as an operator meets it: help, version, health, signals, exit codes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvstore-router"));
    command.env_remove("KVSTORE_ROUTER").env_remove("KVSTORE_ROUTER_LOG").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    binary().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A router in front of one worker that does not exist.
struct Router {
    child: Child,
    /// Open as long as it runs: it may say more.
    _output: BufReader<ChildStdout>,
    port: u16,
}

impl Router {
    fn start() -> Self {
        Self::start_with(&["--worker", "id=a,url=http://127.0.0.1:1,model=m"])
    }

    fn start_with(arguments: &[&str]) -> Self {
        // It says which port it got: one that is asked for beforehand could be somebody else's by then.
        let mut child = binary()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        output.read_line(&mut said).unwrap();
        let port = said.trim().rsplit(':').next().and_then(|port| port.parse().ok()).expect(&said);
        let router = Self { child, _output: output, port };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the router does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        router
    }

    fn get(&self, path: &str) -> String {
        self.ask("GET", path, "")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close");
        write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Sends SIGTERM. The exit code, within 20 s.
    fn terminate(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the router goes on after SIGTERM");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_and_version_are_answered() {
    let help = run(&["--help"]);
    assert!(help.status.success(), "{help:?}");
    for command in ["serve", "explain", "workers", "completions"] {
        assert!(text(&help.stdout).contains(command), "{command} is missing in {}", text(&help.stdout));
        let help = run(&[command, "--help"]);
        assert!(help.status.success() && text(&help.stdout).contains("Example"), "{command}: {help:?}");
    }
    let version = run(&["--version"]);
    assert_eq!(text(&version.stdout).trim(), format!("kvstore-router {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn it_answers_for_its_health_and_stops_in_order() {
    let router = Router::start();
    let health = router.get("/health");
    assert!(health.starts_with("HTTP/1.1 200") && health.ends_with(r#"{"status":"ok"}"#), "{health}");
    assert!(router.get("/metrics").contains("kvstore_router_"), "no metrics");
    assert!(router.get("/v1/models").contains(r#""id":"m""#), "the worker's model is not listed");
    let address = format!("http://127.0.0.1:{}", router.port);
    let workers = run(&["workers", "--address", &address, "--json"]);
    assert!(workers.status.success() && text(&workers.stdout).contains("http://127.0.0.1:1"), "{workers:?}");
    assert_eq!(router.terminate(), Some(0));
}

/// A prompt has the special tokens that its request asks for: texts have them unless it says otherwise, conversations do not.
#[test]
fn special_tokens_are_there_as_the_request_asks() {
    let folder = tempfile::tempdir().unwrap();
    let start = r#"{"SpecialToken": {"id": "<s>", "type_id": 0}}"#;
    let tokenizer = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "<s>": 1, "hello": 2}, "unk_token": "[UNK]"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": [START, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [START, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}}"#;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.replace("START", start)).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let config = folder.path().join("router.toml");
    let model = format!("[[models]]\nname = \"m\"\ntokenizer = {:?}\n", folder.path());
    let worker = "[[workers]]\nid = \"a\"\nurl = \"http://127.0.0.1:1\"\nmodel = \"m\"\nblock_tokens = 1\n";
    std::fs::write(&config, format!("{model}{worker}")).unwrap();
    let router = Router::start_with(&["--config", config.to_str().unwrap()]);
    let count = |prompt: &str, more: &str| {
        let answer = router.ask("POST", "/explain", &format!("{{\"model\": \"m\", {prompt}{more}}}"));
        let explained: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(explained["tokens_known"], true, "{explained}");
        explained["prompt_tokens"].as_u64().unwrap()
    };
    let (text, chat) =
        ("\"prompt\": \"hello hello\"", "\"messages\": [{\"role\": \"user\", \"content\": \"hello hello\"}]");
    let (with, without) = (", \"add_special_tokens\": true", ", \"add_special_tokens\": false");
    assert_eq!([count(text, ""), count(text, with), count(text, without)], [3, 3, 2]);
    assert_eq!([count(chat, ""), count(chat, with), count(chat, without)], [2, 3, 2]);
}

/// What cannot be read or reached at the start costs that thing alone, and is said by name.
#[test]
fn a_start_holds_whatever_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
    };
    let words = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "hello": 1}, "unk_token": "[UNK]"}, "pre_tokenizer": {"type": "Whitespace"}}"#;
    file("damaged/tokenizer.json", &words[..60]);
    file("template/tokenizer.json", words);
    file("template/chat_template.jinja", "{% for message in %}");
    let models: String = ["missing", "damaged", "template"]
        .map(|name| format!("[[models]]\nname = {name:?}\ntokenizer = {:?}\n", folder.path().join(name)))
        .concat();
    let workers: String = ["missing", "damaged", "template"]
        .map(|model| format!("[[workers]]\nid = \"{model}-worker\"\nurl = \"http://127.0.0.1:1\"\nmodel = {model:?}\nevents = \"tcp://127.0.0.1:1\"\nnode = \"http://127.0.0.1:1\"\nblock_tokens = 1\n"))
        .concat();
    file("router.toml", &format!("{models}{workers}"));
    let router = Router::start_with(&["--config", folder.path().join("router.toml").to_str().unwrap()]);
    let address = format!("http://127.0.0.1:{}", router.port);
    let shown = |needed: &str| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let shown = text(&run(&["workers", "--address", &address]).stdout);
            if shown.contains(needed) {
                return shown;
            }
            assert!(Instant::now() < deadline, "{needed} is missing in {shown}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    shown("missing-worker: model \"missing\": its tokenizer cannot be used");
    shown("damaged-worker: model \"damaged\": its tokenizer cannot be used");
    shown("template-worker: model \"template\": its chat template cannot be used");
    shown("no events from tcp://127.0.0.1:1: ");
    shown("the node http://127.0.0.1:1 does not answer");
    shown("away");
    let deadline = Instant::now() + Duration::from_secs(60);
    for figure in ["models_without_tokens 3", "workers_without_events 3", "nodes_away 1", "workers_up 0"] {
        // Each worker is tried by itself.
        loop {
            let metrics = router.get("/metrics");
            if metrics.contains(&format!("kvstore_router_{figure}\n")) {
                break;
            }
            assert!(Instant::now() < deadline, "{figure} is missing in {metrics}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // Texts of a model whose template is broken are read all the same.
    let explained = text(&run(&["explain", "hello hello", "--model", "template", "--address", &address]).stdout);
    assert!(
        explained.contains("2 tokens, model template") && explained.contains("no worker for the model"),
        "{explained}"
    );
    assert_eq!(router.terminate(), Some(0));
}

/// A client that never finished to ask kept the router from ending for half a minute.
#[test]
fn who_never_finished_to_ask_is_not_waited_for() {
    let router = Router::start();
    let mut stuck = Vec::new();
    for half in
        ["GET /version HTTP/1.1\r\nho", "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"]
    {
        let mut stream = TcpStream::connect(("127.0.0.1", router.port)).unwrap();
        stream.write_all(half.as_bytes()).unwrap();
        stuck.push(stream);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(router.terminate(), Some(0), "within 20 s");
}

/// `kvstore-router completions bash | head -1` ended with a panic.
#[test]
fn a_reader_that_has_enough_ends_a_command_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = binary().args(["completions", "bash"]).stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(141), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn mistakes_are_named() {
    let refused = run(&["serve", "--worker", "id=a"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(text(&refused.stderr).contains("url"), "{refused:?}");
    let level = run(&["serve", "--log", "loud", "--worker", "id=a,url=http://127.0.0.1:1,model=m"]);
    assert!(!level.status.success() && text(&level.stderr).contains("\"loud\" is not a level"), "{level:?}");
    let nobody = run(&["workers", "--address", "http://127.0.0.1:1"]);
    assert!(!nobody.status.success() && text(&nobody.stderr).contains("127.0.0.1:1"), "{nobody:?}");
}
