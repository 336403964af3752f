//! registryfs mounts container registries as one directory tree; see `ARCHITECTURE.md` for the map.
//!
//! Modules import only downwards: `cli`, `get`, `convert`, `daemon`, `kernel`, `fuse`, `fs`, `image`, `fetch`, `store`, `registry`, `layer`, then
//! `config`, `digest` and `error`. `demo` stands beside them: a registry for trying and for tests.

pub mod cli;
pub mod config;
pub mod convert;
pub mod daemon;
pub mod demo;
pub mod digest;
pub mod error;
pub mod fetch;
pub mod fs;
pub mod fuse;
pub mod get;
pub mod image;
pub mod kernel;
pub mod layer;
pub mod registry;
pub mod store;
