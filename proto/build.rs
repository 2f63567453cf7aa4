//! Compiles the .proto files with protox, so that building needs no protoc.

use prost::Message;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = ["blocks", "admin", "events", "snapshots"].map(|file| format!("kvstore/v1/{file}.proto"));
    let files = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("kvstore_v1.descriptors");
    std::fs::write(out, files.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(files)?;
    Ok(())
}
