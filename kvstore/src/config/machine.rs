//! What the machine tells: memory, and where a user's sockets belong.

use std::path::PathBuf;

/// Bytes of memory that this process may use: the machine's, or its control group's where that is less.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = info.totalram as u64 * u64::from(info.mem_unit);
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    group.map_or(machine, |limit: u64| limit.min(machine))
}

/// The socket of the namespace "default" where none is configured: in the user's private runtime folder,
/// or in a folder of /tmp that only this user may enter.
pub fn default_socket() -> PathBuf {
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(runtime) => PathBuf::from(runtime).join("kvstore"),
        None => PathBuf::from(format!("/tmp/kvstore-{}", rustix::process::getuid().as_raw())),
    };
    folder.join("default.sock")
}
