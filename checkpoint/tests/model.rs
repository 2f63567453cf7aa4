//! A store beside a model of it: random verbs, of which some end after any of their requests, and some lose replies. Whoever comes next
//! has nothing but the store. What was answered is there; what was not is there whole or not at all; nothing that is to be kept goes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod faulty;
#[allow(dead_code, reason = "other tests use the rest")]
mod models;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use faulty::Faulty;
use futures::TryStreamExt;
use kvstore_checkpoint::collect::{CollectError, CollectRules, Collected, collect};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::memory;
use kvstore_checkpoint::remove::{RemoveError, remove};
use kvstore_checkpoint::save::{Compress, SaveOptions, save};
use kvstore_checkpoint::store::{Store, StoreError};
use models::noise;
use object_store::ObjectStore;

/// Schedules of the test, each with a seed of its own.
const SCHEDULES: u64 = 125;
/// Verbs of one.
const STEPS: usize = 12;
/// Folders that are saved: neighbours share most of their chunks.
const FOLDERS: usize = 6;
const NAMES: [&str; 3] = ["a", "b", "c"];

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// What each file of a folder has.
type Content = BTreeMap<String, Vec<u8>>;

fn folders(at: &Path) -> Vec<(PathBuf, Content)> {
    let make = |folder: usize| {
        let path = at.join(folder.to_string());
        fs::create_dir(&path).unwrap();
        let mut content = Content::new();
        for part in folder..folder + 4 {
            content.insert(format!("part-{part}"), noise(part as u32 + 1, 200 + part));
        }
        content.insert("own".into(), noise(folder as u32 + 100, 50));
        content.iter().for_each(|(name, bytes)| fs::write(path.join(name), bytes).unwrap());
        (path, content)
    };
    (0..FOLDERS).map(make).collect()
}

/// What there has to be.
#[derive(Default)]
struct Model {
    /// Snapshots that are there, and the folder that each is of.
    snapshots: BTreeMap<String, usize>,
    /// What each name means and meant, the last first.
    names: BTreeMap<&'static str, Vec<Option<String>>>,
}

impl Model {
    fn means(&self, name: &str) -> Option<&String> {
        self.names.get(name)?.first()?.as_ref()
    }

    /// What a collection takes.
    fn not_kept(&self, keep_last: usize) -> BTreeSet<String> {
        let all: BTreeSet<String> = self.names.values().flatten().flatten().cloned().collect();
        let mut kept = BTreeSet::new();
        for meanings in self.names.values().filter(|meanings| meanings[0].is_some()) {
            let mut of_name: Vec<&String> = Vec::new();
            for id in meanings.iter().flatten() {
                if !of_name.contains(&id) && of_name.len() < keep_last {
                    of_name.push(id);
                }
            }
            kept.extend(of_name.into_iter().cloned());
        }
        all.difference(&kept).cloned().collect()
    }
}

/// A store, and what is believed of it.
struct World<'a> {
    faulty: Arc<Faulty>,
    folders: &'a [(PathBuf, Content)],
    model: Model,
    random: Random,
    /// A save was killed: until its intent has gone, collections are refused.
    may_have_intents: bool,
}

