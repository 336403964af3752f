//! From a reference to files: manifests, platforms, layers and the merged tree.

pub mod answers;
pub mod platform;
pub mod tree;
