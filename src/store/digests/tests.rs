//! The table against a model, after damage, and what is known of layers over restarts.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::store::Store;
use crate::store::test_layer::{add_layer, content};

/// A digest whose first bytes, which are the place in the table, are chosen.
fn digest(place: u16, rest: u8) -> Digest {
    let mut bytes = [rest; 32];
    bytes[..2].copy_from_slice(&place.to_be_bytes());
    Digest::from_bytes(bytes)
}

fn table(slots: u64) -> (tempfile::TempDir, Table) {
    let dir = tempfile::tempdir().unwrap();
    let table = Table::create(&dir.path().join("table"), slots).unwrap();
    (dir, table)
}

fn found(table: &Table, digest: &Digest) -> Vec<(u32, u32)> {
    let mut found: Vec<_> = table
        .find(*digest)
        .map(|entry| (entry.layer, entry.chunk))
        .collect();
    found.sort_unstable();
    found
}

proptest! {
    #[test]
    fn nothing_is_found_that_was_not_put_and_the_first_chunk_of_each_layer_is(
        puts in prop::collection::vec((0..30_u16, 0..4_u8, 0..7_u32, 0..50_u32), 1..120),
        grow_at in 0..120_usize,
    ) {
        let (_dir, mut table) = table(SLOTS_MIN);
        let (_larger_dir, larger) = self::table(SLOTS_MIN * 2);
        let mut larger = Some(larger);
        let mut model: HashMap<Digest, HashMap<u32, u32>> = HashMap::new();
        for (number, &(place, rest, layer, chunk)) in puts.iter().enumerate() {
            if number == grow_at && let Some(larger) = larger.take() {
                larger.put_all(&table, |_| true);
                table = larger;
            }
            // Places far apart and close together.
            let digest = digest(place * 2000 + place % 3, rest);
            table.put(&digest, Entry { layer, chunk });
            let first = model.entry(digest).or_default().entry(layer).or_insert(chunk);
            *first = chunk.min(*first);
            prop_assert!(found(&table, &digest).iter().any(|&(l, _)| l == layer), "what was just put");
        }
        for (digest, layers) in &model {
            let found = found(&table, digest);
            for (layer, chunk) in &found {
                prop_assert!(puts.iter().any(|put| (put.2, put.3) == (*layer, *chunk)));
                prop_assert!(layers.contains_key(layer));
            }
            if layers.len() <= 4 {
                let mut all: Vec<_> = layers.iter().map(|(&layer, &chunk)| (layer, chunk)).collect();
                all.sort_unstable();
                prop_assert_eq!(found, all);
            } else {
                prop_assert_eq!(found.len(), 4);
            }
        }
        prop_assert!(found(&table, &digest(7, 9)).is_empty());
    }

    #[test]
    fn any_bytes_in_the_file_are_harmless(bytes in prop::collection::vec(any::<u8>(), 1..4096), at in 0..9000_u64) {
        let (dir, table) = table(SLOTS_MIN);
        let path = dir.path().join("table");
        let file = File::options().write(true).open(&path).unwrap();
        for repeat in 0..20 {
            file.write_all_at(&bytes, (at + repeat * 4096) % (100 << 10)).unwrap();
        }
        for place in 0..200 {
            prop_assert!(table.find(digest(place * 300, 0)).count() <= 4);
            table.put(&digest(place * 300, 0), Entry { layer: 1, chunk: 2 });
        }
        let (_larger_dir, larger) = self::table(SLOTS_MIN * 2);
        larger.put_all(&table, |entry| entry.layer != 1);
        drop(Table::open(&path));
    }
}

#[test]
fn a_table_that_is_full_still_finds_most() {
    let (_dir, table) = table(SLOTS_MIN);
    let digests: Vec<Digest> = (0..SLOTS_MIN as u32)
        .map(|n| Digest::of(&n.to_le_bytes()))
        .collect();
    let fitting = SLOTS_MIN as usize / 4 * 3;
    for (number, digest) in digests.iter().enumerate() {
        assert!(number >= fitting || !table.is_full(), "{number}");
        table.put(
            digest,
            Entry {
                layer: 0,
                chunk: number as u32,
            },
        );
        if number + 1 == fitting {
            let here = |(number, digest): (usize, &Digest)| found(&table, digest) == [(0, number as u32)];
            let lost = digests[..fitting]
                .iter()
                .enumerate()
                .filter(|at| !here(*at))
                .count();
            assert!(lost * 200 < fitting, "{lost}");
        }
    }
    assert!(table.is_full() && table.entries() <= SLOTS_MIN);
    let lost = digests
        .iter()
        .filter(|digest| found(&table, digest).is_empty())
        .count();
    assert!(lost * 10 < digests.len(), "{lost}");
}

