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

/// Of the control group and those around it, where one has a bound. Cached files give way to memory, and do not count.
fn group_bytes_left() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let root = Path::new("/sys/fs/cgroup");
    let groups = Path::new(own).ancestors().map(|group| root.join(group));
    groups.filter_map(|group| bytes_left_of(&group)).min()
}

fn bytes_left_of(group: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| -> Option<u64> { read(name)?.trim().parse().ok() };
    let most = number("memory.max")?;
    let stat = read("memory.stat").unwrap_or_default();
    let files = |line: &str| -> Option<u64> {
        line.strip_prefix("inactive_file ").or(line.strip_prefix("active_file "))?.parse().ok()
    };
    let cached: u64 = stat.lines().filter_map(files).sum();
    Some(most.saturating_sub(number("memory.current")?.saturating_sub(cached)))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A container whose files filled its bound was taken for one without memory.
    #[test]
    fn cached_files_of_a_control_group_give_way() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(bytes_left_of(folder.path()), None);
        write("memory.max", "max\n");
        assert_eq!(bytes_left_of(folder.path()), None, "it has no bound");
        write("memory.max", "1000\n");
        write("memory.current", "900\n");
        write("memory.stat", "anon 100\nfile 700\nshmem 50\ninactive_file 400\nactive_file 250\n");
        assert_eq!(bytes_left_of(folder.path()), Some(750));
    }
}
