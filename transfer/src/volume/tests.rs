//! One suite for every engine.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use kvstore_plane::{SlabGeometry, SlabHeader};

use super::*;
use crate::{HugePages, SlotFill};

fn volumes(folder: &std::path::Path) -> Vec<(&'static str, Arc<dyn Volume>)> {
    let file = |name: &str| Arc::new(VolumeFile::open(&folder.join(name)).unwrap());
    let mut all: Vec<(&'static str, Arc<dyn Volume>)> =
        vec![("syscalls", Arc::new(SyscallVolume::start(file("syscalls")).unwrap()))];
    match UringVolume::start(file("uring")) {
        Ok(volume) => all.push(("io_uring", Arc::new(volume))),
        Err(error) => eprintln!("io_uring is not tested: {error}"),
    }
    let inner = Arc::new(SyscallVolume::start(file("faulty")).unwrap());
    all.push(("faulty", Arc::new(FaultyVolume::new(inner, Faults::none()))));
    all
}

fn slab(slots: u64, slot_bytes: u64) -> Arc<Slab> {
    let geometry = SlabGeometry::new(slot_bytes, slots * slot_bytes + 65_536);
    let header = SlabHeader { epoch: 1, slab: 0, namespace_digest: [0; 32], geometry };
    let accounted = Arc::new(AtomicU64::new(geometry.slab_bytes));
    Arc::new(Slab::create(header, HugePages::Off, accounted).unwrap())
}

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(31) ^ (i >> 9) ^ seed.wrapping_mul(97)) as u8).collect()
}

#[test]
fn pages_come_back_from_where_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    for (name, volume) in volumes(folder.path()) {
        volume.file().allocate(0, 1 << 20).unwrap();
        for (at, bytes) in [(0u64, 4096), (8192, 65_536), (131_072, 12_288)] {
            write_now(&*volume, at, AlignedBytes::of(&[&pattern(at as usize, bytes)])).unwrap();
        }
        sync_now(&*volume).unwrap();
        for (at, bytes) in [(0u64, 4096), (8192, 65_536), (131_072, 12_288)] {
            let back = read_now(&*volume, Lane::Demand, at, bytes).unwrap();
            assert_eq!(&*back, &pattern(at as usize, bytes)[..], "{name}");
        }
        assert_eq!(volume.capacity(), 1 << 20, "{name}");
        let beyond = read_now(&*volume, Lane::Demand, 1 << 20, 4096).err().unwrap();
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof, "{name}");
        let across = read_now(&*volume, Lane::Demand, (1 << 20) - 4096, 8192).err().unwrap();
        assert_eq!(across.kind(), io::ErrorKind::UnexpectedEof, "{name}: a short read, then nothing");
        let odd = read_now(&*volume, Lane::Demand, 100, 4096).err().unwrap();
        assert_eq!(odd.kind(), io::ErrorKind::InvalidInput, "{name}");
    }
}

/// Many transfers between the slots of slabs and the volume at once, each with a header page of its own.
#[test]
fn slots_are_written_and_filled_without_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    for (name, volume) in volumes(folder.path()) {
        let (slots, bytes) = (64usize, 100_000usize);
        let (from, into) = (slab(64, 102_400), slab(64, 102_400));
        let stride = 4096 + 102_400u64;
        let (send, receive) = mpsc::channel();
        for slot in 0..slots {
            // SAFETY: each slot is filled once here, and nobody reads it meanwhile.
            let mut fill = unsafe { SlotFill::new(Arc::clone(&from), slot as u32, bytes) }.unwrap();
            fill.append(&pattern(slot, bytes)).unwrap();
            drop(fill);
            // SAFETY: filled, and not written again.
            let body = unsafe { SlotBytes::new(Arc::clone(&from), slot as u32, bytes) }.unwrap();
            let head = IoMemory::Pages(AlignedBytes::of(&[&[slot as u8; 100]]));
            let send = send.clone();
            let mut transfer = Box::new(Transfer {
                direction: Direction::Write,
                offset: slot as u64 * stride,
                memories: IoMemories { head, body: Some(IoMemory::Slot(body)) },
                tag: slot as u64,
                done: Box::new(move |result, _| send.send(result).unwrap()),
            });
            while let Err(back) = volume.submit(Lane::Background, transfer) {
                transfer = back;
            }
        }
        (0..slots).for_each(|_| receive.recv().unwrap().unwrap());
        let (send, receive) = mpsc::channel();
        for slot in 0..slots {
            // SAFETY: as above.
            let body = unsafe { SlotFill::new(Arc::clone(&into), slot as u32, bytes) }.unwrap();
            let send = send.clone();
            let transfer = Box::new(Transfer {
                direction: Direction::Read,
                offset: slot as u64 * stride,
                memories: IoMemories {
                    head: IoMemory::Pages(AlignedBytes::zeroed(1)),
                    body: Some(IoMemory::Fill(body)),
                },
                tag: 0,
                done: Box::new(move |result, memories| send.send((slot, result, memories)).unwrap()),
            });
            assert!(volume.submit(Lane::Demand, transfer).is_ok());
        }
        for _ in 0..slots {
            let (slot, result, memories) = receive.recv().unwrap();
            result.unwrap();
            let (IoMemory::Pages(head), Some(IoMemory::Fill(mut body))) = (memories.head, memories.body) else {
                panic!("{name}: other memory came back");
            };
            assert_eq!(head[..100], [slot as u8; 100], "{name}");
            assert_eq!(body.transferred(), &pattern(slot, bytes)[..], "{name}");
        }
    }
}

