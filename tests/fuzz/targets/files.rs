//! Our own files: they come back from a disk, or from another machine, and whoever could write them could give them right
//! checksums. So those are put right here before each execution.

use std::fs::File;
use std::os::unix::fs::FileExt;

use registryfs::digest::Digest;
use registryfs::error::{Error, Result};
use registryfs::image::tree::{self, Tree, Whiteouts};
use registryfs::layer::estargz::writer::Variant;
use registryfs::layer::index::Index;
use registryfs::layer::soci::writer::Layout;
use registryfs::layer::zstd_chunked::writer::Version;
use registryfs::layer::{self, ChunkSink, exchange};
use registryfs::store::chunk_map::ChunkMap;

use crate::engine::{Shape, Target};
use crate::layers::{check_index, walk};
use crate::samples::{Layer, entries, estargz, gzip, plain, soci, tar_of, zstd, zstd_chunked};

/// Where the checksum is in indexes and trees; it covers everything behind itself.
const CRC_AT: usize = 12;
/// Records in one file that are read in one execution.
const RECORDS_MAX: usize = 100;
/// Size of the checksum at the end of a record.
const DIGEST_BYTES: usize = 32;
/// Where the bits of a chunk map begin. Of what is before, only the beginning is ever read.
const BITS_AT: usize = 4096;
const MAP_HEADER_BYTES: usize = 44;
/// What the chunk map is of.
const CHUNKS: u32 = 100;
const INDEX_ID: u32 = 7;

pub(crate) fn targets() -> Vec<Target> {
    let tar = tar_of(&entries());
    let layers = [
        estargz(Variant::Estargz, 600),
        zstd_chunked(Version::Storage1_50),
        soci(Layout::Gzip),
        plain(gzip(&tar, 6)),
        plain(zstd(&tar)),
        plain(tar),
    ];
    let indexes: Vec<Vec<u8>> = layers.iter().map(Layer::index).collect();
    vec![
        layer_index(indexes.clone(), layers.to_vec()),
        merged_tree(&indexes),
        index_file(&indexes),
        chunk_map(),
    ]
}

/// Puts the checksum of a tree or an index right.
pub(super) fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some((head, covered)) = bytes.split_at_mut_checked(CRC_AT + 4) {
        head[CRC_AT..].copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
    }
    bytes
}

fn layer_index(indexes: Vec<Vec<u8>>, layers: Vec<Layer>) -> Target {
    Target {
        name: "layer-index",
        seeds: indexes,
        words: &[b"RFSLAYER", b"\xff\xff\xff\xff\xff\xff\xff\xff", b"../", b"/"],
        run: Box::new(move |bytes| {
            let bytes = sealed(bytes);
            let mut shape = Shape::default();
            shape.result(Index::open(bytes.as_slice()), |shape, index| {
                let outcome = read_all(&index);
                shape.result(outcome, |shape, ()| shape.note("read"));
                let blob = &layers[bytes.len() % layers.len()].blob;
                decode_all(&index, blob, shape);
                let merged = tree::merge(&[&index], &Digest::of(b"key"), Whiteouts::Apply);
                shape.result(merged, |shape, merged| {
                    let tree = Tree::open(merged.bytes.as_slice(), &Digest::of(b"key")).unwrap();
                    shape.result(walk(&tree), Shape::count);
                });
                let taken = exchange::pack(&Digest::of(b"layer"), &bytes)
                    .and_then(|record| exchange::unpack(&mut record.as_slice()));
                shape.result(taken, |shape, taken| check_index(&taken.index, shape));
            });
            shape
        }),
    }
}

fn read_all(index: &Index<&[u8]>) -> Result<()> {
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| outcome = std::mem::replace(&mut outcome, Ok(())).and(result);
    for number in 0..index.entry_count() {
        let read = index.entry(number).and_then(|entry| {
            index.content_digest(&entry)?;
            index.xattrs(&entry).map(drop)
        });
        note(read);
    }
    for number in 0..index.chunk_count() {
        note(index.chunk(number).map(drop));
    }
    for number in 0..index.member_count() {
        let read = index.member(number).and_then(|member| {
            index.window(&member)?;
            index.check(&member)?;
            index.member_chunks(&member).map(drop)
        });
        note(read);
    }
    outcome
}

/// Takes everything.
struct Anything;

