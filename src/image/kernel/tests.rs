//! Kernel images in the store.
