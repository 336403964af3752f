//! Puts an image of an OCI layout into a registry, in those formats that no tool of a distribution writes: by our own
//! writers, each from the same layers.
//!
//! ```text
//! lab_formats LAYOUT TAG REGISTRY/REPOSITORY
//! ```
//!
//! The layers of the image must be plain gzip. The images come from a demo registry in this process, from which skopeo takes
//! them to the other one: so both of our ends are checked by it. For `scripts/lab`.

use std::error::Error;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use flate2::read::MultiGzDecoder;
use registryfs::demo::{
    Behaviour, Content, DemoRegistry, Image, ImageBuilder, Layer, LayerZtoc, SociIndex, toc_image,
};
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::writer::{Options, Variant};
use registryfs::layer::index::Index;
use registryfs::layer::scan::LayerScanner;
use registryfs::layer::soci::writer as soci;
use registryfs::layer::{ContentSink, Format};
use serde_json::Value;

type Result<T> = std::result::Result<T, Box<dyn Error>>;
/// The entries of a layer with their content.
type Entries = Vec<(Entry, Vec<u8>)>;

/// Where the images are on their way.
const REPOSITORY: &str = "formats";
/// As stargz-snapshotter's documentation recommends.
const MIN_CHUNK_BYTES: u64 = 50_000;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layout, tag, destination] = arguments.as_slice() else {
        return Err("usage: lab_formats LAYOUT TAG REGISTRY/REPOSITORY".into());
    };
    let layers = layers(Path::new(layout), tag)?;
    let demo = DemoRegistry::start(Content::new(), Behaviour::default())?;
    let put = |tag: &str, image: &Image| {
        demo.handle()
            .edit(|content| content.add_tagged_image(REPOSITORY, tag, image));
        copy(&format!("{}/{REPOSITORY}", demo.host()), destination, tag)
    };
    let estargz = |options| written(&layers, |entries| Layer::estargz(entries, options));
    let packed = Options {
        min_chunk_bytes: MIN_CHUNK_BYTES,
        ..Options::default()
    };
    put("estargz-min-chunk", &ImageBuilder::new(estargz(packed)?).build())?;
    let variant = |variant| Options {
        variant,
        ..Options::default()
    };
    put(
        "stargz",
        &ImageBuilder::new(estargz(variant(Variant::Legacy))?).build(),
    )?;
    let (image, index) = soci(&layers)?;
    let index = demo.handle().edit(|content| index.add_to(content, REPOSITORY));
    demo.handle()
        .edit(|content| content.tag(REPOSITORY, "soci-index", index));
    copy(
        &format!("{}/{REPOSITORY}", demo.host()),
        destination,
        "soci-index",
    )?;
    put("soci", &image)?;
    let external = estargz(variant(Variant::ExternalToc))?;
    put("estargz-external-esgztoc", &toc_image(&external))?;
    put("estargz-external", &ImageBuilder::new(external).build())
}

/// Plain gzip layers and their index of version 2.
fn soci(layers: &[Entries]) -> Result<(Image, SociIndex)> {
    let options = soci::Options {
        layout: soci::Layout::Gzip,
        span_bytes: soci::SPAN_BYTES,
    };
    let (layers, ztocs): (Vec<Layer>, Vec<LayerZtoc>) = written(layers, |entries| {
        let layer = Layer::gzip(entries)?;
        let ztoc = LayerZtoc::new(&layer, entries, options)?;
        Ok((layer, ztoc))
    })?
    .into_iter()
    .unzip();
    let index = SociIndex::v2(&ztocs);
    let mut image = ImageBuilder::new(layers);
    image.annotations = [index.annotation()].into();
    Ok((image.build(), index))
}

/// All layers at once, for they take a while.
fn written<T: Send>(
    layers: &[Entries],
    write: impl Fn(&Entries) -> registryfs::error::Result<T> + Sync,
) -> Result<Vec<T>> {
    let write = &write;
    std::thread::scope(|scope| {
        let writers: Vec<_> = layers
            .iter()
            .map(|entries| scope.spawn(move || write(entries)))
            .collect();
        writers
            .into_iter()
            .map(|writer| Ok(writer.join().map_err(|_| "a writer panicked")??))
            .collect()
    })
}

/// Copies one image, byte for byte.
fn copy(from: &str, to: &str, tag: &str) -> Result<()> {
    let done = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"])
        .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
        .arg(format!("docker://{from}:{tag}"))
        .arg(format!("docker://{to}:{tag}"))
        .status()?;
    done.success()
        .then_some(())
        .ok_or_else(|| format!("skopeo could not copy {tag}").into())
}

/// What is in each layer of an image, base first.
fn layers(layout: &Path, tag: &str) -> Result<Vec<Entries>> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let images = index["manifests"].as_array().ok_or("no manifests")?;
    let tagged = images
        .iter()
        .find(|image| image["annotations"]["org.opencontainers.image.ref.name"] == *tag)
        .ok_or("no such tag")?;
    let manifest: Value = serde_json::from_slice(&blob(layout, tagged)?)?;
    let layers = manifest["layers"].as_array().ok_or("no layers")?;
    layers
        .iter()
        .map(|layer| entries(&blob(layout, layer)?))
        .collect()
}

fn blob(layout: &Path, descriptor: &Value) -> Result<Vec<u8>> {
    let digest = descriptor["digest"].as_str().ok_or("no digest")?;
    let path = layout.join("blobs").join(digest.replace(':', "/"));
    Ok(fs::read(path)?)
}

/// Keeps the content of a layer's files where its index says that it is.
#[derive(Default)]
struct Data(Vec<u8>);

impl ContentSink for Data {
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> registryfs::error::Result<()> {
        self.0.resize(data_offset as usize, 0);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// What is in a layer of plain gzip.
fn entries(blob: &[u8]) -> Result<Entries> {
    let mut tar = Vec::new();
    MultiGzDecoder::new(blob).read_to_end(&mut tar)?;
    let (mut scanner, mut data) = (LayerScanner::new(Format::Tar), Data::default());
    scanner.push(&tar, &mut data)?;
    let index = Index::open(scanner.finish(tar.len() as u64)?.index.to_vec())?;
    (0..index.entry_count())
        .map(|number| entry(&index, number, &data.0))
        .collect()
}

fn entry(index: &Index<Vec<u8>>, number: u32, data: &[u8]) -> Result<(Entry, Vec<u8>)> {
    let found = index.entry(number)?;
    let mut entry = Entry::new(found.path, found.kind);
    (entry.mode, entry.uid, entry.gid) = (found.mode, found.uid, found.gid);
    entry.mtime = found.mtime;
    entry.link = found.link.to_vec();
    entry.rdev = found.rdev;
    let owned = |(name, value): (&[u8], &[u8])| (name.to_vec(), value.to_vec());
    entry.xattrs = index.xattrs(&found)?.into_iter().map(owned).collect();
    let mut content = Vec::new();
    if found.kind == Kind::File && found.size > 0 {
        let start = found.data_offset as usize;
        entry.size = found.size;
        content = data
            .get(start..start + found.size as usize)
            .ok_or("no content")?
            .to_vec();
    }
    Ok((entry, content))
}
