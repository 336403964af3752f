//! Damaged trees: each is refused when it is opened, and what a checksum cannot see ends in an error, not in a panic or
//! a walk without end.

use proptest::prelude::*;

use super::*;
use crate::error::{Error, Result};
use crate::image::tree::format::{CRC_AT, HEADER_BYTES, NODE_BYTES};
use crate::layer::index;

/// A tree with something of everything.
fn good() -> Vec<u8> {
    let linked = |path: &str, kind, link: &str| Entry {
        link: link.into(),
        ..Entry::new(path, kind)
    };
    let mut file = Entry::new("d/e/file", Kind::File);
    file.size = 5;
    file.xattrs = vec![(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), vec![])];
    let entries = [
        file,
        Entry::new("d/f", Kind::Dir),
        linked("d/hard", Kind::Hardlink, "d/e/file"),
        linked("link", Kind::Symlink, "d/e"),
        Entry::new("null", Kind::Char),
    ];
    let index = layer(&entries);
    merge(&[&index], &key(), Whiteouts::Apply).unwrap().bytes
}

fn with_right_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some((head, covered)) = bytes.split_at_mut_checked(CRC_AT + 4) {
        head[CRC_AT..].copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
    }
    bytes
}

/// Reads all there is in every way there is, and says how many names the walk from the root met.
fn read_all(bytes: &[u8]) -> Result<usize> {
    let tree = Tree::open(bytes, &key())?;
    let mut first_error = None;
    let mut note = |error: Option<Error>| first_error = first_error.take().or(error);
    for number in 0..tree.node_count() {
        note(tree.path_of(number).err());
        note(
            tree.lookup(number, b"e")
                .err()
                .filter(|error| error.errno() == libc::EIO),
        );
        let Ok(node) = tree.node(number) else { continue };
        note(tree.link(&node).err());
        note(tree.xattrs(&node).err());
    }
    for path in ["d/e/file", "link/file", "d/hard", "../d/f"] {
        let error = tree.resolve(path.as_bytes(), true).err();
        note(error.filter(|error| matches!(error, Error::Malformed { .. })));
    }
    let (mut names, mut open) = (0, vec![tree.node(0)?]);
    while let Some(dir) = open.pop() {
        for position in 0..dir.child_count {
            names += 1;
            match tree.child_at(&dir, position) {
                Ok(Some((_, child))) => open.extend(tree.node(child).ok().filter(Node::is_dir)),
                Ok(None) => {}
                Err(error) => note(Some(error)),
            }
        }
    }
    first_error.map_or(Ok(names), Err)
}

#[test]
fn an_undamaged_tree_reads_without_errors() {
    assert_eq!(read_all(&good()), Ok(7));
}

#[test]
fn every_changed_byte_and_every_cut_is_noticed() {
    let good = good();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(Tree::open(bad.as_slice(), &key()).is_err(), "byte {at}");
    }
    for len in 0..good.len() {
        assert!(Tree::open(&good[..len], &key()).is_err(), "cut to {len}");
    }
}

#[test]
fn a_root_that_is_in_itself_is_found_out() {
    let mut bad = good();
    // The first name leads to the root, and the root says that this is its name: the first dirent's inode, behind the
    // inodes, and the root's own field, at 56 of its record.
    let nodes = Tree::open(bad.as_slice(), &key()).unwrap().node_count() as usize;
    let dirent = HEADER_BYTES + nodes * NODE_BYTES;
    bad[dirent..dirent + 4].fill(0);
    bad[HEADER_BYTES + 56..HEADER_BYTES + 60].fill(0);
    assert!(matches!(
        read_all(&with_right_checksum(bad)),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn layers_with_more_bytes_than_can_be_counted_are_refused() {
    let layers = ["a", "b"].map(|path| {
        let mut file = Entry::new(path, Kind::File);
        file.size = 1;
        let mut index = layer_bytes(&[file]);
        // The size in the only record, which no rule but the checksum guards where it is kept.
        let size = index::HEADER_BYTES + 32..index::HEADER_BYTES + 40;
        index[size].copy_from_slice(&(1u64 << 63).to_le_bytes());
        Index::open(with_right_checksum(index)).unwrap()
    });
    let merged = merge(&[&layers[0], &layers[1]], &key(), Whiteouts::Apply);
    assert!(matches!(merged, Err(Error::Malformed { .. })));
    assert!(merge(&[&layers[0]], &key(), Whiteouts::Apply).is_ok());
}

#[test]
fn a_tree_of_something_else_is_refused() {
    let error = Tree::open(good(), &Digest::of(b"other")).unwrap_err();
    assert!(error.to_string().contains("another image"), "{error}");
}

#[test]
fn cuts_with_a_right_checksum_are_noticed() {
    let good = good();
    for len in 0..good.len() {
        let bad = with_right_checksum(good[..len].to_vec());
        assert!(
            matches!(read_all(&bad), Err(Error::Malformed { .. })),
            "cut to {len}"
        );
    }
}

#[test]
fn changes_with_a_right_checksum_never_lead_astray() {
    let good = good();
    for at in 0..good.len() {
        for change in [0x01, 0x10, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= change;
            // Whatever the change, a walk meets no more names than the tree has dirents.
            match read_all(&with_right_checksum(bad)) {
                Ok(names) => assert!(names <= 7, "byte {at}"),
                Err(error) => assert_eq!(error.errno(), libc::EIO, "byte {at}: {error}"),
            }
        }
    }
}

proptest! {
    #[test]
    fn many_changes_with_a_right_checksum_never_lead_astray(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)
    ) {
        let mut bad = good();
        for (at, byte) in changes {
            // The header is left alone: most changes to it are found at once.
            let at = HEADER_BYTES + at.index(bad.len() - HEADER_BYTES);
            bad[at] = byte;
        }
        if let Err(error) = read_all(&with_right_checksum(bad)) {
            prop_assert_eq!(error.errno(), libc::EIO);
        }
    }
}
