//! Which format a layer has: the only place that knows them all.

use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::layer::estargz::{EstargzIndexer, GzipMember, OWN_FILES, TOC_DIGEST_ANNOTATION, unpack_toc};
use crate::layer::gzip::decompress::GzipPass;
use crate::layer::gzip::span::Span;
use crate::layer::index::{Coding, Index, Member};
use crate::layer::scan::LayerScanner;
use crate::layer::soci::SociIndexer;
use crate::layer::spool::{InMemory, Scratch};
use crate::layer::stored::{StoredMember, Uncompressed};
use crate::layer::zstd::{self, ZstdDecompressor, ZstdMember};
use crate::layer::zstd_chunked::{self, ZstdChunkedIndexer};
use crate::layer::{Decompressor, Descriptor, Format, Indexer, MemberDecoder, Reading, Spare, Step};

/// What turns a layer into its index. `ztoc` is the blob that a SOCI index names for it, `scratch` where an index of many
/// files is built.
///
/// A layer is read by ranges only if its manifest promises a digest of what its format calls the table of contents: else
/// nothing but the blob's own digest vouches for it, and that takes one pass over the blob.
///
/// # Errors
/// [`Error::Unsupported`] for what is no layer of files or cannot be read, [`Error::Malformed`] when an annotation of the
/// format is broken.
pub fn indexer(
    descriptor: &Descriptor,
    ztoc: Option<&Descriptor>,
    scratch: Arc<dyn Scratch>,
) -> Result<Box<dyn Indexer>> {
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
    if let Some(ztoc) = ztoc {
        return Ok(Box::new(SociIndexer::new(descriptor, ztoc, scratch)?));
    }
    if let Some(indexer) = ZstdChunkedIndexer::new(descriptor, Arc::clone(&scratch))? {
        return Ok(Box::new(indexer));
    }
    if estargz_promise(descriptor).is_some() {
        return Ok(Box::new(EstargzIndexer::new(descriptor, scratch)?));
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

/// What [`index_promise`] says of a layer for which its blob's digest vouches.
pub const WHOLE_BLOB: &str = "blob";

/// What makes the index of a layer that is read in one pass. Where the manifest promises a table of contents of a format that
/// puts files of its own into the tar, they are left out, as by the indexer of that format. Without the promise they are
/// files like others: what the blob's digest alone vouches for must be the same for every image with that blob.
#[must_use]
pub fn scanner(descriptor: &Descriptor, format: Format, scratch: Arc<dyn Scratch>) -> LayerScanner {
    let scanner = LayerScanner::spooled(format, scratch);
    let is_promised = index_promise(descriptor, None) != WHOLE_BLOB;
    if is_promised && descriptor.annotations.contains_key(TOC_DIGEST_ANNOTATION) {
        scanner.leaving_out(&OWN_FILES)
    } else {
        scanner
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
    estargz_promise(descriptor).map_or_else(|| WHOLE_BLOB.to_owned(), |toc| format!("index {toc}"))
}

/// Whether a zTOC is of use for a layer: not where the manifest promises an index of its own, which has a digest for every
/// chunk, nor for a compression that zTOCs do not know.
#[must_use]
pub fn takes_ztoc(descriptor: &Descriptor) -> bool {
    index_promise(descriptor, None) == WHOLE_BLOB
        && format_of_media_type(&descriptor.media_type) != Format::Zstd
}

/// A decoder for member `member` of a layer. It holds what it needs of the index. When a member's range is used up before
/// [`MemberDecoder::push`] has said that all is done, the member was cut short.
///
/// # Errors
/// [`Error::Malformed`] when there is no such member or the index is damaged.
pub fn decoder<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Box<dyn MemberDecoder>> {
    decoder_with(index, member, Spare::default())
}

/// As [`decoder`], with what another decoder has left.
///
/// # Errors
/// As [`decoder`].
pub fn decoder_with<B: Deref<Target = [u8]>>(
    index: &Index<B>,
    member: u32,
    spare: Spare,
) -> Result<Box<dyn MemberDecoder>> {
    match index.member(member)?.coding {
        Coding::Gzip => Ok(Box::new(GzipMember::new(index, member, spare)?)),
        Coding::Deflate => Ok(Box::new(Span::new(index, member)?)),
        Coding::Zstd => Ok(Box::new(ZstdMember::new(index, member, spare)?)),
        Coding::Stored => Ok(Box::new(StoredMember::new(index, member)?)),
    }
}

/// A layer's table of contents in readable form, from its compressed bytes in the blob.
///
/// # Errors
/// [`Error::Malformed`] when they are none; [`Error::Unsupported`] for a format without one.
pub fn toc(format: Format, compressed: &[u8]) -> Result<Vec<u8>> {
    let spool = Box::new(Vec::new());
    match format {
        Format::Estargz => unpack_toc([compressed, &[]], spool),
        Format::ZstdChunked => zstd_chunked::unpack_toc(compressed, spool),
        other => Err(Error::unsupported("table of contents", other.name())),
    }
    .map(|json| json.to_vec())
}

/// The format of a layer that is not indexed, as far as its manifest says it, and what reading it will cost.
#[must_use]
pub fn expected(descriptor: &Descriptor, ztoc: Option<&Descriptor>) -> (Format, Reading) {
    let is_promised = index_promise(descriptor, ztoc) != WHOLE_BLOB;
    let format = match format_of_media_type(&descriptor.media_type) {
        _ if ztoc.is_some() => Format::Soci,
        Format::Zstd if is_promised => Format::ZstdChunked,
        // Media types are often wrong, also that of an eStargz layer that says to be a tar.
        _ if is_promised => Format::Estargz,
        format => format,
    };
    let reading = match indexer(descriptor, ztoc, Arc::new(InMemory)) {
        Err(_) => Reading::Refused,
        Ok(_) if is_promised => Reading::Ranges,
        Ok(_) => Reading::PassNeeded,
    };
    (format, reading)
}

/// What reading a layer costs that is indexed.
#[must_use]
pub fn reading<B: Deref<Target = [u8]>>(index: &Index<B>) -> Reading {
    if index.summary().passed().is_none() {
        return Reading::Ranges;
    }
    let is_whole = |member| {
        matches!(
            member,
            Ok(Member {
                coding: Coding::Zstd,
                ..
            })
        )
    };
    match index.member_count() {
        1 if is_whole(index.member(0)) => Reading::KeptWhole,
        _ => Reading::PassDone,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    /// The index that a pass makes of a tar with a landmark in it.
    fn index_of_pass(descriptor: &Descriptor) -> Vec<u8> {
        struct Nowhere;
        impl crate::layer::ContentSink for Nowhere {
            fn content(&mut self, _: u64, _: &[u8]) -> Result<()> {
                Ok(())
            }
        }
        let mut tar = tar::Builder::new(Vec::new());
        for name in [".prefetch.landmark", "file"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            header.set_cksum();
            tar.append_data(&mut header, name, &b"x"[..]).unwrap();
        }
        let mut scanner = scanner(descriptor, Format::Tar, Arc::new(InMemory));
        let tar = tar.into_inner().unwrap();
        scanner.push(&tar, &mut Nowhere).unwrap();
        scanner.finish(tar.len() as u64).unwrap().index.to_vec()
    }

    #[test]
    fn what_the_blobs_digest_alone_vouches_for_is_the_same_for_every_image() {
        let layer = |media_type: &str, promise: bool| Descriptor {
            media_type: format!("application/vnd.oci.image.layer.v1.tar{media_type}"),
            digest: Digest::of(b""),
            size: 1,
            annotations: promise
                .then(|| (TOC_DIGEST_ANNOTATION.to_owned(), Digest::of(b"").to_string()))
                .into_iter()
                .collect(),
            urls: Vec::new(),
        };
        let plain = layer("+gzip", false);
        // An annotation that promises nothing in this format.
        let odd = layer("+zstd", true);
        let lazy = layer("+gzip", true);
        assert_eq!(index_promise(&plain, None), index_promise(&odd, None));
        assert!(index_of_pass(&plain) == index_of_pass(&odd));
        assert_ne!(index_promise(&plain, None), index_promise(&lazy, None));
        assert!(
            index_of_pass(&plain) != index_of_pass(&lazy),
            "its own files are left out"
        );
    }

    #[test]
    fn the_manifest_says_what_reading_will_cost() {
        let layer = |media_type: &str, promise: Option<&str>| Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(b""),
            size: 1,
            annotations: promise
                .map(|key| (key.to_owned(), Digest::of(b"").to_string()))
                .into_iter()
                .collect(),
            urls: Vec::new(),
        };
        let oci = "application/vnd.oci.image.layer.v1.tar";
        let gzip = layer(&format!("{oci}+gzip"), None);
        let lazy = layer(&format!("{oci}+gzip"), Some(TOC_DIGEST_ANNOTATION));
        let docker = layer("application/vnd.docker.image.rootfs.diff.tar.gzip", None);
        for (descriptor, ztoc, said) in [
            (&gzip, None, (Format::Gzip, Reading::PassNeeded)),
            (&docker, None, (Format::Gzip, Reading::PassNeeded)),
            (&gzip, Some(&lazy), (Format::Soci, Reading::Ranges)),
            (&lazy, None, (Format::Estargz, Reading::Ranges)),
            (
                &layer(&format!("{oci}+zstd"), None),
                None,
                (Format::Zstd, Reading::PassNeeded),
            ),
            (&layer(oci, None), None, (Format::Tar, Reading::PassNeeded)),
            (
                &layer(oci, Some(TOC_DIGEST_ANNOTATION)),
                None,
                (Format::Estargz, Reading::Ranges),
            ),
            (
                &layer(&format!("{oci}+gzip+encrypted"), None),
                None,
                (Format::Gzip, Reading::Refused),
            ),
        ] {
            assert_eq!(expected(descriptor, ztoc), said, "{descriptor:?}");
        }
    }
}
