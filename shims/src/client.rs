//! The client and its groups, as Python sees them. Each call comes twice: one waits, one is awaited.

use bytes::Bytes;
use kvstore_client::v1::{self, Level, PutStatus};
use kvstore_client::{Error, GetOptions, GetOutcome, GroupRef, Plane, PutOptions, PutSlice};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::buffer::Buffers;
use crate::errors::raise;
use crate::leases::{LeaseWindows, Leases};
use crate::pages::{self, Pages};
use crate::runtime::{awaitable, wait};

/// The bit of a look-up's residency that says Host.
const RESIDENT_IN_HOST: u32 = 2;

/// A connection to one daemon, in one namespace: that of the socket.
#[pyclass(frozen, module = "kvstore")]
pub struct Client {
    client: kvstore_client::Client,
}

/// A layer group of a registered layout: where blocks are put and got.
#[pyclass(frozen, module = "kvstore")]
pub struct Group {
    client: kvstore_client::Client,
    group: GroupRef,
    block_bytes: u64,
}

fn hash_of(hash: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    match hash.cast::<PyBytes>() {
        Ok(bytes) => Ok(Bytes::copy_from_slice(bytes.as_bytes())),
        Err(_) => Err(PyTypeError::new_err(format!("hashes: a hash must be bytes, not {}", hash.get_type().name()?))),
    }
}

fn hashes_of(hashes: &Bound<'_, PyAny>) -> PyResult<Vec<Bytes>> {
    if let Ok(list) = hashes.cast::<PyList>() {
        return list.iter().map(|hash| hash_of(&hash)).collect();
    }
    if let Ok(tuple) = hashes.cast::<PyTuple>() {
        return tuple.iter().map(|hash| hash_of(&hash)).collect();
    }
    if hashes.is_instance_of::<PyBytes>() {
        return Err(PyTypeError::new_err("hashes: give a sequence of hashes, not a single hash"));
    }
    hashes.try_iter()?.map(|hash| hash_of(&hash?)).collect()
}

pub fn seconds(name: &str, seconds: f64) -> PyResult<std::time::Duration> {
    let duration = std::time::Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| PyValueError::new_err(format!("{name}: {seconds} is not a positive time in seconds")))
}

fn level_of(level: &str) -> PyResult<Level> {
    match level {
        "memory" => Ok(Level::Memory),
        "local" => Ok(Level::Local),
        "durable" => Ok(Level::Durable),
        other => Err(PyValueError::new_err(format!(
            "level: {other:?} is not valid; use \"memory\", \"local\" or \"durable\""
        ))),
    }
}

fn status_name(status: PutStatus) -> &'static str {
    match status {
        PutStatus::Stored => "stored",
        PutStatus::Present => "present",
        PutStatus::Joined => "joined",
        PutStatus::Busy => "busy",
        PutStatus::Superseded => "superseded",
        PutStatus::Unspecified => "unknown",
    }
}

fn level_name(level: Level) -> Option<&'static str> {
    match level {
        Level::Memory => Some("memory"),
        Level::Local => Some("local"),
        Level::Durable => Some("durable"),
        Level::Unspecified => None,
    }
}

