//! Copies from whole, damaged, doubtful and vanishing sources, and onto a disk that takes nothing.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::store::Store;
use crate::store::test_layer::{CHUNK_BYTES, add_layer, content, keep, read, world};

/// A layer of the same chunks as [`world`]'s, none of which is there.
fn empty(store: &Arc<Store>, key: &[u8], chunks: u32) -> Arc<Layer> {
    let layer = add_layer(store, key, chunks, true);
    layer.evict(std::slice::from_ref(&(0..chunks))).unwrap();
    layer
}

fn evict(layer: &Layer, chunk: u32) {
    layer.evict(std::slice::from_ref(&(chunk..chunk + 1))).unwrap();
}

fn is_kept(copied: &Copied) -> bool {
    matches!(copied, Copied::Kept)
}

#[test]
fn a_copy_is_the_chunk_and_only_what_is_there_is_copied() {
    let (_dir, store, source) = world(4);
    let layer = empty(&store, b"other", 4);
    evict(&source, 2);
    for chunk in 0..4 {
        let copied = layer.copy_chunk(chunk, &source, chunk).unwrap();
        assert_eq!(is_kept(&copied), chunk != 2, "chunk {chunk}: {copied:?}");
        assert_eq!(read(&layer, chunk), (chunk != 2).then(|| content(chunk)));
    }
    let other = layer.copy_chunk(2, &source, 3).unwrap();
    assert!(matches!(other, Copied::Gone), "it is another chunk: {other:?}");
    assert_eq!(read(&layer, 2), None);
}

#[test]
fn a_damaged_source_is_found_out_and_not_read_again() {
    let (_dir, store, source) = world(2);
    let layer = empty(&store, b"other", 2);
    source.data().write_all_at(b"damage", CHUNK_BYTES + 5).unwrap();
    assert!(is_kept(&layer.copy_chunk(0, &source, 0).unwrap()));
    let copied = layer.copy_chunk(1, &source, 1).unwrap();
    assert!(matches!(copied, Copied::Gone), "{copied:?}");
    assert!(!layer.is_present(1));
    assert!(!source.is_present(1), "its own readers would have got that");
    assert!(source.is_present(0));
}

#[test]
fn what_a_crash_made_doubtful_is_looked_at_before_it_is_copied() {
    let (dir, store, source) = world(3);
    drop((source, store));
    let files = dir.path().join("layers").join(Digest::of(b"key").hex());
    let options = || std::fs::File::options().write(true).open(files.join("map"));
    // Another boot's.
    options().unwrap().write_all_at(&[9; 16], 24).unwrap();
    let data = std::fs::File::options()
        .write(true)
        .open(files.join("data"))
        .unwrap();
    data.write_all_at(&[0; 100], CHUNK_BYTES).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = store.layer(&Digest::of(b"key")).unwrap().unwrap();
    assert!((0..3).all(|chunk| source.is_suspect(chunk)));
    let layer = empty(&store, b"other", 3);
    for chunk in 0..2 {
        let copied = layer.copy_chunk(chunk, &source, chunk).unwrap();
        assert_eq!(is_kept(&copied), chunk == 0, "{copied:?}");
        assert!(!source.is_suspect(chunk), "it is known now");
        assert_eq!(source.is_present(chunk), chunk == 0);
    }
    assert_eq!(read(&layer, 0), Some(content(0)));
    assert_eq!(read(&layer, 1), None);
    assert!(source.is_suspect(2), "nobody needed that");
}

#[test]
fn a_copy_is_never_of_what_an_evictor_left() {
    let (_dir, store, source) = world(8);
    let layer = empty(&store, b"other", 8);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for chunk in 0..8 {
                    evict(&source, chunk);
                    std::thread::yield_now();
                    keep(&source, chunk);
                }
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for chunk in 0..8 {
                    evict(&layer, chunk);
                    std::thread::yield_now();
                }
            }
        });
        let mut kept = 0;
        for round in 0..2000 {
            let chunk = round % 8;
            if !layer.is_present(chunk) {
                kept += u32::from(is_kept(&layer.copy_chunk(chunk, &source, chunk).unwrap()));
            }
            let bytes = read(&layer, chunk);
            let is_right = bytes.is_none_or(|bytes| bytes == content(chunk));
            if !is_right {
                over.store(true, Ordering::Relaxed);
                panic!("a hole in chunk {chunk}");
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(kept > 0);
    });
}

#[test]
fn places_in_one_layer_are_copied_to_each_other_beside_an_evictor() {
    // The first chunk and the last have the same content.
    let (_dir, _store, layer) = world(251);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                evict(&layer, 250);
            }
        });
        for _ in 0..300 {
            if !layer.is_present(250) {
                assert!(is_kept(&layer.copy_chunk(250, &layer, 0).unwrap()));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(read(&layer, 250).is_none_or(|bytes| bytes == content(0)));
    assert_eq!(read(&layer, 0), Some(content(0)));
}

#[test]
fn a_disk_that_takes_nothing_leaves_the_bytes_in_hand() {
    let (dir, store, source) = world(2);
    let layer = empty(&store, b"full", 2);
    // No write to it succeeds.
    let full = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    *layer.data.write() = Arc::new(full);
    match layer.copy_chunk(1, &source, 1).unwrap() {
        Copied::Unkept(bytes, error) => {
            assert!(bytes == content(1));
            assert!(
                matches!(
                    error,
                    Error::Io {
                        errno: libc::ENOSPC,
                        ..
                    }
                ),
                "{error}"
            );
        }
        copied => panic!("{copied:?}"),
    }
    assert!(!layer.is_present(1));
    drop(dir);
}