impl World<'_> {
    /// Nobody remembers anything: as after a restart.
    fn store(&self) -> Store {
        Store::of(self.faulty.clone())
    }

    /// Lets the next verb meet a fault, or none; true where it may fail: of lost replies, a store that is new to the process has only
    /// some tried again.
    fn meet(&mut self) -> bool {
        match self.random.below(4) {
            0 => {
                self.faulty.end_after(self.random.below(40) as i64);
                true
            }
            1 => {
                self.faulty.lose_replies(2 + self.random.below(6) as u64);
                true
            }
            _ => false,
        }
    }

    async fn step(&mut self) {
        match self.random.below(7) {
            0..3 => self.save().await,
            3 => self.tag().await,
            4 => self.remove().await,
            _ => self.collect().await,
        }
        self.faulty.mend();
        self.check().await;
    }

    async fn save(&mut self) {
        let folder = self.random.below(FOLDERS);
        let name = (self.random.below(3) > 0).then(|| *self.random.pick(&NAMES));
        let may_end = self.meet();
        let options = SaveOptions {
            name: name.map(str::to_owned),
            compress: if folder.is_multiple_of(2) { Compress::Auto } else { Compress::Nothing },
            writer: "test".into(),
            now_ms: 1,
            ..SaveOptions::default()
        };
        let saved = save(&self.store(), &self.folders[folder].0, options, &Arc::default()).await;
        self.faulty.mend();
        self.may_have_intents |= may_end;
        let id = match saved {
            Ok(commit) => Some(commit.id),
            Err(error) => {
                assert!(may_end, "{error}");
                self.unknown().await
            }
        };
        let Some(id) = id else { return };
        self.model.snapshots.insert(id.clone(), folder);
        let Some(name) = name else { return };
        let is_named = self.store().resolve(name).await.is_ok_and(|means| means == id);
        assert!(is_named || may_end, "the name means another one");
        if is_named {
            self.model.names.entry(name).or_default().insert(0, Some(id));
        }
    }

    /// The snapshot that nobody was told of; a verb makes one at most.
    async fn unknown(&self) -> Option<String> {
        let listed = self.store().list().await.unwrap();
        let ids: Vec<String> = listed.into_iter().map(|one| one.unwrap().id).collect();
        let mut new = ids.into_iter().filter(|id| !self.model.snapshots.contains_key(id));
        let found = new.next();
        assert!(new.next().is_none());
        found
    }

    async fn tag(&mut self) {
        let ids: Vec<String> = self.model.snapshots.keys().cloned().collect();
        if ids.is_empty() {
            return;
        }
        let (id, name) = (self.random.pick(&ids).clone(), *self.random.pick(&NAMES));
        let may_end = self.meet();
        let tagged = self.store().let_mean(name, Some(&id)).await;
        self.faulty.mend();
        let is_named = self.store().resolve(name).await.is_ok_and(|means| means == id);
        assert!(tagged.is_err() || is_named);
        assert!(tagged.is_ok() || may_end);
        if is_named && self.model.means(name) != Some(&id) {
            self.model.names.entry(name).or_default().insert(0, Some(id));
        }
    }

    async fn remove(&mut self) {
        let named: Vec<&'static str> = NAMES.into_iter().filter(|name| self.model.means(name).is_some()).collect();
        let ids: Vec<String> = self.model.snapshots.keys().cloned().collect();
        if self.random.below(2) == 0 && !named.is_empty() {
            let name = *self.random.pick(&named);
            let may_end = self.meet();
            let removed = remove(&self.store(), name).await;
            self.faulty.mend();
            assert!(removed.is_ok() || may_end, "{removed:?}");
            let is_gone = matches!(self.store().resolve(name).await, Err(StoreError::NoSuch(_)));
            assert!(removed.is_err() || is_gone);
            if is_gone {
                self.model.names.entry(name).or_default().insert(0, None);
            }
        } else if !ids.is_empty() {
            let id = self.random.pick(&ids).clone();
            let is_named = NAMES.into_iter().any(|name| self.model.means(name) == Some(&id));
            let may_end = self.meet();
            let removed = remove(&self.store(), &id).await;
            self.faulty.mend();
            match removed {
                Ok(()) => assert!(!is_named),
                Err(RemoveError::Named { .. }) => assert!(is_named),
                Err(RemoveError::Store(error)) => assert!(may_end, "{error}"),
            }
            if self.store().snapshot(&id).await.is_err() {
                assert!(!is_named);
                self.model.snapshots.remove(&id);
            }
        }
    }

    async fn collect(&mut self) {
        if self.may_have_intents && self.random.below(2) == 0 {
            // A day later.
            self.faulty.forget("snapshots/v1/intents").await;
            self.may_have_intents = false;
        }
        let keep_last = 1 + self.random.below(3);
        let may_end = self.meet();
        let rules = CollectRules { keep_last, dry_run: false };
        let collected = Collected::default();
        let ended = collect(&self.store(), rules, &collected).await;
        self.faulty.mend();
        let may_go = self.model.not_kept(keep_last);
        match ended {
            Ok(()) => self.model.snapshots.retain(|id, _| !may_go.contains(id)),
            Err(CollectError::Saving(_)) => assert!(self.may_have_intents),
            Err(error) => {
                assert!(may_end, "{error}");
                let store = self.store();
                let mut left = BTreeMap::new();
                for (id, folder) in std::mem::take(&mut self.model.snapshots) {
                    if !may_go.contains(&id) || store.snapshot(&id).await.is_ok() {
                        left.insert(id, folder);
                    }
                }
                self.model.snapshots = left;
            }
        }
        if may_end {
            // A collector that was killed has its lease for some minutes.
            self.faulty.forget("snapshots/v1/collector").await;
        }
    }

    /// Everything that has to be there is, byte for byte, and nothing else is called a snapshot.
    async fn check(&self) {
        let store = self.store();
        let listed = store.list().await.unwrap();
        let commits: Vec<Commit> = listed.into_iter().map(|one| one.unwrap()).collect();
        let ids: BTreeSet<&String> = commits.iter().map(|commit| &commit.id).collect();
        assert_eq!(ids, self.model.snapshots.keys().collect());
        for commit in &commits {
            let held = memory::restore(&store, commit, |_| true, &Arc::default()).await.unwrap();
            let found: Content = held
                .into_iter()
                .map(|held| {
                    let mut bytes = vec![0; held.file.bytes as usize];
                    rustix::io::pread(&held.memory, &mut bytes, 0).unwrap();
                    (held.file.path, bytes)
                })
                .collect();
            assert_eq!(found, self.folders[self.model.snapshots[&commit.id]].1);
        }
        for name in NAMES {
            let means = store.resolve(name).await.ok();
            assert_eq!(means.as_ref(), self.model.means(name));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_what_its_model_says() {
    let at = tempfile::tempdir().unwrap();
    let folders = Arc::new(folders(at.path()));
    let schedules = (0..SCHEDULES).map(|seed| {
        let folders = Arc::clone(&folders);
        async move {
            let random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            let faulty = Faulty::new();
            let model = Model::default();
            let mut world = World { faulty, folders: &folders, model, random, may_have_intents: false };
            for _ in 0..STEPS {
                world.step().await;
            }
            let chunks =
                world.faulty.list(Some(&"snapshots/v1/chunks".into())).try_collect::<Vec<_>>().await.unwrap().len();
            (world.model.snapshots.len(), chunks)
        }
    });
    let ends: Vec<(usize, usize)> = futures::future::join_all(schedules).await;
    assert!(ends.iter().any(|(snapshots, _)| *snapshots > 2) && ends.iter().any(|(_, chunks)| *chunks > 0));
}
