//! The header of a gzip member (RFC 1952, 2.3), skipped in pieces of any size.

/// Longest file name or comment in a header in bytes. With an extra field of at most 64 KiB this bounds the header.
const TEXT_BYTES_MAX: usize = 4096;

/// A header that is being skipped.
#[derive(Debug, Default)]
pub(in crate::layer) struct Header {
    /// Its bytes so far, until it is complete.
    collected: Vec<u8>,
}

impl Header {
    /// Whether no byte of it has come yet.
    pub(in crate::layer) fn is_empty(&self) -> bool {
        self.collected.is_empty()
    }

    /// Takes what belongs to the header off `bytes`. Returns how many bytes those are, or nothing while the header goes on
    /// behind all of them.
    ///
    /// # Errors
    /// When it is no header, or too long.
    pub(in crate::layer) fn take(&mut self, bytes: &[u8]) -> Result<Option<usize>, &'static str> {
        let before = self.collected.len();
        // Nearly always the first piece has all of it, and then nothing is copied.
        if before == 0
            && let Some(len) = header_bytes(bytes)?
        {
            return Ok(Some(len));
        }
        self.collected.extend_from_slice(bytes);
        let taken = header_bytes(&self.collected)?.map(|len| len.saturating_sub(before));
        if taken.is_some() {
            self.collected = Vec::new();
        }
        Ok(taken)
    }
}

/// Length of the gzip header (RFC 1952, 2.3) at the start of `bytes`; nothing while it is not complete.
fn header_bytes(bytes: &[u8]) -> Result<Option<usize>, &'static str> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    const RESERVED: u8 = 0xe0;
    if !bytes.starts_with(&[0x1f, 0x8b, 8]) && bytes.len() >= 3 {
        return Err("it does not start like gzip");
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<10>() else {
        return Ok(None);
    };
    let flags = fixed[3];
    if flags & RESERVED != 0 {
        return Err("its header has flags that no reader knows");
    }
    let mut rest = rest;
    if flags & EXTRA != 0 {
        let Some((len, behind)) = rest.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let Some(behind) = behind.get(usize::from(u16::from_le_bytes(*len))..) else {
            return Ok(None);
        };
        rest = behind;
    }
    for text in [NAME, COMMENT] {
        if flags & text != 0 {
            let text = rest.get(..TEXT_BYTES_MAX).unwrap_or(rest);
            let Some(end) = text.iter().position(|&byte| byte == 0) else {
                if text.len() == TEXT_BYTES_MAX {
                    return Err("its header has a name or comment of over 4 KiB");
                }
                return Ok(None);
            };
            rest = rest.get(end + 1..).unwrap_or_default();
        }
    }
    if flags & CRC != 0 {
        let Some((_, behind)) = rest.split_first_chunk::<2>() else {
            return Ok(None);
        };
        rest = behind;
    }
    Ok(Some(bytes.len() - rest.len()))
}
