//! Credential helpers that are real programs: what they are asked, what becomes of those that do not do their work, and
//! how often they are started.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::super::process::{self, Said};
use super::super::{Identity, password_identity};
use super::{DOCKER, Home, PRIMARY, auth, user};

fn says(user: &str, secret: &str) -> String {
    format!(
        "cat > \"$0.asked\"; echo '{}'",
        json!({"ServerURL": "x", "Username": user, "Secret": secret})
    )
}

#[tokio::test]
async fn helpers_come_before_entries_and_the_hosts_own_before_the_store() {
    let home = Home::new();
    let config = json!({
        "auths": {"h.io": auth("file", "pw"), "own.io": auth("file", "pw"), "off.io": auth("file", "pw")},
        "credHelpers": {"own.io": "own", "off.io": "", "https://index.docker.io/v1/": "own"},
        "credsStore": "store",
    });
    home.write(DOCKER, config.to_string());
    home.helper("own", &says("own", "pw"))
        .helper("store", &says("<token>", "it"));
    let asked =
        |name: &str| fs::read_to_string(home.path(&format!("bin/docker-credential-{name}.asked"))).unwrap();
    let found = home.find("own.io", "a").await;
    assert_eq!(user(&found), "own");
    assert!(
        found.describe().contains("docker-credential-own, as "),
        "{}",
        found.describe()
    );
    assert_eq!(asked("own"), "own.io");
    assert!(matches!(
        home.find("h.io", "a").await.identity,
        Identity::Refresh { .. }
    ));
    assert_eq!(asked("store"), "h.io");
    assert_eq!(user(&home.find("off.io", "a").await), "file");
    home.find("docker.io", "library/debian").await;
    assert_eq!(asked("own"), "https://index.docker.io/v1/");
    let podman = json!({"credHelpers": {"docker.io": "own", "x.io/team": "own"}, "credsStore": "missing"});
    home.write(PRIMARY, podman.to_string());
    home.find("docker.io", "library/debian").await;
    assert_eq!(asked("own"), "docker.io", "podman stores it under that name");
    assert_eq!(user(&home.find("x.io", "team/app").await), "own");
    assert_eq!(asked("own"), "x.io");
    assert_eq!(
        user(&home.find("x.io", "other").await),
        "<token>",
        "of docker's store"
    );
}

#[tokio::test]
async fn a_helper_that_has_nothing_leaves_it_to_the_next() {
    let home = Home::new();
    let config = json!({"auths": {"h.io": auth("file", "pw")}, "credsStore": "none"});
    home.write(DOCKER, config.to_string());
    home.helper("none", "echo 'credentials not found in native keychain'; exit 1");
    assert_eq!(user(&home.find("h.io", "a").await), "file");
    let text = home.find("other.io", "a").await.describe();
    assert!(
        text.contains("nothing for other.io in docker-credential-none (of "),
        "{text}"
    );
}

