//! Commands out, completions in. Any thread that waits takes what has come, for whoever it is; who finds nothing for a while
//! sleeps, and the listening thread, which the daemon wakes, takes over.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvstore_plane::{
    AttachmentView, Command, Completion, Push, RecordHead, RingReader, RingWriter, fall_asleep, must_kick,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::attachment::Attachment;
use super::staging::Staging;
use crate::Error;

/// A caller looks for its completion this long before it sleeps: a command that a busy daemon answers takes a few
/// microseconds, a wake-up twenty times that.
const SPIN: Duration = Duration::from_micros(200);
/// A full submission ring is tried again this often.
const FULL_POLL: Duration = Duration::from_micros(100);

#[derive(Default)]
pub(crate) struct Calls {
    submit: Mutex<Submit>,
    complete: Mutex<Complete>,
    waiting: Mutex<HashMap<u64, Arc<Mailbox>>>,
    /// Callers that sleep.
    asleep: AtomicUsize,
}

#[derive(Default)]
struct Submit {
    writer: RingWriter,
    next_tag: u64,
}

#[derive(Default)]
struct Complete {
    reader: RingReader,
    payload: Vec<u8>,
}

/// Where completions for some tags go.
#[derive(Default)]
pub(crate) struct Mailbox {
    letters: Mutex<VecDeque<(u64, Completion)>>,
    came: Notify,
    closed: std::sync::atomic::AtomicBool,
}

impl Mailbox {
    fn put(&self, tag: u64, completion: Completion) {
        self.letters.lock().push_back((tag, completion));
        self.came.notify_one();
    }

    fn take(&self) -> Option<(u64, Completion)> {
        self.letters.lock().pop_front()
    }
}

impl Calls {
    /// Takes what has come and gives it to whom it belongs. With `sure`, what came before this call has been given when
    /// it returns; without, another thread may be at it still. False where the ring holds nonsense.
    fn deliver(&self, view: &AttachmentView<'_>, staging: &Staging, sure: bool) -> bool {
        let locked = if sure { Some(self.complete.lock()) } else { self.complete.try_lock() };
        let Some(mut complete) = locked else { return true };
        let Complete { reader, payload } = &mut *complete;
        loop {
            match reader.pop(&view.completions(), payload) {
                Ok(None) => return true,
                Err(_) => return false,
                Ok(Some(head)) => {
                    let Ok(completion) = Completion::decode(head.kind, payload) else { return false };
                    if completion == Completion::Copied {
                        staging.copied(head.tag);
                    }
                    let mailbox = self.waiting.lock().get(&head.tag).cloned();
                    if let Some(mailbox) = mailbox {
                        mailbox.put(head.tag, completion);
                    }
                }
            }
        }
    }

    /// The same, on the listening thread: as long as somebody sleeps, the daemon is to wake this process again.
    pub(super) fn deliver_and_sleep(&self, view: &AttachmentView<'_>, staging: &Staging) {
        loop {
            // Nonsense in the ring would be there for ever: whoever waits finds it, too, and gives the attachment up.
            if !self.deliver(view, staging, true) {
                return;
            }
            if self.asleep.load(Ordering::Acquire) == 0 {
                return;
            }
            fall_asleep(view.client_sleeps());
            let more = self.complete.try_lock().is_none_or(|complete| complete.reader.has_record(&view.completions()));
            if !more {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// The daemon is gone: nobody waits any longer.
    pub(super) fn fail_all(&self) {
        for mailbox in self.waiting.lock().values() {
            mailbox.closed.store(true, Ordering::Release);
            mailbox.came.notify_one();
        }
    }
}

/// Tags whose completions somebody waits for, until this is dropped.
pub(crate) struct Waiting {
    attachment: Arc<Attachment>,
    mailbox: Arc<Mailbox>,
    first: u64,
    count: u64,
}

impl Waiting {
    /// The first of the tags.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// A completion that has come, without waiting.
    pub(crate) fn now(&self) -> Option<(u64, Completion)> {
        self.look(false)
    }

    fn look(&self, sure: bool) -> Option<(u64, Completion)> {
        self.mailbox.take().or_else(|| {
            self.attachment.deliver(sure);
            self.mailbox.take()
        })
    }

    /// The next completion. Looks for a moment, then sleeps.
    pub(crate) async fn next(&self) -> Result<(u64, Completion), Error> {
        let until = Instant::now() + SPIN;
        loop {
            if let Some(letter) = self.now() {
                return Ok(letter);
            }
            if Instant::now() >= until {
                break;
            }
            // Others on this thread have their turn meanwhile.
            tokio::task::yield_now().await;
        }
        let calls = &self.attachment.calls;
        calls.asleep.fetch_add(1, Ordering::AcqRel);
        let _asleep = Asleep(&self.attachment);
        loop {
            fall_asleep(self.attachment.view().client_sleeps());
            if let Some(letter) = self.look(true) {
                return Ok(letter);
            }
            if !self.attachment.is_live() || self.mailbox.closed.load(Ordering::Acquire) {
                return Err(lost());
            }
            self.mailbox.came.notified().await;
        }
    }
}

struct Asleep<'a>(&'a Attachment);

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        self.0.calls.asleep.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.attachment.is_ours() {
            let mut waiting = self.attachment.calls.waiting.lock();
            (self.first..self.first + self.count).for_each(|tag| drop(waiting.remove(&tag)));
        }
    }
}

