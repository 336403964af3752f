//! Registries that fail and lie while the kernel reads layers of every format as devices: a read gets the right bytes or
//! EIO, and nothing wrong stays in the store or in the kernel.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use registryfs::demo::{Content, Fault, ImageBuilder, Layer, RangeLie, Scope};
use registryfs::layer::estargz::writer::Options;
use registryfs::layer::zstd_chunked::writer as zstd_chunked;

use crate::ground::{is_erofs, kernel_world};
use crate::support::{self, dir, file};
use crate::world::{World, errno, noise, until};

const FILES: u64 = 24;

/// Some that compress and some that do not, up to several of the kernel's requests.
fn payload(number: u64) -> Vec<u8> {
    let len = [1, 4096, 9000, 70_000, 200_001, 4095][(number % 6) as usize];
    let mut bytes = noise(len, 900 + number);
    if number % 4 == 1 {
        bytes.iter_mut().for_each(|byte| *byte &= 3);
    }
    bytes
}

fn entries() -> Vec<support::File> {
    let files = (0..FILES).map(|number| file(&format!("d/f{number}"), payload(number)));
    std::iter::once(dir("d/")).chain(files).collect()
}

fn world(layer: Layer) -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &ImageBuilder::new(vec![layer]).build());
    kernel_world(content, "retries = 0\ntimeout_s = 2\n")
}

fn faults() -> Vec<Fault> {
    let status = |status| Fault::Status {
        status,
        retry_after: None,
    };
    vec![
        status(500),
        status(503),
        status(404),
        Fault::Reset,
        Fault::Cut(0),
        Fault::Cut(5000),
        Fault::CutHalfway,
        Fault::FlipByte(0),
        Fault::FlipByte(3000),
        Fault::Range(RangeLie::WrongHeader),
        Fault::Range(RangeLie::WrongBytes),
        Fault::Range(RangeLie::WholeBody),
        Fault::Range(RangeLie::ShortBody),
        Fault::Delay(Duration::from_millis(20)),
        Fault::Stall {
            after_bytes: 2000,
            pause: Some(Duration::from_millis(30)),
        },
    ]
}

/// Reads a file in one of several ways. Answers whether it could be read.
fn read(path: &Path, number: u64, way: usize) -> bool {
    let expected = payload(number);
    if way == 0 {
        return match fs::read(path) {
            Ok(bytes) => {
                assert!(bytes == expected, "f{number}");
                true
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "f{number}");
                false
            }
        };
    }
    let open = File::open(path).unwrap();
    let step = [1, 4096, 50_000][way % 3].max(expected.len() / 20);
    let mut is_whole = true;
    for at in (0..expected.len()).step_by(step).rev() {
        let mut bytes = vec![0; step];
        match open.read_at(&mut bytes, at as u64) {
            Ok(read) => {
                let end = expected.len().min(at + step);
                // A read that fails half way is short.
                assert!(read > 0 && at + read <= end, "f{number} at {at}");
                assert!(bytes[..read] == expected[at..at + read], "f{number} at {at}");
            }
            failed => {
                assert_eq!(errno(failed), libc::EIO, "f{number} at {at}");
                is_whole = false;
            }
        }
    }
    assert_eq!(open.read_at(&mut [0; 9], expected.len() as u64).unwrap(), 0);
    is_whole
}

/// Tries the faults from the `first` on, every eighth: the formats together try all, because what failed is remembered for
/// some seconds, which each of them takes.
fn nothing_wrong_is_read(first: usize, layer: Layer) {
    let world = world(layer);
    let at = |number: u64| world.at(&format!("team/app:1.0/rootfs/d/f{number}"));
    let reference = format!("{}/team/app:1.0", world.registry.host());
    assert!(is_erofs(&at(0)));
    for (round, fault) in faults().into_iter().enumerate().skip(first).step_by(8) {
        world.text(&["cache", "evict", &reference]);
        fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
        world
            .handle()
            .inject(Scope::containing("/blobs/").every(1 + round as u32 / 8), fault);
        std::thread::scope(|scope| {
            for reader in 0..3 {
                let at = &at;
                scope.spawn(move || {
                    for step in 0..FILES {
                        let number = (step * (2 * reader + 1) + reader) % FILES;
                        read(&at(number), number, (reader as usize + round) % 4);
                    }
                });
            }
        });
        world.handle().clear_faults();
        for number in 0..FILES {
            until("it can be read again", || read(&at(number), number, 0));
        }
    }
    // What was kept of all that is right, also as a local file.
    world.restart();
    fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
    for number in 0..FILES {
        assert!(read(&at(number), number, 0), "f{number}");
    }
}

#[test]
fn nothing_wrong_is_read_of_estargz() {
    nothing_wrong_is_read(0, support::layer(&entries()));
}

#[test]
fn nothing_wrong_is_read_of_estargz_of_large_chunks() {
    nothing_wrong_is_read(1, Layer::estargz(&entries(), Options::default()).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_zstd_chunked() {
    let options = zstd_chunked::Options::default();
    nothing_wrong_is_read(2, Layer::zstd_chunked(&entries(), options).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_gzip() {
    nothing_wrong_is_read(3, Layer::gzip(&entries()).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_gzip_of_many_members() {
    nothing_wrong_is_read(4, Layer::gzip_members(&entries(), 30_000).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_zstd() {
    nothing_wrong_is_read(5, Layer::zstd(&entries()).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_zstd_of_many_frames() {
    nothing_wrong_is_read(6, Layer::zstd_frames(&entries(), 30_000).unwrap());
}

#[test]
fn nothing_wrong_is_read_of_tar() {
    nothing_wrong_is_read(7, Layer::tar(&entries()).unwrap());
}
