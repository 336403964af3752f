//! What stands between people and their registries: tokens, redirects, URLs that expire, mirrors. Each on real servers, with
//! all requests seen from a line of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::line::{Line, Request, briefs, in_sequence};
use super::world::{Mounted, assert_equal_trees, lab, pull_through, script};

/// An image with three layers, and two small files of it in different layers, far from each other.
const IMAGE: &str = "lab/debian/v1/rootfs";
const FIRST: &str = "etc/debian_version";
const LATER: &str = "usr/bin/ping";

fn credential() -> String {
    format!("{}:{}", lab("LAB_USER"), lab("LAB_PASSWORD"))
}

/// A mount behind a line; plain HTTP is asked for, which spares the question for TLS.
struct Far {
    mounted: Mounted,
    // Behind the mount, which is unmounted through it.
    line: Line,
    rootfs: PathBuf,
}

impl Far {
    fn new(server: &str, options: &[&str]) -> Self {
        Self::with_environment(server, options, &[])
    }

    fn with_environment(server: &str, options: &[&str], environment: &[(&str, &Path)]) -> Self {
        let line = Line::new();
        let options = [&["--plain-http"], options].concat();
        let mounted = Mounted::behind(&line, &options, environment);
        let rootfs = mounted.root().join(lab(server)).join(IMAGE);
        Self {
            line,
            mounted,
            rootfs,
        }
    }

    /// Reads a file, compares it with the unpacked one, and says what that asked of the servers.
    fn read(&mut self, path: &str) -> Vec<Request> {
        let content = std::fs::read(self.rootfs.join(path)).unwrap();
        let unpacked = PathBuf::from(lab("LAB_UNPACKED")).join("v1").join(path);
        assert!(content == std::fs::read(unpacked).unwrap(), "{path} differs");
        self.line.take()
    }
}

fn wait_s(variable: &str, more_s: u64) {
    let seconds: u64 = lab(variable).parse().unwrap();
    std::thread::sleep(Duration::from_secs(seconds + more_s));
}

#[test]
#[ignore = "needs the lab"]
fn a_plain_registry_costs_three_round_trips() {
    let mut far = Far::new("LAB_PLAIN", &[]);
    let requests = far.read(FIRST);
    assert_eq!(
        briefs(&requests),
        ["plain 200", "plain 206", "plain 206", "plain 206", "plain 206"]
    );
    assert_eq!(in_sequence(&requests), 3, "{requests:#?}");
}

#[test]
#[ignore = "needs the lab"]
fn tokens_are_asked_for_once() {
    let credential = credential();
    let mut far = Far::new("LAB_TOKEN", &["--credential", &credential]);
    let requests = far.read(FIRST);
    let expected = [
        "auth 200",
        "token 200",
        "token 206",
        "token 206",
        "token 206",
        "token 206",
        "token 401",
    ];
    assert_eq!(briefs(&requests), expected);
    assert_eq!(in_sequence(&requests), 5, "{requests:#?}");
    assert_eq!(briefs(&far.read(LATER)), ["token 206"]);
    let app = far
        .mounted
        .root()
        .join(lab("LAB_TOKEN"))
        .join("lab/team/app:1/rootfs");
    assert_equal_trees(&app, &PathBuf::from(lab("LAB_UNPACKED")).join("app-1"));
    let others = far.line.take();
    let tokens = briefs(&others)
        .iter()
        .filter(|brief| *brief == "auth 200")
        .count();
    assert_eq!(tokens, 1, "another repository, another token: {others:#?}");
}

#[test]
#[ignore = "needs the lab"]
fn who_is_nobody_reads_what_is_public() {
    let mounted = Mounted::with(&[]);
    let registry = mounted.root().join(lab("LAB_TOKEN"));
    let public = format!("{}/app:1/rootfs/etc/platform", lab("LAB_PUBLIC"));
    assert!(std::fs::read(registry.join(public)).is_ok());
    let private = std::fs::read_dir(registry.join("lab/debian:v1/rootfs")).unwrap_err();
    let refused = [Some(libc::EACCES), Some(libc::ENOENT)];
    assert!(refused.contains(&private.raw_os_error()), "{private}");
}

#[test]
#[ignore = "needs the lab"]
fn a_token_that_ended_early_is_renewed_once() {
    let credential = credential();
    let mut far = Far::new("LAB_TOKEN_SHORT", &["--credential", &credential]);
    far.read(FIRST);
    wait_s("LAB_SHORT_TOKEN_S", 1);
    let requests = far.read(LATER);
    assert_eq!(
        briefs(&requests),
        ["auth 200", "token-short 206", "token-short 401"]
    );
}

