//! Cuts the body of a ranged request, which comes in pieces of any size, into the members that it brings. Pure, so that it
//! can be checked against slices of the blob.
//!
//! Members follow one another, with gaps between them that are passed over. Two that are not byte-aligned share a byte
//! (see [`crate::layer::index::Member::bits`]): it belongs to both, and comes once. That is why the last byte is kept.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Result};

/// Shorter pieces of a member are copied together: whoever sends a body decides how short they are, and each takes memory.
const PIECE_BYTES_MIN: usize = 16 << 10;

/// How far a body has been cut.
#[derive(Debug, Default)]
pub(super) struct Cut {
    /// The position in the blob.
    at: u64,
    /// The byte before it, if it was in the body.
    last: Option<u8>,
    /// The beginning of a member whose rest has not come yet, in pieces.
    begun: Vec<Bytes>,
    /// What came behind them in short pieces.
    short: BytesMut,
}

impl Cut {
    /// A body whose first byte stands at `start` of the blob.
    pub(super) fn new(start: u64) -> Self {
        Self {
            at: start,
            ..Self::default()
        }
    }

    /// Whether everything before `end` has come.
    pub(super) fn has_reached(&self, end: u64) -> bool {
        self.at >= end
    }

    /// Takes from `piece` what lies before `end`.
    pub(super) fn split(&mut self, piece: &mut Bytes, end: u64) -> Bytes {
        let part = piece.split_to(end.saturating_sub(self.at).min(piece.len() as u64) as usize);
        self.at += part.len() as u64;
        self.last = part.last().copied().or(self.last);
        part
    }

    /// What came of a member that starts at `start` before its turn: a byte that it shares with the one before it, or
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it was more.
    pub(super) fn shared(&self, start: u64) -> Result<Bytes> {
        match (self.at.saturating_sub(start), self.last) {
            (0, _) => Ok(Bytes::new()),
            (1, Some(last)) => Ok(Bytes::copy_from_slice(&[last])),
            _ => Err(Error::malformed(
                "layer index",
                format!("the member at {start} starts within another"),
            )),
        }
    }

    /// Takes from `piece` what belongs to a member, and returns the member once it is complete, in pieces: nothing is copied
    /// of what comes in long ones. `wanted` stays the same from call to call until then, and starts at most at the position.
    ///
    /// # Errors
    /// As [`Self::shared`].
    pub(super) fn member(&mut self, piece: &mut Bytes, wanted: &Range<u64>) -> Result<Option<Vec<Bytes>>> {
        if self.begun.is_empty() && self.short.is_empty() {
            let shared = self.shared(wanted.start)?;
            self.short.extend_from_slice(&shared);
        }
        let mut part = self.split(piece, wanted.end);
        let is_complete = self.has_reached(wanted.end);
        let is_short = part.len() < PIECE_BYTES_MIN;
        if is_short && !(is_complete && self.short.is_empty()) {
            self.short.extend_from_slice(&part);
            part.clear();
        }
        let is_due = is_complete || !is_short || self.short.len() >= PIECE_BYTES_MIN;
        let short = is_due.then(|| self.short.split().freeze());
        let came = short.into_iter().chain([part]);
        self.begun.extend(came.filter(|piece| !piece.is_empty()));
        Ok(is_complete.then(|| std::mem::take(&mut self.begun)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Cuts `blob[start..]`, in pieces of these sizes, into these members.
    fn cut(blob: &[u8], pieces: &[usize], members: &[Range<u64>]) -> Result<Vec<Vec<u8>>> {
        let start = members[0].start;
        let mut rest = Bytes::copy_from_slice(&blob[start as usize..]);
        let mut cut = Cut::new(start);
        let mut wanted = members.iter();
        let mut next = wanted.next();
        let mut out = Vec::new();
        for &size in pieces.iter().cycle() {
            let mut piece = rest.split_to(size.clamp(1, rest.len().max(1)).min(rest.len()));
            while let Some(range) = next.filter(|range| !piece.is_empty() || cut.has_reached(range.end)) {
                if !cut.has_reached(range.start) {
                    cut.split(&mut piece, range.start);
                } else if let Some(member) = cut.member(&mut piece, range)? {
                    out.push(member.concat());
                    next = wanted.next();
                }
            }
            if rest.is_empty() {
                break;
            }
        }
        Ok(out)
    }

    #[test]
    fn neighbours_get_the_byte_that_they_share() {
        let blob: Vec<u8> = (0..100).collect();
        let members = [3..20, 19..21, 20..50, 50..51, 60..61, 60..61, 99..100];
        for pieces in [&[1][..], &[2], &[17], &[100]] {
            let out = cut(&blob, pieces, &members).unwrap();
            assert_eq!(out.len(), members.len());
            for (member, range) in out.iter().zip(&members) {
                assert_eq!(
                    member[..],
                    blob[range.start as usize..range.end as usize],
                    "{range:?}"
                );
            }
        }
    }

    #[test]
    fn a_member_in_very_short_pieces_is_handed_over_in_few() {
        let length = 3 * PIECE_BYTES_MIN + 5;
        let (mut cut, wanted) = (Cut::new(0), 0..length as u64);
        for at in 0..length {
            let mut piece = Bytes::copy_from_slice(&[at as u8]);
            if let Some(member) = cut.member(&mut piece, &wanted).unwrap() {
                assert_eq!((at, member.len()), (length - 1, 4));
                assert!(
                    member
                        .concat()
                        .iter()
                        .enumerate()
                        .all(|(at, byte)| *byte == at as u8)
                );
            }
        }
        let mut long = Bytes::from(vec![7; PIECE_BYTES_MIN]);
        let (address, end) = (long.as_ptr(), (length + PIECE_BYTES_MIN) as u64);
        let member = cut.member(&mut long, &(length as u64..end)).unwrap().unwrap();
        assert_eq!((member.len(), member[0].as_ptr()), (1, address), "not copied");
    }

    #[test]
    fn members_that_share_more_are_refused() {
        for second in [4..30, 18..30, 3..4] {
            assert!(cut(&[0; 100], &[7], &[3..20, second]).is_err());
        }
    }

    #[test]
    fn a_member_from_before_the_body_is_refused() {
        assert!(Cut::new(10).shared(9).is_err());
        assert!(Cut::new(10).shared(10).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn every_member_is_its_slice_of_the_blob(
            layout in prop::collection::vec((-1..40i64, prop_oneof![2..300u64, 2..100_000u64]), 1..40),
            pieces in prop::collection::vec(prop_oneof![1..400usize, 1..40_000usize], 1..10),
            before in 0..50u64,
        ) {
            let mut end = before + 1;
            let members: Vec<Range<u64>> = layout
                .into_iter()
                .map(|(gap, len)| {
                    let start = end.saturating_add_signed(gap);
                    end = start + len;
                    start..end
                })
                .collect();
            let blob: Vec<u8> = (0..end + 20).map(|at| ((at * 31) >> 3) as u8).collect();
            let out = cut(&blob, &pieces, &members).unwrap();
            prop_assert_eq!(out.len(), members.len());
            for (member, range) in out.iter().zip(&members) {
                prop_assert_eq!(&member[..], &blob[range.start as usize..range.end as usize]);
            }
        }
    }
}
