//! Leased blocks, as read-only memoryviews. A view keeps its block leased, whatever becomes of the [`Leases`] it came from.
//!
//! The object behind a view is made by hand: classes with the buffer protocol are in Python's stable ABI from 3.11 on only, but
//! types made from a spec have had its slots since 3.9.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyIndexError, PyRuntimeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::buffer::{PyBuffer_FillInfo, RawBuffer, WRITABLE};
use crate::errors::raise;
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
        view(py, leases, index)
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

/// One block, as the object behind a memoryview.
#[repr(C)]
struct BlockObject {
    base: ffi::PyObject,
    leases: *const kvstore_client::Leases,
    index: usize,
}

unsafe extern "C" fn get_buffer(object: *mut ffi::PyObject, view: *mut RawBuffer, flags: c_int) -> c_int {
    let block = object.cast::<BlockObject>();
    // SAFETY: Python calls this with an object of this type.
    let leases = unsafe { (*block).leases };
    // SAFETY: the object keeps its leases until it is freed.
    let leases = unsafe { &*leases };
    // SAFETY: as above.
    let index = unsafe { (*block).index };
    let bytes = leases.get(index).unwrap_or_default();
    // Refuses a caller that wants to write.
    let readonly = 1;
    debug_assert_eq!(WRITABLE, 1);
    // SAFETY: bytes that stay mapped and unchanged while the leases live; the view takes a reference to the object.
    unsafe { PyBuffer_FillInfo(view, object, bytes.as_ptr().cast_mut().cast(), bytes.len() as isize, readonly, flags) }
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    // SAFETY: an object of this type, which nobody refers to any more.
    let leases = unsafe { (*object.cast::<BlockObject>()).leases };
    // SAFETY: made by Arc::into_raw in view(), dropped once.
    drop(unsafe { Arc::from_raw(leases) });
    // SAFETY: a live object has a type.
    let class = unsafe { ffi::Py_TYPE(object) };
    // SAFETY: allocated by PyType_GenericAlloc, which PyObject_Free undoes.
    unsafe { ffi::PyObject_Free(object.cast()) };
    // SAFETY: an instance of a heap type holds a reference to it.
    unsafe { ffi::Py_DECREF(class.cast()) };
}

/// `Py_bf_getbuffer` and `Py_tp_dealloc`, slots of a type's spec.
const BF_GETBUFFER: c_int = 1;
const TP_DEALLOC: c_int = 52;

fn block_type(py: Python<'_>) -> PyResult<*mut ffi::PyTypeObject> {
    static TYPE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = TYPE.get_or_try_init(py, || {
        let slot = |slot, function: *mut c_void| ffi::PyType_Slot { slot, pfunc: function };
        let mut slots = [
            slot(BF_GETBUFFER, get_buffer as *mut c_void),
            slot(TP_DEALLOC, dealloc as *mut c_void),
            slot(0, std::ptr::null_mut()),
        ];
        let mut spec = ffi::PyType_Spec {
            name: c"kvstore._native.Block".as_ptr(),
            basicsize: size_of::<BlockObject>() as c_int,
            itemsize: 0,
            flags: ffi::Py_TPFLAGS_DEFAULT as u32,
            slots: slots.as_mut_ptr(),
        };
        // SAFETY: a complete spec, whose slots end with a zero and have the right signatures.
        let class = unsafe { ffi::PyType_FromSpec(&mut spec) };
        // SAFETY: a new reference, or null with an error set.
        unsafe { Bound::from_owned_ptr_or_err(py, class) }.map(Bound::unbind)
    })?;
    Ok(class.as_ptr().cast())
}

/// A read-only memoryview of one block.
fn view(py: Python<'_>, leases: Arc<kvstore_client::Leases>, index: usize) -> PyResult<Bound<'_, PyAny>> {
    let class = block_type(py)?;
    // SAFETY: a ready type.
    let object = unsafe { ffi::PyType_GenericAlloc(class, 0) };
    if object.is_null() {
        return Err(PyErr::fetch(py));
    }
    let block = object.cast::<BlockObject>();
    // SAFETY: a new object of this type, of basicsize bytes, that nobody else knows.
    unsafe { (*block).leases = Arc::into_raw(leases) };
    // SAFETY: as above.
    unsafe { (*block).index = index };
    // SAFETY: an object with the buffer protocol; the view takes its own reference.
    let view = unsafe { ffi::PyMemoryView_FromObject(object) };
    // SAFETY: our reference, given up once; the view keeps the object.
    unsafe { ffi::Py_DECREF(object) };
    // SAFETY: a new reference, or null with an error set.
    unsafe { Bound::from_owned_ptr_or_err(py, view) }
}
