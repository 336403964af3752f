//! eStargz: a gzip member a chunk, and a table of contents (TOC) at the end of the blob.
//!
//! The manifest promises the TOC's digest in an annotation, the TOC promises a digest for every chunk, and so every byte
//! is verified before anyone sees it, without the whole blob. The TOC is found by one read of the blob's tail that is
//! mostly large enough to have all of it.
//!
//! Besides the format of today that is stargz, its predecessor (another footer; digests only of files in one chunk), and
//! the external TOC, which is a blob of an image of its own and is believed because it has the promised digest. Where no
//! TOC is to be had, or it does not vouch for every byte, the layer is the gzip blob that it also is: one pass reads it.

mod decode;
mod footer;
mod toc;
pub mod writer;

use std::ops::Range;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::{Coding, Summary};
use crate::layer::spool::{Scratch, Spooled};
use crate::layer::toc_json::{self, COMPRESSED_BYTES_MAX, Content, Place, Placement};
use crate::layer::{Descriptor, Format, Indexer, Step};

pub(super) use decode::GzipMember;
use footer::{Footer, Tail};
pub(super) use toc::unpack as unpack_toc;

/// In an image of TOCs, the annotation of a TOC's descriptor that names the layer it belongs to.
pub const LAYER_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/layer.digest";
/// The annotation of a layer's descriptor that promises the TOC's digest.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// The annotation with the size of the layer's tar, which readers that unpack it want to know before.
pub const UNCOMPRESSED_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";
/// The tar entry that holds the TOC.
pub const TOC_NAME: &str = "stargz.index.json";
/// The file that ends the part of a layer that is to be prefetched.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// The file that says that nothing is to be prefetched.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// What is at the root of a layer's tar for the format's sake, and not part of the image.
pub const OWN_FILES: [&str; 3] = [TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK];
/// The one byte of a landmark.
pub const LANDMARK_BYTE: u8 = 0x0f;

/// The first read of the tail is this part of the blob. A TOC has some 60 bytes an entry, an entry some 6 KB on average.
const TAIL_PART: u64 = 100;
/// The first read of the tail has at least this many bytes (less only if the blob has).
const TAIL_BYTES_MIN: u64 = 64 << 10;
/// The first read of the tail has at most this many bytes.
const TAIL_BYTES_MAX: u64 = 2 << 20;

/// Where eStargz has its chunks: in gzip members that end where the next one starts.
#[derive(Debug)]
pub(super) struct Members;

impl Placement for Members {
    fn what(&self) -> &'static str {
        "eStargz TOC"
    }

    fn coding(&self) -> Coding {
        Coding::Gzip
    }

    fn place(&mut self, _: &Place<'_>) -> std::result::Result<Content, &'static str> {
        Ok(Content::Data)
    }

    fn has_own_files(&self, _: u64) -> bool {
        true
    }
}

/// Makes the index of an eStargz layer from one or two ranges of its blob.
#[derive(Debug)]
pub(super) struct EstargzIndexer {
    /// The layer, for messages.
    what: String,
    blob_bytes: u64,
    /// The TOC digest that the manifest promises.
    promised: Digest,
    scratch: Arc<dyn Scratch>,
    state: State,
}

/// Which bytes come next.
#[derive(Debug)]
enum State {
    Start,
    /// The tail of the blob.
    Tail(Range<u64>),
    /// The part of the TOC before the tail; `behind` is its part in the tail.
    Rest {
        wanted: Range<u64>,
        footer: Footer,
        behind: Vec<u8>,
    },
    /// The TOC is in another image: what comes next is said to be it, or there is none.
    External,
    Done,
}

