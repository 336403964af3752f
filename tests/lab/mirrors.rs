//! containerd's `hosts.toml` with a real pull-through cache as the mirror of a real registry.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::line::{Line, briefs};
use super::world::{Mounted, assert_equal_trees, lab, pull_through};

const IMAGE: &str = "lab/team/app:1";

/// A `certs.d` by which the lab's plain registry has `mirror`.
fn certs_dir(mirror: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let registry = lab("LAB_PLAIN");
    let of_registry = dir.path().join(&registry);
    std::fs::create_dir(&of_registry).unwrap();
    let text = format!(
        "server = \"http://{registry}\"\n[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(of_registry.join("hosts.toml"), text).unwrap();
    dir
}

fn rootfs(mounted: &Mounted) -> PathBuf {
    mounted.root().join(lab("LAB_PLAIN")).join(IMAGE).join("rootfs")
}

fn assert_equal_files(mounted: &Path, path: &str) {
    let unpacked = PathBuf::from(lab("LAB_UNPACKED")).join("app-1").join(path);
    assert!(
        std::fs::read(mounted.join(path)).unwrap() == std::fs::read(unpacked).unwrap(),
        "{path} differs"
    );
}

#[test]
#[ignore = "needs the lab"]
fn a_mirror_is_asked_alone_and_the_registry_once_it_has_died() {
    pull_through(&lab("LAB_MIRROR"));
    let certs = certs_dir(&lab("LAB_MIRROR"));
    let mut line = Line::new();
    let environment = [("REGISTRYFS_CERTS_DIRS", certs.path())];
    let mounted = Mounted::behind(&line, &[], &environment);
    let rootfs = rootfs(&mounted);
    assert_equal_files(&rootfs, "etc/platform");
    let requests = line.take();
    // The manifest, a layer that is shorter than a tail, two tails, one range.
    let expected = [
        "mirror 200",
        "mirror 200",
        "mirror 206",
        "mirror 206",
        "mirror 206",
    ];
    assert_eq!(briefs(&requests), expected);
    let ns = format!("ns={}", lab("LAB_PLAIN").replace(':', "%3A"));
    assert!(
        requests.iter().all(|request| request.uri.contains(&ns)),
        "{requests:#?}"
    );
    assert_equal_files(&rootfs, "srv/lab/sizes/4194305");
    let later = briefs(&line.take());
    assert!(
        !later.is_empty() && later.iter().all(|brief| brief == "mirror 206"),
        "{later:?}"
    );

    line.refuse("LAB_MIRROR");
    assert_equal_files(&rootfs, "usr/share/random");
    let later = briefs(&line.take());
    assert!(
        !later.is_empty() && later.iter().all(|brief| brief == "plain 206"),
        "{later:?}"
    );
    // Down is not asked again and again.
    assert_whole_tree(&rootfs);
    let rest = briefs(&line.take());
    assert!(rest.iter().all(|brief| brief == "plain 206"), "{rest:?}");
}

fn assert_whole_tree(rootfs: &Path) {
    assert_equal_trees(rootfs, &PathBuf::from(lab("LAB_UNPACKED")).join("app-1"));
}

/// A pull-through cache of the lab's plain registry that has nothing yet.
struct EmptyMirror {
    process: Child,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl EmptyMirror {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let configuration = serde_json::json!({
            "version": "0.1",
            "storage": { "filesystem": { "rootdirectory": dir.path().join("storage") } },
            "http": { "addr": address.to_string(), "secret": "test" },
            "proxy": { "remoteurl": format!("http://{}", lab("LAB_PLAIN")) },
        });
        let path = dir.path().join("registry.yml");
        // JSON is YAML.
        std::fs::write(&path, configuration.to_string()).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(path)
            .stderr(File::create(dir.path().join("log")).unwrap())
            .stdout(File::create("/dev/null").unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the mirror did not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self {
            process,
            address,
            _dir: dir,
        }
    }
}

impl Drop for EmptyMirror {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a_mirror_that_has_nothing_yet_harms_nobody() {
    // docker-registry's proxy mode answers a range of what it does not have with the whole blob.
    let mirror = EmptyMirror::start();
    let certs = certs_dir(&mirror.address.to_string());
    let mounted = Mounted::with_environment(&[], &[("REGISTRYFS_CERTS_DIRS", certs.path())]);
    assert_whole_tree(&rootfs(&mounted));
    assert!(
        mounted.requests(&mirror.address.to_string()) > 0,
        "it was not asked"
    );
}
