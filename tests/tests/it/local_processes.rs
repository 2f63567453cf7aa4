//! Clients of the local plane in processes of their own: killed, stopped, forked; and what they read meanwhile.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::v1::BlockKind;
use kvstore_client::{Client, Plane};
use kvstore_tests::{TestDaemon, chain, hashes};
use rustix::process::{Pid, Signal, kill_process};

const BYTES: u32 = 16 << 10;
const BLOCKS: u64 = 100;

/// A client's process: not a test of its own. Leases blocks, says so, and checks them whenever it is asked; or puts without end.
#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn client_process() {
    let Ok(address) = std::env::var("LOCAL_CLIENT_OF") else { return };
    let role = std::env::var("LOCAL_CLIENT_ROLE").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::connect_over(&address, Plane::Local).await.unwrap();
        let group = client.register_layout(replay::layout("test", BYTES, BlockKind::Attention)).await.unwrap().group(0);
        if role == "put" {
            for round in 0u64.. {
                let first = (1 << 40) | (u64::from(std::process::id()) << 20) | (round * 8);
                let _ = client.put(&group, chain(first..first + 8, BYTES)).await;
                if round == 3 {
                    println!("ready");
                }
            }
        }
        let leases = client.leases(&group, &hashes(0..BLOCKS)).await.unwrap();
        assert_eq!(leases.len(), BLOCKS as usize);
        println!("ready");
        for line in std::io::stdin().lock().lines() {
            let wrong =
                leases.iter().enumerate().filter(|(id, block)| **block != replay::content(*id as u64, BYTES as usize));
            println!("{} {} wrong", line.unwrap(), wrong.count());
        }
    });
}

struct Process {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Process {
    fn start(daemon: &TestDaemon, role: &str) -> Self {
        Self::start_by(Command::new(std::env::current_exe().unwrap()), daemon, role)
    }

    fn start_by(mut command: Command, daemon: &TestDaemon, role: &str) -> Self {
        let mut child = command
            .args(["--exact", "local_processes::client_process", "--ignored", "--nocapture", "-q"])
            .env("LOCAL_CLIENT_OF", &daemon.address)
            .env("LOCAL_CLIENT_ROLE", role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, output };
        process.until("ready");
        process
    }

    fn until(&mut self, word: &str) -> String {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the client ended before it said {word}");
        }
        line
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Blocks that changed under its leases.
    fn check(&mut self) {
        writeln!(self.child.stdin.as_mut().unwrap(), "check").unwrap();
        assert_eq!(self.until("check").trim(), "check 0 wrong");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Puts that turn the memory over several times.
async fn turn_over(daemon: &TestDaemon, round: u64) {
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    for at in 0..30u64 {
        let first = ((round + 1) << 30) | (at * 100);
        client.put(&group, chain(first..first + 60, BYTES)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_are_killed_free_what_they_read_within_seconds() {
    let daemon = TestDaemon::start(&["host.bytes=16MiB", "host.eviction=lru"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    let readers: Vec<Process> = (0..3).map(|_| Process::start(&daemon, "read")).collect();
    let writers: Vec<Process> = (0..2).map(|_| Process::start(&daemon, "put")).collect();
    let host = &daemon.running.daemon.host;
    assert_eq!(host.attached(), 6);
    assert_eq!(host.local_leases().0, 3 * BLOCKS as usize);
    turn_over(&daemon, 1).await;
    assert_eq!(client.readable_blocks(&group, &hashes(0..BLOCKS)).await.unwrap(), BLOCKS as usize);
    readers.iter().chain(&writers).for_each(|process| process.signal(Signal::KILL));
    within(Duration::from_secs(60), "leases, staging and half-filled blocks of the dead", || {
        host.local_leases() == (0, 0) && host.attached() == 1 && host.status().flights == 0
    })
    .await;
    turn_over(&daemon, 2).await;
    assert_eq!(client.readable_blocks(&group, &hashes(0..BLOCKS)).await.unwrap(), 0, "their blocks may leave");
}

/// A container: the socket is in its file system, its process numbers are its own, and it shares no more with the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn clients_in_other_pid_and_mount_namespaces_read_and_are_cleaned_up_after() {
    let contain = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--mount", "--ipc", "--fork", "--kill-child"]);
        command
    };
    if !contain().arg("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        println!("skipped: this user may not make PID and mount namespaces here");
        return;
    }
    let daemon = TestDaemon::start(&["host.bytes=16MiB", "host.eviction=lru"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    let contained = |role| {
        let mut command = contain();
        command.arg(std::env::current_exe().unwrap());
        Process::start_by(command, &daemon, role)
    };
    let (mut reader, writer) = (contained("read"), contained("put"));
    let host = &daemon.running.daemon.host;
    assert_eq!((host.attached(), host.local_leases().0), (3, BLOCKS as usize));
    turn_over(&daemon, 1).await;
    reader.check();
    [&reader, &writer].iter().for_each(|process| process.signal(Signal::KILL));
    within(Duration::from_secs(60), "what the dead held", || {
        host.local_leases() == (0, 0) && host.attached() == 1 && host.status().flights == 0
    })
    .await;
}

/// A lease is never taken from a living process, however long it does nothing; and it stops nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_stopped_keeps_what_it_reads_and_blocks_nobody() {
    let daemon = TestDaemon::start(&["host.bytes=16MiB", "host.eviction=lru"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    let mut reader = Process::start(&daemon, "read");
    let writer = Process::start(&daemon, "put");
    reader.check();
    reader.signal(Signal::STOP);
    writer.signal(Signal::STOP);
    for round in 0..3 {
        turn_over(&daemon, round).await;
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..BLOCKS)).await.unwrap(), BLOCKS as usize);
    reader.signal(Signal::CONT);
    reader.check();
    writer.signal(Signal::CONT);
    turn_over(&daemon, 4).await;
    reader.check();
}

/// A client that is stopped does not unmap a slab that left: its memory counts, and what wants it is told Busy or finds
/// other room; nothing hangs, and the bound holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_client_that_keeps_slabs_mapped_costs_room_and_nothing_else() {
    let daemon = TestDaemon::start(&["host.bytes=32MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    turn_over(&daemon, 1).await;
    let reader = Process::start(&daemon, "put");
    reader.signal(Signal::STOP);
    let large = client.register_layout(replay::layout("large", 1 << 20, BlockKind::Attention)).await.unwrap().group(0);
    for at in 0..20u64 {
        let started = Instant::now();
        client.put(&large, chain([(1 << 50) | at], 1 << 20)).await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(20), "a put waited for a process that is stopped");
        assert!(daemon.mapped() <= 32 << 20);
    }
    reader.signal(Signal::CONT);
    drop(reader);
    within(Duration::from_secs(60), "room comes back", || daemon.running.daemon.host.attached() == 1).await;
    // Its memory is given back a moment later than its place.
    let until = Instant::now() + Duration::from_secs(60);
    for first in ((2u64 << 50)..).step_by(2) {
        let stored = client.put(&large, chain(first..first + 2, 1 << 20)).await.unwrap();
        if stored.iter().all(|result| result.status() == kvstore_client::v1::PutStatus::Stored) {
            break;
        }
        assert!(Instant::now() < until, "{stored:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
