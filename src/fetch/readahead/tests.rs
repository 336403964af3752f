//! The read-ahead against a simple reader: enough ahead of it, never twice, and not much more.

use proptest::prelude::*;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LAYER_BYTES: u64 = 1 << 30;

/// A read of a layer that is not compressed and has members of so many bytes.
fn read(start: u64, len: u64, member_bytes: u64) -> Read {
    let end = start + len;
    Read {
        data: start..end,
        blob: start / member_bytes * member_bytes..end.div_ceil(member_bytes) * member_bytes,
        is_at_start: false,
        file: 0,
        file_end: u64::MAX,
        missed: true,
    }
}

/// What a simple reader of everything in order is due to have ahead of it.
fn due_bytes(has_read: u64, from_start: bool) -> u64 {
    let earned = match from_start {
        true => (2 * has_read).min(12 * MIB),
        false => has_read.min(2 * MIB),
    };
    (has_read / 20)
        .min(AHEAD_BYTES_MAX)
        .max(earned)
        .max(WINDOW_BYTES_MIN)
}

#[test]
fn a_window_at_a_new_place_is_for_the_start_of_a_file() {
    let mut streams = Streams::new(LAYER_BYTES);
    let inside = read(10 * MIB, 4 * KIB, 64 * KIB);
    assert_eq!(streams.observe(&inside), None);
    let at_start = Read {
        is_at_start: true,
        ..read(20 * MIB, 4 * KIB, 64 * KIB)
    };
    let end = at_start.blob.end;
    let wish = streams.observe(&at_start).unwrap();
    assert_eq!(wish.blob, end..end + WINDOW_BYTES_MIN);
    assert_eq!((wish.next_bytes_max, wish.is_new_place), (0, true));
}

#[test]
fn hits_at_unknown_places_ask_for_nothing() {
    let hit = Read {
        missed: false,
        is_at_start: true,
        ..read(0, 4 * KIB, 4 * KIB)
    };
    assert_eq!(Streams::new(LAYER_BYTES).observe(&hit), None);
}

#[test]
fn what_was_not_asked_for_is_wished_again() {
    let mut streams = Streams::new(LAYER_BYTES);
    streams.observe(&read(0, MIB, 64 * KIB));
    let wish = streams.observe(&read(MIB, MIB, 64 * KIB)).unwrap();
    let again = streams.observe(&read(2 * MIB, MIB, 64 * KIB)).unwrap();
    assert!(again.blob.start <= wish.blob.end && again.blob.start >= 3 * MIB);
    streams.asked(again.blob.end);
    assert_eq!(streams.observe(&read(3 * MIB, 64 * KIB, 64 * KIB)), None);
}

#[test]
fn reading_one_page_again_and_again_earns_nothing() {
    let mut streams = Streams::new(LAYER_BYTES);
    let mut asked = 0;
    for _ in 0..10_000 {
        if let Some(wish) = streams.observe(&read(MIB, 4 * KIB, 4 * KIB)) {
            asked += wish.blob.end - wish.blob.start;
            streams.asked(wish.blob.end);
        }
    }
    assert!(asked <= WINDOW_BYTES_MIN);
}

#[test]
fn small_files_one_after_the_other_are_one_reader() {
    let mut streams = Streams::new(LAYER_BYTES);
    let mut asked = 0;
    for file in 0..1000 {
        let small = Read {
            is_at_start: true,
            missed: file * 10 * KIB >= asked,
            file: file as u32,
            file_end: (file + 1) * 10 * KIB,
            ..read(file * 10 * KIB, 9 * KIB, 5 * KIB)
        };
        // Every third is skipped.
        let wish = (file % 3 > 0).then(|| streams.observe(&small)).flatten();
        if let Some(wish) = wish {
            assert!(wish.blob.start >= asked);
            asked = wish.blob.end;
            streams.asked(asked);
        }
    }
    assert_eq!((streams.streams.len(), streams.places), (1, 1));
    assert!(streams.streams[0].ahead_bytes_max(WINDOW_BYTES_MIN) >= 5 * MIB);
}