#[tokio::test]
async fn a_helper_that_does_not_do_its_work_is_an_error_that_names_it() {
    for (script, part) in [
        (
            "echo hunter2; echo 'no such' >&2; echo key >&2; exit 3",
            "failed (exit status: 3): no such key",
        ),
        ("echo hunter2; exit 0", "printed something else than credentials"),
        (
            "echo '{\"Username\": 7, \"Secret\": \"hunter2\"}'",
            "printed something else than credentials",
        ),
        (
            "echo '{\"Secret\": \"hunter2'; kill -9 $$",
            "failed (signal: 9 (SIGKILL))",
        ),
        ("yes hunter2", "printed more than 65536 bytes"),
    ] {
        let home = Home::new();
        home.write(DOCKER, json!({"credsStore": "bad"}).to_string())
            .helper("bad", script);
        let text = home.failure("h.io").await;
        assert!(
            text.starts_with("the credential helper docker-credential-bad, which "),
            "{text}"
        );
        assert!(text.contains(".docker/config.json names for h.io, "), "{text}");
        assert!(text.ends_with(part), "{script}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    for (name, part) in [
        ("missing", "is not in $PATH"),
        ("../bin/sh", "has a name that no helper can have"),
        ("a/b", "has a name that no helper can have"),
    ] {
        let home = Home::new();
        home.write(DOCKER, json!({"credsStore": name}).to_string());
        let text = home.failure("h.io").await;
        assert!(text.contains(part), "{text}");
    }
    let home = Home::new();
    home.write(DOCKER, json!({"credsStore": "mode"}).to_string())
        .helper("mode", "true");
    let program = home.path("bin/docker-credential-mode");
    fs::set_permissions(program, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(home.failure("h.io").await.contains("is not in $PATH"));
}

/// Whether a process is still there; one that only waits to be collected is not.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn a_helper_that_hangs_is_killed_with_all_that_it_started() {
    let home = Home::new();
    home.helper(
        "hang",
        "sleep 1000 & echo $! > \"$0.child\"; echo $$ > \"$0.self\"; wait",
    );
    let environment = home.environment();
    let said = process::ask(&environment, "hang", "h.io", Duration::from_secs(2)).await;
    assert_eq!(
        said,
        Said::Failed("did not answer within 2 s and was killed".to_owned())
    );
    for name in ["child", "self"] {
        let pid = fs::read_to_string(home.path(&format!("bin/docker-credential-hang.{name}"))).unwrap();
        let patience = Instant::now() + Duration::from_secs(30);
        while runs(&pid) {
            assert!(Instant::now() < patience, "{name} {pid} lives");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn what_a_helper_leaves_behind_holds_nobody() {
    let home = Home::new();
    home.helper(
        "agent",
        &format!("{}; sleep 1000 & echo $! > \"$0.child\"", says("me", "pw")),
    );
    let said = process::ask(&home.environment(), "agent", "h.io", Duration::from_secs(60)).await;
    assert_eq!(said, Said::Found(password_identity("me", "pw")));
    let pid = fs::read_to_string(home.path("bin/docker-credential-agent.child")).unwrap();
    assert!(runs(&pid), "an agent that it started stays");
    kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGTERM).unwrap();
}

#[tokio::test]
async fn a_helper_has_no_file_of_ours() {
    let home = Home::new();
    home.helper(
        "look",
        "pwd > \"$0.pwd\"; ls -l /proc/$$/fd > \"$0.fd\"; echo '{\"Secret\":\"s\"}'",
    );
    let secret = home.write("secret", "x").path("secret");
    let _held = fs::File::open(&secret).unwrap();
    process::ask(&home.environment(), "look", "h.io", Duration::from_secs(60)).await;
    let look =
        |name: &str| fs::read_to_string(home.path(&format!("bin/docker-credential-look.{name}"))).unwrap();
    assert_eq!(look("pwd").trim(), "/");
    assert!(!look("fd").contains("/secret"), "{}", look("fd"));
}

#[tokio::test]
async fn many_that_ask_at_once_start_one_helper() {
    for script in [
        says("me", "pw"),
        "exit 1".to_owned(),
        "echo 'credentials not found in native keychain'; exit 1".to_owned(),
    ] {
        let home = Home::new();
        home.write(DOCKER, json!({"credsStore": "slow"}).to_string())
            .helper("slow", &format!("sleep 0.2; {script}"));
        let sources = home.sources();
        let mut running = tokio::task::JoinSet::new();
        for n in 0..100 {
            let sources = Arc::clone(&sources);
            running.spawn(async move { sources.find("h.io", &format!("a{n}"), n % 2 == 0).await.is_ok() });
        }
        let mut found = 0;
        while let Some(done) = running.join_next().await {
            found += usize::from(done.unwrap());
        }
        assert_eq!(found, if script == "exit 1" { 0 } else { 100 });
        assert_eq!(home.runs("slow"), 1, "{script}");
        let _ = sources.find("h.io", "later", true).await;
        assert_eq!(home.runs("slow"), 1, "it is remembered, too: {script}");
        // A login through the helper writes to the file.
        home.write(
            DOCKER,
            json!({"auths": {"h.io": {}}, "credsStore": "slow"}).to_string(),
        );
        let _ = sources.find("h.io", "later", true).await;
        assert_eq!(home.runs("slow"), 2, "{script}");
    }
}

#[tokio::test]
async fn who_asked_first_may_go_away() {
    let home = Home::new();
    let script = format!(
        "until [ -e \"$0.go\" ]; do sleep 0.02; done; {}",
        says("me", "pw")
    );
    home.write(DOCKER, json!({"credsStore": "slow"}).to_string())
        .helper("slow", &script);
    let sources = home.sources();
    let first = sources.find("h.io", "a", false);
    let impatient = tokio::time::timeout(Duration::from_millis(100), first).await;
    assert!(impatient.is_err());
    home.write("bin/docker-credential-slow.go", "");
    assert_eq!(user(&sources.find("h.io", "a", false).await.unwrap()), "me");
    assert_eq!(home.runs("slow"), 1);
}
