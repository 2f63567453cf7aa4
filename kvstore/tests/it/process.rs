//! The binary as an operator meets it: signals, sockets, commands, exit codes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A daemon process in a folder of its own.
struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvstore"));
    command.env_remove("KVSTORE_ADDRESS").env_remove("KVSTORE_CONFIG");
    command
}

/// A port that nobody has, and that other tests do not ask for meanwhile: below those that the system gives to whoever wants any, and
/// another one for each process.
fn free_port() -> u16 {
    let first = std::process::id() % 20_000;
    let mut ports = (0..20_000).map(|at| 10_000 + ((first + at) % 20_000) as u16);
    ports.find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what} never came true");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Daemon {
    fn start(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kvstore.toml"), config).unwrap();
        let child = Self::spawn(folder.path(), Stdio::null());
        let daemon = Self { child, folder };
        wait_for("the socket", || std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok());
        daemon
    }

    fn spawn(folder: &Path, stderr: Stdio) -> Child {
        binary()
            .args(["serve", "--set", "http.address=off", "--set", "nvme.paths=off", "--config"])
            .arg(folder.join("kvstore.toml"))
            .arg("--listen")
            .arg(format!("unix:{}", folder.join("private/kvstore.sock").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("private/kvstore.sock")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, b"")
    }

    fn run_with(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = binary()
            .args(arguments)
            .args(["--address", &format!("unix:{}", self.socket().display())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"))
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const SMALL: &str = "[host]\nbytes = \"32MiB\"\n";

#[test]
fn every_command_does_what_it_says() {
    let daemon = Daemon::start(SMALL);
    let put = daemon.run_with(&["put", "--key", "greeting", "-"], b"hello");
    assert!(put.status.success() && text(&put.stdout).contains("STORED MEMORY"), "{put:?}");
    let get = daemon.run(&["get", "--key", "greeting"]);
    assert_eq!((get.status.code(), get.stdout.as_slice()), (Some(0), &b"hello"[..]));
    let file = daemon.folder.path().join("out");
    daemon.run(&["get", "--key", "greeting", "--output", file.to_str().unwrap()]);
    assert_eq!(std::fs::read(&file).unwrap(), b"hello");
    let miss = daemon.run(&["get", "--key", "nothing"]);
    assert_eq!((miss.status.code(), text(&miss.stderr).contains("not there")), (Some(1), true));
    let put = daemon.run(&["put", "--hash", "c0ffee", "--level", "durable", file.to_str().unwrap()]);
    assert_eq!((put.status.code(), text(&put.stderr).contains("object store")), (Some(1), true), "{put:?}");
    assert_eq!(daemon.json(&["lookup", "--key", "greeting", "--key", "nothing"])["readable_blocks"], 1);
    assert_eq!(daemon.json(&["prefetch", "--key", "greeting"])["ready"], 1);
    let pin = daemon.json(&["pin", "--key", "greeting", "--ttl", "1m"]);
    assert_eq!(pin["pinned_blocks"], 1);
    assert_eq!(daemon.json(&["delete", "--key", "greeting"])["pinned"], 1);
    assert_eq!(daemon.json(&["unpin", pin["pin"].as_str().unwrap()])["unpinned"], true);
    assert_eq!(daemon.json(&["delete", "--key", "greeting"])["deleted"], 1);
    let status = daemon.json(&["status"]);
    assert_eq!((&status["state"], &status["host"]["deleted"]), (&Value::from("SERVING"), &Value::from(1)));
    assert!(text(&daemon.run(&["status"]).stdout).contains("SERVING"));
    let bench = daemon.json(&["bench", "--block-bytes", "64KiB", "--blocks", "8", "--rounds", "3"]);
    assert!(bench[0]["gbps"].as_f64().unwrap() > 0.0);
    assert_eq!(daemon.json(&["verify"])["corrupt"], 0);
    assert!(text(&binary().args(["completion", "bash"]).output().unwrap().stdout).contains("kvstore"));
}

#[test]
fn help_and_version_are_answered() {
    let help = binary().arg("--help").output().unwrap();
    assert!(help.status.success() && text(&help.stdout).contains("Examples"), "{help:?}");
    for command in ["serve", "status", "put", "get", "pin", "verify", "replay", "advise", "gc", "config"] {
        assert!(text(&help.stdout).contains(command), "{command} is missing in {}", text(&help.stdout));
        let help = binary().args([command, "--help"]).output().unwrap();
        assert!(help.status.success() && text(&help.stdout).contains("Usage"), "{command}: {help:?}");
    }
    let version = binary().arg("--version").output().unwrap();
    assert_eq!(text(&version.stdout).trim(), format!("kvstore {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_configuration_is_checked_shown_and_changed() {
    let daemon = Daemon::start(SMALL);
    assert_eq!(daemon.json(&["config", "show"])["host"]["bytes"], "32MiB");
    let change = daemon.json(&["config", "set", "host.bytes=16MiB", "calls.deadline=5s"]);
    // What follows from a key changes with it.
    let changed =
        ["host.bytes: 32.0 MiB -> 16.0 MiB", "host.ready_bytes: 32.0 MiB -> 16.0 MiB", "calls.deadline: 30s -> 5s"];
    assert_eq!(change["changes"], serde_json::json!(changed));
    let refused = daemon.run(&["config", "set", "host.bytes=24MiB", "host.eviction=lru"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("host.eviction"), "{refused:?}");
    assert_eq!(daemon.json(&["status"])["host"]["bytes_max"], 16 << 20, "all or none");
    // It was taken for the name of a target, and the daemon fell silent.
    let misspelt = daemon.run(&["config", "set", "log.level=debugg"]);
    assert!(text(&misspelt.stderr).contains("\"debugg\" is not a level"), "{misspelt:?}");
    assert!(daemon.run(&["config", "set", "log.level=info,kvstore=debug"]).status.success());
    let file = daemon.folder.path().join("kvstore.toml");
    std::fs::write(&file, "[host]\nbytes = \"20MiB\"\n").unwrap();
    daemon.signal(rustix::process::Signal::HUP);
    wait_for("the new size", || daemon.json(&["status"])["host"]["bytes_max"] == 20 << 20);
    std::fs::write(&file, "[host]\nbites = 5\n").unwrap();
    let broken = daemon.run(&["config", "reload"]);
    assert!(!broken.status.success() && text(&broken.stderr).contains("bites"), "{broken:?}");
    let check = binary().args(["config", "check"]).arg(&file).output().unwrap();
    assert!(!check.status.success() && text(&check.stderr).contains("bites"), "{check:?}");
    let sample = binary().args(["config", "show", "--sample"]).output().unwrap();
    std::fs::write(&file, &sample.stdout).unwrap();
    assert!(binary().args(["config", "check"]).arg(&file).status().unwrap().success());
}

#[test]
fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    let mut daemon = Daemon::start(SMALL);
    daemon.run_with(&["put", "--key", "a", "-"], b"x");
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
    assert!(!daemon.socket().exists(), "the socket's file stayed behind");
}

#[test]
fn a_drained_daemon_refuses_new_work_and_says_so() {
    let daemon = Daemon::start(SMALL);
    assert_eq!(daemon.json(&["drain"])["drained"], true);
    let put = daemon.run_with(&["put", "--key", "a", "-"], b"x");
    assert!(!put.status.success() && text(&put.stderr).contains("draining"), "{put:?}");
    assert_eq!(daemon.json(&["status"])["state"], "DRAINING");
}

/// kill -9 leaves the socket's file; the next daemon takes it over, but never from one that lives.
#[test]
fn a_killed_daemon_is_replaced_and_a_living_one_is_not() {
    let mut daemon = Daemon::start(SMALL);
    let second = Daemon::spawn(daemon.folder.path(), Stdio::piped()).wait_with_output().unwrap();
    assert!(!second.status.success() && text(&second.stderr).contains("another daemon"), "{second:?}");
    daemon.signal(rustix::process::Signal::KILL);
    daemon.child.wait().unwrap();
    assert!(daemon.socket().exists());
    daemon.child = Daemon::spawn(daemon.folder.path(), Stdio::null());
    wait_for("the new daemon", || std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok());
    assert_eq!(daemon.json(&["status"])["host"]["blocks"], 0);
}

/// `kvstore status | head -1` ended with a panic, and later `kvstore completion bash | head -1` did.
#[test]
fn a_reader_that_has_enough_ends_a_command_quietly() {
    for command in [&["config", "show", "--sample"][..], &["completion", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = binary().args(command).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(141), "{command:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{command:?}: {output:?}");
    }
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("kvstore.toml"), SMALL).unwrap();
    let private = folder.path().join("private");
    std::fs::create_dir(&private).unwrap();
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o777)).unwrap();
    let output = Daemon::spawn(folder.path(), Stdio::piped()).wait_with_output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("chmod 700"), "{output:?}");
}

#[test]
fn health_and_metrics_tell_the_truth() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s/kvstore.sock");
    let port = free_port();
    let child = binary()
        .args([
            "serve",
            "--host-bytes",
            "32MiB",
            "--set",
            &format!("http.address=127.0.0.1:{port}"),
            "--set",
            "nvme.paths=off",
        ])
        .args(["--listen", &format!("unix:{}", socket.display())])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut daemon = Daemon { child, folder };
    let http = |path: &str| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        std::io::read_to_string(stream).unwrap()
    };
    wait_for("the HTTP port", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    assert!(http("/healthz").starts_with("HTTP/1.1 200"));
    assert!(http("/readyz").starts_with("HTTP/1.1 200"));
    let address = format!("unix:{}", socket.display());
    let command = |arguments: &[&str]| binary().args(arguments).args(["--address", &address]).output().unwrap();
    std::fs::write(daemon.folder.path().join("f"), b"12345").unwrap();
    let file = daemon.folder.path().join("f");
    assert!(command(&["put", "--key", "a", file.to_str().unwrap(), "--plane", "grpc"]).status.success());
    assert!(command(&["get", "--key", "a", "--plane", "grpc"]).status.success());
    assert!(command(&["get", "--key", "a", "--plane", "local"]).status.success());
    // What a client had ends a moment after it.
    let mut metrics = String::new();
    for line in [
        "kvstore_put_bytes_total 5",
        "kvstore_get_hits_total 1",
        "kvstore_host_blocks 1",
        "kvstore_put_seconds_count 1",
        "kvstore_local_clients 0",
    ] {
        wait_for(line, || {
            metrics = http("/metrics");
            metrics.lines().any(|found| found == line)
        });
    }
    // One command names the layout. A read that comes before the slab's announcement asks the daemon for the block, and
    // gives it back: two more, which once failed this test on a busy machine.
    let commands = metrics.lines().find_map(|line| line.strip_prefix("kvstore_local_commands_total "));
    assert!(matches!(commands, Some("1" | "3")), "{commands:?} local commands in:\n{metrics}");
    assert!(command(&["drain"]).status.success());
    assert!(http("/readyz").starts_with("HTTP/1.1 503"));
    assert!(http("/healthz").starts_with("HTTP/1.1 200"));
    daemon.child.kill().unwrap();
}

#[test]
fn a_replay_reports_and_its_mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    std::fs::write(&path, "{\"timestamp\": 0, \"hash_ids\": [1, 2]}\n{\"timestamp\": 5, \"hash_ids\": [1, 2, 3]}\n")
        .unwrap();
    let replay = |arguments: &[&str]| binary().arg("replay").arg(&path).args(arguments).output().unwrap();
    let output = replay(&["--block-bytes", "10000", "--host-bytes", "16MiB", "--verify", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    for (field, value) in [("requests", 2), ("blocks", 5), ("wrong_bytes", 0)] {
        assert_eq!(report[field], value, "{report}");
    }
    assert_eq!((&report["hits"]["host"], &report["hits"]["nvme"]), (&Value::from(2), &Value::from(0)));
    assert_eq!(report["hit_ratio"], 0.4);
    for field in ["get_gbps", "put_gbps"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{report}");
    }
    for field in ["get_us", "put_us"] {
        assert!(report[field]["p50"].as_f64().unwrap() <= report[field]["p99"].as_f64().unwrap());
    }
    let simulated = replay(&["--simulate", "--capacity-blocks", "2", "--json"]);
    let simulated: Value = serde_json::from_slice(&simulated.stdout).unwrap();
    for field in ["hit_ratio", "lru_hit_ratio", "optimum_hit_ratio"] {
        assert!(simulated[field].is_f64(), "{simulated}");
    }
    assert!(replay(&["--block-bytes", "1MiB", "--speed", "fast"]).status.code() == Some(2));
    std::fs::write(&path, "{\"timestamp\": 0, \"hash_ids\": [1, \"x\"]}\n").unwrap();
    let output = replay(&["--block-bytes", "1MiB"]);
    assert!(text(&output.stderr).contains("line 1: field hash_ids[1]"), "{output:?}");
}

/// Out of file descriptors, the daemon refuses what it can't take and serves again once there are some:
/// accept fails with EMFILE then, which ended servers before.
#[test]
fn running_out_of_file_descriptors_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("private/kvstore.sock");
    let child = Command::new("sh")
        .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_kvstore")])
        .args(["serve", "--host-bytes", "32MiB", "--set", "http.address=off", "--set", "nvme.paths=off"])
        .args(["--listen", &format!("unix:{}", socket.display())])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon { child, folder };
    wait_for("the socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let crowd: Vec<_> = (0..120).filter_map(|_| std::os::unix::net::UnixStream::connect(&socket).ok()).collect();
    assert!(crowd.len() > 64);
    std::thread::sleep(Duration::from_millis(200));
    drop(crowd);
    wait_for("an answer", || daemon.run(&["status", "--timeout", "2s"]).status.success());
}

/// Memory that was made ready ahead of need took the descriptors that connections and disks were to have: each piece has one. While
/// few are left, what is ready is used, and no more is made.
#[test]
fn no_memory_is_made_ready_while_descriptors_are_scarce() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    const PIECE: u64 = 4 << 20;
    let daemon = Daemon::start("[host]\nbytes = \"64MiB\"\nready_bytes = \"16MiB\"\n");
    let ready = || daemon.json(&["status"])["host"]["bytes_ready"].as_u64().unwrap();
    // Two blocks do not fit a piece.
    let put = |key: &str| {
        let put = daemon.run_with(&["put", "--block-bytes", "3MiB", "--key", key, "-"], &vec![1; 3 << 20]);
        assert!(put.status.success(), "{put:?}");
    };
    wait_for("memory that is ready", || ready() == 4 * PIECE);
    put("a block");
    wait_for("as much as before", || ready() == 4 * PIECE);
    let pid = Pid::from_child(&daemon.child);
    let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().count() as u64;
    // Enough for some connections, and none for more memory.
    let few = Some(open + 100);
    prlimit(Some(pid), Resource::Nofile, Rlimit { current: few, maximum: few }).unwrap();
    for (key, left) in [("a second", 3), ("a third", 2), ("a fourth", 1)] {
        put(key);
        assert_eq!(ready(), left * PIECE, "after {key}");
    }
}

/// A client outlives its daemon: once another one serves, calls get through again; the layouts that the
/// dead daemon knew are asked for by name.
#[test]
fn a_client_finds_the_next_daemon() {
    use kvstore::replay;
    use kvstore_client::v1::BlockKind;
    use kvstore_client::{Client, Error, PutBlock};
    let mut daemon = Daemon::start(SMALL);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let layout = || replay::layout("restart", 1000, BlockKind::Attention);
    let address = format!("unix:{}", daemon.socket().display());
    let put = async |client: &Client, group| {
        let block = PutBlock::new(replay::sequence_hash(1), replay::content(1, 1000));
        client.put(&group, vec![block]).await
    };
    let (client, group) = runtime.block_on(async {
        let client = Client::connect(&address).await.unwrap();
        let group = client.register_layout(layout()).await.unwrap().group(0);
        put(&client, group.clone()).await.unwrap();
        (client, group)
    });
    daemon.signal(rustix::process::Signal::KILL);
    daemon.child.wait().unwrap();
    let gone = runtime.block_on(put(&client, group.clone())).unwrap_err();
    assert!(matches!(gone, Error::Unavailable(_)), "{gone}");
    daemon.child = Daemon::spawn(daemon.folder.path(), Stdio::null());
    wait_for("the new daemon", || std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok());
    // Within the client's back-off; it tells the new daemon the layout by itself, and finds what is lost as a miss.
    let hashes = [replay::sequence_hash(1)];
    wait_for("the client's next try", || runtime.block_on(client.get(&group, &hashes)).is_ok());
    runtime.block_on(async {
        assert_eq!(client.get(&group, &hashes).await.unwrap(), [kvstore_client::GetOutcome::Miss]);
        put(&client, group.clone()).await.unwrap();
        assert!(client.get(&group, &hashes).await.unwrap()[0].bytes().is_some());
        assert_eq!(client.register_layout(layout()).await.unwrap().group(0), group);
    });
}

/// With KVSTORE_ADDRESS exported for the other commands, `replay --simulate` was refused for a flag that
/// nobody typed, and a plain replay drove that daemon instead of one of its own. A replay writes thousands
/// of blocks: it drives a daemon only when it is told to.
#[test]
fn a_replay_drives_no_daemon_that_the_environment_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    std::fs::write(&path, "{\"timestamp\": 0, \"hash_ids\": [1, 2]}\n").unwrap();
    for arguments in [
        &["--simulate", "--capacity-blocks", "2"][..],
        &["--block-bytes", "1000", "--host-bytes", "16MiB", "--policy", "lru"],
        &["--block-bytes", "1000"],
    ] {
        let mut command = binary();
        command.env("KVSTORE_ADDRESS", "unix:/nonexistent/kvstore.sock").arg("replay").arg(&path).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

/// The life of a folder on disk, by hand: stored, found again by the next daemon, used by one daemon at a time,
/// checked offline, damaged, quarantined.
#[test]
fn a_folder_on_disk_is_served_guarded_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let socket = format!("unix:{}", folder.path().join("kvstore.sock").display());
    let serve = |socket: &str| {
        let mut command = binary();
        command.args(["serve", "--listen", socket, "--set", "http.address=off", "--set", "host.bytes=32MiB"]);
        command.arg("--set").arg(format!("nvme.paths={}", disk.display())).args(["--set", "nvme.bytes=64MiB"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let run = |arguments: &[&str]| {
        let mut command = binary();
        command.args(arguments).env("KVSTORE_ADDRESS", &socket).output().unwrap()
    };
    let answers = || run(&["status"]).status.success();
    let payload = folder.path().join("payload");
    std::fs::write(&payload, vec![7u8; 50_000]).unwrap();
    let mut first = serve(&socket).spawn().unwrap();
    wait_for("the daemon", answers);
    let put = run(&["put", "--key", "safe", "--level", "local", payload.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&put.stdout).contains("STORED LOCAL"), "{put:?}");
    let second = serve(&format!("unix:{}", folder.path().join("second.sock").display())).output().unwrap();
    let refusal = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && refusal.contains("in use by another kvstore"), "{refusal}");
    let busy = run(&["verify", "--path", disk.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&busy.stderr).contains("in use"), "{busy:?}");
    let status: Value = serde_json::from_slice(&run(&["status", "--json"]).stdout).unwrap();
    assert_eq!(status["nvme"]["volumes"][0]["state"], "SERVING");
    assert_eq!(status["nvme"]["volumes"][0]["blocks"], 1);
    first.kill().unwrap();
    first.wait().unwrap();

    let verify = |more: &[&str]| {
        let output = run(&[&["verify", "--json", "--path", disk.to_str().unwrap()], more].concat());
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).unwrap_or(Value::Null))
    };
    let (code, report) = verify(&[]);
    assert_eq!((code, &report["blocks"], &report["corrupt"]), (Some(0), &1.into(), &0.into()), "{report}");
    let mut third = serve(&socket).spawn().unwrap();
    wait_for("the daemon", answers);
    assert_eq!(run(&["get", "--key", "safe"]).stdout, vec![7u8; 50_000], "after kill -9");
    third.kill().unwrap();
    third.wait().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(disk.join("blocks")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", (64 << 10) + 4096 + 1000).unwrap();
    assert_eq!(verify(&[]).1["corrupt"], 1);
    assert_eq!(verify(&["--quarantine"]).0, Some(1));
    let (code, report) = verify(&[]);
    assert_eq!((code, &report["blocks"]), (Some(0), &0.into()), "forgotten: {report}");
    let missing = run(&["verify", "--path", "/nonexistent/folder"]);
    assert!(!missing.status.success());
}
