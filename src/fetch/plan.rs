//! Which ranged requests bring a set of members. Pure, so that it can be checked against simple rules.

use std::ops::Range;

use crate::error::Result;
use crate::fetch::readahead::Wish;
use crate::layer::index::{Index, Member};

/// Members this close in the blob come with one request: the gap is cheaper than another round trip.
pub const GAP_BYTES_MAX: u64 = 64 << 10;
/// The same with what is copied from elsewhere between them: of the next version of an image that is most, and little of it
/// is to be fetched.
pub const COPIED_GAP_BYTES_MAX: u64 = 8 << 10;
/// A request is not made longer than this by joining members; one member alone may be longer.
pub const REQUEST_BYTES_MAX: u64 = 8 << 20;
/// A member alone is not fetched ahead if it is longer.
const MEMBER_AHEAD_BYTES_MAX: u64 = 8 << 20;

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The bytes of the blob.
    pub range: Range<u64>,
    /// The members wanted of it, in the order of the blob.
    pub members: Vec<u32>,
}

/// Joins members (sorted, so in the order of the blob) into requests. Neighbours may share one byte; what overlaps more, as
/// no format of ours has it, is asked for apart. `gap_with` says how long a gap may be that has a member in it which is not
/// wanted, if there may be one: what is under way lies in none, because no byte is asked for twice.
///
/// # Errors
/// `Malformed` for a damaged index.
pub fn requests<B: std::ops::Deref<Target = [u8]>>(
    index: &Index<B>,
    members: &[u32],
    gap_with: impl Fn(u32) -> Option<u64>,
) -> Result<Vec<Request>> {
    let joins = |last: &Request, number: u32, range: &Range<u64>| {
        let gap = range.start.saturating_sub(last.range.end);
        let before = last.members.last().map_or(number, |last| last.saturating_add(1));
        gap <= GAP_BYTES_MAX
            && last.range.end.saturating_sub(range.start) <= 1
            && range.end.saturating_sub(last.range.start) <= REQUEST_BYTES_MAX
            && (before..number).all(|between| gap_with(between).is_some_and(|most| gap <= most))
    };
    let mut requests: Vec<Request> = Vec::new();
    for &number in members {
        let range = index.member(number)?.blob_range();
        match requests.last_mut() {
            Some(last) if joins(last, number, &range) => {
                last.range.end = range.end.max(last.range.end);
                last.members.push(number);
            }
            _ => requests.push(Request {
                range,
                members: vec![number],
            }),
        }
    }
    Ok(requests)
}

