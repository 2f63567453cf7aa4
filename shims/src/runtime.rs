//! The runtimes that calls run on: one of each kind a process, made with the first call; a child of a fork makes its own.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use kvstore_client::Error;
use pyo3::prelude::*;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::errors::Fault;

/// Threads of it: calls wait, copies run on the caller's thread.
const THREADS: usize = 2;

struct Own {
    process: u32,
    runtime: Runtime,
}

/// A runtime of this process.
pub struct Kind {
    own: ArcSwapOption<Own>,
    name: &'static str,
    /// Threads that may wait.
    waiting: usize,
}

/// Calls to the daemon. Loads into an engine's pages wait on threads of their own: as many as there are.
pub static CALLS: Kind = Kind { own: ArcSwapOption::const_empty(), name: "kvstore-python", waiting: 512 };
/// Snapshots. Each thread that reads, hashes or writes chunks keeps freed memory of some chunks: few threads, little memory.
pub static SNAPSHOTS: Kind = Kind { own: ArcSwapOption::const_empty(), name: "kvstore-chunks", waiting: 4 };

fn own(kind: &Kind) -> Result<Arc<Own>, Error> {
    let process = std::process::id();
    if let Some(own) = kind.own.load_full() {
        if own.process == process {
            return Ok(own);
        }
        // The parent's threads are not here; ending them would wait for ever.
        std::mem::forget(own);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name(kind.name)
        .max_blocking_threads(kind.waiting)
        .enable_all()
        .build()
        .map_err(|error| Error::Other(format!("the threads that run calls cannot be started: {error}")))?;
    let own = Arc::new(Own { process, runtime });
    // Two threads may come here at once: the second's is in force, the first's goes when its calls end.
    if let Some(old) = kind.own.swap(Some(Arc::clone(&own))) {
        std::mem::forget(old);
    }
    Ok(own)
}

/// Runs a call on this thread, without the GIL.
pub fn wait<T: Send>(py: Python<'_>, call: impl Future<Output = Result<T, Error>> + Send) -> Result<T, Error> {
    py.detach(|| own(&CALLS)?.runtime.block_on(call))
}

/// How often a call that takes long looks at signals, and tells how far it is.
const TELL_MS: u64 = 100;

/// Runs a call of snapshots on this thread, without the GIL but for a moment now and then: an interrupt ends it, and so does an error of `tell`.
pub fn wait_and_tell<T: Send, E: Into<Fault> + Send>(
    py: Python<'_>,
    call: impl Future<Output = Result<T, E>> + Send,
    tell: Option<&Bound<'_, PyAny>>,
) -> PyResult<T> {
    let mut call = Box::pin(call);
    let own = own(&SNAPSHOTS).map_err(crate::errors::raise)?;
    let tick = std::time::Duration::from_millis(TELL_MS);
    loop {
        let ended = py.detach(|| own.runtime.block_on(async { tokio::time::timeout(tick, &mut call).await }));
        if let Ok(ended) = ended {
            return ended.map_err(crate::errors::raise);
        }
        py.check_signals()?;
        if let Some(tell) = tell {
            tell.call0()?;
        }
    }
}

/// Runs a call on this thread, which has not the GIL.
pub fn block_on<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    own(&CALLS)?.runtime.block_on(call)
}

/// Runs `work` on a thread that may wait.
pub fn spawn_blocking(work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    drop(own(&CALLS)?.runtime.spawn_blocking(work));
    Ok(())
}

/// Starts a call on one of the runtimes: it goes on, whether or not anybody waits for it.
pub fn spawn_on<T: Send + 'static>(
    kind: &Kind,
    call: impl Future<Output = T> + Send + 'static,
) -> Result<JoinHandle<T>, Error> {
    Ok(own(kind)?.runtime.spawn(call))
}

/// Runs a call on the runtime; an asyncio future of its result. Cancelling the future cancels the call.
pub fn awaitable<'py, T: Send + 'static>(
    py: Python<'py>,
    call: impl Future<Output = Result<T, Error>> + Send + 'static,
    convert: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>> {
    awaitable_on(&CALLS, py, call, convert)
}

/// The same, on one of the runtimes.
pub fn awaitable_on<'py, T: Send + 'static, E: Into<Fault> + Send + 'static>(
    kind: &Kind,
    py: Python<'py>,
    call: impl Future<Output = Result<T, E>> + Send + 'static,
    convert: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>> {
    let event_loop = py.import("asyncio")?.call_method0("get_running_loop")?;
    let future = event_loop.call_method0("create_future")?;
    let (to_loop, to_future) = (event_loop.unbind(), future.clone().unbind());
    let own = own(kind).map_err(crate::errors::raise)?;
    let task = own.runtime.spawn(async move {
        let result = call.await;
        Python::attach(|py| {
            let outcome = result.map_err(crate::errors::raise).and_then(|value| convert(py, value));
            let set = py.import("kvstore").and_then(|module| module.getattr("_set_future"));
            let delivered = set.and_then(|set| {
                let arguments = match outcome {
                    Ok(value) => (set, to_future.bind(py), value, py.None()),
                    Err(error) => (set, to_future.bind(py), py.None(), error.into_value(py).into_any()),
                };
                to_loop.bind(py).call_method1("call_soon_threadsafe", arguments)
            });
            // A loop that was closed meanwhile has nobody who waits.
            drop(delivered);
        });
    });
    let abort = task.abort_handle();
    let on_done = pyo3::types::PyCFunction::new_closure(py, None, None, move |arguments, _| -> PyResult<()> {
        let cancelled = arguments.get_item(0)?.call_method0("cancelled")?.is_truthy()?;
        if cancelled {
            abort.abort();
        }
        Ok(())
    })?;
    future.call_method1("add_done_callback", (on_done,))?;
    Ok(future)
}
