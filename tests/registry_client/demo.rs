//! The client against the demo registry, which was written from the specifications and not from the client: whole
//! images over every way of authorization, redirects, and failures.

use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use registryfs::demo::{
    Account, Auth, Behaviour, Content, DemoRegistry, Fault, RangeLie, Redirect, Scope, TokenAuth,
    TokenSpelling, identity_token, sample_content,
};
use registryfs::digest::Digest;
use registryfs::error::{Error, Result};
use registryfs::registry::reference::{Repository, Target};
use registryfs::registry::{Client, ClientOptions, CredentialEnvironment, Pager, Secret};
use serde_json::json;

use super::{docker_config, quick, tag};

/// Layers are read in ranges of this length, so that each takes a few.
const RANGE_BYTES: u64 = 20_000;
/// An image by an index, of several layers.
const APPLICATION: &str = "team/billing/api";

fn start(behaviour: Behaviour) -> DemoRegistry {
    // Making the content takes longer than any of the tests.
    static CONTENT: LazyLock<Content> = LazyLock::new(|| sample_content().unwrap());
    DemoRegistry::start(CONTENT.clone(), behaviour).unwrap()
}

fn account() -> Account {
    Account::new("me", "secret")
}

fn with_token(change: impl FnOnce(&mut TokenAuth)) -> Behaviour {
    let mut auth = TokenAuth::new(account());
    change(&mut auth);
    Behaviour {
        auth: Auth::Token(auth),
        ..Behaviour::default()
    }
}

fn client(credential: Option<&str>) -> Client {
    Client::new(ClientOptions {
        credential: credential.map(Secret::new),
        ..quick()
    })
    .unwrap()
}

fn described(json: &serde_json::Value) -> (Digest, u64) {
    let digest = json["digest"].as_str().unwrap().parse().unwrap();
    (digest, json["size"].as_u64().unwrap())
}

/// Reads all of an image's first platform, every blob verified; how many bytes its layers have.
async fn read_image(client: &Client, registry: &DemoRegistry) -> Result<u64> {
    let repository = Repository::new(&registry.host(), APPLICATION).unwrap();
    let index = client.manifest(&repository, &tag("latest")).await?;
    let index: serde_json::Value = serde_json::from_slice(&index.bytes).unwrap();
    let (digest, _) = described(&index["manifests"][0]);
    let manifest = client.manifest(&repository, &Target::Digest(digest)).await?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let (config, bytes) = described(&manifest["config"]);
    client.small_blob(&repository, &config, bytes).await?;
    let mut read = 0;
    for layer in manifest["layers"].as_array().unwrap() {
        let (digest, total) = described(layer);
        let mut whole = Vec::new();
        while (whole.len() as u64) < total {
            let start = whole.len() as u64;
            let range = start..total.min(start + RANGE_BYTES);
            whole.extend_from_slice(&client.blob_bytes(&repository, &digest, range, total).await?);
        }
        assert_eq!(Digest::of(&whole), digest);
        read += total;
    }
    Ok(read)
}

async fn all(mut pager: Pager) -> Result<Vec<String>> {
    let mut names = Vec::new();
    while let Some(page) = pager.next_page().await? {
        names.extend(page);
    }
    Ok(names)
}

#[tokio::test]
async fn an_image_is_read_over_every_way_of_authorization() {
    let spellings = [
        TokenSpelling::Token,
        TokenSpelling::AccessToken,
        TokenSpelling::Both,
    ];
    let refresh = format!("<token>:{}", identity_token(&account()));
    let basic = Behaviour {
        auth: Auth::Basic(account()),
        ..Behaviour::default()
    };
    let private = |auth: &mut TokenAuth| auth.anonymous_pull = false;
    let mut ways = vec![
        (Behaviour::default(), None),
        (basic, Some("me:secret")),
        (with_token(|_| ()), None),
        (with_token(private), Some("me:secret")),
        (with_token(private), Some(refresh.as_str())),
        (with_token(|auth| auth.tell_expiry = false), None),
    ];
    ways.extend(spellings.map(|spelling| (with_token(|auth| auth.spelling = spelling), None)));
    for (behaviour, credential) in ways {
        let shown = format!("{:?}", behaviour.auth);
        let registry = start(behaviour);
        let read = read_image(&client(credential), &registry).await;
        assert!(read.is_ok(), "{shown}: {read:?}");
    }
}

