//! The tests that cross crates, in one program: every one of them links RocksDB, and that is worth doing once. cargo-nextest runs
//! each test in a process of its own all the same.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

mod bad_input;
mod blocks;
mod claim;
mod compat;
mod concurrency;
mod decoders;
mod eviction_batches;
mod eviction_conformance;
mod eviction_windows;
mod grpc_js;
mod host_locks;
mod host_ready;
mod idle;
mod litmus;
mod local;
mod local_hostile;
mod local_processes;
mod long_chains;
mod long_prompts;
mod modules;
mod namespaces;
mod nvme;
mod nvme_bounds;
mod nvme_doubts;
mod nvme_errors;
mod nvme_faults;
mod nvme_idle;
mod nvme_index;
mod nvme_promises;
mod nvme_renewal;
mod object;
mod object_collect;
mod object_cut;
mod object_outage;
mod object_proofs;
mod object_verify;
mod outside;
mod pins;
mod placement;
mod prewarm;
mod project;
mod publisher;
mod router_engines;
mod router_events;
mod router_pass;
mod router_places;
mod router_proxy;
mod shared_memory;
mod slots_model;
mod stack;
mod tier_conformance;
mod watch;
mod write_back;
