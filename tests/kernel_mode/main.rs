//! The whole program through system calls where the kernel's EROFS serves what the program fetches. Needs root, and a kernel
//! that mounts EROFS from files (6.12, with CONFIG_EROFS_FS_BACKED_BY_FILE): whether it does is found out by
//! `kernel = "require"`, which then says what is missing.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod access;
mod damage;
mod ends;
mod failures;
mod faults;
mod ground;
mod limits;
mod modes;
mod namespaces;
mod neighbours;
mod occupied;
mod record;
mod same;
mod seen;
#[path = "../support/mod.rs"]
mod support;
mod tags;
mod trees;
mod uses;
#[path = "../mount/world.rs"]
mod world;
