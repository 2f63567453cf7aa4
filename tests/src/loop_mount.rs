//! A small file system of its own, which can be filled to the last byte.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in a file; unmounted with this value. It needs root, `mount` and `mkfs.ext4`.
pub struct LoopMount(PathBuf);

impl LoopMount {
    /// Makes one of `mib` MiB in `folder`; `None` where the machine does not allow that.
    pub fn new(folder: &Path, mib: u64) -> Option<Self> {
        let (image, mount) = (folder.join("image"), folder.join("mount"));
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        let made = run("mkfs.ext4", &["-q".as_ref(), "-m0".as_ref(), image.as_os_str()])
            && run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), mount.as_os_str()]);
        made.then_some(Self(mount))
    }

    /// Its root folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes all of its room, to the last byte; removed, the file gives it back.
    pub fn fill(&self) -> PathBuf {
        self.fill_with("ballast")
    }

    /// The same, with a file of this name.
    pub fn fill_with(&self, name: &str) -> PathBuf {
        let ballast = self.0.join(name);
        let mut file = std::fs::File::create(&ballast).unwrap();
        for bytes in [1 << 20, 4096] {
            while std::io::Write::write_all(&mut file, &vec![1; bytes]).is_ok() {}
        }
        ballast
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}
