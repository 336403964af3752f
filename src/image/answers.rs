//! What the read-only questions about images answer: plain data, for the command's text and JSON and for the control
//! socket alike.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::image::platform::Platform;

/// A list of repositories or tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The names, as the registry gave them, sorted.
    pub names: Vec<String>,
    /// Why the registry could not be asked, where that is so and this is what it said before.
    pub stale: Option<String>,
}

/// What a reference names now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The reference in full.
    pub reference: String,
    /// The digest of the manifest or index.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Why the tag could not be checked, where that is so and this is its last known digest.
    pub stale: Option<String>,
}

/// `registryfs info REF`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// What the reference names.
    #[serde(flatten)]
    pub resolved: Resolved,
    /// The digest of the platform's manifest (the same where the reference is no index).
    pub manifest: Digest,
    /// The platform that was chosen.
    pub platform: Platform,
    /// The platforms of the index, empty where it is none.
    pub platforms: Vec<Platform>,
    /// The layers, base first.
    pub layers: Vec<LayerInfo>,
    /// Number of inodes of the merged tree; none where one of the layers has not been read yet.
    pub inodes: Option<u64>,
    /// Sum of the sizes of its regular files in bytes, as `inodes`.
    pub bytes: Option<u64>,
    /// What was odd in the layers and how it was read.
    pub warnings: Vec<String>,
    /// What the merged tree is stored under, as `inodes`.
    #[serde(skip)]
    pub tree: Option<Digest>,
    /// How its root filesystem is served where the kernel does that by itself, now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<String>,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// The blob's digest.
    pub digest: Digest,
    /// The media type of the descriptor.
    pub media_type: String,
    /// Format, see [`crate::layer::Format::name`].
    pub format: String,
    /// What reading it costs, see [`crate::layer::Reading::name`].
    pub reading: String,
    /// Size of the blob in bytes.
    pub blob_bytes: u64,
    /// What its index says, once there is one.
    #[serde(flatten)]
    pub indexed: Option<IndexedLayer>,
    /// Why it cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// What the index of a layer says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexedLayer {
    /// Sum of the sizes of its regular files in bytes.
    pub unpacked_bytes: u64,
    /// Size of our index of it in bytes.
    pub index_bytes: u64,
    /// Bytes of it in the cache.
    pub cached_bytes: u64,
    /// Number of entries.
    pub entries: u64,
}

/// `registryfs info REF PATH` and one line of `ls`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Name (in a listing) or path in the image. Bytes that are not UTF-8 are shown as U+FFFD.
    pub name: String,
    /// `dir`, `file`, `symlink`, `char`, `block` or `fifo`.
    pub kind: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Number of names.
    pub nlink: u32,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Major and minor number of a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdev: Option<(u32, u32)>,
    /// The layer that provides the path, 0 for the base.
    pub layer: u32,
    /// Digest of a file's content, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Bytes of a file in the cache.
    pub cached_bytes: u64,
}
