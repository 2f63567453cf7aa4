//! Records, entries and ownerships that nobody wrote so; and a stored sample of version 1 (`tests/compat/session_v1`), byte by byte.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use actors::{Door, Engine, head, name, objects};
use kvstore_checkpoint::manifest::{Bounded, Refused};
use kvstore_checkpoint::sessions::{End, Entry, Kind, Owner, Place, Pointer, Record, Row, Sealer, Step, Store, Writer};
use object_store::ObjectStoreExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;

/// What a record's digest is of, as `docs/design/session.md` says.
fn sign(cbor: &[u8], log: &str, number: u64, slot: u32) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"kvstore session record 1").update(log.as_bytes());
    hasher.update(&number.to_le_bytes()).update(&slot.to_le_bytes()).update(cbor);
    [cbor, hasher.finalize().as_bytes()].concat()
}

/// An index with its footer.
fn sign_index(cbor: &[u8]) -> Vec<u8> {
    let length = (cbor.len() as u64).to_le_bytes();
    [cbor, blake3::hash(cbor).as_bytes(), &length, b"KVSESLG1"].concat()
}

/// A record, an index and an ownership that were written, each with what it takes to read it.
struct Written {
    log: String,
    records: Vec<(u64, u32, Vec<u8>)>,
    entries: Vec<(u64, Vec<u8>)>,
    owners: Vec<(kvstore_checkpoint::sessions::Name, u64, Vec<u8>)>,
}

fn index_of(object: &[u8]) -> &[u8] {
    let needs = Entry::needs(object).unwrap() as usize;
    &object[object.len() - needs..object.len() - 48]
}

async fn written(objects: Vec<(object_store::path::Path, Vec<u8>)>) -> Vec<Written> {
    let mut logs: Vec<Written> = Vec::new();
    let mut owners = Vec::new();
    for (location, bytes) in objects {
        let parts: Vec<String> = location.parts().map(|part| part.as_ref().to_owned()).collect();
        let number: u64 = parts.last().unwrap().parse().unwrap();
        if parts[2] == "sessions" {
            let name = kvstore_checkpoint::sessions::Name::new(&parts[3], &parts[4]).unwrap();
            owners.push((name, number, bytes));
            continue;
        }
        if logs.last().is_none_or(|written| written.log != parts[3]) {
            let log = parts[3].clone();
            logs.push(Written { log, records: Vec::new(), entries: Vec::new(), owners: Vec::new() });
        }
        let written = logs.last_mut().unwrap();
        let entry = Entry::decode(&bytes, bytes.len() as u64, &written.log, number).unwrap();
        for Row(slot, _, first, length) in &entry.rows.0 {
            let record = bytes[*first as usize..(first + length) as usize].to_vec();
            written.records.push((number, *slot, record));
        }
        written.entries.push((number, bytes));
    }
    logs[0].owners = owners;
    logs
}

async fn some() -> Written {
    let memory = Arc::new(InMemory::new());
    let writer = Writer::begin(&Door::new(&memory).store(), "writer").await.unwrap();
    let mut engine = Engine::new(&[1, 2, 3], 4);
    writer.open(&name("a")).await.unwrap();
    let begin = Step::begin(name("a"), head(&[1, 2, 3]), Some(engine.step(10)));
    writer.commit(vec![begin]).await.unwrap().remove(0).unwrap();
    for token in 0..3 {
        writer.commit(vec![Step::append(name("a"), engine.step(token))]).await.unwrap().remove(0).unwrap();
    }
    written(objects(&memory, "sessions").await).await.remove(0)
}

/// What lies about a length takes no memory: a process that may have no more than it has and a little is not ended by it.
fn bound_memory() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let most = Some(8 << 30);
    setrlimit(Resource::As, Rlimit { current: most, maximum: most }).unwrap();
}

/// Beginnings of strings, lists and maps of any length, of tags, and a break.
const LIES: [u8; 14] = [0x5b, 0x7b, 0x9b, 0xbb, 0x5f, 0x7f, 0x9f, 0xbf, 0xff, 0xdb, 0xf6, 0x3b, 0x1b, 0xfb];

fn lies(cbor: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    (0..cbor.len()).flat_map(move |at| {
        LIES.into_iter().flat_map(move |lie| {
            let huge = [&cbor[..at], &[lie], &[0xff; 8], &cbor[at + 1..]].concat();
            let large = [&cbor[..at], &[lie], &[0, 0, 0, 0, 0xff, 0, 0, 0], &cbor[at + 1..]].concat();
            let replaced = [&cbor[..at], &[lie], &cbor[at + 1..]].concat();
            [huge, large, replaced]
        })
    })
}

