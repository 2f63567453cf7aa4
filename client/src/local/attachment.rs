//! One attachment to a daemon's local plane: everything that is mapped, the slabs as they come and go, and the thread that
//! listens on the socket.
//!
//! Lives as long as anything that was read through it: leases hold it. A daemon that ends leaves the memory behind, so that
//! leases stay good; the attachment is then *lost*, and calls look for another.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use kvstore_plane::{
    AttachmentView, CLIENT_PAGE_BYTES, DAEMON_PAGE_BYTES, FromClient, FromDaemon, PLANE_VERSION, TableView, Welcome,
    capabilities,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::calls::Calls;
use super::fork::forks;
use super::mapping::{Access, MappedSlab, Mapping};
use super::socket;
use super::staging::Staging;
use crate::Error;
use crate::caps::UNSYNCED_MAX;

/// The daemon has this long to accept, and as long again to answer a Hello.
const HELLO_WITHIN: Duration = Duration::from_secs(2);

/// The mapped slabs, by number.
pub(crate) type Slabs = Vec<Option<Arc<MappedSlab>>>;

/// See the head of this file.
pub(crate) struct Attachment {
    welcome: Welcome,
    client_page: Mapping,
    daemon_page: Mapping,
    table: Mapping,
    kick: OwnedFd,
    socket: OwnedFd,
    pub(super) slabs: ArcSwap<Slabs>,
    pub(super) words: Mutex<WordPool>,
    pub(super) calls: Calls,
    pub(super) staging: Staging,
    /// Blocks of LOCAL puts that may still wait for the disk.
    pub(super) unsynced: Semaphore,
    /// The daemon's numbers for layouts, and bytes of their groups' blocks, by digest.
    pub(super) layouts: ArcSwap<LocalLayouts>,
    receiving: Mutex<()>,
    staging_came: Notify,
    lost: AtomicBool,
    draining: AtomicBool,
    forks: u64,
    /// Files of slabs that may still be kept.
    files_left: Arc<Semaphore>,
}

/// Looked at by every call, changed by few.
pub(super) type LocalLayouts = HashMap<Bytes, LocalLayout, foldhash::fast::RandomState>;

/// A layout, as this attachment's daemon numbers it.
#[derive(Clone, Debug)]
pub(crate) struct LocalLayout {
    pub(crate) ordinal: u32,
    pub(crate) block_bytes: Arc<[u64]>,
}

/// The lease words that are not in use.
#[derive(Default)]
pub(super) struct WordPool {
    pub(super) free: Vec<u32>,
    /// Words from here on were never used.
    pub(super) used: u32,
}

impl Attachment {
    /// Attaches to the daemon that listens at `path`. Waits for its answer, briefly. Keeps the files of so many slabs.
    pub(crate) fn open(path: &Path, files_kept: usize) -> Result<Arc<Self>, Error> {
        let failed = |error: std::io::Error| {
            Error::Unavailable(format!("no local plane answers at {}: {error}", path.display()))
        };
        let socket = socket::connect(path, HELLO_WITHIN).map_err(failed)?;
        let (version_min, version_max) = (PLANE_VERSION, PLANE_VERSION);
        let hello = FromClient::Hello { version_min, version_max, capabilities: capabilities::ALL };
        socket::send(&socket, &hello).map_err(failed)?;
        let (welcome, descriptors) = Self::until_welcome(&socket, failed)?;
        let [client_page, daemon_page, table, kick] = <[OwnedFd; 4]>::try_from(descriptors)
            .map_err(|_| Error::Unavailable("the daemon sent a welcome without its memory".into()))?;
        let attachment = Arc::new(Self {
            client_page: Mapping::new(&client_page, CLIENT_PAGE_BYTES as u64, Access::Write)?,
            daemon_page: Mapping::new(&daemon_page, DAEMON_PAGE_BYTES as u64, Access::Read)?,
            table: Mapping::new(&table, welcome.table_bytes, Access::Read)?,
            welcome,
            kick,
            socket,
            slabs: ArcSwap::default(),
            words: Mutex::default(),
            calls: Calls::default(),
            staging: Staging::default(),
            unsynced: Semaphore::new(UNSYNCED_MAX),
            layouts: ArcSwap::default(),
            receiving: Mutex::default(),
            staging_came: Notify::new(),
            lost: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            forks: forks(),
            files_left: Arc::new(Semaphore::new(files_kept)),
        });
        let weak = Arc::downgrade(&attachment);
        let listening = rustix::io::fcntl_dupfd_cloexec(&attachment.socket, 0).map_err(|error| failed(error.into()))?;
        std::thread::Builder::new()
            .name("kvstore-client".into())
            .spawn(move || listen(&weak, &listening))
            .map_err(failed)?;
        attachment.receive();
        Ok(attachment)
    }

