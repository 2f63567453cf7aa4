//! Memory of ours as memoryviews, which keep it.
//!
//! The object behind a view is made by hand: classes with the buffer protocol are in Python's stable ABI from 3.11 on only, but
//! types made from a spec have had its slots since 3.9.

use std::ffi::{c_int, c_void};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::buffer::{PyBuffer_FillInfo, RawBuffer};

/// Memory that Python may see.
pub trait Exports: Send + Sync {
    /// Where it is, and how many bytes it has: the same each time, and there for as long as the value lives.
    fn bytes(&self) -> (*mut u8, usize);

    /// Whether Python may write to it, too.
    fn is_writable(&self) -> bool;
}

#[repr(C)]
struct Object {
    base: ffi::PyObject,
    exports: *mut Box<dyn Exports>,
}

unsafe extern "C" fn get_buffer(object: *mut ffi::PyObject, view: *mut RawBuffer, flags: c_int) -> c_int {
    // SAFETY: Python calls this with an object of this type.
    let exports = unsafe { (*object.cast::<Object>()).exports };
    // SAFETY: the object keeps it until it is freed.
    let exports = unsafe { &*exports };
    let (start, bytes) = exports.bytes();
    // A caller that wants to write is refused where it may not.
    let readonly = c_int::from(!exports.is_writable());
    // SAFETY: bytes that stay where they are while the object lives; the view takes a reference to it.
    unsafe { PyBuffer_FillInfo(view, object, start.cast(), bytes as isize, readonly, flags) }
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    // SAFETY: an object of this type, which nobody refers to any more.
    let exports = unsafe { (*object.cast::<Object>()).exports };
    // SAFETY: made by Box::into_raw in view(), dropped once.
    drop(unsafe { Box::from_raw(exports) });
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

fn object_type(py: Python<'_>) -> PyResult<*mut ffi::PyTypeObject> {
    static TYPE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = TYPE.get_or_try_init(py, || {
        let slot = |slot, function: *mut c_void| ffi::PyType_Slot { slot, pfunc: function };
        let mut slots = [
            slot(BF_GETBUFFER, get_buffer as *mut c_void),
            slot(TP_DEALLOC, dealloc as *mut c_void),
            slot(0, std::ptr::null_mut()),
        ];
        let mut spec = ffi::PyType_Spec {
            name: c"kvstore._native.Memory".as_ptr(),
            basicsize: size_of::<Object>() as c_int,
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

/// A memoryview, which keeps what it shows.
pub fn view(py: Python<'_>, exports: Box<dyn Exports>) -> PyResult<Bound<'_, PyAny>> {
    let class = object_type(py)?;
    // SAFETY: a ready type.
    let object = unsafe { ffi::PyType_GenericAlloc(class, 0) };
    if object.is_null() {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new object of this type, of basicsize bytes, that nobody else knows.
    unsafe { (*object.cast::<Object>()).exports = Box::into_raw(Box::new(exports)) };
    // SAFETY: an object with the buffer protocol; the view takes its own reference.
    let view = unsafe { ffi::PyMemoryView_FromObject(object) };
    // SAFETY: our reference, given up once; the view keeps the object.
    unsafe { ffi::Py_DECREF(object) };
    // SAFETY: a new reference, or null with an error set.
    unsafe { Bound::from_owned_ptr_or_err(py, view) }
}
