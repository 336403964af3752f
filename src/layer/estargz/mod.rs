//! eStargz: a gzip member a chunk, and a table of contents (TOC) at the end of the blob.

pub mod footer;
pub mod writer;

/// The annotation of a layer's descriptor that promises the TOC's digest.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// The tar entry that holds the TOC.
pub const TOC_NAME: &str = "stargz.index.json";
/// The file that ends the part of a layer that is to be prefetched.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// The file that says that nothing is to be prefetched.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// The one byte of a landmark.
pub const LANDMARK_BYTE: u8 = 0x0f;
