//! `serve`: starts a daemon from its configuration, runs it, and shuts it down. Embedded daemons use it, too.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::daemon::{Daemon, Sources};
use crate::publisher::Publisher;
use crate::{caps, http, local, publisher, server, telemetry};

/// A daemon that stops writes back this long at most: half of what Kubernetes gives a pod by default.
const WRITE_BACK_WITHIN: Duration = Duration::from_secs(15);
/// After the drain, connections that stay open get this much longer to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// Volumes have this long to write what is dirty, at most a quarter of the memory.
const VOLUMES_CLOSE_WITHIN: Duration = Duration::from_secs(60);

/// A daemon that serves.
pub struct Running {
    /// Its state.
    pub daemon: Arc<Daemon>,
    /// Its listeners, as clients name them.
    pub addresses: Vec<String>,
    /// Metrics and health.
    pub http: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
    plane: Option<local::Plane>,
    /// Events over ZeroMQ, where they are published.
    pub publisher: Option<Publisher>,
    /// Let go after all else: fields are dropped in order.
    _owned: Vec<server::Owned>,
}

/// How a daemon is started.
#[derive(Clone, Debug, Default)]
pub struct StartOptions {
    /// The configuration file.
    pub file: Option<PathBuf>,
    /// `KEY=VALUE` settings over it.
    pub settings: Vec<String>,
    /// Listeners instead of the configured ones.
    pub listen: Vec<String>,
}

/// Starts a daemon in this process.
pub async fn start(options: StartOptions) -> anyhow::Result<Running> {
    let mut sources =
        Sources { file: options.file, settings: options.settings, listen: options.listen, raw: Default::default() };
    sources.raw = sources.read()?;
    let config = sources.raw.check()?;
    let log = telemetry::start_logging(&config.log_level, config.log_format);
    telemetry::start_metrics();
    let opening = config.clone();
    let daemon = tokio::task::spawn_blocking(move || Daemon::new(opening, sources, log)).await??;
    if let Some(nvme) = &daemon.nvme {
        for volume in nvme.status().volumes {
            let path = volume.path.display();
            let (state, blocks, bytes_max) = (volume.state, volume.blocks, volume.bytes_max);
            tracing::info!(%path, state, blocks, bytes_max, "opened a volume");
        }
    }
    let (stop, stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut addresses = Vec::new();
    let (mut planes, mut owned) = (Vec::new(), Vec::new());
    let mut bound = Vec::new();
    for listener in &config.listeners {
        let mut one = server::bind(listener, config.local_plane).await?;
        if let Some(plane) = one.plane.take() {
            planes.push((plane, daemon.namespace(&listener.namespace).context("the namespace is not configured")?));
        }
        owned.extend(one.owned.take());
        bound.push(one);
    }
    let plane = local::start(&daemon, planes).context("cannot start the local plane")?;
    for (one, listener) in bound.into_iter().zip(&config.listeners) {
        tracing::info!(address = one.address, namespace = listener.namespace, "listening");
        addresses.push(one.address.clone());
        tasks.spawn(server::serve(Arc::clone(&daemon), one, stopping.clone()));
    }
    let mut http_address = None;
    if let Some(address) = config.http {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("cannot serve metrics on {address} (choose another address with --set http.address=127.0.0.1:0, or turn them off with --set http.address=off)")
        })?;
        http_address = Some(listener.local_addr()?);
        tracing::info!(address = %listener.local_addr()?, "serving metrics and health");
        let (daemon, stopping) = (Arc::clone(&daemon), stopping.clone());
        tasks.spawn(async move { Ok(http::serve(daemon, listener, stopping).await?) });
    }
    let publisher = match &config.publisher {
        Some(publisher) => Some(publisher::start(&daemon, publisher).await?),
        None => None,
    };
    for endpoint in publisher.iter().flat_map(|publisher| &publisher.endpoints) {
        tracing::info!(endpoint, "publishing events");
    }
    tokio::spawn(Arc::clone(&daemon).tick_forever());
    tokio::spawn(Arc::clone(&daemon.stack).write_back_forever());
    if daemon.object.is_some() {
        tokio::spawn(crate::verbs::collect::collect_forever(Arc::clone(&daemon)));
    }
    Ok(Running { daemon, addresses, http: http_address, stop, tasks, plane: Some(plane), publisher, _owned: owned })
}

impl Running {
    /// Drains, stops and waits. True when every call under way was finished.
    pub async fn shut_down(mut self) -> bool {
        let left = self.daemon.drain(self.daemon.config().drain_deadline).await;
        self.daemon.end_watches();
        let _ = self.stop.send(true);
        if let Some(plane) = self.plane.take() {
            // Joins a thread that is about to end.
            let _ = tokio::task::spawn_blocking(move || plane.stop()).await;
        }
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let closed = tokio::time::timeout(CLOSE_WITHIN, all).await.is_ok();
        if !closed {
            self.tasks.abort_all();
            while self.tasks.join_next().await.is_some() {}
        }
        self.daemon.stack.all_leaving(WRITE_BACK_WITHIN).await;
        if let Some(object) = &self.daemon.object {
            // Before the volumes: what is uploaded may have to be read from them.
            object.close(caps::UPLOADS_CLOSE_WITHIN).await;
        }
        self.close_volumes().await;
        left == 0
    }

    /// Writes what waits to be written, and lets go of the folders. A disk that hangs is not waited for.
    async fn close_volumes(&self) {
        let daemon = Arc::clone(&self.daemon);
        let (done, closed) = tokio::sync::oneshot::channel();
        // A thread of its own: the runtime waits at its end for those that it lends.
        std::thread::spawn(move || {
            daemon.nvme.iter().for_each(|nvme| nvme.close());
            let _ = done.send(());
        });
        if tokio::time::timeout(VOLUMES_CLOSE_WITHIN, closed).await.is_err() {
            tracing::error!(
                "a disk does not answer; the daemon stops without writing the blocks that still wait for it"
            );
        }
    }

    /// Serves until SIGTERM or SIGINT; SIGHUP reads the configuration again.
    pub async fn until_signalled(mut self) -> anyhow::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut hangup = signal(SignalKind::hangup())?;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => match self.daemon.reload() {
                    Ok(changes) => tracing::info!(changes = changes.len(), "the configuration was read again"),
                    Err(error) => tracing::error!(%error, "the configuration was not changed"),
                },
                Some(ended) = self.tasks.join_next() => {
                    return ended.context("a server panicked")?.context("a server ended");
                }
            }
        }
        let drained = self.shut_down().await;
        tracing::info!(drained, "the daemon stopped");
        Ok(())
    }
}
