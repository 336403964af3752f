//! The last bytes of an eStargz blob: an empty gzip member whose header carries the offset of the TOC.
//!
//! Every field is checked, not only the magic: the footer is all that says "this gzip layer has a TOC", and a lax reader
//! takes chance bytes, or a number with a sign, for one.

use crate::error::{Error, Result};

/// Size of the current footer in bytes.
pub(super) const FOOTER_BYTES: usize = 51;
/// Size in bytes of the footer of stargz, the format's predecessor.
const LEGACY_BYTES: usize = 47;
/// Size in bytes of the footer that says that the TOC is in another image.
pub(super) const EXTERNAL_BYTES: usize = 46;

const GZIP_MAGIC: [u8; 4] = [0x1f, 0x8b, 8, 4];
/// An empty final stored block, then CRC and length of nothing.
const EMPTY_BODY: [u8; 13] = [1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
const MAGIC: &[u8; 6] = b"STARGZ";
const EXTERNAL_MAGIC: &[u8; 17] = b"STARGZEXTERNALTOC";
/// The subfield of the gzip header's extra field: "SG" and the length of what follows.
const SUBFIELD: [u8; 4] = [b'S', b'G', 22, 0];
const EXTERNAL_SUBFIELD: [u8; 4] = [b'S', b'G', 17, 0];

/// Where the TOC stands, as the footer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footer {
    /// First byte of the TOC's gzip member in the blob.
    pub(super) toc_start: u64,
    /// Its end, where the footer starts.
    pub(super) toc_end: u64,
}

/// What stands at the end of a gzip blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tail {
    /// An eStargz or stargz footer.
    Footer(Footer),
    /// A footer that names a TOC outside of the blob.
    ExternalToc,
    /// None of these: a plain gzip layer.
    Plain,
}

/// Reads the footer at the end of `tail`, the last bytes of a blob of `blob_bytes` bytes.
///
/// # Errors
/// [`Error::Malformed`] when there is a footer whose offset lies outside of the blob.
pub(super) fn parse(tail: &[u8], blob_bytes: u64) -> Result<Tail> {
    for (footer_bytes, subfield) in [(FOOTER_BYTES, &SUBFIELD[..]), (LEGACY_BYTES, &[])] {
        let Some(offset) = last_bytes(tail, footer_bytes).and_then(|bytes| toc_offset(bytes, subfield))
        else {
            continue;
        };
        let toc_end = blob_bytes.saturating_sub(footer_bytes as u64);
        if offset == 0 || offset >= toc_end {
            let why = format!("its footer places the TOC at {offset} of {blob_bytes} bytes");
            return Err(Error::malformed("eStargz layer", why));
        }
        return Ok(Tail::Footer(Footer {
            toc_start: offset,
            toc_end,
        }));
    }
    let external = last_bytes(tail, EXTERNAL_BYTES).and_then(|bytes| extra_field(bytes, &EXTERNAL_SUBFIELD));
    Ok(if external == Some(&EXTERNAL_MAGIC[..]) {
        Tail::ExternalToc
    } else {
        Tail::Plain
    })
}

/// The footer for a TOC at `toc_start`.
#[must_use]
pub(super) fn write(toc_start: u64) -> Vec<u8> {
    around(&[&SUBFIELD, digits(toc_start).as_bytes(), MAGIC].concat())
}

/// The footer of stargz for a TOC at `toc_start`.
#[must_use]
pub(super) fn write_legacy(toc_start: u64) -> Vec<u8> {
    around(&[digits(toc_start).as_bytes(), MAGIC].concat())
}

/// The footer of a layer whose TOC is in another image.
#[must_use]
pub(super) fn write_external() -> Vec<u8> {
    around(&[&EXTERNAL_SUBFIELD[..], EXTERNAL_MAGIC].concat())
}

fn digits(toc_start: u64) -> String {
    format!("{toc_start:016x}")
}

/// An empty gzip member with this extra field. Time and flags are zero, the system is unknown (255).
fn around(extra: &[u8]) -> Vec<u8> {
    let extra_bytes = (extra.len() as u16).to_le_bytes();
    [
        &GZIP_MAGIC,
        &[0, 0, 0, 0, 0, 0xff][..],
        &extra_bytes,
        extra,
        &EMPTY_BODY,
    ]
    .concat()
}

