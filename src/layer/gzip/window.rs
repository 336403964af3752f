//! The window of a checkpoint: the decoded bytes before it that deflate may refer back to, kept compressed as zstd.

use crate::error::{Error, Result};

/// The largest window in bytes: as far as deflate refers back (RFC 1951, 2).
pub const WINDOW_BYTES_MAX: usize = 32 << 10;
/// zstd's default: higher levels gain next to nothing on 32 KiB.
const LEVEL: i32 = 3;

/// Compresses a window. No window is no bytes.
///
/// # Errors
/// [`Error::Malformed`] when it is larger than a window can be; [`Error::Io`] when there is no memory for compressing it.
pub fn pack(window: &[u8]) -> Result<Vec<u8>> {
    if window.len() > WINDOW_BYTES_MAX {
        return Err(Error::malformed("deflate window", "it is larger than 32 KiB"));
    }
    if window.is_empty() {
        return Ok(Vec::new());
    }
    zstd::bulk::compress(window, LEVEL).map_err(|error| Error::io("compressing a deflate window", &error))
}

/// Decompresses a window, which may come from anybody.
///
/// # Errors
/// [`Error::Malformed`] when it is none, or larger than a window can be.
pub fn unpack(packed: &[u8]) -> Result<Vec<u8>> {
    if packed.is_empty() {
        return Ok(Vec::new());
    }
    let refuse = |why: &str| Error::malformed("deflate window", why);
    let window = zstd::bulk::decompress(packed, WINDOW_BYTES_MAX)
        .map_err(|_| refuse("it is not compressed as zstd, or is larger than 32 KiB"))?;
    if window.is_empty() {
        return Err(refuse("it is compressed, but of nothing"));
    }
    Ok(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_comes_back_as_it_was() {
        for len in [0, 1, 300, WINDOW_BYTES_MAX - 1, WINDOW_BYTES_MAX] {
            let window: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
            let packed = pack(&window).unwrap();
            assert_eq!(unpack(&packed).unwrap(), window);
            assert!(
                len <= 300 || packed.len() < len / 2,
                "{len} bytes became {}",
                packed.len()
            );
        }
    }

    #[test]
    fn what_is_no_window_is_refused() {
        assert!(pack(&[0; WINDOW_BYTES_MAX + 1]).is_err());
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], LEVEL).unwrap();
        let just_over = zstd::bulk::compress(&[0; WINDOW_BYTES_MAX + 1], LEVEL).unwrap();
        let two = [pack(&[1; 20_000]).unwrap(), pack(&[2; 20_000]).unwrap()].concat();
        let good = pack(b"window").unwrap();
        let cut = &good[..good.len() - 1];
        let trailing = [&good[..], b"more"].concat();
        let of_nothing = zstd::bulk::compress(&[], LEVEL).unwrap();
        for bad in [
            &bomb[..],
            &just_over,
            &two,
            cut,
            &trailing,
            &of_nothing,
            b"window",
            &[0],
        ] {
            assert!(
                matches!(unpack(bad), Err(Error::Malformed { .. })),
                "{} bytes",
                bad.len()
            );
        }
    }
}
