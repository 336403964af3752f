//! Ranges of devices against a model of their bytes, where everything is in the store and where not.

use proptest::prelude::*;

use super::*;
use crate::digest::Digest;
use crate::fetch::FetchOptions;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};
use crate::layer::{Descriptor, Format};
use crate::registry::reference::Repository;
use crate::registry::{Client, ClientOptions};
use crate::store::Store;

/// A piece of a file: so many bytes, in a chunk or in a hole.
type Piece = (u64, bool);

/// A layer of such files, the bytes of its device, and the chunk that has each of them.
struct World {
    _dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    fetcher: Arc<Fetcher>,
    at: DeviceAt,
    bytes: Vec<u8>,
    owners: Vec<Option<u32>>,
}

fn world(files: &[Vec<Piece>]) -> World {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let (mut bytes, mut owners, mut blob_offset, mut chunks) = (Vec::new(), Vec::new(), 0, 0);
    for (number, pieces) in files.iter().enumerate() {
        let size = pieces.iter().map(|(len, _)| len).sum();
        let entry = Entry::new(format!("dir/file{number}"), Kind::File);
        builder.entry(&Entry { size, ..entry }).unwrap();
        for &(len, is_chunk) in pieces {
            let start = bytes.len();
            if is_chunk {
                bytes.extend((0..len).map(|at| (at % 250) as u8 + 1 + (chunks % 5) as u8));
                owners.resize(bytes.len(), Some(chunks));
                let digest = Some(Digest::of(&bytes[start..]));
                builder
                    .chunk(NewChunk {
                        bytes: len,
                        blob_offset,
                        inner_offset: 0,
                        digest,
                    })
                    .unwrap();
                (blob_offset, chunks) = (blob_offset + len, chunks + 1);
            } else {
                builder.hole(len).unwrap();
                bytes.resize(start + len as usize, 0);
                owners.resize(bytes.len(), None);
            }
        }
        bytes.resize(bytes.len().next_multiple_of(DATA_ALIGN_BYTES as usize), 0);
        owners.resize(bytes.len(), None);
    }
    bytes.resize(bytes.len().max(DATA_ALIGN_BYTES as usize), 0);
    owners.resize(bytes.len(), None);
    let blob_bytes = blob_offset.max(1);
    let index = builder
        .finish(Summary::of(Format::Tar, blob_bytes), blob_bytes)
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layer = store.add_layer(&Digest::of(b"key"), &index).unwrap();
    let client = Client::new(ClientOptions {
        offline: true,
        ..ClientOptions::default()
    })
    .unwrap();
    let fetcher = Fetcher::new(client, store, runtime.handle().clone(), FetchOptions::default());
    let descriptor = Descriptor {
        media_type: String::new(),
        digest: Digest::of(b"blob"),
        size: blob_bytes,
        annotations: std::collections::BTreeMap::new(),
        urls: Vec::new(),
    };
    let repository = Repository::new("h.io", "name").unwrap();
    let source = Arc::new(Source {
        repository,
        descriptor,
        ztoc: None,
        place: None,
    });
    World {
        _dir: dir,
        runtime,
        fetcher,
        at: DeviceAt { source, layer },
        bytes,
        owners,
    }
}

impl World {
    fn keep(&self, number: u32) {
        let chunk = self.at.layer.index().chunk(number).unwrap();
        let start = chunk.data_offset as usize;
        let bytes = &self.bytes[start..start + chunk.bytes as usize];
        self.at
            .layer
            .keep(number..number + 1, chunk.data_offset, bytes)
            .unwrap();
        self.at.layer.note_progress();
    }

    fn keep_in_memory(&self, number: u32) {
        let chunk = self.at.layer.index().chunk(number).unwrap();
        let start = chunk.data_offset as usize;
        let bytes = self.bytes[start..start + chunk.bytes as usize].to_vec();
        let full = Error::posix("disk", libc::ENOSPC);
        self.fetcher
            .keep_in_memory(&self.at.layer, number, bytes.into(), &full);
    }

