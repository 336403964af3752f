//! What is lent against everything that could change it. A descriptor of the file stands for a mount that reads it: it
//! stays when the process that lent it is gone.

use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use super::*;
use crate::error::Error;
use crate::store::test_layer::{CHUNK_BYTES, add_layer, content, keep, read, world};

const CHUNKS: u32 = 8;

/// The whole data file of a layer of [`CHUNKS`].
fn all() -> Vec<u8> {
    (0..CHUNKS).flat_map(content).collect()
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn lend(store: &Arc<Store>, layer: &Arc<Layer>) -> Lent {
    store.lend(layer, None).unwrap().expect("it may be lent")
}

/// Lends a layer and gives it back, as one whose process was killed cannot: the mount has it still.
fn mounted(store: &Arc<Store>, layer: &Arc<Layer>) -> File {
    lend(store, layer).file().try_clone().unwrap()
}

fn evict(layer: &Layer, chunks: std::ops::Range<u32>) -> Result<u64> {
    layer.evict(std::slice::from_ref(&chunks))
}

/// The same store, opened by another process.
fn reopened(dir: &tempfile::TempDir) -> (Arc<Store>, Arc<Layer>) {
    let store = Store::open(dir.path()).unwrap();
    let layer = store.layer(&Digest::of(b"key")).unwrap().unwrap();
    (store, layer)
}

fn path(dir: &tempfile::TempDir, name: &str) -> std::path::PathBuf {
    let layer = dir.path().join("layers").join(Digest::of(b"key").hex());
    layer.join(name)
}

/// Makes a closed store one of before a restart of the machine.
fn restart_machine(dir: &tempfile::TempDir) {
    let map = File::options().write(true).open(path(dir, "map")).unwrap();
    // The boots in which it was used, verified and lent.
    for at in [24, 44, 60] {
        map.write_all_at(&[7; 16], at).unwrap();
    }
}

/// Waits for what goes on in the background.
fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "it never comes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_complete_layer_is_lent_and_stays_whole_until_it_comes_back() {
    let (_dir, store, layer) = world(CHUNKS);
    let (one, two) = (lend(&store, &layer), lend(&store, &layer));
    assert!(bytes_of(one.file()) == all());
    assert!(one.file().write_at(b"x", 0).is_err(), "it is for reading");
    drop(one);
    let refused = evict(&layer, 0..CHUNKS).unwrap_err();
    assert!(
        matches!(&refused, Error::Busy { why, .. } if why.contains("unmount")),
        "{refused}"
    );
    assert!(bytes_of(two.file()) == all() && layer.is_complete());
    drop(two);
    assert_eq!(evict(&layer, 0..CHUNKS).unwrap(), u64::from(CHUNKS) * CHUNK_BYTES);
    assert_eq!(store.lent_bytes(), 0);
}

#[test]
fn what_is_not_complete_is_not_lent() {
    let (_dir, store, layer) = world(CHUNKS);
    evict(&layer, 3..4).unwrap();
    assert!(store.lend(&layer, None).unwrap().is_none());
    keep(&layer, 3);
    layer.note_progress();
    lend(&store, &layer);
    let empty = add_layer(&store, b"empty", 0, true);
    assert!(
        store.lend(&empty, None).unwrap().is_none(),
        "a device is not empty"
    );
}

#[test]
fn a_mount_keeps_its_bytes_whatever_is_evicted_after_its_process() {
    for ranges in [[0..CHUNKS, 0..0], [2..3, 5..7], [0..1, 0..0]] {
        let (dir, store, layer) = world(CHUNKS);
        let mount = mounted(&store, &layer);
        // In this process, and in another one.
        let (_store, layer) = match ranges[1].is_empty() {
            true => (store, layer),
            false => {
                drop((store, layer));
                reopened(&dir)
            }
        };
        let is_evicted = |chunk: u32| ranges.iter().any(|range| range.contains(&chunk));
        let count = (0..CHUNKS).filter(|&chunk| is_evicted(chunk)).count() as u64;
        assert_eq!(layer.evict(&ranges).unwrap(), count * CHUNK_BYTES);
        assert!(bytes_of(&mount) == all(), "{ranges:?}");
        for chunk in 0..CHUNKS {
            let expected = (!is_evicted(chunk)).then(|| content(chunk));
            assert!(read(&layer, chunk) == expected, "chunk {chunk} of {ranges:?}");
        }
        let blocks = std::fs::metadata(path(&dir, "data")).unwrap().blocks();
        assert_eq!(blocks * 512, (u64::from(CHUNKS) - count) * CHUNK_BYTES);
        // The file that is there now was never lent: it is filled, and emptied in place.
        (0..CHUNKS)
            .filter(|&chunk| is_evicted(chunk))
            .for_each(|chunk| keep(&layer, chunk));
        layer.note_progress();
        let inode = |file: &File| file.metadata().unwrap().ino();
        let before = inode(&layer.data());
        evict(&layer, 1..2).unwrap();
        assert_eq!(inode(&layer.data()), before);
        assert!(before != inode(&mount) && bytes_of(&mount) == all());
    }
}

