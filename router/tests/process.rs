//! The `kvstore-router` binary as an operator meets it: help, version, health, signals, exit codes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
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
    port: u16,
}

impl Router {
    fn start() -> Self {
        Self::start_with(&["--worker", "id=a,url=http://127.0.0.1:1,model=m"])
    }

    fn start_with(arguments: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = binary()
            .args(["serve", "--listen", &format!("127.0.0.1:{port}")])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let router = Self { child, port };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the router does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        router
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
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
        let deadline = Instant::now() + Duration::from_secs(20);
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
    let metrics = router.get("/metrics");
    for figure in ["models_without_tokens 3", "workers_without_events 3", "nodes_away 1", "workers_up 0"] {
        assert!(metrics.contains(&format!("kvstore_router_{figure}\n")), "{figure} is missing in {metrics}");
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