/// The TOC offset in a footer whose extra field starts with `subfield`.
fn toc_offset(footer: &[u8], subfield: &[u8]) -> Option<u64> {
    let (digits, magic) = extra_field(footer, subfield)?.split_at_checked(16)?;
    if magic != MAGIC
        || !digits
            .iter()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// What follows `subfield` in the extra field of an empty gzip member.
fn extra_field<'a>(member: &'a [u8], subfield: &[u8]) -> Option<&'a [u8]> {
    let (header, rest) = member.split_at_checked(10)?;
    let (extra_len, rest) = rest.split_first_chunk::<2>()?;
    let extra = rest.strip_suffix(&EMPTY_BODY)?;
    let valid = header.starts_with(&GZIP_MAGIC) && usize::from(u16::from_le_bytes(*extra_len)) == extra.len();
    extra.strip_prefix(subfield).filter(|_| valid)
}

/// The last `len` bytes, if there are as many.
fn last_bytes(bytes: &[u8], len: usize) -> Option<&[u8]> {
    bytes.get(bytes.len().checked_sub(len)?..)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOB_BYTES: u64 = 10_000;

    fn found(toc_start: u64, footer_bytes: u64) -> Result<Tail> {
        Ok(Tail::Footer(Footer {
            toc_start,
            toc_end: BLOB_BYTES - footer_bytes,
        }))
    }

    #[test]
    fn the_footers_are_written_byte_for_byte() {
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
        let expected = "1f8b08040000000000ff1a00534716003030303030303030303030303132333453544152475a\
                        010000ffff0000000000000000";
        assert_eq!(hex(&write(0x1234)), expected);
        let legacy = "1f8b08040000000000ff16003030303030303030303030303132333453544152475a\
                      010000ffff0000000000000000";
        assert_eq!(hex(&write_legacy(0x1234)), legacy);
        let external = "1f8b08040000000000ff15005347110053544152475a45585445524e414c544f43\
                        010000ffff0000000000000000";
        assert_eq!(hex(&write_external()), external);
    }

    #[test]
    fn all_three_footers_are_told_apart() {
        let current = around(b"SG\x16\x000000000000001234STARGZ");
        let legacy = around(b"0000000000001234STARGZ");
        let external = around(b"SG\x11\x00STARGZEXTERNALTOC");
        assert_eq!([current.len(), legacy.len(), external.len()], [51, 47, 46]);
        for before in [0, 1, 100] {
            let tail = |footer: &[u8]| parse(&[&vec![7; before], footer].concat(), BLOB_BYTES);
            assert_eq!(tail(&current), found(0x1234, 51));
            assert_eq!(tail(&legacy), found(0x1234, 47));
            assert_eq!(tail(&external), Ok(Tail::ExternalToc));
        }
    }

    #[test]
    fn an_offset_outside_of_the_blob_is_refused() {
        for offset in [0, BLOB_BYTES - 51, BLOB_BYTES, u64::MAX] {
            assert!(
                matches!(parse(&write(offset), BLOB_BYTES), Err(Error::Malformed { .. })),
                "{offset}"
            );
        }
        assert_eq!(
            parse(&write(BLOB_BYTES - 52), BLOB_BYTES),
            found(BLOB_BYTES - 52, 51)
        );
    }

    #[test]
    fn what_is_no_offset_is_no_footer() {
        for digits in [
            "-000000000001234",
            "+000000000001234",
            "000000000000ABCD",
            "0x00000000001234",
            " 000000000001234",
        ] {
            let footer = around(format!("SG\x16\0{digits}STARGZ").as_bytes());
            assert_eq!(parse(&footer, BLOB_BYTES), Ok(Tail::Plain), "{digits}");
        }
        let footer = write(0x1234);
        assert_eq!(parse(&footer[1..], BLOB_BYTES), Ok(Tail::Plain));
        assert_eq!(parse(&[&footer[..], &[0]].concat(), BLOB_BYTES), Ok(Tail::Plain));
        assert_eq!(parse(&[], BLOB_BYTES), Ok(Tail::Plain));
    }

    #[test]
    fn every_byte_that_says_something_is_checked() {
        let good = write(0x1234);
        for at in 0..FOOTER_BYTES {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            // Time, flags and system of a gzip header say nothing.
            let expected = if (4..10).contains(&at) {
                found(0x1234, 51)
            } else {
                Ok(Tail::Plain)
            };
            assert_eq!(parse(&bad, BLOB_BYTES), expected, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(offset in 1..BLOB_BYTES - 51, before in 0..100_usize) {
            let tail = [&vec![0; before][..], &write(offset)].concat();
            prop_assert_eq!(parse(&tail, BLOB_BYTES), found(offset, 51));
        }

        #[test]
        fn no_bytes_panic(tail in prop::collection::vec(any::<u8>(), 0..64), size in any::<u64>()) {
            let _ = parse(&tail, size);
        }
    }
}
