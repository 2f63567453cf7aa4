//! The router's listener: connections within a bound, each with a limit on how long it may take to say what it wants.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router as Routes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::caps;

/// Connections of clients at once: each may need another one to a worker, and events and nodes need theirs.
fn connections_max() -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let of_clients = descriptors.saturating_sub(descriptors / 4) / 2;
    usize::try_from(of_clients).unwrap_or(usize::MAX).clamp(1, caps::CONNECTIONS_MAX)
}

/// Serves until `stop` turns true; answers under way are finished, within [`caps::CLOSE_WITHIN`].
/// `is_idle`: nothing is under way: whoever did not finish to ask is not waited for.
pub(super) async fn serve(
    listener: TcpListener,
    routes: Routes,
    mut stop: watch::Receiver<bool>,
    is_idle: impl Fn() -> bool,
) {
    let places = Arc::new(Semaphore::new(connections_max()));
    let open = GracefulShutdown::new();
    let mut builder = http1::Builder::new();
    // Of a stream's short pieces, a copy that is written at once costs about what a write of three parts does (benches/RESULTS.md).
    builder.timer(TokioTimer::new()).header_read_timeout(caps::HEADER_WITHIN).writev(false);
    loop {
        // Who finds no place waits in the kernel's queue.
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            accepted = accepted => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Of one connection, or there are no descriptors left: others may end meanwhile.
                tracing::debug!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        // Pieces of an answer are small, and are waited for.
        let _ = stream.set_nodelay(true);
        let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes.clone()));
        let connection = open.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a client's connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    let quiet = async {
        let mut since = Instant::now();
        while since.elapsed() < caps::QUIET_WITHIN {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if !is_idle() {
                since = Instant::now();
            }
        }
    };
    tokio::select! {
        () = open.shutdown() => {}
        () = quiet => tracing::info!("nothing is under way; connections that ask for nothing are closed"),
        () = tokio::time::sleep(caps::CLOSE_WITHIN) => {
            tracing::warn!("answers under way did not end in time, and are cut off");
        }
    }
}