#[tokio::test]
async fn an_answer_says_whether_credentials_went_with_its_question() {
    let basic = Behaviour {
        auth: Auth::Basic(account()),
        ..Behaviour::default()
    };
    let refresh = format!("<token>:{}", identity_token(&account()));
    let closed = |auth: &mut TokenAuth| auth.private = vec![APPLICATION.to_owned()];
    // The last: whether anyone may have it.
    let ways = [
        (Behaviour::default(), Some("me:secret"), false, true),
        (with_token(|_| ()), None, false, true),
        (with_token(|_| ()), Some("me:secret"), true, true),
        (with_token(closed), Some("me:secret"), true, false),
        (with_token(closed), Some(refresh.as_str()), true, false),
        (basic, Some("me:secret"), true, false),
    ];
    for (behaviour, credential, with_credentials, for_everyone) in ways {
        let shown = format!("{:?}", behaviour.auth);
        let registry = start(behaviour);
        let repository = Repository::new(&registry.host(), APPLICATION).unwrap();
        let client = client(credential);
        let tag = Target::Tag("latest".to_owned());
        // The first is asked without, and refused; later ones carry what helped.
        for _ in 0..2 {
            let manifest = client.manifest(&repository, &tag).await.unwrap();
            assert_eq!(manifest.with_credentials, with_credentials, "{shown}");
        }
        let mut tags = client.tags(&repository);
        tags.next_page().await.unwrap().unwrap();
        assert_eq!(tags.with_credentials(), with_credentials, "{shown}");
        let digest = client.manifest(&repository, &tag).await.unwrap().digest;
        let nobody = client.without_credentials().unwrap();
        let given = nobody.has_manifest(&repository, &digest).await;
        assert_eq!(given == Ok(true), for_everyone, "{shown}: {given:?}");
    }
}

#[tokio::test]
async fn files_of_other_tools_are_where_credentials_are() {
    let registry = start(with_token(|auth| auth.anonymous_pull = false));
    let folder = tempfile::tempdir().unwrap();
    let host = registry.host();
    let password = json!({"auth": STANDARD.encode("me:secret")});
    let identity = json!({"auth": STANDARD.encode("me:"), "identitytoken": identity_token(&account())});
    let wrong = json!({"auth": STANDARD.encode("me:wrong")});
    let namespace = APPLICATION.rsplit_once('/').unwrap().0;
    for (auths, good) in [
        (json!({format!("http://{host}"): password}), true),
        (json!({&host: identity}), true),
        (
            json!({&host: wrong, format!("{host}/{namespace}"): password}),
            true,
        ),
        (
            json!({&host: password, format!("{host}/{namespace}"): wrong}),
            false,
        ),
        (json!({format!("{host}/elsewhere"): password}), false),
    ] {
        let shown = auths.to_string();
        std::fs::write(
            folder.path().join("config.json"),
            json!({"auths": auths}).to_string(),
        )
        .unwrap();
        let as_docker = docker_config(folder.path());
        let as_podman = CredentialEnvironment {
            registry_auth_file: Some(folder.path().join("config.json")),
            ..CredentialEnvironment::default()
        };
        for credential_environment in [as_docker, as_podman] {
            let client = Client::new(ClientOptions {
                credential_environment,
                ..quick()
            })
            .unwrap();
            let read = read_image(&client, &registry).await;
            assert_eq!(read.is_ok(), good, "{shown}: {read:?}");
        }
    }
}

#[tokio::test]
async fn without_credentials_a_private_registry_denies() {
    for behaviour in [
        with_token(|auth| auth.anonymous_pull = false),
        Behaviour {
            auth: Auth::Basic(account()),
            ..Behaviour::default()
        },
    ] {
        let registry = start(behaviour);
        for credential in [None, Some("me:wrong")] {
            let error = read_image(&client(credential), &registry).await.unwrap_err();
            assert!(matches!(error, Error::Denied { .. }), "{credential:?}: {error}");
        }
    }
}

#[tokio::test]
async fn a_cold_range_and_a_later_one_cost_the_round_trips_they_must() {
    let registry = start(Behaviour {
        redirect: Some(Redirect::default()),
        ..with_token(|_| ())
    });
    let client = client(None);
    let repository = Repository::new(&registry.host(), "tools/cli/lint").unwrap();
    let manifest = client.manifest(&repository, &tag("latest")).await.unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let (digest, total) = described(&manifest["layers"][0]);
    let lines = || -> Vec<String> {
        let ledger = registry.handle().ledger();
        let line = |record: &registryfs::demo::Record| format!("{:?} {}", record.endpoint, record.status);
        ledger.iter().map(line).collect()
    };
    assert_eq!(lines(), ["Registry 401", "Token 200", "Registry 200"]);
    registry.handle().clear_ledger();
    client
        .blob_bytes(&repository, &digest, 0..100, total)
        .await
        .unwrap();
    assert_eq!(lines(), ["Registry 307", "Storage 206"]);
    registry.handle().clear_ledger();
    client
        .blob_bytes(&repository, &digest, 100..200, total)
        .await
        .unwrap();
    assert_eq!(lines(), ["Storage 206"]);
    let authorized = registry
        .handle()
        .ledger()
        .iter()
        .any(|record| record.had_authorization);
    assert!(!authorized, "the storage is another host");
}

