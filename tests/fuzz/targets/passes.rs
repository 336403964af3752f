//! Whole layers on their one pass: gzip, zstd, and tar, whose headers get right checksums again.

use registryfs::layer::entry::{Entry, Kind, Time};
use registryfs::layer::index::{Coding, Index};
use registryfs::layer::scan::LayerScanner;
use registryfs::layer::{Checkpoint, Format};

use crate::engine::{Shape, Target};
use crate::layers::{Content, check_index, check_pass, decode, pieces};
use crate::samples::{File, entries, gzip, noise, tar_of, zstd};

const BLOCK_BYTES: usize = 512;
/// Members up to this size get right checksums: that is enough for the seeds.
const MEMBER_BYTES_MAX: usize = 64 << 10;

pub(crate) fn targets() -> Vec<Target> {
    let tar = tar_of(&entries());
    let long: Vec<File> = vec![sized("zeros", vec![0; 1_200_000]), sized("noise", noise(100))];
    let long = tar_of(&long);
    let parts =
        |tar: &[u8], bytes, compress: fn(&[u8]) -> Vec<u8>| tar.chunks(bytes).flat_map(compress).collect();
    vec![
        Target {
            name: "gzip",
            seeds: vec![
                gzip(&tar, 6),
                gzip(&tar, 0),
                parts(&tar, 3000, |part| gzip(part, 1)),
                [gzip(&tar, 9), vec![0; 100]].concat(),
                parts(&long, 1_150_000, |part| gzip(part, 1)),
                named(&tar),
            ],
            words: &[
                b"\x1f\x8b\x08\x00",
                b"\x1f\x8b\x08\x1c",
                b"\x00\x00\xff\xff",
                b"\x01\x00\x00\xff\xff",
                b"\x03\x00",
            ],
            run: Box::new(|blob| {
                let sealed = with_trailers(blob);
                let mut shape = check_pass(blob);
                if sealed != blob {
                    shape.part(&check_pass(&sealed));
                }
                shape
            }),
        },
        Target {
            name: "zstd",
            seeds: vec![
                zstd(&tar),
                parts(&tar, 3000, zstd),
                parts(&long, 1_150_000, zstd),
                [&b"\x50\x2a\x4d\x18\x03\0\0\0abc"[..], &zstd(&tar)].concat(),
            ],
            words: &[
                b"\x28\xb5\x2f\xfd",
                b"\x50\x2a\x4d\x18",
                b"\x5f\x2a\x4d\x18\x00\x00\x00\x00",
                b"\x01\x00\x00",
            ],
            run: Box::new(check_pass),
        },
        Target {
            name: "tar",
            seeds: tars(tar),
            words: &TAR_WORDS,
            run: Box::new(|tar| {
                let tar = sealed(tar);
                let mut shape = check_pass(&tar);
                with_checkpoints(&tar, &mut shape);
                shape
            }),
        },
    ]
}

const TAR_WORDS: [&[u8]; 32] = [
    b"ustar\x0000",
    b"ustar  \0",
    b"././@LongLink",
    b"././@PaxHeader",
    b"GNU.sparse.major=1\n",
    b"GNU.sparse.minor=0\n",
    b"22 GNU.sparse.major=1\n",
    b"22 GNU.sparse.minor=0\n",
    b"27 GNU.sparse.name=sparse-n\n",
    b"30 GNU.sparse.realsize=100000\n",
    b"26 GNU.sparse.map=0,5,9,1\n",
    b"24 GNU.sparse.numblocks=2\n",
    b"9 path=a\n",
    b"13 linkpath=b\n",
    b"12 size=512\n",
    b"20 mtime=1.123456789\n",
    b"26 SCHILY.xattr.user.x=yz\n",
    b"12 path=\0\xff\n",
    b"9 path=\n",
    b"13 uid=-1000\n",
    b"\x80\0\0\0\0\0\0\0\0\0\x02\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"00000001000\0",
    b"77777777777\0",
    b"x",
    b"g",
    b"L",
    b"K",
    b"S",
    b"1\n0\n5\n",
    b".wh..wh.aufs",
    b".wh..wh..opq",
];

fn sized(path: &str, payload: Vec<u8>) -> File {
    let mut entry = Entry::new(path, Kind::File);
    entry.size = payload.len() as u64;
    (entry, payload)
}

/// A gzip member whose header has everything.
fn named(tar: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let builder = flate2::GzBuilder::new()
        .filename("name")
        .comment("comment")
        .extra(vec![1; 20]);
    let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
    encoder.write_all(tar).unwrap();
    encoder.finish().unwrap()
}

/// The gzip members, as far as they are plain ones, with the checksums and lengths of what is in them.
fn with_trailers(blob: &[u8]) -> Vec<u8> {
    let mut blob = blob.to_vec();
    let mut start = 0;
    while blob.get(start..start + 4) == Some(b"\x1f\x8b\x08\x00") {
        let mut inflate = flate2::Decompress::new(false);
        let mut decoded = Vec::with_capacity(MEMBER_BYTES_MAX);
        let body = blob.get(start + 10..).unwrap_or_default();
        let status = inflate.decompress_vec(body, &mut decoded, flate2::FlushDecompress::Finish);
        let trailer = start + 10 + inflate.total_in() as usize;
        let (Ok(flate2::Status::StreamEnd), Some(bytes)) = (status, blob.get_mut(trailer..trailer + 8))
        else {
            break;
        };
        bytes[..4].copy_from_slice(&crc32fast::hash(&decoded).to_le_bytes());
        bytes[4..].copy_from_slice(&(decoded.len() as u32).to_le_bytes());
        start = trailer + 8;
    }
    blob
}