impl EstargzIndexer {
    /// An indexer for a layer whose TOC the manifest promises.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the promise is no digest, or absent: then nothing vouches for a TOC.
    pub(super) fn new(descriptor: &Descriptor, scratch: Arc<dyn Scratch>) -> Result<Self> {
        let what = format!("layer {}", descriptor.digest);
        let Some(promised) = descriptor.annotations.get(TOC_DIGEST_ANNOTATION) else {
            return Err(Error::malformed(what, "nothing promises its TOC"));
        };
        Ok(Self {
            what,
            blob_bytes: descriptor.size,
            promised: promised.parse()?,
            scratch,
            state: State::Start,
        })
    }

    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::malformed(&self.what, why)
    }

    /// The first read: the end of the blob.
    fn tail_range(&self) -> Range<u64> {
        let tail = (self.blob_bytes / TAIL_PART).clamp(TAIL_BYTES_MIN, TAIL_BYTES_MAX);
        self.blob_bytes.saturating_sub(tail)..self.blob_bytes
    }

    /// Finds the TOC in the tail, or asks for what is missing.
    fn read_tail(&mut self, wanted: &Range<u64>, tail: &[u8]) -> Result<Step> {
        let footer = match footer::parse(tail, self.blob_bytes)? {
            Tail::Footer(footer) => footer,
            Tail::ExternalToc => {
                self.state = State::External;
                return Ok(Step::NeedExternalToc);
            }
            Tail::Plain => {
                return Err(self.malformed("the manifest says that it is eStargz, but it has no footer"));
            }
        };
        let compressed_bytes = footer.toc_end - footer.toc_start;
        if compressed_bytes > COMPRESSED_BYTES_MAX {
            return Err(self.malformed(format!(
                "a TOC of {compressed_bytes} compressed bytes is too large"
            )));
        }
        let from = footer.toc_start.saturating_sub(wanted.start) as usize;
        let to = footer.toc_end.saturating_sub(wanted.start) as usize;
        let in_tail = tail
            .get(from..to)
            .ok_or_else(|| self.malformed("its footer lies"))?;
        if footer.toc_start >= wanted.start {
            return self.build(footer, [in_tail, &[]]);
        }
        let missing = footer.toc_start..wanted.start;
        self.state = State::Rest {
            wanted: missing.clone(),
            footer,
            behind: in_tail.to_vec(),
        };
        Ok(Step::Need(missing))
    }

    /// Verifies the TOC and turns it into an index.
    fn build(&self, footer: Footer, compressed: [&[u8]; 2]) -> Result<Step> {
        let json = toc::unpack(compressed, self.scratch.spool())?;
        let toc_digest = Digest::of(&json);
        if toc_digest != self.promised {
            let what = format!("TOC of {}", self.what);
            return Err(Error::mismatch(what, self.promised, toc_digest));
        }
        self.index(json, footer.toc_start..footer.toc_end, footer.toc_start)
    }

    /// Takes a blob of a TOC image for the TOC, if it holds the one that is promised. Anyone may have pushed that image,
    /// so one with another TOC says nothing of this layer.
    fn read_external(&mut self, blob: &[u8]) -> Result<Step> {
        let json = toc::unpack([blob, &[]], self.scratch.spool()).ok();
        let Some(json) = json.filter(|json| Digest::of(json) == self.promised) else {
            self.state = State::External;
            return Ok(Step::NeedExternalToc);
        };
        let data_end = self.blob_bytes.saturating_sub(footer::EXTERNAL_BYTES as u64);
        self.index(json, 0..0, data_end)
    }

    /// Turns the promised TOC into an index. `place` is where it stands in the blob, `data_end` where the data ends.
    fn index(&self, json: Spooled, place: Range<u64>, data_end: u64) -> Result<Step> {
        let toc = toc_json::read(&json, &mut Members, &self.scratch)?;
        if toc.has_unverifiable {
            return Ok(Step::Pass);
        }
        if toc.prefetch_end > data_end {
            return Err(self.malformed("its prefetch landmark lies beyond its data"));
        }
        let summary = Summary {
            toc_digest: self.promised,
            toc_start: place.start,
            toc_end: place.end,
            toc_bytes: json.len() as u64,
            prefetch_end: toc.prefetch_end,
            ..Summary::of(Format::Estargz, self.blob_bytes)
        };
        drop(json);
        Ok(Step::Done(toc.builder.finish(summary, data_end)?))
    }
}

impl Indexer for EstargzIndexer {
    fn step(&mut self, bytes: Option<&[u8]>) -> Result<Step> {
        let state = std::mem::replace(&mut self.state, State::Done);
        let wanted = match &state {
            State::Start => {
                let wanted = self.tail_range();
                self.state = State::Tail(wanted.clone());
                return Ok(Step::Need(wanted));
            }
            State::Tail(wanted) | State::Rest { wanted, .. } => wanted.clone(),
            State::External => return bytes.map_or(Ok(Step::Pass), |blob| self.read_external(blob)),
            State::Done => return Err(self.malformed("its index was asked for again after the end")),
        };
        let bytes = bytes
            .filter(|bytes| bytes.len() as u64 == wanted.end - wanted.start)
            .ok_or_else(|| self.malformed(format!("bytes {wanted:?} were asked for, but others came")))?;
        match state {
            State::Rest { footer, behind, .. } => self.build(footer, [bytes, &behind]),
            _ => self.read_tail(&wanted, bytes),
        }
    }
}

#[cfg(test)]
mod tests;
