//! Facts about the machine: its memory, its disks, and the folders for a user's sockets and data.

use std::path::{Path, PathBuf};

use crate::caps;

/// Bytes of memory that this process may use: the machine's, or its control group's where that is less.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = info.totalram as u64 * u64::from(info.mem_unit);
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    group.map_or(machine, |limit: u64| limit.min(machine))
}

/// Bytes of memory that nothing needs now, beyond what is left to others in any case. Zero where the system does not say.
pub fn memory_to_spare() -> u64 {
    let free = available_bytes().min(group_bytes_left().unwrap_or(u64::MAX));
    free.saturating_sub(memory_bytes() / caps::MEMORY_LEFT_PARTS)
}

/// Of the machine.
fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or_default() * 1024
}

/// Of the control group, where it has a bound.
fn group_bytes_left() -> Option<u64> {
    let of = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/memory.{name}")).ok()?.trim().parse().ok()
    };
    Some(of("max")?.saturating_sub(of("current")?))
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

/// Where blocks go on disk where no path is configured: the user's data folder, or the system's for root.
pub fn default_data_folder() -> PathBuf {
    if rustix::process::getuid().is_root() {
        return PathBuf::from("/var/lib/kvstore");
    }
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into())).join(".local/share");
    let data = std::env::var_os("XDG_DATA_HOME").filter(|dir| !dir.is_empty()).map_or_else(home, PathBuf::from);
    data.join("kvstore")
}

/// Bytes of the file system that `path` is on, or would be: all of it, and those that are free.
pub fn disk_bytes(path: &Path) -> Option<(u64, u64)> {
    let there = path.ancestors().find(|ancestor| ancestor.exists())?;
    let stat = rustix::fs::statvfs(there).ok()?;
    Some((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

/// Names this boot of the machine; zeros where the kernel does not say.
pub fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).unwrap_or_default()
}