/// A header by hand, for what our writer does not write. The checksum comes later.
fn header(name: &[u8], typeflag: u8, size: usize, magic: &[u8; 8]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    block[..name.len()].copy_from_slice(name);
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[136..148].copy_from_slice(b"14500000000\0");
    block[156] = typeflag;
    block[257..265].copy_from_slice(magic);
    block
}

const USTAR: &[u8; 8] = b"ustar\x0000";
const GNU: &[u8; 8] = b"ustar  \0";

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

fn pax(records: &[&str], typeflag: u8) -> Vec<u8> {
    let mut text = String::new();
    for record in records {
        let digits = (record.len() + 4).to_string().len();
        text.push_str(&format!("{} {record}\n", record.len() + 2 + digits));
    }
    let size = text.len();
    [
        header(b"././@PaxHeader", typeflag, size, USTAR),
        padded(text.into_bytes()),
    ]
    .concat()
}

/// Headers of every dialect, and what stands in front of them.
fn tars(tar: Vec<u8>) -> Vec<Vec<u8>> {
    let long = b"a/long/name".repeat(20);
    let long_names = [
        header(b"././@LongLink", b'L', long.len(), GNU),
        padded(long.clone()),
        header(b"././@LongLink", b'K', long.len(), GNU),
        padded(long),
        header(b"short", b'2', 0, GNU),
    ];
    let records = [
        pax(&["path=global", "mtime=1.5"], b'g'),
        pax(
            &["path=p\u{e4}", "SCHILY.xattr.user.x=y", "mtime=-1.25", "uid=7"],
            b'x',
        ),
        file(b"short", &noise(600)),
    ];
    let mut timed = Entry::new("timed", Kind::Dir);
    timed.mtime = Time {
        seconds: -5,
        nanos: 123_000_000,
    };
    let old = [header(b"v7", b'\0', 3, &[0; 8]), padded(b"abc".to_vec())];
    let with_end = |parts: &[Vec<u8>]| [parts.concat(), vec![0; 2 * BLOCK_BYTES]].concat();
    let mut tars = vec![
        tar,
        with_end(&long_names),
        with_end(&records),
        tar_of(&[(timed, Vec::new())]),
        with_end(&old),
    ];
    tars.extend(sparse_files().iter().map(|parts| with_end(parts)));
    tars
}

fn file(name: &[u8], payload: &[u8]) -> Vec<u8> {
    [header(name, b'0', payload.len(), USTAR), padded(payload.to_vec())].concat()
}

/// Sparse files: of GNU, of PAX 1.0, of PAX 0.1.
fn sparse_files() -> [Vec<Vec<u8>>; 3] {
    let mut sparse = header(b"sparse", b'S', 1024, GNU);
    for (at, number) in [
        (386, b"00000001000\0"),
        (398, b"00000001000\0"),
        (410, b"00000010000\0"),
        (422, b"00000001000\0"),
        (483, b"00000100000\0"),
    ] {
        sparse[at..at + number.len()].copy_from_slice(number);
    }
    let newest = [
        "GNU.sparse.major=1",
        "GNU.sparse.minor=0",
        "GNU.sparse.name=s",
        "GNU.sparse.realsize=9000",
    ];
    let older = [
        "GNU.sparse.map=0,5,80,5",
        "GNU.sparse.size=100",
        "GNU.sparse.name=old",
    ];
    [
        vec![sparse, vec![7; 1024], file(b"behind", b"it")],
        vec![
            pax(&newest, b'x'),
            header(b"GNUSparseFile.0/s", b'0', 522, USTAR),
            padded(b"2\n0\n5\n8000\n5\n".to_vec()),
            vec![8; 512],
        ],
        vec![pax(&older, b'x'), file(b"old", b"0123456789")],
    ]
}

/// The tar with right checksums in all that looks like a header: everything else would be refused at once.
fn sealed(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    for block in tar.chunks_exact_mut(BLOCK_BYTES) {
        let is_header = block[257..262] == *b"ustar" || block[136..148] == *b"14500000000\0";
        if is_header {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    tar
}

/// Scans a tar with a place to start from in front of each piece, as if it were compressed.
fn with_checkpoints(tar: &[u8], shape: &mut Shape) {
    let [_, piece] = pieces(tar);
    let scan = || {
        let mut scanner = LayerScanner::new(Format::Gzip);
        let mut content = Content::default();
        for (number, bytes) in tar.chunks(piece).enumerate() {
            scanner.checkpoint(Checkpoint {
                blob_start: (number * piece) as u64,
                coding: Coding::Stored,
                bits: 0,
                window: Vec::new(),
            })?;
            scanner.push(bytes, &mut content)?;
        }
        Ok((scanner.finish(tar.len() as u64)?, content))
    };
    shape.result(scan(), |shape, (scanned, content)| {
        check_index(&scanned.index, shape);
        let index = Index::open(scanned.index.as_slice()).unwrap();
        content.check(&index);
        decode(&index, tar, shape);
    });
}
