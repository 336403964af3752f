//! Kernel mode: merged trees that the kernel's EROFS serves, with us behind its devices.
//!
//! The tree that `fs` shows stays underneath and is equal. Nothing here is needed for a read to be right, only for it to
//! be fast: where anything fails, the tree underneath serves.

pub mod probe;