#[tokio::test]
async fn what_was_damaged_is_refused() {
    let written = some().await;
    let log = written.log.as_str();
    let flipped = |bytes: &[u8], bit: usize| {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    };
    for (number, slot, record) in &written.records {
        assert!(Record::decode(record, log, *number, *slot).is_ok());
        for length in 0..record.len() {
            assert!(Record::decode(&record[..length], log, *number, *slot).is_err());
            assert!(Record::decode(&record[length + 1..], log, *number, *slot).is_err());
        }
        for bit in 0..record.len() * 8 {
            assert!(Record::decode(&flipped(record, bit), log, *number, *slot).is_err());
        }
        assert!(Record::decode(record, log, number + 1, *slot).is_err(), "it is another's number");
        assert!(Record::decode(record, log, *number, slot + 1).is_err(), "it is another's slot");
        assert!(Record::decode(record, &"0".repeat(32), *number, *slot).is_err(), "it is another's log");
    }
    for (number, entry) in &written.entries {
        let bytes = entry.len() as u64;
        assert!(Entry::decode(entry, bytes, log, *number).is_ok());
        assert!(Entry::decode(entry, bytes, log, number + 1).is_err());
        assert!(Entry::decode(entry, bytes, &"0".repeat(32), *number).is_err());
        let index = index_of(entry).len() + 48;
        for length in 0..entry.len() {
            assert!(Entry::decode(&entry[..length], length as u64, log, *number).is_err());
        }
        for bit in (entry.len() - index) * 8..entry.len() * 8 {
            assert!(Entry::decode(&flipped(entry, bit), bytes, log, *number).is_err(), "bit {bit}");
        }
    }
    for (name, epoch, owner) in &written.owners {
        assert!(Owner::decode(owner, name, *epoch).is_ok());
        for length in 0..owner.len() {
            assert!(Owner::decode(&owner[..length], name, *epoch).is_err());
        }
        for bit in 0..owner.len() * 8 {
            assert!(Owner::decode(&flipped(owner, bit), name, *epoch).is_err());
        }
        assert!(Owner::decode(owner, name, epoch + 1).is_err());
    }
}

/// Whoever can sign can lie about lengths: that ends no process, and what does come out is what is checked.
#[tokio::test]
async fn lies_about_lengths_take_no_memory() {
    let written = some().await;
    bound_memory();
    let log = written.log.as_str();
    let (mut refused, mut read) = (0, 0);
    let mut count = |is_ok: bool| if is_ok { read += 1 } else { refused += 1 };
    for (number, slot, record) in &written.records {
        for lie in lies(&record[..record.len() - 32]) {
            count(Record::decode(&sign(&lie, log, *number, *slot), log, *number, *slot).is_ok());
        }
    }
    for (number, entry) in &written.entries {
        for lie in lies(index_of(entry)) {
            let signed = sign_index(&lie);
            count(Entry::decode(&signed, signed.len() as u64, log, *number).is_ok());
        }
    }
    for (name, epoch, owner) in &written.owners {
        for lie in lies(&owner[..owner.len() - 32]) {
            let signed = [&lie[..], blake3::hash(&lie).as_bytes()].concat();
            count(Owner::decode(&signed, name, *epoch).is_ok());
        }
    }
    assert!(refused > 10_000 && read < refused / 5, "{refused} refused, {read} read");
}

fn entry(number: u64, kind: Kind) -> Entry {
    let log = "0".repeat(32);
    let by = (kind != Kind::Commit).then(|| Sealer { log: "1".repeat(32), writer: "w".into() });
    let (critical, rows, pointers) = Default::default();
    Entry { format: 1, critical, log, number, kind, by, rows, pointers }
}

#[test]
fn entries_that_cannot_be_are_refused_by_name() {
    let decode = |entry: &Entry, body: usize| -> Result<Entry, Refused> {
        let stored = entry.finish(vec![0; body])?;
        Entry::decode(&stored, stored.len() as u64, &entry.log, entry.number)
    };
    assert!(decode(&entry(0, Kind::Begin), 0).is_ok() && decode(&entry(0, Kind::Seal), 0).is_ok());
    assert!(decode(&entry(5, Kind::Commit), 0).is_ok() && decode(&entry(5, Kind::Seal), 0).is_ok());
    let says = |entry: Entry, what: &str| {
        let error = decode(&entry, 10).unwrap_err().to_string();
        assert!(error.contains(what), "{error:?} does not say {what:?}");
    };
    says(Entry { format: 2, ..entry(5, Kind::Commit) }, "format 2");
    says(Entry { critical: Bounded(vec!["encryption".into()]), ..entry(5, Kind::Commit) }, "encryption");
    says(entry(5, Kind::Begin), "what can be at its place");
    says(entry(0, Kind::Commit), "what can be at its place");
    says(Entry { by: None, ..entry(5, Kind::Seal) }, "what can be at its place");
    let by = Some(Sealer { log: "x".into(), writer: String::new() });
    says(Entry { by, ..entry(5, Kind::Seal) }, "who wrote it");
    let rows = |rows: Vec<Row>| Entry { rows: Bounded(rows), ..entry(5, Kind::Commit) };
    assert!(decode(&rows(vec![Row(1, None, 0, 10)]), 10).is_ok());
    says(rows(vec![Row(1, None, 0, 11)]), "slot 1 does not lie in it");
    says(rows(vec![Row(1, None, u64::MAX, 2)]), "slot 1 does not lie in it");
    says(rows(vec![Row(1, None, 0, 1), Row(1, None, 2, 1)]), "twice");
    says(rows((0..5000).map(|slot| Row(slot, None, 0, 1)).collect()), "more than 4096 items");
    says(Entry { kind: Kind::Seal, by: entry(5, Kind::Seal).by, ..rows(vec![Row(1, None, 0, 1)]) }, "is no commit");
    let pointers =
        |number| Entry { pointers: Bounded(vec![Pointer(1, None, Place(number, 0, 1))]), ..entry(5, Kind::Commit) };
    assert!(decode(&pointers(4), 10).is_ok());
    says(pointers(5), "points to what comes later");
}

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/compat/session_v1")
}

