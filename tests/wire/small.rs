//! Small files: what comes along with one, and how few requests bring all of them in any order.

use std::fs;
use std::process::Command;

use registryfs::demo::{Behaviour, Image};

use crate::support::{dir, file};
use crate::world::{finish, noise, start};
use crate::{Wire, bytes, bytes_once, image};

const FILES: usize = 1500;
const FILE_BYTES: usize = 10_000;
/// A small file may bring so much besides itself.
const STRANGERS_BYTES_MAX: u64 = 256 << 10;

fn name(number: usize) -> String {
    format!("d{}/f{number:04}", number / 100)
}

fn payload(number: usize) -> Vec<u8> {
    noise(FILE_BYTES, number as u64 + 1)
}

/// A layer of 15 MB of small files.
fn files() -> Image {
    let entries: Vec<_> = (0..FILES)
        .flat_map(|number| {
            let parent = (number % 100 == 0).then(|| dir(&format!("d{}/", number / 100)));
            parent.into_iter().chain([file(&name(number), payload(number))])
        })
        .collect();
    image(&entries, 4 << 20)
}

#[test]
fn one_brings_at_most_a_quarter_of_a_mebibyte_of_others() {
    let image = files();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        for number in [700, 20, 1499, 350] {
            let path = wire.path(&name(number));
            let (read, requests) = wire.world.requests(|| fs::read(&path).unwrap());
            assert!(read == payload(number));
            assert_eq!(requests.len(), 1, "{requests:#?}");
            let fetched = bytes_once(&wire.asked(&requests));
            assert!(
                fetched <= FILE_BYTES as u64 + STRANGERS_BYTES_MAX,
                "f{number}: {fetched} bytes"
            );
        }
    });
}

#[test]
fn listing_all_of_them_brings_the_table_of_contents_alone() {
    let image = files();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        let rootfs = wire.world.at("team/app/1.0/rootfs");
        let mut list = Command::new("ls");
        list.arg("-lR").arg(&rootfs);
        let (listed, requests) = wire.world.requests(|| finish(start(&mut list)));
        assert!(listed.status.success());
        let lines = listed.stdout.iter().filter(|byte| **byte == b'\n').count();
        assert!(lines > FILES, "{lines} lines");
        assert_eq!(wire.asked(&requests), [], "{requests:#?}");
        assert!(
            requests.len() <= 3,
            "manifest and table of contents: {requests:#?}"
        );
    });
}

#[test]
fn all_of_them_in_any_order_come_in_few_requests() {
    let image = files();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        wire.path("");
        let ((), requests) = wire.world.requests(|| {
            for number in (0..FILES).map(|step| step * 577 % FILES) {
                assert!(fs::read(wire.path(&name(number))).unwrap() == payload(number));
            }
        });
        let asked = wire.asked(&requests);
        let fetched = bytes(&asked);
        assert!(fetched <= wire.content_bytes * 11 / 10, "{fetched} bytes");
        assert!(asked.len() < FILES / 10, "{} requests", asked.len());
    });
}

#[test]
fn all_of_them_in_order_come_in_very_few_requests() {
    let image = files();
    Wire::each_mode(&image, &Behaviour::default(), |wire| {
        wire.path("");
        let ((), requests) = wire.world.requests(|| {
            for number in 0..FILES {
                assert!(fs::read(wire.path(&name(number))).unwrap() == payload(number));
            }
        });
        let asked = wire.asked(&requests);
        // What has come by another request is skipped over now and then.
        let fetched = bytes(&asked);
        assert!(fetched <= wire.content_bytes * 51 / 50, "{fetched} bytes");
        assert!(asked.len() < FILES / 30, "{} requests", asked.len());
    });
}
