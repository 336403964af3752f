//! Headers of zstd frames (RFC 8878, 3.1): what a frame claims before any of it is decoded.
//!
//! libzstd reads them too. They are read here first because only here a refusal can say what is wrong with which number,
//! and because a frame's start in the blob is needed to decode from there again.

/// The largest window that is accepted: that of `zstd --ultra --long=27`, the most that the command decodes by itself.
pub(super) const WINDOW_BYTES_MAX: u64 = 1 << 27;
/// Length of the header of a skippable frame: magic number and length.
pub(in crate::layer) const SKIPPABLE_HEADER_BYTES: u64 = 8;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The last three bytes of a skippable frame's magic number, whose first is 0x50 to 0x5f.
const SKIPPABLE_MAGIC: [u8; 3] = [0x2a, 0x4d, 0x18];

/// What the first bytes of a frame say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    /// A frame with content.
    Frame,
    /// This many bytes follow that no reader of content wants.
    Skippable(u64),
}

/// Whether a blob that starts with `first` is zstd.
pub(in crate::layer) fn is_zstd(first: &[u8]) -> bool {
    first.starts_with(&MAGIC) || is_skippable(first)
}

fn is_skippable(first: &[u8]) -> bool {
    first.get(1..4) == Some(&SKIPPABLE_MAGIC) && first.first().is_some_and(|byte| byte & 0xf0 == 0x50)
}

/// Reads the header at the start of `bytes`; nothing while it is not complete.
///
/// # Errors
/// Why there is none, or why its frame is not decoded.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<Header>, String> {
    let Some((magic, rest)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    if is_skippable(magic) {
        let length = rest.first_chunk().map(|length| u32::from_le_bytes(*length));
        return Ok(length.map(|length| Header::Skippable(u64::from(length))));
    }
    if *magic != MAGIC {
        return Err("what is there is no zstd frame".to_owned());
    }
    let Some((&descriptor, rest)) = rest.split_first() else {
        return Ok(None);
    };
    if descriptor & 0b1000 != 0 {
        return Err("its header has a bit that no reader knows".to_owned());
    }
    let is_single_segment = descriptor & 0b10_0000 != 0;
    let window_len = usize::from(!is_single_segment);
    let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 0b11)];
    let content_len = match descriptor >> 6 {
        0 => usize::from(is_single_segment),
        power => 1 << power,
    };
    let Some((window, rest)) = rest.split_at_checked(window_len) else {
        return Ok(None);
    };
    let Some((dictionary, rest)) = rest.split_at_checked(dictionary_len) else {
        return Ok(None);
    };
    let Some(content) = rest.get(..content_len) else {
        return Ok(None);
    };
    if dictionary.iter().any(|&byte| byte != 0) {
        return Err("it was compressed with a dictionary that the layer does not have".to_owned());
    }
    let window_bytes = match window.first() {
        Some(&window) => {
            let base = 1u64 << (10 + (window >> 3));
            base + base / 8 * u64::from(window & 7)
        }
        // The content is its own window; one that has a size of two bytes is 256 longer than they say.
        None => little_endian(content) + if content_len == 2 { 256 } else { 0 },
    };
    if window_bytes > WINDOW_BYTES_MAX {
        let most = WINDOW_BYTES_MAX >> 20;
        return Err(format!(
            "it needs a window of {window_bytes} bytes, and {most} MiB are the most; compress the layer anew without a \
             longer one"
        ));
    }
    Ok(Some(Header::Frame))
}

/// The number in at most 8 bytes.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
}
