//! Connections: a bounded number of places for each listener, and time limits for peers that say nothing.
//!
//! A connection costs its peer nothing. So a connection is silent until its peer has asked for something, and again when nothing that
//! it asked for is under way any more. When all places are held, a newcomer gets the place of the connection that has been silent the
//! longest; of those that never asked for anything first. A peer that does not say what it has to say first in time loses its place,
//! too.

mod keep;

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

pub use keep::KeepPlace;

/// The places of one listener.
pub struct Places {
    most: usize,
    state: Mutex<State>,
    /// Told when a place is free.
    freed: Notify,
}

#[derive(Default)]
struct State {
    open: usize,
    /// The last number that was given.
    last: u64,
    /// Silent connections, by their numbers: the one that goes first is the first.
    silent: BTreeMap<u64, Arc<Eviction>>,
}

impl State {
    fn note_silent(&mut self, eviction: &Arc<Eviction>, has_called: bool) -> u64 {
        self.last += 1;
        let number = if has_called { CALLED | self.last } else { self.last };
        self.silent.insert(number, Arc::clone(eviction));
        number
    }
}

/// In the numbers of connections with calls that have ended: they go after all others.
const CALLED: u64 = 1 << 63;

/// Whether a connection's place is another's. It is set and taken back under the lock of [`State`].
#[derive(Default)]
struct Eviction {
    is: AtomicBool,
    told: Arc<Notify>,
}

impl Eviction {
    fn is(&self) -> bool {
        self.is.load(Ordering::Acquire)
    }
}

/// Why there is no place at this moment.
enum Full {
    /// A silent connection is being closed.
    Evicting,
    /// No connection is silent.
    NobodySilent,
}

impl Places {
    /// So many.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, state: Mutex::default(), freed: Notify::new() })
    }

    /// Waits for a place. Where all are held, whoever has been silent the longest loses theirs.
    pub async fn take(self: &Arc<Self>) -> Place {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            match self.begin() {
                Ok(place) => return place,
                Err(Full::Evicting | Full::NobodySilent) => freed.await,
            }
        }
    }

    /// The same; `None` where all places are held and nobody is silent.
    pub async fn take_of_silent(self: &Arc<Self>) -> Option<Place> {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            match self.begin() {
                Ok(place) => return Some(place),
                Err(Full::Evicting) => freed.await,
                Err(Full::NobodySilent) => return None,
            }
        }
    }

    fn begin(self: &Arc<Self>) -> Result<Place, Full> {
        let mut state = self.state.lock();
        if state.open < self.most {
            state.open += 1;
            let eviction = Arc::new(Eviction::default());
            let number = AtomicU64::new(state.note_silent(&eviction, false));
            let (calls, until) = (AtomicU64::new(0), Mutex::new(None));
            return Ok(Place { places: Arc::clone(self), number, calls, eviction, until });
        }
        match state.silent.pop_first() {
            Some((_, oldest)) => {
                oldest.is.store(true, Ordering::Release);
                oldest.told.notify_one();
                metrics::counter!("kvstore_connections_evicted_total").increment(1);
                Err(Full::Evicting)
            }
            None => Err(Full::NobodySilent),
        }
    }
}

/// A connection's place, until it is dropped.
pub struct Place {
    places: Arc<Places>,
    /// Its number among the silent ones; 0 while it is not silent.
    number: AtomicU64,
    /// Calls under way; changed under the lock.
    calls: AtomicU64,
    eviction: Arc<Eviction>,
    /// What its peer has to say first must be said by then.
    until: Mutex<Option<Instant>>,
}

impl Place {
    /// The peer has asked for something: it keeps its place for good.
    pub fn keep(&self) {
        if self.number.load(Ordering::Relaxed) != 0 {
            self.keep_under(&mut self.places.state.lock());
        }
    }

    fn keep_under(&self, state: &mut State) {
        state.silent.remove(&self.number.swap(0, Ordering::Relaxed));
        if self.eviction.is.swap(false, Ordering::AcqRel) {
            // Whoever waits for this place takes another.
            self.places.freed.notify_waiters();
        }
    }

