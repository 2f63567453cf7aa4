//! A prompt that is longer than the memory keeps its beginning there, however it is put.

use std::time::Duration;

use kvstore_client::{Client, GroupRef, Plane};
use kvstore_tests::{TestDaemon, chain, hashes};

const BYTES: u32 = 64 << 10;
const BLOCKS: u64 = 512;
/// As many as this memory has slots, less what its slabs' directories take.
const SETTING: &str = "host.bytes=16MiB";

async fn usable(daemon: &TestDaemon, client: &Client, group: &GroupRef) -> (usize, usize) {
    let readable = client.readable_blocks(group, &hashes(0..BLOCKS)).await.unwrap();
    let slots: u64 = daemon.running.daemon.host.status().pools.iter().map(|pool| pool.slots).sum();
    (readable, slots as usize)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_twice_the_memory_leaves_its_beginning() {
    for policy in ["host.eviction=sessions", "host.eviction=lru"] {
        for plane in [Plane::Grpc, Plane::Local] {
            for way in ["at once", "one by one", "repeated"] {
                let daemon = TestDaemon::start(&[SETTING, policy]).await;
                let (client, group) = daemon.group_over(plane, BYTES).await;
                match way {
                    // Who is told Busy, because a slab is on its way, puts again.
                    "at once" => {
                        for _ in 0..2 {
                            client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
                        }
                    }
                    "one by one" => {
                        for block in chain(0..BLOCKS, BYTES) {
                            client.put(&group, vec![block]).await.unwrap();
                        }
                    }
                    _ => {
                        for _ in 0..4 {
                            client.get(&group, &hashes(0..BLOCKS)).await.unwrap();
                            client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
                        }
                    }
                }
                let (mut readable, mut slots) = usable(&daemon, &client, &group).await;
                // On a busy machine a slab is on its way for longer: who is told Busy puts again, some more times.
                for _ in 0..50 {
                    if slots >= 240 {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
                    (readable, slots) = usable(&daemon, &client, &group).await;
                }
                assert!(slots >= 240, "{slots} slots");
                assert!(
                    readable * 100 >= slots * 98,
                    "{policy}, {plane:?}, {way}: {readable} of {slots} slots are usable"
                );
            }
        }
    }
}
