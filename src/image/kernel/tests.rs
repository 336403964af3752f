//! Kernel images in the store: written once, and anew where they are not what they should be.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::*;
use crate::image::tree::tests::layer_bytes;
use crate::image::tree::{Whiteouts, merge};
use crate::layer::entry::{Entry, Kind};

struct World {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    layers: Vec<Arc<Layer>>,
    tree: Tree<Mapped>,
}

fn key() -> Digest {
    Digest::of(b"rootfs")
}

fn file(path: &str, size: u64) -> Entry {
    Entry {
        size,
        ..Entry::new(path, Kind::File)
    }
}

impl World {
    fn new(entries: &[Entry]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let layer = store
            .add_layer(&Digest::of(b"layer"), &layer_bytes(entries))
            .unwrap();
        let merged = merge(&[layer.index()], &key(), Whiteouts::Apply).unwrap();
        let tree = Tree::open(store.put_tree(&key(), &merged.bytes).unwrap(), &key()).unwrap();
        let layers = vec![layer];
        Self {
            dir,
            store,
            layers,
            tree,
        }
    }

    fn image(&self) -> Result<File> {
        open_or_write(&self.store, "image", &self.tree, &key(), &self.layers)
    }

    fn path(&self) -> PathBuf {
        self.dir
            .path()
            .join("trees")
            .join(format!("{}.erofs", key().hex()))
    }

    /// The image from its beginning to its end, opened by path: who opens it may have read it.
    fn bytes(&self) -> Vec<u8> {
        self.image().unwrap();
        fs::read(self.path()).unwrap()
    }

    fn left_aside(&self) -> usize {
        fs::read_dir(self.dir.path().join("tmp")).unwrap().count()
    }
}

#[test]
fn an_image_is_written_once() {
    let world = World::new(&[file("f", 5000)]);
    let first = world.image().unwrap().metadata().unwrap().ino();
    assert_eq!(world.image().unwrap().metadata().unwrap().ino(), first);
    assert_eq!(fs::metadata(world.path()).unwrap().ino(), first);
    assert_eq!(world.left_aside(), 0);
}

#[test]
fn a_damaged_image_is_written_anew_and_who_has_it_open_keeps_it() {
    let world = World::new(&[file("f", 5000)]);
    let good = world.bytes();
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes[5000] ^= 1,
        |bytes| bytes.truncate(4096),
        Vec::clear,
        |bytes| bytes.extend_from_slice(&[0; 4096]),
    ];
    for damage in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        fs::write(world.path(), &bad).unwrap();
        let mut held = File::open(world.path()).unwrap();
        assert!(world.bytes() == good);
        let mut still = Vec::new();
        held.read_to_end(&mut still).unwrap();
        assert!(still == bad, "a mounted image does not change");
    }
}

/// What has a new index has its files at other places.
#[test]
fn an_image_of_another_index_is_written_anew() {
    let old = World::new(&[file("f", 5000)]);
    let new = World::new(&[file("e", 5000), file("f", 5000)]);
    old.image().unwrap();
    fs::copy(old.path(), new.path()).unwrap();
    let written = new.bytes();
    assert!(written != old.bytes());
    assert!(written == new.bytes());
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let mut refused = Entry::new("f", Kind::Dir);
    refused.xattrs = vec![(b"user.big".to_vec(), vec![0; 1 << 16])];
    let world = World::new(&[refused]);
    assert!(matches!(world.image(), Err(Error::Unsupported { .. })));
    assert_eq!((world.left_aside(), world.path().exists()), (0, false));
    let world = World::new(&[file("f", 1)]);
    fs::remove_dir(world.dir.path().join("tmp")).unwrap();
    assert!(matches!(world.image(), Err(Error::Io { .. })));
}