#[test]
fn nothing_is_written_to_what_a_mount_may_have() {
    let (dir, store, layer) = world(CHUNKS);
    let mount = mounted(&store, &layer);
    for refused in [
        layer.keep(1..2, CHUNK_BYTES, b"other"),
        layer.write(CHUNK_BYTES, b"other"),
    ] {
        assert!(matches!(refused, Err(Error::Busy { .. })), "{refused:?}");
    }
    drop((store, layer));
    let (_store, layer) = reopened(&dir);
    assert!(
        layer.keep(1..2, CHUNK_BYTES, b"other").is_err(),
        "nor by another process"
    );
    assert!(bytes_of(&mount) == all());
}

#[test]
fn whatever_became_of_the_map_a_mount_keeps_its_bytes() {
    type Damage = fn(&tempfile::TempDir);
    let cut_off: Damage = |dir| {
        // An eviction that ended between the marks and the file.
        let map = File::options().write(true).open(path(dir, "map")).unwrap();
        map.write_all_at(&[0b1111_0011], 4096).unwrap();
        std::fs::write(path(dir, "data.new"), b"half a copy").unwrap();
    };
    let lost: Damage = |dir| std::fs::remove_file(path(dir, "map")).unwrap();
    let foreign: Damage = |dir| std::fs::write(path(dir, "map"), b"rubbish").unwrap();
    let unindexed: Damage = |dir| {
        let index = std::fs::read(path(dir, "index")).unwrap();
        std::fs::write(path(dir, "index"), &index[..index.len() - 1]).unwrap();
    };
    for damage in [cut_off, lost, foreign, unindexed] {
        let (dir, store, layer) = world(CHUNKS);
        let mount = mounted(&store, &layer);
        drop((store, layer));
        damage(&dir);
        let store = Store::open(dir.path()).unwrap();
        if let Some(layer) = store.layer(&Digest::of(b"key")).unwrap() {
            assert!((0..CHUNKS).all(|chunk| read(&layer, chunk).is_none()));
            (0..CHUNKS).for_each(|chunk| keep(&layer, chunk));
            evict(&layer, 2..4).unwrap();
            assert!(read(&layer, 1) == Some(content(1)) && !path(&dir, "data.new").exists());
        } else {
            let layer = add_layer(&store, b"key", CHUNKS, true);
            evict(&layer, 2..4).unwrap();
        }
        assert!(bytes_of(&mount) == all());
    }
}

#[test]
fn an_eviction_that_finds_no_room_changes_nothing() {
    let (dir, store, layer) = world(CHUNKS);
    let mount = mounted(&store, &layer);
    // A directory under that name: no file can be made.
    std::fs::create_dir(path(&dir, "data.new")).unwrap();
    assert!(matches!(evict(&layer, 0..2), Err(Error::Io { .. })));
    assert!(layer.is_complete() && bytes_of(&mount) == all());
    assert!((0..CHUNKS).all(|chunk| read(&layer, chunk) == Some(content(chunk))));
    assert!(
        bytes_of(lend(&store, &layer).file()) == all(),
        "and it may be lent again"
    );
    std::fs::remove_dir(path(&dir, "data.new")).unwrap();
    assert_eq!(evict(&layer, 0..2).unwrap(), 2 * CHUNK_BYTES);
}

