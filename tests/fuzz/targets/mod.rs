//! The parsers, one target each, or one for several small ones of a kind.

mod documents;
mod erofs;
mod estargz;
mod files;
mod passes;
mod settings;
mod soci;
mod spans;
mod text;
mod zstd_chunked;

use crate::engine::Target;

/// All targets.
pub(crate) fn all() -> Vec<Target> {
    [
        estargz::targets(),
        zstd_chunked::targets(),
        soci::targets(),
        spans::targets(),
        passes::targets(),
        files::targets(),
        erofs::targets(),
        documents::targets(),
        settings::targets(),
        text::targets(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
