//! JSON that registries, layouts and other tools give.

use std::sync::Arc;

use registryfs::image::manifest::{Document, choose};
use registryfs::image::platform::Platform;
use registryfs::layer::spool::InMemory;
use registryfs::layer::{self, Descriptor};
use registryfs::registry::parsers;
use registryfs::registry::reference::{Repository, is_tag};

use crate::engine::{Shape, Target};
use crate::samples::digest;

const WORDS: [&[u8]; 40] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"\"\"",
    b"1e400",
    b"-1",
    b"\"\\ud800\"",
    b"\"\\u0000\"",
    b"\"layers\":[",
    b"\"manifests\":[",
    b"\"config\":{",
    b"\"mediaType\":\"",
    b"\"digest\":\"sha256:",
    b"\"size\":",
    b"\"annotations\":{",
    b"\"urls\":[\"http://",
    b"\"platform\":{\"os\":\"linux\",\"architecture\":\"arm\",\"variant\":\"v7\"}",
    b"\"artifactType\":\"x\"",
    b"\"subject\":{",
    b"\"schemaVersion\":1",
    b"\"fsLayers\":[]",
    b"\"tags\":[",
    b"\"repositories\":[",
    b"\"errors\":[{\"code\":\"",
    b"\"token\":\"",
    b"\"access_token\":\"",
    b"\"expires_in\":",
    b"\"refresh_token\":\"",
    b"\"auths\":{",
    b"\"auth\":\"",
    b"\"credHelpers\":{",
    b"\"credsStore\":\"",
    b"\"identitytoken\":\"",
    b"org.opencontainers.image.ref.name",
    b"io.containerd.image.name",
    b"+encrypted",
];

pub(crate) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "manifest",
            seeds: manifests(),
            words: &WORDS,
            run: Box::new(manifest),
        },
        Target {
            name: "registry-answers",
            seeds: answers(),
            words: &WORDS,
            run: Box::new(|body| {
                let mut shape = Shape::default();
                shape.result(parsers::token(body), Shape::count);
                shape.result(parsers::names(body), |shape, names| {
                    shape.count(names.len() as u64);
                });
                let of_type = parsers::referrers(body, "application/vnd.amazon.soci.index.v1+json");
                shape.result(of_type, |shape, found| shape.count(found.len() as u64));
                if let Some(text) = parsers::refusal(body) {
                    assert!(text.chars().count() <= 310 && !text.contains('\n'), "{text:?}");
                    shape.note("refusal");
                }
                shape
            }),
        },
        Target {
            name: "layout-index",
            seeds: layouts(),
            words: &WORDS,
            run: Box::new(|body| {
                let mut shape = Shape::default();
                shape.result(parsers::layout_index(body), |shape, repositories| {
                    for (repository, tags) in &repositories {
                        assert!(
                            Repository::new("layout.example", repository).is_ok(),
                            "{repository:?}"
                        );
                        assert!(tags.iter().all(|tag| is_tag(tag)), "{tags:?}");
                        shape.count(tags.len() as u64);
                    }
                    shape.count(repositories.len() as u64);
                });
                shape
            }),
        },
        Target {
            name: "credentials",
            seeds: credentials(),
            words: &WORDS,
            run: Box::new(|body| {
                let mut shape = Shape::default();
                for (host, path) in [
                    ("docker.io", "library/debian"),
                    ("r.example:5000", "a/b"),
                    ("r.example", ""),
                ] {
                    shape.result(parsers::credentials(body, host, path), |shape, found| {
                        shape.count(found as u64);
                    });
                }
                shape
            }),
        },
    ]
}

fn manifest(body: &[u8]) -> Shape {
    let mut shape = Shape::default();
    for header in [None, Some("application/vnd.oci.image.manifest.v1+json")] {
        shape.result(parsers::manifest_type(header, body), |shape, media_type| {
            shape.note(media_type);
        });
    }
    let of = |descriptor: &Descriptor, shape: &mut Shape| {
        let (format, reading) = layer::expected(descriptor, None);
        shape.note((format, reading, layer::takes_ztoc(descriptor)));
        shape.note(layer::index_promise(descriptor, None) == layer::WHOLE_BLOB);
        shape.result(
            layer::indexer(descriptor, None, Arc::new(InMemory)),
            |shape, mut indexer| {
                shape.result(indexer.step(None), |shape, _| shape.note("begun"));
                shape.result(indexer.step(Some(b"other")), |shape, _| shape.note("goes on"));
            },
        );
    };
    shape.result(Document::parse("input", body), |shape, document| match document {
        Document::Manifest(manifest) => {
            manifest.layers.iter().for_each(|layer| of(layer, shape));
            shape.note(manifest.subject.is_some());
        }
        Document::Index(entries) => {
            let platform: Platform = "linux/arm/v7".parse().unwrap();
            let chosen = choose(&entries, &platform);
            assert!(chosen.is_none_or(|chosen| platform.accepts(&chosen.platform)));
            shape.note(chosen.is_some());
            shape.count(entries.len() as u64);
        }
    });
    shape
}

