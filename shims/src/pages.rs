//! An engine's own memory, where a block is a page of each of several regions (a region is a layer's cache, or a part of it).
//! Blocks are put from it and got into it with one copy, and no tensor of Python's in between.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore_client::{Client, Error, GroupRef, PutOptions, PutSlice, stream_copy, v1};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::errors::raise;
use crate::runtime::{block_on, spawn_blocking};

/// Blocks that are leased at a time: a process has some thousand lease words, and several loads share them.
const BLOCKS_PER_STEP: usize = 256;
/// Blocks of a put at a time: each has a slice for each region, 16 bytes of a hundred layers' regions.
const BLOCKS_PER_PUT: usize = 2048;
/// Without the local plane, blocks come by way of a buffer of this size.
const BOUNCE_BYTES: usize = 32 << 20;
/// From this many bytes on, pages are written past the cache, and by two threads.
const STREAM_FROM_BYTES: usize = 1 << 20;
const TWO_THREADS_FROM_BYTES: usize = 4 << 20;

/// Pages of an engine's memory. Block `n` has `bytes` bytes at `offset + n * stride` of each region's buffer. In the store, a
/// block is these bytes in the order of the regions. The buffers stay in place until this object is dropped.
#[pyclass(frozen, module = "kvstore")]
pub struct Pages {
    regions: Vec<Region>,
    blocks: usize,
    block_bytes: usize,
    _buffers: Vec<Buffer>,
}

#[derive(Clone, Copy)]
struct Region {
    start: *mut u8,
    stride: usize,
    bytes: usize,
    /// Where its page begins in a block.
    at: usize,
}

// SAFETY: the pointers are into buffers that `_buffers` keeps in place; who writes when is the engine's affair, which says
// which blocks are its and still (see `Page`).
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

#[pymethods]
impl Pages {
    /// Regions are (buffer, offset, stride, bytes).
    #[new]
    fn new(regions: Vec<(Bound<'_, PyAny>, usize, usize, usize)>, blocks: usize) -> PyResult<Self> {
        let (mut made, mut buffers, mut block_bytes) = (Vec::with_capacity(regions.len()), Vec::new(), 0usize);
        if regions.is_empty() || blocks == 0 {
            return Err(PyValueError::new_err("regions and blocks: give at least one of each"));
        }
        for (at, (buffer, offset, stride, bytes)) in regions.into_iter().enumerate() {
            let buffer = Buffer::borrow(&buffer, true, &format!("regions[{at}]"))?;
            let end = (blocks - 1).checked_mul(stride).and_then(|last| last.checked_add(bytes)?.checked_add(offset));
            if bytes == 0 || (stride < bytes && blocks > 1) || end.is_none_or(|end| end > buffer.len()) {
                return Err(PyValueError::new_err(format!(
                    "regions[{at}]: {blocks} pages of {bytes} bytes, {stride} bytes apart and starting at offset {offset}, do not fit into {} bytes",
                    buffer.len()
                )));
            }
            // SAFETY: inside the buffer, as was just checked.
            let start = unsafe { buffer.start().add(offset) };
            made.push(Region { start, stride, bytes, at: block_bytes });
            block_bytes += bytes;
            buffers.push(buffer);
        }
        Ok(Self { regions: made, blocks, block_bytes, _buffers: buffers })
    }

    #[getter]
    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    #[getter]
    fn blocks(&self) -> usize {
        self.blocks
    }
}

impl Pages {
    fn check(&self, hashes: usize, numbers: &[u32]) -> PyResult<()> {
        if hashes != numbers.len() {
            return Err(PyValueError::new_err(format!(
                "numbers: {} numbers were given for {hashes} hashes; give one for each hash",
                numbers.len()
            )));
        }
        match numbers.iter().find(|number| **number as usize >= self.blocks) {
            Some(number) => Err(PyValueError::new_err(format!(
                "numbers: block {number} does not exist; there are {} blocks",
                self.blocks
            ))),
            None => Ok(()),
        }
    }