#[test]
fn a_layer_that_is_read_everywhere_gets_larger_windows() {
    let layer_bytes = 100 * MIB;
    let mut streams = Streams::new(layer_bytes);
    let mut windows = Vec::new();
    for place in 0..900 {
        let start = place * 7919 % 997 * 100 * KIB;
        let file = Read {
            is_at_start: true,
            ..read(start, 4 * KIB, 4 * KIB)
        };
        let wish = streams.observe(&file).filter(|wish| wish.is_new_place);
        windows.extend(wish.map(|wish| wish.blob.end - wish.blob.start));
    }
    assert!(
        windows[..PLACES_FREE as usize]
            .iter()
            .all(|window| *window == WINDOW_BYTES_MIN)
    );
    assert!(windows.is_sorted() && *windows.last().unwrap() > 8 * WINDOW_BYTES_MIN);
    assert!(windows.iter().all(|window| *window <= WINDOW_BYTES_MAX));
    // In a layer without end it says little.
    assert!(
        Streams {
            places: 900,
            ..Streams::new(u64::MAX)
        }
        .window_bytes()
            < WINDOW_BYTES_MIN + KIB
    );
}

#[test]
fn who_has_gone_on_into_the_next_file_gets_what_is_behind_it() {
    let mut streams = Streams::new(LAYER_BYTES);
    let in_file = |number: u64, place: u64| Read {
        is_at_start: place == 0,
        file: number as u32,
        file_end: (number + 1) * MIB,
        ..read(number * MIB + place, 256 * KIB, 64 * KIB)
    };
    let mut ends = Vec::new();
    for number in 0..3 {
        for place in (0..MIB).step_by(256 << 10) {
            if let Some(wish) = streams.observe(&in_file(number, place)) {
                streams.asked(wish.blob.end);
                ends.push((number, wish.blob.end));
            }
        }
    }
    let furthest = |file| {
        ends.iter()
            .filter(|(number, _)| *number == file)
            .map(|(_, end)| *end)
            .max()
    };
    assert_eq!(furthest(0), Some(MIB), "{ends:?}");
    assert!(furthest(1) > Some(2 * MIB), "{ends:?}");
    assert!(furthest(2) > Some(4 * MIB), "{ends:?}");
}

/// The kernel asks for the first pieces of a file at once.
#[test]
fn a_reader_of_a_file_is_one_also_when_its_second_piece_comes_first() {
    for member_bytes in [16 * KIB, 64 * KIB, 4 * MIB] {
        let piece = |number: u64| Read {
            is_at_start: number == 0,
            ..read(number * 64 * KIB, 64 * KIB, member_bytes)
        };
        let mut streams = Streams::new(LAYER_BYTES);
        for number in [1, 0, 2, 3] {
            streams.observe(&piece(number));
        }
        assert_eq!(streams.streams.len(), 1, "{member_bytes}");
        assert!(streams.streams[0].began_at_start, "{member_bytes}");
    }
}

#[test]
fn readers_side_by_side_keep_what_they_have_earned() {
    let mut streams = Streams::new(LAYER_BYTES);
    for step in 0..20 {
        for reader in 0..STREAMS_MAX as u64 {
            streams.observe(&read(reader * 50 * MIB + step * 256 * KIB, 256 * KIB, 64 * KIB));
        }
    }
    assert_eq!(streams.streams.len(), STREAMS_MAX);
    assert!(
        streams
            .streams
            .iter()
            .all(|stream| stream.has_read_bytes() == 5 * MIB)
    );
}

