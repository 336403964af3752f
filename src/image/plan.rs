//! What `get` is told of the files to write: plain data on the way from whoever has the store to whoever writes.
//!
//! A plan is a JSON document a line: a [`Head`], then an [`Item`] for each name, directories before what is in them. So
//! a large one is never held as text, and is read while it comes.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::Error;

/// What stands at the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The image by its digest, so that the contents come from the same one when the tag has moved.
    pub reference: String,
    /// Why the tag could not be checked, where that is so and this is its last known image.
    pub stale: Option<String>,
    /// The patterns that matched nothing, and why.
    pub unmatched: Vec<Error>,
    /// The regular file that the only pattern, one without wildcards, leads to.
    pub file: Option<u32>,
    /// Number of the items that follow.
    pub items: u64,
    /// Bytes of all regular files among them, hard links counted once.
    pub bytes: u64,
}

/// One name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Path from the root, without a slash at its beginning; empty for the root.
    pub path: Name,
    /// What it is.
    pub what: What,
    /// Permission bits (0o7777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<(Name, Name)>,
}

/// The kinds of items.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A directory.
    Dir {
        /// Whether it is there only because it leads to something selected: one that exists already is left as it is.
        is_passage: bool,
    },
    /// A regular file.
    File(File),
    /// Another name of an earlier regular file or special file.
    Link {
        /// Its position among the items.
        to: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Its target, verbatim.
        target: Name,
    },
    /// A character device.
    Char {
        /// Major and minor number.
        rdev: (u32, u32),
    },
    /// A block device.
    Block {
        /// Major and minor number.
        rdev: (u32, u32),
    },
    /// A named pipe.
    Fifo,
}

/// A regular file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// The inode in the merged tree, to ask for its content.
    pub node: u32,
    /// Size in bytes.
    pub size: u64,
    /// The layer that provides it.
    pub layer: u16,
    /// Its place among the entries of the layer, which stand in the order of the blob.
    pub entry: u32,
    /// The digest of its content, where the layer says it.
    pub digest: Option<Digest>,
}

/// Bytes that are mostly text: in JSON a string in which each character is a byte (Latin-1), which keeps names readable
/// and any bytes intact.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Name(pub Vec<u8>);

impl Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = self.0.iter().copied().map(char::from).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |letter: char| u8::try_from(u32::from(letter));
        let bytes: Result<Vec<u8>, _> = text.chars().map(byte).collect();
        bytes
            .map(Self)
            .map_err(|_| serde::de::Error::custom("a letter that is no byte"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_survive_as_text(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let text = serde_json::to_string(&Name(bytes.clone())).unwrap();
            prop_assert!(!text.contains('\n'), "a line is a document");
            prop_assert_eq!(serde_json::from_str::<Name>(&text).unwrap(), Name(bytes));
        }
    }
}
