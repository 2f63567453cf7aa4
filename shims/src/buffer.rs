//! Python buffers, borrowed for the length of a call: bytes, bytearrays, numpy arrays, memoryviews, and whatever else has the
//! buffer protocol; CPU tensors of torch come as numpy arrays (`kvstore/__init__.py`).
//!
//! The protocol is in Python's stable ABI from 3.11 on only, but its functions and its struct are the same in 3.10; they are
//! declared here by hand, so that one wheel serves all.

use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

/// `Py_buffer` as CPython 3.10 and later have it.
#[repr(C)]
pub struct RawBuffer {
    pub buf: *mut c_void,
    pub obj: *mut ffi::PyObject,
    pub len: isize,
    itemsize: isize,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut ffi::PyObject, view: *mut RawBuffer, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut RawBuffer);
    /// Fills in a view of plain bytes.
    pub fn PyBuffer_FillInfo(
        view: *mut RawBuffer,
        object: *mut ffi::PyObject,
        bytes: *mut c_void,
        len: isize,
        readonly: c_int,
        flags: c_int,
    ) -> c_int;
}

/// `PyBUF_SIMPLE`: contiguous bytes.
const SIMPLE: c_int = 0;
/// `PyBUF_WRITABLE`.
const WRITABLE: c_int = 1;

/// A contiguous buffer that stays where it is while this lives.
pub struct Buffer {
    view: Box<RawBuffer>,
}

// SAFETY: the exporter may not move or free the bytes before PyBuffer_Release, which Drop calls with the GIL. Whether another
// Python thread writes to them meanwhile is the caller's affair, as with every buffer: see Buffer::bytes.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Borrows a buffer; one that is written to must be writable. `name` is what an error calls it.
    pub fn borrow(object: &Bound<'_, PyAny>, writable: bool, name: &str) -> PyResult<Self> {
        let mut view = Box::new(MaybeUninit::<RawBuffer>::uninit());
        let flags = if writable { WRITABLE } else { SIMPLE };
        // SAFETY: a live object, room for a view, and the GIL.
        let got = unsafe { PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), flags) };
        if got != 0 {
            let why = PyErr::take(object.py()).map(|error| error.to_string()).unwrap_or_default();
            let kind = object.get_type();
            let kind = kind.name().map(|name| name.to_string()).unwrap_or_default();
            let wanted = if writable { "a writable, contiguous buffer" } else { "a contiguous buffer" };
            return Err(PyTypeError::new_err(format!("{name}: {kind} is not {wanted}: {why}")));
        }
        // SAFETY: filled in by the call that succeeded.
        let view = unsafe { Box::from_raw(Box::into_raw(view).cast::<RawBuffer>()) };
        Ok(Self { view })
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.view.len.max(0) as usize
    }

    /// Where it begins.
    pub fn start(&self) -> *mut u8 {
        self.view.buf.cast()
    }

    /// The bytes, to be copied from. Another Python thread that writes to them meanwhile decides itself what is copied.
    pub fn bytes(&self) -> &[u8] {
        if self.len() == 0 {
            return &[];
        }
        // SAFETY: contiguous (SIMPLE), and in place until Drop.
        unsafe { std::slice::from_raw_parts(self.view.buf.cast(), self.len()) }
    }

    /// The bytes, to be copied to. Only of a writable buffer.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.len() == 0 || self.view.readonly != 0 {
            return &mut [];
        }
        // SAFETY: contiguous, writable, in place until Drop, and borrowed once through &mut self.
        unsafe { std::slice::from_raw_parts_mut(self.view.buf.cast(), self.len()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        Python::attach(|_| {
            // SAFETY: filled in by PyObject_GetBuffer, released once, with the GIL.
            unsafe { PyBuffer_Release(&mut *self.view) };
        });
    }
}

/// Buffers of a call: one for each of `blocks`, or a single one that holds all, one behind the other.
pub struct Buffers {
    buffers: Vec<Buffer>,
    blocks: usize,
}

impl Buffers {
    /// Borrows `object`: a sequence of buffers, or one buffer.
    pub fn borrow(object: &Bound<'_, PyAny>, blocks: usize, writable: bool) -> PyResult<Self> {
        let is_sequence =
            object.is_instance_of::<pyo3::types::PyList>() || object.is_instance_of::<pyo3::types::PyTuple>();
        if !is_sequence {
            let buffer = Buffer::borrow(object, writable, "buffers")?;
            if blocks == 0 || !buffer.len().is_multiple_of(blocks) {
                let problem =
                    format!("buffers: {} bytes cannot be divided into {blocks} blocks of equal size", buffer.len());
                return Err(PyValueError::new_err(problem));
            }
            return Ok(Self { buffers: vec![buffer], blocks });
        }
        let buffers = object
            .try_iter()?
            .enumerate()
            .map(|(at, buffer)| Buffer::borrow(&buffer?, writable, &format!("buffers[{at}]")))
            .collect::<PyResult<Vec<_>>>()?;
        if buffers.len() != blocks {
            return Err(PyValueError::new_err(format!(
                "buffers: {} buffers were given for {blocks} hashes; give one for each hash",
                buffers.len()
            )));
        }
        Ok(Self { buffers, blocks })
    }

    /// One slice a block.
    pub fn slices(&self) -> Vec<&[u8]> {
        match self.buffers.as_slice() {
            [one] if self.blocks > 1 => one.bytes().chunks_exact((one.len() / self.blocks).max(1)).collect(),
            many => many.iter().map(Buffer::bytes).collect(),
        }
    }

    /// The same, to be written to.
    pub fn slices_mut(&mut self) -> Vec<&mut [u8]> {
        let (blocks, buffers) = (self.blocks, self.buffers.len());
        if buffers != 1 || blocks <= 1 {
            return self.buffers.iter_mut().map(Buffer::bytes_mut).collect();
        }
        self.buffers
            .iter_mut()
            .flat_map(|one| {
                let each = (one.len() / blocks).max(1);
                one.bytes_mut().chunks_exact_mut(each)
            })
            .collect()
    }
}
