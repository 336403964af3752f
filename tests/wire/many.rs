//! Many readers of different files at once: nobody waits for others in line.

use std::fs;
use std::time::Duration;

use registryfs::demo::{Behaviour, Image, Record, in_sequence};

use crate::support::file;
use crate::world::noise;
use crate::{Wire, bytes, bytes_once, image};

const READERS: usize = 64;
/// So few that nothing says that the layer is read everywhere.
const FEW: usize = 16;
const FILE_BYTES: usize = 20_000;
/// Too far apart for one to come with another.
const APART_BYTES: usize = 500_000;
/// The kernel reads such a file in several pieces.
const LARGE_BYTES: usize = 300_000;
/// What is around a chunk that is not compressed: the headers of a gzip member and of a tar entry.
const AROUND_CHUNK_BYTES: usize = 2048;

fn payload(reader: usize, bytes: usize) -> Vec<u8> {
    noise(bytes, reader as u64 + 1)
}

/// An image with a file of so many bytes for each reader, and strangers between them.
fn apart(readers: usize, bytes: usize) -> Image {
    let entries: Vec<_> = (0..readers)
        .flat_map(|reader| {
            [
                file(&format!("f{reader:02}"), payload(reader, bytes)),
                file(&format!("g{reader:02}"), payload(READERS + reader, APART_BYTES)),
            ]
        })
        .collect();
    image(&entries, 4 << 20)
}

/// All read at once, each a file of its own, from a registry that takes its time, so that what could be parallel is, on a
/// busy machine too. What was asked for.
fn read_at_once(wire: &Wire, readers: usize, bytes: usize) -> Vec<Record> {
    wire.path("");
    let handle = wire.world.handle();
    handle.update(|behaviour| behaviour.latency = Duration::from_millis(500));
    let ((), requests) = wire.world.requests(|| {
        std::thread::scope(|scope| {
            for reader in 0..readers {
                let path = wire.path(&format!("f{reader:02}"));
                scope.spawn(move || assert!(fs::read(path).unwrap() == payload(reader, bytes)));
            }
        });
    });
    requests
}

#[test]
fn readers_of_different_files_wait_for_two_round_trips_at_most() {
    Wire::each_mode(&apart(READERS, FILE_BYTES), &Behaviour::default(), |wire| {
        let requests = read_at_once(wire, READERS, FILE_BYTES);
        let fetched = bytes(&wire.asked(&requests));
        assert!(requests.len() <= READERS, "{} requests", requests.len());
        assert!(in_sequence(&requests) <= 2, "{requests:#?}");
        // Few of them bring others along, although a layer that is read at so many places is soon read everywhere.
        assert!(fetched <= wire.content_bytes * 3 / 4, "{fetched} bytes");
    });
}

/// The kernel reads ahead of each of them, but not beyond its file.
#[test]
fn readers_of_different_large_files_bring_these_and_nothing_else() {
    Wire::each_mode(&apart(FEW, LARGE_BYTES), &Behaviour::default(), |wire| {
        let requests = read_at_once(wire, FEW, LARGE_BYTES);
        let fetched = bytes_once(&wire.asked(&requests));
        assert_eq!(requests.len(), FEW, "{requests:#?}");
        assert_eq!(in_sequence(&requests), 1, "{requests:#?}");
        let most = (FEW * (LARGE_BYTES + AROUND_CHUNK_BYTES)) as u64;
        assert!(fetched <= most, "{fetched} bytes, at most {most}");
    });
}
