//! What images hold, case by case.

use super::mounted::mount_and_compare;
use super::*;

fn linked(path: &str, kind: Kind, link: &[u8]) -> Entry {
    Entry {
        link: link.to_vec(),
        ..Entry::new(path, kind)
    }
}

fn file(path: impl Into<Vec<u8>>, size: u64) -> Entry {
    Entry {
        size,
        ..Entry::new(path, Kind::File)
    }
}

#[test]
fn every_type_of_file_is_shown() {
    let mut device = Entry::new("d/device", Kind::Char);
    device.rdev = (1, 3);
    let entries = [
        file("d/file", 5000),
        file("d/empty", 0),
        linked("d/hard", Kind::Hardlink, b"d/file"),
        linked("d/link", Kind::Symlink, b"file"),
        Entry::new("d/fifo", Kind::Fifo),
        Entry::new("d/block", Kind::Block),
        Entry::new("e", Kind::Dir),
        device,
    ];
    mount_and_compare(&Merged::of(&entries));
}
