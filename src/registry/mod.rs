//! The registry client: references, authentication, transport with retries, manifests, blobs, catalog and tags.
//!
//! It writes nothing to disk, unless a layout is opened to write to. In memory it keeps what makes the next request
//! cheaper: open connections, tokens, the URLs behind redirects, and what it learned about each host.
//!
//! From top to bottom: `client` is what others use; it answers from a `layout` on disk where one has the host's name, and
//! `source` is what both kinds of answers have in common; `manifest`, `blob`, `paging`, `referrers` and `push` know what to
//! ask for and how to judge what comes; they ask the `endpoint`s of a registry one after the other, which `hosts` finds in the
//! settings, and for blobs that it does not have the URLs that their descriptor names (`foreign`), at hosts that are `stranger`s;
//! `request` adds authorization (`auth`, `token`, `credentials`, `challenge`) and follows redirects (`redirect`);
//! `transport` sends, again if need be (`retry`), to one `host` with its `breaker`; `peers` has all of these. `names` looks up
//! where they are.

pub mod reference;

mod absence;
mod answer;
mod auth;
mod blob;
mod breaker;
mod challenge;
mod client;
mod credentials;
pub mod document;
mod endpoint;
mod failure;
mod foreign;
mod host;
mod hosts;
mod layout;
mod manifest;
mod names;
mod options;
mod pace;
mod paging;
pub mod parsers;
mod patterns;
mod payload;
mod peers;
mod proxy;
mod push;
mod redirect;
mod referrers;
mod request;
mod retry;
mod secret;
mod source;
mod stranger;
mod tls;
mod token;
mod transport;

pub use client::Client;
pub use credentials::CredentialEnvironment;
pub use endpoint::Provenance;
pub use host::{HostHealth, RequestCounts};
pub use layout::{LayoutWriter, unnamed_file};
pub use manifest::{DOCKER_INDEX, DOCKER_MANIFEST, ManifestBytes, OCI_INDEX, OCI_MANIFEST};
pub use options::{ClientOptions, HostOptions, MirrorOptions, Timing};
pub use patterns::HostPatterns;
pub use push::{BlobUpload, Pushed};
pub use secret::Secret;
pub use source::{BlobBody, Pager};
