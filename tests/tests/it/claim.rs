//! Folders, lock files and sockets are claimed in one way: nobody else has them, nothing precious is removed, and whoever comes
//! second is told why.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use kvstore_tiers::claim::{Claim, ClaimError, listen, own_folder, private_folder};

fn mode_of(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o777
}

/// Whoever comes second is told who came first; when the first lets go, the second gets it.
#[test]
fn one_process_has_a_path_and_others_are_told_which() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let first = Claim::beside(&path).unwrap();
    let error = Claim::beside(&path).unwrap_err().to_string();
    assert_eq!(error, format!("{} is in use by process {}", path.display(), std::process::id()));
    let lock = folder.path().join("a.lock");
    assert_eq!(mode_of(&lock), 0o600);
    first.let_go().unwrap();
    drop(Claim::beside(&path).unwrap());
    assert!(lock.exists(), "two processes could each lock a file of that name");
}

/// A lock file behind a symbolic link would let somebody else choose the file that is emptied.
#[test]
fn a_lock_behind_a_symbolic_link_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "text").unwrap();
    std::os::unix::fs::symlink(&precious, folder.path().join("a.lock")).unwrap();
    assert!(matches!(Claim::beside(&folder.path().join("a")), Err(ClaimError::Io { step: "open", .. })));
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "text");
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let made = folder.path().join("one/two");
    private_folder(&made).unwrap();
    assert_eq!(mode_of(&made), 0o700);
    std::fs::set_permissions(&made, PermissionsExt::from_mode(0o770)).unwrap();
    let error = private_folder(&made).unwrap_err().to_string();
    assert!(error.contains("mode 770: chmod 700 it"), "{error}");
    own_folder(&made).unwrap();
    assert_eq!(mode_of(&made), 0o700);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&made, &link).unwrap();
    let error = private_folder(&link).unwrap_err().to_string();
    assert!(error.contains("is not a folder (symbolic links are not followed)"), "{error}");
}

/// A volume's folder behind a symbolic link, or another user's, was taken as one's own. Only root can make the latter.
#[test]
fn a_folder_that_is_not_ones_own_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::fs::set_permissions(&theirs, PermissionsExt::from_mode(0o755)).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&theirs, &link).unwrap();
    let error = own_folder(&link).unwrap_err().to_string();
    assert!(error.contains("link is not a folder (symbolic links are not followed)"), "{error}");
    if std::os::unix::fs::chown(&theirs, Some(65_534), None).is_ok() {
        let error = own_folder(&theirs).unwrap_err().to_string();
        assert!(error.contains("belongs to user 65534: chown it"), "{error}");
    }
    assert_eq!(mode_of(&theirs), 0o755, "nothing was done to it");
}

/// A listener's path was cleared whatever lay there: a file that was named by mistake was lost.
#[test]
fn a_dead_socket_is_replaced_and_nothing_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(listen(&path), Err(ClaimError::Other { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
    let (living, file) = listen(&path).unwrap();
    assert_eq!(mode_of(&path), 0o600);
    assert!(matches!(listen(&path), Err(ClaimError::Taken { .. })));
    drop(living);
    let (_next, next_file) = listen(&path).unwrap();
    std::mem::forget(file);
    drop(next_file);
    assert!(!path.exists());
}