    fn read(&self, offset: usize, len: usize) -> Result<Vec<u8>> {
        self.runtime
            .block_on(self.fetcher.read_device(&self.at, offset as u64, len))
    }

    fn read_now(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        let _entered = self.runtime.enter();
        self.fetcher.read_device_now(&self.at, offset as u64, len)
    }
}

fn files() -> impl Strategy<Value = Vec<Vec<Piece>>> {
    let piece = (
        prop_oneof![1..20_u64, 4000..4200_u64, 9000..20_000_u64],
        any::<bool>(),
    );
    prop::collection::vec(prop::collection::vec(piece, 0..5), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_range_is_its_bytes_wherever_its_chunks_are_and_an_error_where_one_is_missing(
        files in files(),
        places in prop::collection::vec(0..4_u8, 40),
        ranges in prop::collection::vec((0..40_usize, 1..20_usize), 20),
    ) {
        let world = world(&files);
        let place = |chunk: u32| places[chunk as usize % places.len()];
        for number in 0..world.at.layer.index().chunk_count() {
            match place(number) {
                0 => {}
                1 => world.keep_in_memory(number),
                _ => world.keep(number),
            }
        }
        prop_assert_eq!(world.at.bytes(), world.bytes.len() as u64);
        for (block, blocks) in ranges {
            let (offset, len) = (block * 4096, blocks * 4096);
            let end = (offset + len).min(world.bytes.len()).max(offset.min(world.bytes.len()));
            let start = offset.min(end);
            let expected = &world.bytes[start..end];
            let touched: Vec<u8> = world.owners[start..end].iter().flatten().map(|&chunk| place(chunk)).collect();
            let now = world.read_now(offset, len);
            if touched.iter().any(|&place| place < 2) {
                prop_assert!(now.is_none(), "not all of it is in the store");
            } else if let Some(now) = now {
                prop_assert!(now == expected);
            }
            match world.read(offset, len) {
                Ok(bytes) => {
                    prop_assert!(!touched.contains(&0), "a chunk is nowhere");
                    prop_assert!(bytes == expected);
                }
                Err(error) => {
                    prop_assert!(touched.contains(&0), "{error}");
                    let owners = world.owners[start..end].iter().flatten();
                    let mut missing = owners.filter(|&&chunk| place(chunk) == 0);
                    let named = missing.any(|&chunk| {
                        let file = world.at.layer.index().chunk(chunk).unwrap().entry;
                        error.to_string().contains(&format!("\"dir/file{file}\""))
                    });
                    prop_assert!(named, "{error}: another file");
                }
            }
        }
    }
}

#[test]
fn a_complete_layer_is_one_read_and_counts_as_a_read() {
    let world = world(&[
        vec![(5000, true)],
        vec![],
        vec![(3, true), (8000, false), (5, true)],
    ]);
    (0..3).for_each(|number| world.keep(number));
    assert!(world.at.layer.is_complete());
    assert!(world.read_now(0, 1 << 20).unwrap() == world.bytes);
    assert!(world.read(4096, 4096).unwrap() == world.bytes[4096..8192]);
    let counters = world.fetcher.counters();
    assert_eq!((counters.reads, counters.misses), (2, 0));
}

#[test]
fn what_no_chunk_covers_is_zeros_without_asking_anybody() {
    let world = world(&[vec![(4096, true)], vec![(100_000, false)]]);
    assert_eq!(world.read_now(4096, 65536).unwrap(), vec![0; 65536]);
    assert_eq!(world.read(4096, 65536).unwrap(), vec![0; 65536]);
    assert_eq!(
        world.read(world.bytes.len(), 4096).unwrap(),
        Vec::<u8>::new(),
        "the end"
    );
    assert_eq!(
        world.read_now(usize::MAX, 4096).unwrap(),
        Vec::<u8>::new(),
        "far beyond it"
    );
    assert!(world.read(0, 4096).is_err());
    assert_eq!(world.fetcher.counters().misses, 1);
}
