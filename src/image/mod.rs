//! image

pub mod tree;
