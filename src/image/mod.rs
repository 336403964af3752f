//! From a reference to files: what names mean now, manifests and platforms, layers, and the merged tree.
//!
//! Below a digest nothing changes, so everything built here is built once and kept in the store: documents, the layers'
//! indexes, the merged trees. Only [`resolve`] knows about time.

pub mod answers;
pub mod copy;
pub mod erofs;
pub mod eviction;
pub mod images;
pub mod indexes;
pub mod kernel;
mod listed;
pub mod manifest;
pub mod openness;
pub mod plan;
pub mod platform;
pub mod profile;
pub mod query;
pub mod reads;
pub mod recorded;
pub mod resolve;
pub mod select;
mod soci;
pub mod tree;

pub use images::{Image, Images, Named, Rootfs};
pub use query::OpenFile;
