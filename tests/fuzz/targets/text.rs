//! Short texts: names that users give, headers that registries send, fields of other formats.

use registryfs::config::{Credential, parse_bytes};
use registryfs::digest::Digest;
use registryfs::image::platform::Platform;
use registryfs::image::profile;
use registryfs::image::select::Pattern;
use registryfs::layer::time::{format_rfc3339, parse_rfc3339};
use registryfs::layer::xattrs;
use registryfs::registry::parsers;
use registryfs::registry::reference::{Reference, Repository, is_component, is_host, is_tag};

use crate::engine::{Shape, Target};
use crate::samples::digest;

const REFERENCE_WORDS: &[&[u8]] = &[
    b":",
    b"/",
    b"@",
    b"sha256:",
    b"..",
    b"__",
    b"-",
    b"[",
    b"]",
    b"docker.io",
    b"library/",
    b"localhost",
    b"\xc3\xa4",
];
const HEADER_WORDS: &[&[u8]] = &[
    b"Bearer ",
    b"Basic ",
    b"realm=",
    b"service=",
    b"scope=",
    b"error=",
    b"\"",
    b"\\",
    b",",
    b";",
    b"=",
    b" ",
    b"<",
    b">",
    b"rel=\"next\"",
    b"bytes ",
    b"-",
    b"/*",
    b"\n",
    b"http://",
    b"169.254.169.254",
    b"[::1]",
];
const PATTERN_WORDS: &[&[u8]] = &[
    b"**", b"*", b"?", b"[", b"]", b"[!", b"{", b"}", b"\\", b"/", b"..", b"-", b"\xff",
];
const PROFILE_WORDS: &[&[u8]] = &[
    b"{\"path\":\"",
    b"\"}",
    b"\"pathBytes\":\"",
    b",",
    b"\n",
    b"{",
    b"..",
    b"/",
    b"\\u0000",
    b"\xff",
    b"=",
];
const FIELD_WORDS: &[&[u8]] = &[
    b"Z",
    b"+",
    b"-",
    b"T",
    b":",
    b".",
    b"0000",
    b"9999",
    b"user.",
    b"\xff\xff\xff\xff",
];

pub(crate) fn targets() -> Vec<Target> {
    let bytes = |texts: &[&str]| {
        texts
            .iter()
            .map(|text| text.as_bytes().to_vec())
            .collect::<Vec<_>>()
    };
    let pinned = format!("quay.io/a/b:1@{}", digest(1));
    let encoded = xattrs::encode(&[(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), vec![])]);
    vec![
        Target {
            name: "reference",
            seeds: bytes(&[
                "debian",
                "ghcr.io/a/b__c/d-e:v1",
                "localhost:5000/x",
                "[::1]:5000/a:1",
                &pinned,
                "linux/arm64/v8",
                "20 GiB",
                "user:pass",
            ]),
            words: REFERENCE_WORDS,
            run: Box::new(reference),
        },
        Target {
            name: "headers",
            seeds: bytes(&[
                r#"Bearer realm="https://auth.example/token",service="r",scope="repository:a:pull",error="insufficient_scope""#,
                "Basic realm=\"x\"\nBearer realm=\"http://localhost/t\"",
                r#"</v2/_catalog?last=b&n=2>; rel="next", <x>; rel=prev"#,
                "bytes 0-99/1000",
                "bytes 5-9/*",
                "socks5h://u:p@proxy.example:1080",
            ]),
            words: HEADER_WORDS,
            run: Box::new(headers),
        },
        Target {
            name: "patterns",
            seeds: bytes(&["usr/**/*.so", "/etc/[a-z]*", "a\\*b", "?x/..", "[!a]"]),
            words: PATTERN_WORDS,
            run: Box::new(|input| {
                let mut shape = Shape::default();
                shape.result(Pattern::parse(input), |shape, pattern| {
                    shape.count(format!("{pattern:?}").len() as u64);
                });
                shape
            }),
        },
        profile_target(),
        Target {
            name: "fields",
            seeds: [
                bytes(&["2020-02-29T23:59:60.999999999Z", "1969-12-31T00:00:00+01:00"]),
                vec![encoded.unwrap()],
            ]
            .concat(),
            words: FIELD_WORDS,
            run: Box::new(fields),
        },
    ]
}

