//! What integration tests share: demo registries with images made on the spot.

// Each test binary uses its own part of this.
#![allow(dead_code)]
// Helpers outside of test functions are tests too.
#![allow(clippy::unwrap_used)]

use registryfs::demo::{
    Account, Auth, Behaviour, Content, DemoRegistry, Image, ImageBuilder, Layer, TokenAuth,
};
use registryfs::digest::Digest;
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::writer::Options;

/// An entry of a layer with its payload.
pub(crate) type File = (Entry, Vec<u8>);

/// A regular file with mode 0644.
pub(crate) fn file(path: &str, payload: impl Into<Vec<u8>>) -> File {
    (Entry::new(path, Kind::File), payload.into())
}

/// A directory with mode 0755.
pub(crate) fn dir(path: &str) -> File {
    (Entry::new(path, Kind::Dir), Vec::new())
}

/// A symbolic or hard link.
pub(crate) fn link(path: &str, kind: Kind, target: &str) -> File {
    let mut entry = Entry::new(path, kind);
    entry.link = target.into();
    (entry, Vec::new())
}

/// Small, so that small files have several.
pub(crate) const CHUNK_BYTES: usize = 4096;

/// Whether a line says that a chunk of a file with this content, in a layer with chunks of [`CHUNK_BYTES`], is another one.
pub(crate) fn says_what_is_wrong(line: &str, content: &[u8]) -> bool {
    let mut digests = content.chunks(CHUNK_BYTES).map(Digest::of);
    digests.any(|digest| line.contains(&format!("expected {digest}, got sha256:")))
}

/// An eStargz layer with chunks of [`CHUNK_BYTES`].
pub(crate) fn layer(entries: &[File]) -> Layer {
    let options = Options {
        chunk_bytes: CHUNK_BYTES as u64,
        ..Options::default()
    };
    Layer::estargz(entries, options).unwrap()
}

/// An image for linux/amd64 with one eStargz layer for each of `layers`, base first.
pub(crate) fn image(layers: &[&[File]]) -> Image {
    ImageBuilder::new(layers.iter().map(|entries| layer(entries)).collect()).build()
}

/// A registry with `image` as `team/app:1.0`, reachable with plain HTTP.
pub(crate) fn registry_of(image: &Image) -> DemoRegistry {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    DemoRegistry::start(content, Behaviour::default()).unwrap()
}

/// Behaviour of a registry that gives tokens to the holder of `user` and `password` only.
pub(crate) fn with_tokens(user: &str, password: &str) -> Behaviour {
    Behaviour {
        auth: Auth::Token(TokenAuth {
            anonymous_pull: false,
            ..TokenAuth::new(Account::new(user, password))
        }),
        ..Behaviour::default()
    }
}
