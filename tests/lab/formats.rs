//! One image, a Debian with Python packages, in every format that there are writers for: whatever its layers are, the root
//! filesystem is the one that `umoci` unpacks of the original.

use std::fs;
use std::path::PathBuf;

use crate::world::{Mounted, assert_equal_trees, assert_exactly_equal_trees, lab};

/// The tags of the image in every format.
pub(crate) const FORMATS: [&str; 11] = [
    "estargz",
    "estargz-external",
    "estargz-min-chunk",
    "gzip",
    "gzip-docker",
    "soci",
    "stargz",
    "tar",
    "zstd",
    "zstd-chunked",
    "zstd-chunked-skopeo",
];

/// What a format keeps of modification times.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Times {
    Seconds,
    Nanoseconds,
}

/// Mounts `tag` with an empty cache, compares all of it, and once more after a restart of the daemon, which then has
/// nothing to ask for.
fn shows_the_original(tag: &str, format: &str, times: Times) {
    let mounted = Mounted::with(&[]);
    let host = lab("LAB_PLAIN");
    let image = mounted
        .root()
        .join(&host)
        .join(format!("{}:{tag}", lab("LAB_FORMATS")));
    let original = PathBuf::from(lab("LAB_UNPACKED")).join("v1");
    let compare = match times {
        Times::Seconds => assert_equal_trees,
        Times::Nanoseconds => assert_exactly_equal_trees,
    };
    compare(&image.join("rootfs"), &original);
    for layer in fs::read_dir(image.join("layers")).unwrap() {
        let said = fs::read_to_string(layer.unwrap().path().join("format")).unwrap();
        assert!(said.starts_with(format), "{said:?}");
    }
    mounted.restart();
    compare(&image.join("rootfs"), &original);
    assert_eq!(mounted.requests(&host), 0);
}

#[test]
#[ignore = "needs the lab"]
fn estargz() {
    shows_the_original("estargz", "estargz", Times::Seconds);
}

#[test]
#[ignore = "needs the lab"]
fn gzip() {
    shows_the_original("gzip", "gzip", Times::Nanoseconds);
}

#[test]
#[ignore = "needs the lab"]
fn gzip_below_a_manifest_of_docker() {
    shows_the_original("gzip-docker", "gzip", Times::Nanoseconds);
}

#[test]
#[ignore = "needs the lab"]
fn tar() {
    shows_the_original("tar", "tar", Times::Nanoseconds);
}

#[test]
#[ignore = "needs the lab"]
fn zstd() {
    shows_the_original("zstd", "zstd", Times::Nanoseconds);
}

#[test]
#[ignore = "needs the lab"]
fn zstd_chunked_of_ctr_remote() {
    shows_the_original("zstd-chunked", "zstd:chunked", Times::Seconds);
}

#[test]
#[ignore = "needs the lab"]
fn zstd_chunked_of_skopeo() {
    shows_the_original("zstd-chunked-skopeo", "zstd:chunked", Times::Nanoseconds);
}

#[test]
#[ignore = "needs the lab"]
fn estargz_with_chunks_packed_into_members() {
    shows_the_original("estargz-min-chunk", "estargz", Times::Seconds);
}

/// Layers with a file of several chunks, whose digests it does not say, are read in one pass.
#[test]
#[ignore = "needs the lab"]
fn stargz_the_predecessor() {
    shows_the_original("stargz", "", Times::Seconds);
}

#[test]
#[ignore = "needs the lab"]
fn estargz_with_its_table_of_contents_in_another_image() {
    shows_the_original("estargz-external", "estargz", Times::Seconds);
}

#[test]
#[ignore = "needs the lab"]
fn gzip_with_an_index_of_soci() {
    shows_the_original("soci", "soci", Times::Nanoseconds);
}
