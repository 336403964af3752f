//! Any layer that a writer of any version writes comes back as it was, without the bytes of its holes.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::writer::{Options, Version, write_layer};
use super::{content, decode, index, toc_of, with_toc};
use crate::digest::Digest;
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::index::Index;
use crate::layer::spool::InMemory;

/// Payloads with runs of zeros around the length that makes a hole.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..3000),
        (0..4000usize).prop_map(|len| vec![0; len]),
        (1000..1030usize).prop_map(|len| vec![0; len]),
    ];
    prop::collection::vec(part, 0..5).prop_map(|parts| parts.concat())
}

prop_compose! {
    fn any_entry()(
        path in "[a-e/.\u{e4}]{1,12}",
        kind in (1..=7u8).prop_map(|byte| Kind::from_byte(byte).unwrap()),
        payload in any_payload(),
        link in "[a-e/.]{1,12}",
        mode in 0..=0o7777u32,
        (uid, gid) in (any::<u32>(), any::<u32>()),
        (seconds, nanos) in (-1_000_000_000..4_000_000_000i64, 0..1_000_000_000u32),
        xattrs in prop::collection::btree_map("user\\.[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..20), 0..3),
    ) -> (Entry, Vec<u8>) {
        let is_link = matches!(kind, Kind::Symlink | Kind::Hardlink);
        let xattrs = xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
        let entry = Entry {
            mode,
            uid,
            gid,
            mtime: Time { seconds, nanos },
            link: if is_link { link.into_bytes() } else { Vec::new() },
            xattrs,
            ..Entry::new(path, kind)
        };
        (entry, if kind == Kind::File { payload } else { Vec::new() })
    }
}

prop_compose! {
    fn any_options()(
        version in prop::sample::select(Version::ALL.to_vec()),
        chunk_bytes in prop_oneof![Just(None), (300..2000usize).prop_map(Some), (4096..8192usize).prop_map(Some)],
        level in 1..=2i32,
        window_log in 17..=31u8,
    ) -> Options {
        Options { version, chunk_bytes, level, window_log }
    }
}

fn any_layer() -> impl Strategy<Value = Vec<(Entry, Vec<u8>)>> {
    prop::collection::vec(any_entry(), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_layer_comes_back_as_it_was(layer in any_layer(), options in any_options(), piece in 1..5000usize) {
        let written = write_layer(&layer, options).unwrap();
        prop_assert_eq!(&write_layer(&layer, options).unwrap(), &written);
        let bytes = index(&written).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        prop_assert_eq!(index.entry_count() as usize, layer.len());
        // What is in no member is never needed: not the headers, not the zeros.
        let mut blob = vec![0xff; written.blob.len()];
        for number in 0..index.member_count() {
            let range = index.member(number).unwrap().blob_range();
            let range = range.start as usize..range.end as usize;
            blob[range.clone()].copy_from_slice(&written.blob[range]);
        }
        let (chunks, failed) = decode(&index, &blob, piece);
        prop_assert_eq!((failed, chunks.len()), (0, index.chunk_count() as usize));
        for (number, (entry, payload)) in layer.iter().enumerate() {
            let found = index.entry(number as u32).unwrap();
            let path = clean_path(&entry.path).path;
            prop_assert_eq!(found.path, path.as_slice());
            let attributes = (found.kind, found.mode, found.uid, found.gid);
            prop_assert_eq!(attributes, (entry.kind, entry.mode, entry.uid, entry.gid));
            if options.version != Version::Stargz {
                prop_assert_eq!(found.mtime, entry.mtime);
            }
            let expected: Vec<_> = entry.xattrs.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
            prop_assert_eq!(index.xattrs(&found).unwrap(), expected);
            prop_assert!(&content(&index, &chunks, number as u32) == payload);
            let digest = (!payload.is_empty()).then(|| Digest::of(payload));
            prop_assert_eq!(index.content_digest(&found).unwrap(), digest);
            // A run that is long enough is nobody's chunk, unless it is all of the file.
            let covered: u64 = found.chunk_range().map(|n| index.chunk(n).unwrap().bytes).sum();
            let has_hole = options.version != Version::Stargz
                && payload.windows(1024).any(|run| run.iter().all(|&byte| byte == 0))
                && payload.iter().any(|&byte| byte != 0);
            prop_assert_eq!(covered < payload.len() as u64, has_hole);
        }
    }

    #[test]
    fn changed_bytes_never_yield_other_content(
        layer in any_layer(),
        options in any_options(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..4),
    ) {
        let written = write_layer(&layer, options).unwrap();
        let good = index(&written).unwrap();
        let opened = Index::open(good.as_slice()).unwrap();
        let (expected, _) = decode(&opened, &written.blob, usize::MAX);
        let mut bad = written.clone();
        for (at, change) in changes {
            bad.blob[at.index(written.blob.len())] ^= change;
        }
        if let Ok(bytes) = index(&bad) {
            prop_assert_eq!(bytes, good.clone());
        }
        for (number, content) in decode(&opened, &bad.blob, 777).0 {
            prop_assert_eq!(Some(&content), expected.get(&number));
        }
    }

    #[test]
    fn a_changed_toc_is_refused_or_kept_to(
        layer in any_layer(),
        options in any_options(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), "[0-9a-z\"{}:,\\[\\]]{0,3}"), 1..4),
    ) {
        let written = write_layer(&layer, options).unwrap();
        let mut json = toc_of(&written);
        for (at, text) in changes {
            let at = at.index(json.len());
            json.splice(at..=at, text.into_bytes());
        }
        let lying = with_toc(&written, &json, options.version);
        let mut indexer = crate::layer::indexer(&super::descriptor(&lying), None, Arc::new(InMemory)).unwrap();
        let _ = indexer.step(None).unwrap();
        let toc = &lying.blob[lying.toc.start as usize..lying.toc.end as usize];
        if let Ok(crate::layer::Step::Done(bytes)) = indexer.step(Some(toc)) {
            let index = Index::open(bytes.as_slice()).unwrap();
            for (number, content) in decode(&index, &lying.blob, 1000).0 {
                prop_assert_eq!(Some(Digest::of(&content)), index.chunk(number).unwrap().digest);
            }
        }
    }
}