fn manifests() -> Vec<Vec<u8>> {
    let descriptor = |number: u8, media_type: &str, more: &str| {
        format!(
            r#"{{"mediaType":"{media_type}","digest":"{}","size":{}{more}}}"#,
            digest(number),
            1000 + u32::from(number)
        )
    };
    let oci = "application/vnd.oci.image";
    let toc = digest(9);
    let estargz = format!(r#","annotations":{{"containerd.io/snapshot/stargz/toc.digest":"{toc}"}}"#);
    let chunked = format!(
        r#","annotations":{{"io.github.containers.zstd-chunked.manifest-checksum":"{toc}","io.github.containers.zstd-chunked.manifest-position":"100:200:300:1"}}"#
    );
    let image = format!(
        r#"{{"schemaVersion":2,"mediaType":"{oci}.manifest.v1+json","config":{},"layers":[{},{},{},{}],"annotations":{{"com.amazon.soci.index-digest":"{toc}"}},"subject":{}}}"#,
        descriptor(0, &format!("{oci}.config.v1+json"), ""),
        descriptor(1, &format!("{oci}.layer.v1.tar+gzip"), &estargz),
        descriptor(2, &format!("{oci}.layer.v1.tar+zstd"), &chunked),
        descriptor(
            3,
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            r#","urls":["https://x.example/b"]"#
        ),
        descriptor(4, &format!("{oci}.layer.v1.tar+gzip+encrypted"), ""),
        descriptor(5, &format!("{oci}.manifest.v1+json"), "")
    );
    let platform = |os: &str, variant: &str| {
        format!(r#","platform":{{"os":"{os}","architecture":"arm"{variant}}},"artifactType":null"#)
    };
    let manifest = format!("{oci}.manifest.v1+json");
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{},{},{}]}}"#,
        descriptor(1, &manifest, &platform("linux", r#","variant":"v7""#)),
        descriptor(2, &manifest, &platform("linux", "")),
        descriptor(3, &manifest, &platform("unknown", ""))
    );
    let schema_1 = r#"{"schemaVersion":1,"fsLayers":[{"blobSum":"x"}],"history":[]}"#;
    [image.as_str(), &index, schema_1]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

fn answers() -> Vec<Vec<u8>> {
    let referrers = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"digest":"{}","size":1,"artifactType":"application/vnd.amazon.soci.index.v1+json"}}]}}"#,
        digest(1)
    );
    [
        r#"{"token":"abc","access_token":"abc","expires_in":300,"issued_at":"2026-01-01T00:00:00Z","refresh_token":"r"}"#,
        r#"{"name":"a/b","tags":["1","latest","v1.0-rc.1"]}"#,
        r#"{"repositories":["a","a/b"]}"#,
        r#"{"errors":[{"code":"DENIED","message":"no\nway","detail":{}},{"code":"X","message":null}]}"#,
        &referrers,
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn layouts() -> Vec<Vec<u8>> {
    let entry = |number: u8, annotations: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":7{annotations}}}"#,
            digest(number)
        )
    };
    let names = [
        r#","annotations":{"org.opencontainers.image.ref.name":"1.0"}"#,
        r#","annotations":{"org.opencontainers.image.ref.name":"docker.io/library/debian:12"}"#,
        r#","annotations":{"io.containerd.image.name":"ghcr.io/a/b:x","org.opencontainers.image.ref.name":"x"}"#,
        "",
        r#","artifactType":"x""#,
    ];
    let entries: Vec<String> = (0..)
        .zip(names)
        .map(|(number, name)| entry(number, name))
        .collect();
    vec![format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(",")).into_bytes()]
}

fn credentials() -> Vec<Vec<u8>> {
    [
        r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dXNlcjpwYXNz"},"r.example:5000":{"username":"u","password":"p"},"r.example/a":{"identitytoken":"t"}},"credHelpers":{"docker.io":"pass"},"credsStore":"desktop"}"#,
        r#"{"auths":{"docker.io/library":{"auth":"dTpw"},"r.example":{"registrytoken":"t","auth":""}}}"#,
        r#"{"https://r.example/v2/":{"auth":"dTpw","email":"x"}}"#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
