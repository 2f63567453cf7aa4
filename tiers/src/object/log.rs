//! The upload log: which blocks are still to be uploaded, on disk, so that a restart goes on with them.
//!
//! Records are appended as blocks come and as they are done; what is left is written anew when the log has grown far beyond it. A
//! record that was cut off or flipped, and all behind it, are left out: those blocks are on this node alone. The blocks' bytes
//! are the Nvme tier's. Written to the page cache at once, so that a kill loses nothing, and synced ten times a second where something
//! was written, and before a deletion is answered.
//!
//! After a write that failed the end of the file may be torn, and what came behind would be left out; after a sync that failed, its
//! pages may be gone. Such a file is not written any more: what is owed, which memory knows, is written into a new one. Where that
//! fails, too, the next try waits, twice as long each time: a full disk must not have each record write the whole log.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvstore_plane::SequenceHash;
use kvstore_transfer::crc32;
use serde::{Deserialize, Serialize};

use crate::caps;
use crate::clock::BootTime;
use crate::layout::Layout;

/// What every log begins with ...
const NAME: &[u8; 7] = b"KVUPLOG";
/// ... and what follows in those that this build reads and writes.
const VERSION: u8 = b'1';
/// The log is written anew when it has this many bytes ...
const COMPACT_FROM_BYTES: u64 = 1 << 20;
/// ... and this many times what is still needed.
const COMPACT_FACTOR: u64 = 4;
/// A record is a layout at most: 64 layer groups and 400 bytes of names, as JSON.
const RECORD_BYTES_MAX: usize = 64 << 10;

/// A block that is to be uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owed {
    /// Its layout, by its number in this log.
    pub layout: u32,
    /// Its layer group.
    pub group: u16,
    /// Its name.
    pub hash: SequenceHash,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// Its bytes.
    pub length: u32,
}

type Key = (u32, u16, SequenceHash);

#[derive(Serialize, Deserialize)]
struct LoggedLayout {
    namespace: String,
    layout: Layout,
}

#[derive(Serialize, Deserialize)]
enum Record {
    #[serde(rename = "l")]
    Layout(u32, LoggedLayout),
    #[serde(rename = "b")]
    Block { l: u32, g: u16, h: String, p: String, n: u32 },
    #[serde(rename = "d")]
    Done { l: u32, g: u16, h: String },
}

/// See the head of this file.
pub struct UploadLog {
    path: PathBuf,
    file: File,
    bytes: u64,
    unsynced: bool,
    /// A write or a sync failed: the file is not to be trusted.
    broken: bool,
    /// Tries to write it anew that failed, in a row ...
    failed: u32,
    /// ... and when the next one is due.
    not_before: BootTime,
    clock: fn() -> BootTime,
    layouts: Vec<(String, Layout)>,
    numbers: HashMap<[u8; 64], u32>,
    owed: HashMap<Key, (u64, Owed)>,
    next: u64,
}

