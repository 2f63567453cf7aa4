//! Processes that are measured: started, asked for their CPU time, and ended.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// A process that ends with this value.
pub struct Process(Child);

impl Process {
    /// Starts `command` and waits until `socket` exists.
    pub fn start(mut command: Command, socket: &Path) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let process = Self(child);
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            anyhow::ensure!(started.elapsed() < Duration::from_secs(10), "{name} did not open {}", socket.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(process)
    }

    /// Starts `command` and waits until it takes connections at `address`.
    pub fn start_listening(mut command: Command, address: std::net::SocketAddr) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Self(command.spawn().with_context(|| format!("cannot start {name}"))?);
        let started = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            anyhow::ensure!(started.elapsed() < Duration::from_secs(10), "{name} does not listen on {address}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(process)
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// CPU seconds so far, user and system.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        // Fields 14 and 15, counted behind the process's name, which ends with ')'.
        let ticks: u64 = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
            .unwrap_or(0);
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes of memory that a process has now.
pub fn resident_bytes(id: u32) -> f64 {
    let statm = std::fs::read_to_string(format!("/proc/{id}/statm")).unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(f64::NAN);
    pages * rustix::param::page_size() as f64
}

/// CPU seconds of this process so far.
pub fn own_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
