//! `kvstore-router`: sends requests to the worker that is expected to answer first.

#![forbid(unsafe_code)]
#![expect(
    clippy::indexing_slicing,
    reason = "of JSON: what an answer lacks is null, and what is written to are objects that are made here"
)]

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use comfy_table::{Table, presets};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use kvstore_router::config::{Config, HashName, ModelConfig};
use kvstore_router::discovery::{self, Discovery};
use kvstore_router::fleet::{Fleet, WorkerSpec};
use kvstore_router::place::Router;
use kvstore_router::serve::App;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Sends each LLM request to the worker that is expected to answer first: the router weighs each worker's queue, the blocks of the prompt that it has
/// or can fetch, and the tokens that it must compute.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve OpenAI's API in front of workers.
    #[command(
        after_help = "Examples:\n  kvstore-router serve --worker id=a,url=http://10.0.0.1:8000,model=llama,events=tcp://10.0.0.1:5557,node=http://10.0.0.1:7411\n  kvstore-router serve --config router.toml"
    )]
    Serve(Serve),
    /// Show what a request would cost at each worker, and which worker it would go to. The request is not sent.
    #[command(
        after_help = "Examples:\n  kvstore-router explain 'Once upon a time'\n  kvstore-router explain --chat 'Hello' --model llama\n  kvstore-router explain --tokens 1,2,3 --json\n  kvstore-router explain - < prompt.txt"
    )]
    Explain(Explain),
    /// List the workers, their load, and what the router has learnt about them.
    #[command(after_help = "Example:\n  kvstore-router workers --address http://10.0.0.9:8088")]
    Workers(Address),
    /// Print a completion script for a shell.
    #[command(
        visible_alias = "completion",
        after_help = "Example:\n  kvstore-router completions bash > /etc/bash_completion.d/kvstore-router"
    )]
    Completions {
        /// The shell to write the script for.
        shell: clap_complete::Shell,
    },
}

#[derive(clap::Args)]
struct Serve {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Listen on this address [default: 127.0.0.1:8088].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Add a worker: id=..,url=..,model=..[,events=..][,replay=..][,node=..][,role=both|prefill|decode|encode][,ranks=..][,block_tokens=..][,engine=vllm|sglang]. Repeat the option for more workers.
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = worker_of)]
    worker: Vec<WorkerSpec>,
    /// Read more workers from this TOML file, and read it again whenever it changes.
    #[arg(long, value_name = "FILE")]
    workers_file: Option<PathBuf>,
    /// How the engines name blocks: sha256_cbor, or engine for any other hash [default: sha256_cbor].
    #[arg(long)]
    hash: Option<HashName>,
    /// Load a model's tokenizer from a folder: MODEL=FOLDER. Repeat the option for more models.
    #[arg(long, value_name = "MODEL=FOLDER", value_parser = tokenizer_of)]
    tokenizer: Vec<ModelConfig>,
    /// The URL of another replica of this router. This router counts the requests under way there, too. Repeat the option for more replicas.
    #[arg(long, value_name = "URL")]
    peer: Vec<String>,
    /// What to log: error, warn, info, debug, or a tracing filter.
    #[arg(long, default_value = "info", env = "KVSTORE_ROUTER_LOG")]
    log: String,
}

#[derive(clap::Args)]
struct Address {
    /// The URL of the router.
    #[arg(long, default_value = "http://127.0.0.1:8088", env = "KVSTORE_ROUTER")]
    address: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Explain {
    /// The prompt. Give - to read it from standard input.
    #[arg(required_unless_present = "tokens")]
    prompt: Option<String>,
    /// Give the prompt as token ids, separated by commas.
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    tokens: Vec<u32>,
    /// Treat the prompt as a user's message in a conversation.
    #[arg(long)]
    chat: bool,
    /// The model [default: the only model that the router serves].
    #[arg(long)]
    model: Option<String>,
    /// The session that the request belongs to.
    #[arg(long)]
    session: Option<String>,
    #[command(flatten)]
    to: Address,
}

fn worker_of(text: &str) -> Result<WorkerSpec, String> {
    let mut fields = serde_json::Map::new();
    for field in text.split(',') {
        let (key, value) = field.split_once('=').ok_or_else(|| format!("{field:?} is not key=value"))?;
        let value = match key {
            "ranks" | "first_rank" | "block_tokens" => {
                json!(value.parse::<u32>().map_err(|error| format!("{key}: {error}"))?)
            }
            _ => json!(value),
        };
        if fields.insert(key.to_owned(), value).is_some() {
            return Err(format!("{key} is given twice"));
        }
    }
    let spec: WorkerSpec = serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    spec.check()?;
    Ok(spec)
}

fn tokenizer_of(text: &str) -> Result<ModelConfig, String> {
    let (name, path) = text.split_once('=').ok_or("the value is not MODEL=FOLDER")?;
    Ok(ModelConfig::new(name, path))
}

impl Serve {
    fn config(self) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        config.listen = self.listen.unwrap_or(config.listen);
        config.workers.extend(self.worker);
        config.workers_file = self.workers_file.or(config.workers_file);
        config.hash = self.hash.unwrap_or(config.hash);
        config.models.extend(self.tokenizer);
        config.peers.extend(self.peer);
        config.check()?;
        Ok(config)
    }