fn sample_engines() -> [Engine; 2] {
    let mut engines = [Engine::new(&[1, 2, 3], 6), Engine::new(&[7], 6)];
    engines[0].tokens.extend(1000..1011);
    engines[1].tokens.extend(2000..2003);
    engines
}

/// Writes the sample where it is missing and KVSTORE_WRITE_SAMPLES is set: once for each version.
async fn write_sample() {
    if sample().exists() || std::env::var_os("KVSTORE_WRITE_SAMPLES").is_none() {
        return;
    }
    std::fs::create_dir_all(sample()).unwrap();
    let store = Store::of_proven(Arc::new(LocalFileSystem::new_with_prefix(sample()).unwrap()));
    let first = Writer::begin(&store, "first").await.unwrap();
    let [one, other] = sample_engines();
    let (mut one_now, mut other_now) = (Engine::new(&one.tokens[..3], 6), Engine::new(&other.tokens[..1], 6));
    for id in ["one", "other", "closed"] {
        first.open(&name(id)).await.unwrap();
    }
    let steps = vec![
        Step::begin(name("one"), head(&[1, 2, 3]), Some(one_now.step(one.tokens[3]))),
        Step::begin(name("other"), head(&[7]), Some(other_now.step(other.tokens[1]))),
        Step::begin(name("closed"), head(&[5]), None),
    ];
    first.commit(steps).await.unwrap();
    for id in &one.tokens[4..10] {
        first.commit(vec![Step::append(name("one"), one_now.step(*id))]).await.unwrap();
    }
    let last = other_now.step(other.tokens[2]);
    let steps = vec![Step::end(name("closed"), None, End::Closed), Step::end(name("other"), Some(last), End::Moved)];
    first.commit(steps).await.unwrap();
    first.tidy().await.unwrap();
    let second = Writer::begin(&store, "second").await.unwrap();
    for id in ["one", "other"] {
        second.claim(&name(id)).await.unwrap();
    }
    for id in &one.tokens[10..] {
        second.commit(vec![Step::append(name("one"), one_now.step(*id))]).await.unwrap();
    }
    second.commit(vec![Step::append(name("other"), other_now.step(other.tokens[3]))]).await.unwrap();
}

#[tokio::test]
async fn sessions_of_version_1_are_read_and_written_as_they_were() {
    write_sample().await;
    let memory = Arc::new(InMemory::new());
    let folder = LocalFileSystem::new_with_prefix(sample()).unwrap();
    let listed: Vec<_> =
        futures::TryStreamExt::try_collect(object_store::ObjectStore::list(&folder, None)).await.unwrap();
    for meta in listed {
        let bytes = folder.get(&meta.location).await.unwrap().bytes().await.unwrap();
        memory.put(&meta.location, bytes.into()).await.unwrap();
    }
    let before = objects(&memory, "sessions").await;
    assert_eq!(before.len(), 9 + 1 + 6 + 6, "two logs, a seal, and the epochs of three sessions");
    let store = Door::new(&memory).store();
    assert_eq!(store.inspect(&name("closed")).await.unwrap().ends, Some(End::Closed));
    let third = Writer::begin(&store, "third").await.unwrap();
    for (id, engine) in ["one", "other"].into_iter().zip(sample_engines()) {
        let claimed = third.claim(&name(id)).await.unwrap();
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
        assert_eq!(claimed.epoch, 3);
    }
    for written in written(before).await {
        let log = written.log.as_str();
        for (number, slot, stored) in &written.records {
            let record = Record::decode(stored, log, *number, *slot).unwrap();
            assert_eq!(&record.encode(log, *number, *slot).unwrap(), stored);
            assert_eq!(&sign(&stored[..stored.len() - 32], log, *number, *slot), stored);
        }
        for (number, stored) in &written.entries {
            let entry = Entry::decode(stored, stored.len() as u64, log, *number).unwrap();
            let body = stored.len() - index_of(stored).len() - 48;
            assert_eq!(&entry.finish(stored[..body].to_vec()).unwrap(), stored);
            assert_eq!(sign_index(index_of(stored)), stored[body..]);
        }
        for (name, epoch, stored) in &written.owners {
            assert_eq!(&Owner::decode(stored, name, *epoch).unwrap().encode().unwrap(), stored);
        }
    }
}
