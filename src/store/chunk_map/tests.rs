//! Marks over crashes, stops and boots.

use super::*;

const BOOT: [u8; 16] = [1; 16];
const NEXT_BOOT: [u8; 16] = [2; 16];

fn open(dir: &tempfile::TempDir, boot: [u8; 16]) -> ChunkMap {
    ChunkMap::open_at_boot(&dir.path().join("map"), 130, 7, boot).unwrap()
}

#[test]
fn marks_survive_a_crash_of_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let map = open(&dir, BOOT);
    map.mark(0).unwrap();
    map.mark(129).unwrap();
    drop(map);
    let map = open(&dir, BOOT);
    assert!(map.is_present(0) && map.is_present(129) && !map.is_present(64));
    assert_eq!(map.count(), 2);
    assert!(!map.is_present(130), "no such chunk");
}

#[test]
fn after_an_unclean_reboot_marks_are_suspects_until_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir, BOOT).mark(5).unwrap();
    let map = open(&dir, NEXT_BOOT);
    assert!(!map.is_present(5) && map.is_suspect(5));
    map.mark(5).unwrap();
    assert!(map.is_present(5) && !map.is_suspect(5));
    drop(map);
    assert!(open(&dir, NEXT_BOOT).is_present(5));
}

#[test]
fn after_a_clean_stop_marks_are_trusted_until_the_next_change() {
    let dir = tempfile::tempdir().unwrap();
    let map = open(&dir, BOOT);
    map.mark(5).unwrap();
    map.make_clean(|| Ok(())).unwrap();
    drop(map);
    let map = open(&dir, NEXT_BOOT);
    assert!(map.is_present(5));
    map.mark(6).unwrap();
    drop(map);
    let map = open(&dir, [3; 16]);
    assert!(map.is_suspect(5) && map.is_suspect(6) && !map.is_present(5));
}

#[test]
fn suspects_that_nobody_looked_at_outlive_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let map = open(&dir, BOOT);
    (5..8).for_each(|chunk| map.mark(chunk).unwrap());
    drop(map);
    let map = open(&dir, NEXT_BOOT);
    map.mark(5).unwrap();
    map.drop_suspect(6);
    map.make_clean(|| Ok(())).unwrap();
    assert_eq!(
        (map.count(), map.is_present(5), map.is_suspect(7)),
        (1, true, true)
    );
    drop(map);
    // The same boot goes on, but the file still speaks of the one before: 5 is looked at once more.
    let map = open(&dir, NEXT_BOOT);
    assert!(map.is_suspect(5) && map.is_suspect(7) && !map.is_suspect(6) && !map.is_present(6));
    map.mark(5).unwrap();
    map.mark(7).unwrap();
    drop(map);
    let map = open(&dir, NEXT_BOOT);
    assert!(map.is_present(5) && map.is_present(7));
}

#[test]
fn what_was_verified_in_this_boot_is_known_to_the_next_process_and_not_after_the_next_boot() {
    let dir = tempfile::tempdir().unwrap();
    let map = open(&dir, BOOT);
    assert!(map.is_verified(), "nothing is there that was not");
    map.mark(5).unwrap();
    map.make_clean(|| Ok(())).unwrap();
    drop(map);
    assert!(open(&dir, BOOT).is_verified());
    let map = open(&dir, NEXT_BOOT);
    assert!(map.is_present(5) && !map.is_verified(), "trusted, not looked at");
    map.mark(6).unwrap();
    drop(map);
    assert!(!open(&dir, NEXT_BOOT).is_verified());
    open(&dir, NEXT_BOOT).note_verified();
    assert!(open(&dir, NEXT_BOOT).is_verified());
    let map = open(&dir, [3; 16]);
    assert!(!map.is_verified());
    map.mark(5).unwrap();
    assert!(!map.is_verified(), "one suspect is left");
    map.drop_suspect(6);
    assert!(map.is_verified(), "each was looked at");
    drop(map);
    assert!(!open(&dir, [0; 16]).is_verified(), "in which boot was it?");
}

#[test]
fn what_was_lent_stays_so_until_the_boot_or_the_file_is_another() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!open(&dir, BOOT).is_lent());
    open(&dir, BOOT).note_lent().unwrap();
    assert!(open(&dir, BOOT).is_lent());
    assert!(open(&dir, [0; 16]).is_lent(), "it may be the same boot");
    assert!(!open(&dir, NEXT_BOOT).is_lent());
    open(&dir, BOOT).forget_lent();
    assert!(!open(&dir, BOOT).is_lent());
    assert!(open(&dir, [0; 16]).note_lent().is_err());
}

#[test]
fn boots_without_an_id_are_not_the_same() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir, [0; 16]).mark(5).unwrap();
    assert!(open(&dir, [0; 16]).is_suspect(5));
}

#[test]
fn nothing_is_clean_whose_data_could_not_be_synced() {
    let dir = tempfile::tempdir().unwrap();
    let map = open(&dir, BOOT);
    map.mark(5).unwrap();
    let refused = Error::posix("sync", libc::EIO);
    assert_eq!(map.make_clean(|| Err(refused.clone())), Err(refused));
    drop(map);
    assert!(open(&dir, NEXT_BOOT).is_suspect(5));
}

#[test]
fn marks_of_no_chunk_are_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(&dir, BOOT));
    let path = dir.path().join("map");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = 0xff;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(open(&dir, BOOT).count(), 0);
    // Nobody would ever look at such suspects, and the map would never be clean again.
    std::fs::write(&path, &bytes).unwrap();
    let map = open(&dir, NEXT_BOOT);
    map.mark(1).unwrap();
    map.make_clean(|| Ok(())).unwrap();
    drop(map);
    assert!(open(&dir, [3; 16]).is_present(1));
}

#[test]
fn a_map_of_another_index_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir, BOOT).mark(5).unwrap();
    let path = dir.path().join("map");
    let other = ChunkMap::open_at_boot(&path, 130, 8, BOOT).unwrap();
    assert!(!other.is_present(5) && !other.is_suspect(5));
    drop(other);
    std::fs::write(&path, b"rubbish").unwrap();
    assert_eq!(open(&dir, BOOT).count(), 0);
}
