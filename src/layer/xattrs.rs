//! The encoded form of an entry's extended attributes, in the layer index and in the merged tree alike.

use crate::error::{Error, Result};

/// Encodes xattrs as `name length u16, value length u32, name, value` each, sorted by name: also the form that the
/// merged tree keeps.
///
/// # Errors
/// [`Error::Malformed`] for a name over 255 bytes or empty, or with a NUL, a value over 64 KiB, or a list of names over
/// 64 KiB: what Linux cannot give back.
pub fn encode(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut sorted: Vec<_> = xattrs.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let refuse = |why: &str| Error::malformed("extended attributes", why);
    let mut encoded = Vec::new();
    let mut names_bytes = 0;
    for (name, value) in sorted {
        if name.is_empty() || name.len() > 255 || name.contains(&0) {
            return Err(refuse("a name is empty, longer than 255 bytes or has a NUL"));
        }
        if value.len() > 1 << 16 {
            return Err(refuse("a value is longer than 64 KiB"));
        }
        names_bytes += name.len() + 1;
        encoded.extend_from_slice(&(name.len() as u16).to_le_bytes());
        encoded.extend_from_slice(&(value.len() as u32).to_le_bytes());
        encoded.extend_from_slice(name);
        encoded.extend_from_slice(value);
    }
    if names_bytes > 1 << 16 {
        return Err(refuse("the names together are longer than 64 KiB"));
    }
    Ok(encoded)
}

/// Decodes what [`encode`] wrote.
///
/// # Errors
/// [`Error::Malformed`] when the bytes end within an attribute.
pub fn decode(mut encoded: &[u8]) -> Result<Vec<(&[u8], &[u8])>> {
    let cut = || Error::malformed("extended attributes", "cut short");
    let mut xattrs = Vec::new();
    while !encoded.is_empty() {
        let (head, rest) = encoded.split_at_checked(6).ok_or_else(cut)?;
        let (name_len, value_len) = head.split_at(2);
        let name_len = name_len
            .iter()
            .rev()
            .fold(0, |len, &byte| len << 8 | usize::from(byte));
        let value_len = value_len
            .iter()
            .rev()
            .fold(0, |len, &byte| len << 8 | usize::from(byte));
        let (name, rest) = rest.split_at_checked(name_len).ok_or_else(cut)?;
        let (value, rest) = rest.split_at_checked(value_len).ok_or_else(cut)?;
        xattrs.push((name, value));
        encoded = rest;
    }
    Ok(xattrs)
}
