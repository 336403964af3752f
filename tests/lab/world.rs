//! What the lab's tests share: mounts of their own on the lab's registries.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::line::Line;

/// A setting of the lab, as `scripts/lab env` prints it.
pub(super) fn lab(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: eval \"$(scripts/lab env)\" first"))
}

/// A script of the repository.
pub(super) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// A mount of its own, with a store of its own.
pub(super) struct Mounted {
    dir: tempfile::TempDir,
    options: Vec<String>,
    /// Set for whatever runs.
    environment: Vec<(String, PathBuf)>,
    /// The network namespace that its daemon lives in, if not ours.
    namespace: Option<String>,
}

impl Mounted {
    pub(super) fn with(options: &[&str]) -> Self {
        Self::new(options, &[], None)
    }

    /// One whose commands and daemon have an environment of their own.
    pub(super) fn with_environment(options: &[&str], environment: &[(&str, &Path)]) -> Self {
        Self::new(options, environment, None)
    }

    /// One whose daemon reaches the lab by `line` alone. It is for its user only: what a daemon asks to know whether
    /// other users may see an image would be among the requests.
    pub(super) fn behind(line: &Line, options: &[&str], environment: &[(&str, &Path)]) -> Self {
        Self::new(options, environment, Some(line.namespace().to_owned()))
    }

    fn new(options: &[&str], environment: &[(&str, &Path)], namespace: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let mounted = Self {
            dir,
            options: options.iter().map(ToString::to_string).collect(),
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.to_path_buf()))
                .collect(),
            namespace,
        };
        let mountpoint = mounted.root();
        let mut mount = vec!["mount".as_ref(), mountpoint.as_os_str()];
        if mounted.namespace.is_some() {
            mount.extend(["-o", "noallow_other"].map(OsStr::new));
        }
        mounted.text(&mount);
        mounted
    }

    /// A directory for whatever the test needs; the store and the mountpoint are in it too.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        let program = env!("CARGO_BIN_EXE_registryfs");
        let mut command = match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={namespace}")).arg(program);
                command
            }
        };
        command
            .arg("--cache-dir")
            .arg(self.dir.path().join("store"))
            .args(&self.options)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.output().unwrap()
    }

    pub(super) fn text<S: AsRef<OsStr>>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Ends the daemon and mounts anew, with the same store.
    pub(super) fn restart(&self) {
        let root = self.root();
        self.text(&["umount".as_ref(), root.as_os_str()]);
        self.text(&["mount".as_ref(), root.as_os_str()]);
    }

    /// Requests that the daemon has made of a registry.
    pub(super) fn requests(&self, host: &str) -> u64 {
        let status: serde_json::Value =
            serde_json::from_str(&self.text(&["status", "--format", "json"])).unwrap();
        let hosts = status["hosts"].as_array().unwrap();
        let host = hosts.iter().find(|known| known["host"] == host);
        let kinds = host
            .map(|host| host["requests"].as_object().unwrap().clone())
            .unwrap_or_default();
        kinds.values().filter_map(serde_json::Value::as_u64).sum()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let root = self.root();
        let _ = self.run(&["umount".as_ref(), root.as_os_str()]);
        let _ = Command::new("umount").arg("-l").arg(root).output();
    }
}

/// Times are compared to the second, as eStargz keeps them.
pub(super) fn assert_equal_trees(mounted: &Path, unpacked: &Path) {
    assert_equal(&["compare"], mounted, unpacked);
}

/// With times to the nanosecond.
pub(super) fn assert_exactly_equal_trees(mounted: &Path, unpacked: &Path) {
    assert_equal(&["compare", "--exact-times"], mounted, unpacked);
}

/// As two mounts of one image are to be, by all that programs can see.
pub(super) fn assert_indistinguishable_trees(ours: &Path, theirs: &Path) {
    assert_equal(&["compare", "--everything"], ours, theirs);
}

fn assert_equal(command: &[&str], mounted: &Path, unpacked: &Path) {
    let compared = Command::new(script("lab"))
        .args(command)
        .arg(mounted)
        .arg(unpacked)
        .output()
        .unwrap();
    assert!(
        compared.status.success(),
        "{}{}",
        String::from_utf8_lossy(&compared.stdout),
        String::from_utf8_lossy(&compared.stderr)
    );
}

/// Has a pull-through cache fetch `lab/team/app:1`, as a first pull of another client would.
pub(crate) fn pull_through(mirror: &str) {
    let dir = tempfile::tempdir().unwrap();
    let from = format!("docker://{mirror}/lab/team/app:1");
    let to = format!("oci:{}:1", dir.path().join("pulled").display());
    let pulled = Command::new("skopeo")
        .args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            &from,
            &to,
        ])
        .status();
    assert!(pulled.unwrap().success());
}
