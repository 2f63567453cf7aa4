//! Where the tensors of a safetensors file lie.
//!
//! The library of that name refuses files whose tensors overlap, and types that are newer than itself. A snapshot of them needs neither
//! their values nor their types, so this reads the header alone. A file whose header is none is a file like any other.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::caps;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// As the file names it: `BF16`, `F8_E4M3`.
    pub dtype: String,
    /// Its dimensions; none for a scalar.
    pub shape: Vec<u64>,
    /// The first of its bytes in the file.
    pub start: u64,
    /// The first that is not its own any more.
    pub end: u64,
}

impl Tensor {
    /// Bytes of an element, where they are whole ones; 1 otherwise.
    pub fn element_bytes(&self) -> u8 {
        match self.dtype.as_str() {
            "F64" | "I64" | "U64" | "C64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            _ => 1,
        }
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The tensors of a file of `bytes` bytes, in the order in which they lie; `None` where it is no safetensors file. The first byte behind
/// its header comes with them.
pub fn read(file: &mut impl Read, bytes: u64) -> io::Result<Option<(u64, Vec<Tensor>)>> {
    let mut length = [0; 8];
    match file.read_exact(&mut length) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u64::from_le_bytes(length);
    let Some(start) = length.checked_add(8).filter(|start| *start <= bytes && length <= caps::HEADER_BYTES_MAX) else {
        return Ok(None);
    };
    let mut header = vec![0; length as usize];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    Ok(parse(&header, start, bytes).map(|tensors| (start, tensors)))
}

fn parse(header: &[u8], start: u64, bytes: u64) -> Option<Vec<Tensor>> {
    let entries: BTreeMap<String, Value> = serde_json::from_slice(header).ok()?;
    if entries.len() > caps::TENSORS_MAX {
        return None;
    }
    let tensor = |(name, entry): (String, Value)| {
        let entry: Entry = serde_json::from_value(entry).ok()?;
        let [from, to] = entry.data_offsets;
        let (from, to) = (start.checked_add(from)?, start.checked_add(to)?);
        let fits = from <= to && to <= bytes && entry.shape.len() <= caps::DIMENSIONS_MAX;
        let short = name.len() <= caps::TEXT_BYTES_MAX && entry.dtype.len() <= caps::TEXT_BYTES_MAX;
        (fits && short).then_some(Tensor { name, dtype: entry.dtype, shape: entry.shape, start: from, end: to })
    };
    let entries = entries.into_iter().filter(|(name, _)| name != "__metadata__");
    let mut tensors: Vec<Tensor> = entries.map(tensor).collect::<Option<_>>()?;
    tensors.sort_by(|one, other| (one.start, one.end, &one.name).cmp(&(other.start, other.end, &other.name)));
    Some(tensors)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(header: &Value, data: usize) -> Vec<u8> {
        let header = header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; data]].concat()
    }

    fn tensors(file: &[u8]) -> Option<(u64, Vec<Tensor>)> {
        read(&mut &file[..], file.len() as u64).unwrap()
    }

    #[test]
    fn tensors_lie_where_the_header_says() {
        let header = json!({
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [4, 10]},
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "empty": {"dtype": "F32", "shape": [0, 8], "data_offsets": [4, 4]},
            "tied": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]},
        });
        let file = file(&header, 10);
        let (start, found) = tensors(&file).unwrap();
        assert_eq!(start, file.len() as u64 - 10);
        let short: Vec<_> = found.iter().map(|one| (one.name.as_str(), one.start - start, one.end - start)).collect();
        assert_eq!(short, [("a", 0, 4), ("tied", 2, 4), ("empty", 4, 4), ("b", 4, 10)]);
        assert_eq!(found.iter().map(Tensor::element_bytes).collect::<Vec<_>>(), [2, 2, 4, 1]);
    }

    #[test]
    fn what_is_no_header_makes_a_file_like_any_other() {
        let entry = |from: u64, to: u64| json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [from, to]}});
        for wrong in [
            file(&entry(0, 9), 8),
            file(&entry(4, 0), 8),
            file(&json!([1]), 0),
            file(&json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), 8),
            file(&json!({"a": {"dtype": "F32", "shape": vec![1; 65], "data_offsets": [0, 4]}}), 8),
            b"PK\x03\x04".to_vec(),
            [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
            [&100_u64.to_le_bytes()[..], b"{}"].concat(),
            Vec::new(),
        ] {
            assert_eq!(tensors(&wrong), None);
        }
        assert_eq!(tensors(&file(&json!({}), 0)), Some((10, Vec::new())));
    }
}