#[test]
fn at_most_half_of_the_budget_is_lent() {
    let (_dir, store, layer) = world(CHUNKS);
    let other = add_layer(&store, b"other", CHUNKS, true);
    let layer_bytes = u64::from(CHUNKS) * CHUNK_BYTES;
    assert!(store.lend(&layer, Some(2 * layer_bytes - 1)).unwrap().is_none());
    let budget_bytes = Some(3 * layer_bytes);
    let lent = store.lend(&layer, budget_bytes).unwrap().unwrap();
    let again = store.lend(&layer, budget_bytes).unwrap().unwrap();
    assert_eq!(store.lent_bytes(), layer_bytes, "it is pinned once");
    assert!(store.lend(&other, budget_bytes).unwrap().is_none());
    drop(lent);
    assert!(store.lend(&other, budget_bytes).unwrap().is_none());
    drop(again);
    let lent = store.lend(&other, budget_bytes).unwrap().unwrap();
    assert!(bytes_of(lent.file()) == all());
    assert!(
        store.lend(&layer, None).unwrap().is_some(),
        "without a budget there is no limit"
    );
}

#[test]
fn what_came_over_a_restart_of_the_machine_is_verified_before_it_is_lent() {
    for is_clean in [true, false] {
        let (dir, store, layer) = world(CHUNKS);
        let old = mounted(&store, &layer).metadata().unwrap().ino();
        if is_clean {
            store.close();
        }
        drop((store, layer));
        restart_machine(&dir);
        let (store, layer) = reopened(&dir);
        assert_eq!(layer.is_complete(), is_clean);
        let first = store.lend(&layer, None).unwrap();
        assert!(first.is_none(), "nobody has looked at it in this boot");
        let lent = eventually(|| store.lend(&layer, None).unwrap());
        assert!(bytes_of(lent.file()) == all());
        assert_eq!(lent.file().metadata().unwrap().ino(), old);
        drop((lent, store, layer));
        let (store, layer) = reopened(&dir);
        lend(&store, &layer);
    }
}

#[test]
fn what_was_lent_before_a_restart_of_the_machine_is_evicted_in_place() {
    let (dir, store, layer) = world(CHUNKS);
    mounted(&store, &layer);
    store.close();
    drop((store, layer));
    restart_machine(&dir);
    let (_store, layer) = reopened(&dir);
    let before = layer.data().metadata().unwrap().ino();
    evict(&layer, 0..2).unwrap();
    assert_eq!(layer.data().metadata().unwrap().ino(), before);
}

#[test]
fn what_was_damaged_over_a_restart_of_the_machine_is_never_lent() {
    let (dir, store, layer) = world(CHUNKS);
    store.close();
    drop((store, layer));
    restart_machine(&dir);
    let data = File::options().write(true).open(path(&dir, "data")).unwrap();
    data.write_all_at(b"damage", 3 * CHUNK_BYTES).unwrap();
    let (store, layer) = reopened(&dir);
    let is_found = || {
        store
            .lend(&layer, None)
            .unwrap()
            .is_none()
            .then(|| !layer.is_present(3))
    };
    eventually(|| is_found().filter(|&is_found| is_found));
    assert!(!layer.is_complete() && read(&layer, 4) == Some(content(4)));
    keep(&layer, 3);
    layer.note_progress();
    let lent = eventually(|| store.lend(&layer, None).unwrap());
    assert!(bytes_of(lent.file()) == all());
}

#[test]
fn what_cannot_be_verified_again_is_served_and_not_lent() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layer = add_layer(&store, b"key", CHUNKS, false);
    lend(&store, &layer);
    store.close();
    drop((store, layer));
    restart_machine(&dir);
    let (store, layer) = reopened(&dir);
    assert!(!layer.verify_all(&AtomicBool::new(false)).unwrap());
    assert!(store.lend(&layer, None).unwrap().is_none());
    assert!((0..CHUNKS).all(|chunk| read(&layer, chunk) == Some(content(chunk))));
}

