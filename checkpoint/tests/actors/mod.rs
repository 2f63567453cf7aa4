//! One store in memory, and several actors that each see it through a door of their own: requests there can fail, lose their answer, wait, or
//! arrive late; and sessions to write through them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use kvstore_checkpoint::manifest::Bounded;
use kvstore_checkpoint::sessions::{
    Append, Block, Data, Head, Ids, Name, NewPiece, Opaque, Sampler, Session, Shape, Store,
};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Put,
    Get,
    List,
    Delete,
}

/// What becomes of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is done and answered.
    Done,
    /// It is not done, and is refused so that nobody tries again.
    Refused,
    /// It is done, and its answer is an error that says nothing.
    Lost,
    /// It is done, and its answer one after which nobody tries again.
    Killed,
    /// A put: refused now, and done when the test says so.
    Late,
}

type Rule = dyn Fn(u64, Verb, &Path) -> Fate + Send + Sync;

/// A door: see the head of this file.
pub struct Door {
    inner: Arc<InMemory>,
    /// Requests that came.
    pub requests: AtomicU64,
    rule: Mutex<Arc<Rule>>,
    /// Where requests wait, if they do.
    queue: Mutex<Option<VecDeque<oneshot::Sender<()>>>>,
    late: Mutex<Vec<(Path, PutPayload)>>,
}

fn refused(why: &str) -> Error {
    Error::PermissionDenied { path: "door".into(), source: why.to_owned().into() }
}

impl Door {
    pub fn new(inner: &Arc<InMemory>) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            requests: AtomicU64::new(0),
            rule: Mutex::new(Arc::new(|_, _, _| Fate::Done)),
            queue: Mutex::new(None),
            late: Mutex::default(),
        })
    }

    /// What becomes of requests from now on; they are counted anew.
    pub fn rule(&self, rule: impl Fn(u64, Verb, &Path) -> Fate + Send + Sync + 'static) {
        *self.rule.lock() = Arc::new(rule);
        self.requests.store(0, Ordering::SeqCst);
    }

    pub fn count(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Requests wait from now on, each until it is let through.
    pub fn hold(&self) {
        *self.queue.lock() = Some(VecDeque::new());
    }

    /// Nobody waits any more.
    pub fn free(&self) {
        *self.queue.lock() = None;
    }

    /// Those that wait.
    pub fn waiting(&self) -> usize {
        self.queue.lock().as_ref().map_or(0, VecDeque::len)
    }

    /// Lets the n-th of those that wait through.
    pub fn let_through(&self, at: usize) {
        let waiting = self.queue.lock().as_mut().and_then(|queue| queue.remove(at));
        let _ = waiting.unwrap().send(());
    }

    /// The puts that are late arrive.
    pub async fn arrive(&self) -> usize {
        let late = std::mem::take(&mut *self.late.lock());
        let puts = late.len();
        for (location, payload) in late {
            let _ = self.inner.put_opts(&location, payload, PutMode::Create.into()).await;
        }
        puts
    }

    async fn fate(&self, verb: Verb, location: &Path) -> Result<Fate> {
        let (send, receive) = oneshot::channel();
        let waits = match self.queue.lock().as_mut() {
            Some(queue) => {
                queue.push_back(send);
                true
            }
            None => false,
        };
        if waits {
            let _ = receive.await;
        }
        self.fate_now(verb, location)
    }

    fn fate_now(&self, verb: Verb, location: &Path) -> Result<Fate> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let rule = Arc::clone(&self.rule.lock());
        match rule(number, verb, location) {
            Fate::Refused => Err(refused("not done")),
            fate => Ok(fate),
        }
    }

    pub fn store(self: &Arc<Self>) -> Store {
        Store::of_proven(Arc::clone(self) as Arc<_>)
    }
}

fn answer<T>(fate: Fate, done: Result<T>) -> Result<T> {
    match fate {
        Fate::Lost => Err(Error::Generic { store: "door", source: "the answer was lost".into() }),
        Fate::Killed => Err(refused("done, and nobody was told")),
        _ => done,
    }
}

impl fmt::Debug for Door {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("door")
    }
}