fn profile_target() -> Target {
    Target {
        name: "profile",
        seeds: vec![
            [
                profile::line(b"usr/bin/env", &Digest::of(b"m"), 3).unwrap(),
                profile::line(b"na\xffme", &Digest::of(b"m"), 0).unwrap(),
            ]
            .concat(),
            b"/etc/passwd\n\n./{odd}\n{\"path\":\"a\\nb\"}\n".to_vec(),
        ],
        words: PROFILE_WORDS,
        run: Box::new(|input| {
            let mut shape = Shape::default();
            shape.result(profile::parse(input), |shape, paths| {
                let packed = profile::pack(&paths);
                assert_eq!(profile::unpack(&packed).unwrap(), paths);
                shape.count(paths.len() as u64);
            });
            shape
        }),
    }
}

fn reference(input: &[u8]) -> Shape {
    let mut shape = Shape::default();
    let Ok(text) = std::str::from_utf8(input) else {
        return shape;
    };
    shape.result(text.parse::<Reference>(), |shape, reference| {
        let shown = reference.to_string();
        assert_eq!(shown.parse::<Reference>().as_ref(), Ok(&reference), "{shown}");
        assert!(
            reference.repository.path().split('/').all(is_component),
            "{shown}"
        );
        assert!(reference.tag.iter().all(|tag| is_tag(tag)), "{shown}");
        shape.note((reference.tag.is_some(), reference.digest.is_some()));
        shape.count(shown.matches('/').count() as u64);
    });
    let repository = text
        .split_once('/')
        .map(|(host, path)| Repository::new(host, path));
    if let Some(Ok(repository)) = repository {
        assert!(is_host(repository.host()), "{repository}");
        shape.note("repository");
    }
    shape.result(text.parse::<Platform>(), |shape, platform| {
        assert_eq!(platform.to_string().parse(), Ok(platform.clone()));
        assert!(!platform.dir_name().contains('/'));
        shape.note(platform.variant.is_some());
    });
    shape.result(text.parse::<Digest>(), |_, digest| {
        assert_eq!(digest.to_string(), text);
    });
    shape.result(text.parse::<Credential>(), |shape, _| shape.note("credential"));
    shape.result(parse_bytes(text), Shape::count);
    shape.note((is_host(text), is_component(text), is_tag(text)));
    shape
}

fn headers(input: &[u8]) -> Shape {
    let mut shape = Shape::default();
    if let Some(challenge) = parsers::challenge(input) {
        shape.count(challenge.len() as u64);
    }
    if let Ok(text) = std::str::from_utf8(input) {
        if let Some(target) = parsers::next_link(text) {
            assert!(!target.contains('>'), "{target}");
            shape.note("link");
        }
        if let Some((range, length)) = parsers::content_range(text) {
            assert!(range.start < range.end);
            shape.note(length.is_some());
        }
        shape.note(parsers::is_proxy(text));
    }
    shape
}

fn fields(input: &[u8]) -> Shape {
    let mut shape = Shape::default();
    if let Some(time) = std::str::from_utf8(input).ok().and_then(parse_rfc3339) {
        assert!(time.nanos < 1_000_000_000);
        if let Some(shown) = format_rfc3339(time.seconds) {
            let again = parse_rfc3339(&shown).map(|time| time.seconds);
            assert_eq!(again, Some(time.seconds), "{shown}");
        }
        shape.note("time");
    }
    let decoded = xattrs::decode(input).map(|xattrs| {
        let owned = |(name, value): &(&[u8], &[u8])| (name.to_vec(), value.to_vec());
        xattrs.iter().map(owned).collect::<Vec<_>>()
    });
    shape.result::<Vec<(Vec<u8>, Vec<u8>)>>(decoded, |shape, decoded| shape.count(decoded.len() as u64));
    shape
}
