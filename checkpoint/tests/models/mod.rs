//! Models and folders for tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

/// Bytes that are no pattern, and of which each seed has others.
pub fn noise(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// A safetensors file of these tensors, one behind the other, with this metadata.
pub fn safetensors(tensors: &[(&str, Vec<u8>)], metadata: &str) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"note": metadata}));
    let mut data = Vec::new();
    for (name, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert((*name).into(), json!({"dtype": "BF16", "shape": [bytes.len() / 2], "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A folder as a model has it, with a cache beside it. The seed makes one tensor another one.
pub fn write_model(folder: &Path, seed: u32, metadata: &str) {
    let tensors = [("a", noise(seed, 40_000)), ("b", noise(2, 9 << 20)), ("c", Vec::new()), ("d", noise(3, 2))];
    fs::create_dir_all(folder.join("caches/deep")).unwrap();
    fs::write(folder.join("model.safetensors"), safetensors(&tensors, metadata)).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("empty"), "").unwrap();
    fs::write(folder.join("caches/deep/kernel.so"), b"text ".repeat(10_000)).unwrap();
    fs::set_permissions(folder.join("caches/deep/kernel.so"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// All files below a folder: their bytes, and whether they may be run.
pub fn content(folder: &Path) -> BTreeMap<String, (Vec<u8>, bool)> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                let runs = fs::metadata(&path).unwrap().permissions().mode() & 0o100 != 0;
                all.insert(name, (fs::read(&path).unwrap(), runs));
            }
        }
    }
    all
}
