//! A folder as an object store: that of the object_store crate, but for creates. Large objects are written past the page cache: there they
//! would take a copy, memory that has to be found first, and a second pass when they are synced, and nobody reads them soon. And what
//! could not be synced is taken away again, so that a second try does not find an object that a loss of power would take.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Bodies that begin at such an address in memory, in one piece, are written past the page cache.
pub const ALIGNMENT: usize = 4096;
/// From so many bytes on. Below, the page cache is cheaper than a wait for the disk.
const DIRECT_BYTES_MIN: usize = 1 << 20;

/// Types of file systems that are on a disk or in the memory of this machine, as statfs(2) has them: ext2 to ext4, XFS, btrfs, F2FS, ZFS,
/// bcachefs, tmpfs and overlays.
const LOCAL: [u64; 8] =
    [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0x2FC1_2FC1, 0xCA45_1A4E, 0x0102_1994, 0x794C_7630];

/// Whether a folder, which may not be there yet, is on such a file system. What is written there has no network to pass.
pub(crate) fn is_local(folder: &FilePath) -> bool {
    let Some(there) = folder.ancestors().find(|one| one.exists()) else { return false };
    rustix::fs::statfs(there).is_ok_and(|about| LOCAL.contains(&(about.f_type.cast_unsigned() & 0xFFFF_FFFF)))
}

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Folder(LocalFileSystem);

impl Folder {
    /// What is written is on the disk before it is acknowledged.
    pub(crate) fn new() -> Self {
        Self(LocalFileSystem::new().with_fsync(true))
    }
}

/// The pieces of a body that is created.
struct Body(Vec<Bytes>);

impl Body {
    fn bytes(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    /// What of it can be written past the page cache.
    fn direct(&self) -> Option<&Bytes> {
        let [one] = self.0.as_slice() else { return None };
        (self.bytes() >= DIRECT_BYTES_MIN && one.as_ptr().addr().is_multiple_of(ALIGNMENT)).then_some(one)
    }
}

/// Creates an object. Where it fails, there is none, or somebody else's, whose name is on the disk.
fn create(path: &FilePath, body: &Body) -> io::Result<()> {
    let parent = path.parent().unwrap_or(FilePath::new("/"));
    let (mut file, staged) = stage(path, body.direct().is_some())?;
    let linked = write(&mut file, body).and_then(|()| fs::hard_link(&staged, path));
    let removed = fs::remove_file(&staged);
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            sync_folder(parent)?;
            return Err(error);
        }
        linked => linked?,
    }
    let synced = removed.and_then(|()| sync_folder(parent));
    if synced.is_err() {
        // Whoever tries again must not find it.
        let _ = fs::remove_file(path);
    }
    synced
}

