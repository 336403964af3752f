//! A large file: all of it, a range, and pages at random.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use registryfs::demo::{Behaviour, Image};
use registryfs::fetch::readahead::RANGE_AHEAD_BYTES_FLOOR;

use crate::support::file;
use crate::world::noise;
use crate::{Wire, bytes_once, image};

const MIB: usize = 1 << 20;
const CHUNK_BYTES: usize = 256 << 10;
const FILE_BYTES: usize = 40 * MIB;
/// The kernel reads ahead of a reader by itself: the window it reads in, and the next one.
const KERNEL_AHEAD_BYTES: usize = 2 * MIB;
/// What is around a chunk that is not compressed: the headers of a gzip member, and of a tar entry before the first.
const AROUND_CHUNK_BYTES: u64 = 2048;

/// A large file between others, so that there is something to read by mistake.
fn large() -> (Image, Vec<u8>) {
    let payload = noise(FILE_BYTES, 7);
    let entries = [
        file("before", noise(300_000, 8)),
        file("large", payload.clone()),
        file("rear", noise(3_000_000, 9)),
    ];
    (image(&entries, CHUNK_BYTES as u64), payload)
}

/// What some bytes of the file take at most, in whole chunks.
fn chunks_bytes(start: usize, len: usize) -> u64 {
    let chunks = (start + len).div_ceil(CHUNK_BYTES) - start / CHUNK_BYTES;
    chunks as u64 * (CHUNK_BYTES as u64 + AROUND_CHUNK_BYTES)
}

#[test]
fn all_of_it_comes_once_and_in_few_requests() {
    let (image, payload) = large();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        let path = wire.path("large");
        let (read, requests) = wire.world.requests(|| fs::read(&path).unwrap());
        assert!(read == payload);
        let asked = wire.asked(&requests);
        let (fetched, most) = (bytes_once(&asked), chunks_bytes(0, FILE_BYTES));
        assert!(fetched <= most, "{fetched} bytes, at most {most}");
        // Mebibytes each, once the reader has come some way; fewer in one where it waits for each of them.
        assert!(asked.len() <= 2 * FILE_BYTES / MIB, "{} requests", asked.len());
    });
}

#[test]
fn a_range_of_it_brings_little_more_than_itself() {
    let (image, payload) = large();
    let (start, len) = (10 * MIB + 1000, 16 * MIB);
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        let path = wire.path("large");
        let ((), requests) = wire.world.requests(|| {
            let open = File::open(&path).unwrap();
            let mut piece = vec![0; 128 << 10];
            for at in (start..start + len).step_by(piece.len()) {
                open.read_exact_at(&mut piece, at as u64).unwrap();
                assert!(piece == payload[at..at + piece.len()]);
            }
        });
        let fetched = bytes_once(&wire.asked(&requests));
        let most = chunks_bytes(start, len + KERNEL_AHEAD_BYTES) + RANGE_AHEAD_BYTES_FLOOR;
        assert!(fetched <= most, "{fetched} bytes, at most {most}");
    });
}

#[test]
fn pages_at_random_bring_their_chunks_once_and_nothing_else() {
    let (image, payload) = large();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        let path = wire.path("large");
        let chunks = FILE_BYTES / CHUNK_BYTES;
        let places = (0..60).map(|number| number * 37 % chunks * CHUNK_BYTES + number * 911 % CHUNK_BYTES);
        let ((), requests) = wire.world.requests(|| {
            let open = File::open(&path).unwrap();
            let mut page = [0; 4096];
            for at in places.clone().map(|at| at / 4096 * 4096) {
                open.read_exact_at(&mut page, at as u64).unwrap();
                assert!(page == payload[at..at + 4096]);
            }
        });
        let mut touched: Vec<usize> = places.clone().map(|at| at / CHUNK_BYTES).collect();
        touched.sort_unstable();
        touched.dedup();
        let asked = wire.asked(&requests);
        let (fetched, most) = (bytes_once(&asked), chunks_bytes(0, touched.len() * CHUNK_BYTES));
        assert!(fetched <= most, "{fetched} bytes, at most {most}");
        assert_eq!(asked.len(), touched.len(), "{asked:?}");
    });
}

#[test]
fn a_hundred_readers_of_it_bring_each_chunk_once() {
    let payload = noise(2 * MIB, 3);
    let image = image(&[file("one", payload.clone())], CHUNK_BYTES as u64);
    let slow = Behaviour {
        latency: std::time::Duration::from_millis(20),
        ..Behaviour::default()
    };
    Wire::each_mode(&image, &slow, |wire| {
        let path = wire.path("one");
        let ((), requests) = wire.world.requests(|| {
            std::thread::scope(|scope| {
                for _ in 0..100 {
                    scope.spawn(|| assert!(fs::read(&path).unwrap() == payload));
                }
            });
        });
        assert!(bytes_once(&wire.asked(&requests)) <= chunks_bytes(0, payload.len()));
    });
}
