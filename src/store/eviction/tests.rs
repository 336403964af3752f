//! Eviction alone and against readers and writers.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::digest::Digest;
use crate::store::Store;
use crate::store::test_layer::{CHUNK_BYTES, content, keep, read, world};

fn evict(layer: &Layer, chunks: Range<u32>) -> u64 {
    layer.evict(std::slice::from_ref(&chunks)).unwrap()
}

fn blocks(dir: &tempfile::TempDir) -> u64 {
    let layer = dir.path().join("layers").join(Digest::of(b"key").hex());
    std::fs::metadata(layer.join("data")).unwrap().blocks()
}

#[test]
fn what_is_evicted_is_gone_from_the_disk_and_the_rest_stays() {
    let (dir, _store, layer) = world(16);
    let before = blocks(&dir);
    assert_eq!(layer.evict(&[2..4, 10..11]).unwrap(), 3 * CHUNK_BYTES);
    assert!(!layer.is_complete());
    assert_eq!(blocks(&dir), before - 3 * CHUNK_BYTES / 512);
    for chunk in 0..16 {
        let expected = (!matches!(chunk, 2 | 3 | 10)).then(|| content(chunk));
        assert_eq!(read(&layer, chunk), expected, "chunk {chunk}");
    }
    assert_eq!(evict(&layer, 2..4), 0, "they are gone already");
    keep(&layer, 3);
    assert_eq!(read(&layer, 3), Some(content(3)), "and come again");
}

#[test]
fn a_chunk_that_comes_piece_by_piece_over_an_eviction_is_not_marked() {
    let (_dir, _store, layer) = world(2);
    evict(&layer, 0..1);
    let evictions = layer.evictions();
    layer.write(0, &content(0)).unwrap();
    assert_eq!(layer.read_back(0, 3, evictions).unwrap(), Some(vec![1; 3]));
    evict(&layer, 1..2);
    assert_eq!(layer.read_back(0, 3, evictions).unwrap(), None);
    layer.mark_written(0, evictions).unwrap();
    assert_eq!(read(&layer, 0), None);
    layer.write(0, &content(0)).unwrap();
    layer.mark_written(0, layer.evictions()).unwrap();
    assert_eq!(read(&layer, 0), Some(content(0)));
}

#[test]
fn a_restart_does_not_bring_evicted_chunks_back() {
    let (dir, store, layer) = world(4);
    store.close();
    evict(&layer, 1..2);
    drop((layer, store));
    let store = Store::open(dir.path()).unwrap();
    let layer = store.layer(&Digest::of(b"key")).unwrap().unwrap();
    assert_eq!(read(&layer, 1), None);
    assert_eq!(read(&layer, 2), Some(content(2)));
}

#[test]
fn a_layer_is_not_complete_of_which_something_was_evicted() {
    let (_dir, _store, layer) = world(8);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whoever brings chunks looks after each of them whether it was the last.
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    layer.note_progress();
                }
            });
        }
        for round in 0..300 {
            let chunk = round % 8;
            evict(&layer, chunk..chunk + 1);
            std::thread::yield_now();
            if layer.is_complete() {
                over.store(true, Ordering::Relaxed);
                panic!("complete without chunk {chunk}");
            }
            keep(&layer, chunk);
            layer.note_progress();
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn no_reader_ever_sees_a_hole() {
    let (_dir, _store, layer) = world(8);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for chunk in 0..8 {
                        let place = layer.index().chunk(chunk).unwrap().data_offset;
                        let chunks = chunk..chunk + 1;
                        let now = layer.read_now(&chunks, place, CHUNK_BYTES as usize);
                        for bytes in [now, read(&layer, chunk)].into_iter().flatten() {
                            assert!(bytes == content(chunk), "a hole in chunk {chunk}");
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                (0..8)
                    .filter(|&chunk| !layer.is_present(chunk))
                    .for_each(|chunk| keep(&layer, chunk));
            }
        });
        for round in 0..200 {
            let chunk = round % 8;
            evict(&layer, chunk..chunk + 1);
        }
        over.store(true, Ordering::Relaxed);
    });
}
