//! What a save reads: files of a folder, and contents that a process has in memory.
//!
//! Knows where bytes come from, and not what becomes of them.

use std::fs::{self, File as Opened, Metadata};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::caps;
use crate::save::SaveError;
use crate::tensors::{self, Tensor};

/// Bytes in memory that are saved as a file. They are read in pieces, each of which ends where a tensor does or before.
pub trait Content: Send + Sync {
    /// How many there are.
    fn bytes(&self) -> u64;
    /// Copies a piece of them. May be called by several threads.
    fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()>;
}

impl Content for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        let from = usize::try_from(at).ok().and_then(|at| self.get(at..at + into.len()));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A content, and the path that it gets in the snapshot.
#[derive(Clone)]
pub struct Made {
    /// Below the folder, with `/` between names.
    pub path: String,
    /// Its bytes.
    pub content: Arc<dyn Content>,
}

/// What is saved.
#[derive(Clone, Default)]
pub struct Sources {
    /// A folder, of which all files are saved.
    pub folder: Option<PathBuf>,
    /// Ends of names of files in it that are left out.
    pub without: Vec<String>,
    /// Contents besides.
    pub made: Vec<Made>,
}

/// What shows that a file was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    bytes: u64,
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self { bytes: meta.len(), changed: (meta.mtime(), meta.mtime_nsec()), inode: meta.ino() }
    }
}

/// Something that is to be saved.
pub(crate) struct Found {
    /// What errors call it.
    pub(crate) path: PathBuf,
    /// Below the folder.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) executable: bool,
    kind: Kind,
}

enum Kind {
    File(Stamp),
    Made(Arc<dyn Content>),
}

/// One that is open.
#[derive(Clone)]
pub(crate) enum Reader {
    File(Arc<Opened>, Stamp),
    Made(Arc<dyn Content>),
}

impl Reader {
    pub(crate) fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::File(file, _) => file.read_exact_at(into, at),
            Self::Made(content) => content.read_exact_at(into, at),
        }
    }

    /// Whether nobody wrote to the file since it was found.
    pub(crate) fn is_unchanged(&self) -> io::Result<bool> {
        match self {
            Self::File(file, stamp) => Ok(Stamp::of(&file.metadata()?) == *stamp),
            Self::Made(_) => Ok(true),
        }
    }

    /// Where its tensors lie: see [`tensors::read`].
    pub(crate) fn tensors(&self, bytes: u64) -> io::Result<Option<(u64, Vec<Tensor>)>> {
        match self {
            Self::File(file, _) => tensors::read(&mut BufReader::new(&**file), bytes),
            Self::Made(content) => tensors::read(&mut Head { content, at: 0 }, bytes),
        }
    }
}

/// A content, read from its first byte on.
struct Head<'a> {
    content: &'a Arc<dyn Content>,
    at: u64,
}

impl Read for Head<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.content.bytes().saturating_sub(self.at);
        let bytes = into.len().min(left.min(1 << 20) as usize);
        let into = into.get_mut(..bytes).unwrap_or_default();
        self.content.read_exact_at(into, self.at)?;
        self.at += bytes as u64;
        Ok(bytes)
    }
}

impl Found {
    /// Opens it. Blocks.
    pub(crate) fn open(&self) -> io::Result<Reader> {
        match &self.kind {
            Kind::File(stamp) => Ok(Reader::File(Arc::new(Opened::open(&self.path)?), *stamp)),
            Kind::Made(content) => Ok(Reader::Made(Arc::clone(content))),
        }
    }
}

impl Sources {
    /// All of it, by name. Links to files are followed, as a hub's cache has them; links to folders are not. Blocks.
    pub(crate) fn find(&self) -> Result<Vec<Found>, SaveError> {
        let mut found = Vec::new();
        if let Some(folder) = &self.folder {
            find(folder, &self.without, &mut found)?;
        }
        for made in &self.made {
            let path = Path::new("memory").join(&made.path);
            let (bytes, kind) = (made.content.bytes(), Kind::Made(Arc::clone(&made.content)));
            found.push(Found { path, name: made.path.clone(), bytes, executable: false, kind });
        }
        if found.len() > caps::FILES_MAX {
            let path = self.folder.clone().unwrap_or_default();
            return Err(SaveError::Odd { path, why: "there are too many files".into() });
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// What was saved, for people.
    pub(crate) fn named(&self) -> String {
        let named = self.folder.as_ref().map_or("memory".to_owned(), |folder| folder.display().to_string());
        named.chars().take(caps::TEXT_BYTES_MAX / 4).collect()
    }
}

fn find(folder: &Path, without: &[String], found: &mut Vec<Found>) -> Result<(), SaveError> {
    let mut folders = vec![(folder.to_owned(), String::new())];
    while let Some((at, below)) = folders.pop() {
        let failed = |cause: io::Error| SaveError::Read { path: at.clone(), cause };
        for entry in fs::read_dir(&at).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let odd = |why: &str| SaveError::Odd { path: path.clone(), why: why.into() };
            let file_name = entry.file_name();
            let Some(name) = file_name.to_str() else { return Err(odd("its name is not Unicode")) };
            let name = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
            if name.len() > caps::TEXT_BYTES_MAX {
                return Err(odd("its path is too long"));
            }
            let is_link = entry.file_type().map_err(failed)?.is_symlink();
            let meta = fs::metadata(&path).map_err(|cause| SaveError::Read { path: path.clone(), cause })?;
            if meta.is_dir() {
                if is_link {
                    return Err(odd("it is a link to a folder"));
                }
                folders.push((path, name));
            } else if meta.is_file() {
                if found.len() == caps::FILES_MAX {
                    return Err(odd("there are too many files"));
                }
                if !without.iter().any(|end| name.ends_with(end.as_str())) {
                    let (executable, stamp) = (meta.permissions().mode() & 0o100 != 0, Stamp::of(&meta));
                    found.push(Found { path, name, bytes: stamp.bytes, executable, kind: Kind::File(stamp) });
                }
            } else {
                return Err(odd("it is neither a file nor a folder"));
            }
        }
    }
    Ok(())
}