fn results(results: &[v1::PutResult]) -> Vec<(&'static str, Option<&'static str>)> {
    results.iter().map(|result| (status_name(result.status()), level_name(result.level()))).collect()
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (address, plane, deadline))]
    fn new(py: Python<'_>, address: &str, plane: &str, deadline: f64) -> PyResult<Self> {
        let plane = match plane {
            "auto" => Plane::Auto,
            "local" => Plane::Local,
            "grpc" => Plane::Grpc,
            other => {
                return Err(PyValueError::new_err(format!(
                    "plane: {other:?} is not valid; use \"auto\", \"local\" or \"grpc\""
                )));
            }
        };
        let deadline = seconds("deadline", deadline)?;
        let client = wait(py, kvstore_client::Client::connect_over(address, plane)).map_err(raise)?;
        Ok(Self { client: client.with_deadline(deadline) })
    }

    #[getter]
    fn is_local(&self, py: Python<'_>) -> bool {
        py.detach(|| self.client.is_local())
    }

    /// Groups are (kind, window_tokens, layers, planes, heads, head_bytes, order).
    #[pyo3(signature = (model, weights_digest, dtype, block_tokens, groups, shard, extra))]
    #[expect(clippy::too_many_arguments, reason = "a layout's fields; callers use kvstore.Client.register_layout")]
    fn register(
        &self,
        py: Python<'_>,
        model: Vec<u8>,
        weights_digest: Vec<u8>,
        dtype: String,
        block_tokens: u32,
        groups: Vec<(i32, u32, u32, u32, u32, u32, i32)>,
        shard: (u32, u32),
        extra: Vec<u8>,
    ) -> PyResult<(Py<PyBytes>, Vec<Group>, bool)> {
        let group = |(kind, window_tokens, layers, planes, heads, head_bytes, order)| v1::LayerGroup {
            kind,
            window_tokens,
            layers,
            planes,
            heads,
            head_bytes,
            order,
        };
        let layout = v1::Layout {
            model: model.into(),
            weights_digest: weights_digest.into(),
            dtype,
            block_tokens,
            groups: groups.into_iter().map(group).collect(),
            shard: Some(v1::Shard { index: shard.0, count: shard.1 }),
            extra: extra.into(),
        };
        let registered = wait(py, self.client.register_layout(layout)).map_err(raise)?;
        let groups = (0..).zip(&registered.block_bytes).map(|(number, block_bytes)| Group {
            client: self.client.clone(),
            group: registered.group(number),
            block_bytes: *block_bytes,
        });
        Ok((PyBytes::new(py, &registered.digest).unbind(), groups.collect(), registered.wants_tokens))
    }

    /// Says how far a prefix can be used in all of `groups` (if empty, in all groups of the layout), and on request in all shards. Returns (blocks,
    /// blocks in memory, ticket, whether the object store is being searched for more). A ticket holds the blocks for `hold` seconds.
    #[expect(clippy::too_many_arguments, reason = "a request's fields; callers use kvstore.Layout.lookup")]
    #[pyo3(signature = (digest, groups, hashes, all_shards, hold, search_wait))]
    fn lookup(
        &self,
        py: Python<'_>,
        digest: Vec<u8>,
        groups: Vec<u32>,
        hashes: &Bound<'_, PyAny>,
        all_shards: bool,
        hold: f64,
        search_wait: f64,
    ) -> PyResult<(u32, usize, Option<Py<PyBytes>>, bool)> {
        let ticket_ttl_ms = if hold == 0.0 { 0 } else { seconds("hold", hold)?.as_millis() as u32 };
        let request = v1::LookupRequest {
            layout_digest: digest.into(),
            groups,
            sequence_hashes: hashes_of(hashes)?,
            all_shards,
            ticket_ttl_ms,
            search_wait_ms: if search_wait == 0.0 {
                0
            } else {
                seconds("search_wait", search_wait)?.as_millis() as u32
            },
        };
        let found = wait(py, self.client.lookup(request)).map_err(raise)?;
        let in_host = |tiers: &&u32| **tiers & RESIDENT_IN_HOST != 0;
        let in_memory = found.residency.iter().take(found.readable_blocks as usize).take_while(in_host).count();
        let ticket = (!found.ticket.is_empty()).then(|| PyBytes::new(py, &found.ticket).unbind());
        Ok((found.readable_blocks, in_memory, ticket, found.searching))
    }

    /// Ends a look-up's ticket.
    fn release_ticket(&self, py: Python<'_>, ticket: Vec<u8>) -> PyResult<bool> {
        wait(py, self.client.release_ticket(ticket.into())).map_err(raise)
    }

    /// Ends a pin.
    fn unpin(&self, py: Python<'_>, pin: Vec<u8>) -> PyResult<bool> {
        wait(py, self.client.unpin(pin.into())).map_err(raise)
    }

    fn unpin_async<'py>(&self, py: Python<'py>, pin: Vec<u8>) -> PyResult<Bound<'py, PyAny>> {
        let client = self.client.clone();
        awaitable(py, async move { client.unpin(pin.into()).await }, plain)
    }

    /// Waits for a prefetch. Returns (state, blocks, ready, missing).
    fn watch_prefetch(&self, py: Python<'_>, ticket: Vec<u8>) -> PyResult<(String, u32, u32, u32)> {
        wait(py, self.client.watch_prefetch(ticket.into(), |_| {})).map(progress).map_err(raise)
    }

    fn watch_prefetch_async<'py>(&self, py: Python<'py>, ticket: Vec<u8>) -> PyResult<Bound<'py, PyAny>> {
        let client = self.client.clone();
        awaitable(py, async move { client.watch_prefetch(ticket.into(), |_| {}).await.map(progress) }, plain)
    }

    /// Cancels a prefetch.
    fn cancel_prefetch(&self, py: Python<'_>, ticket: Vec<u8>) -> PyResult<bool> {
        wait(py, self.client.cancel_prefetch(ticket.into())).map_err(raise)
    }
}

