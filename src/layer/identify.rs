//! Which format a layer has: the only place that knows them all.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::layer::estargz::{EstargzIndexer, GzipMember, TOC_DIGEST_ANNOTATION, unpack_toc};
use crate::layer::gzip::decompress::GzipPass;
use crate::layer::gzip::span::Span;
use crate::layer::index::{Coding, Index};
use crate::layer::zstd::{self, ZstdDecompressor, ZstdMember};
use crate::layer::zstd_chunked::{self, ZstdChunkedIndexer};
use crate::layer::{Decoded, Decompressor, Descriptor, Format, Indexer, MemberDecoder, Step};

/// What turns a layer into its index. `ztoc` is the blob that a SOCI index names for it.
///
/// A layer is read by ranges only if its manifest promises a digest of what its format calls the table of contents: else
/// nothing but the blob's own digest vouches for it, and that takes one pass over the blob.
///
/// # Errors
/// [`Error::Unsupported`] for what is no layer of files or cannot be read, [`Error::Malformed`] when an annotation of the
/// format is broken.
pub fn indexer(descriptor: &Descriptor, ztoc: Option<&Descriptor>) -> Result<Box<dyn Indexer>> {
    let what = format!("layer {}", descriptor.digest);
    let media_type = descriptor.media_type.to_ascii_lowercase();
    if media_type.contains("+encrypted") {
        let why = "encrypted layers cannot be read; an image without encryption can";
        return Err(Error::unsupported(what, why));
    }
    if !media_type.contains("tar") {
        let why = format!(
            "{:?} is no type of a layer with files; this is another artifact than an image",
            descriptor.media_type
        );
        return Err(Error::unsupported(what, why));
    }
    if ztoc.is_some() {
        return Ok(Box::new(WholeBlob));
    }
    if let Some(indexer) = ZstdChunkedIndexer::new(descriptor)? {
        return Ok(Box::new(indexer));
    }
    if estargz_promise(descriptor).is_some() {
        return Ok(Box::new(EstargzIndexer::new(descriptor)?));
    }
    Ok(Box::new(WholeBlob))
}

/// The promise of an eStargz TOC. What says to be zstd has none: there it is a second promise beside those of
/// zstd:chunked, or of a TOC that nobody knows the place of.
fn estargz_promise(descriptor: &Descriptor) -> Option<&str> {
    let is_zstd = format_of_media_type(&descriptor.media_type) == Format::Zstd;
    let promise = descriptor.annotations.get(TOC_DIGEST_ANNOTATION);
    promise.map(String::as_str).filter(|_| !is_zstd)
}

/// Asks for one pass over the blob.
struct WholeBlob;

impl Indexer for WholeBlob {
    fn step(&mut self, _: Option<&[u8]>) -> Result<Step> {
        Ok(Step::Pass)
    }
}

/// What decompresses a blob that starts with `first`: by what the bytes say, because media types are often wrong. A dozen
/// bytes are enough, or all that there are.
#[must_use]
pub fn decompressor(first: &[u8]) -> Box<dyn Decompressor> {
    match first {
        [0x1f, 0x8b, ..] => Box::new(GzipPass::default()),
        _ if zstd::is_zstd(first) => Box::new(ZstdDecompressor::default()),
        _ => Box::new(Uncompressed),
    }
}

/// Decompresses nothing: plain tar.
#[derive(Debug)]
struct Uncompressed;

impl Decompressor for Uncompressed {
    fn format(&self) -> Format {
        Format::Tar
    }

    fn push(&mut self, blob: &[u8], out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        out(Decoded::Bytes(blob))
    }

    fn finish(&mut self, _: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        Ok(())
    }
}

/// What vouches for a layer's index, in words that are equal only where the content is: the digest that the manifest
/// promises for its table of contents, or, as one pass checks it, the blob's own.
#[must_use]
pub fn index_promise(descriptor: &Descriptor, ztoc: Option<&Descriptor>) -> String {
    if let Some(ztoc) = ztoc {
        return format!("ztoc {}", ztoc.digest);
    }
    if let Some(promise) = zstd_chunked::promise(&descriptor.annotations) {
        return promise;
    }
    estargz_promise(descriptor).map_or_else(|| "blob".to_owned(), |toc| format!("index {toc}"))
}

/// A decoder for member `member` of a layer. It holds what it needs of the index. When a member's range is used up before
/// [`MemberDecoder::push`] has said that all is done, the member was cut short.
///
/// # Errors
/// [`Error::Malformed`] when there is no such member or the index is damaged.
pub fn decoder<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Box<dyn MemberDecoder>> {
    match index.member(member)?.coding {
        Coding::Gzip => Ok(Box::new(GzipMember::new(index, member)?)),
        Coding::Deflate => Ok(Box::new(Span::new(index, member)?)),
        Coding::Zstd => Ok(Box::new(ZstdMember::new(index, member)?)),
        other => Err(Error::unsupported("layer index", format!("coding {other:?}"))),
    }
}

/// A layer's table of contents in readable form, from its compressed bytes in the blob.
///
/// # Errors
/// [`Error::Malformed`] when they are none; [`Error::Unsupported`] for a format without one.
pub fn toc(format: Format, compressed: &[u8]) -> Result<Vec<u8>> {
    match format {
        Format::Estargz => unpack_toc(compressed),
        Format::ZstdChunked => zstd_chunked::unpack_toc(compressed),
        other => Err(Error::unsupported("table of contents", other.name())),
    }
}

/// What a media type says of a layer that is not indexed.
#[must_use]
pub fn format_of_media_type(media_type: &str) -> Format {
    let media_type = media_type.to_ascii_lowercase();
    match () {
        () if media_type.contains("zstd") => Format::Zstd,
        () if media_type.contains("gzip") => Format::Gzip,
        () => Format::Tar,
    }
}
