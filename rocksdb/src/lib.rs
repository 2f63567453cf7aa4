//! RocksDB for the index, from the sources that `librocksdb-sys` carries, compiled many files at a time.
//!
//! RocksDB has 343 source files, and two thirds of the time that a compiler takes for one of them goes into the headers that
//! it shares with all others. `build.rs` lets the compiler read those headers once for a group of files. That saves most of
//! the CPU time ([`docs/building.md`](../../docs/building.md)). This crate is a build step and a re-export, and nothing else.

pub use rocksdb::*;