    /// The peer makes a call: it keeps its place until the last of its calls is dropped, and is silent again then.
    pub fn call(self: &Arc<Self>) -> Call {
        let mut state = self.places.state.lock();
        if self.calls.fetch_add(1, Ordering::Relaxed) == 0 {
            self.keep_under(&mut state);
        }
        drop(state);
        Call(Arc::clone(self))
    }

    /// The peer has asked for something, and is silent again from now on. It has `within` to ask for more.
    pub fn asked(&self, within: Duration) {
        let mut state = self.places.state.lock();
        // One that was evicted a moment ago has its answer, and goes.
        if state.silent.remove(&self.number.load(Ordering::Relaxed)).is_some() {
            self.number.store(state.note_silent(&self.eviction, false), Ordering::Relaxed);
            *self.until.lock() = Some(Instant::now() + within);
        }
    }

    /// Resolves when its place is another's.
    pub async fn evicted(&self) {
        while !self.eviction.is() {
            self.eviction.told.notified().await;
        }
    }
}

/// A call that is under way.
pub struct Call(Arc<Place>);

impl Drop for Call {
    fn drop(&mut self) {
        let place = &self.0;
        let mut state = place.places.state.lock();
        if place.calls.fetch_sub(1, Ordering::Relaxed) == 1 {
            place.number.store(state.note_silent(&place.eviction, true), Ordering::Relaxed);
            drop(state);
            // Newcomers may be waiting for somebody to be silent.
            place.places.freed.notify_waiters();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state.lock();
        state.silent.remove(self.number.get_mut());
        state.open -= 1;
        drop(state);
        self.places.freed.notify_waiters();
    }
}

/// What ends a connection while it is silent.
struct Watch {
    told: Pin<Box<OwnedNotified>>,
    timer: Pin<Box<Sleep>>,
    /// Bytes that end the time limit; those that came so far.
    first_bytes: (usize, usize),
}

/// A connection with a place.
pub struct Connection<IO> {
    io: IO,
    place: Arc<Place>,
    watch: Watch,
}

impl<IO> Connection<IO> {
    /// Its peer has `within` to send the `first_bytes`, or to ask for something; without the former, only the latter will do.
    pub fn new(io: IO, place: Place, within: Duration, first_bytes: Option<usize>) -> Self {
        let until = Instant::now() + within;
        *place.until.lock() = Some(until);
        let watch = Watch {
            told: Box::pin(Arc::clone(&place.eviction.told).notified_owned()),
            timer: Box::pin(tokio::time::sleep_until(until)),
            first_bytes: (first_bytes.unwrap_or(usize::MAX), 0),
        };
        metrics::gauge!("kvstore_connections").increment(1.0);
        Self { io, place: Arc::new(place), watch }
    }

    /// Its place.
    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// Fails once the peer has lost its place.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let watch = &mut self.watch;
        // It may be silent again before it is polled again: it has to hear of an eviction at any time.
        while watch.told.as_mut().poll(context).is_ready() {
            watch.told.set(Arc::clone(&self.place.eviction.told).notified_owned());
        }
        if self.place.eviction.is() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "others need the place of a silent peer"));
        }
        if self.place.number.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        loop {
            let until = *self.place.until.lock();
            let Some(until) = until else { return Ok(()) };
            if watch.timer.deadline() != until {
                watch.timer.as_mut().reset(until);
            }
            if watch.timer.as_mut().poll(context).is_pending() {
                return Ok(());
            }
            // It may have asked for something meanwhile.
            if *self.place.until.lock() == Some(until) {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer said nothing for too long"));
            }
        }
    }

    fn count(&mut self, bytes: usize) {
        let Watch { first_bytes: (wanted, came), .. } = &mut self.watch;
        *came = came.saturating_add(bytes);
        if came >= wanted {
            *self.place.until.lock() = None;
        }
    }
}

