//! The whole program through system calls: the real command mounts a registry of this process, and files are read as users
//! read them. Every request is counted in the registry's ledger. Mounting needs root and /dev/fuse.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod background;
mod clothes;
mod contents;
mod estargz;
mod faults;
mod foreign;
mod formats;
mod freshness;
mod indexes;
#[path = "../support/layout.rs"]
mod layout;
mod layouts;
mod merge;
mod mirrors;
mod names;
mod names_more;
mod oddities;
mod outage;
mod pass_faults;
mod passes;
mod readers;
mod record;
mod reuse;
mod secrets;
mod shared_indexes;
mod sharing;
mod soci;
mod sources;
mod store;
#[path = "../support/mod.rs"]
mod support;
mod tars;
mod tools;
mod users;
mod users_stage;
mod waiters;
mod wire;
mod world;
mod zstd;