/// The members that start in a range of the blob, which is worth reading ahead: one that shares its first byte starts with
/// the next, so that what begins where another ends is found. One that reaches beyond the range by more than its length is
/// left to whoever needs it: a small read must not bring a stranger's megabytes along.
///
/// # Errors
/// `Malformed` for a damaged index.
pub fn members_in<B: std::ops::Deref<Target = [u8]>>(
    index: &Index<B>,
    range: &Range<u64>,
) -> Result<Range<u32>> {
    let first_at_or_after = |position: u64| -> Result<u32> {
        let (mut low, mut high) = (0, index.member_count());
        while low < high {
            let middle = low + (high - low) / 2;
            let member = index.member(middle)?;
            if member.blob_start.saturating_add(u64::from(member.bits > 0)) < position {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    };
    let first = first_at_or_after(range.start)?;
    let mut end = first_at_or_after(range.end)?.max(first);
    let limit = range.end.saturating_add(range.end.saturating_sub(range.start));
    if end > first && index.member(end - 1)?.blob_end > limit {
        end -= 1;
    }
    Ok(first..end)
}

/// A window, and as much before its start as it reaches beyond the last member: who reads the last files of a layer first, as
/// they stand last in a tree, mostly reads those before them next.
fn before_the_end<B: std::ops::Deref<Target = [u8]>>(
    index: &Index<B>,
    window: &Range<u64>,
) -> Result<Range<u64>> {
    let end = match index.member_count().checked_sub(1) {
        Some(last) => index.member(last)?.blob_end,
        None => 0,
    };
    let beyond = window.end.saturating_sub(end);
    Ok(window.start.saturating_sub(beyond)..window.end - beyond)
}

/// The members to fetch ahead of a reader of file `entry`, as its wish says: of one that goes on those that end within it.
///
/// # Errors
/// `Malformed` for a damaged index.
pub fn members_ahead<B: std::ops::Deref<Target = [u8]>>(
    index: &Index<B>,
    wish: &Wish,
    entry: u32,
) -> Result<Range<u32>> {
    let wanted = match wish.is_new_place {
        true => before_the_end(index, &wish.blob)?,
        false => wish.blob.clone(),
    };
    let mut members = members_in(index, &wanted)?;
    if !wish.is_new_place && !members.is_empty() && index.member(members.end - 1)?.blob_end > wish.blob.end {
        members.end -= 1;
    }
    let next = members.start;
    if !members.is_empty() || next >= index.member_count() {
        return Ok(members);
    }
    let member = index.member(next)?;
    let bytes = member.blob_end.saturating_sub(member.blob_start);
    let is_of_file = |member: &Member| -> Result<bool> {
        let first = index.member_chunks(member)?.first().copied();
        first.map_or(Ok(false), |chunk| Ok(index.chunk(chunk)?.entry == entry))
    };
    match bytes <= wish.next_bytes_max.min(MEMBER_AHEAD_BYTES_MAX) && is_of_file(&member)? {
        true => Ok(next..next + 1),
        false => Ok(members),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::Digest;
    use crate::layer::Format;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::index::{Coding, Summary};
    use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};

    /// An index whose members start at these offsets and whose data ends at `end`.
    fn index(starts: &[u64], end: u64) -> Index<Vec<u8>> {
        let ends = starts.iter().skip(1).chain([&end]);
        let ranges: Vec<(Range<u64>, u8)> = starts
            .iter()
            .zip(ends)
            .map(|(&start, &end)| (start..end, 0))
            .collect();
        index_of(&ranges, end)
    }

    /// An index with members of these ranges, which start within their first byte with so many bits.
    fn index_of(members: &[(Range<u64>, u8)], end: u64) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        for (number, (range, bits)) in members.iter().enumerate() {
            let start = range.start;
            builder
                .member(NewMember {
                    blob_start: start,
                    blob_end: range.end,
                    coding: Coding::Deflate,
                    bits: *bits,
                    window: Vec::new(),
                    check: None,
                })
                .unwrap();
            builder
                .entry(&Entry {
                    size: 1,
                    ..Entry::new(number.to_string(), Kind::File)
                })
                .unwrap();
            let digest = Some(Digest::of(b"x"));
            builder
                .chunk(NewChunk {
                    bytes: 1,
                    blob_offset: start,
                    inner_offset: 0,
                    digest,
                })
                .unwrap();
        }
        let summary = Summary {
            toc_start: end,
            toc_end: end,
            ..Summary::of(Format::Estargz, end)
        };
        Index::open(builder.finish(summary, end).unwrap().to_vec()).unwrap()
    }

    /// An index of one file with members of these lengths, each of which decodes to so many bytes.
    fn index_of_file(lengths: &[u64], bytes: u64) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        builder
            .entry(&Entry {
                size: bytes * lengths.len() as u64,
                ..Entry::new("file", Kind::File)
            })
            .unwrap();
        let mut at = 0;
        for length in lengths {
            builder
                .chunk(NewChunk {
                    bytes,
                    blob_offset: at,
                    inner_offset: 0,
                    digest: Some(Digest::of(b"x")),
                })
                .unwrap();
            at += length;
        }
        let summary = Summary {
            toc_start: at,
            toc_end: at,
            ..Summary::of(Format::Estargz, at)
        };
        Index::open(builder.finish(summary, at).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn neighbours_join_and_gaps_split() {
        let index = index(&[0, 1000, 2000, 2000 + GAP_BYTES_MAX + 1, 20 << 20], 30 << 20);
        let plan = requests(&index, &[0, 1, 3], |_| Some(GAP_BYTES_MAX)).unwrap();
        // Member 2 is not wanted, and too long to be skipped over.
        assert_eq!(
            plan[0],
            Request {
                range: 0..2000,
                members: vec![0, 1]
            }
        );
        assert_eq!(plan[1].members, [3]);
        assert_eq!(
            members_in(&index, &(1..2001)).unwrap(),
            1..2,
            "the one at 2000 is too long to come along"
        );
        assert_eq!(members_in(&index, &(1..100_000)).unwrap(), 1..3);
        assert_eq!(members_in(&index, &(25 << 20..30 << 20)).unwrap(), 5..5);
    }

    #[test]
    fn neighbours_that_share_a_byte_come_together() {
        let ranges = [
            (10..1001, 0),
            (1000..2001, 3),
            (2000..3000, 7),
            (3000..4000, 0),
            (3990..4500, 0),
        ];
        let index = index_of(&ranges, 5000);
        let plan = requests(&index, &[0, 1, 2, 3, 4], |_| Some(GAP_BYTES_MAX)).unwrap();
        assert_eq!(plan[0].range, 10..4000);
        assert_eq!(plan[0].members, [0, 1, 2, 3]);
        // The last one lies in what no decoder of another would leave over.
        assert_eq!((plan[1].range.clone(), plan.len()), (3990..4500, 2));
        // Whoever goes on where a member ended finds the next, and where it starts, not the one before.
        assert_eq!(members_in(&index, &(1001..2001)).unwrap(), 1..2);
        assert_eq!(members_in(&index, &(2001..3000)).unwrap(), 2..3);
        assert_eq!(members_in(&index, &(3000..3001)).unwrap(), 3..3);
        assert_eq!(members_in(&index, &(0..4000)).unwrap(), 0..5);
    }

    #[test]
    fn the_next_member_of_a_file_comes_for_who_has_read_enough_of_it() {
        let index = index_of_file(&[4 << 20, 4 << 20, 4 << 20], 1);
        let wish = |next_bytes_max| Wish {
            blob: 4 << 20..5 << 20,
            next_bytes_max,
            is_new_place: false,
        };
        let ahead = |next_bytes_max, entry| members_ahead(&index, &wish(next_bytes_max), entry).unwrap();
        assert_eq!(ahead(4 << 20, 0), 1..2);
        assert!(ahead((4 << 20) - 1, 0).is_empty(), "too little was read");
        assert!(ahead(4 << 20, 1).is_empty(), "it is of another file");
        let earned = |end| Wish {
            blob: 4 << 20..end,
            ..wish(0)
        };
        assert!(
            members_ahead(&index, &earned((8 << 20) - 1), 0)
                .unwrap()
                .is_empty()
        );
        assert_eq!(members_ahead(&index, &earned(8 << 20), 0).unwrap(), 1..2);
        let at_end = Wish {
            blob: 12 << 20..13 << 20,
            ..wish(u64::MAX)
        };
        assert!(members_ahead(&index, &at_end, 0).unwrap().is_empty());
        let long = index_of_file(&[1, MEMBER_AHEAD_BYTES_MAX + 1], 1);
        let all = Wish {
            blob: 1..2,
            ..wish(u64::MAX)
        };
        assert!(members_ahead(&long, &all, 0).unwrap().is_empty());
    }

    #[test]
    fn a_window_beyond_the_end_lies_before_the_place() {
        let index = index(&[0, 1000, 2000, 3000, 4000], 5000);
        let ahead = |blob, is_new_place| {
            let wish = Wish {
                blob,
                next_bytes_max: 0,
                is_new_place,
            };
            members_ahead(&index, &wish, 0).unwrap()
        };
        assert_eq!(ahead(5000..8000, true), 2..5);
        assert_eq!(ahead(4000..6000, true), 3..5);
        assert_eq!(ahead(2000..4000, true), 2..4, "it reaches to no end");
        assert_eq!(ahead(4000..100_000, true), 0..5);
        assert!(
            ahead(5000..8000, false).is_empty(),
            "a reader that goes on has read those"
        );
    }

    proptest! {
        #[test]
        fn every_member_comes_once_within_its_request(
            gaps in prop::collection::vec(1..(3u64 << 20), 1..60),
            wanted in prop::collection::vec(any::<bool>(), 60),
            bits in prop::collection::vec(0..8u8, 60),
        ) {
            let starts: Vec<u64> = gaps.iter().scan(0, |at, gap| { *at += gap; Some(*at) }).collect();
            let end = starts.last().unwrap() + 100;
            let members: Vec<(Range<u64>, u8)> = (0..starts.len())
                .map(|m| {
                    let next = starts.get(m + 1).map(|next| next + u64::from(bits[m + 1] > 0));
                    (starts[m]..next.unwrap_or(end), bits[m])
                })
                .collect();
            let index = index_of(&members, end);
            let members: Vec<u32> = (0..starts.len() as u32).filter(|&m| wanted[m as usize]).collect();
            let is_under_way = |m: u32| !wanted[m as usize] && m.is_multiple_of(3);
            let is_copied = |m: u32| !wanted[m as usize] && m % 3 == 1;
            let gap_with = |m| match is_copied(m) {
                true => Some(COPIED_GAP_BYTES_MAX),
                false => (!is_under_way(m)).then_some(GAP_BYTES_MAX),
            };
            let plan = requests(&index, &members, gap_with).unwrap();
            let planned: Vec<u32> = plan.iter().flat_map(|r| r.members.clone()).collect();
            prop_assert_eq!(planned, members);
            for request in &plan {
                let ranges: Vec<_> = request.members.iter().map(|&m| index.member(m).unwrap().blob_range()).collect();
                prop_assert_eq!(request.range.start, ranges[0].start);
                prop_assert_eq!(request.range.end, ranges.last().unwrap().end);
                prop_assert!(ranges.len() == 1 || request.range.end - request.range.start <= REQUEST_BYTES_MAX);
                prop_assert!(ranges.windows(2).all(|pair| pair[1].start.saturating_sub(pair[0].end) <= GAP_BYTES_MAX));
                let (first, last) = (request.members[0], *request.members.last().unwrap());
                prop_assert!(!(first..last).any(is_under_way), "nothing that is under way is asked for again");
                let gaps = request.members.windows(2).zip(ranges.windows(2));
                for (_, ranges) in gaps.filter(|(members, _)| (members[0]..members[1]).any(is_copied)) {
                    prop_assert!(ranges[1].start.saturating_sub(ranges[0].end) <= COPIED_GAP_BYTES_MAX);
                }
            }
        }
    }
}
