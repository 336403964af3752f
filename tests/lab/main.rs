//! The main job on real input: Debian's docker-registry with images that `ctr-remote` converted, against what `umoci`
//! unpacks of the originals. Needs the lab: `scripts/test` starts it and runs these with `--ignored`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod formats;
mod kernel;
mod line;
mod merge;
mod mirrors;
mod servers;
mod sources;
mod world;

use std::path::{Path, PathBuf};
use std::process::Command;

use world::{Mounted, assert_equal_trees, lab};

#[test]
#[ignore = "needs the lab"]
fn every_rootfs_equals_what_umoci_unpacks_of_the_original() {
    let mounted = Mounted::with(&[]);
    let registry = mounted.root().join(lab("LAB_PLAIN"));
    let unpacked = PathBuf::from(lab("LAB_UNPACKED"));
    for (image, original) in [
        ("lab/debian/v1", "v1"),
        ("lab/debian:v2", "v2"),
        ("lab/debian/v1-smallchunk", "v1"),
        ("lab/team/app:1", "app-1"),
        ("lab/team/app/2", "app-2"),
    ] {
        assert_equal_trees(&registry.join(image).join("rootfs"), &unpacked.join(original));
    }
}

#[test]
#[ignore = "needs the lab"]
fn the_first_byte_costs_five_requests_a_miss_one_and_a_restart_none() {
    let mounted = Mounted::with(&[]);
    let host = lab("LAB_PLAIN");
    let rootfs = mounted.root().join(&host).join("lab/debian/v1/rootfs");
    let read = |path: &str| std::fs::read(rootfs.join(path)).unwrap();
    read("etc/debian_version");
    assert_eq!(mounted.requests(&host), 5, "the manifest, three tails, one range");
    read("usr/bin/ping");
    assert_eq!(mounted.requests(&host), 6);
    mounted.restart();
    assert!(std::fs::read_dir(&rootfs).unwrap().count() > 10);
    read("etc/debian_version");
    assert_eq!(mounted.requests(&host), 0);
}

#[test]
#[ignore = "needs the lab"]
fn tls_of_an_own_authority_with_a_password_is_read_and_without_either_refused() {
    let host = lab("LAB_TLS");
    let credential = format!("{}:{}", lab("LAB_USER"), lab("LAB_PASSWORD"));
    let authority = lab("LAB_CA");
    let mounted = Mounted::with(&["--ca", &authority, "--credential", &credential]);
    let rootfs = mounted.root().join(&host).join("lab/team/app:1/rootfs");
    assert_equal_trees(&rootfs, &PathBuf::from(lab("LAB_UNPACKED")).join("app-1"));
    let dir = tempfile::tempdir().unwrap();
    let tags = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registryfs"));
        command
            .arg("--cache-dir")
            .arg(dir.path())
            .args(options)
            .arg("tags")
            .arg(format!("{host}/lab/debian"));
        command.output().unwrap().status.code()
    };
    assert_eq!(tags(&[]), Some(5), "an untrusted certificate");
    assert_eq!(tags(&["--ca", &authority]), Some(3), "no credential");
    assert_eq!(tags(&["--ca", &authority, "--credential", "lab:wrong"]), Some(3));
    assert_eq!(tags(&["--ca", &authority, "--credential", &credential]), Some(0));
}

#[test]
#[ignore = "needs the lab"]
fn tools_say_of_two_images_what_they_say_of_the_unpacked_ones() {
    let mounted = Mounted::with(&[]);
    let images = mounted.root().join(lab("LAB_PLAIN")).join("lab/team");
    let unpacked = PathBuf::from(lab("LAB_UNPACKED"));
    // Links of the same names in front of both, so that the names in what is printed are the same.
    let (ours, theirs) = (mounted.dir().join("ours"), mounted.dir().join("theirs"));
    for (side, targets) in [
        (&ours, [images.join("app:1/rootfs"), images.join("app:2/rootfs")]),
        (&theirs, [unpacked.join("app-1"), unpacked.join("app-2")]),
    ] {
        std::fs::create_dir(side).unwrap();
        std::os::unix::fs::symlink(&targets[0], side.join("one")).unwrap();
        std::os::unix::fs::symlink(&targets[1], side.join("two")).unwrap();
    }
    for command in [
        // diff(1) calls special files equal whose times are; an unpacked one has a change time of its own.
        "diff -r --no-dereference one/ two/ | grep -v 'special file'",
        "rsync -naHAXi --checksum --delete one/ two/",
        "git diff --no-index one/usr two/usr | grep -v ^index",
        "grep -rc PATH= one/etc one/usr two/etc | sort",
    ] {
        let said = |side: &Path| {
            let output = Command::new("sh")
                .arg("-c")
                .arg(command)
                .current_dir(side)
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let (ours, theirs) = (said(&ours), said(&theirs));
        assert!(!theirs.is_empty(), "{command} says nothing");
        assert!(ours == theirs, "{command}:\n{ours}\nbut unpacked:\n{theirs}");
    }
}

#[test]
#[ignore = "needs the lab"]
fn what_our_writer_writes_other_tools_unpack() {
    use registryfs::demo::{Behaviour, DemoRegistry, sample_content};
    let demo = DemoRegistry::start(sample_content().unwrap(), Behaviour::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let name = "team/search/api";
    // From our registry into a real one, and from there to disk: each verifies every digest.
    let (from, through) = (format!("docker://{}/{name}:2.0", demo.host()), lab("LAB_PLAIN"));
    let through = format!("docker://{through}/lab/pushed:1");
    run(
        "skopeo",
        &[
            "copy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            "--preserve-digests",
            &from,
            &through,
        ],
    );
    run(
        "skopeo",
        &["copy", "--src-tls-verify=false", &through, "oci:layout:1"],
    );
    run("umoci", &["raw", "unpack", "--image", "layout:1", "unpacked"]);
    let mounted = Mounted::with(&[]);
    let rootfs = mounted.root().join(lab("LAB_PLAIN")).join("lab/pushed:1/rootfs");
    // eStargz carries its landmark and its table of contents as files, which only a reader of it hides.
    for extra in ["stargz.index.json", ".no.prefetch.landmark", ".prefetch.landmark"] {
        let _ = std::fs::remove_file(dir.path().join("unpacked").join(extra));
    }
    let difference = Command::new("rsync")
        .args(["-naHAXi", "--checksum", "--delete", "--omit-dir-times"])
        .arg(format!("{}/", rootfs.display()))
        .arg("unpacked/")
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&difference.stdout).into_owned();
    assert!(difference.status.success() && said.trim().is_empty(), "{said}");
}
