//! Images mounted by themselves: from a registry, and from layouts that skopeo, umoci and buildah wrote.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::world::{Mounted, assert_equal_trees, lab};

/// A source mounted by the daemon of a mount of all registries.
struct Source<'a> {
    mounted: &'a Mounted,
    at: PathBuf,
}

impl<'a> Source<'a> {
    fn mount(mounted: &'a Mounted, source: &str) -> Self {
        let at = mounted.dir().join("source");
        std::fs::create_dir_all(&at).unwrap();
        mounted.text(&["mount", source, at.to_str().unwrap()]);
        Self { mounted, at }
    }
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("umount").arg("-l").arg(&self.at).output();
        } else {
            self.mounted.text(&["umount", self.at.to_str().unwrap()]);
        }
    }
}

fn unpacked() -> PathBuf {
    Path::new(&lab("LAB_UNPACKED")).join("app-1")
}

#[test]
#[ignore = "needs the lab"]
fn an_image_at_a_mountpoint_equals_what_umoci_unpacks_and_what_the_tree_shows() {
    let mounted = Mounted::with(&[]);
    let reference = format!("{}/lab/team/app:1", lab("LAB_PLAIN"));
    let source = Source::mount(&mounted, &reference);
    assert_equal_trees(&source.at, &unpacked());
    let rootfs = mounted.root().join(&reference).join("rootfs");
    assert_equal_trees(&source.at, &rootfs);
}

#[test]
#[ignore = "needs the lab"]
fn layouts_of_skopeo_umoci_and_buildah_are_read_where_they_are() {
    let mounted = Mounted::with(&["--offline"]);
    let (skopeo, umoci, buildah) = (
        lab("LAB_LAYOUT_SKOPEO"),
        lab("LAB_LAYOUT_UMOCI"),
        lab("LAB_LAYOUT_BUILDAH"),
    );
    for source in [
        format!("oci:{skopeo}"),
        format!("oci:{skopeo}:1"),
        format!("oci:{umoci}:1"),
        format!("oci:{umoci}:2"),
        format!("oci:{buildah}:1"),
    ] {
        let source = Source::mount(&mounted, &source);
        assert_equal_trees(&source.at, &unpacked());
    }
    let source = Source::mount(&mounted, &format!("oci:{umoci}"));
    let name = Path::new(&umoci).file_name().unwrap();
    for tag in ["1", "2"] {
        assert_equal_trees(&source.at.join(name).join(tag).join("rootfs"), &unpacked());
    }
}

#[test]
#[ignore = "needs the lab"]
fn a_named_layout_says_what_its_writer_says() {
    let buildah = lab("LAB_LAYOUT_BUILDAH");
    let config = tempfile::NamedTempFile::new().unwrap();
    let toml = format!("[layout.\"images.local\"]\npath = {buildah:?}\n");
    std::fs::write(config.path(), toml).unwrap();
    let mounted = Mounted::with(&["--config", config.path().to_str().unwrap()]);
    let name = Path::new(&buildah).file_name().unwrap().to_str().unwrap();
    assert_eq!(mounted.text(&["repos", "images.local"]), format!("{name}\n"));
    let reference = format!("images.local/{name}");
    assert_eq!(mounted.text(&["tags", &reference]), "1\nrewritten\n");
    let skopeo = Command::new("skopeo")
        .args(["inspect", "--raw", &format!("oci:{buildah}:1")])
        .output()
        .unwrap();
    assert!(skopeo.status.success(), "{skopeo:?}");
    let manifest = mounted.text(&["manifest", &format!("{reference}:1")]);
    assert_eq!(manifest.as_bytes(), skopeo.stdout);
    let rootfs = mounted.root().join(&reference).join("1/rootfs");
    assert_equal_trees(&rootfs, &unpacked());
}
