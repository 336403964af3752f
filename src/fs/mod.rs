//! The tree of names as operations on inodes: what the kernel asks and what it is answered, without a FUSE type in sight,
//! so that all of it is tested without a kernel.

pub mod ops;