impl UploadLog {
    /// Opens or makes the log in `folder`. Where it cannot be written anew, on a full disk, what it says is owed all the same, and it
    /// is written anew later.
    pub fn open(folder: &Path, clock: fn() -> BootTime) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join("uploads");
        let mut log = Self::empty(open_file(&path, false)?, path, clock);
        let mut all = Vec::new();
        log.file.read_to_end(&mut all)?;
        log.check_version(&all)?;
        log.replay(&all);
        log.forget_layouts();
        if let Err(error) = log.compact() {
            tracing::warn!(path = %log.path.display(), %error, "the upload log cannot be written; deletions are refused until it can be");
        }
        Ok(log)
    }

    fn empty(file: File, path: PathBuf, clock: fn() -> BootTime) -> Self {
        Self {
            file,
            path,
            bytes: 0,
            unsynced: false,
            broken: false,
            failed: 0,
            not_before: BootTime(0),
            clock,
            layouts: Vec::new(),
            numbers: HashMap::new(),
            owed: HashMap::new(),
            next: 0,
        }
    }

    /// A later build's log is left alone. What is no log at all is put aside.
    fn check_version(&self, all: &[u8]) -> io::Result<()> {
        match all.strip_prefix(NAME) {
            Some([VERSION, ..]) => Ok(()),
            Some([version, ..]) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "{} has version {:?}, and this build reads version 1: start the build that wrote it, or move the file away to forget its uploads",
                    self.path.display(),
                    char::from(*version)
                ),
            )),
            _ if all.is_empty() => Ok(()),
            _ => {
                let aside = self.path.with_extension("damaged");
                tracing::warn!(path = %self.path.display(), aside = %aside.display(), "the upload log does not begin as one: the uploads recorded in it are forgotten, and the file is put aside");
                std::fs::rename(&self.path, aside)
            }
        }
    }

    fn replay(&mut self, all: &[u8]) {
        let Some([VERSION, rest @ ..]) = all.strip_prefix(NAME) else { return };
        let mut rest = rest;
        while let Some((head, behind)) = rest.split_first_chunk::<8>() {
            let [a, b, c, d, e, f, g, h] = *head;
            let (length, sum) = (u32::from_le_bytes([a, b, c, d]) as usize, u32::from_le_bytes([e, f, g, h]));
            let Some(body) = behind.get(..length).filter(|body| length <= RECORD_BYTES_MAX && crc32(body) == sum)
            else {
                tracing::warn!(path = %self.path.display(), "the upload log is damaged; the uploads recorded after the damage are forgotten");
                return;
            };
            if let Ok(record) = serde_json::from_slice(body) {
                self.apply(record);
            }
            rest = behind.get(length..).unwrap_or_default();
        }
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Layout(number, LoggedLayout { namespace, layout }) => {
                if number as usize == self.layouts.len() {
                    self.numbers.insert(name_of(&namespace, &layout), number);
                    self.layouts.push((namespace, layout));
                }
            }
            Record::Block { l, g, h, p, n } => {
                let parent = if p.is_empty() { Some(None) } else { unhex(&p).map(Some) };
                if let (Some(hash), Some(parent)) = (unhex(&h), parent) {
                    let owed = Owed { layout: l, group: g, hash, parent, length: n };
                    self.owed.insert((l, g, hash), (self.next, owed));
                    self.next += 1;
                }
            }
            Record::Done { l, g, h } => {
                if let Some(hash) = unhex(&h) {
                    self.owed.remove(&(l, g, hash));
                }
            }
        }
    }

    /// Layouts that are named, by their number: the namespace and the layout.
    pub fn layout(&self, number: u32) -> Option<&(String, Layout)> {
        self.layouts.get(number as usize)
    }

    /// What is still to be uploaded, oldest first.
    pub fn owed(&self) -> Vec<Owed> {
        let mut owed: Vec<_> = self.owed.values().copied().collect();
        owed.sort_by_key(|(at, _)| *at);
        owed.into_iter().map(|(_, owed)| owed).collect()
    }

    /// The number of a layout; written first, where it is new. Where the file cannot be written, whoever writes the next record is
    /// told so: until the file is written anew, with this layout, none can be.
    pub fn number(&mut self, namespace: &str, layout: &Layout) -> u32 {
        let name = name_of(namespace, layout);
        if let Some(number) = self.numbers.get(&name) {
            return *number;
        }
        let number = self.layouts.len() as u32;
        self.layouts.push((namespace.to_owned(), layout.clone()));
        self.numbers.insert(name, number);
        let logged = LoggedLayout { namespace: namespace.to_owned(), layout: layout.clone() };
        self.broken = self.write(&Record::Layout(number, logged)).is_err();
        number
    }

    /// A block is to be uploaded.
    pub fn add(&mut self, owed: Owed) -> io::Result<()> {
        let parent = owed.parent.map(|parent| parent.to_string()).unwrap_or_default();
        let record =
            Record::Block { l: owed.layout, g: owed.group, h: owed.hash.to_string(), p: parent, n: owed.length };
        // First: where the file cannot be written, it is written anew with all that is owed.
        self.owed.insert((owed.layout, owed.group, owed.hash), (self.next, owed));
        self.next += 1;
        self.write(&record)
    }

    /// A block is uploaded, or will not be.
    pub fn done(&mut self, layout: u32, group: u16, hash: SequenceHash) -> io::Result<()> {
        if self.owed.remove(&(layout, group, hash)).is_some() {
            self.write(&Record::Done { l: layout, g: group, h: hash.to_string() })?;
        }
        Ok(())
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        if self.broken {
            // With this record: memory has it already.
            return self.write_anew_if_due();
        }
        let bytes = encode(record)?;
        if let Err(error) = self.file.write_all(&bytes) {
            self.broken = true;
            return Err(error);
        }
        self.bytes += bytes.len() as u64;
        self.unsynced = true;
        Ok(())
    }

    /// The file cannot be relied on any more: it is written anew, now or as soon as that is due.
    pub fn distrust(&mut self) -> io::Result<()> {
        self.broken = true;
        self.write_anew_if_due()
    }

    /// A file to sync, where something was written since the last call: to be synced without holding anybody up. A log that could
    /// not be written is written anew first.
    pub fn take_unsynced(&mut self) -> io::Result<Option<File>> {
        if self.broken {
            self.write_anew_if_due()?;
        }
        if !self.unsynced {
            return Ok(None);
        }
        let file = self.file.try_clone()?;
        self.unsynced = false;
        Ok(Some(file))
    }

    /// Writes the log anew where most of it is of no use any more.
    pub fn compact_if_grown(&mut self) -> io::Result<()> {
        let needed = (self.owed.len() as u64 + self.layouts.len() as u64 * 4) * 300;
        let has_grown = self.bytes > COMPACT_FROM_BYTES && self.bytes > needed * COMPACT_FACTOR;
        match has_grown && self.is_due() {
            true => self.compact(),
            false => Ok(()),
        }
    }

    fn is_due(&self) -> bool {
        (self.clock)() >= self.not_before
    }

    fn write_anew_if_due(&mut self) -> io::Result<()> {
        if self.is_due() {
            return self.compact();
        }
        let problem = "the upload log could not be written, and is written anew in a moment";
        Err(io::Error::new(io::ErrorKind::WouldBlock, problem))
    }

    /// Forgets layouts of which nothing is owed. Gives the others new numbers.
    fn forget_layouts(&mut self) {
        let used: std::collections::BTreeSet<u32> = self.owed.values().map(|(_, owed)| owed.layout).collect();
        self.numbers.clear();
        let mut renumbered = HashMap::new();
        for (number, (namespace, layout)) in (0u32..).zip(std::mem::take(&mut self.layouts)) {
            if used.contains(&number) {
                let new = self.layouts.len() as u32;
                renumbered.insert(number, new);
                self.numbers.insert(name_of(&namespace, &layout), new);
                self.layouts.push((namespace, layout));
            }
        }
        let owed = std::mem::take(&mut self.owed).into_values();
        let renumber = |(at, owed): (u64, Owed)| {
            let layout = *renumbered.get(&owed.layout)?;
            Some(((layout, owed.group, owed.hash), (at, Owed { layout, ..owed })))
        };
        self.owed = owed.filter_map(renumber).collect();
    }

    /// Writes what is needed into a new log, and puts that in place of the old one. Where that fails, this is as it was, and is left
    /// alone for a while.
    pub fn compact(&mut self) -> io::Result<()> {
        let failed = self.failed + 1;
        let written = self.written_anew().map(|new| *self = new).and_then(|()| {
            // Until its name is on the disk, a power cut may bring back the old one.
            self.path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
        });
        if written.is_err() {
            self.broken = true;
            self.failed = failed;
            let pause_ms = (caps::OBJECT_LOG_BACKOFF_MS << failed.min(16)).min(caps::OBJECT_LOG_BACKOFF_MS_MAX);
            self.not_before = (self.clock)().plus_ms(pause_ms);
        }
        written
    }

    fn written_anew(&self) -> io::Result<Self> {
        let new_path = self.path.with_extension("new");
        let mut new = Self::empty(open_file(&new_path, true)?, self.path.clone(), self.clock);
        new.file.write_all(NAME)?;
        new.file.write_all(&[VERSION])?;
        new.bytes = NAME.len() as u64 + 1;
        for (namespace, layout) in &self.layouts {
            new.number(namespace, layout);
            if new.broken {
                return Err(io::Error::other("the new upload log cannot be written"));
            }
        }
        for owed in self.owed() {
            new.add(owed)?;
        }
        new.file.sync_all()?;
        std::fs::rename(&new_path, &self.path)?;
        new.unsynced = false;
        Ok(new)
    }
}