    async fn run(self) -> anyhow::Result<()> {
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log).context("--log is not a valid filter")?;
        if let Some(word) = kvstore_router::config::unknown_level(&self.log) {
            anyhow::bail!(
                "--log: {word:?} is not a level; use error, warn, info, debug, trace or off, or a filter such as \
                 \"info,kvstore_router=debug\""
            );
        }
        let colours = std::io::stderr().is_terminal();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
        let config = self.config()?;
        raise_descriptors();
        let fleet = Fleet::new(config.hashing()?, config.fleet_options());
        let router = Router::new(Arc::clone(&fleet), config.place_options());
        let app = App::new(router, config.load_models(), config.serve_options());
        let listener = tokio::net::TcpListener::bind(config.listen).await;
        let listener = listener
            .with_context(|| format!("cannot listen on {} (choose another address with --listen)", config.listen))?;
        tracing::info!(address = %listener.local_addr()?, "serving");
        say(&format!("kvstore-router serves OpenAI's API on http://{}", listener.local_addr()?))?;
        let (stop, stopping) = watch::channel(false);
        let following = tokio::spawn(follow(fleet, config));
        tokio::spawn(async move {
            let (Ok(mut terminate), Ok(mut interrupt)) =
                (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
            else {
                return;
            };
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            let within = kvstore_router::caps::CLOSE_WITHIN.as_secs();
            tracing::info!(
                "the router is stopping; it finishes the answers under way first, for {within} s at most (a second signal ends it at once)"
            );
            let _ = stop.send(true);
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("a second signal: answers under way are cut off");
            std::process::exit(130);
        });
        app.serve(listener, stopping).await;
        following.abort();
        Ok(())
    }
}

/// A connection takes a descriptor, and often another one to a worker: as many as the system allows.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit on descriptors cannot be raised");
    }
}

/// The workers are those of the configuration, and those of its file as it changes.
async fn follow(fleet: Arc<Fleet>, config: Config) {
    let fixed = config.workers;
    let mut source: Box<dyn Discovery> = match config.workers_file {
        Some(path) => {
            if !path.exists() {
                tracing::warn!(path = %path.display(), "the workers file does not exist; the router reads it once it does");
            }
            fleet.set_workers(&fixed);
            Box::new(discovery::File::new(path))
        }
        None => Box::new(discovery::Static::new(Vec::new())),
    };
    loop {
        let mut all = source.next().await;
        all.extend(fixed.iter().cloned());
        match discovery::check(&all) {
            Ok(()) => fleet.set_workers(&all),
            Err(problem) => {
                tracing::error!(problem, "the list of workers is not valid, so the router keeps the previous list")
            }
        }
    }
}

async fn ask(address: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    let client: Client<_, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let url = format!("{}{path}", address.trim_end_matches('/'));
    let is_http = url.parse::<http::Uri>().is_ok_and(|url| url.scheme_str() == Some("http") && url.host().is_some());
    anyhow::ensure!(is_http, "--address: {address:?} is not an HTTP URL; use http://host:port");
    let bytes = body.map(|body| bytes::Bytes::from(body.to_string())).unwrap_or_default();
    let request = http::Request::builder()
        .method(if body.is_some() { "POST" } else { "GET" })
        .uri(&url)
        .header("content-type", "application/json")
        .body(Full::new(bytes))?;
    let answer = tokio::time::timeout(Duration::from_secs(10), client.request(request)).await;
    let answer = answer.context("the router did not answer within 10 s")?.with_context(|| {
        format!("no router answers at {address}; start one with `kvstore-router serve`, or give its URL with --address")
    })?;
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    let value: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("{url} is not a router: it answered {status}"))?;
    match value["error"]["message"].as_str() {
        Some(error) => anyhow::bail!("{error}"),
        None => Ok(value),
    }
}

/// The model of a router that serves one.
async fn only_model(address: &str) -> anyhow::Result<String> {
    let models = ask(address, "/v1/models", None).await?;
    let all: Vec<&str> =
        models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str()).collect();
    match all.as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => anyhow::bail!("the router has no workers yet"),
        several => {
            anyhow::bail!("the router serves several models; choose one with --model: {}", several.join(", "))
        }
    }
}

/// Prints a line. Whoever reads it may have enough: that ends the command quietly.
fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    out.flush()
}

