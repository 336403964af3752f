//! One image in every layer format: the same two layers, a repository each below `formats/`, so that a comparison of any two
//! of them shows nothing.

use crate::error::Result;
use crate::layer::entry::Entry;
use crate::layer::estargz::writer::{Options, Variant};
use crate::layer::soci::writer as ztoc;
use crate::layer::zstd_chunked::writer::{self as zstd_chunked, Version};

use super::content::Content;
use super::images::{Image, ImageBuilder, Layer, toc_image};
use super::soci::{LayerZtoc, SociIndex};
use super::tree;

/// Where the repositories are.
const PREFIX: &str = "formats";
/// The tags of each of them, all of the same image.
const TAGS: [&str; 3] = ["1.0", "1", "latest"];
/// Small, so that files of a few hundred KB have several chunks.
const CHUNK_BYTES: u64 = 64 << 10;
/// In the layers with a least chunk size, the compressed bytes of a member: dozens of small files.
const MIN_CHUNK_BYTES: u64 = 50_000;
/// Fast rather than small, as all of the sample.
const LEVEL: u32 = 1;
/// Bytes of the tar in each of several gzip members or zstd frames.
const MEMBER_BYTES: usize = 128 << 10;

/// Bytes of the tar in a span of a layer with a zTOC: small, so that there are several.
const SPAN_BYTES: u64 = 64 << 10;

/// What a layer is made of.
type Entries = Vec<(Entry, Vec<u8>)>;

/// A format's name, which its repository has, and what writes an image of these layers in it.
type Format = (&'static str, fn(&[Entries]) -> Result<Image>);

const FORMATS: [Format; 12] = [
    ("tar", |layers| image(layers, Layer::tar)),
    ("gzip", |layers| image(layers, Layer::gzip)),
    ("gzip-members", |layers| {
        image(layers, |entries| Layer::gzip_members(entries, MEMBER_BYTES))
    }),
    ("zstd", |layers| image(layers, Layer::zstd)),
    ("zstd-frames", |layers| {
        image(layers, |entries| Layer::zstd_frames(entries, MEMBER_BYTES))
    }),
    ("docker", |layers| {
        let layers = layers.iter().map(|entries| Layer::gzip(entries));
        Ok(ImageBuilder::new(layers.collect::<Result<_>>()?).docker().build())
    }),
    ("estargz", |layers| estargz(layers, Options::default())),
    ("estargz-packed", |layers| {
        let min_chunk_bytes = MIN_CHUNK_BYTES;
        estargz(
            layers,
            Options {
                min_chunk_bytes,
                ..Options::default()
            },
        )
    }),
    ("stargz", |layers| variant(layers, Variant::Legacy)),
    ("external-toc", |layers| variant(layers, Variant::ExternalToc)),
    ("zstd-chunked", |layers| {
        zstd_chunked(layers, Version::Storage1_50)
    }),
    ("zstd-chunked-stargz", |layers| {
        zstd_chunked(layers, Version::Stargz)
    }),
];

fn image(layers: &[Entries], write: impl Fn(&[(Entry, Vec<u8>)]) -> Result<Layer>) -> Result<Image> {
    let layers = layers.iter().map(|entries| write(entries));
    Ok(ImageBuilder::new(layers.collect::<Result<_>>()?).build())
}

fn estargz(layers: &[Entries], options: Options) -> Result<Image> {
    let options = Options {
        level: LEVEL,
        // Stargz cannot vouch for parts of files, so it has none.
        chunk_bytes: match options.variant {
            Variant::Legacy => options.chunk_bytes,
            _ => CHUNK_BYTES,
        },
        ..options
    };
    image(layers, |entries| Layer::estargz(entries, options))
}

fn variant(layers: &[Entries], variant: Variant) -> Result<Image> {
    estargz(
        layers,
        Options {
            variant,
            ..Options::default()
        },
    )
}

fn zstd_chunked(layers: &[Entries], version: Version) -> Result<Image> {
    let options = zstd_chunked::Options {
        version,
        ..zstd_chunked::Options::default()
    };
    image(layers, |entries| Layer::zstd_chunked(entries, options))
}

/// Adds the repositories.
///
/// # Errors
/// Whatever the writers of the layers find wrong with the made-up trees.
pub(super) fn add_formats(content: &mut Content) -> Result<()> {
    let layers = [tree::base(12, "amd64"), tree::application("formats", 2, "2.0")];
    for (format, write) in FORMATS {
        let repository = format!("{PREFIX}/{format}");
        let image = write(&layers)?;
        let digest = content.add_image(&repository, &image);
        let tocs = toc_image(&image.layers);
        for tag in TAGS {
            content.tag(&repository, tag, digest);
            if !tocs.layers.is_empty() {
                content.add_tagged_image(&repository, format!("{tag}-esgztoc"), &tocs);
            }
        }
    }
    add_soci(content, &layers)
}

/// The same as plain gzip, with a SOCI index that the manifest names.
fn add_soci(content: &mut Content, layers: &[Entries]) -> Result<()> {
    let repository = format!("{PREFIX}/soci");
    let options = ztoc::Options {
        layout: ztoc::Layout::Gzip,
        span_bytes: SPAN_BYTES,
    };
    let (mut made, mut ztocs) = (Vec::new(), Vec::new());
    for entries in layers {
        let layer = Layer::gzip(entries)?;
        ztocs.push(LayerZtoc::new(&layer, entries, options)?);
        made.push(layer);
    }
    let index = SociIndex::v2(&ztocs);
    index.add_to(content, &repository);
    let mut builder = ImageBuilder::new(made);
    builder.annotations.extend([index.annotation()]);
    let digest = content.add_image(&repository, &builder.build());
    for tag in TAGS {
        content.tag(&repository, tag, digest);
    }
    Ok(())
}
