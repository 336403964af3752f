//! Any layer that the writer writes comes back as it was, and no change to its bytes goes unnoticed.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::writer::{Landmark, Options, Variant, write_layer};
use super::super::*;
use super::{blob_with_toc, content, decode_blob, index_blob, index_written, toc_json};
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::index::Index;

prop_compose! {
    fn any_entry()(
        path in "[a-e/.\u{e4}]{1,12}",
        kind in (1..=7u8).prop_map(|byte| Kind::from_byte(byte).unwrap()),
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..3000),
            (any::<u8>(), 0..20_000usize).prop_map(|(byte, len)| vec![byte; len]),
        ],
        link in "[a-e/.]{1,12}",
        mode in 0..=0o7777u32,
        (uid, gid) in (any::<u32>(), any::<u32>()),
        (seconds, nanos) in (-1_000_000_000..4_000_000_000i64, 0..1_000_000_000u32),
        rdev in (0..5000u32, 0..5000u32),
        xattrs in prop::collection::btree_map("user\\.[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..20), 0..3),
    ) -> (Entry, Vec<u8>) {
        let is_link = matches!(kind, Kind::Symlink | Kind::Hardlink);
        let is_device = matches!(kind, Kind::Char | Kind::Block);
        let xattrs = xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
        let entry = Entry {
            mode,
            uid,
            gid,
            mtime: Time { seconds, nanos },
            link: if is_link { link.into_bytes() } else { Vec::new() },
            rdev: if is_device { rdev } else { (0, 0) },
            xattrs,
            ..Entry::new(path, kind)
        };
        (entry, if kind == Kind::File { payload } else { Vec::new() })
    }
}

prop_compose! {
    fn any_options()(
        chunk_bytes in prop_oneof![1..400u64, 4096..8192u64, Just(4 << 20)],
        min_chunk_bytes in prop_oneof![Just(0), 1..5000u64],
        level in 0..=9u32,
        landmark in prop_oneof![
            Just(Landmark::None),
            (0..6usize).prop_map(Landmark::Prefetch),
            Just(Landmark::NoPrefetch),
        ],
        variant in prop_oneof![Just(Variant::Estargz), Just(Variant::Legacy), Just(Variant::ExternalToc)],
    ) -> Options {
        // Nothing vouches for the chunks of a file of stargz that has several.
        let chunk_bytes = if variant == Variant::Legacy { 4 << 20 } else { chunk_bytes };
        Options { chunk_bytes, min_chunk_bytes, level, landmark, variant }
    }
}

fn any_layer() -> impl Strategy<Value = Vec<(Entry, Vec<u8>)>> {
    prop::collection::vec(any_entry(), 0..8)
}

/// The chunks that a TOC made by anyone describes, with a manifest that promises it, are either refused or have the bytes
/// that it promises.
fn decode_if_valid(blob: &[u8]) {
    let Ok(footer::Tail::Footer(footer)) = footer::parse(blob, blob.len() as u64) else {
        return;
    };
    let toc = &blob[footer.toc_start as usize..footer.toc_end as usize];
    let Ok(json) = unpack_toc([toc, &[]], Box::new(Vec::new())) else {
        return;
    };
    let Ok((bytes, _)) = index_blob(blob, Some(Digest::of(&json))) else {
        return;
    };
    let index = Index::open(bytes.as_slice()).unwrap();
    for (number, content) in decode_blob(&index, blob, 1000).0 {
        assert_eq!(Some(Digest::of(&content)), index.chunk(number).unwrap().digest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_layer_comes_back_as_it_was(layer in any_layer(), options in any_options(), piece in 1..5000usize) {
        let (blob, finished) = write_layer(&layer, options).unwrap();
        prop_assert_eq!(&write_layer(&layer, options).unwrap().0, &blob);
        let bytes = index_written(&blob, &finished).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        prop_assert_eq!(index.entry_count() as usize, layer.len());
        let (chunks, failed) = decode_blob(&index, &blob, piece);
        prop_assert_eq!((failed, chunks.len()), (0, index.chunk_count() as usize));
        for (number, (entry, payload)) in layer.iter().enumerate() {
            let found = index.entry(number as u32).unwrap();
            let clean = clean_path(&entry.path);
            prop_assert_eq!((found.path, found.clamped), (clean.path.as_slice(), clean.clamped));
            let attributes = (found.kind, found.mode, found.uid, found.gid, found.rdev);
            prop_assert_eq!(attributes, (entry.kind, entry.mode, entry.uid, entry.gid, entry.rdev));
            let seconds = entry.mtime.seconds + i64::from(entry.mtime.nanos >= 500_000_000);
            prop_assert_eq!(found.mtime, Time { seconds, nanos: 0 });
            let link = match entry.kind {
                Kind::Hardlink => clean_path(&entry.link).path,
                _ => entry.link.clone(),
            };
            prop_assert_eq!(found.link, link.as_slice());
            let xattrs: Vec<_> = index.xattrs(&found).unwrap();
            let expected: Vec<_> = entry.xattrs.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
            prop_assert_eq!(xattrs, expected);
            prop_assert_eq!(found.size, payload.len() as u64);
            prop_assert_eq!(&content(&index, &chunks, number as u32), payload);
            let digest = (!payload.is_empty()).then(|| Digest::of(payload));
            prop_assert_eq!(index.content_digest(&found).unwrap(), digest);
        }
    }

    #[test]
    fn changed_bytes_never_yield_other_content(
        layer in any_layer(),
        options in any_options(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..4),
    ) {
        let (blob, finished) = write_layer(&layer, options).unwrap();
        let good = index_written(&blob, &finished).unwrap();
        let index = Index::open(good.as_slice()).unwrap();
        let expected: BTreeMap<_, _> = decode_blob(&index, &blob, usize::MAX).0;
        let mut bad = blob.clone();
        for (at, change) in changes {
            bad[at.index(blob.len())] ^= change;
        }
        if let Ok(bytes) = index_written(&bad, &finished) {
            prop_assert_eq!(bytes, good.clone());
        }
        for (number, content) in decode_blob(&index, &bad, 777).0 {
            prop_assert_eq!(Some(&content), expected.get(&number));
        }
        decode_if_valid(&bad);
    }

    #[test]
    fn a_changed_toc_is_refused_or_kept_to(
        layer in any_layer(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), "[0-9a-z\"{}:,\\[\\]]{0,3}"), 1..4),
    ) {
        let options = Options { chunk_bytes: 500, ..Options::default() };
        let (blob, finished) = write_layer(&layer, options).unwrap();
        let mut json = toc_json(&blob, &finished);
        for (at, text) in changes {
            let at = at.index(json.len());
            json.splice(at..=at, text.into_bytes());
        }
        decode_if_valid(&blob_with_toc(&blob[..finished.toc_offset as usize], &json));
    }
}