/// A file beside the object's, named as the crate names them: no listing shows it, and what was left behind is found by its name.
fn stage(path: &FilePath, mut is_direct: bool) -> io::Result<(File, PathBuf)> {
    let mut number = 1;
    let mut has_parents = false;
    loop {
        let mut staged = path.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        let flags = if is_direct { OFlags::DIRECT.bits().cast_signed() } else { 0 };
        match OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&staged) {
            Ok(file) => return Ok((file, staged.into())),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !has_parents => {
                path.parent().map_or(Ok(()), make_folders)?;
                has_parents = true;
            }
            // Some file systems do not write past their cache, and some of these make the file before they say so.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && is_direct => {
                let _ = fs::remove_file(&staged);
                is_direct = false;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Writes the body and syncs it. What cannot be written past the page cache goes through it.
fn write(file: &mut File, body: &Body) -> io::Result<()> {
    let mut at = 0;
    if let Some(bytes) = body.direct() {
        let whole = bytes.len() - bytes.len() % ALIGNMENT;
        // A write that was cut short within a page leaves the rest to the page cache.
        while at < whole && at.is_multiple_of(ALIGNMENT) {
            match file.write(bytes.get(at..whole).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It wants to be written in larger steps.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
        let flags = fcntl_getfl(&*file)?;
        fcntl_setfl(&*file, flags - OFlags::DIRECT)?;
    }
    for piece in &body.0 {
        file.write_all(piece.get(at..).unwrap_or_default())?;
        at = at.saturating_sub(piece.len());
    }
    file.sync_all()
}

/// Removes what creates left behind below a folder that were ended while they wrote, and more than `age` ago. How many.
pub fn remove_staged(folder: &FilePath, age: Duration) -> io::Result<u64> {
    let (mut folders, mut removed) = (vec![folder.to_owned()], 0);
    while let Some(at) = folders.pop() {
        let entries = match fs::read_dir(&at) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
            let is_staged =
                number.is_some_and(|number| !number.is_empty() && number.bytes().all(|one| one.is_ascii_digit()));
            let about = entry.metadata()?;
            if about.is_dir() {
                folders.push(entry.path());
            } else if is_staged && about.modified()?.elapsed().is_ok_and(|since| since > age) {
                fs::remove_file(entry.path())?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}

fn sync_folder(folder: &FilePath) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder and those above it, and syncs each that has a new one in it.
fn make_folders(folder: &FilePath) -> io::Result<()> {
    let missing: Vec<&FilePath> = folder.ancestors().take_while(|one| !one.exists()).collect();
    fs::create_dir_all(folder)?;
    missing.into_iter().filter_map(FilePath::parent).try_for_each(sync_folder)
}

impl fmt::Display for Folder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Folder {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if !(matches!(options.mode, PutMode::Create) && options.attributes.is_empty()) {
            return self.0.put_opts(location, payload, options).await;
        }
        let (path, body) = (self.0.path_to_filesystem(location)?, Body(payload.iter().cloned().collect()));
        let created = tokio::task::spawn_blocking(move || create(&path, &body)).await;
        match created.map_err(io::Error::other).flatten() {
            Ok(()) => Ok(PutResult { e_tag: None, version: None, extensions: Default::default() }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::AlreadyExists { path: location.to_string(), source: error.into() })
            }
            Err(error) => Err(Error::Generic { store: "LocalFileSystem", source: error.into() }),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.0.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use object_store::ObjectStoreExt;

    use super::*;

    #[test]
    fn disks_of_this_machine_are_told_from_others() {
        assert!(is_local(FilePath::new("/dev/shm/not/there/yet")));
        assert!(!is_local(FilePath::new("/proc/self")) && !is_local(FilePath::new("")));
    }

    /// Bytes that begin at a page.
    fn aligned(length: usize) -> Bytes {
        let memory: Vec<u8> = (0..length + ALIGNMENT).map(|at| (at % 251) as u8).collect();
        let start = memory.as_ptr().addr().next_multiple_of(ALIGNMENT) - memory.as_ptr().addr();
        Bytes::from(memory).slice(start..start + length)
    }

    fn at(folder: &tempfile::TempDir, name: &str) -> Path {
        Path::from_absolute_path(folder.path().join(name)).unwrap()
    }

    #[tokio::test]
    async fn large_objects_are_there_once_and_whole() {
        for place in [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()] {
            let store = Folder::new();
            for length in [DIRECT_BYTES_MIN, DIRECT_BYTES_MIN + 1, DIRECT_BYTES_MIN + ALIGNMENT + 32] {
                let (body, name) = (aligned(length), at(&place, &format!("deep/{length}/object")));
                assert!(Body(vec![body.clone()]).direct().is_some(), "it goes past the page cache");
                store.put_opts(&name, body.clone().into(), PutMode::Create.into()).await.unwrap();
                assert_eq!(store.get(&name).await.unwrap().bytes().await.unwrap(), body);
                let again = store.put_opts(&name, aligned(length + 1).into(), PutMode::Create.into()).await;
                assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
                assert_eq!(store.get(&name).await.unwrap().bytes().await.unwrap(), body);
            }
            let files: Vec<PathBuf> = walk(place.path());
            assert_eq!(files.len(), 3, "nothing is left of what was staged: {files:?}");
        }
    }

    #[tokio::test]
    async fn small_ones_and_those_in_pieces_are_as_whole() {
        let (place, store) = (tempfile::tempdir().unwrap(), Folder::new());
        let pieces = [Bytes::from_static(b"one"), Bytes::new(), aligned(DIRECT_BYTES_MIN), Bytes::from_static(b"two")];
        for body in [
            Vec::new(),
            vec![Bytes::from_static(b"small")],
            pieces.to_vec(),
            vec![aligned(DIRECT_BYTES_MIN + 9).slice(1..)],
        ] {
            let name = at(&place, &format!("{}", body.len()));
            store.put_opts(&name, body.iter().cloned().collect(), PutMode::Create.into()).await.unwrap();
            assert_eq!(store.get(&name).await.unwrap().bytes().await.unwrap(), body.concat());
            store.delete(&name).await.unwrap();
        }
    }

    /// They were left where a process was killed, and no listing shows them: a disk filled up with them.
    #[test]
    fn what_was_left_behind_is_removed_once_it_is_old() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("aa")).unwrap();
        for name in ["aa/object#12", "aa/object", "aa/object#x", "object#1"] {
            fs::write(place.path().join(name), b"").unwrap();
        }
        assert_eq!(remove_staged(place.path(), Duration::from_secs(3600)).unwrap(), 0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(remove_staged(place.path(), Duration::ZERO).unwrap(), 2);
        assert_eq!(walk(place.path()).len(), 2);
        assert_eq!(remove_staged(&place.path().join("nowhere"), Duration::ZERO).unwrap(), 0);
    }

    /// What a process left behind that was killed stands in nobody's way, and is not listed.
    #[tokio::test]
    async fn a_staged_file_that_was_left_behind_is_no_object() {
        let place = tempfile::tempdir().unwrap();
        let (store, name) = (Folder::new(), at(&place, "object"));
        fs::write(place.path().join("object#1"), b"half").unwrap();
        store.put_opts(&name, aligned(DIRECT_BYTES_MIN).into(), PutMode::Create.into()).await.unwrap();
        let listed: Vec<ObjectMeta> = store.list(Some(&at(&place, ""))).try_collect().await.unwrap();
        assert_eq!(listed.into_iter().map(|meta| meta.location).collect::<Vec<_>>(), [name]);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("file"), b"").unwrap();
        let below = at(&place, "file/object");
        let error = Folder::new().put_opts(&below, aligned(DIRECT_BYTES_MIN).into(), PutMode::Create.into()).await;
        assert!(error.is_err_and(|error| !matches!(error, Error::AlreadyExists { .. })));
    }

    fn walk(folder: &FilePath) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
    }
}