#[tokio::test]
async fn tokens_and_signed_urls_that_expire_midway_are_renewed() {
    let registry = start(Behaviour {
        redirect: Some(Redirect::default()),
        ..with_token(|_| ())
    });
    let client = client(None);
    read_image(&client, &registry).await.unwrap();
    for _ in 0..3 {
        registry.handle().expire_tokens();
        registry.handle().expire_signed_urls();
        read_image(&client, &registry).await.unwrap();
    }
}

#[tokio::test]
async fn a_registry_that_fails_often_is_read_all_the_same() {
    for redirect in [None, Some(Redirect::default())] {
        let registry = start(Behaviour {
            failure_rate: 0.3,
            seed: 7,
            redirect,
            ..with_token(|_| ())
        });
        let client = Client::new(ClientOptions {
            retries: 30,
            ..quick()
        })
        .unwrap();
        read_image(&client, &registry).await.unwrap();
        let retries: u64 = client.health().iter().map(|host| host.retries).sum();
        assert!(retries > 0);
    }
}

#[tokio::test]
async fn every_lie_about_a_range_is_caught_or_fails_verification() {
    for lie in [RangeLie::WrongHeader, RangeLie::ShortBody] {
        let registry = start(Behaviour::default());
        registry
            .handle()
            .inject(Scope::containing("/blobs/"), Fault::Range(lie));
        let error = read_image(&client(None), &registry).await.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{lie:?}: {error}");
    }
    let registry = start(Behaviour::default());
    registry
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::Range(RangeLie::WholeBody));
    read_image(&client(None), &registry).await.unwrap();
    registry
        .handle()
        .inject(Scope::containing("/blobs/").next(1), Fault::FlipByte(3));
    let error = read_image(&client(None), &registry).await.unwrap_err();
    assert!(matches!(error, Error::Verification { .. }), "{error}");
    registry
        .handle()
        .inject(Scope::containing("/manifests/").next(1), Fault::WrongDigestHeader);
    let error = read_image(&client(None), &registry).await.unwrap_err();
    assert!(matches!(error, Error::Verification { .. }), "{error}");
}

#[tokio::test]
async fn a_body_that_stalls_is_asked_for_again() {
    let registry = start(Behaviour::default());
    let stall = Fault::Stall {
        after_bytes: 10,
        pause: None,
    };
    registry
        .handle()
        .inject(Scope::containing("/blobs/").next(4), stall);
    let mut options = quick();
    options.timing.stall = Duration::from_millis(200);
    let client = Client::new(options).unwrap();
    read_image(&client, &registry).await.unwrap();
}

#[tokio::test]
async fn lists_are_the_same_however_they_are_paged() {
    let mut lists = BTreeSet::new();
    for (page_entries_max, refuse_large_pages, link_header) in [
        (1000, true, true),
        (1000, true, false),
        (70, false, true),
        (100, true, true),
        (100, true, false),
    ] {
        let registry = start(Behaviour {
            page_entries_max,
            refuse_large_pages,
            link_header,
            ..Behaviour::default()
        });
        let client = client(None);
        let repository = Repository::new(&registry.host(), "ci/nightly").unwrap();
        let tags = all(client.tags(&repository)).await.unwrap();
        let catalog = all(client.catalog(&registry.host())).await.unwrap();
        assert!(tags.len() >= 5000 && catalog.len() > 50);
        lists.insert((tags, catalog));
        let others = registry.handle().ledger();
        assert!(
            others
                .iter()
                .all(|record| record.path.ends_with("/tags/list") || record.path.ends_with("/_catalog"))
        );
    }
    assert_eq!(lists.len(), 1);
}

#[tokio::test]
async fn a_registry_without_a_catalog_says_so() {
    let registry = start(Behaviour {
        catalog: false,
        ..Behaviour::default()
    });
    let error = all(client(None).catalog(&registry.host())).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn a_killed_registry_fails_fast_and_works_when_it_is_back() {
    let registry = start(Behaviour::default());
    let client = client(None);
    read_image(&client, &registry).await.unwrap();
    registry.handle().stop();
    let error = read_image(&client, &registry).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    let error = read_image(&client, &registry).await.unwrap_err();
    assert!(error.to_string().contains("has been down"), "{error}");
    registry.handle().restart().unwrap();
    let works_again = async {
        while read_image(&client, &registry).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), works_again)
        .await
        .unwrap();
}
