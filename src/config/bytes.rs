//! Sizes as people write them.

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};

/// A number of bytes that is written as a number or as text such as `20 GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ByteSize(pub u64);

/// Reads a size in bytes: a whole number and a unit. `KiB`, `MiB`, `GiB`, `TiB`, and the bare letters as `du -h` and
/// systemd use them, are powers of 1024; `kB`, `MB`, `GB`, `TB` are powers of 1000; no unit means bytes.
///
/// # Errors
/// [`Error::Usage`] quoting the text.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let wrong = || {
        Error::usage(format!(
            "{text:?} is no size: write bytes or a size such as 20GiB"
        ))
    };
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).ok_or_else(wrong)
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "a size in bytes, as a number or as text such as \"20 GiB\""
        )]
        enum Spelling {
            Number(u64),
            Text(String),
        }
        match Spelling::deserialize(deserializer)? {
            Spelling::Number(bytes) => Ok(Self(bytes)),
            Spelling::Text(text) => parse_bytes(&text).map(Self).map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_their_units_say() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1 kB", 1000),
            ("20 GiB", 20 << 30),
            ("20g", 20 << 30),
            ("3TB", 3_000_000_000_000),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5G", "1 parsec", "99999999999T"] {
            assert_eq!(parse_bytes(text).unwrap_err().exit_code(), 2, "{text}");
        }
    }
}
