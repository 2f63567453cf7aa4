//! `kvstore snapshot` as an operator meets it, and killed at any moment: the old or the new is there, never half of one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Kills of each verb, each at another moment.
const KILLS: u32 = 12;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("store")).unwrap();
        Self { folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvstore"));
        let url = format!("file://{}", self.at("store").display());
        command.arg("snapshot").args(arguments).env("KVSTORE_SNAPSHOTS", url).current_dir(self.folder.path());
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a command, and kills it after a part of the time that it takes; false where it ended before. It then takes half of that
    /// time from now on: the machine may have been busier when it was measured.
    fn kill_after(&self, arguments: &[&str], whole: &mut Duration, part: u32) -> bool {
        let mut child = self.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(*whole * part / KILLS);
        // SIGKILL.
        child.kill().unwrap();
        let killed = !child.wait().unwrap().success();
        *whole /= if killed { 1 } else { 2 };
        killed
    }

    /// A save that was killed holds collections up for a day: the test takes its intent away.
    fn forget_killed_saves(&self) {
        let _ = fs::remove_dir_all(self.at("store/snapshots/v1/intents"));
    }

    fn restored(&self, snapshot: &str) -> BTreeMap<String, Vec<u8>> {
        let to = self.at("restored");
        let output = self.run(&["restore", snapshot, "restored"]);
        assert!(output.status.success(), "{output:?}");
        let found = content(&to);
        fs::remove_dir_all(to).unwrap();
        found
    }
}

fn write(folder: &Path, seed: u8) {
    fs::create_dir_all(folder.join("deep")).unwrap();
    for file in 0..6_u8 {
        let mut state = u64::from(seed) << 8 | u64::from(file) | 1 << 40;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let bytes: Vec<u8> = (0..2 << 20).map(|_| next()).collect();
        fs::write(folder.join(format!("file-{file}")), bytes).unwrap();
    }
    fs::write(folder.join("deep/seed"), [seed]).unwrap();
}

fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                    all.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    all
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

#[test]
fn snapshots_walk_through_every_command() {
    let place = Place::new();
    write(&place.at("model"), 1);
    let saved = place.json(&["save", "model", "--name", "m", "--fact", "dtype=bf16"]);
    let id = saved["id"].as_str().unwrap();
    assert_eq!((&saved["files"], &saved["found_bytes"]), (&7.into(), &0.into()));
    write(&place.at("model"), 2);
    let second = place.json(&["save", "model", "--name", "m"]);
    let listed = place.json(&["ls"]);
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    assert_eq!(listed["snapshots"][0]["names"], serde_json::json!(["m"]));
    assert_eq!(place.json(&["inspect", "m", "--tensors"])["files"][0]["path"], "deep/seed");
    assert_eq!(place.json(&["verify", id])["wrong"], serde_json::json!([]));
    assert_eq!(place.json(&["diff", id, "m"])["differences"].as_array().unwrap().len(), 7);
    place.json(&["tag", id, "first"]);
    assert_eq!(place.restored("first").get("deep/seed").unwrap(), &[1]);
    let refused = place.run(&["restore", "first", "x", "--fact", "dtype=f16"]);
    assert!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--allow dtype"),
        "{refused:?}"
    );
    let named = place.run(&["rm", id]);
    assert!(String::from_utf8_lossy(&named.stderr).contains("is called first"), "{named:?}");
    place.json(&["rm", "first"]);
    assert_eq!(place.json(&["gc", "--dry-run"])["gone_snapshots"], 1);
    assert_eq!(place.json(&["gc"])["gone_chunks"], 7);
    assert_eq!(place.json(&["ls"])["snapshots"][0]["id"], second["id"]);
    let missing = place.run(&["inspect", "first"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no snapshot \"first\""), "{missing:?}");
}

#[test]
fn a_save_that_is_killed_leaves_the_old_or_the_new() {
    let place = Place::new();
    write(&place.at("old"), 0);
    write(&place.at("new"), 255);
    let mut whole = timed(|| _ = place.json(&["save", "old", "--name", "m"]));
    let (old, mut killed) = (content(&place.at("old")), 0);
    for part in 0..KILLS {
        write(&place.at("new"), 1 + part as u8);
        killed += u32::from(place.kill_after(&["save", "new", "--name", "m"], &mut whole, part));
        let found = place.restored("m");
        assert!(found == old || found == content(&place.at("new")), "kill {part}");
        let unreadable = &place.json(&["ls"])["unreadable"];
        assert_eq!(unreadable, &serde_json::json!([]), "kill {part}: what is listed is whole");
        place.forget_killed_saves();
        place.json(&["gc", "--keep-last", "9"]);
        let found_again = place.restored("m");
        assert_eq!(found_again, found, "kill {part}: a collection takes the rest of it, and nothing else");
        place.json(&["save", "old", "--name", "m"]);
    }
    assert!(killed >= KILLS / 3, "{killed} of {KILLS} were killed");
}

#[test]
fn a_restore_that_is_killed_leaves_nothing_or_all() {
    let place = Place::new();
    write(&place.at("model"), 1);
    place.json(&["save", "model", "--name", "m"]);
    let model = content(&place.at("model"));
    let mut whole = timed(|| assert_eq!(place.restored("m"), model));
    let mut killed = 0;
    for part in 0..KILLS {
        killed += u32::from(place.kill_after(&["restore", "m", "to"], &mut whole, part));
        if place.at("to").exists() {
            assert_eq!(content(&place.at("to")), model, "kill {part}");
        } else {
            place.json(&["restore", "m", "to"]);
            assert_eq!(content(&place.at("to")), model, "kill {part}: gone on with");
        }
        fs::remove_dir_all(place.at("to")).unwrap();
        let left = fs::read_dir(place.folder.path()).unwrap().count();
        assert_eq!(left, 2, "kill {part}: the store and the model");
    }
    assert!(killed >= KILLS / 3, "{killed} of {KILLS} were killed");
}

#[test]
fn a_collection_that_is_killed_takes_nothing_that_is_needed() {
    let place = Place::new();
    write(&place.at("kept"), 0);
    place.json(&["save", "kept", "--name", "kept"]);
    let kept = content(&place.at("kept"));
    write(&place.at("model"), 99);
    place.json(&["save", "model", "--name", "m"]);
    place.json(&["rm", "m"]);
    let mut whole = timed(|| _ = place.json(&["gc"]));
    for part in 0..KILLS {
        write(&place.at("model"), 1 + part as u8);
        place.json(&["save", "model", "--name", "m"]);
        place.json(&["rm", "m"]);
        place.kill_after(&["gc"], &mut whole, part);
        assert_eq!(place.restored("kept"), kept, "kill {part}");
        for one in place.json(&["ls"])["snapshots"].as_array().unwrap() {
            assert_eq!(
                place.json(&["verify", one["id"].as_str().unwrap()])["wrong"],
                serde_json::json!([]),
                "kill {part}"
            );
        }
        // A collector that was killed holds saves up for five minutes: the test takes its lease away.
        let _ = fs::remove_dir_all(place.at("store/snapshots/v1/collector"));
    }
    place.json(&["gc"]);
    assert_eq!(place.restored("kept"), kept);
    assert_eq!(place.json(&["ls"])["snapshots"].as_array().unwrap().len(), 1, "the rest went");
}
