//! Decode sessions, as Python sees them: each verb as a call that waits, as one that is awaited, and, of a writer's, as one that is started and
//! waited for later. What a verb is asked and answers is JSON; KV goes beside it, as buffers in and bytes out.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join_all;
use kvstore_bucket::ObjectUrl;
use kvstore_checkpoint::manifest::Bounded;
use kvstore_checkpoint::sessions::{
    Acknowledged, Append, Batch, Claimed, Collected, Data, End, Head, Ids, Inspected, Listed, Name, NewPiece, Opaque,
    Refusal, Sampler, Session, SessionError, Shape, Step, Store, Writer, collect,
};
use kvstore_client::Error;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::buffer::Buffer;
use crate::errors::{Fault, raise, sessions as of};
use crate::runtime::{SNAPSHOTS, awaitable_on, spawn_on, wait_and_tell};

/// How often a step is tried that does not fit into a commit with those of other callers.
const FITS_TRIES: usize = 64;

/// Of a store.
#[derive(Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
enum Look {
    Ls { namespace: Option<String> },
    Inspect { namespace: String, id: String },
    Gc { dry_run: bool },
}

/// Of a writer.
#[derive(Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
enum Act {
    Open {
        namespace: String,
        id: String,
    },
    Claim {
        namespace: String,
        id: String,
        /// None: whatever its epoch.
        since: Option<u64>,
    },
    Append {
        steps: Vec<StepForm>,
    },
    Flush,
    Tidy,
    End,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StepForm {
    namespace: String,
    id: String,
    head: Option<HeadForm>,
    append: Option<AppendForm>,
    ends: Option<End>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadForm {
    facts: BTreeMap<String, String>,
    prompt: Vec<u32>,
    sampling: BTreeMap<String, String>,
    seed: Option<u64>,
    lora: Option<String>,
    shape: Shape,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppendForm {
    start: u64,
    ids: Vec<u32>,
    delivered: u64,
    valid_tokens: u64,
    sampler: SamplerForm,
    pieces: Vec<PieceForm>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SamplerForm {
    counter: Option<u64>,
    budget: Option<u64>,
    penalties: Option<Vec<(u32, u32)>>,
    stop_tail: Option<String>,
    /// In hexadecimal digits, as the next ones.
    detokeniser: Option<String>,
    grammar: Option<String>,
    engine: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PieceForm {
    group: u16,
    rank: u16,
    start: u64,
    tokens: u32,
    /// Which of the buffers.
    data: usize,
}

/// An answer, and the bytes beside it.
type Answer = (String, Vec<Option<Bytes>>);

fn parse<T: serde::de::DeserializeOwned>(asked: &str) -> Result<T, Error> {
    // What was asked is not repeated: it has the prompt.
    serde_json::from_str(asked).map_err(|error| Error::Invalid(format!("what was asked cannot be read: {error}")))
}

fn name(namespace: &str, id: &str) -> Result<Name, Error> {
    Name::new(namespace, id).map_err(|refused| Error::Invalid(refused.0))
}

fn failed(error: SessionError) -> Fault {
    of::session(&error)
}

fn opaque(hex: Option<String>) -> Result<Option<Opaque>, Error> {
    let digit = |digits: &[u8]| std::str::from_utf8(digits).ok().and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes = |hex: String| hex.as_bytes().chunks(2).map(digit).collect::<Option<Vec<u8>>>().map(Opaque);
    match hex {
        None => Ok(None),
        Some(hex) => {
            let wrong = || Error::Invalid("a state of the sampler is not in hexadecimal digits".into());
            bytes(hex).map(Some).ok_or_else(wrong)
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl SamplerForm {
    fn sampler(self) -> Result<Sampler, Error> {
        let Self { counter, budget, penalties, stop_tail, detokeniser, grammar, engine } = self;
        let (detokeniser, grammar, engine) = (opaque(detokeniser)?, opaque(grammar)?, opaque(engine)?);
        Ok(Sampler { counter, budget, penalties: penalties.map(Bounded), stop_tail, detokeniser, grammar, engine })
    }
}

impl PieceForm {
    fn piece(&self, data: &[Bytes]) -> Result<NewPiece, Error> {
        let Self { group, rank, start, tokens, data: at } = *self;
        let missing = || Error::Invalid(format!("a piece names buffer {at}; there are {}", data.len()));
        let data = Data::Inline(data.get(at).cloned().ok_or_else(missing)?);
        Ok(NewPiece { group, rank, start, tokens, data })
    }
}

impl AppendForm {
    fn append(self, data: &[Bytes]) -> Result<Append, Error> {
        let Self { start, ids, delivered, valid_tokens, sampler, pieces } = self;
        let pieces = pieces.iter().map(|piece| piece.piece(data)).collect::<Result<_, Error>>()?;
        Ok(Append { start, ids, delivered, valid_tokens, sampler: sampler.sampler()?, blocks: Vec::new(), pieces })
    }
}

impl StepForm {
    fn step(self, data: &[Bytes]) -> Result<Step, Error> {
        let head = self.head.map(|head| {
            let HeadForm { facts, prompt, sampling, seed, lora, shape } = head;
            Head { facts, prompt: Ids(prompt), sampling, seed, lora, shape }
        });
        let append = self.append.map(|append| append.append(data)).transpose()?;
        Ok(Step { name: name(&self.namespace, &self.id)?, head, append, ends: self.ends })
    }
}

fn end(ends: Option<End>) -> Value {
    ends.map_or(Value::Null, |ends| json!(ends))
}

fn listed(listed: &Listed) -> Value {
    let holder = listed.holder.as_ref().map(|holder| json!({"log": holder.log, "writer": holder.writer}));
    json!({"namespace": listed.name.namespace(), "id": listed.name.id(), "epoch": listed.epoch, "holder": holder})
}

fn sampler(sampler: &Sampler) -> Value {
    let of = |opaque: &Option<Opaque>| opaque.as_ref().map(|opaque| hex(&opaque.0));
    json!({
        "counter": sampler.counter, "budget": sampler.budget, "stop_tail": sampler.stop_tail,
        "penalties": sampler.penalties.as_ref().map(|penalties| &penalties.0),
        "detokeniser": of(&sampler.detokeniser), "grammar": of(&sampler.grammar), "engine": of(&sampler.engine),
    })
}

fn session(session: &Session) -> Value {
    let head = &session.head;
    let pieces = session.pieces.0.iter().map(|piece| {
        json!({"group": piece.group, "rank": piece.rank, "start": piece.start, "tokens": piece.tokens, "bytes": piece.bytes})
    });
    json!({
        "head": {
            "facts": head.facts, "prompt": head.prompt.0, "sampling": head.sampling, "seed": head.seed, "lora": head.lora,
            "shape": head.shape,
        },
        "epoch": session.epoch, "generated": session.generated.0, "delivered": session.delivered,
        "valid_tokens": session.valid_tokens, "sampler": sampler(&session.sampler), "blocks": session.blocks.0.len(),
        "pieces": pieces.collect::<Vec<_>>(),
    })
}

fn inspected(inspected: &Inspected) -> Value {
    let sealed_by = inspected.sealed_by.as_ref().map(|by| json!({"log": by.log, "writer": by.writer}));
    let (listed, ends) = (listed(&inspected.listed), end(inspected.ends));
    json!({
        "listed": listed, "ends": ends, "sealed_by": sealed_by, "session": inspected.session.as_ref().map(session),
    })
}

fn collected(collected: &Collected) -> Value {
    json!({
        "sessions": collected.sessions, "closed_sessions": collected.closed_sessions,
        "gone_sessions": collected.gone_sessions, "logs": collected.logs, "gone_logs": collected.gone_logs,
        "sealed_logs": collected.sealed_logs, "gone_objects": collected.gone_objects,
        "gone_bytes": collected.gone_bytes, "unreadable": collected.unreadable,
    })
}

fn acknowledged(answer: Result<Acknowledged, Refusal>) -> Value {
    match answer {
        Ok(Acknowledged { name, epoch, number, tokens, valid_tokens }) => json!({
            "namespace": name.namespace(), "id": name.id(), "epoch": epoch, "number": number, "tokens": tokens,
            "valid_tokens": valid_tokens,
        }),
        Err(refusal) => json!({"refused": refusal.to_string()}),
    }
}

async fn look(store: Store, look: Look) -> Result<String, Fault> {
    let answer = match look {
        Look::Ls { namespace } => {
            let all = store.list(namespace.as_deref()).await.map_err(failed)?;
            Value::Array(all.iter().map(listed).collect())
        }
        Look::Inspect { namespace, id } => inspected(&store.inspect(&name(&namespace, &id)?).await.map_err(failed)?),
        Look::Gc { dry_run } => collected(&collect(&store, dry_run).await.map_err(failed)?),
    };
    Ok(answer.to_string())
}

/// One step, in a commit with those of other callers; what does not fit into it goes with one of the next.
async fn one(batch: &Batch, step: Step) -> Result<Result<Acknowledged, Refusal>, Fault> {
    for _ in 1..FITS_TRIES {
        match batch.step(step.clone()).await.map_err(|error| of::session(&error))? {
            Err(Refusal::TooLarge(_)) => {}
            answer => return Ok(answer),
        }
    }
    batch.step(step).await.map_err(|error| of::session(&error))
}

async fn act(batch: Batch, writer: Writer, act: Act, data: Vec<Bytes>) -> Result<Answer, Fault> {
    let answer = match act {
        Act::Open { namespace, id } => json!({"epoch": writer.open(&name(&namespace, &id)?).await.map_err(failed)?}),
        Act::Claim { namespace, id, since } => {
            let name = name(&namespace, &id)?;
            let claimed = match since {
                Some(epoch) => writer.reclaim(&name, epoch).await,
                None => writer.claim(&name).await,
            };
            let Claimed { epoch, session: found, pieces } = claimed.map_err(failed)?;
            let answer = json!({"epoch": epoch, "session": found.as_ref().map(session)});
            return Ok((answer.to_string(), pieces));
        }
        Act::Append { steps } => {
            let steps = steps.into_iter().map(|step| step.step(&data)).collect::<Result<Vec<_>, _>>()?;
            let answers = if steps.len() == 1 {
                try_join_all(steps.into_iter().map(|step| one(&batch, step))).await?
            } else {
                writer.commit(steps).await.map_err(failed)?
            };
            Value::Array(answers.into_iter().map(acknowledged).collect())
        }
        Act::Flush => writer.flush().await.map(|()| Value::Null).map_err(failed)?,
        Act::Tidy => writer.tidy().await.map(|()| Value::Null).map_err(failed)?,
        Act::End => writer.end().await.map(|()| Value::Null).map_err(failed)?,
    };
    Ok((answer.to_string(), Vec::new()))
}

/// The bytes of buffers, copied: they may change as soon as the call has begun.
fn copies(data: &[Bound<'_, PyAny>]) -> PyResult<Vec<Bytes>> {
    let copy = |(at, buffer): (usize, &Bound<'_, PyAny>)| {
        let buffer = Buffer::borrow(buffer, false, &format!("data[{at}]"))?;
        Ok(Bytes::copy_from_slice(buffer.bytes()))
    };
    data.iter().enumerate().map(copy).collect()
}

fn to_python(py: Python<'_>, (answer, data): Answer) -> PyResult<Py<PyAny>> {
    let data: Vec<_> = data.iter().map(|one| one.as_ref().map(|bytes| PyBytes::new(py, bytes))).collect();
    Ok((answer, PyList::new(py, data)?).into_pyobject(py)?.into_any().unbind())
}

/// A store of sessions.
#[pyclass(frozen, module = "kvstore")]
pub struct Sessions(Store);

#[pymethods]
impl Sessions {
    #[new]
    fn new(url: String, options: Vec<(String, String)>) -> PyResult<Self> {
        Store::open(&ObjectUrl { url, options }).map(Self).map_err(failed).map_err(raise)
    }

    /// A verb that writes nothing of a session.
    fn call(&self, py: Python<'_>, asked: &str) -> PyResult<String> {
        let asked = parse(asked).map_err(raise)?;
        wait_and_tell(py, look(self.0.clone(), asked), None)
    }

    /// The same, awaited.
    fn call_async<'py>(&self, py: Python<'py>, asked: &str) -> PyResult<Bound<'py, PyAny>> {
        let asked = parse(asked).map_err(raise)?;
        let answer = look(self.0.clone(), asked);
        awaitable_on(&SNAPSHOTS, py, answer, |py, answer| Ok(answer.into_pyobject(py)?.into_any().unbind()))
    }

    /// Begins a writer.
    fn begin(&self, py: Python<'_>, writer: String) -> PyResult<SessionWriter> {
        wait_and_tell(py, begin(self.0.clone(), writer), None)
    }

    /// The same, awaited.
    fn begin_async<'py>(&self, py: Python<'py>, writer: String) -> PyResult<Bound<'py, PyAny>> {
        awaitable_on(&SNAPSHOTS, py, begin(self.0.clone(), writer), |py, writer| Ok(Py::new(py, writer)?.into_any()))
    }
}

async fn begin(store: Store, name: String) -> Result<SessionWriter, Fault> {
    let writer = Writer::begin(&store, &name).await.map_err(failed)?;
    Ok(SessionWriter { batch: Batch::new(writer.clone()), writer })
}

/// A writer of sessions, and its log.
#[pyclass(frozen, module = "kvstore")]
pub struct SessionWriter {
    writer: Writer,
    batch: Batch,
}

impl SessionWriter {
    fn answer(
        &self,
        asked: &str,
        data: &[Bound<'_, PyAny>],
    ) -> PyResult<impl Future<Output = Result<Answer, Fault>> + Send + 'static> {
        let asked = parse(asked).map_err(raise)?;
        Ok(act(self.batch.clone(), self.writer.clone(), asked, copies(data)?))
    }
}

#[pymethods]
impl SessionWriter {
    /// The id of its log.
    #[getter]
    fn log(&self) -> String {
        self.writer.log().to_owned()
    }

    /// The sessions that it owns: namespace, id and epoch.
    fn sessions(&self) -> Vec<(String, String, u64)> {
        let own = |(name, epoch): (Name, u64)| (name.namespace().to_owned(), name.id().to_owned(), epoch);
        self.writer.sessions().into_iter().map(own).collect()
    }

    /// Why its log has ended, if it has.
    fn broken(&self) -> Option<String> {
        self.writer.broken().map(|broken| broken.to_string())
    }

    /// Whether it is time for another log.
    fn is_due(&self) -> bool {
        self.writer.is_due()
    }

    /// A verb.
    fn call(&self, py: Python<'_>, asked: &str, data: Vec<Bound<'_, PyAny>>) -> PyResult<Py<PyAny>> {
        let answer = wait_and_tell(py, self.answer(asked, &data)?, None)?;
        to_python(py, answer)
    }

    /// The same, awaited.
    fn call_async<'py>(
        &self,
        py: Python<'py>,
        asked: &str,
        data: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        awaitable_on(&SNAPSHOTS, py, self.answer(asked, &data)?, to_python)
    }

    /// The same, started: it goes on whether or not anybody waits.
    fn start(&self, asked: &str, data: Vec<Bound<'_, PyAny>>) -> PyResult<Started> {
        let task = spawn_on(&SNAPSHOTS, self.answer(asked, &data)?).map_err(raise)?;
        Ok(Started(Arc::new(Mutex::new(Some(task)))))
    }
}

type Task = JoinHandle<Result<Answer, Fault>>;

/// A verb that was started.
#[pyclass(frozen, module = "kvstore")]
pub struct Started(Arc<Mutex<Option<Task>>>);

async fn ended(task: Arc<Mutex<Option<Task>>>) -> Result<Answer, Fault> {
    let mut task = task.lock().await;
    let Some(running) = task.as_mut() else {
        return Err(Error::Invalid("what was started has ended, and its answer was taken".into()).into());
    };
    let answer = running.await;
    *task = None;
    answer.unwrap_or_else(|error| Err(Error::Other(format!("what was started broke off: {error}")).into()))
}

#[pymethods]
impl Started {
    /// Whether it has ended.
    fn done(&self) -> bool {
        self.0.try_lock().is_ok_and(|task| task.as_ref().is_none_or(JoinHandle::is_finished))
    }

    /// Waits until it has ended; its answer, which is given once. An interrupted wait can be repeated.
    fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let answer = wait_and_tell(py, ended(Arc::clone(&self.0)), None)?;
        to_python(py, answer)
    }

    /// The same, awaited. Cancelling it ends the waiting, and not what was started.
    fn wait_async<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        awaitable_on(&SNAPSHOTS, py, ended(Arc::clone(&self.0)), to_python)
    }
}
