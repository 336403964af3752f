//! Which endpoints a registry has, from our own options, `hosts.toml` and the certificates of docker and podman.

use std::path::PathBuf;

use super::*;

fn options(dir: &std::path::Path) -> ClientOptions {
    ClientOptions {
        certs_dirs: vec![dir.to_owned()],
        ..ClientOptions::default()
    }
}

fn put(dir: &std::path::Path, path: &str, text: &str) -> PathBuf {
    let path = dir.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

/// Name, whether it is the registry itself, and path of each endpoint.
fn summary(options: &ClientOptions, registry: &str) -> Vec<(String, bool, String)> {
    let specs = resolve(options, registry).unwrap();
    let summary = specs
        .into_iter()
        .map(|spec| (spec.name, spec.is_registry, spec.base.path));
    summary.collect()
}

fn row(name: &str, is_registry: bool) -> (String, bool, String) {
    (name.to_owned(), is_registry, "/v2".to_owned())
}

#[test]
fn without_any_word_the_registry_is_its_own_endpoint() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["docker.io", "a.example:5000", "[::1]:5000"] {
        assert_eq!(summary(&options(dir.path()), name), [row(name, true)]);
    }
}

#[test]
fn a_hosts_toml_gives_mirrors_before_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let mirrors = "[host.\"https://z.example\"]\n[host.\"http://a.example\"]\n";
    put(dir.path(), "docker.io/hosts.toml", mirrors);
    let expected = [
        row("z.example", false),
        row("a.example:80", false),
        row("docker.io", true),
    ];
    assert_eq!(summary(&options(dir.path()), "docker.io"), expected);
    put(
        dir.path(),
        "x.example/hosts.toml",
        "server = \"https://real.example\"\n[host.\"https://x.example\"]",
    );
    let expected = [row("x.example", true), row("real.example", false)];
    assert_eq!(summary(&options(dir.path()), "x.example"), expected);
}

#[test]
fn a_last_host_that_is_the_server_is_not_asked_twice() {
    let dir = tempfile::tempdir().unwrap();
    let text = "server = \"https://docker.io\"\nskip_verify = true\n[host.\"https://registry-1.docker.io\"]\nca = \"ca.pem\"";
    put(dir.path(), "docker.io/hosts.toml", text);
    put(dir.path(), "docker.io/ca.pem", "x");
    let specs = resolve(&options(dir.path()), "docker.io").unwrap();
    assert_eq!(specs.len(), 1);
    assert_eq!(specs[0].settings.insecure, Some(true));
    assert_eq!(specs[0].settings.ca.len(), 1);
}

#[test]
fn our_own_options_win_over_the_file_and_authorities_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let own_ca = put(dir.path(), "own.pem", "own");
    put(dir.path(), "x.example/file.pem", "file");
    put(
        dir.path(),
        "x.example/hosts.toml",
        "ca = \"file.pem\"\nskip_verify = true\ndial_timeout = \"1s\"\n[host.\"https://m.example\"]\n",
    );
    put(dir.path(), "m.example/ca.crt", "docker's");
    let host = |mirrors| HostOptions {
        insecure: Some(false),
        ca_files: vec![own_ca.clone()],
        mirrors,
        ..HostOptions::default()
    };
    let with = |mirrors| ClientOptions {
        hosts: [("x.example".to_owned(), host(mirrors))].into(),
        ..options(dir.path())
    };
    let specs = resolve(&with(None), "x.example").unwrap();
    assert_eq!(
        specs[0].settings.ca[0].pem, b"docker's",
        "the mirror's own directory counts for it"
    );
    let server = &specs[1].settings;
    assert_eq!(server.insecure, Some(false));
    assert_eq!(server.connect, Some(std::time::Duration::from_secs(1)));
    let authorities: Vec<&[u8]> = server.ca.iter().map(|file| &file.pem[..]).collect();
    assert_eq!(authorities, [&b"own"[..], b"file"]);
    assert_eq!(
        summary(&with(Some(Vec::new())), "x.example"),
        [row("x.example", true)]
    );
    let mirror = MirrorOptions {
        url: "n.example:5000/hub".to_owned(),
        capabilities: vec!["pull".to_owned()],
        ..MirrorOptions::default()
    };
    let specs = resolve(&with(Some(vec![mirror])), "x.example").unwrap();
    assert_eq!(
        (specs[0].name.as_str(), specs[0].base.path.as_str()),
        ("n.example:5000", "/hub/v2")
    );
    assert!(!specs[0].capabilities.resolve && specs[0].base.scheme.is_none());
}

#[test]
fn files_that_are_not_there_are_named_with_the_registry_that_is_used() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "x.example/hosts.toml", "ca = \"gone.pem\"");
    put(dir.path(), "y.example/hosts.toml", "not toml");
    let error = |name: &str| resolve(&options(dir.path()), name).unwrap_err().to_string();
    assert!(error("x.example").contains("gone.pem"), "{}", error("x.example"));
    assert!(
        error("y.example").contains("y.example/hosts.toml:1: "),
        "{}",
        error("y.example")
    );
    assert!(
        resolve(&options(dir.path()), "z.example").is_ok(),
        "others are not touched by it"
    );
}

#[test]
fn who_is_nobody_shows_neither_certificates_nor_headers() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "c.pem", "x");
    let said = "client = \"../c.pem\"\n[header]\nx = \"y\"\n[host.\"https://m.example\"]\nclient = \"../c.pem\"\nca = \"../c.pem\"";
    put(dir.path(), "x.example/hosts.toml", said);
    let known = resolve(&options(dir.path()), "x.example").unwrap();
    assert!(known.iter().all(|spec| spec.settings.has_identity()));
    let nobody = resolve(&options(dir.path()).without_credentials(), "x.example").unwrap();
    assert!(!nobody.iter().any(|spec| spec.settings.has_identity()));
    assert_eq!(nobody[0].settings.ca.len(), 1, "whom we trust stays");
}
