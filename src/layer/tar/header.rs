//! One header block of a tar, in any of the formats that there are: V7, USTAR (with or without PAX), GNU, STAR.
//!
//! Fields mean what Go's `archive/tar` takes them to mean, also where writers break their format: numbers may be octal or
//! base-256 and negative, checksums may be of signed bytes.

use crate::layer::tar::{BLOCK_BYTES, Rule, checksums};

/// Where the first format-specific field, the magic number, starts and the version ends.
const MAGIC: std::ops::Range<usize> = 257..265;

/// Whose rules a header follows beyond those of the seventh Unix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
    Star,
}

/// What a header says, before anything is checked that depends on the type.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) dialect: Dialect,
    pub(super) typeflag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    /// Seconds since 1970.
    pub(super) mtime: i64,
    pub(super) device: (i64, i64),
}

impl Header {
    /// Whether the type has no payload, whatever its size says.
    pub(super) fn is_header_only(&self) -> bool {
        (b'1'..=b'6').contains(&self.typeflag)
    }

    /// Bytes of payload behind the header.
    pub(super) fn payload_bytes(&self) -> Result<u64, Rule> {
        if self.is_header_only() {
            return Ok(0);
        }
        u64::try_from(self.size).map_err(|_| "its size is negative")
    }
}

/// Reads a block that is not all zeros.
pub(super) fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Header, Rule> {
    let dialect = dialect(block)?;
    let field = |at: usize, len: usize| &block[at..at + len];
    let number = |at: usize, len: usize| number(field(at, len)).ok_or("a number in its header is none");
    let mut header = Header {
        dialect,
        typeflag: block[156],
        name: text(field(0, 100)).to_vec(),
        link: text(field(157, 100)).to_vec(),
        size: number(124, 12)?,
        mode: number(100, 8)?,
        uid: number(108, 8)?,
        gid: number(116, 8)?,
        mtime: number(136, 12)?,
        device: (0, 0),
    };
    if dialect == Dialect::V7 {
        return Ok(header);
    }
    header.device = (number(329, 8)?, number(337, 8)?);
    let prefix = match dialect {
        Dialect::Star => {
            // Access and change time: not wanted, but no rubbish either.
            number(476, 12)?;
            number(488, 12)?;
            text(field(345, 131))
        }
        Dialect::Gnu => buggy_gnu_prefix(block),
        Dialect::Ustar | Dialect::V7 => text(field(345, 155)),
    };
    if !prefix.is_empty() {
        header.name = [prefix, b"/", &header.name].concat();
    }
    Ok(header)
}

/// The prefix in a GNU header, which has no such field: Go before 1.8 wrote one there, over the access and change times.
/// Taken for one where these are no times.
fn buggy_gnu_prefix(block: &[u8; BLOCK_BYTES]) -> &[u8] {
    let is_time = |field: &[u8]| field.first() == Some(&0) || number(field).is_some();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return &[];
    }
    Some(text(&block[345..500]))
        .filter(|prefix| prefix.is_ascii())
        .unwrap_or_default()
}

/// Which format a block is of, by its checksum and its magic number.
pub(super) fn dialect(block: &[u8; BLOCK_BYTES]) -> Result<Dialect, Rule> {
    let (unsigned, signed) = checksums(block);
    let stored = octal(&block[148..156]);
    if !stored.is_some_and(|stored| stored == unsigned as i64 || stored == signed) {
        return Err("it has no valid header checksum");
    }
    Ok(match &block[MAGIC] {
        b"ustar  \0" => Dialect::Gnu,
        magic if magic.starts_with(b"ustar\0") => {
            if block.ends_with(b"tar\0") {
                Dialect::Star
            } else {
                Dialect::Ustar
            }
        }
        _ => Dialect::V7,
    })
}

/// What stands before the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// A number in octal digits, or in base 256 (two's complement) where the first bit is set; 0 where nothing stands. None if
/// it is neither, or has more than 63 bits.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) else {
        return octal(field);
    };
    let is_negative = first & 0x40 != 0;
    let inversion = if is_negative { 0xff } else { 0 };
    let head = u64::from((first ^ inversion) & 0x7f);
    let magnitude = rest.iter().try_fold(head, |value, byte| {
        (value >> 56 == 0).then_some(value << 8 | u64::from(byte ^ inversion))
    })?;
    let magnitude = i64::try_from(magnitude).ok()?;
    Some(if is_negative { !magnitude } else { magnitude })
}

/// Octal digits with spaces and NULs around them; what follows a NUL among them is ignored.
fn octal(field: &[u8]) -> Option<i64> {
    let is_filling = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !is_filling(byte)) else {
        return Some(0);
    };
    let end = field.iter().rposition(|byte| !is_filling(byte))?;
    let digits = text(&field[start..=end]);
    digits.iter().try_fold(0i64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        Some(value.checked_mul(8)? | i64::from(digit))
    })
}