fn progress(progress: v1::PrefetchProgress) -> (String, u32, u32, u32) {
    (progress.state().as_str_name().to_lowercase(), progress.blocks, progress.ready, progress.missing)
}

/// The bytes of the leading hits. A pinned block that is lost is an error.
fn leading(outcomes: &[GetOutcome]) -> PyResult<Vec<&Bytes>> {
    let blocks: Vec<&Bytes> = outcomes.iter().map_while(GetOutcome::bytes).collect();
    match outcomes.get(blocks.len()) {
        Some(GetOutcome::DataLoss) => {
            Err(raise(Error::DataLoss(format!("block {} is pinned, but is no longer in any tier", blocks.len()))))
        }
        _ => Ok(blocks),
    }
}

/// A value that converts by itself.
fn plain<T: for<'py> IntoPyObject<'py>>(py: Python<'_>, value: T) -> PyResult<Py<PyAny>> {
    value.into_py_any(py)
}

/// What a put needs, owned.
struct Put {
    hashes: Vec<Bytes>,
    parent: Option<Bytes>,
    buffers: Buffers,
    options: PutOptions,
}

impl Put {
    fn new(
        hashes: &Bound<'_, PyAny>,
        buffers: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        level: &str,
        (more_follows, upload): (bool, bool),
    ) -> PyResult<Self> {
        let hashes = hashes_of(hashes)?;
        let buffers = Buffers::borrow(buffers, hashes.len(), false)?;
        let options = PutOptions { level: level_of(level)?, more_follows, upload, ..PutOptions::default() };
        Ok(Self { hashes, parent: parent.map(hash_of).transpose()?, buffers, options })
    }

    async fn run(&self, client: &kvstore_client::Client, group: &GroupRef) -> Result<Vec<v1::PutResult>, Error> {
        let parents = std::iter::once(self.parent.as_ref()).chain(self.hashes.iter().map(Some));
        let slices = self.buffers.slices();
        let blocks: Vec<PutSlice<'_>> = self
            .hashes
            .iter()
            .zip(parents)
            .zip(&slices)
            .map(|((hash, parent), bytes)| {
                let parts = std::slice::from_ref(bytes);
                PutSlice { hash, parent: parent.map(AsRef::as_ref), parts }
            })
            .collect();
        client.put_from(group, &blocks, self.options).await
    }
}

#[pymethods]
impl Group {
    #[getter]
    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn lookup(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>) -> PyResult<usize> {
        let hashes = hashes_of(hashes)?;
        wait(py, self.client.readable_blocks(&self.group, &hashes)).map_err(raise)
    }

