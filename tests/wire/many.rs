//! Many readers of different files at once: nobody waits for others in line.

use std::fs;
use std::time::Duration;

use registryfs::demo::{Behaviour, in_sequence};

use crate::support::file;
use crate::world::noise;
use crate::{Wire, bytes, image};

const READERS: usize = 64;
const FILE_BYTES: usize = 20_000;
/// Too far apart for one to come with another.
const APART_BYTES: usize = 500_000;

#[test]
fn readers_of_different_files_wait_for_two_round_trips_at_most() {
    let payload = |reader: usize| noise(FILE_BYTES, reader as u64 + 1);
    let entries: Vec<_> = (0..READERS)
        .flat_map(|reader| {
            let between = noise(APART_BYTES, (READERS + reader) as u64 + 1);
            [
                file(&format!("f{reader:02}"), payload(reader)),
                file(&format!("g{reader:02}"), between),
            ]
        })
        .collect();
    let image = image(&entries, 4 << 20);
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        wire.path("");
        // The registry takes its time, so that what could be parallel is, on a busy machine too.
        let handle = wire.world.handle();
        handle.update(|behaviour| behaviour.latency = Duration::from_millis(500));
        let ((), requests) = wire.world.requests(|| {
            std::thread::scope(|scope| {
                for reader in 0..READERS {
                    let path = wire.path(&format!("f{reader:02}"));
                    scope.spawn(move || assert!(fs::read(path).unwrap() == payload(reader)));
                }
            });
        });
        let fetched = bytes(&wire.asked(&requests));
        assert!(requests.len() <= READERS, "{} requests", requests.len());
        assert!(in_sequence(&requests) <= 2, "{requests:#?}");
        // Few of them bring others along, although a layer that is read at so many places is soon read everywhere.
        assert!(fetched <= wire.content_bytes * 3 / 4, "{fetched} bytes");
    });
}