    /// A page, to be copied from. `number` was checked. Nobody may write to it meanwhile.
    fn page(&self, region: &Region, number: u32) -> &[u8] {
        // SAFETY: `number` is below `blocks`, for which new() checked that pages lie inside the buffer.
        let start = unsafe { region.start.add(number as usize * region.stride) };
        // SAFETY: as above; the caller has said that the block is still.
        unsafe { std::slice::from_raw_parts(start, region.bytes) }
    }

    /// Fills a block's page of `region` from the block's bytes. `number` was checked. The page is this caller's alone.
    fn fill(&self, region: &Region, number: u32, block: &[u8], streaming: bool) {
        let Some(from) = block.get(region.at..region.at + region.bytes) else { return };
        // SAFETY: `number` is below `blocks`, for which new() checked that pages lie inside the buffer.
        let start = unsafe { region.start.add(number as usize * region.stride) };
        // SAFETY: as above; the engine has given the block to this load alone, and no two blocks of a load are one.
        let to = unsafe { std::slice::from_raw_parts_mut(start, region.bytes) };
        if streaming {
            stream_copy(from, to);
        } else {
            to.copy_from_slice(from);
        }
    }

    /// Fills the pages of several blocks, region by region; says after which.
    fn scatter(&self, blocks: &[&[u8]], numbers: &[u32], done: &(impl Fn(usize) + Sync)) -> Result<(), Error> {
        if let Some(block) = blocks.iter().find(|block| block.len() != self.block_bytes) {
            let problem = format!("the block has {} bytes, but its pages have {}", block.len(), self.block_bytes);
            return Err(Error::Invalid(problem));
        }
        let bytes = blocks.len() * self.block_bytes;
        let streaming = bytes >= STREAM_FROM_BYTES;
        let half = if bytes >= TWO_THREADS_FROM_BYTES { blocks.len().div_ceil(2) } else { blocks.len() };
        let finished: Vec<AtomicUsize> = self.regions.iter().map(|_| AtomicUsize::new(0)).collect();
        let fill = |range: std::ops::Range<usize>, last: usize| {
            for ((at, region), finished) in self.regions.iter().enumerate().zip(&finished) {
                let these = blocks.iter().zip(numbers).skip(range.start).take(range.len());
                these.for_each(|(block, number)| self.fill(region, *number, block, streaming));
                if finished.fetch_add(1, Ordering::AcqRel) == last {
                    done(at);
                }
            }
        };
        if half == blocks.len() {
            fill(0..half, 0);
        } else {
            std::thread::scope(|scope| {
                scope.spawn(|| fill(half..blocks.len(), 1));
                fill(0..half, 1);
            });
        }
        Ok(())
    }

    /// Reads the leading blocks of a prefix into pages, and says after which region, once the last blocks are on their way.
    /// How many blocks were read.
    fn load(&self, load: &Load, done: &(impl Fn(usize) + Sync)) -> Result<usize, Error> {
        if !load.client.is_local() {
            return self.load_copies(load, 0, done);
        }
        let mut windows = match block_on(load.client.lease_windows(&load.group, &load.hashes, BLOCKS_PER_STEP)) {
            // The daemon drains, and takes calls over gRPC alone.
            Err(Error::Unsupported(_)) => return self.load_copies(load, 0, done),
            windows => windows?,
        };
        // Each window's leases end before the next one is asked for.
        loop {
            windows.set_deadline(load.left());
            let leases = match block_on(windows.next()) {
                Ok(Some(leases)) => leases,
                Ok(None) => break,
                // Other leases of this process leave no room: copies need none.
                Err(Error::Busy(_)) => return self.load_copies(load, windows.done(), done),
                Err(error) => return Err(error),
            };
            let first = windows.done() - leases.len();
            let is_last = windows.done() == load.hashes.len();
            let numbers = load.numbers.get(first..windows.done()).unwrap_or_default();
            self.scatter(&leases.iter().collect::<Vec<_>>(), numbers, &|region| {
                if is_last {
                    done(region);
                }
            })?;
        }
        match windows.ended_at_unmapped() {
            true => self.load_copies(load, windows.done(), done),
            false => Ok(windows.done()),
        }
    }