#[test]
#[ignore = "needs the lab"]
fn a_login_lives_on_refresh_tokens_that_are_good_for_one_use() {
    let form = [
        "grant_type=password".to_owned(),
        format!("username={}", lab("LAB_USER")),
        format!("password={}", lab("LAB_PASSWORD")),
        "access_type=offline".to_owned(),
        "service=lab".to_owned(),
        "client_id=test".to_owned(),
    ];
    let mut curl = Command::new("curl");
    curl.arg("-fsS")
        .arg(format!("http://{}/token/60", lab("LAB_AUTH")));
    let answer = curl
        .args(form.iter().flat_map(|field| ["-d", field]))
        .output()
        .unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
    let login = serde_json::json!({
        "auths": { lab("LAB_TOKEN_SHORT"): { "identitytoken": answer["refresh_token"] } }
    });
    let docker = tempfile::tempdir().unwrap();
    std::fs::write(docker.path().join("config.json"), login.to_string()).unwrap();
    let mut far = Far::with_environment("LAB_TOKEN_SHORT", &[], &[("DOCKER_CONFIG", docker.path())]);
    let posted = |requests: &[Request]| {
        briefs(requests)
            .iter()
            .filter(|brief| *brief == "auth 200")
            .count()
    };
    assert_eq!(posted(&far.read(FIRST)), 1);
    for path in [LATER, "usr/bin/perl"] {
        wait_s("LAB_SHORT_TOKEN_S", 1);
        let mut requests = briefs(&far.read(path));
        // What is read ahead may be on its way still.
        requests.retain(|brief| brief != "token-short 0");
        assert_eq!(requests, ["auth 200", "token-short 206", "token-short 401"]);
    }
}

#[test]
#[ignore = "needs the lab"]
fn behind_a_redirect_a_miss_goes_straight_to_the_storage() {
    let mut far = Far::new("LAB_REDIRECT", &[]);
    let requests = far.read(FIRST);
    let expected = [
        "blobs 206",
        "blobs 206",
        "blobs 206",
        "blobs 206",
        "redirect 200",
        "redirect 307",
        "redirect 307",
        "redirect 307",
    ];
    assert_eq!(briefs(&requests), expected);
    assert_eq!(in_sequence(&requests), 4, "{requests:#?}");
    let later = far.read(LATER);
    assert_eq!(briefs(&later), ["blobs 206"]);
    assert!(!later[0].range.is_empty(), "{later:?}");
}

#[test]
#[ignore = "needs the lab"]
fn token_and_redirect_cost_six_round_trips_for_any_number_of_layers() {
    let credential = credential();
    let mut far = Far::new("LAB_TOKEN_REDIRECT", &["--credential", &credential]);
    let requests = far.read(FIRST);
    let expected = [
        "auth 200",
        "blobs 206",
        "blobs 206",
        "blobs 206",
        "blobs 206",
        "token-redirect 200",
        "token-redirect 307",
        "token-redirect 307",
        "token-redirect 307",
        "token-redirect 401",
    ];
    assert_eq!(briefs(&requests), expected);
    assert_eq!(in_sequence(&requests), 6, "{requests:#?}");
    let of_storage = |request: &&Request| request.brief().starts_with("blobs");
    for request in requests.iter().filter(of_storage) {
        assert_eq!(
            request.authorization, "",
            "a credential went to another host: {request:?}"
        );
    }
    assert_eq!(briefs(&far.read(LATER)), ["blobs 206"]);
}

#[test]
#[ignore = "needs the lab"]
fn a_signed_url_is_renewed_once_when_it_has_expired() {
    let mut far = Far::new("LAB_SIGNED", &[]);
    far.read(FIRST);
    wait_s("LAB_SIGNED_URL_S", 1);
    // Its URL says when it ends, so nobody is asked in vain.
    assert_eq!(briefs(&far.read(LATER)), ["signed 307", "signed-blobs 206"]);
}

#[test]
#[ignore = "needs the lab"]
fn a_signed_url_that_does_not_say_when_it_ends_is_renewed_once_it_is_refused() {
    let mut far = Far::new("LAB_SIGNED_OPAQUE", &[]);
    far.read(FIRST);
    wait_s("LAB_SIGNED_URL_S", 1);
    let requests = far.read(LATER);
    assert_eq!(
        briefs(&requests),
        ["signed-blobs 206", "signed-blobs 403", "signed-opaque 307"]
    );
    let errors = std::fs::read_to_string(far.mounted.root().join(".registryfs/errors")).unwrap();
    assert_eq!(errors, "", "a renewal is no failure");
}

#[test]
#[ignore = "needs the lab"]
fn a_pull_through_cache_is_a_registry_like_others() {
    pull_through(&lab("LAB_MIRROR"));
    let mounted = Mounted::with(&[]);
    let rootfs = mounted
        .root()
        .join(lab("LAB_MIRROR"))
        .join("lab/team/app:1/rootfs");
    assert_equal_trees(&rootfs, &PathBuf::from(lab("LAB_UNPACKED")).join("app-1"));
}

#[test]
#[ignore = "needs the lab"]
fn the_lab_says_what_was_asked_of_its_servers() {
    let unique = format!("lab/nothing-{}", std::process::id());
    let said = |arguments: &[&str]| {
        let output = Command::new(script("lab")).args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let mark = said(&["mark"]);
    let url = format!("http://{}/v2/{unique}/manifests/1", lab("LAB_REDIRECT"));
    let asked = Command::new("curl")
        .args(["-s", "-o", "/dev/null", "-r", "5-9", &url])
        .status();
    assert!(asked.unwrap().success());
    let requests = said(&["requests", "--since", mark.trim(), "--json", "redirect"]);
    let requests: serde_json::Value = serde_json::from_str(&requests).unwrap();
    let ours = |request: &&serde_json::Value| request["path"].as_str().unwrap().contains(&unique);
    let ours: Vec<_> = requests.as_array().unwrap().iter().filter(ours).collect();
    assert_eq!(ours.len(), 1, "{requests}");
    assert_eq!(ours[0]["kind"], "manifest");
    assert_eq!(ours[0]["status"], 404);
    assert_eq!(ours[0]["range"], "bytes=5-9");
}