pub(super) fn lost() -> Error {
    Error::Unavailable("the daemon went away before it answered".into())
}

impl Attachment {
    /// Tags for `count` completions or more of each.
    pub(crate) fn wait_for(self: &Arc<Self>, count: u64) -> Waiting {
        let first = {
            let mut submit = self.calls.submit.lock();
            let first = submit.next_tag;
            submit.next_tag += count;
            first
        };
        let mailbox = Arc::new(Mailbox::default());
        let mut waiting = self.calls.waiting.lock();
        (first..first + count).for_each(|tag| drop(waiting.insert(tag, Arc::clone(&mailbox))));
        drop(waiting);
        Waiting { attachment: Arc::clone(self), mailbox, first, count }
    }

    fn deliver(&self, sure: bool) {
        if !self.calls.deliver(&self.view(), &self.staging, sure) {
            self.lose();
        }
    }

    /// Sends a command. False where the ring is full.
    pub(super) fn try_submit(&self, tag: u64, kind: u16, payload: &[u8]) -> Result<bool, Error> {
        if !self.is_live() {
            return Err(lost());
        }
        let view = self.view();
        let pushed = self.calls.submit.lock().writer.push(&view.submissions(), RecordHead { kind, tag }, payload);
        match pushed {
            Ok(Push::Written) => {
                if must_kick(view.daemon_sleeps()) {
                    self.kick();
                }
                Ok(true)
            }
            Ok(Push::Full) => Ok(false),
            Ok(Push::TooLarge) => Err(Error::Other("the command is larger than a record of the ring".into())),
            Err(_) => Err(lost()),
        }
    }

    /// Sends a command, once the ring has room.
    pub(crate) async fn submit(&self, tag: u64, command: &Command) -> Result<(), Error> {
        let (kind, payload) = command.encode();
        while !self.try_submit(tag, kind, &payload)? {
            self.until_room().await;
        }
        Ok(())
    }

    /// A moment, while the daemon reads the ring.
    pub(super) async fn until_room(&self) {
        self.deliver(true);
        tokio::time::sleep(FULL_POLL).await;
    }

    /// Sends a command that is worth nothing if it does not get through now.
    pub(crate) fn submit_if_room(&self, tag: u64, command: &Command) {
        let (kind, payload) = command.encode();
        let _ = self.try_submit(tag, kind, &payload);
    }

    /// Sends a command and waits for its only completion.
    pub(crate) async fn call(self: &Arc<Self>, command: &Command) -> Result<Completion, Error> {
        let waiting = self.wait_for(1);
        self.submit(waiting.first(), command).await?;
        Ok(waiting.next().await?.1)
    }
}

/// A completion that says no.
pub(crate) fn failure(code: u32, message: String) -> Error {
    tonic::Status::new(tonic::Code::from_i32(code as i32), message).into()
}
