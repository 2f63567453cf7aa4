//! What a process has in memory, as a save reads it: a file's head, and buffers behind it that Python gives when they are read. A tensor
//! that has to be copied first, from a device say, is copied when its turn comes, and only a few such copies live at a time.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvstore_checkpoint::source::{Content, Made};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffer::Buffer;

/// Buffers that are kept: a save reads several pieces at once, in order, and some of them may be of the next buffers.
const KEPT: usize = 4;

struct Buffers {
    head: Vec<u8>,
    /// Where each buffer ends, behind the head.
    ends: Vec<u64>,
    /// `give(number)`: that buffer.
    give: Py<PyAny>,
    kept: Mutex<VecDeque<(usize, Arc<Buffer>)>>,
}

impl Buffers {
    fn start(&self, number: usize) -> u64 {
        number.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0)
    }

    fn buffer(&self, number: usize) -> io::Result<Arc<Buffer>> {
        // Whoever holds this may wait for the GIL. Nobody waits for this who has the GIL: saves run without it.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, buffer)) = kept.iter().find(|(of, _)| *of == number) {
            return Ok(Arc::clone(buffer));
        }
        let given = Python::attach(|py| Buffer::borrow(&self.give.bind(py).call1((number,))?, false, "the tensor"));
        let buffer = Arc::new(given.map_err(|error| io::Error::other(error.to_string()))?);
        let due = self.ends.get(number).copied().unwrap_or(0) - self.start(number);
        if buffer.len() as u64 != due {
            return Err(io::Error::other(format!("a tensor has {} bytes instead of {due}", buffer.len())));
        }
        kept.push_back((number, Arc::clone(&buffer)));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        Ok(buffer)
    }

    /// Copies what one part has of a piece; how much that was.
    fn copy(&self, into: &mut [u8], at: u64) -> io::Result<usize> {
        let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let head = self.head.len() as u64;
        if at < head {
            let from = self.head.get(at as usize..).unwrap_or_default();
            return Ok(copy(into, from));
        }
        let at = at - head;
        let number = self.ends.partition_point(|end| *end <= at);
        if number == self.ends.len() {
            return Err(short());
        }
        let buffer = self.buffer(number)?;
        let from = buffer.bytes().get((at - self.start(number)) as usize..).ok_or_else(short)?;
        Ok(copy(into, from))
    }
}

fn copy(into: &mut [u8], from: &[u8]) -> usize {
    let bytes = into.len().min(from.len());
    if let (Some(into), Some(from)) = (into.get_mut(..bytes), from.get(..bytes)) {
        into.copy_from_slice(from);
    }
    bytes
}

impl Content for Buffers {
    fn bytes(&self) -> u64 {
        self.head.len() as u64 + self.ends.last().copied().unwrap_or(0)
    }

    fn read_exact_at(&self, mut into: &mut [u8], mut at: u64) -> io::Result<()> {
        while !into.is_empty() {
            let bytes = self.copy(into, at)?;
            at += bytes as u64;
            into = into.split_at_mut(bytes).1;
        }
        Ok(())
    }
}

/// Contents, each a tuple (path, head, bytes of each buffer behind it, the function that gives a buffer by its number).
pub fn all(made: &[Bound<'_, PyAny>]) -> PyResult<Vec<Made>> {
    made.iter().map(one).collect()
}

fn one(made: &Bound<'_, PyAny>) -> PyResult<Made> {
    let (path, head, bytes, give): (String, Vec<u8>, Vec<u64>, Py<PyAny>) = made.extract()?;
    let mut ends: Vec<u64> = Vec::new();
    for bytes in bytes {
        let end = ends.last().copied().unwrap_or(0).checked_add(bytes);
        ends.push(end.ok_or_else(|| PyValueError::new_err("the tensors have more than 2^64 bytes"))?);
    }
    let content = Arc::new(Buffers { head, ends, give, kept: Mutex::default() });
    Ok(Made { path, content })
}
