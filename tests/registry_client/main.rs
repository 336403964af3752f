//! The registry client against a scripted server on loopback: what a registry may do to it, and what it must never
//! do to a registry.

// Helpers outside of test functions are tests too.
#![allow(clippy::unwrap_used)]

mod auth;
mod blobs;
mod certificates;
mod client_certificates;
mod credentials;
mod demo;
mod foreign;
mod manifests;
mod mirrors;
mod outages;
mod paging;
mod proxies;
mod proxy;
mod pushes;
mod pushes_odd;
mod referrers;
mod secrets;
mod server;
mod tls;

use std::path::Path;
use std::time::Duration;

use registryfs::digest::Digest;
use registryfs::registry::reference::{Repository, Target};
use registryfs::registry::{Client, ClientOptions, CredentialEnvironment, Timing};

use server::Server;

/// Waits short enough for tests. Nothing here depends on how long they really are.
fn quick() -> ClientOptions {
    ClientOptions {
        plain_http: true,
        timing: Timing {
            unreachable: Duration::from_millis(100),
            backoff: Duration::from_millis(1),
            backoff_max: Duration::from_millis(10),
            probe_interval: Duration::from_millis(50),
            ..Timing::default()
        },
        ..ClientOptions::default()
    }
}

/// Where docker's `config.json` in `folder` is all there is.
fn docker_config(folder: &Path) -> CredentialEnvironment {
    CredentialEnvironment {
        docker_config: Some(folder.to_owned()),
        ..CredentialEnvironment::default()
    }
}

fn client() -> Client {
    Client::new(quick()).unwrap()
}

fn repository(server: &Server, path: &str) -> Repository {
    Repository::new(&server.host(), path).unwrap()
}

fn tag(name: &str) -> Target {
    Target::Tag(name.to_owned())
}

/// A blob whose every byte tells its place.
fn blob(bytes: usize) -> (Vec<u8>, Digest) {
    let blob: Vec<u8> = (0..bytes).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect();
    let digest = Digest::of(&blob);
    (blob, digest)
}