impl ChunkSink for Anything {
    fn piece(&mut self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn verified(&mut self, _: u32) -> Result<()> {
        Ok(())
    }
}

fn decode_all(index: &Index<&[u8]>, blob: &[u8], shape: &mut Shape) {
    for number in 0..index.member_count().min(20) {
        let decoded = index.member(number).and_then(|member| {
            let range = member.blob_range();
            let bytes = blob.get(range.start as usize..range.end as usize);
            let bytes = bytes.ok_or_else(|| Error::malformed("member", "beyond the blob"))?;
            layer::decoder(index, number)?.push(bytes, &mut Anything)
        });
        shape.result(decoded, Shape::note);
    }
}

fn merged_tree(indexes: &[Vec<u8>]) -> Target {
    let key = Digest::of(b"key");
    let opened: Vec<_> = indexes
        .iter()
        .map(|bytes| Index::open(bytes.as_slice()).unwrap())
        .collect();
    let merge = |layers: &[&Index<&[u8]>], whiteouts| tree::merge(layers, &key, whiteouts).unwrap().bytes;
    Target {
        name: "merged-tree",
        seeds: vec![
            merge(&[&opened[0]], Whiteouts::Apply),
            merge(&[&opened[3]], Whiteouts::Show),
            merge(&[&opened[5], &opened[0]], Whiteouts::Apply),
        ],
        words: &[b"RFSTREE\0", b"\xff\xff\xff\xff", b"\0\0\0\0"],
        run: Box::new(move |bytes| {
            let bytes = sealed(bytes);
            let mut shape = Shape::default();
            shape.result(Tree::open(bytes.as_slice(), &key), |shape, tree| {
                let dirents_max = bytes.len() as u64;
                for number in 0..tree.node_count() {
                    shape.result(tree.path_of(number), |shape, path| shape.count(path.len() as u64));
                    shape.result(tree.lookup(number, b"text"), |shape, found| {
                        shape.note(found.is_some());
                    });
                    let node = tree.node(number);
                    shape.result(node, |shape, node| {
                        shape.note(node.kind as u8);
                        shape.note((tree.link(&node).is_ok(), tree.xattrs(&node).is_ok()));
                    });
                }
                for path in ["d/text", "soft/through", "../hard", "e"] {
                    shape.result(tree.resolve(path.as_bytes(), true), |shape, _| shape.note(path));
                }
                shape.count(names(&tree, dirents_max));
            });
            shape
        }),
    }
}

/// How many names a walk from the root meets, passing over what is damaged.
fn names(tree: &Tree<&[u8]>, names_max: u64) -> u64 {
    let (mut names, mut open) = (0, Vec::from_iter(tree.node(tree::ROOT)));
    while let Some(dir) = open.pop() {
        for position in 0..dir.child_count {
            names += 1;
            assert!(names <= names_max, "a walk without an end");
            let child = tree.child_at(&dir, position);
            if let Ok(Some((_, child))) = child
                && let Ok(node) = tree.node(child)
                && node.is_dir()
            {
                open.push(node);
            }
            if child.is_err() {
                break;
            }
        }
    }
    names
}

fn index_file(indexes: &[Vec<u8>]) -> Target {
    let plain = indexes
        .iter()
        .filter_map(|index| exchange::pack(&Digest::of(b"layer"), index).ok());
    let mut seeds: Vec<Vec<u8>> = plain.collect();
    seeds.push(seeds.concat());
    Target {
        name: "index-file",
        seeds,
        words: &[
            b"RFSINDEX",
            b"\x28\xb5\x2f\xfd",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
        ],
        run: Box::new(|bytes| {
            let mut shape = Shape::default();
            let mut file = bytes.to_vec();
            if let Some(end) = bytes.len().checked_sub(DIGEST_BYTES) {
                let digest = Digest::of(&bytes[..end]);
                file[end..].copy_from_slice(digest.as_bytes());
            }
            for file in [bytes, &file] {
                let mut rest = file;
                for _ in 0..RECORDS_MAX {
                    let before = rest.len();
                    match exchange::unpack(&mut rest) {
                        Ok(taken) => {
                            assert!(rest.len() < before, "a record of nothing");
                            check_index(&taken.index, &mut shape);
                        }
                        Err(error) => {
                            shape.error(&error);
                            break;
                        }
                    }
                }
            }
            shape
        }),
    }
}

fn chunk_map() -> Target {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map");
    let seeds = [0..0, 0..10, 60..70, 0..CHUNKS].map(|marked| {
        let _ = std::fs::remove_file(&path);
        let map = ChunkMap::open(&path, CHUNKS, INDEX_ID).unwrap();
        marked.for_each(|chunk| map.mark(chunk).unwrap());
        drop(map);
        let map = std::fs::read(&path).unwrap();
        [&map[..MAP_HEADER_BYTES], &map[BITS_AT..]].concat()
    });
    Target {
        name: "chunk-map",
        seeds: seeds.to_vec(),
        words: &[b"RFSCHMAP", b"\x01\0\0\0"],
        run: Box::new(move |bytes| {
            let mut shape = Shape::default();
            let (header, bits) = bytes.split_at(bytes.len().min(MAP_HEADER_BYTES));
            let mut map = header.to_vec();
            map.resize(BITS_AT, 0);
            map.extend_from_slice(bits);
            let file = File::options().write(true).open(dir.path().join("map")).unwrap();
            file.set_len(0).and_then(|()| file.write_all_at(&map, 0)).unwrap();
            shape.result(ChunkMap::open(&path, CHUNKS, INDEX_ID), |shape, map| {
                let is_present = |chunk: &u32| map.is_present(*chunk);
                let present = (0..CHUNKS).filter(is_present).count() as u32;
                assert_eq!(map.count(), present, "a count of others than its chunks");
                shape.count(u64::from(present));
                for chunk in [0, 63, CHUNKS - 1] {
                    shape.note(map.is_suspect(chunk));
                    map.mark(chunk).unwrap();
                    assert!(map.is_present(chunk));
                    assert!(map.clear(chunk).unwrap() && !map.is_present(chunk));
                }
            });
            shape
        }),
    }
}