#[test]
fn a_verification_that_an_eviction_crosses_blames_nothing() {
    let (dir, store, layer) = world(CHUNKS);
    store.close();
    drop((store, layer));
    restart_machine(&dir);
    let (_store, layer) = reopened(&dir);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let verifying = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                layer.verify_all(&over).unwrap();
            }
        });
        for round in 0..200 {
            let chunk = round % CHUNKS;
            evict(&layer, chunk..chunk + 1).unwrap();
            keep(&layer, chunk);
            layer.note_progress();
            assert!(layer.is_complete(), "a chunk was blamed");
            if layer.is_verified() {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
        verifying.join().unwrap();
    });
    assert!((0..CHUNKS).all(|chunk| read(&layer, chunk) == Some(content(chunk))));
}

#[test]
fn lenders_readers_writers_and_evictors_leave_every_mount_whole() {
    let (_dir, store, layer) = world(CHUNKS);
    let (over, lent_count) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut mounts = Vec::new();
    std::thread::scope(|scope| {
        let (store, layer, over, lent_count) = (&store, &layer, &over, &lent_count);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                for chunk in (0..CHUNKS).filter(|&chunk| !layer.is_present(chunk)) {
                    // Refused, where somebody else was faster and all of it is lent already.
                    let place = u64::from(chunk) * CHUNK_BYTES;
                    let _ = layer.keep(chunk..chunk + 1, place, &content(chunk));
                }
                layer.note_progress();
            }
        });
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                for chunk in 0..CHUNKS {
                    let place = u64::from(chunk) * CHUNK_BYTES;
                    let now = layer.read_now(&(chunk..chunk + 1), place, CHUNK_BYTES as usize);
                    for bytes in [now, read(layer, chunk)].into_iter().flatten() {
                        assert!(bytes == content(chunk), "other bytes in chunk {chunk}");
                    }
                }
            }
        });
        let lender = scope.spawn(move || {
            let mut mounts = Vec::new();
            while !over.load(Ordering::Relaxed) {
                if let Some(lent) = store.lend(layer, None).unwrap() {
                    lent_count.fetch_add(1, Ordering::Relaxed);
                    assert!(bytes_of(lent.file()) == all());
                    if mounts.len() < 50 {
                        mounts.push(lent.file().try_clone().unwrap());
                    }
                }
                std::thread::yield_now();
            }
            mounts
        });
        let started = Instant::now();
        for round in 0.. {
            let is_enough = round >= 300 && lent_count.load(Ordering::Relaxed) >= 5;
            if is_enough || started.elapsed() > Duration::from_secs(30) {
                break;
            }
            let chunk = round % CHUNKS;
            let range = if round % 5 == 0 {
                0..CHUNKS
            } else {
                chunk..chunk + 1
            };
            // Every other time all of it is there, so that it can be lent.
            while round % 2 == 0 && !layer.is_complete() {
                std::thread::yield_now();
            }
            match evict(layer, range) {
                Ok(_) | Err(Error::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            std::thread::yield_now();
        }
        over.store(true, Ordering::Relaxed);
        mounts = lender.join().unwrap();
    });
    assert!(!mounts.is_empty(), "nothing was ever lent");
    assert!(mounts.iter().all(|mount| bytes_of(mount) == all()));
}

#[test]
fn what_the_disk_has_lost_is_not_kept_nor_lent_again() {
    let (dir, store, layer) = world(CHUNKS);
    layer.doubt();
    assert!((0..CHUNKS).all(|chunk| read(&layer, chunk).is_none()));
    (0..CHUNKS).for_each(|chunk| keep(&layer, chunk));
    layer.note_progress();
    let lent = eventually(|| store.lend(&layer, None).unwrap());
    let data = File::options().write(true).open(path(&dir, "data")).unwrap();
    data.write_all_at(&[0; 7], 3 * CHUNK_BYTES).unwrap();
    // Now a mount has it, whose bytes cannot be taken back.
    layer.doubt();
    assert!(read(&layer, 3).is_some());
    drop(lent);
    eventually(|| {
        let lent = store.lend(&layer, None).unwrap();
        assert!(lent.is_none(), "it has been damaged");
        read(&layer, 3).is_none().then_some(())
    });
    assert_eq!(read(&layer, 2), Some(content(2)));
    keep(&layer, 3);
    layer.note_progress();
    let lent = eventually(|| store.lend(&layer, None).unwrap());
    assert!(bytes_of(lent.file()) == all());
}
