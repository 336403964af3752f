//! PAX extended headers: records of `LENGTH KEY=VALUE\n` that replace or add to what the next header says.
//!
//! As in Go, the last of several records with one key counts, and an empty value leaves the header's. An attribute may be
//! empty all the same: engines set those.

use std::collections::BTreeMap;

use crate::layer::entry::Time;
use crate::layer::tar::{Rule, XATTR_PREFIX};

/// The keys whose values matter, besides extended attributes.
const KEYS: [&[u8]; 15] = [
    b"GNU.sparse.major",
    b"GNU.sparse.map",
    b"GNU.sparse.minor",
    b"GNU.sparse.name",
    b"GNU.sparse.numblocks",
    b"GNU.sparse.realsize",
    b"GNU.sparse.size",
    b"atime",
    b"ctime",
    b"gid",
    b"linkpath",
    b"mtime",
    b"path",
    b"size",
    b"uid",
];
/// The parts of a sparse map of version 0.0, which come in turn and make the `GNU.sparse.map` of version 0.1.
const SPARSE_PARTS: [&[u8]; 2] = [b"GNU.sparse.offset", b"GNU.sparse.numbytes"];
/// Keys whose values are strings of the header and so have no NUL.
const TEXTS: [&[u8]; 4] = [b"path", b"linkpath", b"uname", b"gname"];

/// The shortest record that Go takes for one: `5 k=` and the newline.
const RECORD_BYTES_MIN: usize = 5;

/// The records of one extended header.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

impl Records {
    /// Reads the payload of an extended header.
    pub(super) fn parse(mut payload: &[u8]) -> Result<Self, Rule> {
        let mut records = BTreeMap::new();
        let mut sparse_parts = 0;
        let mut sparse_map = Vec::new();
        while !payload.is_empty() {
            let (key, value, rest) = record(payload).ok_or("a PAX record before it is malformed")?;
            payload = rest;
            if SPARSE_PARTS.contains(&key) {
                if key != SPARSE_PARTS[sparse_parts % 2] || value.contains(&b',') {
                    return Err("the sparse map in its PAX records is out of order");
                }
                if sparse_parts > 0 {
                    sparse_map.push(b',');
                }
                sparse_map.extend_from_slice(value);
                sparse_parts += 1;
            } else if KEYS.contains(&key) || key.starts_with(XATTR_PREFIX) {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
        if sparse_parts > 0 {
            records.insert(b"GNU.sparse.map".to_vec(), sparse_map);
        }
        Ok(Self(records))
    }

    /// The value of `key`, unless it is empty.
    pub(super) fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.0
            .get(key)
            .map(Vec::as_slice)
            .filter(|value| !value.is_empty())
    }

    /// The value of `key` as a decimal number.
    pub(super) fn number(&self, key: &[u8]) -> Result<Option<i64>, Rule> {
        let number = |value| decimal(value).ok_or("a number in its PAX records is none");
        self.get(key).map(number).transpose()
    }

    /// The value of `key` as a time.
    pub(super) fn time(&self, key: &[u8]) -> Result<Option<Time>, Rule> {
        let time = |value| time(value).ok_or("a time in its PAX records is none");
        self.get(key).map(time).transpose()
    }

    /// The extended attributes, sorted by name.
    pub(super) fn xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let named = |(key, value): (&Vec<u8>, &Vec<u8>)| {
            key.strip_prefix(XATTR_PREFIX)
                .map(|name| (name.to_vec(), value.clone()))
        };
        self.0.iter().filter_map(named).collect()
    }
}

/// The first record of `payload`, and what follows it.
fn record(payload: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = payload.iter().position(|&byte| byte == b' ')?;
    let bytes = usize::try_from(decimal(&payload[..space])?).ok()?;
    if bytes < RECORD_BYTES_MIN {
        return None;
    }
    let (record, rest) = payload.split_at_checked(bytes)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    let checked = if TEXTS.contains(&key) { value } else { key };
    (!key.is_empty() && !checked.contains(&0)).then_some((key, value, rest))
}

/// A decimal number with or without a sign.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with or without a sign and a fraction, of which nanoseconds are kept.
fn time(text: &[u8]) -> Option<Time> {
    let point = text.iter().position(|&byte| byte == b'.').unwrap_or(text.len());
    let (whole, fraction) = text.split_at(point);
    let seconds = decimal(whole)?;
    let digits = fraction.get(1..).unwrap_or_default();
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let padded = digits.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanos = padded.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    // A fraction goes in the direction of the sign, which -0.5 has too; nanoseconds count upwards.
    match nanos {
        1.. if whole.starts_with(b"-") => Some(Time {
            seconds: seconds.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        }),
        _ => Some(Time { seconds, nanos }),
    }
}