    /// The same from block `first` on, by way of a buffer.
    fn load_copies(&self, load: &Load, first: usize, done: &(impl Fn(usize) + Sync)) -> Result<usize, Error> {
        let step = (BOUNCE_BYTES / self.block_bytes).clamp(1, BLOCKS_PER_STEP);
        let mut bounce = vec![0; step.min(load.hashes.len() - first) * self.block_bytes];
        let mut loaded = first;
        while loaded < load.hashes.len() {
            let end = (loaded + step).min(load.hashes.len());
            let names = load.hashes.get(loaded..end).unwrap_or_default();
            let numbers = load.numbers.get(loaded..end).unwrap_or_default();
            let mut buffers: Vec<_> = bounce.chunks_exact_mut(self.block_bytes).take(names.len()).collect();
            let got = block_on(load.client.with_deadline(load.left()).get_into(&load.group, names, &mut buffers))?;
            let is_last = loaded + got == load.hashes.len();
            self.scatter(&buffers.iter().take(got).map(|buffer| &**buffer).collect::<Vec<_>>(), numbers, &|region| {
                if is_last {
                    done(region);
                }
            })?;
            loaded += got;
            if got < names.len() {
                break;
            }
        }
        Ok(loaded)
    }
}

struct Load {
    client: Client,
    group: GroupRef,
    hashes: Vec<Bytes>,
    numbers: Vec<u32>,
    /// The end of all windows together.
    until: Instant,
}

impl Load {
    fn new(client: &Client, group: &GroupRef, hashes: Vec<Bytes>, numbers: Vec<u32>) -> Self {
        let until = Instant::now() + client.deadline();
        Self { client: client.clone(), group: group.clone(), hashes, numbers, until }
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// Reads the leading blocks of a prefix into pages; how many were read.
pub fn get(
    py: Python<'_>,
    client: &Client,
    group: &GroupRef,
    hashes: Vec<Bytes>,
    pages: &Pages,
    numbers: Vec<u32>,
) -> PyResult<usize> {
    pages.check(hashes.len(), &numbers)?;
    let load = Load::new(client, group, hashes, numbers);
    py.detach(|| pages.load(&load, &|_| {})).map_err(raise)
}

/// The same, in the background.
pub fn start_get(
    client: &Client,
    group: &GroupRef,
    hashes: Vec<Bytes>,
    pages: Py<Pages>,
    numbers: Vec<u32>,
) -> PyResult<PagesLoad> {
    pages.get().check(hashes.len(), &numbers)?;
    let load = Load::new(client, group, hashes, numbers);
    let state = Arc::new(State { inner: Mutex::default(), changed: Condvar::new() });
    let progress = Arc::clone(&state);
    spawn_blocking(move || {
        let said = Arc::clone(&progress);
        // Whatever happens in it, who waits is told.
        let run = std::panic::AssertUnwindSafe(|| pages.get().load(&load, &|region| said.region(region)));
        let lost = || Err(Error::Other("the load's thread panicked".into()));
        progress.end(std::panic::catch_unwind(run).unwrap_or_else(|_| lost()));
        drop(pages);
    })
    .map_err(raise)?;
    Ok(PagesLoad { state })
}

/// Stores blocks from pages; the outcome of each.
pub fn put(
    py: Python<'_>,
    (client, group): (&Client, &GroupRef),
    hashes: &[Bytes],
    pages: &Pages,
    numbers: &[u32],
    parent: Option<&[u8]>,
    options: PutOptions,
) -> PyResult<Vec<v1::PutResult>> {
    pages.check(hashes.len(), numbers)?;
    py.detach(|| {
        let until = Instant::now() + client.deadline();
        let mut results = Vec::with_capacity(hashes.len());
        loop {
            let first = results.len();
            let end = (first + BLOCKS_PER_PUT).min(hashes.len());
            let (names, numbers) = (hashes.get(first..end), numbers.get(first..end));
            let parent = first.checked_sub(1).and_then(|before| hashes.get(before)).map(AsRef::as_ref).or(parent);
            let options = PutOptions { more_follows: options.more_follows || end < hashes.len(), ..options };
            let client = client.with_deadline(until.saturating_duration_since(Instant::now()));
            let window = (names.unwrap_or_default(), numbers.unwrap_or_default());
            results.extend(put_window((&client, group), window, pages, parent, options)?);
            if results.len() < end || end == hashes.len() {
                return Ok::<_, Error>(results);
            }
        }
    })
    .map_err(raise)
}

fn put_window(
    (client, group): (&Client, &GroupRef),
    (hashes, numbers): (&[Bytes], &[u32]),
    pages: &Pages,
    parent: Option<&[u8]>,
    options: PutOptions,
) -> Result<Vec<v1::PutResult>, Error> {
    let parts: Vec<Vec<&[u8]>> =
        numbers.iter().map(|number| pages.regions.iter().map(|region| pages.page(region, *number)).collect()).collect();
    let parents = std::iter::once(parent).chain(hashes.iter().map(|hash| Some(&**hash)));
    let blocks: Vec<PutSlice<'_>> = hashes
        .iter()
        .zip(parents)
        .zip(&parts)
        .map(|((hash, parent), parts)| PutSlice { hash, parent, parts })
        .collect();
    block_on(client.put_from(group, &blocks, options))
}

/// A load into pages that runs in the background.
#[pyclass(frozen, module = "kvstore")]
pub struct PagesLoad {
    state: Arc<State>,
}

struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    regions: usize,
    ended: Option<Result<usize, Error>>,
}

impl State {
    fn region(&self, region: usize) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.regions = inner.regions.max(region + 1);
        }
        self.changed.notify_all();
    }