/// A caller that leaves must not take the buffer with it: the transfer owns it until its completion, and
/// the completion runs although nobody listens.
#[test]
fn a_buffer_lives_until_its_completion_whoever_leaves() {
    let folder = tempfile::tempdir().unwrap();
    for (name, volume) in volumes(folder.path()) {
        volume.file().allocate(0, 8 << 20).unwrap();
        let slab = slab(8, 1 << 20);
        let done = Arc::new(AtomicU64::new(0));
        for slot in 0..8u32 {
            // SAFETY: each slot once.
            let body = unsafe { SlotFill::new(Arc::clone(&slab), slot, 1 << 20) }.unwrap();
            let (done, alive) = (Arc::clone(&done), Arc::downgrade(&slab));
            let transfer = Box::new(Transfer {
                direction: Direction::Read,
                offset: u64::from(slot) << 20,
                memories: IoMemories { head: IoMemory::Fill(body), body: None },
                tag: 0,
                done: Box::new(move |result, memories| {
                    assert!(alive.strong_count() > 0, "the slab outlives the transfer");
                    // What still waited when the volume was closed is told so.
                    assert!(result.is_ok() || result.unwrap_err().kind() == io::ErrorKind::NotConnected);
                    drop(memories);
                    done.fetch_add(1, Ordering::AcqRel);
                }),
            });
            assert!(volume.submit(Lane::Demand, transfer).is_ok());
        }
        // The only other owner goes at once, and then the volume itself.
        drop(slab);
        drop(volume);
        assert_eq!(done.load(Ordering::Acquire), 8, "{name}: closing a volume waits for what the kernel has");
    }
}

#[test]
fn a_completion_that_panics_leaves_the_volume_running() {
    let folder = tempfile::tempdir().unwrap();
    for (name, volume) in volumes(folder.path()) {
        volume.file().allocate(0, 4096).unwrap();
        let transfer = Box::new(Transfer {
            direction: Direction::Read,
            offset: 0,
            memories: IoMemories::pages(AlignedBytes::zeroed(1)),
            tag: 0,
            done: Box::new(|_, _| panic!("planted")),
        });
        assert!(volume.submit(Lane::Demand, transfer).is_ok());
        assert!(read_now(&*volume, Lane::Demand, 0, 4096).is_ok(), "{name}");
    }
}

/// Whoever waits for a slow device is not left behind background work, and a full lane refuses.
#[test]
fn full_lanes_refuse_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    for (name, volume) in volumes(folder.path()) {
        volume.file().allocate(0, 4 << 20).unwrap();
        let finished = Arc::new(AtomicU64::new(0));
        // Completions wait behind a gate, so that the lane fills up however fast the device is.
        let gate = Arc::new(std::sync::RwLock::new(()));
        let closed = gate.write().unwrap();
        let (mut sent, mut refused) = (0u64, 0u64);
        while refused == 0 && sent < 10_000 {
            let (finished, gate) = (Arc::clone(&finished), Arc::clone(&gate));
            let transfer = Box::new(Transfer {
                direction: Direction::Read,
                offset: 0,
                memories: IoMemories::pages(AlignedBytes::zeroed(4096)),
                tag: 0,
                done: Box::new(move |result, _| {
                    drop(gate.read().unwrap());
                    result.unwrap();
                    finished.fetch_add(1, Ordering::AcqRel);
                }),
            });
            match volume.submit(Lane::Background, transfer) {
                Ok(()) => sent += 1,
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 0, "{name}: the lane has a bound");
        drop(closed);
        assert!(read_now(&*volume, Lane::Demand, 0, 4096).is_ok(), "{name}");
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while finished.load(Ordering::Acquire) < sent && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(finished.load(Ordering::Acquire), sent, "{name}");
        assert_eq!(volume.queued().0, [0; 3], "{name}");
    }
}

#[test]
fn faults_happen_where_they_were_armed() {
    let folder = tempfile::tempdir().unwrap();
    let file = Arc::new(VolumeFile::open(&folder.path().join("v")).unwrap());
    let faults = Faults::none();
    let volume = FaultyVolume::new(Arc::new(SyscallVolume::start(file).unwrap()), Arc::clone(&faults));
    let page = || AlignedBytes::of(&[&[7; 4096]]);
    write_now(&volume, 0, page()).unwrap();
    faults.arm(Fault::Eio, 2);
    write_now(&volume, 0, page()).unwrap();
    assert_eq!(write_now(&volume, 0, page()).unwrap_err().raw_os_error(), Some(5));
    faults.arm(Fault::Lost, 1);
    write_now(&volume, 4096, page()).unwrap();
    assert!(read_now(&volume, Lane::Demand, 4096, 4096).is_err(), "never written");
    faults.arm(Fault::Flipped, 1);
    assert_eq!(read_now(&volume, Lane::Demand, 0, 4096).unwrap()[0], 7 ^ 0x10);
    faults.arm(Fault::NoSpace, 1);
    assert_eq!(sync_now(&volume).unwrap_err().raw_os_error(), Some(28));
    faults.arm(Fault::Gone, 1);
    assert!((0..3).all(|_| read_now(&volume, Lane::Demand, 0, 4096).is_err()));
    faults.disarm();
    assert!(read_now(&volume, Lane::Demand, 0, 4096).is_ok());
    let seen = AtomicBool::new(faults.hit() >= 7);
    assert!(seen.load(Ordering::Acquire) && faults.operations() >= 11);
}
