//! The cases in which engines differ when they put layers together, as images of plain tar layers that
//! `scripts/lib/merge_images.py` made by hand.

use std::path::Path;
use std::process::Command;

use crate::world::{Mounted, lab, script};

/// Those of which the user is told that something was odd.
const WARNED_OF: [&str; 3] = ["hardlink-to-whited-out", "above-the-root", "bare-whiteout"];

/// Compares every case below a mounted repository with what should come out of it.
pub(crate) fn assert_merged(repository: &Path) {
    let checked = Command::new("/usr/bin/python3")
        .arg("-B")
        .arg(script("lib/merge_images.py"))
        .arg("check")
        .arg(repository)
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&checked.stdout),
        String::from_utf8_lossy(&checked.stderr)
    );
    assert!(checked.status.success(), "{said}");
}

#[test]
#[ignore = "needs the lab"]
fn layers_of_plain_tar_merge_by_the_rules() {
    let mounted = Mounted::with(&[]);
    let repository = format!("{}/{}", lab("LAB_PLAIN"), lab("LAB_MERGE"));
    assert_merged(&mounted.root().join(&repository));
    for case in WARNED_OF {
        let reference = format!("{repository}:{case}");
        let info = mounted.text(&["info", &reference, "--format", "json"]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert!(!info["warnings"].as_array().unwrap().is_empty(), "{case}: {info}");
    }
}
