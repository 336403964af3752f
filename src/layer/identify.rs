//! Which format a layer has: the only place that knows them all.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::layer::estargz::{EstargzIndexer, GzipMember, TOC_DIGEST_ANNOTATION, unpack_toc};
use crate::layer::index::Index;
use crate::layer::{Descriptor, Format, Indexer, MemberDecoder};

/// The refusal of a layer of a valid format that has no lazy reading (yet).
pub(super) fn without_lazy_reading(what: &str, format: Format) -> Error {
    let name = match format {
        Format::Gzip => "plain gzip",
        Format::Zstd => "plain zstd",
        Format::Tar => "uncompressed tar",
        other => other.name(),
    };
    let why = format!("{name} layers cannot be read yet; an image converted to eStargz can");
    Error::unsupported(what, why)
}

/// What turns a layer into its index, chosen by its media type. A gzip layer is taken for eStargz until its tail says
/// otherwise.
///
/// # Errors
/// [`Error::Unsupported`] naming the format when there is none for it, [`Error::Malformed`] when an annotation of the
/// format is broken.
pub fn indexer(descriptor: &Descriptor) -> Result<Box<dyn Indexer>> {
    let what = format!("layer {}", descriptor.digest);
    let media_type = descriptor.media_type.to_ascii_lowercase();
    let is = |part: &str| media_type.contains(part);
    if is("+encrypted") {
        let why = "encrypted layers cannot be read; an image without encryption can";
        return Err(Error::unsupported(what, why));
    }
    if is(".nondistributable.") || is(".foreign.") {
        let why =
            "foreign layers are not kept by the registry; an image that was pushed with them can be read";
        return Err(Error::unsupported(what, why));
    }
    if media_type.ends_with("+gzip") || media_type.ends_with(".tar.gzip") {
        return Ok(Box::new(EstargzIndexer::new(descriptor)?));
    }
    if media_type.ends_with("+zstd") || media_type.ends_with(".tar.zstd") {
        let chunked = descriptor
            .annotations
            .keys()
            .any(|key| key.contains(".zstd-chunked."));
        let format = if chunked {
            Format::ZstdChunked
        } else {
            Format::Zstd
        };
        return Err(without_lazy_reading(&what, format));
    }
    if media_type.ends_with(".tar") {
        return Err(without_lazy_reading(&what, Format::Tar));
    }
    let why = format!(
        "layers of type {:?} cannot be read; an image converted to eStargz can",
        descriptor.media_type
    );
    Err(Error::unsupported(what, why))
}

/// What the manifest promises of a layer's index, in the words of its format; `None` if only the blob's digest is given,
/// which a lazy reader never gets to check.
#[must_use]
pub fn index_promise(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .annotations
        .get(TOC_DIGEST_ANNOTATION)
        .map(String::as_str)
}

/// A decoder for member `member` of a layer. It holds what it needs of the index. When a member's range is used up before
/// [`MemberDecoder::push`] has said that all is done, the member was cut short.
///
/// # Errors
/// [`Error::Malformed`] when there is no such member or the index is damaged.
pub fn decoder<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Box<dyn MemberDecoder>> {
    match index.summary().format {
        Format::Estargz => Ok(Box::new(GzipMember::new(index, member)?)),
        other => Err(without_lazy_reading("layer index", other)),
    }
}

/// A layer's table of contents in readable form, from its compressed bytes in the blob.
///
/// # Errors
/// [`Error::Malformed`] when they are none; [`Error::Unsupported`] for a format without one.
pub fn toc(format: Format, compressed: &[u8]) -> Result<Vec<u8>> {
    match format {
        Format::Estargz => unpack_toc(compressed),
        other => Err(without_lazy_reading("table of contents", other)),
    }
}

/// What a media type says of a layer that could not be indexed.
#[must_use]
pub fn format_of_media_type(media_type: &str) -> Format {
    let media_type = media_type.to_ascii_lowercase();
    match () {
        () if media_type.contains("zstd") => Format::Zstd,
        () if media_type.contains("gzip") => Format::Gzip,
        () => Format::Tar,
    }
}
