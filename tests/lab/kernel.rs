//! Kernel mode on real images: what EROFS shows is what the tree underneath shows, and both are what `umoci` unpacks.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::formats::FORMATS;
use crate::merge::assert_merged;
use crate::world::{Mounted, assert_equal_trees, assert_indistinguishable_trees, lab};

/// The lab's images with what there is unpacked of them.
const IMAGES: [(&str, &str); 5] = [
    ("lab/debian:v1", "v1"),
    ("lab/debian:v2", "v2"),
    ("lab/debian:v1-smallchunk", "v1"),
    ("lab/team/app:1", "app-1"),
    ("lab/team/app:2", "app-2"),
];

/// One daemon with a mount in each mode: where EROFS serves, and where we do.
struct Both {
    mounted: Mounted,
    kernel: PathBuf,
    fuse: PathBuf,
}

impl Both {
    fn new() -> Self {
        // The mount that is made with it has the mode that the machine has by itself.
        let mounted = Mounted::with(&[]);
        let [kernel, fuse] = ["require", "off"].map(|mode| {
            let place = mounted.dir().join(mode);
            std::fs::create_dir(&place).unwrap();
            mounted.text(&["mount", "-o", &format!("kernel={mode}"), place.to_str().unwrap()]);
            place
        });
        Self {
            mounted,
            kernel,
            fuse,
        }
    }

    fn rootfs(&self, image: &str) -> [PathBuf; 2] {
        [&self.kernel, &self.fuse].map(|root| root.join(lab("LAB_PLAIN")).join(image).join("rootfs"))
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        for place in [&self.kernel, &self.fuse] {
            let _ = Command::new("umount").arg("-l").arg(place).output();
        }
    }
}

fn unpacked(name: &str) -> PathBuf {
    PathBuf::from(lab("LAB_UNPACKED")).join(name)
}

fn filesystem_of(path: &Path) -> String {
    let output = Command::new("stat")
        .args(["-f", "-c", "%t"])
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
#[ignore = "needs the lab"]
fn every_image_is_the_same_in_both_modes_and_the_original() {
    let both = Both::new();
    for (image, original) in IMAGES {
        let [kernel, fuse] = both.rootfs(image);
        // linux/magic.h
        assert_eq!(filesystem_of(&kernel), "e0f5e1e2", "{image}");
        assert_eq!(filesystem_of(&fuse), "65735546", "{image}");
        assert_indistinguishable_trees(&kernel, &fuse);
        assert_equal_trees(&kernel, &unpacked(original));
        assert_equal_trees(&fuse, &unpacked(original));
    }
}

#[test]
#[ignore = "needs the lab"]
fn every_format_is_the_same_in_both_modes_and_the_original() {
    let both = Both::new();
    for tag in FORMATS {
        let [kernel, fuse] = both.rootfs(&format!("{}:{tag}", lab("LAB_FORMATS")));
        // Who is the first at a layer that has to be read as a whole is not kept waiting for the kernel to serve it.
        assert!(std::fs::read_dir(&fuse).unwrap().count() > 10);
        assert_eq!(filesystem_of(&kernel), "e0f5e1e2", "{tag}");
        assert_indistinguishable_trees(&kernel, &fuse);
        assert_equal_trees(&kernel, &unpacked("v1"));
    }
}

#[test]
#[ignore = "needs the lab"]
fn every_row_of_the_table_of_merging_is_the_same_in_both_modes() {
    let both = Both::new();
    let repository = format!("{}/{}", lab("LAB_PLAIN"), lab("LAB_MERGE"));
    for root in [&both.kernel, &both.fuse] {
        assert_merged(&root.join(&repository));
    }
    let tags = both.mounted.text(&["tags", &repository]);
    assert!(tags.lines().count() > 20, "{tags}");
    for tag in tags.lines() {
        let [kernel, fuse] = both.rootfs(&format!("{}:{tag}", lab("LAB_MERGE")));
        assert_eq!(filesystem_of(&kernel), "e0f5e1e2", "{tag}");
        assert_indistinguishable_trees(&kernel, &fuse);
    }
}
