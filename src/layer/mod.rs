//! Layer formats.

pub mod index;
