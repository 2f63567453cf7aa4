//! Leased blocks, as read-only memoryviews. A view keeps its block leased, whatever becomes of the [`Leases`] it came from.

use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyIndexError, PyRuntimeError};
use pyo3::prelude::*;

use crate::errors::raise;
use crate::exported::{Exports, view};
use crate::runtime::block_on;

/// The leading blocks of a prefix, readable in place. The blocks do not change until this object and every view of it have been
/// deleted, or until `release()` or the end of a `with` block. Both of these fail while views are alive.
#[pyclass(frozen, module = "kvstore")]
pub struct Leases {
    leases: std::sync::Mutex<Option<Arc<kvstore_client::Leases>>>,
}

impl Leases {
    pub fn new(leases: kvstore_client::Leases) -> Self {
        Self { leases: std::sync::Mutex::new(Some(Arc::new(leases))) }
    }

    fn leases(&self) -> PyResult<Arc<kvstore_client::Leases>> {
        let leases =
            self.leases.lock().map_err(|_| PyRuntimeError::new_err("a thread panicked while it used the leases"))?;
        leases.clone().ok_or_else(|| PyRuntimeError::new_err("the leases were released; take new ones"))
    }
}

#[pymethods]
impl Leases {
    fn __len__(&self) -> PyResult<usize> {
        Ok(self.leases()?.len())
    }

    fn __getitem__<'py>(&self, py: Python<'py>, at: isize) -> PyResult<Bound<'py, PyAny>> {
        let leases = self.leases()?;
        let index = if at < 0 { at + leases.len() as isize } else { at };
        let index = usize::try_from(index).ok().filter(|index| *index < leases.len());
        let index = index.ok_or_else(|| {
            PyIndexError::new_err(format!("block {at} was asked for, but only {} blocks are leased", leases.len()))
        })?;
        view(py, Box::new(Block { leases, index }))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) -> PyResult<()> {
        self.release()
    }

    /// Ends the leases. Raises BufferError while views are alive.
    fn release(&self) -> PyResult<()> {
        let mut slot =
            self.leases.lock().map_err(|_| PyRuntimeError::new_err("a thread panicked while it used the leases"))?;
        if let Some(leases) = slot.take()
            && Arc::strong_count(&leases) > 1
        {
            let views = Arc::strong_count(&leases) - 1;
            *slot = Some(leases);
            let problem = format!("{views} views of the blocks are alive; release() or delete them first");
            return Err(PyBufferError::new_err(problem));
        }
        Ok(())
    }
}

/// The leading blocks of a prefix, window by window.
#[pyclass(frozen, module = "kvstore")]
pub struct LeaseWindows {
    windows: std::sync::Mutex<kvstore_client::LeaseWindows>,
}

impl LeaseWindows {
    pub fn new(windows: kvstore_client::LeaseWindows) -> Self {
        Self { windows: std::sync::Mutex::new(windows) }
    }
}

#[pymethods]
impl LeaseWindows {
    /// Leases the blocks that follow. Returns None behind the last block that can be read.
    fn next(&self, py: Python<'_>) -> PyResult<Option<Leases>> {
        py.detach(|| {
            let windows = self.windows.lock();
            let mut windows =
                windows.map_err(|_| PyRuntimeError::new_err("a thread panicked while it used the windows"))?;
            Ok(block_on(windows.next()).map_err(raise)?.map(Leases::new))
        })
    }
}

/// One block, behind a memoryview.
struct Block {
    leases: Arc<kvstore_client::Leases>,
    index: usize,
}

impl Exports for Block {
    fn bytes(&self) -> (*mut u8, usize) {
        let bytes = self.leases.get(self.index).unwrap_or_default();
        (bytes.as_ptr().cast_mut(), bytes.len())
    }

    fn is_writable(&self) -> bool {
        false
    }
}
