//! Which file of the tree a layer is.

use std::collections::BTreeMap;

use super::*;
use crate::digest::Digest;
use crate::fetch::{FetchOptions, Source};
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};
use crate::layer::{Descriptor, Format};
use crate::registry::reference::Repository;
use crate::registry::{Client, ClientOptions};
use crate::store::Store;

/// A layer's index: of a block, whose only chunk stands in this entry.
fn index(entry: usize) -> Vec<u8> {
    let mut builder = IndexBuilder::new(Coding::Stored);
    for number in 0..2 {
        let size = if number == entry { 100 } else { 0 };
        let file = Entry::new(number.to_string(), Kind::File);
        builder.entry(&Entry { size, ..file }).unwrap();
        if number == entry {
            let chunk = NewChunk {
                bytes: size,
                blob_offset: 512,
                inner_offset: 0,
                digest: Some(Digest::of(b"content")),
            };
            builder.chunk(chunk).unwrap();
        }
    }
    builder
        .finish(Summary::of(Format::Tar, 4096), 4096)
        .unwrap()
        .to_vec()
}

fn lookup(devices: &Devices, name: &str) -> Option<u64> {
    let caller = Caller {
        uid: 0,
        gid: 0,
        pid: 0,
    };
    match devices.lookup(caller, ROOT_INO, name.as_bytes()) {
        Answer::Now(Ok(Lookup::Found(entry))) => Some(entry.attr.ino),
        _ => None,
    }
}

/// An empty tree of devices, and where a layer's blob is to be had.
fn devices(store: &Arc<Store>) -> (Devices, Arc<Source>) {
    let client = Client::new(ClientOptions::default()).unwrap();
    let runtime = tokio::runtime::Handle::current();
    let fetcher = Fetcher::new(client, Arc::clone(store), runtime, FetchOptions::default());
    let source = Source {
        repository: Repository::new("h.io", "name").unwrap(),
        descriptor: Descriptor {
            media_type: String::new(),
            digest: Digest::of(b"blob"),
            size: 4096,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        },
        ztoc: None,
        place: None,
    };
    (Devices::new(fetcher, 1), Arc::new(source))
}

#[tokio::test]
async fn a_layer_that_is_read_in_two_ways_is_two_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (devices, source) = devices(&store);
    let layer = store.add_layer(&Digest::of(b"key"), &index(0)).unwrap();
    let at = DeviceAt { source, layer };
    let shown = [Access::Cached, Access::Direct].map(|access| devices.show(at.clone(), access, None));
    let inos = shown
        .each_ref()
        .map(|shown| lookup(&devices, shown.name()).unwrap());
    assert_ne!(inos[0], inos[1]);
    let opened = inos.map(|ino| devices.opened(ino));
    assert_eq!(opened, [Access::Cached, Access::Direct]);
}

/// The kernel keeps pages of a file that nobody has open. They are right as long as the places in it mean the same.
#[tokio::test]
async fn a_layer_that_is_read_anew_by_other_rules_is_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (devices, source) = devices(&store);
    let key = Digest::of(b"key");
    let mut known = Vec::new();
    for entry in [0, 1, 0] {
        let layer = store.add_layer(&key, &index(entry)).unwrap();
        let source = Arc::clone(&source);
        let shown = devices.show(DeviceAt { source, layer }, Access::Cached, None);
        // It is not forgotten when it is not shown any more.
        known.push(lookup(&devices, shown.name()).unwrap());
    }
    assert_ne!(known[0], known[1]);
    assert_eq!(known[0], known[2], "the kernel knows it still");
}
