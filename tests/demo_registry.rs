//! The registry client against the demo registry: both sides of the wire were written from the same specification by
//! different means, so what they agree on is probably what it says.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use registryfs::demo::{
    DemoRegistry, Endpoint, Fault, RangeLie, Redirect, Scope, in_sequence, sample_content,
};
use registryfs::error::Result;
use registryfs::registry::reference::{Repository, Target};
use registryfs::registry::{Client, ClientOptions, Secret, Timing};

use support::{file, image, registry_of, with_tokens};

fn client(credential: Option<&str>) -> Client {
    let options = ClientOptions {
        credential: credential.map(Secret::new),

        plain_http: true,
        timing: Timing {
            backoff: Duration::from_millis(1),
            backoff_max: Duration::from_millis(10),
            ..Timing::default()
        },
        ..ClientOptions::default()
    };
    Client::new(options).unwrap()
}

#[tokio::test]
async fn the_large_repository_is_listed_by_its_tag_pages_alone() {
    let content = sample_content().unwrap();
    let expected: Vec<String> = content
        .repository("ci/nightly")
        .unwrap()
        .tags()
        .map(|(tag, _)| tag.to_owned())
        .collect();
    let registry = DemoRegistry::start(content, with_tokens("u", "p")).unwrap();
    let repository = Repository::new(&registry.host(), "ci/nightly").unwrap();
    let mut pager = client(Some("u:p")).tags(&repository);
    let mut tags = Vec::new();
    while let Some(page) = pager.next_page().await.unwrap() {
        tags.extend(page);
    }
    assert_eq!(tags, expected);
    let others: Vec<_> = registry
        .handle()
        .ledger()
        .into_iter()
        .filter(|record| record.endpoint == Endpoint::Registry && !record.path.ends_with("/tags/list"))
        .map(|record| record.path)
        .collect();
    assert!(others.iter().all(|path| path == "/v2/"), "{others:?}");
}

/// The layer of `team/app` but for ten bytes at each end, as `client` gets it by range.
async fn read(client: &Client, registry: &DemoRegistry, made: &registryfs::demo::Image) -> Result<Vec<u8>> {
    let repository = Repository::new(&registry.host(), "team/app").unwrap();
    let layer = &made.layers[0];
    let size = layer.blob().len() as u64;
    let bytes = client
        .blob_bytes(&repository, &layer.digest(), 10..size - 10, size)
        .await?;
    Ok(bytes.to_vec())
}

#[tokio::test]
async fn tokens_and_signed_urls_are_renewed_when_they_expire() {
    let made = image(&[&[file(
        "words",
        (0..20_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(),
    )]]);
    let registry = registry_of(&made);
    let handle = registry.handle();
    handle.update(|behaviour| {
        *behaviour = with_tokens("u", "p");
        behaviour.redirect = Some(Redirect::default());
    });
    let client = client(Some("u:p"));
    let blob = made.layers[0].blob();
    let expected = &blob[10..blob.len() - 10];
    let repository = Repository::new(&registry.host(), "team/app").unwrap();
    let manifest = client
        .manifest(&repository, &Target::Tag("1.0".to_owned()))
        .await
        .unwrap();
    assert_eq!(manifest.bytes, made.manifest);

    assert_eq!(read(&client, &registry, &made).await.unwrap(), expected);
    handle.clear_ledger();
    assert_eq!(read(&client, &registry, &made).await.unwrap(), expected);
    let again = handle.ledger();
    assert_eq!(
        again.len(),
        1,
        "a kept redirect makes a miss one request: {again:?}"
    );
    assert_eq!(again[0].endpoint, Endpoint::Storage);
    assert!(!again[0].had_authorization);

    handle.expire_tokens();
    handle.expire_signed_urls();
    handle.clear_ledger();
    assert_eq!(read(&client, &registry, &made).await.unwrap(), expected);
    // Storage refuses, the registry refuses, a token, a redirect, the bytes.
    let renewal = handle.ledger();
    assert_eq!((renewal.len(), in_sequence(&renewal)), (5, 5), "{renewal:?}");
}

#[tokio::test]
async fn wrong_ranges_are_refused_and_broken_bodies_resumed() {
    let made = image(&[&[file(
        "words",
        (0..20_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(),
    )]]);
    let registry = registry_of(&made);
    let handle = registry.handle();
    let client = client(None);
    let blob = made.layers[0].blob();
    let expected = &blob[10..blob.len() - 10];
    for lie in [RangeLie::WrongHeader, RangeLie::ShortBody] {
        handle.inject(Scope::containing("/blobs/"), Fault::Range(lie));
        assert!(read(&client, &registry, &made).await.is_err(), "{lie:?}");
        handle.clear_faults();
    }
    for fault in [Fault::Cut(1000), Fault::CutHalfway, Fault::Reset] {
        handle.inject(Scope::containing("/blobs/").next(1), fault.clone());
        assert_eq!(
            read(&client, &registry, &made).await.unwrap(),
            expected,
            "{fault:?}"
        );
    }
}
