//! Names of objects: `<prefix>/v1/ns=<namespace>/<layout>/<group>/<first block>/<last block>`. Pure.
//!
//! Any node computes them from what a request names; nothing else has to be asked where blocks are. Layouts and blocks are named
//! by 128 bits, in hex: a layout by the front of its digest, a block by BLAKE3 of its sequence hash, which spreads names evenly
//! whatever an engine's hashes are. What is meant is in the frames, whole, and is compared there.

use kvstore_plane::SequenceHash;
use object_store::path::Path;

use crate::host::RegisteredLayout;

/// The version of names that this build writes and reads: those of another are left alone.
pub const NAMES_VERSION: &str = "v1";

/// The bucket's part that is ours.
#[derive(Clone, Debug)]
pub struct Names {
    root: Path,
    namespaces: Vec<String>,
}

/// The packs of one layer group of a layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupNames(Path);

/// A block, in names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockName([u8; 16]);

impl BlockName {
    /// The block with this sequence hash.
    pub fn of(hash: &SequenceHash) -> Self {
        Self(front(blake3::hash(&hash.to_vec()).as_bytes()))
    }
}

impl BlockName {
    /// A name as it is written.
    pub fn parse(text: &str) -> Option<Self> {
        unhex(text)?.try_into().ok().map(Self)
    }
}

impl std::fmt::Display for BlockName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

fn front(digest: &[u8; 32]) -> [u8; 16] {
    let mut front = [0; 16];
    front.iter_mut().zip(digest).for_each(|(to, from)| *to = *from);
    front
}

/// One pack's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PackName {
    /// The first block.
    pub first: BlockName,
    /// The last one.
    pub last: BlockName,
    /// 0, or higher where blocks were written again because the earlier object may soon go.
    pub rewrite: u32,
}

impl Names {
    /// Names under `prefix`; `namespaces` by their number.
    pub fn new(prefix: &Path, namespaces: &[String]) -> Self {
        Self { root: prefix.clone().join(NAMES_VERSION), namespaces: namespaces.to_vec() }
    }

    /// Where everything of this version is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The namespace of a pack, and its group's folder; `None` for what is no pack.
    pub fn split(&self, location: &Path) -> Option<(String, Path)> {
        let parts: Vec<_> = location.prefix_match(&self.root)?.collect();
        let [namespace, layout, group, _first, _last] = parts.as_slice() else { return None };
        let name = namespace.as_ref().strip_prefix("ns=")?.to_owned();
        let folder =
            [namespace, layout, group].into_iter().fold(self.root.clone(), |path, part| path.join(part.as_ref()));
        Some((name, folder))
    }

    /// The packs of a group.
    pub fn group(&self, layout: &RegisteredLayout, group: u16) -> GroupNames {
        // Namespaces have letters, digits, '-', '_' and '.': the sign in front keeps "." and ".." from being folders.
        let namespace = self.namespaces.get(layout.namespace.0).map_or("", String::as_str);
        let folder = self.root.clone().join(format!("ns={namespace}")).join(hex(&front(&layout.digest)));
        GroupNames(folder.join(group.to_string()))
    }
}

impl GroupNames {
    /// The folder of a group, below the root.
    pub fn below(&self, root: &Path) -> String {
        let parts: Vec<String> =
            self.0.prefix_match(root).into_iter().flatten().map(|part| part.as_ref().into()).collect();
        parts.join("/")
    }

    /// The folder that [`Self::below`] names.
    pub fn at(root: &Path, below: &str) -> Path {
        below.split('/').fold(root.clone(), |path, part| path.join(part))
    }

    /// Packs that begin with this block.
    pub fn beginning_with(&self, first: &BlockName) -> Path {
        self.0.clone().join(first.to_string())
    }

    /// One pack.
    pub fn pack(&self, name: &PackName) -> Path {
        let last = match name.rewrite {
            0 => name.last.to_string(),
            rewrite => format!("{}.{rewrite}", name.last),
        };
        self.beginning_with(&name.first).join(last)
    }

    /// The name of a listed pack; `None` for what is none of this group.
    pub fn parse(&self, location: &Path) -> Option<PackName> {
        let mut parts = location.prefix_match(&self.0)?;
        let (first, last) = (parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let (last, rewrite) = match last.as_ref().split_once('.') {
            Some((last, rewrite)) => (BlockName::parse(last)?, rewrite.parse().ok().filter(|rewrite| *rewrite > 0)?),
            None => (BlockName::parse(last.as_ref())?, 0),
        };
        Some(PackName { first: BlockName::parse(first.as_ref())?, last, rewrite })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from lower-case hex digits.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks_exact(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let group = GroupNames(Path::from("a/v1/ns=default/00ff/0"));
        let block = |bytes: &[u8]| BlockName::of(&SequenceHash::new(bytes).unwrap());
        for name in [
            PackName { first: block(&[0, 0x1f]), last: block(&[7; 32]), rewrite: 0 },
            PackName { first: block(&[9; 32]), last: block(&[9; 32]), rewrite: 12 },
        ] {
            assert_eq!(group.parse(&group.pack(&name)), Some(name));
        }
        for other in ["a/v1/ns=default/00ff/0/1f", "a/v1/ns=default/00ff/0/1f/2/3", "a/v1/ns=default/00ff/1/1f/2f"] {
            assert_eq!(group.parse(&Path::from(other)), None, "{other}");
        }
        for wrong in ["0x", "F0", "0", "", "1f", "1f.0", "1f.x", "1f.1.1"] {
            let location = group.beginning_with(&block(&[1])).join(wrong);
            assert_eq!(group.parse(&location), None, "{wrong}");
        }
    }
}