fn print_table(header: &[&str], rows: Vec<Vec<String>>) -> std::io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.iter().copied());
    rows.into_iter().for_each(|row| _ = table.add_row(row));
    say(&table.to_string())
}

fn seconds(value: &Value) -> String {
    let seconds = value.as_f64().unwrap_or(0.0);
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

impl Explain {
    async fn run(self) -> anyhow::Result<()> {
        let model = match self.model {
            Some(model) => model,
            None => only_model(&self.to.address).await?,
        };
        let mut body = json!({"model": model});
        let text = match self.prompt.as_deref() {
            Some("-") => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                Some(text)
            }
            text => text.map(str::to_owned),
        };
        match text {
            Some(text) if self.chat => body["messages"] = json!([{"role": "user", "content": text}]),
            Some(text) => body["prompt"] = json!(text),
            None => body["prompt"] = json!(self.tokens),
        }
        if let Some(session) = self.session {
            body["user"] = json!(session);
        }
        let explained = ask(&self.to.address, "/explain", Some(&body)).await?;
        if self.to.json {
            return Ok(say(&serde_json::to_string_pretty(&explained)?)?);
        }
        let known = explained["tokens_known"].as_bool().unwrap_or(false);
        let about = if known {
            ""
        } else {
            " (the router goes by load: the prompt has no whole block, or the router does not know the tokens of a block, for which see block_tokens, or the model's tokenizer)"
        };
        say(&format!(
            "{} tokens{about}, model {}",
            explained["prompt_tokens"],
            explained["model"].as_str().unwrap_or_default()
        ))?;
        let row = |worker: &Value| {
            vec![
                if worker["chosen"] == true { "->".into() } else { String::new() },
                worker["worker"].as_str().unwrap_or_default().to_owned(),
                seconds(&worker["expected_seconds"]),
                seconds(&worker["queue_seconds"]),
                seconds(&worker["prefill_seconds"]),
                seconds(&worker["fetch_seconds"]),
                worker["engine_tokens"].to_string(),
                worker["fetched_tokens"].to_string(),
                worker["tokens_to_compute"].to_string(),
                worker["requests"].to_string(),
            ]
        };
        let rows = explained["workers"].as_array().into_iter().flatten().map(row).collect();
        let header = [
            "",
            "worker",
            "expected",
            "= queue",
            "+ prefill",
            "+ fetch",
            "in engine",
            "fetched",
            "computed",
            "requests",
        ];
        print_table(&header, rows)?;
        Ok(say(explained["why"].as_str().unwrap_or_default())?)
    }
}

async fn show_workers(to: Address) -> anyhow::Result<()> {
    let workers = ask(&to.address, "/workers", None).await?;
    if to.json {
        return Ok(say(&serde_json::to_string_pretty(&workers)?)?);
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let row = |worker: &Value| {
        let learnt = worker["requests_learnt_from"].as_u64().unwrap_or(0);
        let rate = match learnt {
            0 => "-".to_owned(),
            _ => format!("{:.0}/s", worker["prefill_tokens_per_second"].as_f64().unwrap_or(0.0)),
        };
        vec![
            text(&worker["id"]),
            text(&worker["model"]),
            text(&worker["role"]),
            if worker["up"] == true { "up".into() } else { "away".into() },
            worker["load"]["prefilling"].to_string(),
            worker["load"]["decoding"].to_string(),
            rate,
            worker["event_messages"].to_string(),
            text(&worker["node"]),
        ]
    };
    let rows = workers.as_array().into_iter().flatten().map(row).collect();
    print_table(
        &["worker", "model", "role", "state", "prefilling", "decoding", "prompt tokens", "events", "node"],
        rows,
    )?;
    for worker in workers.as_array().into_iter().flatten() {
        for problem in worker["problems"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            say(&format!("{}: {problem}", text(&worker["id"])))?;
        }
    }
    Ok(())
}

/// Events come and go as small pieces by the hundred thousand a second: the C library's allocator, once its memory is in pieces, takes as long
/// to take one back as the index to apply it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let run = || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Runtime::new()?;
        match Arguments::parse().command {
            Command::Serve(serve) => runtime.block_on(serve.run()),
            Command::Explain(explain) => runtime.block_on(explain.run()),
            Command::Workers(to) => runtime.block_on(show_workers(to)),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Arguments::command(), "kvstore-router", &mut script);
                Ok(std::io::stdout().write_all(&script)?)
            }
        }
    };
    let is_pipe = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // `kvstore-router completions bash | head -1`: the exit status of SIGPIPE, as other programs have it.
        Err(error) if error.downcast_ref().is_some_and(is_pipe) => ExitCode::from(141),
        Err(error) => {
            eprintln!("kvstore-router: {error:#}");
            ExitCode::FAILURE
        }
    }
}
