//! `serve`: starts a daemon from its configuration, runs it, and shuts it down. Embedded daemons use it, too.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kvstore_tiers::claim::Claim;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::daemon::Daemon;
use crate::descriptors::Shares;
use crate::publisher::Publisher;
use crate::sources::Sources;
use crate::{caps, descriptors, http, listeners, local, log, publisher, status, tick};

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
    /// The right to its sockets. Let go after all else: fields are dropped in order.
    _claims: Vec<Claim>,
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
    let log = log::start_logging(&config.log_level, config.log_format);
    status::metrics::start();
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
    let shares = descriptors::share(&config);
    let Listening { addresses, plane, claims } = listen(&daemon, &mut tasks, &stopping, &shares).await?;
    let http = match config.http {
        Some(address) => Some(serve_http(&daemon, address, shares.http, &mut tasks, &stopping).await?),
        None => None,
    };
    let publisher = match &config.publisher {
        Some(publisher) => Some(publisher::start(&daemon, publisher, shares.publisher).await?),
        None => None,
    };
    for endpoint in publisher.iter().flat_map(|publisher| &publisher.endpoints) {
        tracing::info!(endpoint, "publishing events");
    }
    tokio::spawn(tick::tick_forever(Arc::clone(&daemon)));
    tokio::spawn(Arc::clone(&daemon.stack).write_back_forever());
    if daemon.object.is_some() {
        tokio::spawn(crate::verbs::collect::collect_forever(Arc::clone(&daemon)));
    }
    crate::verbs::prewarm::prewarm_configured(&daemon);
    Ok(Running { daemon, addresses, http, stop, tasks, plane: Some(plane), publisher, _claims: claims })
}

/// The listeners of a daemon, which are served.
struct Listening {
    addresses: Vec<String>,
    plane: local::Plane,
    claims: Vec<Claim>,
}

/// Binds all listeners, and then serves them: where one cannot be had, nobody has been served.
async fn listen(
    daemon: &Arc<Daemon>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stopping: &watch::Receiver<bool>,
    shares: &Shares,
) -> anyhow::Result<Listening> {
    let config = daemon.config();
    let (mut planes, mut claims, mut bound) = (Vec::new(), Vec::new(), Vec::new());
    for listener in &config.listeners {
        let mut one = listeners::bind(listener, config.local_plane).await?;
        if let Some(plane) = one.plane.take() {
            planes.push((plane, one.caller(daemon)?));
        }
        claims.extend(one.claim.take());
        bound.push(one);
    }
    let plane = local::start(daemon, planes, shares.local_peers).context("cannot start the local plane")?;
    let mut addresses = Vec::new();
    for (one, listener) in bound.into_iter().zip(&config.listeners) {
        tracing::info!(address = one.address, namespace = listener.namespace, "listening");
        addresses.push(one.address.clone());
        tasks.spawn(listeners::serve(Arc::clone(daemon), one, shares.connections, stopping.clone()));
    }
    Ok(Listening { addresses, plane, claims })
}

async fn serve_http(
    daemon: &Arc<Daemon>,
    address: SocketAddr,
    places: usize,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stopping: &watch::Receiver<bool>,
) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot serve metrics on {address} (choose another address with --set http.address=127.0.0.1:0, or turn them off with --set http.address=off)")
    })?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "serving metrics and health");
    let (daemon, stopping) = (Arc::clone(daemon), stopping.clone());
    tasks.spawn(async move { Ok(http::serve(daemon, listener, places, stopping).await?) });
    Ok(address)
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
        if !matches!(tokio::time::timeout(VOLUMES_CLOSE_WITHIN, closed).await, Ok(Ok(()))) {
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
