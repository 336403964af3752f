//! Access profiles: files of an image in the order in which something reads them, as text. `record` writes them, `prefetch`
//! and `convert` read them.
//!
//! A line is a JSON object, as `ctr-remote optimize --record-out` writes it: `path`, and where it was read, `manifestDigest`
//! and `layerIndex`, which nobody needs for reading: the same files are wanted of the next version of the image. A path
//! that is no UTF-8 stands in `pathBytes`, in base64, and `path` shows it. A line that does not begin with a brace is a
//! path as it is, so that a list by hand is a profile too.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::clean_path;

/// The most bytes of a profile.
pub const BYTES_MAX: u64 = 256 << 20;
/// The most files in one.
pub const FILES_MAX: usize = 1_000_000;

/// A line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
    /// Only written: what others say here may be of any shape.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    manifest_digest: Option<Digest>,
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    layer_index: Option<u16>,
}

/// The line of a file, with its end: a path without a leading slash, the image's manifest, and the layer that has it.
///
/// # Errors
/// None that can come.
pub fn line(path: &[u8], manifest: &Digest, layer: u16) -> Result<Vec<u8>> {
    let is_text = std::str::from_utf8(path).is_ok();
    let line = Line {
        path: Some(String::from_utf8_lossy(path).into_owned()),
        path_bytes: (!is_text).then(|| BASE64_STANDARD.encode(path)),
        manifest_digest: Some(*manifest),
        layer_index: Some(layer),
    };
    let mut line = serde_json::to_vec(&line).map_err(|error| malformed(error.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

/// The paths of a profile in canonical form, each once, in its order. What names the root is left out.
///
/// # Errors
/// [`Error::Usage`], with the number of the line.
pub fn parse(text: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut seen = std::collections::HashSet::new();
    let mut paths = Vec::new();
    for (line, number) in text.split(|&byte| byte == b'\n').zip(1_usize..) {
        let path = path_in(line).map_err(|why| {
            let remedy = "a line is a path, or an object as `registryfs record` writes it; a path that begins with a brace \
                          is written with ./ before it";
            Error::usage(format!("line {number}: {why} ({remedy})"))
        })?;
        let path = clean_path(&path).path;
        if path.is_empty() || !seen.insert(path.clone()) {
            continue;
        }
        if paths.len() >= FILES_MAX {
            return Err(Error::usage(format!(
                "line {number}: more than {FILES_MAX} files"
            )));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The path that a line says, as it says it.
fn path_in(line: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let path = match line.first() {
        Some(b'{') => {
            let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
            match (line.path_bytes, line.path) {
                (Some(encoded), _) => BASE64_STANDARD
                    .decode(encoded)
                    .map_err(|error| format!("pathBytes is no base64: {error}"))?,
                (None, Some(path)) => path.into_bytes(),
                (None, None) => return Err("it has no path".to_owned()),
            }
        }
        _ => line.to_vec(),
    };
    match path.contains(&0) {
        true => Err("no path has a zero byte in it".to_owned()),
        false => Ok(path),
    }
}

/// A profile on the way to whoever owns the store: the paths, a zero byte behind each.
#[must_use]
pub fn pack(paths: &[Vec<u8>]) -> Vec<u8> {
    paths
        .iter()
        .flat_map(|path| path.iter().copied().chain([0]))
        .collect()
}

/// What [`pack`] made.
///
/// # Errors
/// [`Error::Malformed`] for anything else.
pub fn unpack(packed: &[u8]) -> Result<Vec<Vec<u8>>> {
    let Some((0, paths)) = packed.split_last() else {
        return match packed.is_empty() {
            true => Ok(Vec::new()),
            false => Err(malformed("it is cut off")),
        };
    };
    let paths = paths.split(|&byte| byte == 0);
    if paths.clone().count() > FILES_MAX {
        return Err(malformed("too many files"));
    }
    Ok(paths.map(<[u8]>::to_vec).collect())
}

fn malformed(why: impl Into<String>) -> Error {
    Error::malformed("profile", why.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str) -> String {
        let error = parse(text.as_bytes()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn a_line_is_what_ctr_remote_writes() {
        let manifest = Digest::of(b"m");
        let written = String::from_utf8(line(b"usr/bin/env", &manifest, 3).unwrap()).unwrap();
        let expected =
            format!("{{\"path\":\"usr/bin/env\",\"manifestDigest\":\"{manifest}\",\"layerIndex\":3}}\n");
        assert_eq!(written, expected);
        let others = "{\"path\":\"b\",\"manifestDigest\":\"md5:1\",\"layerIndex\":-7,\"more\":[1]}\n{\"path\":\"/a/./b/\"}";
        assert_eq!(
            parse(others.as_bytes()).unwrap(),
            [b"b".to_vec(), b"a/b".to_vec()]
        );
    }

    #[test]
    fn paths_by_hand_and_objects_may_stand_side_by_side() {
        let text =
            b"/etc/passwd\n\n{\"path\":\"{odd\\n}\"}\n./{braces}\netc/../etc/passwd\n/\n a \nna\xffme\n";
        let expected: [&[u8]; 5] = [b"etc/passwd", b"{odd\n}", b"{braces}", b" a ", b"na\xffme"];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse(b"").unwrap(), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        assert!(
            refused("a\n{b}\n").contains("line 2: "),
            "{}",
            refused("a\n{b}\n")
        );
        assert!(refused("{b}").contains("./"));
        assert!(refused("{\"path\":1}").contains("line 1: "));
        assert!(refused("{\"layerIndex\":1}").contains("it has no path"));
        assert!(refused("\n{\"path\":\"a\",\"pathBytes\":\"?\"}").contains("line 2: pathBytes"));
        assert!(refused("{\"path\":\"\\u0000\"}").contains("zero byte"));
        assert!(refused("a\0").contains("zero byte"));
    }

    proptest! {
        /// Any name that a filesystem can have goes through a profile, and on to the owner of the store.
        #[test]
        fn any_path_comes_back(paths in prop::collection::vec(prop::collection::vec(1..=255u8, 1..12), 0..6)) {
            let mut expected: Vec<Vec<u8>> = Vec::new();
            let mut text = Vec::new();
            for path in paths {
                let path = clean_path(&path).path;
                if path.is_empty() || expected.contains(&path) {
                    continue;
                }
                text.extend(line(&path, &Digest::of(b""), 0).unwrap());
                expected.push(path);
            }
            prop_assert_eq!(text.iter().filter(|&&byte| byte == b'\n').count(), expected.len());
            prop_assert_eq!(&parse(&text).unwrap(), &expected);
            prop_assert_eq!(unpack(&pack(&expected)).unwrap(), expected);
        }
    }
}