    fn until_welcome(
        socket: &OwnedFd,
        failed: impl Fn(std::io::Error) -> Error,
    ) -> Result<(Welcome, Vec<OwnedFd>), Error> {
        let until = Instant::now() + HELLO_WITHIN;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Unavailable("the daemon's local plane does not answer".into()));
            }
            socket::wait(socket, Some(left)).map_err(&failed)?;
            match socket::receive(socket).map_err(&failed)? {
                None => {}
                Some((FromDaemon::Welcome(welcome), descriptors)) => return Ok((welcome, descriptors)),
                Some((FromDaemon::Refused(reason), _)) => {
                    return Err(Error::Unavailable(format!("the daemon refuses local clients: {reason}")));
                }
                Some(_) => {
                    return Err(Error::Unavailable(
                        "the daemon's local plane sent something other than a welcome".into(),
                    ));
                }
            }
        }
    }

    /// True while the daemon is there, and this process is the one that attached.
    pub(crate) fn is_live(&self) -> bool {
        !self.lost.load(Ordering::Acquire) && self.is_ours()
    }

    /// False in a child of the process that attached: nothing of this may be touched.
    pub(crate) fn is_ours(&self) -> bool {
        self.forks == forks()
    }

    /// True once the daemon said that it ends.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Whether the daemon can do this too: see [`capabilities`].
    pub(super) fn can(&self, capability: u64) -> bool {
        self.welcome.capabilities & capability != 0
    }

    pub(super) fn view(&self) -> AttachmentView<'_> {
        AttachmentView::new(self.client_page.words(), self.daemon_page.words())
            .unwrap_or_else(|| unreachable!("mapped with these sizes"))
    }

    pub(super) fn table(&self) -> TableView<'_> {
        TableView::new(self.table.words())
    }

    pub(super) fn seed(&self) -> u64 {
        self.welcome.table_seed
    }

    pub(super) fn kick(&self) {
        socket::kick(&self.kick);
    }

    /// Takes in what the daemon said; on whatever thread finds something missing first.
    pub(super) fn receive(&self) {
        let _receiving = self.receiving.lock();
        loop {
            match socket::receive(&self.socket) {
                Ok(None) => return,
                Ok(Some((datagram, descriptors))) => self.on_datagram(datagram, descriptors.into_iter().next()),
                Err(_) => return self.lose(),
            }
        }
    }

    fn on_datagram(&self, datagram: FromDaemon, descriptor: Option<OwnedFd>) {
        match datagram {
            FromDaemon::SlabCame { slab, serial } => {
                let Some(descriptor) = descriptor else { return };
                let mapped = MappedSlab::new(&descriptor, serial, self.welcome.epoch, &self.welcome.namespace_digest);
                // Without it its blocks are read through the daemon.
                if let Ok(mut mapped) = mapped {
                    if let Ok(permit) = Arc::clone(&self.files_left).try_acquire_owned() {
                        mapped.keep(descriptor, permit);
                    }
                    self.set_slab(slab, Some(Arc::new(mapped)));
                }
            }
            FromDaemon::SlabLeft { slab, serial } => {
                let is_mapped = |mapped: &Arc<MappedSlab>| mapped.serial == serial;
                if self.slabs.load().get(slab as usize).and_then(Option::as_ref).is_some_and(is_mapped) {
                    self.set_slab(slab, None);
                }
                // Leases of it that this process still has keep it mapped; the daemon saw none when it let it go.
                let _ = socket::send_surely(&self.socket, &FromClient::Unmapped { serial });
            }
            FromDaemon::Staging { bytes } => {
                let mapped = descriptor.and_then(|fd| Mapping::new(&fd, bytes, Access::Write).ok());
                self.staging.set(mapped, bytes);
                self.staging_came.notify_waiters();
            }
            FromDaemon::Wake => self.calls.deliver_and_sleep(&self.view(), &self.staging),
            FromDaemon::Draining => self.draining.store(true, Ordering::Release),
            FromDaemon::Welcome(_) | FromDaemon::Refused(_) => {}
        }
    }

    fn set_slab(&self, slab: u32, mapped: Option<Arc<MappedSlab>>) {
        // The daemon numbers slabs densely, below 2^20: no more are believed.
        if slab >= 1 << 20 {
            return;
        }
        let mut slabs = Slabs::clone(&self.slabs.load());
        if slabs.len() <= slab as usize {
            slabs.resize(slab as usize + 1, None);
        }
        if let Some(place) = slabs.get_mut(slab as usize) {
            *place = mapped;
        }
        self.slabs.store(Arc::new(slabs));
    }

    pub(super) fn lose(&self) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            self.calls.fail_all();
            self.staging.close();
            self.staging_came.notify_waiters();
        }
    }

    /// Asks for staging memory, once, and waits until it has come or been refused. False: there is none.
    pub(super) async fn wait_for_staging(&self) -> bool {
        loop {
            let came = self.staging_came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if let Some(has) = self.staging.state() {
                return has;
            }
            if !self.is_live() {
                return false;
            }
            if self.staging.ask() && socket::send(&self.socket, &FromClient::WantsStaging).is_err() {
                return false;
            }
            came.await;
        }
    }
}

/// Reads the socket until the attachment has gone, or the daemon.
fn listen(attachment: &Weak<Attachment>, socket: &OwnedFd) {
    loop {
        let ready = socket::wait(socket, None);
        let Some(attachment) = attachment.upgrade() else { return };
        match ready {
            Ok(_) => attachment.receive(),
            Err(_) => attachment.lose(),
        }
        if attachment.lost.load(Ordering::Acquire) {
            return;
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.is_ours() {
            // Nothing is leased any more: leases hold the attachment.
            let _ = socket::send_surely(&self.socket, &FromClient::Goodbye);
            let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        }
    }
}