    fn end(&self, ended: Result<usize, Error>) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.ended = Some(ended);
        }
        self.changed.notify_all();
    }

    /// Until `done`; false once the time is over.
    fn wait(&self, timeout: Duration, done: impl Fn(&Inner) -> bool) -> bool {
        let until = Instant::now() + timeout;
        let Ok(mut inner) = self.inner.lock() else { return true };
        while !done(&inner) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match self.changed.wait_timeout(inner, left) {
                Ok((again, _)) => inner = again,
                Err(_) => return true,
            }
        }
        true
    }
}

#[pymethods]
impl PagesLoad {
    /// Waits until every block's page of this region has been filled, or the load has ended. Returns False after `timeout` seconds.
    fn wait_region(&self, py: Python<'_>, region: usize, timeout: f64) -> PyResult<bool> {
        let timeout = crate::client::seconds("timeout", timeout)?;
        let there = |inner: &Inner| inner.regions > region || inner.ended.is_some();
        Ok(self.state.wait(Duration::ZERO, there) || py.detach(|| self.state.wait(timeout, there)))
    }

    /// Returns whether the load has ended.
    fn done(&self) -> bool {
        self.state.wait(Duration::ZERO, |inner| inner.ended.is_some())
    }

    /// Waits until the load has ended, and returns how many leading blocks were read. Raises the error that made it fail, once.
    fn result(&self, py: Python<'_>, timeout: f64) -> PyResult<usize> {
        let timeout = crate::client::seconds("timeout", timeout)?;
        if !py.detach(|| self.state.wait(timeout, |inner| inner.ended.is_some())) {
            return Err(raise(Error::Deadline("the load has not ended yet".into())));
        }
        let mut inner =
            self.state.inner.lock().map_err(|_| PyRuntimeError::new_err("a thread panicked while it used the load"))?;
        match inner.ended.take() {
            Some(Err(error)) => {
                inner.ended =
                    Some(Err(Error::Other("the load failed; an earlier call of result() raised the cause".into())));
                Err(raise(error))
            }
            Some(Ok(blocks)) => {
                inner.ended = Some(Ok(blocks));
                Ok(blocks)
            }
            None => Err(PyRuntimeError::new_err("a thread panicked while it used the load")),
        }
    }
}
