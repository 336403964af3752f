//! Worlds in kernel mode, and what tells there who serves a directory.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use registryfs::demo::Content;
use serde_json::Value;

use crate::world::{World, finish, start, until};

/// `f_type` of EROFS (linux/magic.h).
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// A mounted world that does without EROFS nowhere, with further settings.
pub(crate) fn kernel_world(content: Content, settings: &str) -> World {
    World::new(content)
        .configured(&format!("kernel = \"require\"\n{settings}"))
        .mounted()
}

/// Whether EROFS serves a path.
pub(crate) fn is_erofs(path: &Path) -> bool {
    let space = rustix::fs::statfs(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    u64::try_from(space.f_type) == Ok(EROFS_MAGIC)
}

/// The mountpoints of EROFS at and below a directory.
pub(crate) fn erofs_mounts(below: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = below.to_str().unwrap();
    let mountpoint = |line: &str| line.split(' ').nth(4).unwrap().to_owned();
    let is_below = |place: &String| {
        place
            .strip_prefix(below)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let lines = table.lines().filter(|line| line.contains(" - erofs "));
    lines.map(mountpoint).filter(is_below).collect()
}

/// The number of the superblock that serves a path.
pub(crate) fn superblock(path: &Path) -> u64 {
    fs::metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .dev()
}

/// What a shell says, which must succeed.
pub(crate) fn said(dir: &Path, script: &str) -> String {
    let output = finish(start(&mut shell(dir, script)));
    text(&output)
}

/// What a program that must have succeeded printed.
pub(crate) fn text(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn shell(dir: &Path, script: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-ec", script])
        .current_dir(dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

/// Somebody who stands in a directory and does something there once told to.
pub(crate) struct Inside(Child);

impl Inside {
    pub(crate) fn new(dir: &Path, script: &str) -> Self {
        let mut command = shell(dir, &format!("echo here; read go; {script}"));
        let mut child = start(command.stdin(Stdio::piped()));
        let mut here = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut here).unwrap();
        assert_eq!(&here, b"here\n");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// What comes of it.
    pub(crate) fn go(mut self) -> Output {
        self.0.stdin.take().unwrap().write_all(b"\n").unwrap();
        finish(self.0)
    }
}

/// Reads all of a tree, so that its layers are complete, and mounts anew, because only a new mount has them as local files.
pub(crate) fn make_local(world: &World, rootfs: &Path) {
    said(rootfs, "tar -cf - . | cat >/dev/null");
    world.restart();
    assert!(is_erofs(rootfs));
    let status: Value = serde_json::from_str(&world.text(&["status", "--format", "json"])).unwrap();
    let images = status["kernel"]["images"].as_array().unwrap();
    let is_local = |image: &Value| image["layers"] == image["local_layers"];
    assert!(!images.is_empty() && images.iter().all(is_local), "{status:#}");
}

/// Waits until no EROFS is mounted at or below a directory.
pub(crate) fn until_none_is_left(below: &Path) {
    until("no EROFS is left", || erofs_mounts(below).is_empty());
}