impl fmt::Display for Door {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("door")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Door {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let fate = self.fate(Verb::Put, location).await?;
        if fate == Fate::Late {
            self.late.lock().push((location.clone(), payload));
            return Err(refused("not done yet"));
        }
        answer(fate, self.inner.put_opts(location, payload, opts).await)
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let fate = self.fate(Verb::Get, location).await?;
        answer(fate, self.inner.get_opts(location, options).await)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.fate_now(Verb::Delete, &Path::from("delete")) {
            Ok(Fate::Done) => self.inner.delete_stream(locations),
            Ok(_) => {
                let done = self.inner.delete_stream(locations).collect::<Vec<_>>();
                futures::stream::once(async move {
                    done.await;
                    Err(refused("done, and nobody was told"))
                })
                .boxed()
            }
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        // What is listed is what is there when the request is let through.
        let (send, receive) = oneshot::channel();
        let waits = match self.queue.lock().as_mut() {
            Some(queue) => {
                queue.push_back(send);
                true
            }
            None => false,
        };
        let fate = self.fate_now(Verb::List, prefix.unwrap_or(&Path::default()));
        let (inner, prefix) = (Arc::clone(&self.inner), prefix.cloned());
        let listed = async move {
            if waits {
                let _ = receive.await;
            }
            match fate {
                Ok(Fate::Done) => inner.list(prefix.as_ref()),
                Ok(fate) => futures::stream::once(async move { answer(fate, Err(refused("no listing"))) }).boxed(),
                Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
            }
        };
        futures::stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// All objects below a prefix, and their bytes.
pub async fn objects(memory: &InMemory, prefix: &str) -> Vec<(Path, Vec<u8>)> {
    let all: Vec<ObjectMeta> = memory.list(Some(&Path::from(prefix))).try_collect().await.unwrap();
    let mut found = Vec::new();
    for meta in all {
        let bytes = memory.get(&meta.location).await.unwrap().bytes().await.unwrap();
        found.push((meta.location, bytes.to_vec()));
    }
    found.sort();
    found
}

pub fn name(id: &str) -> Name {
    Name::new("test", id).unwrap()
}

/// Of a session with this prompt, in blocks of 4 tokens, of two groups.
pub fn head(prompt: &[u32]) -> Head {
    Head {
        facts: [("model".to_owned(), "tiny".to_owned())].into(),
        prompt: Ids(prompt.to_vec()),
        sampling: [("temperature".to_owned(), "0.8".to_owned())].into(),
        seed: Some(7),
        lora: None,
        shape: Shape { block_tokens: 4, groups: 2, ranks: 1 },
    }
}

/// An append of these ids and nothing else, to a session of so many tokens.
pub fn ids(start: u64, ids: &[u32]) -> Append {
    Append { start, ids: ids.to_vec(), ..Append::default() }
}

pub fn block(index: u32, group: u16) -> Block {
    let of = |index: u32| Opaque(vec![index as u8 + 1, group as u8, 9]);
    Block { index, group, rank: 0, name: of(index), parent: index.checked_sub(1).map(of) }
}

/// The KV of one token, as long as that of a small model's layer.
pub fn kv(token: u64, group: u16, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (token * 31 + u64::from(group) * 7 + at) as u8).collect()
}

/// One that generates a token after the other, with its KV: what the engine does.
#[derive(Clone, Debug)]
pub struct Engine {
    pub tokens: Vec<u32>,
    pub prompt: usize,
    pub kv_bytes: usize,
}

impl Engine {
    pub fn new(prompt: &[u32], kv_bytes: usize) -> Self {
        Self { tokens: prompt.to_vec(), prompt: prompt.len(), kv_bytes }
    }

    /// The next token, and the KV of those before it, of the last one at least.
    pub fn step(&mut self, id: u32) -> Append {
        let start = self.tokens.len() as u64;
        self.tokens.push(id);
        let blocks = |end: u64| (end / 4) as u32;
        // KV exists for all but the last one.
        let (before, now) = (blocks(start.saturating_sub(1)), blocks(start));
        let is_first = self.tokens.len() == self.prompt + 1;
        let (from, before) = if is_first { (0, 0) } else { (start - 1, before) };
        let blocks: Vec<Block> = (before..now).flat_map(|index| [block(index, 0), block(index, 1)]).collect();
        let from = from.max(u64::from(now) * 4);
        let pieces = (from..start).flat_map(|token| {
            [0, 1].map(|group| NewPiece {
                group,
                rank: 0,
                start: token,
                tokens: 1,
                data: Data::Inline(kv(token, group, self.kv_bytes).into()),
            })
        });
        let engine = (start.is_multiple_of(5)).then(|| Opaque(vec![id as u8; 3]));
        Append {
            start,
            ids: vec![id],
            delivered: start - self.prompt as u64,
            valid_tokens: start,
            sampler: Sampler {
                counter: Some(start),
                budget: Some(1000 - start),
                penalties: is_first.then(|| Bounded(vec![(1, 2), (id.max(2), 1)])),
                engine,
                ..Sampler::default()
            },
            blocks,
            pieces: pieces.collect(),
        }
    }

    /// What a session of this engine must be, with its pieces' bytes.
    pub fn check(&self, session: &Session, pieces: &[Option<bytes::Bytes>]) {
        let tokens = self.tokens.len() as u64;
        assert_eq!(session.head.prompt.0, self.tokens[..self.prompt]);
        assert_eq!(session.generated.0, self.tokens[self.prompt..]);
        assert_eq!((session.tokens(), session.valid_tokens), (tokens, tokens - 1));
        assert_eq!(session.delivered, tokens - 1 - self.prompt as u64);
        assert_eq!((session.sampler.counter, session.sampler.budget), (Some(tokens - 1), Some(1001 - tokens)));
        let last = (self.prompt as u64..tokens).rev().find(|at| at.is_multiple_of(5));
        let engine = last.map(|at| vec![self.tokens[at as usize] as u8; 3]);
        assert_eq!(session.sampler.engine.as_ref().map(|engine| engine.0.clone()), engine);
        let whole = (tokens - 1) / 4;
        assert_eq!(session.blocks.0.len() as u64, 2 * whole);
        assert_eq!(session.pieces.0.len() as u64, 2 * (tokens - 1 - whole * 4));
        for (piece, data) in session.pieces.0.iter().zip(pieces) {
            assert_eq!(data.as_ref().unwrap(), &kv(piece.start, piece.group, self.kv_bytes));
        }
    }
}