    fn lookup_async<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, client, group) = (hashes_of(hashes)?, self.client.clone(), self.group.clone());
        awaitable(py, async move { client.readable_blocks(&group, &hashes).await }, plain)
    }

    fn contains(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>) -> PyResult<Vec<bool>> {
        let hashes = hashes_of(hashes)?;
        wait(py, self.client.contains(&self.group, &hashes)).map_err(raise)
    }

    fn contains_async<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, client, group) = (hashes_of(hashes)?, self.client.clone(), self.group.clone());
        awaitable(py, async move { client.contains(&group, &hashes).await }, plain)
    }

    /// The leading blocks, each as long as it is.
    fn get<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let hashes = hashes_of(hashes)?;
        let options = GetOptions { leading_run: true, ..GetOptions::default() };
        let outcomes = wait(py, self.client.get_with(&self.group, &hashes, options)).map_err(raise)?;
        leading(&outcomes).map(|blocks| blocks.into_iter().map(|block| PyBytes::new(py, block)).collect())
    }

    fn get_into(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>, buffers: &Bound<'_, PyAny>) -> PyResult<usize> {
        let hashes = hashes_of(hashes)?;
        let mut buffers = Buffers::borrow(buffers, hashes.len(), true)?;
        let mut slices = buffers.slices_mut();
        // What is in memory needs no runtime.
        if let Some(read) = py.detach(|| self.client.get_into_now(&self.group, &hashes, &mut slices)) {
            return read.map_err(raise);
        }
        wait(py, self.client.get_into(&self.group, &hashes, &mut slices)).map_err(raise)
    }

    fn get_into_async<'py>(
        &self,
        py: Python<'py>,
        hashes: &Bound<'_, PyAny>,
        buffers: &Bound<'_, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, client, group) = (hashes_of(hashes)?, self.client.clone(), self.group.clone());
        let mut buffers = Buffers::borrow(buffers, hashes.len(), true)?;
        let call = async move {
            let mut slices = buffers.slices_mut();
            client.get_into(&group, &hashes, &mut slices).await
        };
        awaitable(py, call, plain)
    }

    #[pyo3(signature = (hashes, buffers, parent, level, more_follows, upload))]
    #[expect(clippy::too_many_arguments, reason = "a put's options, and where its bytes are")]
    fn put_from(
        &self,
        py: Python<'_>,
        hashes: &Bound<'_, PyAny>,
        buffers: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        level: &str,
        more_follows: bool,
        upload: bool,
    ) -> PyResult<Vec<(&'static str, Option<&'static str>)>> {
        let put = Put::new(hashes, buffers, parent, level, (more_follows, upload))?;
        wait(py, put.run(&self.client, &self.group)).map(|stored| results(&stored)).map_err(raise)
    }

    #[pyo3(signature = (hashes, buffers, parent, level, more_follows, upload))]
    #[expect(clippy::too_many_arguments, reason = "a put's options, and where its bytes are")]
    fn put_from_async<'py>(
        &self,
        py: Python<'py>,
        hashes: &Bound<'_, PyAny>,
        buffers: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        level: &str,
        more_follows: bool,
        upload: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let put = Put::new(hashes, buffers, parent, level, (more_follows, upload))?;
        let (client, group) = (self.client.clone(), self.group.clone());
        awaitable(py, async move { put.run(&client, &group).await.map(|stored| results(&stored)) }, plain)
    }

    fn get_pages(
        &self,
        py: Python<'_>,
        hashes: &Bound<'_, PyAny>,
        pages: &Bound<'_, Pages>,
        numbers: Vec<u32>,
    ) -> PyResult<usize> {
        pages::get(py, &self.client, &self.group, hashes_of(hashes)?, pages.get(), numbers)
    }

    fn start_get_pages(
        &self,
        hashes: &Bound<'_, PyAny>,
        pages: Py<Pages>,
        numbers: Vec<u32>,
    ) -> PyResult<pages::PagesLoad> {
        pages::start_get(&self.client, &self.group, hashes_of(hashes)?, pages, numbers)
    }

    #[pyo3(signature = (hashes, pages, numbers, parent, level, more_follows, upload))]
    #[expect(clippy::too_many_arguments, reason = "a put's options, and where its bytes are")]
    fn put_pages(
        &self,
        py: Python<'_>,
        hashes: &Bound<'_, PyAny>,
        pages: &Bound<'_, Pages>,
        numbers: Vec<u32>,
        parent: Option<&Bound<'_, PyAny>>,
        level: &str,
        more_follows: bool,
        upload: bool,
    ) -> PyResult<Vec<(&'static str, Option<&'static str>)>> {
        let (hashes, parent) = (hashes_of(hashes)?, parent.map(hash_of).transpose()?);
        let options = PutOptions { level: level_of(level)?, more_follows, upload, ..PutOptions::default() };
        let stored =
            pages::put(py, (&self.client, &self.group), &hashes, pages.get(), &numbers, parent.as_deref(), options)?;
        Ok(results(&stored))
    }

    fn leases(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>) -> PyResult<Leases> {
        let hashes = hashes_of(hashes)?;
        // What is in memory already needs no runtime; a moment is not worth giving up the GIL for.
        if let Some(Ok(leases)) = self.client.leases_now(&self.group, &hashes)
            && leases.len() == hashes.len()
        {
            return Ok(Leases::new(leases));
        }
        wait(py, self.client.leases(&self.group, &hashes)).map(Leases::new).map_err(raise)
    }

    fn leases_async<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, client, group) = (hashes_of(hashes)?, self.client.clone(), self.group.clone());
        awaitable(py, async move { client.leases(&group, &hashes).await }, |py, leases| {
            Ok(Py::new(py, Leases::new(leases))?.into_any())
        })
    }

    fn lease_windows(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>, window: usize) -> PyResult<LeaseWindows> {
        let hashes = hashes_of(hashes)?;
        wait(py, self.client.lease_windows(&self.group, &hashes, window)).map(LeaseWindows::new).map_err(raise)
    }

    fn hint(&self, hashes: &Bound<'_, PyAny>) -> PyResult<()> {
        self.client.hint(&self.group, &hashes_of(hashes)?).map_err(raise)
    }

    fn prefetch(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>, deadline: f64) -> PyResult<Py<PyBytes>> {
        let (hashes, deadline) = (hashes_of(hashes)?, seconds("deadline", deadline)?.as_millis() as u32);
        let ticket = wait(py, self.client.prefetch(&self.group, &hashes, deadline)).map_err(raise)?;
        Ok(PyBytes::new(py, &ticket).unbind())
    }

    fn prefetch_async<'py>(
        &self,
        py: Python<'py>,
        hashes: &Bound<'_, PyAny>,
        deadline: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, deadline) = (hashes_of(hashes)?, seconds("deadline", deadline)?.as_millis() as u32);
        let (client, group) = (self.client.clone(), self.group.clone());
        awaitable(py, async move { client.prefetch(&group, &hashes, deadline).await }, |py, ticket| {
            Ok(PyBytes::new(py, &ticket).into_any().unbind())
        })
    }

    fn pin(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>, ttl: f64) -> PyResult<(Py<PyBytes>, u32)> {
        let (hashes, ttl) = (hashes_of(hashes)?, seconds("ttl", ttl)?.as_millis() as u64);
        let pinned = wait(py, self.client.pin(&self.group, &hashes, ttl)).map_err(raise)?;
        Ok((PyBytes::new(py, &pinned.pin).unbind(), pinned.pinned_blocks))
    }

    fn pin_async<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>, ttl: f64) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, ttl) = (hashes_of(hashes)?, seconds("ttl", ttl)?.as_millis() as u64);
        let (client, group) = (self.client.clone(), self.group.clone());
        awaitable(py, async move { client.pin(&group, &hashes, ttl).await }, |py, pinned| {
            (PyBytes::new(py, &pinned.pin), pinned.pinned_blocks).into_py_any(py)
        })
    }

    #[pyo3(signature = (hashes, tokens, parent, adapter))]
    fn describe(
        &self,
        py: Python<'_>,
        hashes: &Bound<'_, PyAny>,
        tokens: Vec<u32>,
        parent: Option<&Bound<'_, PyAny>>,
        adapter: Option<String>,
    ) -> PyResult<bool> {
        let (hashes, parent) = (hashes_of(hashes)?, parent.map(hash_of).transpose()?);
        let call = self.client.describe(&self.group, &hashes, parent.as_ref(), &tokens, adapter.as_deref());
        wait(py, call).map_err(raise)
    }

    fn delete(&self, py: Python<'_>, hashes: &Bound<'_, PyAny>) -> PyResult<(u64, u64)> {
        let hashes = hashes_of(hashes)?;
        let answer = wait(py, self.client.delete(&self.group, &hashes)).map_err(raise)?;
        Ok((answer.deleted, answer.pinned))
    }

    fn delete_async<'py>(&self, py: Python<'py>, hashes: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (hashes, client, group) = (hashes_of(hashes)?, self.client.clone(), self.group.clone());
        let call = async move { client.delete(&group, &hashes).await.map(|answer| (answer.deleted, answer.pinned)) };
        awaitable(py, call, plain)
    }
}
