//! The tier from inside, where a test needs to see or break what nobody else can.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{ObjectLimits, ObjectOptions, ObjectTier, Verify};
use crate::below::{self, Hold};
use crate::block::OwnedRun;
use crate::bucket::Opened;
use crate::eviction::PolicyKind;
use crate::host::{HoldId, HoldKind, HostLimits, HostOptions, HostTier, NamespaceId, RegisteredLayout};
use crate::layout::{BlockKind, DimensionOrder, LayerGroup, Layout, Shard};
use crate::{BootTime, HugePages, SequenceHash};

/// Time does not pass but where a test says so.
static NOW: AtomicU64 = AtomicU64::new(1);

fn tier(log_folder: Option<PathBuf>) -> Arc<ObjectTier> {
    let limits = HostLimits { bytes: 16 << 20, high_watermark_percent: 99, low_watermark_percent: 98 };
    let options = HostOptions {
        limits,
        huge_pages: HugePages::Off,
        policy: PolicyKind::Lru,
        seed: 1,
        epoch: 1,
        bytes_ceiling: limits.bytes,
    };
    let host = HostTier::new(options, &["default".into()]);
    let store = Arc::new(object_store::memory::InMemory::new());
    let opened = Opened { store, prefix: object_store::path::Path::from("p") };
    let options = ObjectOptions {
        opened,
        namespaces: vec!["default".into()],
        limits: ObjectLimits { upload_bytes: 1 << 20, backlog_bytes: 1 << 20 },
        verify: Verify::Probe,
        stall: Duration::from_secs(1),
        log_folder,
        seed: 1,
        clock: || BootTime(NOW.load(Ordering::Relaxed)),
    };
    ObjectTier::open(options, &host, None).unwrap()
}

fn layout(tier: &ObjectTier) -> Arc<RegisteredLayout> {
    let group = LayerGroup {
        kind: BlockKind::Attention,
        layers: 1,
        planes: 1,
        heads: 1,
        head_bytes: 4096,
        order: DimensionOrder::Opaque,
    };
    let layout = Layout {
        model: b"m".to_vec(),
        weights_digest: vec![],
        dtype: "bytes".into(),
        block_tokens: 1,
        groups: vec![group],
        shard: Shard { index: 0, count: 1 },
        extra: vec![],
    };
    tier.host.register_layout(NamespaceId(0), layout).unwrap()
}

/// Ten times a second a tick woke all that upload, though nothing waited.
#[tokio::test]
async fn an_idle_tick_wakes_nobody() {
    let tier = tier(None);
    let woken = tier.work.notified();
    tokio::pin!(woken);
    woken.as_mut().enable();
    (0..10).for_each(|_| tier.tick());
    assert!(futures::FutureExt::now_or_never(woken.as_mut()).is_none());
}

/// A block that waits to be uploaded is deleted, and the log cannot say so: a restart would upload it again. The answer was OK.
#[tokio::test]
async fn a_delete_that_the_log_cannot_keep_is_an_error() {
    let folder = std::env::temp_dir().join(format!("kvstore-delete-log-{}", std::process::id()));
    let tier = tier(Some(folder.clone()));
    let layout = layout(&tier);
    let hash = SequenceHash::new(&[7]).unwrap();
    tier.delete(&layout, 0, &[hash]).await.unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    tier.log.as_ref().unwrap().lock().distrust().unwrap_err();
    let error = tier.delete(&layout, 0, &[hash]).await.unwrap_err();
    assert!(error.to_string().contains("upload log"), "{error}");
    std::fs::create_dir_all(&folder).unwrap();
    NOW.fetch_add(crate::caps::OBJECT_LOG_BACKOFF_MS_MAX, Ordering::Relaxed);
    tier.delete(&layout, 0, &[hash]).await.unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A caller left while its pin waited for the requests of others, and nothing was asked of the store. Whether the pin is ended before
/// that or after, no request is spent on it, and it is not remembered.
#[tokio::test]
async fn a_pin_that_the_store_never_heard_of_is_ended_without_a_word_to_it() {
    let tier = tier(None);
    let layout = layout(&tier);
    let pin = |id| {
        let hashes = vec![SequenceHash::new(&[7]).unwrap()];
        let runs = vec![OwnedRun { layout: Arc::clone(&layout), group: 0, hashes }];
        let hold = Hold { id, kind: HoldKind::Pin, runs, expires: BootTime(60_000), now: BootTime(1) };
        let mut holding = below::Below::hold(Arc::clone(&tier), hold).unwrap().unwrap();
        assert!(futures::FutureExt::now_or_never(&mut holding).is_none(), "it waits");
        holding
    };
    let release = |id| below::Below::release(Arc::clone(&tier), id, HoldKind::Pin);
    let all = tier.referring.available_permits();
    let requests_of_others = Arc::clone(&tier.referring).acquire_many_owned(all as u32).await.unwrap();
    let ended_first = pin(HoldId(1));
    release(HoldId(1));
    drop((ended_first, pin(HoldId(2)), requests_of_others));
    release(HoldId(2));
    assert_eq!(tier.referring.available_permits(), all, "a request was made");
    assert!(tier.unfinished_references.lock().is_empty(), "what has ended is remembered");
}
