//! zTOCs that nobody should write.

use super::*;

/// What an index makes of a spoiled draft.
fn refused(spoil: impl FnOnce(&mut Draft)) -> Error {
    let (blob, mut draft) = sample();
    spoil(&mut draft);
    index(&blob, &draft.encode()).unwrap_err()
}

/// Where checkpoint `number` stands.
fn checkpoint(number: usize) -> usize {
    12 + number * (17 + (32 << 10))
}

fn set(draft: &mut Draft, at: usize, bytes: &[u8]) {
    draft.checkpoints[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn a_ztoc_that_contradicts_itself_or_its_layer_is_refused() {
    type Spoil = fn(&mut Draft);
    let cases: [(&str, Spoil); 24] = [
        ("of another layer", |d| d.blob_bytes += 1),
        ("a negative size", |d| d.blob_bytes = -1),
        ("a negative tar", |d| d.tar_bytes = -1),
        ("a tar shorter than its files", |d| d.tar_bytes = 100_000),
        ("a span too few", |d| d.span_id_max -= 1),
        ("spans beyond count", |d| d.span_id_max = i32::MAX),
        ("no spans", |d| d.span_id_max = -1),
        ("a digest too few", |d| drop(d.digests.pop())),
        ("a digest too many", |d| d.digests.push(d.digests[0].clone())),
        ("no digest", |d| d.digests[1] = "sha256:00".into()),
        ("checkpoints cut short", |d| {
            d.checkpoints.truncate(d.checkpoints.len() - 1);
        }),
        ("no checkpoints", |d| d.checkpoints.clear()),
        ("a count too large", |d| set(d, 0, &[255, 255, 255, 127])),
        ("a negative count", |d| set(d, 0, &[255; 4])),
        ("the tar starts late", |d| set(d, checkpoint(0) + 8, &[1])),
        ("a checkpoint in front of the one before", |d| {
            set(d, checkpoint(2), &[11, 0, 0, 0]);
        }),
        ("a checkpoint beyond the blob", |d| {
            set(d, checkpoint(2) + 4, &[1]);
        }),
        ("a negative checkpoint", |d| set(d, checkpoint(2), &[255; 8])),
        ("a checkpoint before the blob", |d| {
            set(d, checkpoint(0), &[0; 16]);
            set(d, checkpoint(0) + 16, &[1]);
        }),
        ("a tar that goes back", |d| set(d, checkpoint(3) + 8, &[0; 8])),
        ("eight bits", |d| set(d, checkpoint(1) + 16, &[8])),
        ("content over content", |d| {
            d.entries[8].offset = d.entries[2].offset + 512;
        }),
        ("content in a header", |d| d.entries[2].offset = 100),
        ("content beyond all", |d| d.entries[11].size = i64::MAX),
    ];
    for (name, spoil) in cases {
        let error = refused(spoil);
        assert!(matches!(error, Error::Malformed { .. }), "{name}: {error}");
    }
}

#[test]
fn an_entry_that_tar_cannot_have_is_refused() {
    type Spoil = fn(&mut Draft);
    let cases: [(&str, Spoil); 12] = [
        ("a type", |d| d.entries[2].kind = "chunk"),
        ("a negative offset", |d| d.entries[2].offset = -512),
        ("a negative size", |d| d.entries[2].size = -1),
        ("a time", |d| d.entries[2].mtime = "yesterday".into()),
        ("a device", |d| d.entries[6].devices.0 = 1 << 32),
        ("a negative device", |d| d.entries[6].devices.1 = -1),
        ("a NUL", |d| d.entries[2].entry.path = b"a\0b".to_vec()),
        ("a long name", |d| d.entries[2].entry.path = vec![b'x'; 256]),
        ("a link to nothing", |d| d.entries[4].entry.link.clear()),
        ("two attributes of one name", |d| {
            let record = d.entries[1].records[1].clone();
            d.entries[1].records.push(record);
        }),
        ("an attribute's name", |d| {
            d.entries[1].records[1].0 = [b"SCHILY.xattr.", &[b'x'; 256][..]].concat();
        }),
        ("more records than tar can have", |d| {
            let record = (b"comment".to_vec(), Vec::new());
            d.entries[1].records = vec![record; 70_000];
        }),
    ];
    for (name, spoil) in cases {
        let error = refused(spoil);
        assert!(matches!(error, Error::Malformed { .. }), "{name}: {error}");
    }
}

#[test]
fn what_another_builder_may_rightly_write_is_not_supported_rather_than_broken() {
    type Spoil = fn(&mut Draft);
    let cases: [(&str, Spoil); 4] = [
        ("1.0", |d| d.version = b"1.0".to_vec()),
        ("algorithm 3", |d| d.algorithm = 3),
        ("unpacks to more", |d| {
            d.tar_bytes = 3 << 30;
        }),
        ("sparse", |d| {
            d.entries[2]
                .records
                .push((b"GNU.sparse.major".to_vec(), b"1".to_vec()));
        }),
    ];
    for (why, spoil) in cases {
        let error = refused(spoil);
        assert!(matches!(error, Error::Unsupported { .. }), "{why}: {error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
}

#[test]
fn a_ztoc_beyond_the_cap_is_not_asked_for() {
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip", b"");
    let mut ztoc = descriptor("application/octet-stream", b"");
    ztoc.size = ZTOC_BYTES_MAX + 1;
    assert!(matches!(
        indexer(&layer, Some(&ztoc), Arc::new(InMemory)),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn what_was_not_asked_for_is_refused() {
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip", b"layer");
    let ztoc = descriptor("application/octet-stream", b"four");
    let mut indexer = indexer(&layer, Some(&ztoc), Arc::new(InMemory)).unwrap();
    assert!(indexer.step(Some(b"four")).is_err(), "before it was asked for");
    indexer.step(None).unwrap();
    assert!(indexer.step(Some(b"three")).is_err(), "another length");
}

#[test]
fn parts_that_are_used_again_and_again_are_refused() {
    // As a vector of many entries that all lead to one table would: a small file that describes a huge layer.
    let (blob, draft) = sample();
    let good = draft.encode();
    let buffer = Buffer::new(&good);
    let metadata = buffer
        .root()
        .unwrap()
        .table(4)
        .unwrap()
        .unwrap()
        .vector(0)
        .unwrap();
    let mut reads = 0;
    let refused = loop {
        match metadata.table(0).and_then(|table| table.bytes(0)) {
            Ok(_) => reads += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Malformed { .. }), "{refused}");
    assert!(reads < good.len(), "{reads} reads of {} bytes", good.len());
    assert!(index(&blob, &good).is_ok());
}

#[test]
fn ztocs_without_their_parts_are_refused() {
    for bytes in [&b""[..], &[0; 4], &[0; 64], &[4, 0, 0, 0], &[255; 64], b"{}"] {
        assert!(index(b"layer", bytes).is_err(), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn any_damage_is_survived(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        keep in any::<prop::sample::Index>(),
    ) {
        let (blob, mut draft) = sample();
        // Windows are most of a zTOC, and nothing in them can be wrong.
        draft.checkpoints.truncate(checkpoint(1));
        draft.checkpoints[0] = 1;
        draft.span_id_max = 0;
        draft.digests.truncate(1);
        let good = draft.encode();
        prop_assert!(index(&blob, &good).is_ok());
        let mut bytes = good.clone();
        for (at, byte) in damage {
            let at = at.index(good.len());
            bytes[at] = byte;
        }
        let _ = index(&blob, &bytes);
        let _ = index(&blob, &good[..keep.index(good.len())]);
    }
}