impl<IO> Drop for Connection<IO> {
    fn drop(&mut self) {
        metrics::gauge!("kvstore_connections").decrement(1.0);
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.count(buf.filled().len() - before);
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const WITHIN: Duration = Duration::from_secs(5);

    async fn connected(places: &Arc<Places>) -> (Connection<DuplexStream>, DuplexStream) {
        let (ours, theirs) = duplex(64);
        (Connection::new(ours, places.take().await, WITHIN, Some(4)), theirs)
    }

    /// A newcomer gets the place of whoever has been silent the longest, and waits only where nobody is.
    #[tokio::test(start_paused = true)]
    async fn the_longest_silent_connection_gives_its_place_up() {
        let places = Places::new(3);
        let (speaks, _theirs) = connected(&places).await;
        let (mut oldest, _theirs) = connected(&places).await;
        let (asked_lately, _theirs) = connected(&places).await;
        speaks.place().keep();
        asked_lately.place().asked(WITHIN);
        let newcomer = tokio::spawn({
            let places = Arc::clone(&places);
            async move { places.take().await }
        });
        assert_eq!(oldest.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(!newcomer.is_finished(), "its place is not free before it is closed");
        drop(oldest);
        let newcomer = newcomer.await.unwrap();
        newcomer.keep();
        asked_lately.place().keep();
        assert!(places.take_of_silent().await.is_none(), "all of them speak");
        drop(speaks);
        drop(places.take().await);
    }

    /// One call kept a connection its place for ever.
    #[tokio::test(start_paused = true)]
    async fn whoever_called_is_silent_again_when_all_calls_have_ended() {
        let places = Places::new(3);
        let (mut called, _theirs) = connected(&places).await;
        let (calls, _theirs) = connected(&places).await;
        let (mut never, _theirs) = connected(&places).await;
        // Its reader waits from before the call to after its end.
        let calling = called.place().call();
        let both = [calls.place().call(), calls.place().call()];
        drop(calling);
        let reading = tokio::spawn(async move { called.read_u8().await.unwrap_err().kind() });
        tokio::task::yield_now().await;
        let newcomer = || {
            let places = Arc::clone(&places);
            tokio::spawn(async move { places.take().await })
        };
        let first = newcomer();
        assert_eq!(never.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted, "it never called");
        drop(never);
        let first = Arc::new(first.await.unwrap());
        let under_way = first.call();
        let second = newcomer();
        assert_eq!(reading.await.unwrap(), io::ErrorKind::ConnectionAborted, "its call has ended");
        let second = Arc::new(second.await.unwrap());
        let also = second.call();
        // All have calls under way: a newcomer waits for the first whose calls have all ended.
        let mut third = newcomer();
        tokio::task::yield_now().await;
        let [one, other] = both;
        drop(one);
        tokio::task::yield_now().await;
        assert!(!third.is_finished() && !calls.place().eviction.is(), "its other call goes on");
        drop(other);
        tokio::task::yield_now().await;
        assert!(calls.place().eviction.is());
        // It calls again before it hears of that, and keeps its place. Nobody else is silent.
        let again = calls.place().call();
        tokio::task::yield_now().await;
        assert!(!calls.place().eviction.is() && !third.is_finished());
        drop((again, calls));
        drop((&mut third).await.unwrap());
        drop((under_way, also));
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_in_time_is_cut_off() {
        let places = Places::new(9);
        let begun = Instant::now();
        let (mut silent, mut theirs) = connected(&places).await;
        // A byte a second is no way around it.
        let trickle = tokio::spawn(async move {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                theirs.write_all(b"x").await.unwrap();
            }
            theirs
        });
        let error = loop {
            if let Err(error) = silent.read_u8().await {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), WITHIN);
        drop(trickle.await.unwrap());
        // Whoever said what comes first has all the time there is.
        let (mut greeted, mut theirs) = connected(&places).await;
        theirs.write_all(b"abcd").await.unwrap();
        let late = tokio::spawn(async move {
            tokio::time::sleep(4 * WITHIN).await;
            theirs.write_all(b"e").await.unwrap();
            theirs
        });
        let mut read = [0; 5];
        greeted.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"abcde");
        drop(late.await.unwrap());
        // And who asks now and then.
        let (mut asks, _theirs) = connected(&places).await;
        let begun = Instant::now();
        asks.place().asked(2 * WITHIN);
        assert_eq!(asks.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), 2 * WITHIN);
    }
}
