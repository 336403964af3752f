//! A registry in this process, for trying registryfs out and for its tests: the distribution API on loopback, with
//! made-up content, a ledger of every request, and faults to order.
//!
//! It stands beside the layers of the program and shares with them only what both sides of the wire must agree on:
//! digests, names and the layer formats. Nothing in it is for serving real images.

mod answer;
mod auth;
mod behaviour;
mod body;
mod command;
mod content;
mod date;
mod formats;
mod images;
mod ledger;
mod listener;
mod push;
mod read;
mod registry;
mod sample;
mod seeded;
mod server;
mod signed;
mod soci;
mod tree;

#[cfg(test)]
mod tests;

pub use auth::identity_token;
pub use behaviour::{
    Account, Auth, Behaviour, Endpoint, Fault, PAGE_ENTRIES_MAX, PathMatch, RangeLie, Redirect, RetryAfter,
    Scope, SignedStyle, Times, TokenAuth, TokenSpelling,
};
pub use command::{DemoAuth, DemoOptions, serve};
pub use content::{Content, Manifest, Repository};
pub use images::{Image, ImageBuilder, ImageIndex, Layer, Schema, toc_image};
pub use ledger::{Record, Traffic, in_sequence, traffic_by_path};
pub use registry::{DemoRegistry, Handle, Listen};
pub use sample::sample_content;
pub use soci::{LayerZtoc, SociIndex};