proptest! {
    /// However a reader in sequence reads, it always has its due ahead of it, at least the half of it under way; nothing is
    /// asked for twice, and where it stops no more has come in vain than it has earned.
    #[test]
    fn a_reader_in_sequence_has_enough_ahead_and_not_much_more(
        start in 0..(1_u64 << 33),
        from_start in any::<bool>(),
        lens in prop::collection::vec(1..=MIB, 1..400),
        member_bytes in prop::sample::select(vec![4 * KIB, 30 * KIB, 64 * KIB, MIB]),
    ) {
        let mut streams = Streams::new(LAYER_BYTES);
        let (mut at, mut asked) = (start, 0);
        for (number, len) in lens.into_iter().enumerate() {
            let read = Read { is_at_start: from_start && number == 0, ..read(at, len, member_bytes) };
            let wish = streams.observe(&read);
            let has_read = at + len - start;
            if let Some(wish) = wish.filter(|wish| !wish.is_new_place) {
                prop_assert!(wish.blob.start >= asked.max(read.blob.end));
                prop_assert!(wish.blob.end > wish.blob.start);
                prop_assert!(wish.blob.end - read.blob.end <= due_bytes(has_read, from_start));
                let next_bytes_max = if from_start { has_read * MEMBER_TIMES_MAX } else { 0 };
                prop_assert_eq!(wish.next_bytes_max, next_bytes_max);
                asked = wish.blob.end;
                streams.asked(asked);
            }
            // In halves, and a half may end in a member.
            let due = due_bytes(has_read, from_start) / 2;
            prop_assert!(number == 0 || asked + 1 >= read.blob.end + due, "{asked} {read:?} {due}");
            at += len;
        }
        prop_assert_eq!(streams.streams.len(), 1);
    }

    /// However one file is read, nothing behind its end comes for what was read of it.
    #[test]
    fn a_reader_of_one_file_brings_no_other(
        file_bytes in 1..(64 * MIB),
        from_start in any::<bool>(),
        lens in prop::collection::vec(1..=MIB, 1..100),
    ) {
        let mut streams = Streams::new(LAYER_BYTES);
        let file_end = file_bytes.div_ceil(64 * KIB) * 64 * KIB;
        let mut at = 0;
        for (number, len) in lens.into_iter().enumerate() {
            let len = len.min(file_bytes - at);
            let is_at_start = from_start && number == 0;
            let read = Read { is_at_start, file_end, ..read(at, len, 64 * KIB) };
            if let Some(wish) = streams.observe(&read) {
                prop_assert!(wish.is_new_place || wish.blob.end <= file_end);
                prop_assert!(wish.blob.start < wish.blob.end);
                streams.asked(wish.blob.end);
            }
            at += len;
            if at == file_bytes { break; }
        }
    }

    /// The kernel's read-ahead comes in pieces that overtake each other.
    #[test]
    fn pieces_that_overtake_each_other_are_one_reader(swaps in prop::collection::vec(any::<bool>(), 50)) {
        let mut streams = Streams::new(LAYER_BYTES);
        streams.observe(&read(0, MIB, 64 * KIB));
        let mut asked = 0;
        for (number, swap) in swaps.into_iter().enumerate() {
            let (first, second) = (1 + 2 * number as u64, 2 + 2 * number as u64);
            for piece in if swap { [second, first] } else { [first, second] } {
                if let Some(wish) = streams.observe(&read(piece * MIB, MIB, 64 * KIB)) {
                    prop_assert!(wish.blob.start >= asked);
                    asked = wish.blob.end;
                    streams.asked(asked);
                }
            }
        }
        prop_assert_eq!(streams.streams.len(), 1);
        // What is overtaken may not count as read.
        prop_assert!(asked >= 101 * MIB + due_bytes(50 * MIB, false) / 2);
    }

    /// Pages at random, none where another was read, bring nothing but themselves.
    #[test]
    fn pages_at_random_bring_no_strangers(places in prop::collection::hash_set(0..20_000_u64, 1..200)) {
        let mut streams = Streams::new(LAYER_BYTES);
        for place in places {
            prop_assert_eq!(streams.observe(&read(place * 16 * KIB, 4 * KIB, 64 * KIB)), None);
        }
    }
}
