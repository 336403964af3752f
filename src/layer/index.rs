//! The index of one layer.