fn open_file(path: &Path, new: bool) -> io::Result<File> {
    let flags = (rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NOFOLLOW).bits();
    OpenOptions::new()
        .read(true)
        .append(!new)
        .write(true)
        .create(true)
        .truncate(new)
        .mode(0o600)
        .custom_flags(flags as i32)
        .open(path)
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(record)?;
    let mut out = Vec::with_capacity(body.len() + 8);
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc32(&body).to_le_bytes());
    out.extend_from_slice(&body);
    Ok(out)
}

fn name_of(namespace: &str, layout: &Layout) -> [u8; 64] {
    let mut name = [0; 64];
    let namespace = blake3::hash(namespace.as_bytes());
    let digests = namespace.as_bytes().iter().copied().chain(layout.digest());
    name.iter_mut().zip(digests).for_each(|(to, from)| *to = from);
    name
}

fn unhex(text: &str) -> Option<SequenceHash> {
    super::names::unhex(text).and_then(|bytes| SequenceHash::new(&bytes).ok())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::layout::{BlockKind, DimensionOrder, LayerGroup, Shard};

    fn layout(model: &str) -> Layout {
        let group = LayerGroup {
            kind: BlockKind::SlidingWindow { tokens: 7 },
            layers: 1,
            planes: 2,
            heads: 3,
            head_bytes: 4,
            order: DimensionOrder::Opaque,
        };
        Layout {
            model: model.into(),
            weights_digest: vec![0xff],
            dtype: "bfloat16".into(),
            block_tokens: 16,
            groups: vec![group],
            shard: Shard { index: 1, count: 2 },
            extra: vec![],
        }
    }

    fn hash(id: u64) -> SequenceHash {
        SequenceHash::new(&id.to_be_bytes()).unwrap()
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kvstore-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    fn full() -> File {
        OpenOptions::new().write(true).open("/dev/full").unwrap()
    }

    /// Time does not pass but where a test says so.
    static NOW: AtomicU64 = AtomicU64::new(0);

    fn clock() -> BootTime {
        BootTime(NOW.load(Ordering::Relaxed))
    }

    fn pass(ms: u64) {
        NOW.fetch_add(ms, Ordering::Relaxed);
    }

    /// The disk was full, and each block that came or went wrote the whole log anew, under the lock that puts wait for.
    #[test]
    fn a_log_that_cannot_be_written_is_written_anew_now_and_then_and_not_with_each_record() {
        let folder = folder("full-upload-log");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let layout = log.number("a", &layout("m"));
        let owed = |id| Owed { layout, group: 0, hash: hash(id), parent: None, length: 9 };
        (0..3).for_each(|id| log.add(owed(id)).unwrap());
        log.file = full();
        // Whoever writes a new file finds this in its way.
        let new = folder.join("uploads.new");
        std::fs::create_dir(&new).unwrap();
        assert!(log.add(owed(3)).is_err(), "torn");
        assert!(log.add(owed(4)).is_err(), "and not written anew");
        std::fs::remove_dir(&new).unwrap();
        let error = log.add(owed(5)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "it was tried a moment ago");
        assert!(log.done(layout, 0, hash(0)).is_err() && log.take_unsynced().is_err(), "nothing is promised meanwhile");
        assert!(!new.exists(), "nothing is written");
        pass(caps::OBJECT_LOG_BACKOFF_MS_MAX);
        log.add(owed(6)).unwrap();
        drop(log);
        let left: Vec<_> = UploadLog::open(&folder, clock).unwrap().owed().iter().map(|owed| owed.hash).collect();
        assert_eq!(left, [1, 2, 3, 4, 5, 6].map(hash), "all that came and went meanwhile");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// The disk was full when the daemon started: the log could not be written anew, and there was no daemon until somebody made room.
    #[test]
    fn a_log_that_cannot_be_written_anew_at_the_start_is_opened_all_the_same() {
        let folder = folder("full-at-start-upload-log");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let (unused, used) = (log.number("a", &layout("m")), log.number("a", &layout("n")));
        let owed = |layout, id| Owed { layout, group: 0, hash: hash(id), parent: None, length: 9 };
        log.add(owed(unused, 0)).unwrap();
        log.add(owed(used, 1)).unwrap();
        log.done(unused, 0, hash(0)).unwrap();
        drop(log);
        // Whoever writes a new file finds this in its way.
        let new = folder.join("uploads.new");
        std::fs::create_dir(&new).unwrap();
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let [found] = log.owed()[..] else { panic!("{:?}", log.owed()) };
        assert_eq!((found.hash, &log.layout(found.layout).unwrap().1), (hash(1), &layout("n")));
        std::fs::remove_dir(&new).unwrap();
        assert_eq!(log.take_unsynced().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it was tried a moment ago");
        assert!(log.add(owed(found.layout, 2)).is_err(), "nothing is promised, or appended to the old file, meanwhile");
        pass(caps::OBJECT_LOG_BACKOFF_MS_MAX);
        log.add(owed(found.layout, 3)).unwrap();
        drop(log);
        let left: Vec<_> = UploadLog::open(&folder, clock).unwrap().owed().iter().map(|owed| owed.hash).collect();
        assert_eq!(left, [1, 2, 3].map(hash));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// A full disk tore the end of the log. What was appended behind the tear was left out at the next start: an upload that was
    /// owed was forgotten, and one that was done, or deleted, was made again.
    #[test]
    fn what_comes_after_a_write_that_failed_is_not_lost_behind_it() {
        let folder = folder("torn-upload-log");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let layout = log.number("a", &layout("m"));
        let owed = |id| Owed { layout, group: 0, hash: hash(id), parent: None, length: 9 };
        (0..3).for_each(|id| log.add(owed(id)).unwrap());
        let whole = std::mem::replace(&mut log.file, full());
        assert!(log.done(layout, 0, hash(0)).is_err());
        // Half of that record is in the file.
        (&whole).write_all(&[200, 0, 0, 0, 1, 2]).unwrap();
        log.file = whole;
        log.add(owed(7)).unwrap();
        log.done(layout, 0, hash(1)).unwrap();
        log.take_unsynced().unwrap().unwrap().sync_data().unwrap();
        drop(log);
        let left: Vec<_> = UploadLog::open(&folder, clock).unwrap().owed().iter().map(|owed| owed.hash).collect();
        assert_eq!(left, [2, 7].map(hash));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// A log that could not be written anew forgot all that it knew.
    #[test]
    fn a_log_that_cannot_be_written_anew_stays_as_it_was_and_says_so() {
        let folder = folder("lost-upload-log");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let layout = log.number("a", &layout("m"));
        let owed = |id| Owed { layout, group: 0, hash: hash(id), parent: None, length: 9 };
        (0..3).for_each(|id| log.add(owed(id)).unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(log.distrust().is_err() && log.take_unsynced().is_err() && log.done(layout, 0, hash(0)).is_err());
        std::fs::create_dir_all(&folder).unwrap();
        pass(caps::OBJECT_LOG_BACKOFF_MS_MAX);
        assert!(log.take_unsynced().unwrap().is_none(), "written anew, and synced");
        drop(log);
        let left: Vec<_> = UploadLog::open(&folder, clock).unwrap().owed().iter().map(|owed| owed.hash).collect();
        assert_eq!(left, [1, 2].map(hash));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_owed_is_found_again_whatever_became_of_the_end() {
        let folder = folder("upload-log");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let (a, b) = (log.number("a", &layout("m")), log.number("b", &layout("m")));
        assert_ne!(a, b);
        let owed =
            |layout, id| Owed { layout, group: 0, hash: hash(id), parent: (id > 0).then(|| hash(id - 1)), length: 9 };
        for id in 0..10 {
            log.add(owed(b, id)).unwrap();
        }
        (0..9).filter(|id| id % 2 == 0).for_each(|id| log.done(b, 0, hash(id)).unwrap());
        drop(log);
        let log = UploadLog::open(&folder, clock).unwrap();
        let left = log.owed();
        assert_eq!(left.iter().map(|owed| owed.hash).collect::<Vec<_>>(), [1, 3, 5, 7, 9].map(hash));
        assert_eq!(log.layout(left[0].layout).unwrap(), &("b".to_owned(), layout("m")));
        assert_eq!(left[0].parent, Some(hash(0)));
        drop(log);
        // Cut off, and flipped: what was before is there.
        let path = folder.join("uploads");
        let whole = std::fs::read(&path).unwrap();
        for damaged in [whole[..whole.len() - 3].to_vec(), {
            let mut flipped = whole.clone();
            let last = flipped.len() - 10;
            flipped[last] ^= 1;
            flipped
        }] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(UploadLog::open(&folder, clock).unwrap().owed().len(), 4);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// A log as version 1 writes it, which later builds must read.
    #[test]
    fn upload_log_version_1() {
        let records = [
            concat!(
                r#"{"l":[0,{"namespace":"a","layout":{"model":[109],"weights_digest":[255],"dtype":"bfloat16","block_tokens":16,"#,
                r#""groups":[{"kind":{"SlidingWindow":{"tokens":7}},"layers":1,"planes":2,"heads":3,"head_bytes":4,"order":"Opaque"}]"#,
                r#","shard":{"index":1,"count":2},"extra":[]}}]}"#,
            ),
            r#"{"b":{"l":0,"g":0,"h":"0000000000000001","p":"","n":9}}"#,
            r#"{"b":{"l":0,"g":0,"h":"0000000000000002","p":"0000000000000001","n":9}}"#,
            r#"{"d":{"l":0,"g":0,"h":"0000000000000001"}}"#,
        ];
        let mut sample = b"KVUPLOG1".to_vec();
        for record in records {
            sample.extend((record.len() as u32).to_le_bytes());
            sample.extend(crc32(record.as_bytes()).to_le_bytes());
            sample.extend(record.as_bytes());
        }
        let folder = folder("upload-log-sample");
        let mut log = UploadLog::open(&folder, clock).unwrap();
        let number = log.number("a", &layout("m"));
        log.add(Owed { layout: number, group: 0, hash: hash(1), parent: None, length: 9 }).unwrap();
        log.add(Owed { layout: number, group: 0, hash: hash(2), parent: Some(hash(1)), length: 9 }).unwrap();
        log.done(number, 0, hash(1)).unwrap();
        let path = folder.join("uploads");
        assert!(std::fs::read(&path).unwrap() == sample, "version 1 is written differently now");
        drop(log);
        std::fs::write(&path, &sample).unwrap();
        let owed = UploadLog::open(&folder, clock).unwrap().owed();
        assert_eq!(owed, [Owed { layout: number, group: 0, hash: hash(2), parent: Some(hash(1)), length: 9 }]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// A log of a later build was taken for an empty one, and replaced.
    #[test]
    fn a_log_of_another_version_is_refused_by_name_and_left_alone() {
        let folder = folder("upload-log-version");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("uploads");
        std::fs::write(&path, b"KVUPLOG2 whatever").unwrap();
        let refused = UploadLog::open(&folder, clock).err().unwrap().to_string();
        assert!(refused.contains("uploads has version '2'"), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"KVUPLOG2 whatever");
        std::fs::write(&path, b"something else").unwrap();
        assert!(UploadLog::open(&folder, clock).unwrap().owed().is_empty());
        assert_eq!(std::fs::read(folder.join("uploads.damaged")).unwrap(), b"something else", "nothing is lost");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
