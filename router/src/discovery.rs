//! Who the workers are: a list, a file that is watched, or whatever else says so (etcd, Kubernetes).

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use serde::Deserialize;

use crate::fleet::WorkerSpec;

/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Says who the workers are, whenever that changes.
pub trait Discovery: Send {
    /// All workers, once they are others than those of the call before; at the first call, at once. Never ends; what goes wrong is told in the log, and
    /// the last list holds. May be dropped and called again.
    fn next(&mut self) -> BoxFuture<'_, Vec<WorkerSpec>>;
}

/// A list that does not change.
pub struct Static(Option<Vec<WorkerSpec>>);

impl Static {
    /// Of these.
    pub fn new(workers: Vec<WorkerSpec>) -> Self {
        Self(Some(workers))
    }
}

impl Discovery for Static {
    fn next(&mut self) -> BoxFuture<'_, Vec<WorkerSpec>> {
        Box::pin(async {
            match self.0.take() {
                Some(workers) => workers,
                None => std::future::pending().await,
            }
        })
    }
}

/// A TOML file of `[[workers]]`, looked at every second.
pub struct File {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
    last: Option<Vec<WorkerSpec>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    #[serde(default)]
    workers: Vec<WorkerSpec>,
}

/// Reads and checks a file of workers.
pub fn read_workers(path: &Path) -> Result<Vec<WorkerSpec>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let listed: Listed =
        toml::from_str(&text).map_err(|error| format!("{} is not a valid list of workers: {error}", path.display()))?;
    check(&listed.workers)
        .map_err(|problem| format!("{} is not a valid list of workers: {problem}", path.display()))?;
    Ok(listed.workers)
}

/// What is wrong with a list of workers, if anything.
pub fn check(workers: &[WorkerSpec]) -> Result<(), String> {
    workers.iter().try_for_each(WorkerSpec::check)?;
    let mut ids: Vec<&str> = workers.iter().map(|worker| worker.id.as_str()).collect();
    ids.sort_unstable();
    match ids.windows(2).find_map(|pair| (pair.first() == pair.last()).then(|| pair.first().copied()).flatten()) {
        Some(twice) => Err(format!("worker {twice:?} is listed twice; give each worker its own id")),
        None if workers.len() > crate::caps::WORKERS_MAX => Err(format!(
            "{} workers are listed; the router supports at most {}",
            workers.len(),
            crate::caps::WORKERS_MAX
        )),
        None => Ok(()),
    }
}

impl File {
    /// Of this file.
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: None, last: None }
    }

    /// The workers, if the file changed and says others.
    fn look(&mut self) -> Option<Vec<WorkerSpec>> {
        let stamp = std::fs::metadata(&self.path).and_then(|file| Ok((file.modified()?, file.len()))).ok();
        if stamp.is_none() || stamp == self.seen {
            return None;
        }
        self.seen = stamp;
        match read_workers(&self.path) {
            Ok(workers) if Some(&workers) != self.last.as_ref() => {
                self.last = Some(workers.clone());
                Some(workers)
            }
            Ok(_) => None,
            Err(error) => {
                tracing::error!(error, "the workers file cannot be used, so the router keeps the previous list");
                None
            }
        }
    }
}

impl Discovery for File {
    fn next(&mut self) -> BoxFuture<'_, Vec<WorkerSpec>> {
        Box::pin(async {
            loop {
                if let Some(workers) = self.look() {
                    return workers;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: &str = "[[workers]]\nid = \"a\"\nurl = \"http://127.0.0.1:8000\"\nmodel = \"m\"\n";

    #[tokio::test(start_paused = true)]
    async fn a_file_is_followed_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("workers.toml");
        std::fs::write(&path, WORKER).unwrap();
        let mut file = File::new(path.clone());
        assert_eq!(file.next().await.len(), 1);
        std::fs::write(&path, "[[workers]]\nid = 7").unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(5), file.next()).await.is_err());
        let two = format!("{WORKER}{}", WORKER.replace("\"a\"", "\"b\""));
        std::fs::write(&path, two).unwrap();
        let workers = tokio::time::timeout(Duration::from_secs(5), file.next()).await.unwrap();
        assert_eq!(workers.iter().map(|worker| worker.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        std::fs::remove_file(&path).unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(5), file.next()).await.is_err());
        let mut list = Static::new(workers);
        assert_eq!(list.next().await.len(), 2);
        assert!(tokio::time::timeout(Duration::from_secs(5), list.next()).await.is_err());
    }

    #[test]
    fn wrong_workers_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("workers.toml");
        for (text, says) in [
            (WORKER.replace("http://127.0.0.1:8000", "ftp://x"), "use http://host:port"),
            (WORKER.replace(":8000", ":99999"), "no valid port"),
            (WORKER.replace(":8000", ":8000/v1"), "leave that out"),
            (WORKER.replace("model = \"m\"", "model = \"\""), "must not be empty"),
            (format!("{WORKER}events = \"tcp://nowhere\""), "use tcp://host:port"),
            (format!("{WORKER}ranks = 0"), "1 to 1024"),
            (format!("{WORKER}colour = 1"), "unknown field"),
            (format!("{WORKER}{WORKER}"), "is listed twice"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = read_workers(&path).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
