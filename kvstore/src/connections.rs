//! Connections: a bounded number of places for each listener, and time limits for peers that say nothing.
//!
//! A connection costs its peer nothing. So a connection is silent until its peer has asked for something. When all places are
//! held, a newcomer gets the place of the connection that has been silent the longest. A peer that does not say what it has to
//! say first in time loses its place, too.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

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
    /// Silent connections, by their numbers: the one that has been silent the longest is the first.
    silent: BTreeMap<u64, Arc<Notify>>,
}

impl State {
    fn note_silent(&mut self, evicted: &Arc<Notify>) -> u64 {
        self.last += 1;
        self.silent.insert(self.last, Arc::clone(evicted));
        self.last
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
            let evicted = Arc::new(Notify::new());
            let number = AtomicU64::new(state.note_silent(&evicted));
            return Ok(Place { places: Arc::clone(self), number, evicted, until: Mutex::new(None) });
        }
        match state.silent.pop_first() {
            Some((_, oldest)) => {
                oldest.notify_one();
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
    /// Its number among the silent ones; 0 once it is not silent any more.
    number: AtomicU64,
    evicted: Arc<Notify>,
    /// What its peer has to say first must be said by then.
    until: Mutex<Option<Instant>>,
}

impl Place {
    /// The peer has asked for something: it keeps its place.
    pub fn keep(&self) {
        if self.number.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = self.places.state.lock();
        let was_evicted = state.silent.remove(&self.number.swap(0, Ordering::Relaxed)).is_none();
        drop(state);
        if was_evicted {
            // Whoever waits for this place takes another.
            self.places.freed.notify_waiters();
        }
    }

    /// The peer has asked for something, and is silent again from now on. It has `within` to ask for more.
    pub fn asked(&self, within: Duration) {
        let mut state = self.places.state.lock();
        // One that was evicted a moment ago has its answer, and goes.
        if state.silent.remove(&self.number.load(Ordering::Relaxed)).is_some() {
            self.number.store(state.note_silent(&self.evicted), Ordering::Relaxed);
            *self.until.lock() = Some(Instant::now() + within);
        }
    }

    /// Resolves when its place is another's.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
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

/// What a connection waits for while it is silent.
struct Watch {
    evicted: Pin<Box<OwnedNotified>>,
    timer: Pin<Box<Sleep>>,
    /// Bytes that end the time limit; those that came so far.
    first_bytes: (usize, usize),
}

/// A connection with a place.
pub struct Connection<IO> {
    io: IO,
    place: Arc<Place>,
    watch: Option<Watch>,
}

impl<IO> Connection<IO> {
    /// Its peer has `within` to send the `first_bytes`, or to ask for something; without the former, only the latter will do.
    pub fn new(io: IO, place: Place, within: Duration, first_bytes: Option<usize>) -> Self {
        let until = Instant::now() + within;
        *place.until.lock() = Some(until);
        let watch = Watch {
            evicted: Box::pin(Arc::clone(&place.evicted).notified_owned()),
            timer: Box::pin(tokio::time::sleep_until(until)),
            first_bytes: (first_bytes.unwrap_or(usize::MAX), 0),
        };
        metrics::gauge!("kvstore_connections").increment(1.0);
        Self { io, place: Arc::new(place), watch: Some(watch) }
    }

    /// Its place.
    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// Fails once the peer has lost its place.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(watch) = &mut self.watch else { return Ok(()) };
        if self.place.number.load(Ordering::Relaxed) == 0 {
            self.watch = None;
            return Ok(());
        }
        if watch.evicted.as_mut().poll(context).is_ready() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "others need the place of a silent peer"));
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
        let Some(Watch { first_bytes: (wanted, came), .. }) = &mut self.watch else { return };
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