#[test]
fn a_table_that_is_cut_short_has_nothing_where_it_was() {
    let (dir, table) = table(SLOTS_MIN);
    table.put(&digest(u16::MAX - 9, 1), Entry { layer: 1, chunk: 2 });
    let file = File::options()
        .write(true)
        .open(dir.path().join("table"))
        .unwrap();
    file.set_len(4096).unwrap();
    assert!(found(&table, &digest(u16::MAX - 9, 1)).is_empty());
    drop(table);
    assert!(Table::open(&dir.path().join("table")).is_none());
}

/// The layers that may have the content of chunk `number` of the test layer.
fn keys(store: &Store, number: u32, audience: Audience) -> Vec<Digest> {
    let look = store.digests().look();
    let claims = look
        .iter()
        .flat_map(|look| look.claims(Digest::of(&content(number)), audience));
    claims.map(|claim| claim.key).collect()
}

fn offer(store: &Store, layer: &Arc<Layer>, audience: Audience) {
    store.digests().offer(layer, audience);
    store.digests().settle();
}

#[test]
fn what_was_offered_is_known_over_a_restart_and_only_to_its_audience() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, yours) = (Audience::repository("mine"), Audience::repository("yours"));
    {
        let store = Store::open(dir.path()).unwrap();
        assert!(
            store.digests().look().is_none(),
            "nothing is known and nothing is looked up"
        );
        offer(&store, &add_layer(&store, b"private", 3, true), mine);
        offer(&store, &add_layer(&store, b"open", 2, true), Audience::everyone());
        store.close();
    }
    let store = Store::open(dir.path()).unwrap();
    let (private, open) = (Digest::of(b"private"), Digest::of(b"open"));
    assert_eq!(keys(&store, 1, mine), [private, open]);
    assert_eq!(keys(&store, 1, yours), [open]);
    assert_eq!(keys(&store, 1, Audience::everyone()), [open]);
    assert!(keys(&store, 2, yours).is_empty());
    // What turns out to be for everyone stays so, whoever has it next.
    let layer = store.layer(&private).unwrap().unwrap();
    offer(&store, &layer, Audience::everyone());
    offer(&store, &layer, mine);
    assert_eq!(keys(&store, 2, yours), [private]);
}

#[test]
fn a_layer_that_is_gone_is_not_named_again_until_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let everyone = Audience::everyone();
    offer(&store, &add_layer(&store, b"key", 2, true), everyone);
    let claim = |store: &Store| {
        let look = store.digests().look().unwrap();
        look.claims(Digest::of(&content(1)), everyone).next()
    };
    let known = claim(&store).unwrap();
    assert!(known.open_layer().is_none(), "nobody uses it");
    assert!(store.claimed(&known).is_some());
    std::fs::remove_dir_all(dir.path().join("layers").join(Digest::of(b"key").hex())).unwrap();
    assert!(store.claimed(&known).is_none());
    assert!(claim(&store).is_none());
    offer(&store, &add_layer(&store, b"key", 2, true), everyone);
    assert!(store.claimed(&claim(&store).unwrap()).is_some());
}

#[test]
fn lost_or_damaged_files_begin_anew_with_the_layers_that_are_opened() {
    for damage in ["table", "layers"] {
        for bytes in [None, Some(&b""[..]), Some(&[7; 5000][..])] {
            let dir = tempfile::tempdir().unwrap();
            let everyone = Audience::everyone();
            {
                let store = Store::open(dir.path()).unwrap();
                offer(&store, &add_layer(&store, b"one", 3, true), everyone);
                offer(&store, &add_layer(&store, b"two", 2, true), everyone);
            }
            let path = dir.path().join("digests").join(damage);
            match bytes {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let store = Store::open(dir.path()).unwrap();
            assert!(keys(&store, 1, everyone).is_empty(), "{damage}");
            let two = store.layer(&Digest::of(b"two")).unwrap().unwrap();
            offer(&store, &two, everyone);
            assert!(keys(&store, 1, everyone).contains(two.key()), "{damage}");
        }
    }
}

#[test]
fn the_table_grows_with_what_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layers = [b"a", b"b"].map(|key| add_layer(&store, key, 3, true));
    let everyone = Audience::everyone();
    layers.iter().for_each(|layer| offer(&store, layer, everyone));
    let look = store.digests().look().unwrap();
    for chunk in 0..SLOTS_MIN as u32 {
        let digest = Digest::of(&chunk.to_le_bytes());
        look.table.put(&digest, Entry { layer: 1, chunk });
    }
    assert_eq!(look.table.slots(), SLOTS_MIN);
    // Whoever looks meanwhile keeps nobody waiting.
    offer(&store, &add_layer(&store, b"c", 3, true), everyone);
    assert!(!store.digests().waiting.lock().is_adding, "it waits for a look");
    let three: Vec<Digest> = [&b"a"[..], b"b", b"c"].map(Digest::of).into();
    assert_eq!(keys(&store, 1, everyone), three);
    let known = look
        .claims(Digest::of(&content(1)), everyone)
        .map(|claim| claim.key);
    assert_eq!(known.collect::<Vec<_>>(), three[..2], "as it was");
    let slots = store.digests().look().unwrap().table.slots();
    assert_eq!(slots, SLOTS_MIN * 2);
}
