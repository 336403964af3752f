//! Checks a member's bytes before anything is decoded from them, where its chunks have no digests of their own: collects
//! them whole, because nothing behind would notice what they became.

use std::borrow::Cow;
use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::{Index, Member};

/// The longest member in compressed bytes that is collected to check its digest. Those who promise one make a span of some
/// 4 MiB of decoded bytes; more is a block of that size that does not compress.
pub(super) const CHECKED_BYTES_MAX: u64 = 64 << 20;

/// What must be checked of a member, until it is.
#[derive(Debug)]
pub(super) struct Checked {
    /// The member, for messages.
    what: String,
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    promised: Digest,
    /// How many bytes the member has.
    len: usize,
    collected: Vec<u8>,
}

impl Checked {
    /// What must be checked of `member`, which messages call `what`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged, or the member is too long.
    pub(super) fn new<B: Deref<Target = [u8]>>(
        index: &Index<B>,
        member: &Member,
        what: String,
    ) -> Result<Self> {
        let Some(promised) = index.check(member)? else {
            return Ok(Self { what, pending: None });
        };
        let len = member.blob_end.saturating_sub(member.blob_start);
        if len > CHECKED_BYTES_MAX {
            let why = format!("{len} bytes are too many to be checked before they are decoded");
            return Err(Error::malformed(what, why));
        }
        let pending = Some(Pending {
            promised,
            len: len as usize,
            collected: Vec::new(),
        });
        Ok(Self { what, pending })
    }

    /// Takes the next bytes of the member, and gives those that may be decoded; nothing while more must come.
    ///
    /// # Errors
    /// [`Error::Verification`] when the member has another digest.
    pub(super) fn pass<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<Cow<'b, [u8]>>> {
        let Some(pending) = &mut self.pending else {
            return Ok(Some(Cow::Borrowed(bytes)));
        };
        let missing = pending.len.saturating_sub(pending.collected.len());
        let bytes = bytes.get(..missing).unwrap_or(bytes);
        // Mostly the first push has all of it, and then nothing is copied.
        let is_first = pending.collected.is_empty();
        if !is_first || bytes.len() < missing {
            pending.collected.extend_from_slice(bytes);
        }
        if bytes.len() < missing {
            return Ok(None);
        }
        let whole = match is_first {
            true => Cow::Borrowed(bytes),
            false => Cow::Owned(std::mem::take(&mut pending.collected)),
        };
        let (promised, actual) = (pending.promised, Digest::of(&whole));
        if actual != promised {
            return Err(Error::mismatch(&self.what, promised, actual));
        }
        self.pending = None;
        Ok(Some(whole))
    }
}
