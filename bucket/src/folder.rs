//! A folder as an object store: that of the object_store crate, but that large objects are written past the page cache. There they would
//! take a copy, memory that has to be found first, and a second pass when they are synced, and nobody reads them soon.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path as FilePath, PathBuf};

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

/// The body, where it can be written so.
fn direct_body(payload: &PutPayload, options: &PutOptions) -> Option<Bytes> {
    let mut pieces = payload.iter();
    let (first, rest) = (pieces.next()?, pieces.next());
    let is_aligned = first.as_ptr().addr().is_multiple_of(ALIGNMENT);
    let is_plain = matches!(options.mode, PutMode::Create) && options.attributes.is_empty();
    (is_plain && rest.is_none() && is_aligned && first.len() >= DIRECT_BYTES_MIN).then(|| first.clone())
}

/// Creates an object. `None`: this file system does not write past its cache.
fn create(path: &FilePath, body: &[u8]) -> io::Result<Option<()>> {
    let (mut file, staged) = match stage(path) {
        Ok(staged) => staged,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(None),
        Err(error) => return Err(error),
    };
    let written = write(&mut file, body).and_then(|()| fs::hard_link(&staged, path));
    let removed = fs::remove_file(&staged);
    written.and(removed)?;
    path.parent().map_or(Ok(()), sync_folder)?;
    Ok(Some(()))
}

/// A file beside the object's, named as the crate names them: no listing shows it, and what was left behind is found by its name.
fn stage(path: &FilePath) -> io::Result<(File, PathBuf)> {
    let mut number = 1;
    let mut has_parents = false;
    loop {
        let mut staged = path.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        let direct = OFlags::DIRECT.bits().cast_signed();
        match OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(&staged) {
            Ok(file) => return Ok((file, staged.into())),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !has_parents => {
                path.parent().map_or(Ok(()), make_folders)?;
                has_parents = true;
            }
            Err(error) => {
                // Some file systems make the file, and then refuse to open it so.
                if error.kind() == io::ErrorKind::InvalidInput {
                    let _ = fs::remove_file(&staged);
                }
                return Err(error);
            }
        }
    }
}

fn write(file: &mut File, body: &[u8]) -> io::Result<()> {
    let whole = body.len() - body.len() % ALIGNMENT;
    let mut at = 0;
    // A write that was cut short within a page leaves the rest to the page cache.
    while at < whole && at.is_multiple_of(ALIGNMENT) {
        match file.write(body.get(at..whole).unwrap_or_default()) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => at += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let flags = fcntl_getfl(&*file)?;
    fcntl_setfl(&*file, flags - OFlags::DIRECT)?;
    file.write_all(body.get(at..).unwrap_or_default())?;
    file.sync_all()
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
        let Some(body) = direct_body(&payload, &options) else {
            return self.0.put_opts(location, payload, options).await;
        };
        let path = self.0.path_to_filesystem(location)?;
        let created = tokio::task::spawn_blocking(move || create(&path, &body)).await;
        match created.map_err(io::Error::other).flatten() {
            Ok(Some(())) => Ok(PutResult { e_tag: None, version: None, extensions: Default::default() }),
            Ok(None) => self.0.put_opts(location, payload, options).await,
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
                let is_direct = direct_body(&body.clone().into(), &PutMode::Create.into()).is_some();
                assert!(is_direct, "it goes past the page cache");
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
